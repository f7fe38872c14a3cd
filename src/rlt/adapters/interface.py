"""What adapters of transformers share whose models attend through its attention interface.

Shape legend: B clips, T tokens of all clips, D model width, H heads, K head width.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlt.adapters.base import Adapter
from rlt.adapters.options import PatchOptions
from rlt.errors import InvalidArgumentError, MissingDependencyError
from rlt.network.attention import packed_attention

ATTENTION = "rlt_packed"
"""Our name in transformers' registry of attention functions."""
OLDEST_TRANSFORMERS = 5


class InterfaceAdapter(Adapter):
    """Tells a model by its configuration to attend through `rlt_packed`."""

    attention = staticmethod(packed_attention)
    """What runs within; another function of the same signature to compare with."""

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        """See `Adapter`."""
        super().__init__(model, options)
        self._attention_before = ""

    def attach(self) -> None:
        """See `Adapter.attach`.

        Raises:
            MissingDependencyError: if the installed transformers is too old.
        """
        register_attention()
        super().attach()
        self._attention_before = self.model.config._attn_implementation
        self.model.config._attn_implementation = ATTENTION
        for module in self.attention_modules():
            module.__dict__["rlt_adapter"] = self

    def detach(self) -> None:
        """See `Adapter.detach`."""
        super().detach()
        for module in self.attention_modules():
            module.__dict__.pop("rlt_adapter", None)
        if self.model.config._attn_implementation == ATTENTION:  # otherwise the user has chosen another one since
            self.model.config._attn_implementation = self._attention_before

    def _check_untouched(self) -> None:
        super()._check_untouched()
        if self.model.config._attn_implementation == ATTENTION:
            raise InvalidArgumentError(
                "the model shares its configuration with a patched model; unpatch that one, or build this one from a "
                "copy.deepcopy of the configuration and call set_attn_implementation('sdpa')"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy or pickle: a fresh process does not know our attention yet."""
        register_attention()
        self.__dict__.update(state)

    def begin(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """See `Adapter.begin`.

        Raises:
            InvalidArgumentError: if the model's attention is not ours any more, which would let clips see each other.
        """
        if self.model.config._attn_implementation != ATTENTION:
            raise InvalidArgumentError(
                f"attention of the patched model was set to {self.model.config._attn_implementation!r}; call rlt.patch "
                "again, or rlt.unpatch to use that one"
            )
        super().begin(lengths, device)

    def finish(self, _module: nn.Module, _inputs: object, output: Any) -> Any:
        """Put hidden states back on the full grid, where that is asked for; otherwise they stay packed, [1, T, D].

        Raises:
            InvalidArgumentError: as `Adapter.finish`, or if attention weights are asked for of a model that gave some
                before.
        """
        super().finish(_module, _inputs, output)
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
    adapter: InterfaceAdapter | None = module.__dict__.get("rlt_adapter")
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
    return adapter.attention(q_THK, k_THK, v_THK, adapter.segments)[None], None


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
