"""The only importer of ray: the two halves of an encoder as a pipeline of Ray Data, which schedules and retries."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from rlt.data.tables import make_table
from rlt.data.token_files import COLUMNS, columns_of_tokens, tokens_of_columns
from rlt.encoding.cutting import Cut, Cutter, Row
from rlt.encoding.encoder import Encoder
from rlt.encoding.rows import columns_of, kinds_of
from rlt.errors import MissingDependencyError

try:
    ray: Any = import_module("ray")
    import_module("ray.data")
except ImportError as error:
    raise MissingDependencyError(
        'engine="ray" needs ray, which cannot be imported; install with: pip install "rlt[ray]"'
    ) from error

_WINDOWS_PER_CALL = 64
_SHARE = "share_read"


def rows_by_ray(
    encoder: Encoder | Cutter,
    batch: Mapping[str, Sequence[Any]],
    *,
    address: str | None = None,
    workers: int | None = None,
) -> Iterator[tuple[Row, float]]:
    """Rows of all videos, and how much of its video was read with each, in order.

    Videos are read, decoded and cut into tokens by tasks on CPUs; actors hold the network, one GPU each where there are
    some. What a worker was at when it died is done again by another.
    """
    if not batch["video"]:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # its plans say nothing to a user
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars, context.execution_options.preserve_order
    context.enable_progress_bars, context.execution_options.preserve_order = False, True
    gpus = int(ray.cluster_resources().get("GPU", 0))
    try:
        items = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        source = ray.data.from_items(items, override_num_blocks=len(items))
        whole = isinstance(encoder, Encoder) and encoder.cutter.carry
        rows = (source if whole else source.flat_map(_cut_rows, fn_args=(encoder,), num_cpus=1)).map_batches(
            _Videos if whole else _Network,
            fn_constructor_args=(encoder,),
            batch_size=1 if whole else _WINDOWS_PER_CALL,
            batch_format="pyarrow",
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(size=workers or max(gpus, 1)),
        )
        for table in rows.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.to_pylist():
                yield row, row.pop(_SHARE)
    finally:
        context.enable_progress_bars, context.execution_options.preserve_order = before
        if started:
            ray.shutdown()


def _cut_rows(item: Mapping[str, Any], encoder: Encoder | Cutter) -> Iterator[Row]:
    """The windows of one video, their tokens as bytes."""
    torch.set_num_threads(1)
    for cut in encoder.cut({name: [value] for name, value in item.items()}):
        tokens, row = cut.tokens, {"start": None, "end": None, **cut.row, _SHARE: cut.share_read}
        if tokens is None:
            yield {**row, **dict.fromkeys(COLUMNS)}
            continue
        yield {**row, **columns_of_tokens(tokens)}


class _Network:
    """An actor: holds the network, gets windows, gives rows."""

    def __init__(self, encoder: Encoder | Cutter) -> None:
        self.encoder = encoder

    def __call__(self, table: Any) -> Any:
        return self._table(map(self._cut, table.to_pylist()))

    def _table(self, cuts: Iterable[Cut]) -> Any:
        rows = [cut.row | {_SHARE: cut.share_read} for cut in self.encoder.run(cuts)]
        kinds = {**kinds_of(self.encoder.outputs), _SHARE: "float64"}
        return make_table(columns_of(rows, self.encoder.outputs), kinds=kinds)

    def _cut(self, row: Row) -> Cut:
        share = row.pop(_SHARE)
        tokens = {name: row.pop(name) for name in COLUMNS}
        if tokens["patches"] is None:
            return Cut(row, None, share_read=share)
        return Cut(row, tokens_of_columns(tokens, self.encoder.patches), share_read=share)


class _Videos(_Network):
    """An actor that gets whole videos, for a network that goes on from window to window."""

    def __call__(self, table: Any) -> Any:
        [item] = table.to_pylist()
        return self._table(self.encoder.cut({name: [value] for name, value in item.items()}))
