"""`rlt prepare`: from the files of a data set to a manifest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from rlt.cli.common import output, progress
from rlt.data.labels import read_class_names
from rlt.data.listings import Listing, folder_listing
from rlt.data.prepare import MIN_FRAMES, Duplicate, PrepareReport, prepare
from rlt.data.sources import KINETICS, kinetics_listing, ssv2_listing
from rlt.errors import InvalidArgumentError
from rlt.files import write_json

prepare_app = typer.Typer(
    help="Look into the videos of a data set and write a manifest, which `rlt train` and `rlt evaluate` read.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_NAMES_SHOWN = 5

Output = Annotated[
    Path, typer.Option("--output", help="Manifest to write, .parquet or .csv. Its .partial is what resumes a run.")
]
Videos = Annotated[Path, typer.Option("--videos", help="Folder of the videos, searched with all its subfolders.")]
Labels = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="Class names in the order of label ids: one a line, a JSON map from name to id, or the manifest of "
        "another split.",
    ),
]
Workers = Annotated[int | None, typer.Option(help="Threads; the number of cores without it.")]
Limit = Annotated[int | None, typer.Option(help="Take the first so many videos only, for a trial.")]
MeasureTokens = Annotated[
    bool,
    typer.Option(
        "--measure-tokens", help="Also decode a clip of each video and store the share of tokens kept at threshold 0.1."
    ),
]
OtherSplit = Annotated[
    Path | None, typer.Option(help="Manifest of another split, to look for videos that stand in both.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the report to this file.")]


@dataclass(frozen=True)
class _Settings:
    """The options that all commands share."""

    output: Path
    workers: int | None
    limit: int | None
    measure_tokens: bool
    other_split: Path | None
    json: Path | None


@prepare_app.command()
def folder(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with one folder of videos per class, or a list file with a path and a label per line.",
            show_default=False,
        ),
    ],
    manifest: Output,
    videos: Annotated[
        Path | None, typer.Option("--videos", help="Where the paths of a list file start; its folder without it.")
    ] = None,
    labels: Labels = None,
    workers: Workers = None,
    limit: Limit = None,
    measure_tokens: MeasureTokens = False,
    other_split: OtherSplit = None,
    json: JsonFile = None,
) -> None:
    """Any videos in class folders (SOURCE/<class>/**/video.mp4), or a list of paths and labels."""
    settings = _Settings(manifest, workers, limit, measure_tokens, other_split, json)
    _run(folder_listing(source, videos=videos, names=_names(labels)), settings)


def _kinetics_command(dataset: str) -> Callable[..., None]:
    def kinetics(
        videos: Videos,
        manifest: Output,
        csv: Annotated[
            Path | None,
            typer.Option(
                "--csv",
                help="Official CSV (label, youtube_id, time_start, time_end, split), or a list of paths and labels. "
                "Without it the videos lie in class folders.",
            ),
        ] = None,
        split: Annotated[
            str | None, typer.Option(help="Value of the CSV's column split to take; needed if it holds several.")
        ] = None,
        labels: Labels = None,
        workers: Workers = None,
        limit: Limit = None,
        measure_tokens: MeasureTokens = False,
        other_split: OtherSplit = None,
        json: JsonFile = None,
    ) -> None:
        settings = _Settings(manifest, workers, limit, measure_tokens, other_split, json)
        _run(kinetics_listing(dataset, videos, csv_file=csv, names=_names(labels), split=split), settings)

    return kinetics


for _dataset in KINETICS:
    _order = "the published order" if _dataset == "kinetics400" else "sorted order"
    prepare_app.command(
        _dataset, help=f"Kinetics-{_dataset.removeprefix('kinetics')}; label ids follow {_order} without --labels."
    )(_kinetics_command(_dataset))


@prepare_app.command()
def ssv2(
    annotations: Annotated[
        Path, typer.Option("--annotations", help="Official JSON of a split, or a list of paths and labels.")
    ],
    videos: Videos,
    manifest: Output,
    labels: Labels = None,
    workers: Workers = None,
    limit: Limit = None,
    measure_tokens: MeasureTokens = False,
    other_split: OtherSplit = None,
    json: JsonFile = None,
) -> None:
    """Something-Something v2; label ids follow the published map without --labels."""
    settings = _Settings(manifest, workers, limit, measure_tokens, other_split, json)
    _run(ssv2_listing(annotations, videos, names=_names(labels)), settings)


def _names(labels: Path | None) -> tuple[str, ...] | None:
    return None if labels is None else read_class_names(labels)


def _run(listing: Listing, settings: _Settings) -> None:
    with progress("Looking into videos") as update:
        report = prepare(
            listing,
            settings.output,
            workers=settings.workers,
            limit=settings.limit,
            measure_tokens=settings.measure_tokens,
            other_split=settings.other_split,
            on_progress=update,
        )
    for line in report_lines(report):
        output.print(line, markup=False, highlight=False, soft_wrap=True)
    if settings.json is not None:
        write_json(settings.json, report.to_json())
    if not report.num_usable:
        raise InvalidArgumentError(f"{settings.output}: no video can be used; its column status says why")


def report_lines(report: PrepareReport) -> list[str]:
    """What the command prints: the counts, and the first few names of everything that deserves a look."""
    lines = [
        f"{report.output}: {report.num_videos} videos of {report.num_classes} classes, {report.num_usable} can be used"
    ]
    if report.tokens_kept is not None:
        lines.append(f"Tokens kept at threshold 0.1, mean of the clips in the middle: {report.tokens_kept:.1%}")
    if report.num_resumed:
        lines.append(f"Taken from the run before: {report.num_resumed}, looked at now: {report.num_probed}")
    lines += _some("Missing videos", report.missing)
    lines += _some("Videos that cannot be used", [f"{path}: {status}" for path, status in report.unreadable])
    lines += _some(f"Videos under {MIN_FRAMES} frames", report.short)
    lines += _some("Classes without a video that can be used", report.empty_classes)
    lines += _duplicates("Videos that stand in it twice", report.duplicates)
    same = [duplicate for duplicate in report.between_splits if duplicate.reason != "same name"]
    lines += _duplicates(f"Videos that stand in {report.other_split} too", same)
    names = [duplicate for duplicate in report.between_splits if duplicate.reason == "same name"]
    lines += _duplicates(f"Same names, other content in {report.other_split} (no harm if files are numbered)", names)
    if report.class_names_differ:
        lines.append(f"Label ids do not agree with {report.other_split}: prepare one with --labels of the other")
    return lines


def _duplicates(title: str, duplicates: Sequence[Duplicate]) -> list[str]:
    return _some(title, [f"{found.path} = {found.other} ({found.reason})" for found in duplicates])


def _some(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = [f"  and {len(names) - _NAMES_SHOWN} more"] if len(names) > _NAMES_SHOWN else []
    return [f"{title}: {len(names)}", *(f"  {name}" for name in names[:_NAMES_SHOWN]), *more]
