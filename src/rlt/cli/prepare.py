"""`rlt prepare`: from the files of a data set to a manifest."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlt.checks import exclusive, some
from rlt.cli.console import progress, show
from rlt.errors import InvalidArgumentError
from rlt.files import refuse_inputs, write_json

if TYPE_CHECKING:
    from rlt.data.listings import Listing
    from rlt.data.prepare import PrepareReport
else:
    Listing = Any  # typer evaluates the annotations

prepare_app = typer.Typer(
    help="Look into the videos of a data set and write a manifest, which `rlt train` and `rlt evaluate` read.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_NAMES_SHOWN = 5

ClassNames = tuple[str, ...] | None
Videos = Annotated[Path, typer.Option(help="Folder of the videos, searched with all its subfolders.")]


def _run(
    list_videos: Callable[..., Listing],
    output: Annotated[
        Path, typer.Option(help="Manifest to write, .parquet or .csv. Its .partial is what resumes a run.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(
            help="Class names in the order of label ids: one a line, a JSON map from name to id, or the manifest of "
            "another split."
        ),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads; the number of cores without it.")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many videos only, for a trial.")] = None,
    measure_tokens: Annotated[
        bool,
        typer.Option(
            "--measure-tokens",
            help="Also decode a clip of each video and store the share of tokens kept at threshold 0.1; what is stored "
            "stays without it.",
        ),
    ] = False,
    other_split: Annotated[
        Path | None, typer.Option(help="Manifest of another split, to look for videos that stand in both.")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Write two manifests, OUTPUT with _train and _val in its name, and this share of each class into the "
            "second one; clips of one recording stay together where names tell (_g07_ of UCF-101, ID_000010_000020).",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of that split; 0 if not given.", show_default=False)] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A video that cannot be used is an error (exit code 2, after writing).")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Prepare what `list_videos` lists by the class names; the other parameters are the options of all commands."""
    from rlt.data.labels import read_class_names
    from rlt.data.prepare import prepare, prepare_split
    from rlt.data.splitting import split_listing

    exclusive(**{"val-fraction": val_fraction, "other-split": other_split})
    if val_fraction is None and seed is not None:
        raise InvalidArgumentError(f"seed is {seed}, which is of a split; add --val-fraction, or leave it out")
    listing = list_videos(names=None if labels is None else read_class_names(labels))
    if json is not None:
        others = (Path(listing.source), other_split, labels, *(Path(video) for video, _ in listing.videos))
        refuse_inputs([json], (other for other in others if other is not None))
    split = None if val_fraction is None else split_listing(listing, val_fraction, seed or 0, limit=limit)
    with progress("Looking into videos") as update:
        how: dict[str, Any] = {"workers": workers, "measure_tokens": measure_tokens, "on_progress": update}
        if split is None:
            reports = [prepare(listing, output, limit=limit, other_split=other_split, **how)]
        else:
            reports = prepare_split(split, output, **how)
    if split is not None:
        groups = f"{split.num_groups} groups that names tell" if split.num_groups else "file: no name tells of a group"
        show(f"Split by {groups}")
    for report in reports:
        for line in report_lines(report):
            show(line)
    if json is not None:
        found = [report.to_json() for report in reports]
        write_json(json, found[0] if split is None else dict(zip(("train", "val"), found, strict=True)))
    for report in reports:
        _refuse_unusable(report, strict=strict)


def _refuse_unusable(report: PrepareReport, *, strict: bool) -> None:
    """Hold that there are videos that can be used or, if `strict`, that all of them can be."""
    unusable = report.num_videos - report.num_usable
    if not report.num_usable:
        raise InvalidArgumentError(f"{report.output}: no video can be used; its column status says why")
    if strict and unusable:
        raise InvalidArgumentError(
            f"{report.output}: {unusable} of {report.num_videos} videos cannot be used; its column status says why, "
            "mend them or leave --strict out"
        )


def _add_command(name: str, list_videos: Callable[..., Listing], description: str) -> None:
    """Add a command that prepares what `list_videos` lists; its parameters come before those of `_run`."""
    own, shared = (dict(inspect.signature(function, eval_str=True).parameters) for function in (list_videos, _run))
    del own["names"], shared["list_videos"]
    parameters = sorted((own | shared).values(), key=lambda parameter: parameter.default is not parameter.empty)

    def command(**options: Any) -> None:
        _run(partial(list_videos, **{option: options.pop(option) for option in own}), **options)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # which typer reads
    prepare_app.command(name, help=description)(command)


def _folder(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder with one folder of videos per class, or a list file with a path and a label per line.",
            show_default=False,
        ),
    ],
    videos: Annotated[
        Path | None, typer.Option(help="Where the paths of a list file start; its folder without it.")
    ] = None,
    *,
    names: ClassNames,
) -> Listing:
    from rlt.data.listings import folder_listing

    return folder_listing(source, videos=videos, names=names)


def _kinetics(
    dataset: str,
    videos: Videos,
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Official CSV (label, youtube_id, time_start, time_end, split), or a list of paths and labels. "
            "Without it the videos lie in class folders."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Value of the CSV's column split to take; needed if it holds several.")
    ] = None,
    *,
    names: ClassNames,
) -> Listing:
    from rlt.data.sources import kinetics_listing

    return kinetics_listing(dataset, videos, csv_file=csv, names=names, split=split)


def _ssv2(
    annotations: Annotated[Path, typer.Option(help="Official JSON of a split, or a list of paths and labels.")],
    videos: Videos,
    *,
    names: ClassNames,
) -> Listing:
    from rlt.data.sources import ssv2_listing

    return ssv2_listing(annotations, videos, names=names)


_add_command(
    "folder", _folder, "Any videos in class folders (SOURCE/<class>/**/video.mp4), or a list of paths and labels."
)
for _dataset in ("kinetics400", "kinetics600", "kinetics700"):
    _order = "the published order" if _dataset == "kinetics400" else "sorted order"
    _add_command(
        _dataset,
        partial(_kinetics, _dataset),
        f"Kinetics-{_dataset.removeprefix('kinetics')}; label ids follow {_order} without --labels.",
    )
_add_command("ssv2", _ssv2, "Something-Something v2; label ids follow the published map without --labels.")


def report_lines(report: PrepareReport) -> list[str]:
    """What the command prints: the counts, and the first few names of everything that deserves a look."""
    from rlt.data.prepare import MIN_FRAMES

    manifest, empty = report.manifest, report.empty_classes
    lines = [
        f"{report.output}: {report.num_videos} videos of {report.num_classes} classes ({some(manifest.class_names)}), "
        f"{report.num_usable} can be used"
    ]
    if 2 * len(empty) > report.num_classes:  # a part of a large data set
        lines.append(f"Classes with a video that can be used: {report.num_classes - len(empty)}")
        empty = []
    same_name = [str(pair) for pair in report.between_splits if pair.reason == "same name"]
    same = [str(pair) for pair in report.between_splits if pair.reason != "same name"]
    if report.tokens_kept is not None:
        lines.append(f"Tokens kept at threshold 0.1, mean of the clips in the middle: {report.tokens_kept:.1%}")
    if report.num_resumed:
        lines.append(f"Taken from the run before: {report.num_resumed}, looked at now: {report.num_probed}")
    found = {
        "Missing videos": report.missing,
        "Videos that cannot be used": [f"{path}: {status}" for path, status in report.unreadable],
        f"Videos under {MIN_FRAMES} frames": report.short,
        "Classes without a video that can be used": empty,
        "Videos that stand in it twice": [str(pair) for pair in report.duplicates],
        f"Videos that stand in {report.other_split} too": same,
        f"Same names, other content in {report.other_split} (no harm if files are numbered)": same_name,
    }
    for title, names in found.items():
        if names:
            lines += [f"{title}: {len(names)}", *(f"  {name}" for name in names[:_NAMES_SHOWN])]
        if len(names) > _NAMES_SHOWN:
            lines.append(f"  and {len(names) - _NAMES_SHOWN} more")
    if report.class_names_differ:
        lines.append(f"Label ids do not agree with {report.other_split}: prepare one with --labels of the other")
    return lines
