"""What pixels were normalised by: read from the processor that lies beside a checkpoint, and held against a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlt.errors import InvalidArgumentError, warn_caller
from rlt.structures import RGB, PatchSpec
from rlt.weights import read_json

Statistics = tuple[RGB, RGB]
"""Mean and standard deviation of each channel on the scale 0..1."""
PROCESSORS = (
    ("video_preprocessor_config.json", None),
    ("processor_config.json", "video_processor"),
    ("preprocessor_config.json", None),
    ("processor_config.json", "image_processor"),
)
"""Where transformers saves them: file, and part of it. What is for videos comes first."""
FAR = 10
"""So many times larger than normalised pixels can be are pixels that were not normalised."""
LIBRARIES = ("rlt", "torch", "transformers", "timm", "accelerate", "lightning")


def checkpoint_statistics(model: Any) -> Statistics | None:
    """What the processor says that was saved with the weights of a model; None if there is none on this machine.

    Files are looked for in the folder that the model was loaded from, or in the cache of the Hugging Face hub. The
    network is not asked.
    """
    revision = getattr(getattr(model, "config", None), "_commit_hash", None)
    for path, settings in _processors(str(getattr(model, "name_or_path", "") or ""), revision):
        if "image_std" in settings:
            try:
                return _statistics(settings)
            except (TypeError, ValueError) as error:
                raise InvalidArgumentError(
                    f"{path} has image_mean={settings.get('image_mean')} and image_std={settings['image_std']}; three "
                    "numbers each are needed, give pixel_mean and pixel_std"
                ) from error
    return None


def checkpoint_size(source: str | Path) -> tuple[int, int] | None:
    """Height and width that the processor beside a checkpoint gives pictures; None where it does not say one size."""
    for _, settings in _processors(str(source), None):
        crops = settings.get("do_center_crop", "crop_size" in settings) and "crop_size" in settings
        size = settings.get("crop_size" if crops else "size")
        if isinstance(size, Mapping):
            size = size.get("shortest_edge", [size.get("height"), size.get("width")])
        height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
        if isinstance(height, int) and isinstance(width, int) and min(height, width) > 0:
            return height, width
    return None


def _processors(source: str, revision: str | None) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Files of processors beside a checkpoint, best first, and what they say."""
    for name, part in PROCESSORS if source else ():
        path = _find(source, name, revision)
        settings: Any = {} if path is None else read_json(path)
        settings = settings if part is None else settings.get(part)
        if path is not None and isinstance(settings, Mapping):
            yield path, settings


def _find(source: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache  # takes a second to import

    if Path(source).is_dir():
        return Path(source) / name if (Path(source) / name).is_file() else None
    try:
        found = try_to_load_from_cache(source, name, revision=revision)
    except ValueError:  # no name of the hub
        return None
    return Path(found) if isinstance(found, str) else None


def _statistics(settings: Mapping[str, Any]) -> Statistics:
    """A processor turns x on the scale 0..1 into (scale * x - offset - mean) / std; here that is one mean and std."""
    scale = 255 * float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 255.0
    offset = float(bool(settings.get("offset", False)))  # of ViViT's: 0..255 becomes -1..1 first
    normalises = settings.get("do_normalize", True)
    means = settings.get("image_mean") if normalises else (0, 0, 0)
    stds = settings["image_std"] if normalises else (1, 1, 1)
    mean_r, mean_g, mean_b = ((offset + float(mean)) / scale for mean in means or ())
    std_r, std_g, std_b = (float(std) / scale for std in stds)
    return (mean_r, mean_g, mean_b), (std_r, std_g, std_b)


def warn_unless_normalised(pixels: Tensor, spec: PatchSpec) -> None:
    """Say in one line, once per place that calls, that floats cannot be pixels normalised by `spec`."""
    if torch.compiler.is_compiling() or not pixels.numel():
        return
    ends = [abs((end - mean) / std) for end in (0, 1) for mean, std in zip(spec.mean, spec.std, strict=True)]
    lowest, highest = torch.stack(torch.aminmax(pixels.detach())).tolist()
    if max(-lowest, highest) > FAR * max(ends):
        # No word about this call's own pixels, since each text of a warning is shown once.
        warn_caller(
            f"pixels are beyond {FAR * max(ends):.3g}; with mean={spec.mean} and std={spec.std} normalised ones reach "
            f"{max(ends):.3g}: pass uint8 frames or what the model's processor gives, or set pixel_mean and pixel_std",
            RuntimeWarning,
            LIBRARIES,
        )
