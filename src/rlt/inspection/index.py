"""Several inspections side by side: how much each video saves, mean and spread, a threshold for all, one page."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlt.files import replacing_all, write_json
from rlt.inspection.page import document, duration
from rlt.inspection.report import INDEX_FILES, MAKER, PAGE, REPORT, InspectReport
from rlt.inspection.scan import bend_of_curve
from rlt.tokens import rule_line


@dataclass(frozen=True)
class Inspections:
    """What became of several videos."""

    reports: tuple[InspectReport, ...]
    """Of those that could be inspected, in order."""
    failed: tuple[tuple[str, str], ...]
    """(source, what is wrong with it) of those that could not, or are cut off."""

    @property
    def num_videos(self) -> int:
        """Videos in all."""
        return len({report.video.source for report in self.reports} | {source for source, _ in self.failed})

    @property
    def by_savings(self) -> tuple[InspectReport, ...]:
        """The reports, those first that keep the smallest share of their tokens."""
        return tuple(sorted(self.reports, key=lambda report: report.tokens_kept))

    @property
    def mean_tokens_kept(self) -> float:
        """Mean over the videos of the share of tokens that each keeps, above 0 and up to 1."""
        return statistics.fmean(report.tokens_kept for report in self.reports)

    @property
    def deviation_tokens_kept(self) -> float:
        """Standard deviation of that share over the videos; 0 for one video."""
        shares = [report.tokens_kept for report in self.reports]
        return statistics.stdev(shares) if len(shares) > 1 else 0.0

    @property
    def threshold_curve(self) -> tuple[tuple[float, float], ...]:
        """(threshold, mean over the videos of the share of tokens kept) in ascending order of the threshold."""
        thresholds = self.reports[0].scan.thresholds
        shares = zip(*(report.scan.curve for report in self.reports), strict=True)
        return tuple(zip(thresholds, map(statistics.fmean, shares), strict=True))

    @property
    def suggested_threshold(self) -> float | None:
        """Where the mean curve bends, see `bend_of_curve`; None if it does not."""
        return bend_of_curve(*zip(*self.threshold_curve, strict=True))

    def summary(self) -> dict[str, Any]:
        """All videos in a few numbers, as plain values; shares are 0 to 1."""
        shares = [report.tokens_kept for report in self.by_savings]
        return {
            "num_videos": len(shares),
            "mean_tokens_kept": self.mean_tokens_kept,
            "deviation_tokens_kept": self.deviation_tokens_kept,
            "least_tokens_kept": shares[0],
            "most_tokens_kept": shares[-1],
            "suggested_threshold": self.suggested_threshold,
        }

    def to_json(self) -> dict[str, Any]:
        """The reports, what they say together, and what failed, as plain values."""
        failed = [{"source": source, "error": error} for source, error in self.failed]
        return {
            **({"summary": self.summary()} if self.reports else {}),
            "videos": [report.to_json() for report in self.reports],
            "failed": failed,
        }


def write_index(inspections: Inspections, folder: Path) -> None:
    """Write index.html with a link per video, and report.json with what stands on it, both or neither.

    Args:
        inspections: of at least one video, each in a folder below `folder`.
        folder: exists already.
    """
    videos = [
        {
            "source": report.video.source,
            "tokens_kept": report.tokens_kept,
            "page": report.paths[PAGE].relative_to(folder).as_posix(),
        }
        for report in inspections.by_savings
    ]
    failed = inspections.to_json()["failed"]
    with replacing_all(folder, INDEX_FILES) as staging:
        content = {"made_by": MAKER, "summary": inspections.summary(), "videos": videos, "failed": failed}
        write_json(staging / REPORT, content)
        (staging / PAGE).write_text(_page(inspections, folder), encoding="utf-8")


def _page(inspections: Inspections, folder: Path) -> str:
    count = len(inspections.reports)
    title = f"{count} video{'' if count == 1 else 's'}"
    footer = "Made by <code>rlt inspect</code>. The numbers on this page are in <code>report.json</code>."
    return document(title, f"{_summary(inspections, title)}\n{_table(inspections, folder)}", footer)


def _summary(inspections: Inspections, title: str) -> str:
    numbers, rule = inspections.summary(), escape(rule_line(inspections.reports[0].settings.rule))
    mean, least, most = (numbers[f"{name}_tokens_kept"] for name in ("mean", "least", "most"))
    threshold = numbers["suggested_threshold"]
    advice = (
        "The curve of the threshold has no bend, so that none is suggested."
        if threshold is None
        else f"Suggested threshold: <strong>{threshold:g}</strong>, which keeps "
        f"{dict(inspections.threshold_curve)[threshold]:.1%} on average where each patch is compared with the one "
        "before it. There the curve bends: a lower one keeps much more, a higher one little less."
    )
    return f"""<h1>{title}</h1>
<p class="quiet">What run-length tokenization keeps of them with {rule}, those first that save most.</p>
<div class="headline"><strong>{mean:.1%}</strong> <span>of a video's tokens are kept on average, from {least:.1%} to
{most:.1%}; the standard deviation is {numbers["deviation_tokens_kept"]:.1%}.</span></div>
<div class="bar" role="img" aria-label="{mean:.1%} of the tokens are kept"><div style="width:{mean:.2%}"></div></div>
<p style="margin-top:1rem">{advice} What a network answers at a threshold, <code>rlt calibrate</code> and
<code>rlt frontier</code> tell.</p>"""


def _table(inspections: Inspections, folder: Path) -> str:
    rows = "\n".join(_row(report, folder) for report in inspections.by_savings)
    failed = "\n".join(f"<li>{escape(error)}</li>" for _, error in inspections.failed)
    bad = f"<h2>Bad videos</h2>\n<ul>\n{failed}\n</ul>" if failed else ""
    return f"""<div class="wide"><table>
<thead><tr><th scope="col">Video</th><th scope="col">Tokens kept</th><th scope="col">Bend of its curve</th>
<th scope="col">Clips</th><th scope="col">Length</th></tr></thead>
<tbody>
{rows}
</tbody>
</table></div>
{bad}"""


def _row(report: InspectReport, folder: Path) -> str:
    page = report.paths[PAGE].relative_to(folder)
    bend = "none" if report.suggested_threshold is None else f"{report.suggested_threshold:g}"
    kept = report.tokens_kept
    return (
        f'<tr><td><a href="{quote(page.as_posix())}">{escape(str(page.parent))}</a></td>'
        f'<td><div class="bar" aria-hidden="true"><div style="width:{kept:.2%}"></div></div>{kept:.1%}</td>'
        f"<td>{bend}</td><td>{len(report.clips):,}</td><td>{duration(report.video.duration)}</td></tr>"
    )
