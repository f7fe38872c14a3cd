"""Models of Hugging Face transformers that `rlt.patch` knows, as networks over the tokens of windows.

Shape legend: B windows, T frames of a window, F frames of all windows, D width of the features, C channels, h and w
pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlt.adapters import PackedPatch, patch, supported_models
from rlt.adapters.encoders import TOWERS, encoder_inputs
from rlt.adapters.interface import import_transformers
from rlt.adapters.options import FOR_IMAGES
from rlt.adapters.statistics import checkpoint_size
from rlt.checkpoints import hf_config
from rlt.checks import some
from rlt.errors import CheckpointError, InvalidArgumentError, RltError, one_line
from rlt.network.vit import MODEL_TYPE, VisionTransformer
from rlt.structures import PackedTokens, PatchSpec, RunLengthTokens
from rlt.tokens import Rule
from rlt.video import ClipSpec

VISION_PARTS = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
}
"""Of models for pictures and text, the class of the half that sees."""
_FRAMES = 16  # of a window for image models, which take any number


@dataclass(frozen=True)
class ModelInputs:
    """What is known of a model without its weights, under the names of `ViTConfig`."""

    kind: str
    """Name of its class."""
    patches: PatchSpec
    clip_spec: ClipSpec
    num_classes: int
    """0 for an encoder without a head."""
    labels: tuple[str, ...]
    by_frame: bool
    """Whether it is an image model, which looks at frames one by one."""
    any_clip: bool
    """Whether it takes other numbers of frames than its own."""
    rule: Rule
    """Of `rlt.patch`."""

    def check_clip(self, clip: ClipSpec) -> None:
        """Hold that windows are as the model takes them. Image models say of their size themselves.

        Raises:
            InvalidArgumentError: saying what is needed.
        """
        own = self.clip_spec
        if not self.by_frame and clip.frame_size != own.frame_size:
            raise InvalidArgumentError(f"size is {clip.size}, but {self.kind} takes {own.size} alone; leave it out")
        if not self.any_clip and clip.num_frames != own.num_frames:
            raise InvalidArgumentError(
                f"a window has {clip.num_frames} frames, but {self.kind} takes {own.num_frames} alone; leave it out"
            )
        self.patches.grid((clip.num_frames, *clip.frame_size, 3))


def is_pretrained(config: Mapping[str, object] | None, *, patched: bool = False) -> bool:
    """Whether a checkpoint with this config.json is not for our own network, which VideoMAE's with mean pooling are.

    With `patched`, a classifier of VideoMAE is not either.
    """
    if config is None or config.get("model_type") in (None, MODEL_TYPE):
        return False
    if patched and config.get("architectures") == ["VideoMAEForVideoClassification"]:
        return True
    return config["model_type"] != hf_config.MODEL_TYPE or config.get("use_mean_pooling") is False


def read_inputs(folder: Path, config: Mapping[str, object]) -> ModelInputs:
    """What is known of the model in a folder; its weights are not read.

    Raises:
        CheckpointError: for a model that `rlt.patch` does not know, or one that needs text.
    """
    kind = _kind(folder, config)
    with _plain_errors(folder), torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(folder, local_files_only=True)).eval()
    model.name_or_path = str(folder)  # where its processor lies
    return inputs_of(patch(model), folder)


def load_pretrained(folder: Path, config: Mapping[str, object]) -> PatchedNetwork:
    """The model in a folder, patched, in evaluation mode and float32.

    Raises:
        CheckpointError: as `read_inputs`, and if a weight is missing, unexpected or of another shape.
    """
    kind = _kind(folder, config)
    with _plain_errors(folder):
        model, report = kind.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    wrong = {name: sorted(map(str, report[name])) for name in ("missing_keys", "mismatched_keys", "unexpected_keys")}
    if kind.__name__ in VISION_PARTS.values():  # the half for text
        del wrong["unexpected_keys"]
    problems = [f"{name.replace('_', ' ')} {some(keys)}" for name, keys in wrong.items() if keys]
    if problems:
        raise CheckpointError(f"{folder} does not fit {kind.__name__}: {'; '.join(problems)}; get it again")
    return PatchedNetwork(patch(model.eval()), folder)


def inputs_of(model: Any, source: str | Path | None = None) -> ModelInputs:
    """What is known of a patched model; `source` is the folder that its processor lies in, if there is one.

    Raises:
        InvalidArgumentError: for a model that is not patched, or one that needs text.
    """
    adapter, name = getattr(model, "rlt", None), type(model).__name__
    if not isinstance(adapter, PackedPatch):
        raise InvalidArgumentError(
            f"model is a {name}; a network, a name, or a model of transformers after rlt.patch(model) is needed"
        )
    if adapter.library != "transformers" or not _takes_pixels(type(model)):
        raise InvalidArgumentError(f"model is a {name}; one of transformers that takes nothing but pixels is needed")
    frames, _, *sides = adapter.input_shape()
    side = adapter.spec.patch_size
    if adapter.takes_images:
        found = checkpoint_size(source or str(model.name_or_path))
        frames, sides = _FRAMES, list(found or sides)
    height, width = (pixels - pixels % side for pixels in sides)  # a convolution does not look at the rest either
    head = getattr(model, "classifier", None)
    classes = head.out_features if isinstance(head, nn.Linear) else 0
    named = getattr(model.config, "id2label", None) or {}  # by number, in the file by text
    labels = hf_config.labels_of({str(key): text for key, text in named.items()}, classes)
    clip = ClipSpec(frames, size=height if height == width else (height, width))
    return ModelInputs(
        kind=name,
        patches=adapter.spec,
        clip_spec=clip,
        num_classes=classes,
        labels=labels,
        by_frame=adapter.takes_images,
        any_clip=adapter.any_number_of_frames,
        rule=adapter.options.rule,
    )


class PatchedNetwork(nn.Module):
    """A patched model as `VisionTransformer` is used: tokens of windows go in, which were chosen before.

    An image model looks at each frame; features of a window are the mean over its frames. It goes on from window to
    window where it is told what has not changed, see `forward_features`.
    """

    def __init__(self, model: Any, source: str | Path | None = None) -> None:
        """Take a model after `rlt.patch`, whose options stay, and whose rule is not asked."""
        super().__init__()
        self.config = inputs_of(model, source)
        self.model: Any = model
        options = model.rlt.options
        if given := [name for name in FOR_IMAGES[1:] if getattr(options, name) is not None]:
            raise InvalidArgumentError(
                f"{given[0]} of the model is {getattr(options, given[0])}, which windows of chosen tokens have no use "
                "for; leave it out, or call the model within model.rlt.stream()"
            )
        self._stream = model.rlt.stream() if self.config.by_frame else None

    @property
    def run_lengths(self) -> str:
        """Where run lengths count, see `rlt.adapters.PatchOptions`."""
        return str(self.model.rlt.options.run_lengths)

    @run_lengths.setter
    def run_lengths(self, value: str) -> None:
        self._change(run_lengths=value)

    def use(self, rule: Rule) -> None:
        """Be told by which rule tokens are chosen.

        Raises:
            InvalidArgumentError: for one whose tokens stand for no others, where outputs go back on the full grid.
        """
        self._change(rule=rule)

    def head(self, features: Tensor) -> Tensor:
        """Features [B, D] -> logits [B, classes]."""
        logits: Tensor = self.model.classifier(features)
        return logits

    def forward_features(self, packed: PackedTokens, carried: Sequence[Tensor | None] = ()) -> Tensor:
        """Features of windows, [B, D]: what the classifier gets. Of an encoder without one its projected or pooled
        output, where it has such, else the mean of its last hidden state.

        Args:
            packed: windows of one grid. Of an image model consecutive ones may be of one video.
            carried: for an image model, of each window which places of its first step stand since the window before,
                bool [H', W'], see `rlt.TokenStream`: nothing is computed for them. None, or nothing at all, begins
                anew.

        Raises:
            InvalidArgumentError: for windows of another size than the model takes.
        """
        windows = packed.unpack()
        if self._stream is None:
            pixels = torch.stack([_pixels(window) for window in windows])
            return self._run(self.model.rlt, pixels, torch.stack([window.mask() for window in windows]))
        found = []
        for window, known in zip(windows, carried or [None] * len(windows), strict=True):
            mask = window.mask()
            if known is None:
                self._stream.reset()
            else:
                mask[0] &= ~known.to(mask.device)
            with self._stream:
                found.append(self._run(self.model.rlt, _pixels(window)[None], mask[None]).mean(0))
        return torch.stack(found)

    def forward_unpatched(self, packed: PackedTokens) -> Tensor:
        """Features of whole windows, as the model gives them without its patch: what the patch is held against.

        Raises:
            InvalidArgumentError: if a token is missing.
        """
        windows = packed.unpack()
        if any(len(window) < window.grid.num_tokens for window in windows):
            raise InvalidArgumentError("tokens were dropped; a model without its patch takes whole windows")
        pixels = torch.stack([_pixels(window) for window in windows])
        adapter, spec = self.model.rlt, self.config.patches
        mean_C11, std_C11 = (torch.tensor(row, device=pixels.device)[:, None, None] for row in (spec.mean, spec.std))
        adapter.detach()
        try:
            return self._run(adapter, (pixels / 255 - mean_C11) / std_C11, torch.empty(0))
        finally:
            adapter.attach()

    def _change(self, **options: Any) -> None:
        adapter = self.model.rlt
        adapter.options = adapter.settle(adapter.options.changed(**options))

    def _run(self, adapter: Any, pixels_BTChw: Tensor, mask: Tensor) -> Tensor:
        """Features of windows [B, D], or of frames [F, D]."""
        model = self.model
        if self.config.by_frame:
            inputs: dict[str, Any] = encoder_inputs(adapter.encoder, pixels_BTChw.flatten(0, 1))
        else:
            inputs = {model.main_input_name: pixels_BTChw}
        if "skip_predictor" in signature(type(model).forward).parameters:  # of V-JEPA 2, whose output is not used
            inputs["skip_predictor"] = True
        read: list[Tensor] = []
        classifier = model.classifier if self.config.num_classes else nn.Identity()
        hook = classifier.register_forward_pre_hook(lambda _module, given: read.append(given[0]))
        try:
            with adapter.keeping(mask):
                output = model(**inputs)
        except ValueError as error:
            if isinstance(error, InvalidArgumentError):
                raise
            height, width = pixels_BTChw.shape[-2:]
            raise InvalidArgumentError(
                f"{self.config.kind} does not take frames of {height}x{width} ({one_line(error)}); leave the size out"
            ) from error
        finally:
            hook.remove()
        return read[0] if self.config.num_classes else _pooled(output)


def as_network(model: nn.Module) -> VisionTransformer | PatchedNetwork:
    """A network of a program: one of ours, or a model of transformers after `rlt.patch`.

    Raises:
        InvalidArgumentError: for any other model.
    """
    return model if isinstance(model, VisionTransformer | PatchedNetwork) else PatchedNetwork(model)


_PIXELS = ("pixel_values", "pixel_values_videos")


def _takes_pixels(kind: Any) -> bool:
    """Whether models of a class take pixels alone, which some encoders forget to say."""
    return kind.main_input_name in _PIXELS or kind.__name__ in TOWERS


def _pooled(output: Any) -> Tensor:
    named = (getattr(output, name, None) for name in ("image_embeds", "pooler_output"))
    pooled = next((found for found in named if found is not None), None)
    return output.last_hidden_state.mean(1) if pooled is None else pooled


def _pixels(tokens: RunLengthTokens) -> Tensor:
    """uint8 [T, C, h, w], zeros where nothing was kept, which nobody looks at."""
    grid, device = tokens.grid, tokens.coords.device
    t, h, w = tokens.coords.unbind(1)
    filled = tokens.patches.new_zeros(grid.num_tokens, tokens.patches.shape[1])
    filled[(t * grid.height + h) * grid.width + w] = tokens.patches
    coords = torch.ones(grid, dtype=torch.bool, device=device).nonzero()
    whole = replace(tokens, patches=filled, coords=coords, lengths=torch.ones_like(coords[:, 0]))
    return whole.expand().permute(0, 3, 1, 2)


def _kind(folder: Path, config: Mapping[str, object]) -> Any:
    """The class of transformers that the model in a folder is loaded as."""
    library = import_transformers()
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if name not in supported_models():
        raise CheckpointError(
            f"{folder} has model_type {config.get('model_type')!r} and architecture {name or None!r}; supported are "
            f"{MODEL_TYPE!r}, {hf_config.MODEL_TYPE!r} and the models of rlt.patch that take nothing but pixels "
            "(docs/adapters.md)"
        )
    kind = getattr(library, VISION_PARTS.get(name, name), None)
    if kind is None or not _takes_pixels(kind):
        raise CheckpointError(
            f"{folder} is a {name}, which needs text too; save its vision encoder alone, or use rlt.patch in a program"
        )
    return kind


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """Errors of transformers as one line, and no progress bar beside ours."""
    logging = import_transformers().utils.logging
    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except RltError:
        raise
    except Exception as error:  # damaged files and foreign configurations make it raise nearly anything
        raise CheckpointError(f"{folder} cannot be loaded by transformers ({one_line(error)}); get it again") from error
    finally:
        if shows:
            logging.enable_progress_bar()
