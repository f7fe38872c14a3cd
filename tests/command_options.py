"""Cases of `tests/test_options.py` for the commands that measure, and for `rlt.patch`: what each option changes."""

from __future__ import annotations

import hashlib
import inspect as python
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

import rlt
from rlt import cli
from rlt.benchmark import networks
from rlt.benchmark.harness import BenchmarkSettings
from rlt.checkpoints import create_model
from rlt.video import ClipSpec

CLIP = ("--frames", "4", "--size", "32")
TIMES = ("seconds", "speedup", "machine", "settings", "arms")


def clip(added: tuple[str, ...]) -> tuple[str, ...]:
    """Frames of the short videos, one after the other unless a rate is added, which is instead of a stride."""
    return CLIP if "--fps" in added else (*CLIP, "--stride", "1")


def without_times(numbers: dict[str, Any]) -> dict[str, Any]:
    """What a run finds again."""
    return {key: value for key, value in numbers.items() if not key.startswith(TIMES)}


def command_options(name: str) -> list[str]:
    """The options of a command as they are typed, the longest spelling of each."""
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    return [max(parameter.opts, key=len) for parameter in command.params if parameter.param_type_name == "option"]


def run(*arguments: str) -> tuple[object, dict[str, Any]]:
    """Exit code, and the numbers that the command wrote, if any."""
    for name in ("numbers.json", "elsewhere.json"):
        Path(name).unlink(missing_ok=True)
    shutil.rmtree("other", ignore_errors=True)
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, *([] if "--json" in arguments else ["--json", "numbers.json"])])
    numbers = Path("numbers.json")
    return stop.value.code, json.loads(numbers.read_text()) if numbers.exists() else {}


def compare(added: tuple[str, ...], video: str = "0.mp4") -> object:
    """Everything but times and the settings themselves; of times, whether there was more than one."""
    code, numbers = run("compare", video, "--model", "vit_tiny", "--repeats", "2", *clip(added), *added)
    spread = numbers.get("seconds", {}).get("decode", {}).get("spread", [0, 0])
    found = without_times(numbers)
    found["videos"] = [without_times(video) for video in found.get("videos", [])]
    return code, found, spread[0] == spread[1], Path("elsewhere.json").exists()


def compare_at_a_rate(added: tuple[str, ...]) -> object:
    """`compare` of frames that can lie closer to each other."""
    return compare(("--fps", "5", *added))


def inspect(added: tuple[str, ...], video: str = "0.mp4") -> object:
    """The report without its settings, and where it lies."""
    code, numbers = run("inspect", video, "--output", "out", *clip(added), *added)
    videos = [
        {key: value for key, value in video.items() if key not in ("rule", "threshold", "settings")}
        for video in numbers.get("videos", [])
    ]
    return code, videos, Path("other").exists(), Path("elsewhere.json").exists()


def inspect_as_stored(added: tuple[str, ...]) -> object:
    """Which clips are looked at where only a model can say it."""
    code, numbers = run("inspect", "0.mp4", "--output", "out", *added)
    return code, [video["settings"] for video in numbers.get("videos", [])]


def calibrate(
    added: tuple[str, ...],
    asked: tuple[str, ...] = ("--target-keep", "0.6"),
    videos: tuple[str, ...] = ("0.mp4", "1.mp4"),
) -> object:
    """The threshold and what it does, what the network said of every video, and which files there are."""
    for folder in ("pictures", "rule.json.cache"):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("rule.json", "other.json"):
        Path(name).unlink(missing_ok=True)
    code, numbers = run("calibrate", *videos, "--output", "rule.json", *asked, *clip(added), *added)
    found = {key: numbers.get(key) for key in ("tokens_kept", "disagreement", "certain", "curve", "failed")}
    files = [np.load(path) for path in sorted(Path("rule.json.cache").rglob("*.npz"))]
    said = [file[name].tolist() for file in files for name in sorted(file.files)]
    written = [name for name in ("rule.json", "other.json", "elsewhere.json", "pictures") if Path(name).exists()]
    return code, numbers.get("rule", {}).get("threshold"), found, said, written


def of_eight_frames(added: tuple[str, ...]) -> object:
    """`calibrate` where brightness has time to change."""
    return calibrate(("--frames", "8", *added))


def of_a_pan(added: tuple[str, ...]) -> object:
    """`calibrate` on a camera that pans."""
    return calibrate(("--frames", "8", *added), videos=("pan.mkv", "0.mp4"))


def by_network(added: tuple[str, ...]) -> object:
    """`calibrate` by the answers of a network, if one is added."""
    return calibrate(added, ("--max-disagreement", "0.9"))


def by_run(added: tuple[str, ...]) -> object:
    """`calibrate` by the answers of a run."""
    return by_network(("--checkpoint", "run", *added))


def benchmark(added: tuple[str, ...], video: str = "0.mp4") -> object:
    """What arms there are and what they do, without times; how often each ran is seen by whether times are spread."""
    code, numbers = run(
        "benchmark", "embed", video, "--model", "vit_tiny", "--clips", "1", "--rounds", "2", *clip(added), *added
    )
    arms = [
        (arm["name"], arm["tokens_kept"], arm["flops"], arm["peak_memory_bytes"]) for arm in numbers.get("arms", [])
    ]
    one_round = all(len(set(arm["seconds_spread"])) == 1 for arm in numbers.get("arms", []))
    return code, arms, one_round, Path("elsewhere.json").exists()


def benchmark_loader(added: tuple[str, ...]) -> object:
    """For how many workers `benchmark loader` found something, and how many batches each of them made."""
    few = () if "--workers" in added else ("--workers", "0")
    code, numbers = run(
        "benchmark", "loader", "train.parquet", "--model", "vit_micro", "--clips", "1", "--rounds", "1",
        *clip(added), *few, *added,
    )  # fmt: skip
    return code, list(numbers["limits"]), numbers["batches_per_round"]


def benchmark_arms(added: tuple[str, ...]) -> object:
    """Names of the arms of the suite `forward`, which are not run."""
    settings = BenchmarkSettings(model="vit_tiny", clip=ClipSpec(4, 1, size=32), videos=(Path("0.mp4"),), clips=1)
    variants = networks._variants(create_model("vit_tiny"), rlt_replace(settings, compiled=bool(added)))
    return [arm.name for arm, *_ in variants]


def forward_arms(added: tuple[str, ...]) -> object:
    """Names of the arms of the suite `forward`, which are run."""
    one = ("--model", "vit_micro", "--clips", "1", "--rounds", "1", *CLIP, "--stride", "1")
    code, numbers = run("benchmark", "forward", "0.mp4", *one, *added)
    names = {arm["name"] for arm in numbers.get("arms", [])}
    return code, names - {"dense_packed", "dense_clip_by_clip"}  # whichever is slower keeps its name


def rlt_replace(settings: BenchmarkSettings, compiled: bool) -> BenchmarkSettings:
    return BenchmarkSettings(**{**vars(settings), "compiled": compiled})


def patch_options() -> list[str]:
    """The keywords of `rlt.patch`."""
    parameters = python.signature(rlt.patch).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def patch(added: tuple[str, ...]) -> object:
    """What a patched VideoMAE keeps and says of a uint8 clip in which a part stands still."""
    clip = torch.randint(100, 140, (1, 8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    clip[:, 2:, :, :16] = clip[:, :1, :, :16]
    return _patched(clip, added)


def _patched(clip: torch.Tensor, added: tuple[str, ...]) -> object:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.VideoMAEConfig(image_size=32, num_frames=8, **sizes)
    model = transformers.VideoMAEForVideoClassification(config).eval()
    options = {name: json.loads(value) for name, _, value in (text.partition("=") for text in added)}
    with torch.no_grad():
        logits = rlt.patch(model, **options)(clip).logits
    return model.rlt.last.mask.tolist(), hashlib.sha256(logits.numpy().tobytes()).hexdigest()


def drifting_patch(added: tuple[str, ...]) -> object:
    """The same of a clip whose grey rises by a level a frame, which no step shows."""
    levels = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1) + 100
    return _patched(levels.expand(1, 8, 3, 32, 32).contiguous(), added)


def exposed_patch(added: tuple[str, ...]) -> object:
    """The same of a picture whose brightness flickers."""
    gain = 1 + 0.2 * (torch.arange(8) // 2 % 2).view(1, 8, 1, 1, 1)
    picture = torch.rand(1, 1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 40 + 100
    return _patched((picture * gain).to(torch.uint8), added)


def panned_patch(added: tuple[str, ...]) -> object:
    """The same of a camera that pans over a picture with detail."""
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)) * 160 + 40
    scene = torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bilinear")[0]
    views = [scene[:, 30 : 30 + 32, 50 - 5 * (t // 2) : 82 - 5 * (t // 2)] for t in range(8)]
    return _patched(torch.stack(views)[None].to(torch.uint8), added)


def drifting(look: Any) -> Any:
    """A look at eight frames of a video that drifts at a threshold that its steps do not reach."""
    return _eight_frames(look, "0.mp4", "0.1")


def exposed(look: Any) -> Any:
    """A look at eight frames whose brightness changes as a whole."""
    return _eight_frames(look, "1.mp4", "0.05")


def panned(look: Any) -> Any:
    """A look at eight frames of a camera that pans."""
    return _eight_frames(look, "pan.mkv", "0.1")


@cache
def _eight_frames(look: Any, video: str, threshold: str) -> Any:
    return lambda added: look(("--frames", "8", "--threshold", threshold, *added), video)


COMPARE = {
    "--model": (compare, "--model", "vit_small"),
    "--checkpoint": (compare, "--checkpoint", "run/model"),
    "--threshold": (compare, "--threshold", "5"),
    "--keep-ratio": (compare, "--keep-ratio", "1"),
    "--max-tokens": (compare, "--max-tokens", "7"),
    "--reference": (drifting(compare), "--reference", "anchor"),
    "--exposure": (exposed(compare), "--exposure", "gain"),
    "--motion": (panned(compare), "--motion", "global"),
    "--rule": (compare, "--rule", "none"),
    "--budget": (compare_at_a_rate, "--budget", "7"),
    "--frames": (compare, "--frames", "8"),
    "--stride": (compare, "--stride", "3"),
    "--fps": (compare, "--fps", "5"),
    "--size": (compare, "--size", "48x64"),
    "--decoder": (compare, "--decoder", "standing"),
    "--run-lengths": (compare, "--run-lengths", "ignored"),
    "--clips": (compare, "--clips", "2"),
    "--repeats": (compare, "--repeats", "1"),
    "--device": (compare, "--device", "meta"),
    "--dtype": (compare, "--dtype", "bfloat16"),
    "--json": (compare, "--json", "elsewhere.json"),
}
INSPECT = {
    **{option: (inspect, *case[1:]) for option, case in COMPARE.items() if option in command_options("inspect")},
    "--model": (inspect_as_stored, "--model", "run"),
    "--reference": (drifting(inspect), "--reference", "anchor"),
    "--exposure": (exposed(inspect), "--exposure", "gain"),
    "--motion": (panned(inspect), "--motion", "global"),
    "--output": (inspect, "--output", "other"),
    "--patch-size": (inspect, "--patch-size", "8"),
}
CALIBRATE = {
    **{option: (calibrate, *case[1:]) for option, case in COMPARE.items() if option in command_options("calibrate")},
    "--output": (calibrate, "--output", "other.json"),
    "--exposure": (of_eight_frames, "--exposure", "gain"),
    "--motion": (of_a_pan, "--motion", "global"),
    "--target-keep": (calibrate, "--target-keep", "0.7"),
    "--max-disagreement": (by_run, "--max-disagreement", "0.1"),
    "--checkpoint": (by_network, "--checkpoint", "run"),
    "--model": (calibrate, "--model", "vit_giant"),
    "--run-lengths": (by_run, "--run-lengths", "aware"),
    "--device": (by_run, "--device", "meta"),
    "--dtype": (by_run, "--dtype", "bfloat16"),
    "--pictures": (calibrate, "--pictures", "pictures"),
}
BENCHMARK = {
    **{option: (benchmark, *case[1:]) for option, case in COMPARE.items() if option in command_options("benchmark")},
    "--reference": (drifting(benchmark), "--reference", "anchor"),
    "--exposure": (exposed(benchmark), "--exposure", "gain"),
    "--motion": (panned(benchmark), "--motion", "global"),
    "--keep-ratio": (benchmark, "--keep-ratio", "1"),
    "--size": (benchmark, "--size", "48"),
    "--rounds": (benchmark, "--rounds", "1"),
    "--device": (benchmark, "--device", "cuda"),
    "--compile": (benchmark_arms, "--compile"),
    "--workers": (benchmark_loader, "--workers", "0,1"),
    "--batches": (benchmark_loader, "--batches", "2"),
    "--transformers": (forward_arms, "--transformers"),
    "--flash": (benchmark, "--flash", "FA3"),
}
PATCH = {
    "threshold": (patch, "threshold=5"),
    "keep_ratio": (patch, "keep_ratio=1"),
    "max_tokens": (patch, "max_tokens=6"),
    "reference": (drifting_patch, 'reference="anchor"'),
    "exposure": (exposed_patch, 'exposure="gain"'),
    "motion": (panned_patch, 'motion="global"'),
    "rule": (patch, 'rule="none"'),
    "run_lengths": (patch, 'run_lengths="aware"'),
    "expand": (patch, 'expand="fill"'),
    "frames_per_clip": (patch, "frames_per_clip=2"),
    "refresh_every": (patch, "refresh_every=2"),
    "refresh_share": (patch, "refresh_share=0.5"),
    "refresh_around": (patch, "refresh_around=1"),
    "pixel_mean": (patch, "pixel_mean=[0.1, 0.2, 0.3]"),
    "pixel_std": (patch, "pixel_std=[0.5, 0.5, 0.5]"),
}
