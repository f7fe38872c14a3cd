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
from dataclasses import dataclass
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
TINY = {
    "vit": "vit_micro",
    "videomae": "videomae_tiny",
    "vjepa2": "vjepa2_tiny",
    "qwen2.5": "qwen2.5_tiny",
    "qwen3": "qwen3_tiny",
}
"""Models of a rehearsal, by the family of those that they stand for."""


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
    make = _Pieces(clips, device, tiny)
    long = ("--frames", "64", "--stride", "1")
    others = ("FA3", "FA4") if device != "cpu" else ()  # which has none to choose
    return [
        make.network("forward", "base", 8, rounds=20),
        make.network("train-step", "base", 8, rounds=10),
        make.network("forward", "large", 8, rounds=20),
        make.network("train-step", "large", 8, rounds=10),
        make.tests(),
        make.suite("attention", "attention", shows="attention by every back end", rounds=20, limit=300),
        make.suite("feed", "feed", shows="where to choose tokens, copies included", rounds=50),
        make.suite("tokenize", "tokenize", shows="the kernels beside the plain way", rounds=50),
        make.profile(),
        make.network("forward", "huge", 8, rounds=10),
        make.network("forward", "base", 64, rounds=7, limit=180),
        make.network("forward", "large", 64, rounds=5, limit=240),
        make.network("forward", "huge", 64, rounds=3, limit=300),
        make.suite("train-step-frames-64", "train-step", "--clips", "4", *long, rounds=7, limit=180),
        make.suite("forward-frames-64", "forward", "--clips", "8", *long, rounds=7, limit=180),
        make.suite("static-128", "frames", "--frames", "128", "--stride", "1", rounds=7, limit=180, static=True),
        make.tower("videomae_base", 8, rounds=10),
        make.tower("videomae_large", 8, rounds=10),
        make.tower("vjepa2_large", 2, *long, rounds=7),
        make.tower("vjepa2_giant", 2, *long, rounds=5),
        make.tower("qwen2.5_vl_7b", 2, *long, rounds=5),
        make.tower("qwen3_vl_8b", 2, *long, rounds=5),
        make.suite("forward-compiled", "forward", "--compile", shows="also as CUDA graphs", rounds=20, limit=420),
        make.suite("train-step-compiled", "train-step", "--compile", rounds=10, limit=420),
        *(make.suite(f"attention-{name.lower()}", "attention", "--flash", name, rounds=20) for name in others),
        *(make.training(size, seed) for size in ("small", "base") for seed in SEEDS),
    ]


@dataclass(frozen=True)
class _Pieces:
    """Makes pieces for one device, at their real size or tiny."""

    clips: dict[str, Path]
    device: str
    tiny: bool

    def suite(
        self,
        name: str,
        suite: str,
        *arguments: str,
        rounds: int,
        model: str = "vit_base",
        shows: str = "",
        limit: int = 120,
        static: bool = False,
    ) -> Piece:
        """A suite of `rlt benchmark`."""
        videos = [str(path) for path in ([self.clips[STATIC]] if static else self._moving())]
        command = ["-m", "rlt", "benchmark", suite, *videos, "--device", self.device, *arguments]
        if self.tiny:
            model = TINY.get(model.partition("_")[0], model)
            command += ["--model", model, "--rounds", "1", "--frames", "4", "--size", "64", "--clips", "2"]
        else:
            command += ["--model", model, "--rounds", str(rounds), "--dtype", "bfloat16"]
        shown = shows or f"rlt benchmark {suite} {' '.join(arguments)}"
        return Piece(name, shown, (*command, "--json", "{json}"), limit)

    def network(self, suite: str, size: str, num_clips: int, *, rounds: int, limit: int = 120) -> Piece:
        """A headline of the paper, beside VideoMAE of transformers."""
        arguments = ("--clips", str(num_clips), "--transformers")
        shows = f"{suite} of ViT-{size[0].upper()}, {num_clips} clips"
        name, model = f"{suite}-{size}-{num_clips}", f"vit_{size}"
        return self.suite(name, suite, *arguments, model=model, rounds=rounds, shows=shows, limit=limit)

    def tower(self, model: str, num_clips: int, *arguments: str, rounds: int) -> Piece:
        """A model of real size, patched."""
        name, shows = f"towers-{model}", f"rlt.patch on {model}"
        clips = ("--clips", str(num_clips))
        return self.suite(name, "towers", *clips, *arguments, model=model, rounds=rounds, shows=shows, limit=420)

    def profile(self) -> Piece:
        """Operators of a forward pass, to be read where a target is missed."""
        script, videos = str(ROOT / "scripts" / "profile_forward.py"), [str(path) for path in self._moving()]
        size = ("--model", "vit_micro", "--frames", "4", "--size", "64", "--clips", "2")
        own = size if self.tiny else ("--dtype", "bfloat16", "--clips", "8")
        output = ("--output", "{folder}/profile-forward.txt", "--json", "{json}")
        return Piece("profile", "where the time goes", (script, *videos, "--device", self.device, *own, *output), 120)

    def _moving(self) -> list[Path]:
        """The videos that clips are taken from in turn."""
        return [path for name, path in self.clips.items() if not name.startswith("surveillance")]

    def training(self, size: str, seed: int) -> Piece:
        """A network trained in every arm from one seed."""
        script, folder = str(ROOT / "scripts" / "gpu_training.py"), str(self.clips[STATIC].parent)
        model, steps, workers = ("vit_micro", "2", "0") if self.tiny else (f"vit_{size}", "600", "6")
        options = ("--model", model, "--steps", steps, "--workers", workers, "--device", self.device)
        shows = f"training ViT-{size[0].upper()}, dense, RLT and random, seed {seed}"
        arguments = (script, folder, "--seed", str(seed), *options, "--json", "{json}")
        return Piece(f"training-{size}-{seed}", shows, arguments, 400)

    def tests(self) -> Piece:
        """Tests of a GPU; where there is none, that they can be imported."""
        script = str(ROOT / "scripts" / "gpu_tests.py")
        files = [str(ROOT / "tests" / f"test_{name}.py") for name in GPU_TESTS]
        arguments = (script, "--device", self.device, "--json", "{json}", *files)
        return Piece("tests", "kernels, back ends, precisions, waits, memory", arguments, 470)


if __name__ == "__main__":
    sys.exit(main())
