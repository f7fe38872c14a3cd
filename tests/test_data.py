"""From files to packed batches: which frames, which part of the picture, and that nothing depends on who loads it."""

from __future__ import annotations

import pickle
import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from rlt import PatchSpec, Random, Threshold, assets
from rlt.data.augment import AugmentConfig
from rlt.data.batch import Batch, Collate, collate_evaluation
from rlt.data.clips import ViewConfig, read_evaluation_clips, read_training_clip, training_places
from rlt.data.dataset import EvaluationDataset, TrainingDataset
from rlt.data.manifest import VideoEntry
from rlt.data.sampler import SampleKey, StepSampler, derive_seed
from rlt.errors import InvalidArgumentError, VideoError
from rlt.structures import TokenGrid
from rlt.tokens import Budget, tokenize_batch
from rlt.video import ClipPlan, ClipSpec, VideoFile, list_videos, read_clip, read_clips, read_views
from rlt.video.geometry import CropBox, View, random_resized_box
from rlt.video.sampling import segment_indices
from video_factory import HEIGHT, WIDTH, read_number, write_video

NUM_FRAMES = 80
RATE = Fraction(25)
NO_AUGMENTATION = AugmentConfig(
    random_resized_crop=False, horizontal_flip=False, rand_augment_num_ops=0, erasing_probability=0
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Three classes: two whole videos of class 0, broken ones of class 1 and one whole one, a short one of class 2."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("0a", "0b", "1b"):
        write_video(folder / f"{name}.mp4", NUM_FRAMES, options={"g": "20"})
    write_video(folder / "2a.mp4", 7)
    (folder / "1a.mp4").write_bytes(b"this is no video")
    (folder / "1c.mp4").write_bytes((folder / "0a.mp4").read_bytes()[:2000])
    return folder


def entry(path: Path, label_id: int | None = None) -> VideoEntry:
    label_id = int(path.stem[0]) if label_id is None else label_id
    return VideoEntry(str(path), label_id, f"class {label_id}", NUM_FRAMES, 25.0, WIDTH, HEIGHT, NUM_FRAMES / 25)


@pytest.fixture(scope="session")
def entries(folder) -> tuple[VideoEntry, ...]:
    return tuple(entry(path) for path in sorted(folder.glob("*.mp4")))


def numbers(frames: Tensor) -> list[int]:
    return [read_number(frame.numpy()) for frame in frames]


# Which frames


@given(st.integers(1, 400), st.integers(1, 32), st.integers(1, 8), st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_training_frames_lie_in_the_video(num_video_frames, num_frames, stride, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = training_places(ClipSpec(num_frames, stride), num_video_frames, RATE, generator)
    assert dense == list(range(dense[0], dense[0] + num_frames * stride, stride))
    assert dense[0] == 0 or dense[-1] < num_video_frames
    uniform = training_places(ClipSpec(num_frames, sampling="uniform"), num_video_frames, RATE, generator)
    for segment, place in enumerate(uniform):
        low, high = segment * num_video_frames / num_frames, (segment + 1) * num_video_frames / num_frames
        assert int(low) <= place <= min(high, num_video_frames - 1)


def test_random_starts_reach_every_place():
    config = ClipSpec(4, 2)
    starts = {training_places(config, 10, RATE, torch.Generator().manual_seed(seed))[0] for seed in range(100)}
    assert starts == {0, 1, 2, 3}
    uniform = [
        training_places(ClipSpec(3, sampling="uniform"), 9, RATE, torch.Generator().manual_seed(s)) for s in range(200)
    ]
    assert [{clip[segment] for clip in uniform} for segment in range(3)] == [{0, 1, 2}, {3, 4, 5}, {6, 7, 8}]


def test_random_clips_of_a_rate_lie_in_the_video():
    clip = ClipSpec(4, fps=10)  # spans 8.5 frames of a video of 25 frames a second
    places = [training_places(clip, 12, RATE, torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert {one[0] for one in places} == {0, 1, 2, 3}
    assert all(one == [one[0] + Fraction(5, 2) * index for index in range(4)] for one in places)


def test_evaluation_frames_are_those_of_videomae():
    uniform = ClipSpec(8, sampling="uniform")
    for num_video_frames in (5, 8, 37, 120):
        tick = num_video_frames / 8
        assert uniform.spread(2, num_video_frames, RATE) == [
            [int(tick * x) for x in range(8)],
            [int(tick / 2 + tick * x) for x in range(8)],
        ]
        assert uniform.spread(1, num_video_frames, RATE) == [[int(tick / 2 + tick * x) for x in range(8)]]
    dense = ClipSpec(16, 4).spread(5, 100, RATE)
    assert [clip[0] for clip in dense] == [0, 9, 19, 29, 39]
    assert dense[-1][-1] == 99


def test_segment_offsets_are_checked():
    for offsets in ([], [1.0], [-0.1]):
        with pytest.raises(InvalidArgumentError):
            segment_indices(10, offsets)


def test_decoded_frames_are_the_planned_ones(folder):
    path = folder / "0a.mp4"
    plans = [
        ClipPlan((3, 3, 10, 41, 79)),
        ClipPlan((0, 1, 2, 3, 4)),
        ClipPlan((70, 75, 80, 85, 90)),
    ]
    whole = View((HEIGHT, WIDTH))
    plans = [ClipPlan(plan.places, (whole, View((HEIGHT // 2, WIDTH // 2)))) for plan in plans]
    clips = read_views(path, lambda file: plans if file.num_frames == NUM_FRAMES else [])
    expected = [[3, 3, 10, 41, 79], [0, 1, 2, 3, 4], [70, 75, 75, 75, 75]]
    for views, wanted in zip(clips, expected, strict=True):
        assert [clip.frames.shape[1:3] for clip in views] == [(HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2)]
        assert all(numbers(clip.frames) == wanted for clip in views)
        assert views[0].times.tolist() == pytest.approx([number / 25 for number in wanted])
    assert [views[0].num_repeated for views in clips] == [0, 0, 3]


def test_a_video_is_opened_once_and_a_frame_decoded_once(folder, monkeypatch):
    opened, decoded = [], []
    real_open, real_decode = av.open, VideoFile.decode

    def counted(self, *arguments):
        for timed in real_decode(self, *arguments):
            decoded.append(timed.ticks)
            yield timed

    monkeypatch.setattr(av, "open", lambda *a, **k: opened.append(a) or real_open(*a, **k))
    monkeypatch.setattr(VideoFile, "decode", counted)
    clips = read_evaluation_clips(folder / "0a.mp4", ClipSpec(8, 4, size=32), ViewConfig(5, 3))
    assert len(clips) == 15
    assert len(opened) == 1
    assert len(decoded) == len(set(decoded)) <= NUM_FRAMES


def test_far_clips_are_reached_by_seeking(tmp_path, monkeypatch):
    path = tmp_path / "long.mp4"
    write_video(path, 300, options={"g": "30"})
    calls = []
    real = VideoFile.decode
    monkeypatch.setattr(VideoFile, "decode", lambda self, *args: calls.append(args) or real(self, *args))
    plans = [ClipPlan((250, 252), (View((HEIGHT, WIDTH)),)), ClipPlan((5, 7), (View((HEIGHT, WIDTH)),))]
    late, early = read_views(path, lambda _: plans)
    assert len(calls) == 2
    assert numbers(late[0].frames) == [250, 252]
    assert numbers(early[0].frames) == [5, 7]


def test_views_equal_single_clips(folder):
    path = folder / "0b.mp4"
    together = read_evaluation_clips(path, ClipSpec(8, 4, size=48), ViewConfig(3, 1))
    for ours, alone in zip(together, read_clips(path, num_clips=3, num_frames=8, size=48), strict=True):
        assert torch.equal(ours.frames, alone.frames)
        assert torch.equal(ours.times, alone.times)


def test_views_that_share_their_scaling_equal_views_read_alone(folder):
    views = [View(40, position=(place, place), hflip=hflip) for place in (0, 0.3, 1) for hflip in (False, True)]
    views += [View((20, 64)), View(40, crop=CropBox(2, 4, 30, 20)), View(None)]
    [together] = read_views(folder / "0a.mp4", lambda _: [ClipPlan((0, 30), tuple(views))])
    for view, ours in zip(views, together, strict=True):
        [[alone]] = read_views(folder / "0a.mp4", lambda _, view=view: [ClipPlan((0, 30), (view,))])
        assert torch.equal(ours.frames, alone.frames), view


def test_headers_that_promise_too_much_are_planned_again(tmp_path):
    path = tmp_path / "sound.mkv"
    # The stream has no duration of its own: the container's covers the longer sound.
    write_video(path, 40, container="matroska", audio_seconds=6.0)
    asked = []

    def plan(file: VideoFile) -> list[ClipPlan]:
        count = file.num_frames
        asked.append(count)
        return [ClipPlan((count - 2, count - 1), (View((HEIGHT, WIDTH)),))]

    [[clip]] = read_views(path, plan)
    assert asked[-1] == 40
    assert numbers(clip.frames) == [38, 39]


# Which part of the picture


def gradient(number: int) -> np.ndarray:
    """A picture whose red grows to the right and whose green grows downwards."""
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, WIDTH).round()
    picture[..., 1] = np.linspace(0, 255, HEIGHT).round()[:, None]
    return picture


@pytest.fixture(scope="session")
def gradient_video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gradient") / "gradient.mkv"
    write_video(path, 4, codec="ffv1", pix_fmt="bgr0", picture=gradient)
    return path


def one_picture(path, view: View) -> Tensor:
    return read_views(path, lambda _: [ClipPlan((0,), (view,))])[0][0].frames[0]


def resized(picture: np.ndarray, height: int, width: int) -> Tensor:
    channels_first = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    scaled = functional.interpolate(channels_first, (height, width), mode="bilinear", antialias=True)
    return scaled[0].permute(1, 2, 0)


@given(st.integers(0, 40), st.integers(0, 80), st.integers(8, 56), st.integers(8, 80), st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_crop_is_the_part_of_the_picture_scaled(gradient_video, top, left, height, width, hflip):
    ours = one_picture(gradient_video, View((32, 48), crop=CropBox(top, left, height, width), hflip=hflip)).float()
    part = gradient(0)[top : top + height, left : left + width]
    wanted = resized(part[:, ::-1] if hflip else part, 32, 48)
    assert float((ours - wanted).abs().max()) <= 2


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write matrices")
@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_crop_means_the_picture_as_displayed(tmp_path, degrees, hflip):
    path = tmp_path / "turned.mp4"
    write_video(
        path,
        2,
        codec="libx264rgb",
        pix_fmt="rgb24",
        options={"crf": "0"},
        picture=gradient,
        rotation=(degrees, hflip, False),
    )
    [[upright]] = read_views(path, lambda _: [ClipPlan((0,), (View(None),))])
    picture = upright.frames[0].numpy()
    height, width = picture.shape[:2]
    assert (height, width) == ((HEIGHT, WIDTH) if degrees % 180 == 0 else (WIDTH, HEIGHT))
    ours = one_picture(path, View((40, 24), crop=CropBox(6, 10, 50, 30))).float()
    assert float((ours - resized(picture[6:56, 10:40], 40, 24)).abs().max()) <= 2


def test_evaluation_crops_are_the_ends_and_the_middle_of_the_longer_side(gradient_video, tmp_path):
    crops = [
        clip.frames[0].float()
        for clip in read_evaluation_clips(gradient_video, ClipSpec(1, 1, size=96), ViewConfig(1, 3))
    ]
    for crop, left in zip(crops, (0, 32, 64), strict=True):
        assert float((crop - torch.from_numpy(gradient(0)[:, left : left + 96].copy())).abs().max()) <= 1
    tall = tmp_path / "tall.mkv"
    write_video(tall, 2, codec="ffv1", pix_fmt="bgr0", picture=lambda n: gradient(n).transpose(1, 0, 2).copy())
    crops = [clip.frames[0].float() for clip in read_evaluation_clips(tall, ClipSpec(1, 1, size=96), ViewConfig(1, 3))]
    for crop, top in zip(crops, (0, 32, 64), strict=True):
        assert float((crop[..., 0] - torch.from_numpy(gradient(0)[:, top : top + 96, 0].T.copy())).abs().max()) <= 1
    centre = read_evaluation_clips(gradient_video, ClipSpec(1, 1, size=96), ViewConfig(1, 1))
    assert torch.equal(centre[0].frames, read_clip(gradient_video, num_frames=1, size=96).frames)


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_random_boxes_lie_inside_and_are_even(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    box = random_resized_box(width, height, scale=(0.08, 1), ratio=(0.75, 4 / 3), generator=generator)
    assert View(8, crop=box).box(width, height) == box
    assert box.top % 2 == box.left % 2 == 0
    if min(width, height) >= 2:
        assert box.height % 2 == 0 or box.height == height
        assert box.width % 2 == 0 or box.width == width


def test_random_boxes_follow_scale_and_ratio():
    boxes = [
        random_resized_box(
            640, 480, scale=(0.08, 1), ratio=(0.75, 4 / 3), generator=torch.Generator().manual_seed(seed)
        )
        for seed in range(2000)
    ]
    areas = torch.tensor([box.height * box.width / (640 * 480) for box in boxes])
    ratios = torch.tensor([box.width / box.height for box in boxes])
    assert 0.075 < float(areas.min()) < 0.09
    assert float(areas.max()) > 0.9
    draws = np.random.default_rng(0)
    area = 640 * 480 * draws.uniform(0.08, 1, 20_000)
    ratio = np.exp(draws.uniform(np.log(0.75), np.log(4 / 3), 20_000))
    fits = (np.sqrt(area * ratio) <= 640) & (np.sqrt(area / ratio) <= 480)
    assert float(areas.mean()) == pytest.approx(area[fits].mean() / (640 * 480), abs=0.015)
    assert 0.74 < float(ratios.min()) < 0.78
    assert 1.3 < float(ratios.max()) < 1.35
    assert {box.left for box in boxes} >= {0, 100, 200}


def test_training_clips_show_a_random_part_mirrored_half_of_the_time(gradient_video):
    mirrored, widths = 0, set()
    for seed in range(40):
        frames = read_training_clip(gradient_video, ClipSpec(2, 1, size=32), AugmentConfig(), seed=seed).frames
        red, green = frames[0, ..., 0].float(), frames[0, ..., 1].float()
        across, down = float(red[16, -1] - red[16, 0]), float(green[-1, 16] - green[0, 16])
        mirrored += across < 0
        widths.add(round(abs(across)))
        assert down > 0  # never upside down
    assert 10 < mirrored < 30
    assert len(widths) > 15


def test_directional_labels_are_never_mirrored(gradient_video):
    config = AugmentConfig(horizontal_flip=False)
    for seed in range(20):
        red = read_training_clip(gradient_video, ClipSpec(1, 1, size=32), config, seed=seed).frames[0, ..., 0].float()
        assert float(red[16, -1] - red[16, 0]) > 0


def test_without_augmentation_training_sees_the_centre_crop(folder):
    clip = read_training_clip(folder / "0a.mp4", ClipSpec(4, 2, size=(HEIGHT)), NO_AUGMENTATION, seed=3)
    start = float(clip.times[0])
    wanted = read_clip(folder / "0a.mp4", num_frames=4, frame_stride=2, size=HEIGHT, start=start)
    assert torch.equal(clip.frames, wanted.frames)


def test_a_crop_that_does_not_fit_is_named(gradient_video):
    with pytest.raises(InvalidArgumentError, match="20x20 pixels at") as caught:
        one_picture(gradient_video, View(16, crop=CropBox(90, 0, 20, 20)))
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="needs the size"):
        View(None, crop=CropBox(0, 0, 1, 1))
    for places in ((), (-1, 2), (3, 2)):
        with pytest.raises(InvalidArgumentError):
            ClipPlan(places)


# Data sets


def training(entries, **augment) -> TrainingDataset:
    return TrainingDataset(entries, ClipSpec(4, 2, size=32), AugmentConfig(**augment), seed=11)


def test_a_sample_is_a_function_of_its_key(entries):
    dataset = training(entries)
    first, again, later = (dataset[SampleKey(0, position)] for position in (5, 5, 6))
    assert first.frames.shape == (4, 32, 32, 3)
    assert first.frames.dtype == torch.uint8
    assert (first.label_id, first.path, first.failed, first.position) == (0, entries[0].path, (), 5)
    assert torch.equal(first.frames, again.frames)
    assert not torch.equal(first.frames, later.frames)
    other_run = TrainingDataset(entries, dataset.clip, dataset.augment, seed=12)
    assert not torch.equal(first.frames, other_run[SampleKey(0, 5)].frames)


def test_a_video_that_does_not_decode_is_replaced_by_the_next_of_its_class(entries, folder):
    dataset = training(entries)
    assert [Path(one.path).stem for one in entries] == ["0a", "0b", "1a", "1b", "1c", "2a"]
    for asked_for, failing in ((2, [2]), (4, [4, 2])):  # the one after the last of the class is its first
        sample = dataset[SampleKey(asked_for, 0)]
        assert (sample.path, sample.label_id) == (entries[3].path, 1)
        assert [path for path, _ in sample.failed] == [entries[index].path for index in failing]
        assert not any("\n" in reason for _, reason in sample.failed)
        assert torch.equal(sample.frames, dataset[SampleKey(3, 0)].frames)


def test_a_class_without_a_usable_video_is_replaced_by_the_next_class(folder):
    dataset = training([entry(folder / name) for name in ("0a.mp4", "1a.mp4", "1c.mp4", "2a.mp4")])
    sample = dataset[SampleKey(2, 0)]
    assert sample.label_id == 2
    assert [Path(path).stem for path, _ in sample.failed] == ["1c", "1a"]
    last = training([entry(folder / "0a.mp4"), entry(folder / "1a.mp4")])[SampleKey(1, 0)]
    assert last.label_id == 0


def test_no_usable_video_at_all_is_an_error(folder):
    with pytest.raises(VideoError, match="none of 2 videos") as caught:
        training([entry(folder / "1a.mp4"), entry(folder / "1c.mp4")])[SampleKey(0, 0)]
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidArgumentError, match="0 videos"):
        training([])


def test_warnings_about_a_video_become_notes(tmp_path):
    path = tmp_path / "cut.mp4"
    write_video(path, 100, options={"g": "10"}, container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[:-100])
    dataset = TrainingDataset([entry(path, 0)], ClipSpec(2, 1, size=32), NO_AUGMENTATION, seed=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample = dataset[SampleKey(0, 2)]
    assert sample.failed == ()
    [note] = sample.notes
    assert "the file is cut off" in note


def test_evaluation_gives_all_views_or_the_error(entries):
    rule = Random(like=Budget(keep_ratio=0.5))
    dataset = EvaluationDataset(entries, ClipSpec(4, 2, size=32), ViewConfig(2, 3), rule, PatchSpec())
    sample = dataset[0]
    assert (sample.label_id, sample.error) == (0, None)
    assert len(sample.tokens) == 6
    assert all(view.grid == TokenGrid(2, 2, 2) for view in sample.tokens)
    assert sample.seconds_decode > 0
    assert sample.seconds_tokenize > 0
    clips = read_evaluation_clips(entries[0].path, dataset.clip, dataset.views)
    seeds = [derive_seed(0, int.from_bytes(b"0a.mp4", "big"), view) for view in range(6)]
    for ours, wanted in zip(
        sample.tokens, tokenize_batch(torch.stack([c.frames for c in clips]), rule, PatchSpec(), seeds), strict=True
    ):
        assert torch.equal(ours.patches, wanted.patches)
        assert torch.equal(ours.coords, wanted.coords)
    broken = dataset[2]
    assert broken.tokens == []
    assert broken.error
    assert "\n" not in broken.error

    batch = collate_evaluation([dataset[0], broken, dataset[5]])
    assert batch.views_per_video == (6, 0, 6)
    assert [one.error is None for one in batch.samples] == [True, False, True]
    assert batch.packed is not None
    assert len(batch.packed) == 12
    assert torch.equal(batch.packed.unpack()[7].patches, dataset[5].tokens[1].patches)
    assert len(batch.to("cpu")) == 3
    nothing = collate_evaluation([broken])
    assert nothing.packed is None
    assert nothing.to("cpu").packed is None


# Batches


def collate(**changes) -> Collate:
    return Collate(Threshold(), AugmentConfig(**changes), 3, PatchSpec(), seed=11)


def test_a_batch_holds_what_its_samples_held(entries):
    dataset = training(entries)
    samples = [dataset[SampleKey(index, 7 + index)] for index in range(4)]
    batch = collate(mixup_prob=0, label_smoothing=0.3)(samples)
    wanted = tokenize_batch(torch.stack([sample.frames for sample in samples]), Threshold(), PatchSpec())
    for ours, alone in zip(batch.packed, wanted, strict=True):
        assert torch.equal(ours.patches, alone.patches)
        assert torch.equal(ours.lengths, alone.lengths)
    assert batch.targets.argmax(1).tolist() == [0, 0, 1, 1]
    assert batch.paths == tuple(sample.path for sample in samples)
    assert [Path(path).stem for path, _ in batch.failed] == ["1a"]
    assert batch.position == 7
    assert len(batch) == 4
    torch.testing.assert_close(batch.targets[0], torch.tensor([0.8, 0.1, 0.1]))
    assert torch.equal(batch.to("cpu").targets, batch.targets)


def test_tokens_are_selected_after_mixing(entries):
    dataset = training(entries)
    samples = [dataset[SampleKey(index, index)] for index in (0, 3)]
    mixing = collate()
    batches = [mixing(samples) for _ in range(2)]
    assert same(*batches)
    torch.testing.assert_close(batches[0].targets.sum(1), torch.ones(2))
    plain = collate(mixup_prob=0, label_smoothing=0)(samples)
    assert plain.targets.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert not torch.equal(plain.packed.patches[:4], batches[0].packed.patches[:4])


def test_labels_outside_the_classes_are_named(entries):
    sample = training(entries)[SampleKey(5, 0)]
    with pytest.raises(InvalidArgumentError, match="label 2; 0 to 1"):
        Collate(Threshold(), AugmentConfig(), 2, PatchSpec())([sample])
    for call in (
        lambda: collate()([]),
        lambda: collate_evaluation([]),
        lambda: Collate(Threshold(), AugmentConfig(), 0, PatchSpec()),
    ):
        with pytest.raises(InvalidArgumentError):
            call()


def same(ours: Batch, theirs: Batch) -> bool:
    tensors = [(one.packed.patches, one.packed.coords, one.packed.lengths, one.targets) for one in (ours, theirs)]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True)) and (
        ours.paths,
        ours.failed,
        ours.position,
    ) == (
        theirs.paths,
        theirs.failed,
        theirs.position,
    )


def loaded(entries, num_workers: int, *, start_step: int = 0, context: str | None = None) -> list[Batch]:
    steps = StepSampler(len(entries), batch_size=3, seed=2, start_step=start_step, num_steps=4)
    loader = DataLoader(
        training(entries),
        batch_sampler=steps,
        collate_fn=collate(),
        num_workers=num_workers,
        multiprocessing_context=context,
    )
    return list(loader)


def test_batches_do_not_depend_on_the_workers_or_on_resuming(entries):
    torch.manual_seed(1)
    alone = loaded(entries, 0)
    torch.manual_seed(2)
    for others in (loaded(entries, 2, context="fork"), loaded(entries, 1, context="spawn")):
        assert all(same(a, b) for a, b in zip(alone, others, strict=True))
    resumed = loaded(entries, 0, start_step=2)
    assert all(same(a, b) for a, b in zip(alone[2:], resumed, strict=True))
    assert [batch.position for batch in alone] == [0, 3, 6, 9]


def test_loading_leaves_the_global_random_state_alone(entries):
    dataset, pack = training(entries, erasing_probability=1.0), collate()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    pack([dataset[SampleKey(0, 0)], dataset[SampleKey(1, 1)]])
    assert torch.equal(torch.get_rng_state(), state)


def test_everything_that_workers_are_given_can_be_pickled(entries):
    evaluation = EvaluationDataset(entries, ClipSpec(4, 2, size=32), ViewConfig(1, 1), Threshold(), PatchSpec())
    for thing in (training(entries), evaluation, collate(), StepSampler(3, batch_size=1)):
        pickle.loads(pickle.dumps(thing))


@pytest.mark.gpu
def test_batches_are_pinned_and_moved(entries):
    batch = collate()([training(entries)[SampleKey(0, 0)], training(entries)[SampleKey(1, 1)]]).pin_memory()
    assert batch.packed.patches.is_pinned()
    assert batch.targets.is_pinned()
    assert same(batch.to("cuda", non_blocking=True).to("cpu"), batch)


# Configuration and real video


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ClipSpec(num_frames=0), "num_frames is 0"),
        (lambda: ClipSpec(frame_stride=0), "frame_stride is 0"),
        (lambda: ClipSpec(size=0), "size is 0"),
        (lambda: ClipSpec(sampling="sparse"), "allowed are dense, uniform"),
        (lambda: ViewConfig(num_clips=0), "num_clips is 0"),
        (lambda: ViewConfig(num_crops=2), "num_crops is 2; allowed are 1, 3"),
    ],
)
def test_configuration_errors_name_the_field(build, words):
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bundled", [True, False], ids=["bundled", "other"])
def test_real_video(bundled, request):
    if bundled:
        paths = [assets.path(name) for name in assets.names()]
    else:
        paths = list_videos(request.getfixturevalue("video_data") / "ucf6" / "val")[::40]
    entries = [entry(path, label_id) for label_id, path in enumerate(paths)]
    dataset = TrainingDataset(entries, ClipSpec(16, 4, size=64), AugmentConfig(), seed=0)
    batch = Collate(Threshold(), AugmentConfig(), len(entries), PatchSpec())(
        [dataset[SampleKey(index, index)] for index in range(len(entries))]
    )
    assert batch.failed == ()
    assert 0 < batch.packed.num_tokens <= len(entries) * 8 * 16
    evaluation = EvaluationDataset(entries, ClipSpec(16, 4, size=64), ViewConfig(5, 3), Threshold(), PatchSpec())
    assert all(len(sample.tokens) == 15 and sample.error is None for sample in (evaluation[0], evaluation[1]))
