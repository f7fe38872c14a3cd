"""The benchmark suites on real clips and a small network: the work is right, times are not judged."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partialmethod
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

import oracles
import rlt
from rlt import Everything, Threshold, assets
from rlt.benchmark import SUITES, BenchmarkSettings, adapted, loader, networks, run_suite
from rlt.benchmark.harness import Arm, Rounds, Work, packed_by, read_frames
from rlt.benchmark.peers.decoders import decoders
from rlt.benchmark.peers.padded import block_mask_attention, padded_attention, padded_logits
from rlt.benchmark.peers.tokens import difference_ways, reference_tokenize
from rlt.benchmark.towers import build_tower
from rlt.checkpoints import MODELS, create_model
from rlt.conf import compose
from rlt.data.batch import Batch
from rlt.data.manifest import Manifest, VideoEntry, read_manifest, write_manifest
from rlt.errors import InvalidArgumentError
from rlt.measure import Timing, peak_memory_bytes
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD
from rlt.training.loaders import TrainingData
from rlt.video import ClipSpec

VIDEOS = (assets.path("traffic.mp4"), assets.path("animation.mp4"))
SMALL = BenchmarkSettings(model="vit_tiny", clip=ClipSpec(8, size=64), videos=VIDEOS, clips=2, rounds=2)
SETTINGS = {**dict.fromkeys(SUITES, SMALL), "towers": replace(SMALL, model="qwen3_tiny")}
"""Of each suite; towers are models of their own."""
NONE = Path("none.csv")
TOLD: dict[str, list[tuple[int, int, str]]] = {}
"""Progress of each suite."""
NOTED: list[Batch] = []
"""Batches of the suite loader."""


@pytest.fixture(scope="module", autouse=True)
def _three_layers_and_a_manifest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that is held here needs the twelve layers of ViT-Ti; the suite loader reads a manifest."""
    manifest = tmp_path_factory.mktemp("manifest") / "videos.csv"
    entries = [VideoEntry(str(path), number, f"class {number}") for number, path in enumerate((*VIDEOS, "gone.mp4"))]
    write_manifest(Manifest(tuple(entries), ("class 0", "class 1", "class 2")), manifest)
    SETTINGS["loader"] = replace(SMALL, videos=(manifest,), workers=(0, 2), batches=2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(MODELS, "vit_tiny", MODELS["vit_tiny"].replace(depth=3))
        yield


@lru_cache
def measured(suite: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(adapted, "DEPTH", 4)  # windows, whole frames and features of deeper layers all occur
        note = loader._Seen.note
        patched.setattr(loader._Seen, "note", lambda seen, batch: NOTED.append(batch) or note(seen, batch))
        report = run_suite(suite, SETTINGS[suite], on_progress=lambda *what: TOLD.setdefault(suite, []).append(what))
    numbers: dict[str, Any] = json.loads(json.dumps(report.to_json(), allow_nan=False))
    return numbers


def arms_by_name(suite: str) -> dict[str, Any]:
    return {arm["name"]: arm for arm in measured(suite)["arms"]}


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_leaves_the_promised_numbers(suite: str) -> None:
    numbers = measured(suite)
    assert numbers["suite"] == suite
    assert numbers["machine"]["processor"]
    assert numbers["settings"]["dtype"] == "float32"
    for arm in numbers["arms"]:
        assert arm["seconds_spread"][0] <= arm["seconds_median"] <= arm["seconds_spread"][1]
        assert 0 < arm["tokens_kept"] <= 1
        assert {"flops", "peak_memory_bytes", "speedup"} <= set(arm)


def test_patched_models_are_exact_where_nothing_is_dropped_and_apart_from_each_other() -> None:
    pytest.importorskip("transformers")
    numbers = measured("adapters")
    assert {*numbers["largest_differences"], *numbers["left_out"]} == set(adapted.CASES)
    for name, differences in numbers["largest_differences"].items():
        assert differences["identity"] <= 1e-5, name
        assert differences["naive_twin"] <= 1e-4, name
        assert differences["one_by_one"] <= 1e-4, name
        dense, rlt_arm = (arm for arm in numbers["arms"] if arm["model"] == name)
        assert rlt_arm["tokens_kept"] < dense["tokens_kept"] == 1
        assert rlt_arm["flops"] < dense["flops"]


@pytest.mark.parametrize("suite", ["forward", "train-step"])
def test_networks_run_beside_their_peers_at_the_same_count_or_cost(suite: str) -> None:
    arms, numbers = arms_by_name(suite), measured(suite)
    assert {"dense", "rlt", "random", "tome", "padded", "ideal"} <= set(arms)
    assert arms["rlt"]["tokens_kept"] == arms["random"]["tokens_kept"] < 1
    assert arms["dense"]["tokens_kept"] == arms["tome"]["tokens_kept"] == 1
    assert arms["tome"]["flops"] == pytest.approx(arms["rlt"]["flops"], rel=0.1)
    assert arms["padded"]["flops"] >= arms["rlt"]["flops"]
    assert numbers["flop_ratio"] == arms["rlt"]["flops"] / arms["dense"]["flops"] < 1
    assert arms["ideal"]["seconds_median"] == pytest.approx(arms["dense"]["seconds_median"] * numbers["flop_ratio"])
    assert arms["dense"]["runs"] in ("dense_packed", "dense_clip_by_clip")


def test_compiled_arms_train_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_network = rlt.VisionTransformer.compile_network
    traced = partialmethod(compile_network, backend="eager")  # tests/test_compile.py holds what is generated
    monkeypatch.setattr(rlt.VisionTransformer, "compile_network", traced)
    monkeypatch.setitem(MODELS, "vit_tiny", MODELS["vit_tiny"].replace(depth=1))
    model = rlt.create_model("vit_tiny", num_classes=5)
    variants = networks._variants(model, replace(SMALL, compiled=True))
    by_name = {arm.name: (forward, packs) for arm, forward, packs in variants}
    assert {"dense_packed_compiled", "dense_clip_by_clip_compiled", "rlt_compiled"} <= set(by_name)
    forward, packs = by_name["rlt_compiled"]
    assert list(forward.parameters()) == list(model.parameters())
    torch.testing.assert_close(forward(packs[0]), model(packs[0]), rtol=1e-4, atol=1e-5)
    assert model._network is not forward._network


def test_memory_of_a_training_step_holds_the_gradients() -> None:
    parameters = sum(parameter.numel() for parameter in create_model("vit_tiny").parameters())
    for name, arm in arms_by_name("train-step").items():
        assert name == "ideal" or arm["peak_memory_bytes"] > 4 * parameters, name


def test_stages_do_the_same_work_as_the_reference() -> None:
    assert measured("tokenize")["mask_entries_that_differ"] == 0
    tokenize = arms_by_name("tokenize")
    assert tokenize["reference"]["tokens_kept"] == tokenize["rlt"]["tokens_kept"]
    assert measured("embed")["largest_difference"] < 1e-4


def test_attention_is_timed_forward_and_backward() -> None:
    passes = {(arm["name"], arm["pass"]) for arm in measured("attention")["arms"]}
    assert passes == {
        (name, direction)
        for name in ("dense", "rlt", "padded", "block_mask", "rlt_nested")
        for direction in ("forward", "forward and backward")
    }


def test_decoders_are_compared_file_by_file() -> None:
    arms = measured("decode")["arms"]
    assert {arm["video"] for arm in arms} == {path.name for path in VIDEOS}
    assert {"pyav", "pyav_threads"} <= {arm["name"] for arm in arms}
    assert all(arm["speedup"] == 1 for arm in arms if arm["name"] == "pyav")
    assert set(measured("decode")["clips_per_second_per_core"]) == {path.name for path in VIDEOS}


@pytest.mark.parametrize("name", ["rlt", "compiled", "numba"])
def test_every_way_to_sum_differences_gives_the_same_integers(name: str) -> None:
    ways = difference_ways()
    if name not in ways:
        pytest.skip(f"{name} cannot run here")
    frames = read_frames(SMALL)
    assert torch.equal(ways[name](frames), ways["int16"](frames))


@pytest.mark.parametrize("name", ["pyav_threads", "torchcodec", "opencv"])
def test_decoders_read_the_same_frames(name: str) -> None:
    found = decoders(SMALL)
    if name not in found:
        pytest.skip(f"{name} is not installed")
    ours, theirs = (found[decoder](VIDEOS[0]).float() for decoder in ("pyav", name))
    assert theirs.shape == ours.shape == (8, 64, 64, 3)
    assert float((ours - theirs).abs().mean()) < 4  # scalers differ; a neighbouring frame would differ as much as below
    assert float((ours[:-1] - ours[1:]).abs().mean()) > 0


def test_end_to_end_is_held_to_the_forward_pass() -> None:
    numbers, arms = measured("end-to-end"), arms_by_name("end-to-end")
    assert {"dense", "rlt", "reference", "forward_dense", "forward_rlt"} == set(arms)
    assert numbers["end_to_end_over_forward"] == pytest.approx(
        numbers["speedup_end_to_end"] / numbers["speedup_forward"]
    )


def test_frames_grow_by_doubling_on_every_video() -> None:
    arms = measured("frames")["arms"]
    assert {arm["frames"] for arm in arms} == {16, 32, 64}
    dense = {arm["frames"]: arm["flops"] for arm in arms if arm["name"] == "dense" and arm["video"] == "traffic.mp4"}
    assert dense[64] > 4 * dense[16]  # attention grows faster than the frames
    assert all(arm["speedup"] is None for arm in arms if arm["video"] == "all")
    memory = {arm["name"]: arm["peak_memory_bytes"] for arm in arms if arm["frames"] == 64}
    assert memory["rlt"] < memory["dense"]


def test_the_loader_makes_the_next_batches_of_training_once_each() -> None:
    numbers = measured("loader")
    # 2 rounds of 2 batches without and with workers, after one batch for each worker; 1 + 2 batches of the stages.
    positions = [batch.position for batch in NOTED]
    assert sorted(positions) == [2 * number for number in range(2, 2 + 2 * 2 * 2 + 3)]  # clips, two in a batch
    assert TOLD["loader"][-1] == (8, 8, "2 workers")
    config = compose(
        ["data=folder", f"data.train={SETTINGS['loader'].videos[0]}", "data.clip.num_frames=8", "data.clip.size=64",
         "model=vit_tiny", "trainer.batch_size=2", "trainer.accelerator=cpu"]
    )  # fmt: skip
    data = TrainingData(config, read_manifest(str(config.data.train)), None, MODELS["vit_tiny"])
    for expected in islice(data.train_dataloader(), 2, 5):
        made = NOTED[positions.index(expected.position)]
        assert torch.equal(made.packed.patches, expected.packed.patches)
        assert torch.equal(made.targets, expected.targets)
    kept = sum(batch.packed.num_tokens for batch in NOTED) / sum(batch.packed.num_dense for batch in NOTED)
    shares = {arm["name"]: arm["tokens_kept"] for arm in numbers["arms"]}
    assert shares == {"loader": kept, "decode": 1, "augmentation": 1, "tokens": kept, "network": kept}
    ((path, error),) = numbers["replaced"].items()
    assert Path(path).name == "gone.mp4"
    assert "no such file" in error
    assert [arm["workers"] for arm in numbers["arms"] if arm["name"] == "loader"] == [0, 2]


def test_what_limits_a_run_is_what_is_slowest_there() -> None:
    def conclusions(decode: float, tokens: float, network: float, **loading: float) -> Any:
        stages = {"decode": decode, "augmentation": 0.25, "tokens": tokens, "network": network}
        arms = [Arm(name, timing=Timing((seconds,))) for name, seconds in stages.items()]
        arms += [
            Arm("loader", details={"workers": int(name[1:])}, timing=Timing((seconds,)))
            for name, seconds in loading.items()
        ]
        return loader._conclusions(arms, 8)

    found = conclusions(4, 1, 2, w0=5, w1=5, w2=2.5, w4=1.25)
    assert found["shares"] == {"decode": 4 / 7.25, "augmentation": 0.25 / 7.25, "tokens": 1 / 7.25, "network": 2 / 7.25}
    assert found["limits"] == {"0": "decode", "1": "decode", "2": "decode", "4": "network"}
    assert found["clips_per_second"] == {"0": 8 / 5, "1": 8 / 5, "2": 8 / 2.5, "4": 8 / 1.25}
    assert found["training_clips_per_second"] == {"0": 8 / 7, "1": 8 / 5, "2": 8 / 2.5, "4": 8 / 2}
    assert conclusions(1, 2, 4, w0=3, w1=3)["limits"] == {"0": "network", "1": "network"}
    assert conclusions(1, 2, 1, w0=3, w1=3)["limits"] == {"0": "tokens", "1": "tokens"}


def test_numbers_of_workers_double_up_to_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, workers in ((1, [0, 1]), (2, [0, 1, 2]), (8, [0, 1, 2, 4, 8]), (12, [0, 1, 2, 4, 8, 12])):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert loader.usual_workers() == workers


def test_the_reference_finds_the_same_patches() -> None:
    clip = rlt.read_clip(assets.path("traffic.mp4"), size=96)
    patches, mask = reference_tokenize(clip.frames[None])
    tokens = rlt.tokenize(clip)
    assert torch.equal(mask[0], tokens.mask())
    pixels = tokens.patches.view(-1, 2, 16, 16, 3).permute(0, 4, 1, 2, 3).float() / 255
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(patches, (pixels - mean) / std)


def test_the_padded_network_gives_the_same_logits() -> None:
    frames = read_frames(SMALL)
    packed = packed_by(Threshold(), frames, SMALL)
    assert len(set(packed.segments.lengths)) == 2
    model = rlt.create_model("vit_tiny", run_lengths="ignored").double()  # padding knows nothing of run lengths
    with torch.inference_mode():
        torch.testing.assert_close(padded_logits(model, packed), model(packed))


@pytest.mark.parametrize("attend", [padded_attention, block_mask_attention])
def test_other_ways_to_attend_equal_the_naive_twin(attend: Any) -> None:
    lengths = (1, 7, 3)
    q, k, v = torch.randn(3, sum(lengths), 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = attend(q, k, v, rlt.Segments.from_lengths(lengths))
    torch.testing.assert_close(result, oracles.padded_attention(q, k, v, lengths))


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def work() -> None:
        first = torch.empty(1000, 1000)
        second = torch.empty(2000, 1000)
        del first
        third = torch.empty(500, 1000)
        del second, third

    assert peak_memory_bytes(work) == 12_000_000
    assert peak_memory_bytes(lambda: None) == 0


def test_rounds_run_every_work_once_more_than_counted() -> None:
    runs: list[str] = []
    told: list[tuple[int, int, str]] = []
    works: list[Work] = [(Arm(name), lambda name=name: runs.append(name)) for name in ("a", "b")]  # type: ignore[misc]
    arms = Rounds(lambda *what: told.append(what)).measure(works, 2, "cpu")
    assert runs == ["a", "b", "a", "b", "a", "b"]
    assert [len(arm.timing.seconds) for arm in arms] == [2, 2]
    assert told[-1][:2] == (6, 6)


def test_tome_is_left_out_where_it_cannot_get_as_cheap() -> None:
    settings = replace(SMALL, rule=Threshold(100.0), clip=ClipSpec(32, size=64), rounds=1)
    names = {arm.name for arm in run_suite("forward", settings).arms}
    assert "tome" not in names
    assert {"dense", "rlt", "padded"} <= names


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ["decode", "end-to-end", "loader"])
def test_suites_that_begin_with_a_file_run_on_cuda_in_bfloat16(suite: str) -> None:
    pytest.importorskip("av")  # tests/test_gpu.py runs all others, which need no decoder
    settings = replace(SETTINGS[suite], clip=ClipSpec(size=64), rounds=1, device="cuda", dtype=torch.bfloat16)
    assert run_suite(suite, settings).to_json()["machine"]["driver"]  # type: ignore[index]


def test_videomae_of_transformers_runs_beside_ours_at_the_same_flops() -> None:
    pytest.importorskip("transformers")
    for suite in ("forward", "train-step"):
        report = run_suite(suite, replace(SMALL, rounds=1, transformers=True))
        assert report.arm("transformers").flops == report.arm("dense").flops
        assert report.arm("transformers").tokens_kept == 1
        assert report.extra["transformers_over_rlt"]  # type: ignore[truthy-bool]


def test_towers_are_of_the_published_sizes() -> None:
    pytest.importorskip("transformers")
    millions = {"videomae_base": 86, "vjepa2_large": 304, "qwen2.5_vl_7b": 677, "qwen3_vl_8b": 577}
    for name, size in millions.items():
        model = build_tower(BenchmarkSettings(model=name, clip=ClipSpec(16, 1), device="meta", dtype=torch.bfloat16))
        tower = model.model.visual if "qwen" in name else getattr(model, "videomae", None) or model.vjepa2.encoder
        assert sum(parameter.numel() for parameter in tower.parameters()) / 1e6 == pytest.approx(size, rel=0.02), name
        assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}


def test_flops_of_the_variable_length_kernel() -> None:
    q, k = torch.empty(7, 2, 8), torch.empty(9, 2, 8)
    offsets = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)
    assert adapted.varlen_flops(q, k, k, *offsets, 4, 5) == 4 * (3 * 4 + 4 * 5) * 2 * 8


def test_bfloat16_runs_on_the_cpu() -> None:
    settings = replace(SMALL, clip=ClipSpec(size=64), rounds=1, dtype=torch.bfloat16)
    for suite in ("embed", "attention", "forward", "train-step", "end-to-end"):
        assert run_suite(suite, settings).to_json()["settings"]["dtype"] == "bfloat16"  # type: ignore[index]


@pytest.mark.parametrize(
    ("suite", "settings", "message"),
    [
        (
            "speed",
            BenchmarkSettings(videos=VIDEOS),
            "suite is 'speed'; allowed are tokenize, feed, embed, attention",
        ),
        ("tokenize", BenchmarkSettings(), "no videos"),
        ("decode", BenchmarkSettings(), "no videos"),
        ("end-to-end", BenchmarkSettings(), "no videos"),
        ("frames", BenchmarkSettings(), "no videos"),
        (
            "loader",
            BenchmarkSettings(videos=VIDEOS),
            "the suite loader reads one manifest, not .*animation.mp4; write it",
        ),
        ("loader", BenchmarkSettings(videos=(Path("none.csv"),)), "none.csv: no such file"),
        (
            "loader",
            BenchmarkSettings(videos=(Path("none.csv"),), workers=(0, -1)),
            "workers is -1; at least 0 is needed",
        ),
        ("loader", BenchmarkSettings(videos=(Path("none.csv"),), batches=0), "batches is 0; at least 1 is needed"),
        (
            "decode",
            BenchmarkSettings(videos=VIDEOS, workers=(2,)),
            r"workers is \(2,\), which the suite decode does not",
        ),
        ("forward", BenchmarkSettings(videos=VIDEOS, batches=2), "leave it out, or run loader"),
        ("embed", BenchmarkSettings(videos=VIDEOS, transformers=True), "leave it out, or run forward or train-step"),
        ("towers", BenchmarkSettings(videos=VIDEOS), "model is 'vit_base'; allowed are videomae_base"),
        ("loader", BenchmarkSettings(videos=VIDEOS, compiled=True), "leave it out, or run forward or train-step"),
        ("forward", BenchmarkSettings(videos=VIDEOS, clips=0), "clips is 0; at least 1 is needed"),
        ("forward", BenchmarkSettings(videos=VIDEOS, dtype=torch.float64), "dtype is torch.float64; allowed are"),
    ],
)
def test_bad_settings_are_named(suite: str, settings: BenchmarkSettings, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        run_suite(suite, settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_told() -> None:
    with pytest.raises(InvalidArgumentError, match="device is 'cuda', but torch sees no GPU; use cpu"):
        run_suite("forward", BenchmarkSettings(videos=VIDEOS, device="cuda"))


def test_counted_memory_is_what_is_measured() -> None:
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "count_memory.py"))
    frames = read_frames(SMALL)
    for rule, name in ((Everything(), "dense_packed"), (Threshold(), "rlt")):
        found = [arm for arm in measured("train-step")["arms"] if name in (arm["name"], arm.get("runs"))]
        counted = script["count_peak"]("vit_tiny", packed_by(rule, frames, SMALL), training=True)
        assert counted == pytest.approx(found[0]["peak_memory_bytes"], rel=0.02)
