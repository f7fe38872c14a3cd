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
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.adapters.options import LastForward, PatchOptions
from rlt.adapters.selection import choose_tokens
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.nn.attention import packed_attention
from rlt.structures import Segments
from rlt.tokens import IMAGENET_MEAN, IMAGENET_STD

ATTENTION = "rlt_packed"
"""Our name in transformers' registry of attention functions."""
OLDEST_TRANSFORMERS = 5


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
        self._attention_before = ""

    def __repr__(self) -> str:
        """What it does, in one line; the model itself would be pages."""
        return f"{type(self).__name__}({self.options}, last={self.last})"

    def attach(self) -> None:
        """Begin: from now on the model drops tokens."""
        register_attention()
        self._check_untouched()
        self._attention_before = self.model.config._attn_implementation
        self.model.config._attn_implementation = ATTENTION
        for module, name, function in self.overrides():
            module.__dict__[name] = function
            self._overridden.append((module, name))
        self._hook = self.model.register_forward_hook(self.finish).id
        for module in self.attention_modules():
            module.__dict__["rlt_adapter"] = self
        self.model.__dict__["rlt"] = self

    def detach(self) -> None:
        """End: the model is as it was."""
        for module, name in self._overridden:
            del module.__dict__[name]
        self._overridden.clear()
        self.model._forward_hooks.pop(self._hook, None)
        for module in self.attention_modules():
            module.__dict__.pop("rlt_adapter", None)
        if self.model.config._attn_implementation == ATTENTION:  # otherwise the user has chosen another one since
            self.model.config._attn_implementation = self._attention_before
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
        if getattr(getattr(self.model, "config", None), "_attn_implementation", None) == ATTENTION:
            raise InvalidArgumentError(
                "the model shares its configuration with a patched model; unpatch that one, or build this one from a "
                "copy.deepcopy of the configuration and call set_attn_implementation('sdpa')"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or pickle: a fresh process does not know our attention yet."""
        if self.library == "transformers":
            register_attention()
        self.__dict__.update(state)

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
        """The modules that call transformers' attention function."""

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
        mask = choose_tokens(pixel_values, self.options, tubelet_size=tubelet_size, patch_size=patch_size, std=std)
        if pixel_values.dtype == torch.uint8:
            pixel_values = self._normalise(pixel_values, mean, std)
        patches = pixel_values.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
        patches = patches.unflatten(1, (-1, tubelet_size)).permute(0, 1, 4, 6, 3, 2, 5, 7)
        self.last = LastForward(mask)
        return patches[mask].flatten(1), self.last

    def finish(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Put hidden states back on the full grid, where that is asked for; otherwise they stay packed, [1, T, D].

        Raises:
            InvalidArgumentError: if any layer did not go through packed attention, so that clips saw each other, or
                attention weights are asked for of a model that gave some before.
        """
        expected = len(self.attention_modules())
        if self.packed_calls != expected or expected == 0:
            raise InvalidArgumentError(
                f"{self.packed_calls} of {expected} layers used packed attention; {self.library} "
                f"{version(self.library)} computes this model in another way than rlt.patch knows: upgrade rlt, or "
                "rlt.unpatch the model"
            )
        plain = isinstance(output, tuple)  # return_dict=False
        found = output if plain else (getattr(output, "attentions", None),)
        empty = any(isinstance(value, tuple) and all(part is None for part in value) for value in found)
        if empty and self._attention_before == "eager":  # others give none without the patch either
            raise InvalidArgumentError(
                "output_attentions is set, but packed attention has no weights to give; leave it out, or rlt.unpatch"
            )
        if self.options.expand != "fill":
            return output
        if plain:
            return tuple(self._fill_states(value) if isinstance(value, tuple) else value for value in output)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = self._fill_states(output.hidden_states)
        return output

    def _fill_states(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        packed = (1, self.segments.num_tokens)
        return tuple(
            self.fill(state[0]) if isinstance(state, Tensor) and tuple(state.shape[:2]) == packed else state
            for state in states
        )

    def begin(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """Tell attention where each clip begins and ends in the sequence that follows.

        Raises:
            InvalidArgumentError: if the model's attention is not ours any more, which would let clips see each other.
        """
        if self.model.config._attn_implementation != ATTENTION:
            raise InvalidArgumentError(
                f"attention of the patched model was set to {self.model.config._attn_implementation!r}; call rlt.patch "
                "again, or rlt.unpatch to use that one"
            )
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


def rlt_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function for packed clips: [1, H, T, K] -> [1, T, H, K], and no attention weights.

    Modules of a patched model that work on whole clips, such as a pooler, get `scaled_dot_product_attention`.

    Raises:
        InvalidArgumentError: for a mask, dropout or scaling, which packed attention does not have.
    """
    adapter: Adapter | None = module.__dict__.get("rlt_adapter")
    if adapter is None:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
        )
        return mixed.transpose(1, 2).contiguous(), None
    usual = query.shape[-1] ** -0.5
    if attention_mask is not None or dropout or (scaling is not None and abs(scaling - usual) > 1e-6):
        raise InvalidArgumentError(
            f"attention with mask={attention_mask is not None}, dropout={dropout}, scaling={scaling} cannot be packed; "
            "set attention_probs_dropout_prob=0 in the model's configuration, or unpatch it"
        )
    adapter.packed_calls += 1
    q_THK, k_THK, v_THK = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q_THK, k_THK, v_THK, adapter.segments)[None], None


def register_attention() -> None:
    """Make `rlt_packed` known to transformers.

    Raises:
        MissingDependencyError: if it is not installed or too old.
    """
    import_transformers().AttentionInterface.register(ATTENTION, rlt_packed)


def import_transformers() -> Any:
    """The package; no other module imports it.

    Raises:
        MissingDependencyError: if it is not installed or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f'rlt.patch needs transformers {OLDEST_TRANSFORMERS} or newer; install it with: pip install "rlt[hf]"'
        ) from error
    if int(version("transformers").split(".")[0]) < OLDEST_TRANSFORMERS:
        raise MissingDependencyError(
            f"transformers is {version('transformers')}; rlt.patch needs {OLDEST_TRANSFORMERS} or newer: "
            'pip install --upgrade "rlt[hf]"'
        )
    return transformers
