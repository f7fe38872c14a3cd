"""`rlt.stream`: what a network says about a source that may never end, window by window, as it comes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from rlt.checks import at_least, named_options, one_of
from rlt.errors import InvalidArgumentError
from rlt.loading import is_size, load_network
from rlt.network.vit import VisionTransformer
from rlt.pretrained import ModelInputs, PatchedNetwork, as_network
from rlt.structures import RunLengthTokens, pack
from rlt.tokens import Rule, Threshold, TokenStream, choose_rule, rule_line
from rlt.tokens.token_stream import is_streamable
from rlt.tokens.tokenize import tokenize
from rlt.video.live import LiveClip, LiveSettings, LiveSource, is_live, live_clips
from rlt.video.spec import ClipSpec

WHEN_LATE = ("wait", "drop_oldest")
"""What is done when windows come faster than the network takes them."""
_WINDOWS_WAITING = 2


@dataclass(frozen=True, eq=False)
class StreamWindow:
    """One clip of a stream, and what the network makes of it."""

    index: int
    """Number of the window, from 0 on, those that were dropped included."""
    start: float
    """When its first frame is shown, in seconds from the beginning of the source, or from when it was opened again."""
    end: float
    """The same of its last frame."""
    tokens: RunLengthTokens
    """What the network got."""
    features: Tensor
    """float32 [width], on the CPU: normalised mean of its tokens; of a model of transformers as `rlt.Encoder` says."""
    logits: Tensor | None
    """float32 [classes], on the CPU; None for a network without a head."""
    scene_changes: tuple[float, ...]
    """When another scene begins, in seconds, see `rlt.TokenStream`."""
    num_repeated: int
    """How many frames at the end repeat the last one, because the source ended."""
    num_dropped: int
    """Windows before it that came while the network was busy, and were dropped."""
    num_reused: int
    """Tokens of its first step that an image model had computed before."""
    latency_seconds: float
    """From when its last frame was decoded until here."""
    notes: tuple[str, ...]
    """What happened to the source before it."""


def load_trained(name: str | Path) -> VisionTransformer | PatchedNetwork:
    """The network that a name stands for, see `rlt.loading.load_network`.

    Raises:
        InvalidArgumentError: for a size, whose random weights say nothing about a video.
        CheckpointError: if it cannot be read.
    """
    if is_size(name):
        raise InvalidArgumentError(f"model is {str(name)!r}, whose weights are random; give a run or a checkpoint")
    return load_network(name)


@named_options()
def stream(
    source: LiveSource,
    model: nn.Module | str | Path,
    *,
    clip: ClipSpec | None = None,
    rule: Rule | None = None,
    carry: bool = False,
    when_late: str | None = None,
    max_windows: int | None = None,
    settings: LiveSettings | None = None,
    device: str = "cpu",
    num_threads: int = 1,
) -> Iterator[StreamWindow]:
    """Run a network over a source that may never end, in the memory of a few clips.

    Windows follow each other without overlap, and are sampled in time as `rlt.video.iter_clips` does it.

    Args:
        source: a path, "-" for standard input, an address (http, https, rtsp, rtsps), a camera such as /dev/video0, or
            a binary file object. Nothing but an address opens the network.
        model: a network, a model of transformers after `rlt.patch`, or the name of one: a run's folder, a checkpoint,
            or a hub id. An image model looks at frame after frame, and computes what changed and nothing else.
        clip: frames, rate and size of a window; those that are stored with the network if not given.
        rule: which tokens it gets; that which is stored with the network, or `rlt.Threshold()`, if not given.
        carry: let a token of a place that does not change stand on with its pixels over the border of windows, as
            `rlt.TokenStream` does. Without it each window is what `rlt.tokenize` makes of it. With an image model and a
            threshold that is always so, and what stands goes through no layer.
        when_late: "wait" reads on when the network is ready, so that nothing is lost; "drop_oldest" reads on anyway,
            keeps the two newest windows, and counts the others. Cameras (rtsp, /dev) drop if it is not given, all else
            waits.
        max_windows: stop after so many.
        settings: how long is waited for the source, and how often it is opened again.
        device: where the network runs.
        num_threads: of the decoder.

    Yields:
        A window as soon as the network has seen it.

    Raises:
        VideoError: for a source that cannot be opened, stalls, or does not come back.
        InvalidArgumentError: for an option out of range, or a rule that `carry` does not go with.
    """
    at_least(1, max_windows=max_windows)
    one_of((None, *WHEN_LATE), when_late=when_late)
    network = as_network(model) if isinstance(model, nn.Module) else load_trained(model)
    chosen = choose_rule(rule, stored=network.config.rule)
    if carry and not is_streamable(chosen):
        raise InvalidArgumentError(
            f"rule is {rule_line(chosen)}, which does not go on from window to window; leave carry out"
        )
    clip = clip or network.config.clip_spec
    if isinstance(network, PatchedNetwork):
        network.config.check_clip(clip)
        network.use(chosen)
    carry = carry or (_looks_at_frames(network) and is_streamable(chosen))
    network.config.patches.grid((clip.num_frames, *clip.frame_size, 3))  # told before the source is opened
    drops = (when_late or ("drop_oldest" if is_live(source) else "wait")) == "drop_oldest"
    clips = live_clips(source, clip, settings, num_threads=num_threads)
    numbered = _newest(clips) if drops else ((live, 0) for live in clips)
    return islice(_windows(numbered, network.to(device).eval(), chosen, device, carry=carry), max_windows)


def _looks_at_frames(network: VisionTransformer | PatchedNetwork) -> bool:
    return isinstance(network.config, ModelInputs) and network.config.by_frame


def _windows(
    clips: Iterator[tuple[LiveClip, int]],
    network: VisionTransformer | PatchedNetwork,
    rule: Rule,
    device: str,
    *,
    carry: bool,
) -> Iterator[StreamWindow]:
    spec = network.config.patches
    state = TokenStream(rule=rule if is_streamable(rule) else Threshold(), spec=spec)
    index = 0
    for live, num_dropped in clips:
        index += num_dropped
        goes_on = carry and state.num_steps > 0 and not num_dropped and live.goes_on
        if num_dropped or not live.goes_on:
            state.reset()
        tokens = state.push(live.clip.frames, anew=not carry)
        if not is_streamable(rule):  # only scenes are told by the state then
            tokens = tokenize(live.clip, rule=rule, spec=spec, seeds=[index])
        assert tokens is not None  # a window is whole tubelets, as `PatchSpec.grid` holds
        reused = state.carried if goes_on and _looks_at_frames(network) else None
        with torch.inference_mode():
            packed = pack([tokens]).to(device)
            if isinstance(network, PatchedNetwork):
                features = network.forward_features(packed, [reused])
            else:
                features = network.forward_features(packed)
            logits = network.head(features) if network.config.num_classes else None
        times = live.clip.times.tolist()
        yield StreamWindow(
            index=index,
            start=times[0],
            end=times[-1],
            tokens=tokens,
            features=features[0].float().cpu(),
            logits=None if logits is None else logits[0].float().cpu(),
            scene_changes=tuple(times[step * spec.tubelet_size] for step in state.scene_changes),
            num_repeated=live.clip.num_repeated,
            num_dropped=num_dropped,
            num_reused=0 if reused is None else int(reused.sum()),
            latency_seconds=time.monotonic() - live.arrived,
            notes=live.notes,
        )
        index += 1


def _newest(clips: Iterator[LiveClip]) -> Iterator[tuple[LiveClip, int]]:
    """Read on in a thread, keep the newest clips, and say with each how many before it were dropped."""
    waiting: deque[LiveClip] = deque()
    changed = threading.Condition()
    dropped, ended = 0, False
    failure: list[Exception] = []

    def read() -> None:
        nonlocal dropped, ended
        try:
            for clip in clips:
                with changed:
                    if ended:
                        return
                    waiting.append(clip)
                    if len(waiting) > _WINDOWS_WAITING:
                        lost = waiting.popleft()
                        waiting[0] = replace(waiting[0], notes=(*lost.notes, *waiting[0].notes))
                        dropped += 1
                    changed.notify()
        except Exception as error:  # raised again where the windows are taken
            failure.append(error)
        with changed:
            ended = True
            changed.notify()

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                if not waiting:
                    break
                clip, lost_before, dropped = waiting.popleft(), dropped, 0
            yield clip, lost_before
    finally:
        with changed:
            ended = True
    if failure:
        raise failure[0]
