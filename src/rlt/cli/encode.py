"""`rlt predict`, `rlt features` and `rlt tokens`: over files, folders, manifests and lists of videos."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlt.checks import exclusive
from rlt.cli.console import kept_after_ctrl_c, output, progress, show
from rlt.cli.options import (
    AnyModel,
    DecoderName,
    Dtype,
    FramesPerSecond,
    FrameStride,
    JsonFile,
    Options,
    Precision,
    RunLengths,
    SizeText,
    clip_of_options,
    parse_size,
    rule_options,
    with_options,
)
from rlt.errors import InvalidArgumentError
from rlt.files import refuse_inputs, write_json

if TYPE_CHECKING:
    from rlt.encoding import Cutter, Encoder, Encoding

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The folder of a run, a checkpoint, a model of transformers that rlt.patch knows (file, folder or hub "
        "id), or a size with random weights.",
        show_default=False,
    ),
]
Videos = Annotated[
    list[str],
    typer.Argument(
        metavar="VIDEO...",
        help="Videos, folders, manifests of `rlt prepare`, lists (.txt, a path a line), or addresses such as s3://...",
        show_default=False,
    ),
]
Window = Annotated[
    int | None, typer.Option(help="Frames of a window; as the model was trained if not given.", show_default=False)
]
Overlap = Annotated[int, typer.Option(help="Frames that a window shares with the one before.")]
Every = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="From the beginning of a window to that of the next.",
        show_default=False,
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        help="Windows of all videos go through the network together until they have so many tokens; what eight windows "
        "have without dropping if not given.",
        show_default=False,
    ),
]
DeviceName = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Engine = Annotated[str, typer.Option(help="local, or ray for Ray Data on this machine or a cluster.")]
Address = Annotated[
    str | None, typer.Option(help="Of a Ray cluster; without it Ray is started here.", show_default=False)
]
Workers = Annotated[
    int | None, typer.Option(help="Networks at once under Ray; one for each GPU, or one.", show_default=False)
]

Table = Annotated[Path, typer.Option("--output", help="Parquet file for the rows, one per window.", show_default=False)]


def window_options(
    window: Window = None,
    overlap: Overlap = 0,
    every: Every = None,
    stride: FrameStride = None,
    fps: FramesPerSecond = None,
    size: SizeText = None,
    decoder: DecoderName = "pyav",
) -> None:
    """How a video is cut into windows."""


def engine_options(engine: Engine = "local", address: Address = None, workers: Workers = None) -> None:
    """What runs it."""


def network_options(
    run_lengths: RunLengths = None,
    batch_tokens: Batch = None,
    device: DeviceName = "auto",
    dtype: Dtype = Precision.float32,
) -> None:
    """How a network runs."""


def _encode(encoder: Encoder | Cutter, videos: list[str], target: Path | None, title: str, engine: Options) -> Encoding:
    """Encode with progress, and show what came out."""
    from rlt.cli.show import encoding_report
    from rlt.encoding import encode_videos

    with kept_after_ctrl_c(None if target is None else f"{target}.parts"), progress(title) as update:
        result = encode_videos(encoder, videos, output=target, on_progress=update, **engine)
    output.print(encoding_report(result, encoder))
    if target is not None:
        show(f"Written: {target} ({target.stat().st_size:,} bytes)")
    return result


def _encoder(model: str, outputs: tuple[str, ...], windows: Options, asked: Options, network: Options) -> Encoder:
    from rlt.encoding import Encoder

    size, stride = windows.pop("size"), windows.pop("stride")
    dtype, token_budget = network.pop("dtype").value, network.pop("batch_tokens")
    return Encoder(
        model,
        outputs=outputs,
        frame_stride=stride,
        size=None if size is None else parse_size(size),
        dtype=dtype,
        token_budget=token_budget,
        **windows,
        **asked,
        **network,
    )


def _end(result: Encoding) -> None:
    if not result.num_rows + result.num_before:
        raise typer.Exit(2)


_OF_A_NETWORK = with_options(windows=window_options, asked=rule_options, network=network_options, engine=engine_options)


@_OF_A_NETWORK
def predict(
    *,
    model: ModelName,
    videos: Videos,
    table: Annotated[
        Path | None, typer.Option("--output", help="Parquet file for the rows, one per window.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="JSON file for the rows, one per window, and the numbers.", show_default=False),
    ] = None,
    windows: Options,
    asked: Options,
    network: Options,
    engine: Options,
) -> None:
    """Say the classes of every window of videos: rlt predict RUN FOLDER --json p.json.

    A run that was cut off goes on with the same line.
    """
    exclusive(**{"--output": table, "--json": json})
    encoder = _encoder(model, ("classes",), windows, asked, network)
    _end(_encode(encoder, videos, json or table, "Predicting", engine))


@_OF_A_NETWORK
def features(
    *,
    model: ModelName,
    videos: Videos,
    table: Table,
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Features of each kept token, with coordinates and run lengths.")
    ] = False,
    json: JsonFile = None,
    windows: Options,
    asked: Options,
    network: Options,
    engine: Options,
) -> None:
    """Write the features of every window of videos: rlt features RUN FOLDER --output f.parquet.

    A run that was cut off goes on with the same line.
    """
    _check_table(table, json, [*videos, model])
    encoder = _encoder(model, ("tokens",) if per_token else ("embedding",), windows, asked, network)
    result = _encode(encoder, videos, table, "Encoding", engine)
    if json is not None:
        write_json(json, {"settings": encoder.settings(), "output": str(table), **result.to_json()})
    _end(result)


@with_options(windows=window_options, asked=rule_options, engine=engine_options)
def tokens(
    *,
    videos: Videos,
    table: Table,
    model: AnyModel = None,
    json: JsonFile = None,
    windows: Options,
    asked: Options,
    engine: Options,
) -> None:
    """Write the kept tokens of every window of videos: rlt tokens FOLDER --output t.parquet.

    rlt train, predict and features take the file in the place of the videos. A run that was cut off goes on with the
    same line.
    """
    from rlt.encoding import Cutter, WindowSpec, labels_of
    from rlt.loading import named, stored_inputs
    from rlt.tokens import choose_rule

    _check_table(table, json, videos)
    stored = stored_inputs(named(model, None)[0])
    label_ids, class_names = labels_of(videos)
    overlap, every, decoder = (windows.pop(name) for name in ("overlap", "every", "decoder"))
    clip = clip_of_options(stored, {"frames": windows.pop("window"), **windows})
    cutter = Cutter(
        WindowSpec(clip, overlap, every, decoder),
        choose_rule(**asked, stored=stored.rule),
        stored.patches,
        class_names=class_names,
        label_ids=label_ids,
    )
    result = _encode(cutter, videos, table, "Cutting", engine)
    if json is not None:
        write_json(json, {"settings": cutter.settings(), "bytes": table.stat().st_size, **result.to_json()})
    _end(result)


def _check_table(table: Path, json: Path | None, inputs: list[str]) -> None:
    if table.suffix.lower() != ".parquet":
        raise InvalidArgumentError(f"--output is {table}; rows go into a file that ends in .parquet")
    if json is not None:
        refuse_inputs([json], [table, *inputs])
