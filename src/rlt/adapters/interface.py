"""What adapters of transformers' encoders share: attention through its interface, the way in and the way out.

Shape legend: B clips, T tokens of all clips, E tokens of a clip beside those of patches, L tokens of a clip before
dropping, D model width, H heads, K head width.
"""

from __future__ import annotations

import abc
from importlib.metadata import version
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from rlt.adapters.options import PatchOptions
from rlt.adapters.packed import PackedPatch
from rlt.adapters.patching import Hook, Override, sides, square_side
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.network.attention import packed_attention

ATTENTION = "rlt_packed"
"""Our name in transformers' registry of attention functions."""
OLDEST_TRANSFORMERS = (5,)


class InterfacePatch(PackedPatch):
    """Tells a model by its configuration to attend through `rlt_packed`."""

    library: ClassVar[str] = "transformers"
    attention = staticmethod(packed_attention)
    """What runs within; another function of the same signature to compare with."""

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        super().__init__(model, options)
        self._attention_before = ""

    @property
    def encoder(self) -> Any:
        """The bare model, which may be the patched one itself."""
        return self.model.base_model

    @property
    def attention_config(self) -> Any:
        """The configuration by which the layers choose their attention."""
        return self.model.config

    @abc.abstractmethod
    def embed(self, pixel_values: Tensor) -> Tensor:
        """Pixels [B, frames, C, H, W] -> all tokens with their positions, [1, T, D]."""

    @property
    def is_bare(self) -> bool:
        """Whether the patched model is an encoder without a head, whose outputs always have the shape that they had."""
        return bool(self.model.base_model is self.model)

    @property
    def fills(self) -> bool:
        """Whether outputs go back on the full grid."""
        return self.is_bare or self.options.expand == "fill"

    @property
    def num_rows(self) -> int:
        """Rows of the packed sequence."""
        return self.call.segments.num_tokens

    @override
    def settle(self, options: PatchOptions) -> PatchOptions:
        if self.is_bare:
            options.check_runs(f"outputs of {type(self.model).__name__} go back on the full grid")
        return super().settle(options)

    @override
    def edits(self) -> list[Override | Hook]:
        return [
            Override(self.encoder.embeddings, "forward", self.embed),
            *(Override(module, "rlt_adapter", self) for module in self.attention_modules()),
            Hook(self.last_module, self.leave),
            Hook(self.model, self.finish),
        ]

    @property
    def last_module(self) -> nn.Module:
        """Whose output is that of all layers, the last norm included."""
        return self.encoder.layernorm

    @override
    def input_shape(self) -> tuple[int, int, int, int]:
        config = self.model.config
        return config.num_frames, config.num_channels, *sides(config.image_size)

    @override
    def token_size(self) -> tuple[int, int]:
        return self.model.config.tubelet_size, square_side(self.model.config.patch_size)

    @override
    def attach(self) -> None:
        register_attention()
        super().attach()
        self._attention_before = self.attention_config._attn_implementation
        self.attention_config._attn_implementation = ATTENTION

    @override
    def detach(self) -> None:
        super().detach()
        if self.attention_config._attn_implementation == ATTENTION:  # otherwise the user has chosen another one since
            self.attention_config._attn_implementation = self._attention_before

    @override
    def check_attachable(self) -> None:
        super().check_attachable()
        if self.attention_config._attn_implementation == ATTENTION:
            raise InvalidArgumentError(
                "the model shares its configuration with a patched model; unpatch that one, or build this one from a "
                "copy.deepcopy of the configuration and call set_attn_implementation('sdpa')"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        register_attention()  # a fresh process, which unpickles, does not know it yet
        self.__dict__.update(state)

    @override
    def begin(self, pixel_values: Tensor) -> Tensor:
        chosen = self.attention_config._attn_implementation
        if chosen != ATTENTION:
            raise InvalidArgumentError(
                f"attention of the patched model was set to {chosen!r}; call rlt.patch again, or rlt.unpatch to use "
                "that one"
            )
        return super().begin(pixel_values)

    def mix(self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Attention of one layer over the tokens of the call, [T, H, K]."""
        call = self.call
        call.packed_calls += 1
        return self.attention(q_THK, k_THK, v_THK, call.segments, key_bias_T=call.key_bias)

    def leave(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Behind the layers: tokens [1, T, D] -> clips, [B, E + L, D] filled, or what a head reads."""
        x_TD = self.remember(output if isinstance(output, Tensor) else output.last_hidden_state)[0]
        clips = self.call.fill(x_TD) if self.fills else self.read_by_head(x_TD)
        if isinstance(output, Tensor):
            return clips
        output.last_hidden_state = clips
        return output

    def read_by_head(self, x_TD: Tensor) -> Tensor:
        """What the head of a classifier reads: [T, D] -> [B, n, D], here the first token of each clip."""
        return x_TD[self.call.first][:, None]

    @override
    def finish(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Put hidden states back on the full grid, where that is asked for; otherwise they stay packed, [1, T, D]."""
        self.check_packed()
        plain = isinstance(output, tuple)  # return_dict=False
        found = output if plain else (getattr(output, "attentions", None),)
        empty = any(isinstance(value, tuple) and all(part is None for part in value) for value in found)
        if empty and self._attention_before == "eager":  # others give none without the patch either
            raise InvalidArgumentError(
                "output_attentions is set, but packed attention has no weights to give; leave it out, or rlt.unpatch"
            )
        if not self.fills:
            return output
        if plain:
            return tuple(self._fill_states(value) if isinstance(value, tuple) else value for value in output)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = self._fill_states(output.hidden_states)
        return output

    def _fill_states(self, states: tuple[Any, ...]) -> tuple[Any, ...]:
        call = self.call
        packed = (1, self.num_rows)
        return tuple(
            call.fill(state[0], f"state {number}")
            if isinstance(state, Tensor) and tuple(state.shape[:2]) == packed
            else state
            for number, state in enumerate(states)
        )


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
    """transformers' attention function for packed clips: [1, H, T, K] -> [1, T, H, K], and no attention weights."""
    adapter: InterfacePatch | None = module.__dict__.get("rlt_adapter")
    if adapter is None:  # of a patched model, but on whole clips, such as a pooler
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.to(query.dtype)
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
    # Turned by fractional positions, queries and keys of half precision come as float32.
    q_THK, k_THK, v_THK = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    return adapter.mix(q_THK, k_THK, v_THK)[None], None


def register_attention() -> None:
    """Make `rlt_packed` known to transformers."""
    import_transformers().AttentionInterface.register(ATTENTION, rlt_packed)


def import_transformers(oldest: tuple[int, ...] = OLDEST_TRANSFORMERS, what: str = "rlt.patch") -> Any:
    """The package, which no other module imports; a MissingDependencyError where it is older than `what` needs."""
    needed = ".".join(map(str, oldest))
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            f'{what} needs transformers {needed} or newer; install it with: pip install "rlt[hf]"'
        ) from error
    found = version("transformers")
    if tuple(int(part) for part in found.split(".")[: len(oldest)]) < oldest:
        raise MissingDependencyError(
            f'transformers is {found}; {what} needs {needed} or newer: pip install --upgrade "rlt[hf]"'
        )
    return transformers
