"""`rlt predict`, `rlt features` and `rlt tokens`: over files, folders, manifests and lists of videos."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlt.checks import exclusive
from rlt.cli.console import kept_after_ctrl_c, output, progress, show
from rlt.cli.options import (
    AnyModel,
    DecoderName,
    Dtype,
    Exposure,
    FramesPerSecond,
    FrameStride,
    KeepRatio,
    MaxTokens,
    Motion,
    Precision,
    Reference,
    RuleName,
    RunLengths,
    SizeText,
    Threshold,
    clip_of_options,
    parse_size,
    rule_of_options,
    stored_of_options,
)
from rlt.errors import InvalidArgumentError
from rlt.files import refuse_inputs, write_json

if TYPE_CHECKING:
    from rlt.encoding import Encoder, Encoding

    Run = partial[tuple[Encoder, Encoding]]
else:
    Encoder = Encoding = Run = Any  # typer evaluates the annotations

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="The folder of a run, a checkpoint (file, folder or hub id), or a size with random weights.",
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


def _run(
    outputs: tuple[str, ...],
    target: Path | None,
    title: str,
    model: ModelName,
    videos: Videos,
    window: Window = None,
    overlap: Overlap = 0,
    every: Every = None,
    stride: FrameStride = None,
    fps: FramesPerSecond = None,
    size: SizeText = None,
    threshold: Threshold = None,
    keep_ratio: KeepRatio = None,
    max_tokens: MaxTokens = None,
    reference: Reference = None,
    exposure: Exposure = None,
    motion: Motion = None,
    rule: RuleName = None,
    run_lengths: RunLengths = None,
    batch_tokens: Batch = None,
    decoder: DecoderName = "pyav",
    device: DeviceName = "auto",
    dtype: Dtype = Precision.float32,
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = None,
) -> tuple[Encoder, Encoding]:
    """Encode videos; all parameters but the first three are the options of both commands."""
    from rlt.cli.show import encoding_report
    from rlt.encoding import Encoder, encode_videos

    encoder = Encoder(
        model,
        outputs=outputs,
        window=window,
        overlap=overlap,
        every=every,
        frame_stride=stride,
        fps=fps,
        size=None if size is None else parse_size(size),
        rule=rule,
        threshold=threshold,
        keep_ratio=keep_ratio,
        max_tokens=max_tokens,
        reference=reference,
        exposure=exposure,
        motion=motion,
        run_lengths=run_lengths,
        device=device,
        dtype=dtype.value,
        token_budget=batch_tokens,
        decoder=decoder,
    )
    cluster = {"engine": engine, "address": address, "workers": workers}
    with kept_after_ctrl_c(None if target is None else f"{target}.parts"), progress(title) as update:
        result = encode_videos(encoder, videos, output=target, on_progress=update, **cluster)  # type: ignore[arg-type]
    output.print(encoding_report(result, encoder))
    if target is not None:
        show(f"Written: {target}")
    return encoder, result


def predict(
    run: Run,
    table: Annotated[
        Path | None, typer.Option("--output", help="Parquet file for the rows, one per window.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="JSON file for the rows, one per window, and the numbers.", show_default=False),
    ] = None,
) -> Encoding:
    """Say the classes of every window of videos: rlt predict RUN FOLDER --json p.json.

    A run that was cut off goes on with the same line.
    """
    exclusive(**{"--output": table, "--json": json})
    return run(("classes",), json or table, "Predicting")[1]


def features(
    run: Run,
    table: Annotated[
        Path, typer.Option("--output", help="Parquet file for the rows, one per window.", show_default=False)
    ],
    per_token: Annotated[
        bool, typer.Option("--per-token", help="Features of each kept token, with coordinates and run lengths.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers of the run to this file.", show_default=False)
    ] = None,
) -> Encoding:
    """Write the features of every window of videos: rlt features RUN FOLDER --output f.parquet.

    A run that was cut off goes on with the same line.
    """
    if table.suffix.lower() != ".parquet":
        raise InvalidArgumentError(f"--output is {table}; features go into a file that ends in .parquet")
    if json is not None:
        refuse_inputs([json], [table, *run.keywords["videos"], run.keywords["model"]])
    encoder, result = run(("tokens",) if per_token else ("embedding",), table, "Encoding")
    if json is not None:
        write_json(json, {"settings": encoder.settings(), "output": str(table), **result.to_json()})
    return result


def tokens(
    videos: Videos,
    table: Annotated[
        Path, typer.Option("--output", help="Parquet file for the rows, one per window.", show_default=False)
    ],
    model: AnyModel = None,
    window: Window = None,
    overlap: Overlap = 0,
    every: Every = None,
    stride: FrameStride = None,
    fps: FramesPerSecond = None,
    size: SizeText = None,
    threshold: Threshold = None,
    keep_ratio: KeepRatio = None,
    max_tokens: MaxTokens = None,
    reference: Reference = None,
    exposure: Exposure = None,
    motion: Motion = None,
    rule: RuleName = None,
    decoder: DecoderName = "pyav",
    engine: Engine = "local",
    address: Address = None,
    workers: Workers = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Also write the numbers of the run to this file.", show_default=False)
    ] = None,
) -> None:
    """Write the kept tokens of every window of videos: rlt tokens FOLDER --output t.parquet.

    rlt train, predict and features take the file in the place of the videos. A run that was cut off goes on with the
    same line.
    """
    from rlt.cli.show import encoding_report
    from rlt.encoding import Cutter, WindowSpec, encode_videos, labels_of

    if table.suffix.lower() != ".parquet":
        raise InvalidArgumentError(f"--output is {table}; tokens go into a file that ends in .parquet")
    if json is not None:
        refuse_inputs([json], [table, *videos])
    stored = stored_of_options(model, None)
    label_ids, class_names = labels_of(videos)
    cutter = Cutter(
        WindowSpec(clip_of_options(stored, window, stride, fps, size), overlap, every, decoder),
        rule_of_options(rule, threshold, keep_ratio, max_tokens, reference, exposure, motion, stored.rule),
        stored.patches,
        class_names=class_names,
        label_ids=label_ids,
    )
    cluster = {"engine": engine, "address": address, "workers": workers}
    with kept_after_ctrl_c(f"{table}.parts"), progress("Cutting") as update:
        result = encode_videos(cutter, videos, output=table, on_progress=update, **cluster)  # type: ignore[arg-type]
    output.print(encoding_report(result, cutter))
    num_bytes = table.stat().st_size
    show(f"Written: {table} ({num_bytes:,} bytes)")
    if json is not None:
        write_json(json, {"settings": cutter.settings(), "bytes": num_bytes, **result.to_json()})
    if not result.num_rows + result.num_before:
        raise typer.Exit(2)


def add_commands(app: typer.Typer) -> None:
    """Add the commands; options of the first two are their own and those of `_run`."""
    app.command("tokens")(tokens)
    for command in (predict, features):
        app.command(command.__name__, help=inspect.getdoc(command))(_with_options_of_run(command))


def _with_options_of_run(command: Callable[..., Encoding]) -> Callable[..., None]:
    own, shared = (dict(inspect.signature(function, eval_str=True).parameters) for function in (command, _run))
    for name in ("outputs", "target", "title"):
        del shared[name]
    del own["run"]
    parameters = sorted((shared | own).values(), key=lambda parameter: parameter.default is not parameter.empty)

    def called(**options: Any) -> None:
        mine = {name: options.pop(name) for name in own}
        result = command(partial(_run, **options), **mine)
        if not result.num_rows + result.num_before:
            raise typer.Exit(2)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which typer reads
    return called
