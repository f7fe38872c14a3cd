"""What every adapter shares: hooks that can be undone, packed attention, and the record of the last call.

Shape legend: B clips, T tokens of all clips, L tokens of a clip before dropping, D model width, H heads, K head width.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlt.adapters.options import LastForward, PatchOptions
from rlt.adapters.selection import choose_tokens
from rlt.errors import InvalidArgumentError
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD, Segments


class Adapter(abc.ABC):
    """Runs one model on fewer tokens until it is detached.

    Nothing of the model is copied and no class is changed: `forward` of some submodules is overridden on the instance,
    so that weights, their names and saving stay as they are, and copies and pickles of the model stay patched.
    """

    model_classes: ClassVar[tuple[str, ...]]
    """Names of the classes of models that it can patch."""
    any_number_of_frames: ClassVar[bool] = False
    """Whether the model takes clips of any length that is a multiple of its tubelets."""
    library: ClassVar[str] = "transformers"
    """Top-level package that the classes come from."""
    takes_images: ClassVar[bool] = False
    """Whether a call takes frames as a batch of images."""
    pixel_statistics: tuple[tuple[float, float, float], tuple[float, float, float]] = (IMAGENET_MEAN, IMAGENET_STD)
    """Mean and standard deviation that the processor of the family takes, on the scale 0..1."""

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        """Prepare for a model; `attach` begins.

        Raises:
            InvalidArgumentError: for options that make no sense here.
        """
        if options.frames_per_clip is not None and not self.takes_images:
            raise InvalidArgumentError(
                f"frames_per_clip is {options.frames_per_clip}; {type(model).__name__} takes clips, leave it out"
            )
        self.model: Any = model  # classes of other libraries, whose attributes no type checker knows
        self.options = options
        self.last: LastForward | None = None
        self._call: tuple[Segments, LastForward] | None = None
        self._overridden: list[tuple[nn.Module, str]] = []
        self._hook: int | None = None
        self.packed_calls = 0
        """Calls of packed attention in the last forward pass."""

    def __repr__(self) -> str:
        """What it does, in one line; the model itself would be pages."""
        return f"{type(self).__name__}({self.options}, last={self.last})"

    def attach(self) -> None:
        """Begin: from now on the model drops tokens.

        Raises:
            InvalidArgumentError: if a part of the model is overridden already.
        """
        self._check_untouched()
        for module, name, function in self.overrides():
            module.__dict__[name] = function
            self._overridden.append((module, name))
        self._hook = self.model.register_forward_hook(self.finish).id
        self.model.__dict__["rlt"] = self

    def detach(self) -> None:
        """End: the model is as it was."""
        for module, name in self._overridden:
            del module.__dict__[name]
        self._overridden.clear()
        self.model._forward_hooks.pop(self._hook, None)
        self.model.__dict__.pop("rlt", None)

    def _check_untouched(self) -> None:
        """Hold, before anything changes, that what this adapter changes is as its library made it.

        Raises:
            InvalidArgumentError: if it is not; a half-done patch would let clips see each other.
        """
        for module, name, _ in self.overrides():
            if name in module.__dict__:
                raise InvalidArgumentError(
                    f"{type(module).__name__}.{name} is overridden on the instance already; undo that before rlt.patch"
                )

    @contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        """Other options within a `with` block.

        Raises:
            InvalidArgumentError: for values out of range.
        """
        before = self.options
        self.options = replace(before, **changes)
        try:
            yield
        finally:
            self.options = before

    def check(self) -> None:
        """Run a clip in which nothing changes, and see that tokens are dropped.

        Raises:
            InvalidArgumentError: if the network got as many tokens as without the patch.
        """
        before = self.last
        parameter = next(self.model.parameters())
        with torch.no_grad():
            self.model(torch.zeros(self.static_shape(), dtype=parameter.dtype, device=parameter.device))
        seen, self.last = self.last, before
        if seen is None or seen.share_kept >= 1:
            raise InvalidArgumentError(
                f"no token of a static clip was dropped with {self.options}; the patch does not engage"
            )

    def static_shape(self) -> tuple[int, ...]:
        """Shape of the pixels that `check` runs."""
        return 1, *self.input_shape()

    @abc.abstractmethod
    def overrides(self) -> list[tuple[nn.Module, str, Callable[..., Any]]]:
        """(submodule, name, what replaces it on the instance): bound methods, so that copies of the model work."""

    @abc.abstractmethod
    def attention_modules(self) -> list[nn.Module]:
        """The modules in which tokens attend to each other."""

    @abc.abstractmethod
    def input_shape(self) -> tuple[int, int, int, int]:
        """(frames, channels, height, width) that the model is made for."""

    @abc.abstractmethod
    def fill(self, x_TD: Tensor) -> Tensor:
        """Outputs of all kept tokens -> [B, tokens of an unpatched clip, D]: each place has the token that stands for
        it."""

    def select(self, pixel_values: Tensor, *, tubelet_size: int, patch_size: int) -> tuple[Tensor, LastForward]:
        """Choose tokens and gather their pixels.

        Args:
            pixel_values: normalised float, or uint8, [B, frames, C, H, W].
            tubelet_size: frames per token.
            patch_size: height and width of a token in pixels.

        Returns:
            float [T, C * tubelet * patch * patch] in the order of a Conv3d kernel, and the record of the call.

        Raises:
            InvalidArgumentError: if the clip has another size than the model is made for.
        """
        expected = self.input_shape()
        given = tuple(pixel_values.shape[1:])
        if self.any_number_of_frames and given and given[0] and given[0] % tubelet_size == 0:
            expected = (given[0], *expected[1:])
        if pixel_values.ndim != 5 or given != expected:
            raise InvalidArgumentError(
                f"pixel_values has shape {list(pixel_values.shape)}; the model needs [clips, frames, channels, height, "
                f"width] = [B, {', '.join(map(str, expected))}]"
            )
        mean, std = self.pixel_statistics
        mean, std = self.options.pixel_mean or mean, self.options.pixel_std or std
        mask = choose_tokens(pixel_values, self.options, tubelet_size=tubelet_size, patch_size=patch_size)
        if pixel_values.dtype == torch.uint8:
            pixel_values = self._normalise(pixel_values, mean, std)
        patches = pixel_values.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
        patches = patches.unflatten(1, (-1, tubelet_size)).permute(0, 1, 4, 6, 3, 2, 5, 7)
        self.last = LastForward(mask)
        return patches[mask].flatten(1), self.last

    def finish(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Look at what a call gave, and pass it on.

        Raises:
            InvalidArgumentError: if any layer did not go through packed attention, so that clips saw each other.
        """
        expected = len(self.attention_modules())
        if self.packed_calls != expected or expected == 0:
            raise InvalidArgumentError(
                f"{self.packed_calls} of {expected} layers used packed attention; {self.library} "
                f"{version(self.library)} computes this model in another way than rlt.patch knows: upgrade rlt, or "
                "rlt.unpatch the model"
            )
        return output

    def begin(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """Tell attention where each clip begins and ends in the sequence that follows."""
        self.packed_calls = 0
        assert self.last is not None, "tokens are chosen before they are packed"
        self._call = Segments.from_lengths(lengths, device=device), self.last

    @property
    def segments(self) -> Segments:
        """Where each clip begins and ends in the packed sequence of this call."""
        assert self._call is not None, "the embeddings come before the attention"
        return self._call[0]

    @property
    def kept(self) -> LastForward:
        """What this call kept: `last`, but of the call whose layers run, when activations are computed once more."""
        assert self._call is not None, "the embeddings come before the layers"
        return self._call[1]

    def remember(self, hidden_states: Tensor) -> Tensor:
        """Pass on what the layers give, and let the backward pass find this call again.

        Gradient checkpointing runs layers anew in the backward pass. By then another call may have come, and they would
        take its clips for theirs.
        """
        flags = ("gradient_checkpointing", "grad_checkpointing")  # as transformers and timm call it
        checkpoints = any(module.__dict__.get(flag) for module in self.model.modules() for flag in flags)
        if not (checkpoints and self.model.training and hidden_states.requires_grad):
            return hidden_states
        output: Tensor = _Remember.apply(hidden_states, self, self._call)  # type: ignore[no-untyped-call]
        return output

    def _normalise(self, frames: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        mean_311, std_311 = (torch.tensor(values, device=frames.device).view(3, 1, 1) for values in (mean, std))
        return ((frames.float() / 255 - mean_311) / std_311).to(dtype)


class _Remember(torch.autograd.Function):
    """The identity; on the way back it tells the adapter whose layers come next."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, adapter: Adapter, call: tuple[Segments, LastForward]) -> Tensor:
        """Keep the call for the way back."""
        ctx.adapter, ctx.call = adapter, call
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Set the call; gradients stay as they are."""
        ctx.adapter._call = ctx.call
        return gradients[0], None, None
