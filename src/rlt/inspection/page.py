"""One HTML page that holds everything: pictures and video inside, a threshold to move, no other file."""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from rlt.inspection.charts import GREY_LEVELS_PER_UNIT
from rlt.inspection.report import AGAINST_THRESHOLD, CONTACT_SHEET, OVER_TIME, OVERLAY, RUN_LENGTHS, InspectReport
from rlt.inspection.scan import ScanResult
from rlt.inspection.views import ClipSettings
from rlt.tokens import rule_line
from rlt.tokens.rules import PAPER_THRESHOLD
from rlt.video import VideoInfo
from rlt.video.geometry import cut_away

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --quiet: #59636e; --ground: #ffffff; --card: #f6f8fa; --line: #d8dee4;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --quiet: #9aa4af; --ground: #14181d; --card: #1d232a;
  --line: #353d47; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .35rem; }
p { margin: .35rem 0 .9rem; max-width: 46rem; }
.quiet { color: var(--quiet); }
.headline { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; align-items: baseline; margin: 1.5rem 0 .5rem; }
.headline strong { font-size: 2.9rem; line-height: 1.1; color: var(--accent); font-variant-numeric: tabular-nums; }
.bar { height: .6rem; border-radius: .3rem; background: var(--line); overflow: hidden; }
.bar div { height: 100%; background: var(--accent); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: .9rem 1.5rem; margin: 1.5rem 0 0;
  padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
dt { color: var(--quiet); font-size: .85rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 0; }
img, video { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .5rem; }
img { width: 100%; background: #fff; }
video { width: 28rem; background: #000; }
.slider { margin: 1rem 0 1.25rem; padding: 1.1rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; }
.slider label { font-weight: 600; }
.slider input { display: block; width: 100%; margin: .6rem 0; accent-color: var(--accent); }
.slider output { font-variant-numeric: tabular-nums; display: block; margin-bottom: .5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .45rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 500; font-size: .85rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
td .bar { width: 7rem; display: inline-block; margin-right: .6rem; }
a { color: var(--accent); }
footer { margin-top: 3rem; color: var(--quiet); font-size: .85rem; }
"""


def write_page(report: InspectReport, folder: Path, path: Path) -> None:
    """Write the page from the report and the pictures in `folder`."""
    title = escape(Path(report.video.source).name)
    sections = "\n".join((_overlay(report, folder), *_pictures(report, folder), _slider(report)))
    footer = "Made by <code>rlt inspect</code>. The numbers on this page are in <code>report.json</code>."
    path.write_text(document(title, f"{_summary(report, title)}\n{sections}", footer), encoding="utf-8")


def document(title: str, body: str, footer: str) -> str:
    """A whole page of three parts that are HTML already."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} &middot; rlt inspect</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
<footer>{footer}</footer>
</main>
</body>
</html>
"""


def coverage(report: InspectReport) -> str:
    """One sentence: which part of the video the numbers speak of."""
    clips = _count(len(report.clips), "clip")
    if report.whole_video:
        part = "The file is cut off; all that is there" if report.video.truncated else "The whole video"
        return f"{part} was looked at, {clips} on end."
    return (
        f"The video is long, so it was sampled: {clips}, spread evenly over it, cover {duration(report.seconds_seen)} "
        f"of {duration(report.video.duration)}."
    )


def left_out(video: VideoInfo, settings: ClipSettings, scan: ScanResult) -> list[str]:
    """What of the picture no token shows, and which frames are repeats: a sentence each, none where all is well."""
    sides = ("at the top and at the bottom", "at the left and at the right")
    found = [
        f"Tokens show the middle of the picture only: {share:.0%} of it is cut away, half of that {where} each."
        for share, where in zip(cut_away(video.width, video.height, settings.size), sides, strict=True)
        if share >= 0.005
    ]
    if repeated := scan.num_repeated:
        found.append(
            f"The video ends within a clip, whose last frame is repeated there ({_count(repeated, 'frame')}); time "
            "steps that hold nothing else are not counted."
        )
    return found


def _summary(report: InspectReport, title: str) -> str:
    kept, settings, video, grid = report.tokens_kept, report.settings, report.video, report.grid
    stride = settings.frame_stride
    every = f"{settings.fps:g} a second" if stride is None else f"every {ordinal(stride)}frame of the video"
    facts = {
        "Tokens": f"{report.scan.num_kept:,} of {report.scan.num_tokens:,} kept",
        "Threshold" if settings.threshold is not None else "Rule": rule_line(settings.rule),
        "Video": f"{video.codec}, {video.width}×{video.height}, {video.fps:.4g} frames a second",
        "Duration": duration(video.duration),
        "Clip": f"{settings.num_frames} frames, {every}",
        "Token grid of a clip": f"{grid.time} × {grid.height} × {grid.width} (time, height, width)",
        "Token": f"{_count(settings.tubelet_size, 'frame')} of {settings.patch_size}×{settings.patch_size} pixels",
    }
    seen = coverage(report), *left_out(video, settings, report.scan)
    entries = "\n".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"""<h1>{title}</h1>
<p class="quiet">What run-length tokenization keeps of this video.</p>
<div class="headline"><strong>{kept:.1%}</strong> <span>of the tokens are kept; {1 - kept:.1%} repeat what stood
there before and are dropped.</span></div>
<div class="bar" role="img" aria-label="{kept:.1%} of the tokens are kept"><div style="width:{kept:.2%}"></div></div>
<dl>
{entries}
</dl>
<p class="quiet" style="margin-top:1rem">{escape(" ".join(seen))}</p>
<p class="quiet">A patch is compared with the patch at the same
place one time step before. Where it differs by no more than the threshold it is dropped, and the token kept last
stands for it: its run gets longer. The first time step of every clip is always kept whole.</p>"""


def _overlay(report: InspectReport, folder: Path) -> str:
    overlay = report.overlay
    end = overlay.start + overlay.seconds
    part = (
        "the whole video"
        if report.whole_video and overlay.start == 0 and end >= report.video.duration - report.scan.seconds_per_step
        else f"{overlay.seconds:.1f} s of the video, from {overlay.start:.1f} s to {end:.1f} s"
    )
    data = _base64(folder / OVERLAY)
    return f"""<h2>What the network sees</h2>
<p>Kept patches in full colour, dropped ones dark, for {part}, at the {overlay.fps:.3g} frames a second
that are sampled. A flash of the full picture is the beginning of a clip.</p>
<video controls loop muted playsinline aria-label="Video with dropped patches dimmed"
src="data:video/mp4;base64,{data}"></video>"""


def _pictures(report: InspectReport, folder: Path) -> list[str]:
    clip, kept = report.representative, report.tokens_kept
    which = f"from {clip.start:.1f} s to {clip.end:.1f} s, which keeps {clip.tokens_kept:.1%}"
    shares = [clip.tokens_kept for clip in report.clips]
    chosen = rule_line(report.settings.rule)
    return [
        _picture(
            folder / CONTACT_SHEET,
            "One clip, step by step",
            f"The clip {which}: the nearest to the {kept:.1%} of all clips together. One frame per time step, "
            "with dropped patches dark.",
            f"Frames of one clip in which dropped patches are dark; {clip.tokens_kept:.0%} of its tokens are kept",
        ),
        _picture(
            folder / RUN_LENGTHS,
            "Where tokens stand long",
            "For how long a token stands on average at each place, over all clips. Bright places hardly change; dark "
            "ones need a new token all the time. A run ends with its clip.",
            "Map of mean run lengths beside a frame of the video",
        ),
        _picture(
            folder / OVER_TIME,
            "Tokens kept over time",
            f"Clips keep from {min(shares):.1%} to {max(shares):.1%} of their tokens. Moving cameras, cuts and changes "
            "of light keep almost all; still scenes almost none.",
            f"Chart of the share of tokens kept over time, {kept:.0%} on average",
        ),
        _picture(
            folder / AGAINST_THRESHOLD,
            "Tokens kept against the threshold",
            "A higher threshold drops more and overlooks more. The steep part on the left is noise of camera and "
            f"codec; the paper uses 0.1. Here {chosen} keeps {kept:.1%}.",
            f"Chart of the share of tokens kept against the threshold; {chosen} keeps {kept:.0%}",
        ),
    ]


def _slider(report: InspectReport) -> str:
    """A threshold to move: the page holds the curve, so that it needs neither the video nor a network."""
    curve, tokens, chosen = report.threshold_curve, report.scan.num_tokens, report.settings.threshold
    wanted = PAPER_THRESHOLD if chosen is None else chosen
    index = min(range(len(curve)), key=lambda place: abs(curve[place][0] - wanted))
    threshold, share = curve[index]
    bend = report.suggested_threshold
    advice = (
        "" if bend is None else f" The curve bends at {bend:g}: lower ones keep much more, higher ones little less."
    )
    numbers = json.dumps({"curve": [[at, round(kept * tokens)] for at, kept in curve], "tokens": tokens})
    return f"""<div class="slider">
<p>What other thresholds keep where each patch is compared with the one before it.{advice}</p>
<label for="threshold">Threshold</label>
<input id="threshold" type="range" min="0" max="{len(curve) - 1}" value="{index}" step="1" aria-describedby="kept">
<output id="kept" for="threshold">Threshold {threshold:g} ({threshold * GREY_LEVELS_PER_UNIT:.1f} grey levels of 255)
keeps {share:.1%}: {round(share * tokens):,} of {tokens:,} tokens.</output>
<div class="bar" aria-hidden="true"><div id="share" style="width:{share:.2%}"></div></div>
<script>
{{
  const {{ curve, tokens }} = {numbers};
  const slider = document.getElementById("threshold");
  slider.addEventListener("input", () => {{
    const [threshold, kept] = curve[slider.value], share = 100 * kept / tokens;
    const grey = (threshold * {GREY_LEVELS_PER_UNIT:.6f}).toFixed(1), count = (number) => number.toLocaleString("en");
    document.getElementById("kept").textContent = `Threshold ${{threshold}} (${{grey}} grey levels of 255) keeps ` +
      `${{share.toFixed(1)}}%: ${{count(kept)}} of ${{count(tokens)}} tokens.`;
    document.getElementById("share").style.width = `${{share}}%`;
    slider.setAttribute("aria-valuetext", `threshold ${{threshold}}`);
  }});
}}
</script>
</div>"""


def _picture(path: Path, heading: str, text: str, alternative: str) -> str:
    return f"""<h2>{escape(heading)}</h2>
<p>{escape(text)}</p>
<figure><img src="data:image/png;base64,{_base64(path)}" alt="{escape(alternative)}"></figure>"""


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def ordinal(number: int) -> str:
    """ "every {...}frame": "" for 1, "2nd ", "3rd ", "4th "."""
    if number == 1:
        return ""
    suffix = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{suffix} "


def duration(seconds: float) -> str:
    """Seconds for people: "4.40 s", "2 min 05 s", "1 h 02 min 05 s"."""
    if seconds < 60:
        return f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min {rest:02} s" if hours else f"{minutes} min {rest:02} s"
