"""What the page says, as HTML. Names that come from files and models are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rlt.app.looking import LoadedClip, Look, Savings
from rlt.checkpoints.models import size_name
from rlt.compare import Comparison
from rlt.errors import one_line
from rlt.inspection.page import left_out, ordinal
from rlt.tokens import rule_line

STYLE = """
.rlt-big { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: .25rem 0 .75rem; }
.rlt-big strong { display: block; font-size: 1.65rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.rlt-quiet { opacity: .75; margin: .25rem 0; }
.rlt-problem { border: 1px solid #d55e00; border-left-width: .4rem; border-radius: .4rem; padding: .6rem .9rem; }
.rlt-wide { overflow-x: auto; }
.rlt-wide table { border: 0 !important; border-collapse: collapse; margin: .5rem 0;
  font-variant-numeric: tabular-nums; }
.rlt-wide th, .rlt-wide td { text-align: left; padding: .3rem 1.25rem .3rem 0 !important; white-space: nowrap;
  border: 0 !important; }
.rlt-wide tr { border: 0 !important; }
.rlt-wide td { border-top: 1px solid rgb(128 128 128 / 40%) !important; }
.rlt-wide th { font-weight: 500; opacity: .75; }
#source .icons button[aria-label*="Trim" i], #source button[title*="Trim" i] { display: none; }
@media (min-width: 1024px) { #controls { position: sticky; top: 0; align-self: flex-start; } }
"""


def problem(error: object) -> str:
    """One sentence about what a visitor can mend."""
    return f'<div class="rlt-problem" role="alert">{escape(one_line(error))}</div>'


def summary(loaded: LoadedClip, look: Look) -> str:
    """Share kept, tokens, FLOPs and the speed-up that they allow; then what the clip is."""
    scan, settings, info = look.scan, loaded.settings, loaded.info
    kept, total = int(look.view.mask.sum()), look.view.mask.numel()
    clip = loaded.clips[0]
    every = f"every {ordinal(settings.frame_stride or 1)}frame of the video"
    said = [
        f"{Path(loaded.source).name}: {settings.num_frames} frames from {float(clip.times[0]):.2f} s to "
        f"{scan.clips[0].end:.2f} s of {info.duration:.2f} s, {every}, with {rule_line(look.rule)}.",
        *left_out(info, settings, scan),
    ]
    numbers = {
        "of the tokens are kept": f"{kept / total:.1%}",
        "tokens kept": f"{kept:,} of {total:,}",
        f"GFLOPs of {look.dense_flops / 1e9:,.1f}": f"{look.kept_flops / 1e9:,.1f}",
        "the speed-up that the FLOPs allow": f"{look.speedup:.2f}×",
    }
    shown = "".join(f"<div><strong>{value}</strong>{escape(name)}</div>" for name, value in numbers.items())
    return f'<div class="rlt-big">{shown}</div><p class="rlt-quiet">{escape(" ".join(said))}</p>'


def measured(result: Comparison) -> str:
    """Times of the network and from file to answer, dense and with the rule; classes where the weights are trained."""
    dense, ours = (f"{1000 * result.seconds(f'forward_{arm}').median:,.0f} ms" for arm in ("dense", "rlt"))
    whole_dense, whole = (f"{1000 * result.end_to_end(arm).median:,.0f} ms" for arm in ("dense", "rlt"))
    rows = [
        ("network", dense, ours, f"{result.speedup_forward:.2f}×"),
        ("from file to answer", whole_dense, whole, f"{result.speedup_end_to_end:.2f}×"),
    ]
    about = f"{size_name(result.network) or 'network'} on {result.settings.device}, medians of {result.repeats} rounds."
    table = _table(("", "all tokens", rule_line(result.settings.rule), "speed-up"), rows)
    return f'{table}<p class="rlt-quiet">{escape(about)}</p>{_classes(result)}'


def _classes(result: Comparison) -> str:
    if result.weights is None:
        return '<p class="rlt-quiet">The weights are random, so that classes would mean nothing.</p>'
    video = result.videos[0]
    best = zip(video.top("dense")[0], video.top("rlt")[0], strict=True)
    rows = [[f"{result.label(index) or f'class {index}'}, {share:.1%}" for index, share in pair] for pair in best]
    return _table(("five best with all tokens", "five best with those that are kept"), rows)


def saved(found: Savings) -> str:
    """Hours of the GPU and money a day."""
    rows = [
        ("GPU hours a day", f"{found.dense_hours:,.2f}", f"{found.kept_hours:,.2f}"),
        ("cost a day", f"{found.dense_hours * found.price:,.2f}", f"{found.kept_hours * found.price:,.2f}"),
    ]
    table = _table(("", "all tokens", "kept tokens"), rows)
    return (
        f'<div class="rlt-big"><div><strong>{found.saved:,.2f}</strong>saved a day</div></div>{table}<p '
        'class="rlt-quiet">If all video is like this clip, clips follow one another, and the network is what costs.</p>'
    )


def _table(heads: tuple[str, ...], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(value)}</td>' for value in row)}</tr>" for row in rows)
    return f'<div class="rlt-wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
