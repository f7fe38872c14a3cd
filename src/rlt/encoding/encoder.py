"""`rlt.Encoder`: a network over whole videos, as one function from columns to columns that other engines can run."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlt.checks import at_least, named_options, one_of
from rlt.data.tables import make_table
from rlt.encoding.cutting import Cut, Cutter, Row
from rlt.encoding.rows import OUTPUTS, columns_of, kinds_of, predicted
from rlt.encoding.windows import WindowSpec
from rlt.errors import InvalidArgumentError
from rlt.loading import is_size, load_network, named, state_of_weights, stored_inputs
from rlt.measure import check_device
from rlt.network.vit import VisionTransformer, ViTConfig
from rlt.pretrained import ModelInputs, PatchedNetwork, as_network
from rlt.structures import PatchSpec, RunLengthTokens, pack
from rlt.tokens import Rule, choose_rule, rule_options
from rlt.tokens.token_stream import is_streamable

_DTYPES = ("float32", "bfloat16", "float16")
_WINDOWS_AT_ONCE = 8  # without token_budget: as many tokens as so many windows have when nothing is dropped
_NOT_FINITE = "the network's output is not finite"


class Encoder:
    """A network over whole videos: classes, features or tokens of each window.

    It can be pickled, and loads its weights where it first runs. Called with a batch, a dictionary of columns, it gives
    a dictionary of columns with one row per window: `source`, `window` (its number in the video), `start` and `end`
    (seconds of its first and last frame), `tokens_kept` (share of its tokens), `num_tokens`, what `outputs` asks for,
    `error` (None, or what is wrong with the video from there on) and `last` (whether it is the last of its video).
    All other columns of the batch are repeated for each row.

    Args:
        model: what `rlt.loading.load_network` loads: the folder of a run, a checkpoint, a model of transformers that
            `rlt.patch` knows, a hub id or a size; or a network, or a patched model of transformers. How clips are taken
            and which tokens are kept is stored with it, and stands where the next arguments say nothing. An image
            model looks at frame after frame, and where windows of a video follow each other, with a threshold, it
            computes what changed and nothing else.
        outputs: of "classes" (`top_ids`, `top_names`, `top_probabilities`, at most five), "embedding" (float32, the
            normalised mean of the last block's tokens; of a model of transformers what its classifier gets, or its
            pooled output, and of an image model the mean of that over the frames) and "tokens" (not of those;
            `features`, float32, row after row of the last
            block, with `coords` and `run_lengths` of each and the `grid` before dropping).
        window: frames of a window.
        overlap: see `WindowSpec`, as `every` and `decoder`.
        every: seconds from window to window, instead of overlap.
        frame_stride: see `rlt.read_clip`, as the next two.
        fps: sampled frames per second.
        size: in pixels.
        rule: which tokens are kept, see `rlt.tokenize`, as all options up to `motion`.
        threshold: instead of the rule's own.
        keep_ratio: share of the tokens.
        max_tokens: number of tokens.
        reference: "previous" or "anchor".
        exposure: "none" or "gain".
        motion: "none" or "global".
        run_lengths: where run lengths count; None as the checkpoint says.
        device: where the network runs, "cpu", "cuda" or "auto".
        dtype: "float32", "bfloat16" or "float16", the last two by autocast.
        token_budget: windows of all videos go through the network together until they have so many tokens; None is
            what eight windows have when nothing is dropped.
        decoder: one of `rlt.video.DECODERS`.
        num_threads: threads of the decoder; 0 = libav decides.

    Raises:
        InvalidArgumentError: for an argument out of range.
        CheckpointError: if the model cannot be read.
    """

    @named_options()
    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        outputs: Sequence[str] = ("classes", "embedding"),
        window: int | None = None,
        overlap: int = 0,
        every: float | None = None,
        frame_stride: int | None = None,
        fps: float | None = None,
        size: Any = None,
        rule: Rule | str | None = None,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        reference: str | None = None,
        exposure: str | None = None,
        motion: str | None = None,
        run_lengths: str | None = None,
        device: str = "auto",
        dtype: str = "float32",
        token_budget: int | None = None,
        decoder: str = "pyav",
        num_threads: int = 0,
    ) -> None:
        at_least(1, token_budget=token_budget)
        one_of(_DTYPES, dtype=dtype)
        if not outputs:
            raise InvalidArgumentError(f"outputs are none; allowed are {', '.join(OUTPUTS)}")
        for output in outputs:
            one_of(OUTPUTS, outputs=output)
        if device != "auto":
            check_device(device)
        self.outputs = tuple(output for output in OUTPUTS if output in outputs)
        self._network: VisionTransformer | PatchedNetwork | None = None
        config: ViTConfig | ModelInputs
        if isinstance(model, nn.Module):
            self.name, self._network = None, as_network(model)
            config = self._network.config
        else:
            self.name = _absolute(named(str(model), None)[0])
            config = stored_inputs(self.name)
        if not config.num_classes and "classes" in self.outputs:
            raise InvalidArgumentError(f"{self.name} has no head, so it gives no classes; ask for the embedding")
        if isinstance(config, ModelInputs) and "tokens" in self.outputs:
            raise InvalidArgumentError(f"{config.kind} gives no features per token here; ask for the embedding")
        self.config = config
        self.rule = choose_rule(
            rule,
            threshold=threshold,
            keep_ratio=keep_ratio,
            max_tokens=max_tokens,
            reference=reference,
            exposure=exposure,
            motion=motion,
            stored=config.rule,
        )
        clip = config.clip_spec.changed(num_frames=window, frame_stride=frame_stride, fps=fps, size=size)
        self.windows = WindowSpec(clip, overlap, every, decoder, num_threads)
        if isinstance(config, ModelInputs):
            config.check_clip(clip)
        self.cutter = Cutter(self.windows, self.rule, config.patches)
        goes_on = isinstance(config, ModelInputs) and config.by_frame and is_streamable(self.rule)
        self.cutter.carry = goes_on and self.windows.follow
        self.token_budget = token_budget or _WINDOWS_AT_ONCE * self.cutter.window_tokens
        self.run_lengths, self.device, self.dtype = run_lengths, device, dtype

    def __repr__(self) -> str:
        return f"Encoder({self.name or self._network.__class__.__name__!r}, outputs={self.outputs}, {self.rule})"

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.name is not None:  # whoever gets it loads it
            state["_network"], state["_weights"] = None, self._state_of_weights()
        return state

    def _state_of_weights(self) -> list[list[object]]:
        """In the pickle as well, because `datasets` keeps answers by it, and other weights answer otherwise."""
        return [] if self.name is None or self.is_random else state_of_weights(self.name)

    @property
    def schema(self) -> Any:
        """Names and types of the columns of a call, as a `pyarrow.Schema`, for engines that must know them before.

        Columns that a batch has beside `video` are not in it.
        """
        kinds = kinds_of(self.outputs)
        return make_table({name: [] for name in kinds}, kinds=kinds).schema

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; empty where they are not known, or the weights are random."""
        return self.config.labels

    @property
    def patches(self) -> PatchSpec:
        """How its network cuts and normalises."""
        return self.config.patches

    @property
    def is_random(self) -> bool:
        """Whether its weights are random, so that what it answers means nothing."""
        return self.name is not None and is_size(self.name)

    def settings(self) -> dict[str, object]:
        """What decides its answers, ready for JSON."""
        spec = self.windows
        return {
            "model": self.name or "a network of the program",
            "weights": self._state_of_weights(),
            "outputs": list(self.outputs),
            **vars(spec.clip),
            "overlap": spec.overlap,
            "every": spec.every,
            "rule": rule_options(self.rule),
            "run_lengths": self.run_lengths,
            "dtype": self.dtype,
            "decoder": spec.decoder,
        }

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Rows of all videos in the column `video`: one row per window, in order.

        A video that cannot be read gives a row with `error`, after those of what could be read of it.

        Args:
            batch: columns of one length. `video` holds paths, bytes, file objects, torchcodec decoders, clips, uint8
                frames [T, H, W, 3], or videos of `rlt tokens` (`StoredVideo`). `source` names them in the rows; `done`
                lists numbers of windows to leave out.

        Raises:
            InvalidArgumentError: without a column `video`.
        """
        return columns_of([cut.row for cut in self.run(self.cut(batch))], self.outputs)

    def cut(self, batch: Mapping[str, Sequence[Any]]) -> Iterator[Cut]:
        """The first half of the work, for a CPU: windows and their tokens, one at a time."""
        return self.cutter.cut(batch)

    def run(self, cuts: Iterable[Cut]) -> Iterator[Cut]:
        """The second half, for a GPU: the same windows in the same order, with what the network says of them."""
        waiting: deque[Cut] = deque()
        num_tokens = 0
        for cut in cuts:
            size = 0 if cut.tokens is None else len(cut.tokens)
            if num_tokens and num_tokens + size > self.token_budget:
                yield from self._flush(waiting)
                num_tokens = 0
            waiting.append(cut)
            num_tokens += size
            if not num_tokens:  # nothing to wait for
                yield from self._flush(waiting)
        yield from self._flush(waiting)

    def _flush(self, waiting: deque[Cut]) -> Iterator[Cut]:
        found = [(cut.tokens, cut.carried) for cut in waiting if cut.tokens is not None]
        answers = iter(self._answers(*zip(*found, strict=True)) if found else [])
        while waiting:
            cut = waiting.popleft()
            if cut.tokens is not None:
                num_tokens = len(cut.tokens) - (0 if cut.carried is None else int(cut.carried.sum()))
                share_kept = num_tokens / cut.tokens.grid.num_tokens
                cut.row |= {"tokens_kept": share_kept, "num_tokens": num_tokens, **next(answers)}
            yield cut

    @property
    def network(self) -> VisionTransformer | PatchedNetwork:
        """The network, on its device and in evaluation mode; loaded when it is first asked for."""
        if self._network is None:
            assert self.name is not None  # else it was given
            self._network = load_network(self.name)
        if isinstance(self._network, PatchedNetwork):
            self._network.use(self.rule)
        if self.run_lengths is not None:
            self._network.run_lengths = self.run_lengths
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self._network.to(device if self.device == "auto" else self.device).eval()

    def _answers(self, tokens: Sequence[RunLengthTokens], carried: Sequence[Tensor | None]) -> list[Row]:
        """What the network says of windows, one row of columns for each."""
        network, packed = self.network, pack(tokens)
        device = next(network.parameters()).device
        moved = packed.to(device, non_blocking=True)
        cast = nullcontext() if self.dtype == "float32" else torch.autocast(device.type, getattr(torch, self.dtype))
        rows: list[Row] = [{} for _ in tokens]
        with cast, torch.inference_mode():
            if self.outputs != ("tokens",):
                if isinstance(network, PatchedNetwork):
                    features = network.forward_features(moved, carried)
                else:
                    features = network.forward_features(moved)
                if "classes" in self.outputs:
                    _add(rows, predicted(network.head(features).float().softmax(-1).cpu(), self.labels))
                if "embedding" in self.outputs:
                    _add(rows, [{"embedding": row} for row in features.float().cpu().numpy()])
                finite = features.isfinite().all(1).tolist()
            if "tokens" in self.outputs and isinstance(network, VisionTransformer):
                parts = network.forward_tokens(moved).float().cpu().split(packed.segments.lengths)
                _add(rows, [_of_tokens(part, its) for part, its in zip(parts, packed.unpack(), strict=True)])
                finite = [bool(part.isfinite().all()) for part in parts]
        return [row if whole else {"error": _NOT_FINITE} for row, whole in zip(rows, finite, strict=True)]


def _of_tokens(features: Tensor, tokens: RunLengthTokens) -> Row:
    return {
        "features": list(features.numpy()),
        "coords": list(tokens.coords.numpy()),
        "run_lengths": tokens.lengths.numpy(),
        "grid": list(tokens.grid),
    }


def _add(rows: Sequence[Row], more: Iterable[Row]) -> None:
    for row, columns in zip(rows, more, strict=True):
        row |= columns


def _absolute(name: str) -> str:
    """The name of a model as every process understands it, wherever it was started."""
    return str(Path(name).absolute()) if Path(name).exists() else name
