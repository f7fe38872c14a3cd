"""The page of a model on the Hugging Face hub: what it wants, what was measured of it, and lines that run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlt.errors import InvalidArgumentError, one_line
from rlt.network.config import ViTConfig
from rlt.tokens import rule_line

Evaluation = str | Path | Mapping[str, Any]
"""The JSON file of an evaluation (`rlt evaluate ... json=FILE`), or what stands in it."""

_CARD = """
A video classifier for [run-length tokens](https://arxiv.org/abs/2411.05222): patches that repeat over time never reach
the network.

| | |
| --- | --- |
{settings}
{measured}
```python
import rlt

model = rlt.VisionTransformer.from_pretrained({name})
[clip] = rlt.video.read_spread("video.mp4", model.config.clip_spec)  # frames and size as in training
packed = model.tokenize(clip)  # by its own rule; threshold=0.1 is another
[scores] = model(packed).softmax(-1).tolist()
best = max(range(len(scores)), key=scores.__getitem__)
label = model.config.labels[best] if model.config.labels else best
print(f"{{packed.num_tokens}} tokens, {{label}}: {{scores[best]:.1%}}")
```
"""
_MEASURED = """
Measured with `rlt evaluate`; accuracies with 95 % intervals:

| tokens | tokens kept | FLOPs of dense | top-1 | top-{top_k} | videos |
| --- | ---: | ---: | ---: | ---: | ---: |
{rows}
"""


def card_text(config: ViTConfig, name: str, evaluations: Sequence[Evaluation] = ()) -> str:
    """The Markdown below the card's metadata.

    Args:
        config: of the model; its clips, rule and classes are shown.
        name: what `from_pretrained` is called with: a hub id, or a folder.
        evaluations: one row each, such as dense and with RLT; no table without any.

    Raises:
        InvalidArgumentError: naming the file that is no evaluation, or those that count another number of best classes.
    """
    settings = "\n".join(f"| {key} | {value} |" for key, value in _settings(config).items())
    return _CARD.format(settings=settings, measured=_measured(evaluations), name=json.dumps(name))


def _settings(config: ViTConfig) -> dict[str, str]:
    spec = config.clip_spec
    every = "spread over the video" if spec.sampling == "uniform" else f"at stride {spec.frame_stride}"
    if spec.fps is not None:
        every = f"at {spec.fps:g} frames per second"
    pixels = "the video's own" if spec.size is None else spec.size
    size = f"{pixels[0]}x{pixels[1]}" if isinstance(pixels, tuple) else str(pixels)
    known = "" if config.clip is not None else " (how clips were taken in training is not known)"
    return {
        "clip": f"{spec.num_frames} frames {every}, {size} px{known}",
        "token": f"{config.tubelet_size} frames of {config.patch_size}x{config.patch_size} pixels",
        "trained on": "not known" if config.rule is None else rule_line(config.rule),
        "run lengths": config.run_lengths,
        "network": f"width {config.width}, {config.depth} blocks, {config.num_heads} heads",
        "classes": str(config.num_classes),
    }


def _measured(evaluations: Sequence[Evaluation]) -> str:
    rows = [_row(evaluation) for evaluation in evaluations]
    if not rows:
        return ""
    counted = sorted({top_k for top_k, _ in rows})
    if len(counted) > 1:
        raise InvalidArgumentError(
            f"evaluations are of data sets with other classes (top {counted}); give those of one"
        )
    return _MEASURED.format(top_k=counted[0], rows="\n".join(row for _, row in rows))


def _row(evaluation: Evaluation) -> tuple[int, str]:
    """How many of the best classes count, and the line of one evaluation."""
    source, found = _read(evaluation)
    try:
        top1, top5 = (
            f"{found[key]:.1%} ({found[f'{key}_interval']['low']:.1%} to {found[f'{key}_interval']['high']:.1%})"
            for key in ("top1", "top5")
        )
        cells = [
            _tokens(found["settings"]["tokenizer"]),
            f"{found['tokens_kept']:.1%}",
            f"{found['flops']['share_of_dense']:.1%}",
            top1,
            top5,
            f"{found['num_videos']:,}",
        ]
        return int(found["top5_counts_the_best"]), f"| {' | '.join(cells)} |"
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{source} is no evaluation ({one_line(error)}); give the file of rlt evaluate ... json=FILE"
        ) from error


def _tokens(tokenizer: Mapping[str, Any]) -> str:
    """Which tokens an evaluation kept, for people."""
    policy = tokenizer["policy"]
    kinds = {"none": "all (dense)", "rlt": "RLT"}
    options = {
        name: value
        for name, value in tokenizer.items()
        if name not in ("policy", "seed", "keep_first") and value not in (None, 0, "none", "previous")
    }
    return ", ".join([kinds.get(policy, policy), *(f"{name} {value}" for name, value in options.items())])


def _read(evaluation: Evaluation) -> tuple[str, Mapping[str, Any]]:
    if isinstance(evaluation, Mapping):
        return "the mapping", evaluation
    try:
        return str(evaluation), json.loads(Path(evaluation).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(
            f"{evaluation} cannot be read as JSON ({one_line(error)}); give the file of rlt evaluate ... json=FILE"
        ) from error
