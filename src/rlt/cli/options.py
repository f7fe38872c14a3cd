"""Options that several commands have, and what they say together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rlt.network.config import ViTConfig
    from rlt.pretrained import ModelInputs
    from rlt.video import ClipSpec
    from rlt.video.geometry import Size


class Precision(str, Enum):
    """Floating-point type of the network."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def parse_size(text: str) -> Size:
    """Pixels of a side, or (height, width), from what stands on the command line."""
    height, cross, width = text.partition("x")
    try:
        return (int(height), int(width)) if cross else int(height)
    except ValueError:
        raise typer.BadParameter(f"{text!r}; a number of pixels (224) or height x width (224x384) is needed") from None


Videos = Annotated[list[Path], typer.Argument(help="Video files, or folders to search for them.", show_default=False)]
SIZES = "vit_micro, vit_tiny, vit_small, vit_base, vit_large, vit_huge or vit_giant"
Model = Annotated[str, typer.Option(metavar="NAME", help=f"Size of the network: {SIZES}.")]
AnyModel = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"The folder of a run, a checkpoint (file, folder or hub id), or a size with random weights: {SIZES}.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Weights: the folder of a run, a file, a folder or a hub id, of whatever size. Clips and rule that are "
        "stored with it stand where no others are given.",
        show_default=False,
    ),
]
RuleName = Annotated[
    str | None,
    typer.Option(
        "--rule",
        metavar="NAME|FILE",
        help="Which patches are kept: rlt, budget, none, random, uniform_frames, drawn, or a file of `rlt calibrate`.",
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Keep patches that differ by more: mean absolute difference of normalised pixels, 0 or more; 0.1 where "
        "nothing else is given.",
        show_default=False,
    ),
]
KeepRatio = Annotated[
    float | None,
    typer.Option(help="Keep this share of the patches instead, those that differ most.", show_default=False),
]
MaxTokens = Annotated[
    int | None, typer.Option(help="Keep at most so many patches of a clip instead.", show_default=False)
]
Reference = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Compare with the token before (previous, the paper), or with the one that stands for the place (anchor).",
        show_default=False,
    ),
]
Exposure = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="none (the paper), or gain: undo what automatic exposure, flicker and fades do to a whole picture.",
        show_default=False,
    ),
]
Motion = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="none (the paper), or global: undo the shift of the whole picture that a moving camera makes.",
        show_default=False,
    ),
]
RunLengths = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Whether a token counts as long as it stood: aware, ignored (the paper), or parts, such as "
        "pooling+attention; the checkpoint's own if not given.",
        show_default=False,
    ),
]
NumFrames = Annotated[int, typer.Option("--frames", help="Frames per clip.")]
ClipFrames = Annotated[
    int | None,
    typer.Option("--frames", help="Frames per clip; 16 if the model does not say otherwise.", show_default=False),
]
FrameStride = Annotated[
    int | None,
    typer.Option(
        "--stride",
        help="Distance of sampled frames, in frames of the video; 4 where nothing else is said.",
        show_default=False,
    ),
]
FramesPerSecond = Annotated[
    float | None,
    typer.Option(help="Sampled frames per second of the video, instead of --stride.", show_default=False),
]
DecoderName = Annotated[str, typer.Option(metavar="NAME", help="What decodes: pyav, pyav_whole, or torchcodec.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[Precision, typer.Option(help="Precision of the network.")]
SizeText = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS|HxW",
        help="Clips are scaled and cropped to PIXELS x PIXELS or H x W, multiples of the patch size; 224 if the model "
        "does not say otherwise.",
        show_default=False,
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the numbers to this file.")]


Options = dict[str, Any]
"""Values of a group of options by name."""


def with_options(**groups: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command groups of options, where its parameters of these names stand; it gets each as `Options`.

    A group is a function: its parameters are the options.
    """

    def give(command: Callable[..., None]) -> Callable[..., None]:
        members = {name: _parameters(group) for name, group in groups.items()}
        shown: list[inspect.Parameter] = []
        for name, parameter in _parameters(command).items():
            shown += members[name].values() if name in members else [parameter]

        @wraps(command)
        def called(**options: Any) -> None:
            taken = {name: {option: options.pop(option) for option in members[name]} for name in members}
            command(**options, **taken)

        # Which typer reads. By keyword, so that an option without a default may follow one that has one.
        by_keyword = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in shown]
        called.__signature__ = inspect.Signature(by_keyword)  # type: ignore[attr-defined]
        return called

    return give


def _parameters(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function, eval_str=True).parameters)


def comparing_options(reference: Reference = None, exposure: Exposure = None, motion: Motion = None) -> None:
    """How a rule compares tokens."""


def rule_options(
    threshold: Threshold = None,
    keep_ratio: KeepRatio = None,
    max_tokens: MaxTokens = None,
    reference: Reference = None,
    exposure: Exposure = None,
    motion: Motion = None,
    rule: RuleName = None,
) -> None:
    """Which patches are kept."""


def clip_options(
    frames: ClipFrames = None, stride: FrameStride = None, fps: FramesPerSecond = None, size: SizeText = None
) -> None:
    """How clips are taken."""


def stored_of_options(model: str | None, checkpoint: str | None) -> ViTConfig:
    """What is stored with the model that the options of a command name."""
    from rlt.loading import named, stored_config

    name, size = named(model, checkpoint)
    return stored_config(name, size=size)


def clip_of_options(stored: ViTConfig | ModelInputs, asked: Options) -> ClipSpec:
    """The clips of a model, with what `clip_options` say of them."""
    size = asked["size"]
    pixels = None if size is None else parse_size(size)
    return stored.clip_spec.changed(
        num_frames=asked["frames"], frame_stride=asked["stride"], fps=asked["fps"], size=pixels
    )
