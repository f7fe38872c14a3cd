"""Run every arm on the views of every video, once dense; what was measured lies in a folder and is not measured twice.

Shape legend: V views of a video, C classes, D features.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import rlt
from rlt.checks import at_least
from rlt.data.clips import read_evaluation_clips
from rlt.data.manifest import Manifest, VideoEntry
from rlt.data.sampler import derive_seed
from rlt.errors import VideoError
from rlt.evaluation.evaluator import evenly_chosen
from rlt.evaluation.results import EvaluationSettings
from rlt.files import replacing
from rlt.frontier.arms import DENSE, FrontierArm
from rlt.frontier.networks import Network, answers, describe, merged_answers
from rlt.frontier.results import COLUMNS, FrontierResult, VideoFidelity
from rlt.measure import machine_info
from rlt.network.flops import forward_flops
from rlt.network.vit import VisionTransformer
from rlt.tokens import tokenize_batch

Values = dict[str, NDArray[np.float64]]
"""By the key of an arm: float64 [V, columns], see `COLUMNS`."""


def measure_frontier(
    model: Network,
    manifest: Manifest,
    settings: EvaluationSettings,
    arms: Sequence[FrontierArm],
    *,
    cache: str | Path | None = None,
    max_videos: int | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> FrontierResult:
    """Hold every arm against the dense network, view by view.

    Args:
        model: in evaluation mode meanwhile; its own `run_lengths` and `merge_per_block` play no part. A patched
            model of transformers is held against itself without the patch, and its FLOPs are counted as they are spent.
        manifest: videos; those that cannot be read are left out and listed.
        settings: views, device and precision; its rule plays no part.
        arms: what is compared.
        cache: folder where each video's numbers are kept, so that a second run goes on where the first one ended, and
            measures only arms that are new. Other weights, views or precision are other entries, and so is
            what other code of rlt or another torch measured.
        max_videos: only so many, evenly spread over the manifest.
        on_progress: called with (videos done, videos in all, name of the last one).

    Raises:
        VideoError: if not a single video can be read.
    """
    at_least(1, max_videos=max_videos)
    usable = [entry for entry in manifest.entries if entry.usable]
    entries = evenly_chosen(usable, max_videos)
    failed = [(entry.path, entry.status) for entry in manifest.entries if not entry.usable]
    found: list[VideoFidelity] = []
    with _measuring(model, settings) as runner:
        store = _Store(cache, runner.fingerprint())
        for done, entry in enumerate(entries, 1):
            values = store.read(entry)
            missing = [arm for arm in (DENSE, *arms) if arm.key not in values]
            if missing:
                try:
                    values |= runner.run(entry, missing)
                except VideoError as error:
                    failed.append((entry.path, str(error)))
                    continue
                store.write(entry, values)
            found.append(VideoFidelity(entry.path, entry.label_id, {arm: values[arm.key] for arm in (DENSE, *arms)}))
            if on_progress is not None:
                on_progress(done, len(entries), Path(entry.path).name)
    if not found:
        raise VideoError(f"none of {len(manifest.entries)} videos can be read; the first: {': '.join(failed[0])}")
    return FrontierResult(settings, tuple(arms), tuple(found), tuple(failed), machine_info(settings.device))


@contextmanager
def _measuring(model: Network, settings: EvaluationSettings) -> Iterator[_Runner]:
    """The model as arms need it, and as it was afterwards."""
    training, run_lengths = model.training, model.run_lengths
    merges = model.merge_per_block if isinstance(model, VisionTransformer) else 0
    rule = None if isinstance(model, VisionTransformer) else model.model.rlt.options.rule
    try:
        yield _Runner(model.eval().to(settings.device), settings)
    finally:
        model.train(training)
        if isinstance(model, VisionTransformer):
            model.merge_per_block = merges
        elif rule is not None:
            model.use(rule)
        model.run_lengths = run_lengths


class _Outputs(NamedTuple):
    """Of one arm, all float64."""

    logits: Tensor
    """[V, C]."""
    features: Tensor
    """[V, D], before the head."""
    tokens: Tensor
    """[V], that went in."""
    flops: Tensor
    """[V]."""


class _Runner:
    """Reads a video once, and runs arms on its views."""

    def __init__(self, model: Network, settings: EvaluationSettings) -> None:
        self.model, self.settings = model, settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)

    def fingerprint(self) -> str:
        """What the numbers depend on beside the video and the arm."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        settings = self.settings
        how = [asdict(settings.clip), asdict(settings.views), settings.dtype, settings.decoder, settings.seed]
        digest.update(json.dumps(how, sort_keys=True, default=str).encode())
        digest.update(describe(self.model).encode())
        digest.update(f"{rlt.__version__} {torch.__version__}".encode())
        digest.update(_code_digest())
        return digest.hexdigest()

    def run(self, entry: VideoEntry, arms: Sequence[FrontierArm]) -> Values:
        """The columns of each arm for each view, float64 [V, columns].

        Raises:
            VideoError: if the video cannot be read.
        """
        settings = self.settings
        clips = read_evaluation_clips(entry.path, settings.clip, settings.views, decoder=settings.decoder)
        frames = torch.stack([clip.frames for clip in clips])
        name = int.from_bytes(Path(entry.path).name.encode(), "big")
        seeds = [derive_seed(settings.seed, name, view) for view in range(len(clips))]
        dense = self._outputs(DENSE, frames, seeds)
        return {arm.key: _columns(self._outputs(arm, frames, seeds), dense, entry.label_id) for arm in arms}

    def _outputs(self, arm: FrontierArm, frames: Tensor, seeds: Sequence[int]) -> _Outputs:
        spec = self.model.config.patches
        clips = tokenize_batch(frames, arm.rule, spec, seeds)
        half = self.dtype != torch.float32
        device = torch.device(self.settings.device)
        with torch.autocast(device.type, self.dtype) if half else nullcontext(), torch.inference_mode():
            if arm.merges and isinstance(self.model, VisionTransformer):
                flops = [forward_flops(self.model.config, len(clip)) for clip in clips]
                clips = tokenize_batch(frames, DENSE.rule, spec, seeds)
                logits, features, spent = merged_answers(self.model, clips, flops)
            else:
                logits, features, spent = answers(self.model, arm, clips, dense=arm is DENSE)
        return _Outputs(logits, features, _row([len(clip) for clip in clips]), _row(spent))


def _columns(ours: _Outputs, dense: _Outputs, label_id: int) -> NDArray[np.float64]:
    """float64 [V, columns] in the order of `COLUMNS`."""
    log_p, log_q = dense.logits.log_softmax(-1), ours.logits.log_softmax(-1)
    top = ours.logits.argmax(-1)
    columns = {
        "agrees": (top == dense.logits.argmax(-1)).double(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "cosine": torch.cosine_similarity(ours.features, dense.features),
        "correct": (top == label_id).double(),
        "tokens_kept": ours.tokens / dense.tokens,
        "flops": ours.flops,
        "flops_share": ours.flops / dense.flops,
    }
    return torch.stack([columns[name].double() for name in COLUMNS], dim=1).numpy()


def _row(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_DECIDES = ("structures.py", "pretrained.py", "video", "tokens", "network", "adapters", "data/clips.py", "frontier")
"""Parts of the package that numbers come from."""


@cache
def _code_digest() -> bytes:
    """Of the code that numbers come from, so that they do not outlive a change of it."""
    digest, package = hashlib.sha256(), Path(rlt.__file__).parent
    for part in _DECIDES:
        path = package / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(f"{file.relative_to(package).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.digest()


class _Store:
    """Numbers of videos in a folder, one file each; a file that is damaged is measured anew."""

    def __init__(self, folder: str | Path | None, fingerprint: str) -> None:
        self.folder = None if folder is None else Path(folder) / fingerprint[:16]

    def read(self, entry: VideoEntry) -> Values:
        """What is known of a video by arm."""
        if self.folder is None or not (path := self._path(entry)).exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as content:
                return {name: content[name] for name in content.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return {}

    def write(self, entry: VideoEntry, values: Values) -> None:
        """Keep it, whole or not at all."""
        if self.folder is not None:
            with replacing(self._path(entry)) as temporary:
                np.savez(temporary, **values)  # type: ignore[arg-type]

    def _path(self, entry: VideoEntry) -> Path:
        assert self.folder is not None
        stat = Path(entry.path).stat() if Path(entry.path).exists() else None
        identity = [str(Path(entry.path).resolve()), entry.label_id, stat and (stat.st_size, stat.st_mtime_ns)]
        return self.folder / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]}.npz"
