"""The command line `rlt`. Parses, calls, shows; everything that it does can be done from Python."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from rlt.cli import encode, experiments, web
from rlt.cli.console import kept_after_ctrl_c, messages, output, progress, say, show
from rlt.cli.options import (
    AnyModel,
    Checkpoint,
    DecoderName,
    Device,
    Dtype,
    FramesPerSecond,
    FrameStride,
    JsonFile,
    Model,
    NumFrames,
    Options,
    Precision,
    RunLengths,
    Videos,
    clip_of_options,
    clip_options,
    comparing_options,
    rule_options,
    stored_of_options,
    with_options,
)
from rlt.cli.prepare import prepare_app
from rlt.cli.watch import watch
from rlt.errors import InvalidArgumentError, RltError, VideoError
from rlt.files import refuse_inputs, write_json

app = typer.Typer(
    name="rlt",
    help="Faster video transformers without looking twice: drop the patches of a video that repeat.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(prepare_app, name="prepare")
for command in (encode.predict, encode.features, encode.tokens):
    app.command()(command)
app.command("train", cls=experiments.WithOptions)(experiments.train)
app.command("evaluate", cls=experiments.WithOptions)(experiments.evaluate)
app.command("app")(web.app)
app.command("watch")(watch)
app.command("frontier", cls=experiments.WithOptions)(experiments.frontier)


class Target(str, Enum):
    """Layouts that `rlt convert` writes."""

    rlt = "rlt"
    videomae = "videomae"
    hf = "hf"


def _parse_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r}; whole numbers with commas between them (0,2,4) are needed") from None


def _show_version(asked: bool) -> None:
    if asked:
        from rlt import __version__

        show(f"rlt {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Faster video transformers without looking twice."""


@app.command()
@with_options(asked=rule_options, clip=clip_options)
def compare(
    *,
    videos: Videos,
    model: AnyModel = None,
    checkpoint: Checkpoint = None,
    asked: Options,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Keep so many patches of a clip at most, and also of 2 and 4 times as many frames of the same span of "
            "time, beside the dense clip.",
            show_default=False,
        ),
    ] = None,
    clip: Options,
    decoder: DecoderName = "pyav",
    run_lengths: RunLengths = None,
    clips: Annotated[int, typer.Option(help="Clips per video, spread evenly.")] = 1,
    repeats: Annotated[
        int | None, typer.Option(help="Counted runs. 5 for one clip, fewer for many, if not given.")
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    json: JsonFile = None,
) -> None:
    """Run the same clips dense and with run-length tokenization, and show what is saved and what changes."""
    import torch

    from rlt.checks import exclusive
    from rlt.cli import show as reports
    from rlt.compare import CompareSettings
    from rlt.compare import compare as compare_videos
    from rlt.loading import dropping_rule
    from rlt.tokens import choose_rule
    from rlt.video import list_videos

    for name in ("rule", "threshold", "keep_ratio", "max_tokens"):
        exclusive(budget=budget, **{name: asked[name]})
    stored = stored_of_options(model, checkpoint)
    if budget is not None:
        asked["max_tokens"] = budget
    settings = CompareSettings(
        model=model,
        checkpoint=checkpoint,
        rule=choose_rule(**asked, stored=dropping_rule(stored)),
        more_frames=() if budget is None else (2, 4),
        clip=clip_of_options(stored, clip),
        num_clips=clips,
        decoder=decoder,
        run_lengths=run_lengths,
        repeats=repeats,
        device=device,
        dtype=getattr(torch, dtype.value),
    )
    found = list_videos(videos)
    _refuse_inputs(json, found, model, checkpoint, asked["rule"])
    with progress("Comparing") as update:
        result = compare_videos(found, settings, on_progress=update)
    output.print(reports.comparison_report(result))
    if json is not None:
        write_json(json, result.to_json())
    _exit_if_any(result.failed, num_videos=len(result.videos) + len(result.failed))


@app.command()
@with_options(asked=rule_options, clip=clip_options)
def inspect(
    *,
    videos: Videos,
    folder: Annotated[Path, typer.Option("--output", help="Folder to write to; one inside it per video if many.")],
    asked: Options,
    model: AnyModel = None,
    clip: Options,
    decoder: DecoderName = "pyav",
    patch_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width of a patch in pixels; 16 if the model does not say otherwise.", show_default=False
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Draw what run-length tokenization drops: pictures, a video overlay, and one page that holds them all."""
    from rlt.inspection import inspect_videos
    from rlt.loading import dropping_rule
    from rlt.tokens import choose_rule
    from rlt.video import list_videos

    _refuse_inputs(json, list_videos(videos), model, asked["rule"])
    stored = stored_of_options(model, None)
    spec = clip_of_options(stored, clip)
    with progress("Inspecting") as update:
        result = inspect_videos(
            videos,
            folder,
            rule=choose_rule(**asked, stored=dropping_rule(stored)),
            num_frames=spec.num_frames,
            frame_stride=spec.frame_stride,
            fps=spec.fps,
            size=spec.size,
            decoder=decoder,
            tubelet_size=stored.tubelet_size,
            patch_size=patch_size or stored.patch_size,
            on_progress=update,
        )
    for report in result.reports:
        show(f"{report.video.source}: {report.tokens_kept:.1%} of the tokens kept, see {report.paths['index.html']}")
    if json is not None:
        write_json(json, result.to_json())
    _exit_if_any(result.failed, num_videos=result.num_videos)


@app.command()
@with_options(asked=rule_options)
def benchmark(
    *,
    suite: Annotated[
        str,
        typer.Argument(
            help="What to measure: tokenize, feed, embed, attention, forward, train-step, decode, end-to-end, frames, "
            "adapters, towers or loader."
        ),
    ],
    videos: Annotated[
        list[Path] | None,
        typer.Argument(help="Videos or folders, the bundled clips if none; for loader a manifest of `rlt prepare`."),
    ] = None,
    model: Model = "vit_base",
    clips: Annotated[int, typer.Option(help="Clips that are processed together.")] = 8,
    asked: Options,
    frames: NumFrames = 16,
    stride: FrameStride = None,
    fps: FramesPerSecond = None,
    size: Annotated[int, typer.Option(help="Height and width of the clips in pixels.")] = 224,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    rounds: Annotated[int | None, typer.Option(help="Counted runs of each arm; each suite has its own number.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Also run forward and train-step compiled.")] = False,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="Also run forward and train-step by VideoMAE of transformers.")
    ] = False,
    flash: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Implementation of flash attention that torch runs, such as FA3; torch's own if not given.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="For loader: numbers of processes that decode; 0,1,2,4,... up to the cores if not given.",
            show_default=False,
        ),
    ] = None,
    batches: Annotated[
        int | None,
        typer.Option(
            help="For loader: batches of each number of workers and round; once through the manifest if not given.",
            show_default=False,
        ),
    ] = None,
    json: JsonFile = None,
) -> None:
    """Time one stage beside its peers, in turn, on real clips."""
    import torch

    from rlt import assets
    from rlt.benchmark import BenchmarkSettings, run_suite
    from rlt.cli import show as reports
    from rlt.tokens import choose_rule
    from rlt.video import ClipSpec, list_videos

    chosen = list_videos(videos) if videos else [assets.path(name) for name in assets.names()]
    _refuse_inputs(json, chosen, asked["rule"])
    settings = BenchmarkSettings(
        model=model,
        videos=tuple(chosen),
        clips=clips,
        rule=choose_rule(**asked),
        clip=ClipSpec(frames, stride, fps, size),
        rounds=rounds,
        device=device,
        dtype=getattr(torch, dtype.value),
        compiled=compiled,
        transformers=transformers,
        flash=flash,
        workers=None if workers is None else _parse_numbers(workers),
        batches=batches,
    )
    with progress("Measuring") as update:
        result = run_suite(suite, settings, on_progress=update)
    output.print(reports.benchmark_report(result))
    if json is not None:
        write_json(json, result.to_json())


@app.command()
@with_options(asked=comparing_options, clip=clip_options)
def calibrate(
    *,
    data: Annotated[
        list[Path], typer.Argument(help="A manifest of `rlt prepare`, or videos and folders.", show_default=False)
    ],
    rule_file: Annotated[
        Path,
        typer.Option("--output", help="File to write the rule to, such as rule.json, for --rule and tokenizer.rule."),
    ],
    target_keep: Annotated[
        float | None, typer.Option(help="Share of the tokens that shall be kept, above 0 and up to 1; or")
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(help="share of the clips at most whose top-1 class may differ from the dense network's."),
    ] = None,
    checkpoint: Checkpoint = None,
    model: AnyModel = None,
    run_lengths: RunLengths = None,
    asked: Options,
    clip: Options,
    decoder: DecoderName = "pyav",
    clips: Annotated[int, typer.Option(help="Clips per video, spread evenly.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = Precision.float32,
    json: JsonFile = None,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder for the curve of what is kept against the threshold.")
    ] = None,
) -> None:
    """Find the threshold for a data set: by the share of tokens that it keeps, or by how often the answer changes."""
    from rlt import calibrate as jobs
    from rlt.checks import exclusive
    from rlt.cli import show as reports
    from rlt.loading import is_size, load_model, named
    from rlt.plots import require_viz
    from rlt.tokens import Threshold
    from rlt.tokens.rule_files import check_rule_file

    exclusive(**{"target-keep": target_keep, "max-disagreement": max_disagreement})
    check_rule_file(rule_file)
    if pictures is not None:
        require_viz()
    stored, (name, model_size) = stored_of_options(model, checkpoint), named(model, checkpoint)
    if max_disagreement is not None and is_size(name):  # random weights have no answer to keep
        raise InvalidArgumentError("--max-disagreement needs the network whose answers shall stay; add --checkpoint")
    settings = jobs.CalibrateSettings(
        rule=Threshold(**{name: value for name, value in asked.items() if value is not None}),
        clip=clip_of_options(stored, clip),
        num_clips=clips,
        decoder=decoder,
        spec=stored.patches,
    )
    cache = None if max_disagreement is None else f"{rule_file}.cache"
    with progress("Calibrating") as update, kept_after_ctrl_c(cache):
        if max_disagreement is not None:
            result = jobs.calibrate_agreement(
                data,
                max_disagreement,
                load_model(name, size=model_size, run_lengths=run_lengths),
                settings,
                device=device,
                dtype=dtype.value,
                checkpoint=name,
                cache=cache,
                on_progress=update,
            )
        elif target_keep is not None:
            exclusive(**{"target-keep": target_keep, "run-lengths": run_lengths})
            result = jobs.calibrate_tokens(data, target_keep, settings, on_progress=update)
        else:
            raise InvalidArgumentError("neither --target-keep nor --max-disagreement is given; give one of them")
    result.write_rule(rule_file)
    output.print(reports.calibration_report(result))
    show(f"Written: {rule_file}, for --rule {rule_file} and tokenizer.rule={rule_file}")
    if json is not None:
        write_json(json, result.to_json())
    if pictures is not None:
        jobs.write_calibration_plot(result, pictures / "calibration.png")


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint in any supported layout: file, folder, folder of a run or hub id.")
    ],
    destination: Annotated[Path, typer.Argument(help="What to write: a folder, or a .pth file with --to videomae.")],
    to: Annotated[Target, typer.Option(help="Layout to write.")] = Target.rlt,
    num_heads: Annotated[
        int | None, typer.Option(help="Attention heads, where neither checkpoint nor its size tells.")
    ] = None,
    new_head: Annotated[
        bool, typer.Option(help="Take a fresh random head, as for a checkpoint from pretraining.")
    ] = False,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="JSON of `rlt evaluate` for the table of the model's card (README.md); once for dense, once for RLT.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Convert VideoMAE, VideoMAEv2, original RLT and Hugging Face checkpoints to ours, or ours back to theirs."""
    from rlt.checkpoints import convert as convert_checkpoint

    with messages.status(f"Converting {source}"):
        report = convert_checkpoint(
            source,
            destination,
            to=to.value,
            num_heads=num_heads,
            new_head=new_head,
            evaluations=evaluation or (),
        )
    show(f"{report}\nWritten: {destination}")


@app.command()
def models() -> None:
    """List the models and the attention back ends."""
    from rlt.cli import show as reports

    output.print(reports.models_report())


def _refuse_inputs(output: Path | None, videos: Sequence[Path], *others: str | None) -> None:
    """Hold that a file of results does not take the place of what the command reads."""
    if output is not None:
        refuse_inputs([output], [*videos, *(other for other in others if other is not None)])


def _exit_if_any(failed: Sequence[tuple[str, str]], *, num_videos: int) -> None:
    if failed and num_videos == 1:  # pictures of what is left of a file that is cut off
        raise VideoError(failed[0][1])
    if failed:
        say("\n".join([f"Bad videos: {len(failed)}", *(f"  {error}" for _, error in failed)]), "red")
        raise typer.Exit(2)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """One line, where Python shows two with a place in the source."""
    say(f"warning: {message}", "yellow")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit code 0, 2 for anything that the user can mend, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    warnings.showwarning = _show_warning
    try:
        app([argument for argument in given if argument != "--debug"])  # exits by itself otherwise
    except RltError as error:
        if debug:
            raise
        say(f"error: {error}", "red")
        sys.exit(2)
