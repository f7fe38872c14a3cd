"""Measure on a GPU all that the project says about one: `make figures-gpu`, or a rehearsal of it on a CPU.

    python scripts/figures_gpu.py [--device cuda|cpu] [--tiny] [--minutes N] [--only NAME...] [--data FOLDER]

Each piece is a process of its own and leaves one JSON in docs/results/gpu (a rehearsal: output/figures-gpu-rehearsal).
The most important come first. The command can be ended at any time and given again: what is done is not repeated.
Needs no PyAV, Hydra, kornia or network, and no installation: `PYTHONPATH=src` is enough.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from campaign import Piece, run_campaign
from gpu_clips import CLIPS, STATIC, clip_files, write_clips, write_tiny_clips

from rlt.checks import at_least, one_of
from rlt.errors import InvalidArgumentError, RltError
from rlt.measure import check_device

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "gpu"
REHEARSAL = ROOT / "output" / "figures-gpu-rehearsal"
MINUTES = 27.0
GPU_TESTS = (
    "attention",
    "attention_backends",
    "benchmark",
    "gpu",
    "run_lengths",
    "token_kernels",
    "tome",
    "vit",
)
"""tests/test_NAME.py that have tests of a GPU and need no video decoder."""
SEEDS = (0, 1, 2)


def main() -> int:
    """Run what is missing; 1 if something is left, 2 if it cannot begin."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--tiny", action="store_true", help="tiny models and clips: a rehearsal")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time of all pieces together")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="pieces to run, of all if none")
    parser.add_argument("--data", type=Path, help="folder of the videos, where the file of clips is not there yet")
    parser.add_argument("--output", type=Path, help="folder of the JSON files")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the piece that runs is ended, too
    try:
        left = run(options)
    except RltError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"not done: {', '.join(left)}" if left else "every piece is done", flush=True)
    return int(bool(left))


def run(options: argparse.Namespace) -> list[str]:
    """Names of the pieces that are not done afterwards."""
    check_device(options.device)
    at_least(0, minutes=options.minutes)
    if options.device == "cpu" and not options.tiny:
        raise InvalidArgumentError("device is cpu; the whole campaign needs a GPU, add --tiny (TINY=1) to rehearse it")
    output = options.output or (REHEARSAL if options.tiny else RESULTS)
    if options.tiny and output.resolve() == RESULTS:
        raise InvalidArgumentError(f"output is {output}; a rehearsal's numbers mean nothing there, give another folder")
    archive = output / "clips.npz" if options.tiny else CLIPS
    clips = prepare_clips(archive, options.data, tiny=options.tiny)
    pieces = list_pieces(clips, device=options.device, tiny=options.tiny)
    for name in options.only:
        one_of([piece.name for piece in pieces], only=name)
    chosen = [piece for piece in pieces if not options.only or piece.name in options.only]
    environment = {"PYTHONPATH": str(ROOT / "src"), "RLT_REQUIRE_GPU": str(int(options.device != "cpu"))}
    return run_campaign(chosen, output, budget_seconds=60 * options.minutes, environment=environment)


def prepare_clips(archive: Path, data: Path | None, *, tiny: bool) -> dict[str, Path]:
    """The frames of each video; their file is made where it is not there."""
    if not archive.exists():
        if not tiny and data is None:
            raise InvalidArgumentError(
                f"{archive} is not there; make it where PyAV is: make figures-gpu-clips DATA=FOLDER"
            )
        print(f"writing {archive}", flush=True)
        if tiny:
            write_tiny_clips(archive)
        elif data is not None:
            write_clips(archive, data)
    return clip_files(archive)


def list_pieces(clips: dict[str, Path], *, device: str, tiny: bool = False) -> list[Piece]:
    """All pieces, the most important first."""
    moving = [str(path) for name, path in clips.items() if not name.startswith("surveillance")]
    static = [str(clips[STATIC])]
    labelled = str(clips[STATIC].parent)
    small = ("--frames", "4", "--size", "64", "--clips", "2", "--rounds", "1") if tiny else ()
    dtype = "float32" if tiny else "bfloat16"

    def suite(
        name: str, shows: str, *arguments: str, limit: int = 120, videos: list[str] = moving, flash: str = ""
    ) -> Piece:
        own = [_tiny_model(argument) for argument in arguments] if tiny else [*arguments]
        suite_name, *rest = own
        if "--model" not in rest:
            rest += ["--model", "vit_micro" if tiny else "vit_base"]
        flashing = ("--flash", flash) if flash else ()
        command = ("-m", "rlt", "benchmark", suite_name, *videos, "--device", device, "--dtype", dtype, *rest)
        return Piece(name, shows, (*command, *flashing, *small, "--json", "{json}"), limit)

    def network(kind: str, size: str, clips_at_once: int, *more: str, limit: int = 120) -> Piece:
        shows = f"{kind} of ViT-{size[0].upper()}, {clips_at_once} clips"
        command = (kind, "--model", f"vit_{size}", "--clips", str(clips_at_once), "--transformers", *more)
        return suite(f"{kind}-{size}-{clips_at_once}", shows, *command, limit=limit)

    def tower(model: str, clips_at_once: int, *frames: str, limit: int = 240) -> Piece:
        command = ("towers", "--model", model, "--clips", str(clips_at_once), *frames)
        return suite(f"towers-{model}", f"rlt.patch on {model}", *command, limit=limit)

    long = ("--frames", "64", "--stride", "1")
    return [
        network("forward", "base", 8, "--rounds", "20"),
        network("train-step", "base", 8, "--rounds", "10"),
        network("forward", "large", 8, "--rounds", "20"),
        network("train-step", "large", 8, "--rounds", "10"),
        _tests(device),
        suite("attention", "attention by every back end", "attention", "--rounds", "20", limit=300),
        suite("feed", "where to choose tokens, copies included", "feed", "--rounds", "50"),
        suite("tokenize", "the kernels beside the plain way", "tokenize", "--rounds", "50"),
        network("forward", "huge", 8, "--rounds", "10"),
        network("forward", "base", 64, "--rounds", "7", limit=180),
        network("forward", "large", 64, "--rounds", "5", limit=240),
        network("forward", "huge", 64, "--rounds", "3", limit=300),
        suite(
            "train-step-frames-64",
            "training at every frame",
            *("train-step", "--model", "vit_base", "--clips", "4", *long, "--rounds", "7"),
            limit=180,
        ),
        suite(
            "forward-frames-64", "64 frames at stride 1", "forward", "--clips", "8", *long, "--rounds", "7", limit=180
        ),
        suite(
            "static-128",
            "a long static video",
            *("frames", "--frames", "128", "--stride", "1", "--rounds", "7"),
            videos=static,
            limit=180,
        ),
        tower("videomae_base", 8, "--rounds", "10"),
        tower("videomae_large", 8, "--rounds", "10"),
        tower("vjepa2_large", 2, *long, "--rounds", "7"),
        tower("vjepa2_giant", 2, *long, "--rounds", "5", limit=300),
        tower("qwen2.5_vl_7b", 2, *long, "--rounds", "5", limit=420),
        tower("qwen3_vl_8b", 2, *long, "--rounds", "5", limit=420),
        suite("forward-compiled", "compiled, and as CUDA graphs", "forward", "--compile", "--rounds", "20", limit=420),
        suite("train-step-compiled", "compiled", "train-step", "--compile", "--rounds", "10", limit=420),
        *(
            suite(
                f"attention-{name.lower()}",
                f"attention by {name}",
                "attention",
                "--rounds",
                "20",
                limit=300,
                flash=name,
            )
            for name in ("FA3", "FA4")
            if device != "cpu"  # which has no other implementation to choose
        ),
        *(_training(labelled, size, seed, device, tiny=tiny) for size in ("small", "base") for seed in SEEDS),
    ]


def _tests(device: str) -> Piece:
    """Tests of a GPU; where there is none, that they can be imported."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in GPU_TESTS]
    arguments = (str(ROOT / "scripts" / "gpu_tests.py"), "--device", device, "--json", "{json}", *files)
    return Piece("tests", "kernels, back ends, precisions, waits, memory", arguments, 470)


def _training(folder: str, size: str, seed: int, device: str, *, tiny: bool) -> Piece:
    script, steps = str(ROOT / "scripts" / "gpu_training.py"), "2" if tiny else "600"
    model, workers = ("vit_micro", "0") if tiny else (f"vit_{size}", "6")
    arguments = ("--model", model, "--seed", str(seed), "--steps", steps, "--workers", workers, "--device", device)
    shows = f"training ViT-{size[0].upper()}, dense, RLT and random, seed {seed}"
    return Piece(f"training-{size}-{seed}", shows, (script, folder, *arguments, "--json", "{json}"), 400)


def _tiny_model(argument: str) -> str:
    family = argument.partition("_")[0]
    return {"vit": "vit_micro", "videomae": "videomae_tiny", "vjepa2": "vjepa2_tiny"}.get(
        family, {"qwen2.5": "qwen2.5_tiny", "qwen3": "qwen3_tiny"}.get(family, argument)
    )


if __name__ == "__main__":
    sys.exit(main())
