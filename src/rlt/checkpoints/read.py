"""Checkpoints of VideoMAE, VideoMAEv2, the original RLT, Hugging Face and rlt: read and checked.

Names and shapes of the layouts stand in `rlt.checkpoints.state_maps`, files are handled by `rlt.weights`. Every key of
a file is either loaded, or named in the `LoadReport` with the reason why it is not; anything else is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rlt import weights
from rlt.checkpoints import hf_config
from rlt.checkpoints.models import MODELS, NUM_HEADS, misfit, model_config, size_name
from rlt.checkpoints.state_maps import (
    LAYOUTS,
    Layout,
    LayoutName,
    Translation,
    count_blocks,
    detect_layout,
    patches_of,
    to_ours,
)
from rlt.checks import one_of, some
from rlt.errors import CheckpointError
from rlt.files import newest
from rlt.network.positions import sinusoid_table
from rlt.network.run_lengths import IGNORED
from rlt.network.vit import MODEL_TYPE, VisionTransformer, ViTConfig

_WRAPPERS = ("module", "model", "state_dict")
_PREFIXES = ("module.", "backbone.", "_orig_mod.", "model.")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What became of every key of a checkpoint. `str(report)` is one line."""

    source: str
    """File, folder or hub id, as it was given."""
    layout: LayoutName
    """Whose names the keys have."""
    matched: int
    """Our weights that were filled from the file."""
    missing: tuple[str, ...] = ()
    """Our weights that the file does not have and that are new by request (`new_head`)."""
    ignored: tuple[tuple[str, str], ...] = ()
    """(key of the file, reason) for everything that was left out on purpose."""
    notes: tuple[str, ...] = ()
    """What a careful reader should know."""

    def __str__(self) -> str:
        title = next(layout.title for layout in LAYOUTS if layout.name == self.layout)
        parts = [f"{self.source} ({title} layout): {self.matched} weights loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} new ({some(self.missing)})")
        reasons: dict[str, list[str]] = {}
        for key, reason in self.ignored:
            reasons.setdefault(reason, []).append(key)
        parts += [f"{len(keys)} left out as {reason} ({some(keys, 2)})" for reason, keys in reasons.items()]
        return "; ".join([*parts, *(f"note: {note}" for note in self.notes)])


@dataclass
class _Opened:
    """A checkpoint in memory, its keys without wrappers and prefixes."""

    source: str
    tensors: dict[str, Tensor]
    config: dict[str, object] | None = None
    preprocessor: dict[str, object] | None = None
    ignored: dict[str, str] = field(default_factory=dict)
    num_positions: int | None = None
    """Rows of the stored position table, if there is one."""


def load_checkpoint(
    source: str | Path, *, num_classes: int | None = None, new_head: bool = False, num_heads: int | None = None
) -> VisionTransformer:
    """Build the model of a checkpoint, in evaluation mode with float32 weights (half precision is widened).

    Arguments and errors are those of `read_checkpoint`; its report is logged.
    """
    config, state, report = read_checkpoint(source, num_classes=num_classes, new_head=new_head, num_heads=num_heads)
    _log.info("%s", report)
    return build(config, state)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    checkpoint: str | Path | None = None,
    new_head: bool = False,
    num_heads: int | None = None,
    run_lengths: str | None = None,
) -> VisionTransformer:
    """Build a model, with random weights or those of a checkpoint, in evaluation mode.

    Args:
        name: one of `list_models()`.
        num_classes: outputs of the head; 0 for none. None takes the checkpoint's, or 400 without a checkpoint.
        checkpoint: a file, a folder or a hub id in any layout that `rlt.checkpoints` knows; None for random weights.
        new_head: see `read_checkpoint`.
        num_heads: attention heads where they are not those of the named size.
        run_lengths: where run lengths count, "aware", "ignored" or parts (`rlt.network.run_lengths`); None as the
            checkpoint says; "aware" without one, and for networks that were trained on all tokens.

    Returns:
        The model; `model.config.labels` holds class names where the checkpoint has them.

    Raises:
        InvalidArgumentError: for an unknown name.
        CheckpointError: if the checkpoint cannot be read, or its weights are not those of the named model.
    """
    if checkpoint is None:
        config = model_config(name, num_heads)
        model = VisionTransformer(config.replace(num_classes=400 if num_classes is None else num_classes)).eval()
        model.run_lengths = run_lengths or model.run_lengths
        return model
    one_of(MODELS, model=name)  # before the file is read
    model = load_checkpoint(checkpoint, num_classes=num_classes, new_head=new_head, num_heads=num_heads)
    check_size(model.config, name, num_heads, checkpoint)
    model.run_lengths = run_lengths or model.run_lengths
    return model


def check_size(config: ViTConfig, name: str | None, num_heads: int | None, source: str | Path) -> None:
    """Hold that a checkpoint has the named size; None is any.

    Raises:
        InvalidArgumentError: for an unknown name.
        CheckpointError: saying what it has, and which name that is.
    """
    if name is None:
        return
    asked = model_config(name, num_heads)
    if (size := misfit(config, asked)) is not None:
        ours, theirs, fitting = getattr(asked, size), getattr(config, size), size_name(config)
        remedy = f"ask for {fitting}" if fitting else "name none, and the checkpoint's own is taken"
        raise CheckpointError(f"{source} has {size}={theirs}, {name} has {ours}; {remedy}")


def read_checkpoint(
    source: str | Path, *, num_classes: int | None = None, new_head: bool = False, num_heads: int | None = None
) -> tuple[ViTConfig, dict[str, Tensor], LoadReport]:
    """Read and check a checkpoint of any layout in `rlt.checkpoints.state_maps.LAYOUTS`, without building a model.

    LayerNorms get epsilon 1e-6 for VideoMAE's layouts, also for checkpoints of the original RLT: its code ran them
    with 1e-5, but started from weights that were trained with 1e-6. A pretraining checkpoint's norm after the encoder
    is left out and the one before the head starts new, as when VideoMAE is fine-tuned.

    Args:
        source: a file, a folder, or a hub id.
        num_classes: outputs of the head; None takes the checkpoint's, 0 leaves the head out.
        new_head: take a new head instead of the checkpoint's (num_classes=None: of as many outputs, or 400). Needed
            after pretraining, where the LayerNorm before the head is new, too.
        num_heads: attention heads, for a size that is not published and a checkpoint that does not say.

    Returns:
        The configuration; float32 tensors under our names, all but those in `report.missing`; the report.

    Raises:
        CheckpointError: in one line: if the file cannot be read safely, is of no known layout, or any key is missing,
            unexpected or of another shape, or a weight is NaN or infinite.
    """
    opened = _open(source)
    layout = detect_layout(opened.tensors)
    _check_model_type(opened, layout)
    if layout is None:
        raise CheckpointError(
            f"{source} is no VideoMAE-style checkpoint (keys: {some(opened.tensors)}); "
            f"supported are {', '.join(known.title for known in LAYOUTS)}"
        )
    _set_aside(opened, layout, new_head)
    depth = max(1, count_blocks(layout.rules, opened.tensors))
    translation = to_ours(layout.rules, opened.tensors, depth)
    _check_translation(opened.source, layout, translation)
    state = {name: tensor.float() for name, tensor in translation.state.items()}
    config = _config_of(opened, layout, state, depth, num_heads, blocks_only=new_head)
    config, new = _settle_head(opened, config, state, num_classes, new_head)
    with torch.device("meta"):
        problems = weights.misfits(VisionTransformer(config), state, fresh=new)
    if problems:
        raise CheckpointError(
            f"{source} ({layout.title} layout) disagrees with its own sizes: {problems}; get it again"
        )
    weights.check_finite(state, source)
    ignored, notes = tuple(opened.ignored.items()), _notes(layout, translation)
    return config, state, LoadReport(opened.source, layout.name, len(state), new, ignored, notes)


def _open(source: str | Path) -> _Opened:
    path = weights.find_source(source)
    opened = _Opened(str(source), {})
    if path.is_dir():
        opened.config = weights.read_config(path)
        if newest(path / "preprocessor_config.json").is_file():
            opened.preprocessor = weights.read_json(path / "preprocessor_config.json")
        opened.tensors = weights.read_folder(path)
    else:
        content = weights.read_file(path)
        for wrapper in _WRAPPERS:
            inner = content.get(wrapper)
            if isinstance(inner, Mapping):
                content = inner
                break
        opened.tensors = weights.tensors_in(content, path)
        _keep_network(opened)
    while prefix := next((known for known in _PREFIXES if all(key.startswith(known) for key in opened.tensors)), ""):
        opened.tensors = {key.removeprefix(prefix): tensor for key, tensor in opened.tensors.items()}
    return opened


def _keep_network(opened: _Opened) -> None:
    """A Lightning module keeps the network under `model.`, as the original RLT does; metrics and losses beside it."""
    network = {key: tensor for key, tensor in opened.tensors.items() if key.startswith("model.")}
    if network and detect_layout({key.removeprefix("model.") for key in network}):
        beside = [key for key in opened.tensors if key not in network]
        opened.ignored.update(dict.fromkeys(beside, "state of the training module beside the network"))
        opened.tensors = network


def _check_model_type(opened: _Opened, layout: Layout | None) -> None:
    if opened.config is None:
        return
    found = opened.config.get("model_type")
    if found not in (MODEL_TYPE, hf_config.MODEL_TYPE):
        raise CheckpointError(
            f"{opened.source} has model_type {found!r}; {MODEL_TYPE!r} and {hf_config.MODEL_TYPE!r} are supported"
        )
    if layout is not None and (layout.name == "rlt") != (found == MODEL_TYPE):
        raise CheckpointError(
            f"{opened.source} says model_type {found!r}, its weights have {layout.title} names; get both files again"
        )


def _set_aside(opened: _Opened, layout: Layout, new_head: bool) -> None:
    """Move keys that are expected and not loaded to `ignored`."""
    kept: dict[str, Tensor] = {}
    for key, tensor in opened.tensors.items():
        name = layout.canonical(key)
        reason = next((reason for start, reason in layout.ignored if name.startswith(start)), None)
        if name == layout.positions:
            opened.num_positions = _check_positions(opened.source, key, tensor)
            reason = "the fixed position table"
        elif name.startswith(layout.final_norm or "\0") and new_head:
            reason = "norm that a new head replaces"
        if reason is not None:
            opened.ignored[key] = reason
        elif name in kept:
            raise CheckpointError(f"{opened.source} has {name} twice, once as another spelling; remove one")
        else:
            kept[name] = tensor
    opened.tensors = kept


def _check_positions(source: str, key: str, tensor: Tensor) -> int:
    table = tensor[0] if tensor.ndim == 3 and len(tensor) == 1 else tensor
    tolerance = 1e-5 if tensor.dtype in (torch.float32, torch.float64) else 1e-2
    if table.ndim != 2 or not torch.allclose(table.float(), sinusoid_table(*table.shape), rtol=0, atol=tolerance):
        raise CheckpointError(f"{source} has learned positions ({key}); only the fixed sinusoid table is supported")
    return len(table)


def _check_translation(source: str, layout: Layout, translation: Translation) -> None:
    present = {rule.group for rule in layout.rules if rule.ours.replace("{i}", "0") in translation.state}
    missing = [name for name, group in translation.missing.items() if group in present | {"core"}]
    integers = [f"{name} is {t.dtype}" for name, t in translation.state.items() if not t.is_floating_point()]
    mis_shaped = [*translation.mis_shaped, *integers]
    if not (missing or translation.unexpected or mis_shaped):
        return
    problems = weights.key_problems(missing, translation.unexpected, mis_shaped)
    hint = "only complete, unquantised VideoMAE-style ViTs can be loaded"
    if any(name.endswith(("gamma_1", "gamma_2")) for name in translation.unexpected):
        hint = "layer scale (gamma_1, gamma_2) is not supported"
    elif any(name.startswith(layout.final_norm or "\0") for name in translation.unexpected):
        hint = "only models that average their tokens are supported; new_head=True keeps the blocks"
    raise CheckpointError(f"{source} ({layout.title} layout) does not fit: {problems}; {hint}")


def _notes(layout: Layout, translation: Translation) -> tuple[str, ...]:
    notes = []
    state = translation.state
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()} - {"float32"})
    if dtypes:
        notes.append(f"stored as {', '.join(dtypes)}, loaded as float32")
    if "qv_bias" in translation.missing.values():
        notes.append("it has no q and v biases at all, so the model is built without")
    if "length_embed" in state and layout.name == "videomae":
        notes.append(
            "length_embed: the original RLT code trained it with run lengths in (h, w, t) order beside tokens in "
            "(t, h, w) order; where it comes from there, fine-tune it before relying on it"
        )
    return tuple(notes)


def _config_of(
    opened: _Opened,
    layout: Layout,
    state: Mapping[str, Tensor],
    depth: int,
    num_heads: int | None,
    *,
    blocks_only: bool,
) -> ViTConfig:
    """The configuration with the head as it is stored."""
    classes = state["head.bias"].numel() if "head.bias" in state else 0
    if opened.config is None:
        return _config_of_tensors(opened, layout, state, depth, num_heads).replace(num_classes=classes)
    if layout.name == "rlt":
        config = ViTConfig.from_dict(opened.config, opened.source)
    else:
        config = hf_config.config_from_hf(
            opened.config, opened.preprocessor, num_classes=classes, source=opened.source, blocks_only=blocks_only
        )
    if config.depth != depth:
        raise CheckpointError(
            f"{opened.source} says depth {config.depth}, its weights have {depth} blocks; get it again"
        )
    if num_heads not in (None, config.num_heads):
        raise CheckpointError(f"{opened.source} has {config.num_heads} heads; leave out num_heads={num_heads}")
    return config


def _config_of_tensors(
    opened: _Opened, layout: Layout, state: Mapping[str, Tensor], depth: int, num_heads: int | None
) -> ViTConfig:
    width = state["patch_embed.bias"].numel()
    heads = num_heads or NUM_HEADS.get(width)
    if heads is None:
        raise CheckpointError(
            f"{opened.source} has width {width} and does not tell its attention heads; give num_heads"
        )
    embedding = next(rule.theirs[0] for rule in layout.rules if rule.ours == "patch_embed.weight")
    patches = patches_of(opened.tensors[embedding])
    config = ViTConfig(
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_width=state["blocks.0.mlp.fc1.bias"].numel(),
        tubelet_size=patches.tubelet_size,
        patch_size=patches.patch_size,
        qkv_bias="blocks.0.attn.q_bias" in state,
        layer_norm_eps=layout.layer_norm_eps,
        head_norm_eps=layout.head_norm_eps,
    )
    if "length_embed" in state:
        time_steps = state["length_embed"].numel() // width
        # It was trained with run lengths as a learned embedding, and without counting them.
        frames = time_steps * patches.tubelet_size
        return config.replace(length_encoding="learned", run_lengths=IGNORED, num_frames=frames)
    places_per_step = (config.image_size // patches.patch_size) ** 2
    if opened.num_positions and opened.num_positions % places_per_step == 0:
        return config.replace(num_frames=opened.num_positions // places_per_step * patches.tubelet_size)
    return config


def _settle_head(
    opened: _Opened, config: ViTConfig, state: dict[str, Tensor], num_classes: int | None, new_head: bool
) -> tuple[ViTConfig, tuple[str, ...]]:
    """The configuration with the head that is asked for, and the names of the weights that start new."""
    stored = config.num_classes
    norm = tuple(name for name in ("fc_norm.weight", "fc_norm.bias") if name not in state)
    if not new_head:
        without_head = num_classes == 0 or (num_classes is None and opened.config is not None and stored == 0)
        lacking = [*(["head"] if not stored and not without_head else []), *(["norm before the head"] if norm else [])]
        if lacking:
            raise CheckpointError(
                f"{opened.source} has no {' and no '.join(lacking)}, as after pretraining; "
                "give a fine-tuned checkpoint, or new_head=True to start them new"
            )
        if num_classes not in (None, 0, stored):
            raise CheckpointError(
                f"{opened.source} has {stored} classes, num_classes is {num_classes}; "
                f"give num_classes={stored}, or new_head=True to start a new head"
            )
        if not without_head:
            return config, ()
    for name in ("head.weight", "head.bias"):
        if state.pop(name, None) is not None:
            opened.ignored[name] = "the head, by request"
    if num_classes is None:
        num_classes = (stored or 400) if new_head else 0
    new = (*norm, *(("head.weight", "head.bias") if num_classes else ()))
    return config.replace(num_classes=num_classes, labels=()), new


def build(config: ViTConfig, state: Mapping[str, Tensor]) -> VisionTransformer:
    """The model of what `read_checkpoint` gives, in evaluation mode."""
    model = VisionTransformer(config)
    model.load_state_dict(state, strict=False)  # `read_checkpoint` has compared names and shapes
    return model.eval()
