"""Tokens of a video that never ends: runs go on from call to call, in the memory of a few frames."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from rlt.checks import share
from rlt.errors import InvalidArgumentError
from rlt.structures import PatchSpec, RunLengthTokens, check_frames
from rlt.tokens.differences import PatchView
from rlt.tokens.naming import choose_rule, rule_line
from rlt.tokens.rules import Rule, Threshold
from rlt.tokens.tokenize import select_tokens


def is_streamable(rule: Rule) -> bool:
    """Whether a rule can go on from call to call: thresholds, but not anchors that move with the camera."""
    return isinstance(rule, Threshold) and not (rule.reference == "anchor" and rule.motion == "global")


class TokenStream:
    """Cut frames that come piece by piece into tokens, as `rlt.tokenize` would cut all of them at once.

        stream = rlt.TokenStream(threshold=0.1)
        for frames in chunks:                   # uint8 [T, H, W, 3], any T
            tokens = stream.push(frames)

    What `push` gives are the tokens of the whole, cut where the call ends. A run that goes on over that border is cut
    in two: the part before ends with the window, and at step 0 of the next one the same token, with the pixels that
    it had when it was new, stands for what is left of it there. So each window is whole in itself, and its run
    lengths are final: how much longer a picture stands is not known before it changes, and shows in the windows to
    come. `carried` and `ages` tell of each place how long its token has stood by then.

    With `exposure="gain"` two things differ from the whole, which a stream never sees: noise is measured in the first
    frame of the stream, and with `reference="anchor"` the exposure of a step is held against the picture that stands,
    not against each earlier frame of it.

    Args:
        threshold: as for `rlt.tokenize`, as are the next ones.
        keep_ratio: refused, because which tokens differ most is not known before the end.
        max_tokens: refused, as it is.
        reference: "previous" or "anchor". With "previous" what drifts slowly may stand for ever, though it has become
            another picture; with "anchor" what stands differs by at most the threshold.
        exposure: "none" or "gain".
        motion: "none" or "global", the latter not with anchors, which a stream does not move.
        rule: a `rlt.Threshold`, or the name "rlt".
        spec: how frames are cut into tokens.
        tubelet_size: frames per token, 2 if not given.
        patch_size: height and width of a token in pixels, 16 if not given.
        scene_share: a step of which more than this share is new begins a scene, above 0 and up to 1, unless the step
            before was as new: what moves all the time, as before a camera that pans, is one scene.

    Raises:
        InvalidArgumentError: for a rule that needs the whole video, or an option out of range.
    """

    carried: Tensor
    """bool [H', W']: whose token at step 0 of the last window goes on from before it."""
    ages: Tensor
    """int64 [H', W']: for how many steps the token of each place has stood at the end of the last window, 1 or more."""
    scene_changes: tuple[int, ...]
    """Steps of the last window that begin another scene, in its own count."""
    num_steps: int
    """Time steps of all windows so far."""

    def __init__(
        self,
        *,
        threshold: float | None = None,
        keep_ratio: float | None = None,
        max_tokens: int | None = None,
        reference: str | None = None,
        exposure: str | None = None,
        motion: str | None = None,
        rule: Rule | str | None = None,
        spec: PatchSpec | None = None,
        tubelet_size: int | None = None,
        patch_size: int | None = None,
        scene_share: float = 0.5,
    ) -> None:
        chosen = choose_rule(
            rule,
            threshold=threshold,
            keep_ratio=keep_ratio,
            max_tokens=max_tokens,
            reference=reference,
            exposure=exposure,
            motion=motion,
        )
        if not isinstance(chosen, Threshold):
            raise InvalidArgumentError(
                f"rule is {rule_line(chosen)}, which needs the whole video; a stream takes rule 'rlt' with threshold, "
                "reference, exposure and motion"
            )
        if not is_streamable(chosen):
            raise InvalidArgumentError(
                "motion is 'global' and reference is 'anchor', which a stream cannot do together; take one of them"
            )
        share(scene_share=scene_share)
        self.rule = chosen
        self.spec = PatchSpec.of(spec, tubelet_size=tubelet_size, patch_size=patch_size)
        self.scene_share = scene_share
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next frame begins a new video, of any size."""
        self.carried = torch.zeros(0, 0, dtype=torch.bool)
        self.ages = torch.zeros(0, 0, dtype=torch.int64)
        self.scene_changes = ()
        self.num_steps = 0
        self._waiting: Tensor | None = None  # uint8 [T, H, W, 3], less than a tubelet
        self._before: Tensor | None = None  # uint8 [tubelet, H, W, 3], the step before
        self._standing: Tensor | None = None  # uint8 [tubelet, H, W, 3], the pixels of the tokens that stand
        self._noise: Tensor | None = None
        self._was_new = True  # the beginning is no change

    def push(self, frames: Tensor, *, anew: bool = False) -> RunLengthTokens | None:
        """Take the next frames, and give the tokens of the time steps that they complete.

        Args:
            frames: uint8 [T, H, W, 3], T 1 or more, of one size and on one device; those that do not fill a tubelet
                wait for the next call.
            anew: cut all runs at this border and take the picture as it is now: the tokens are those of
                `rlt.tokenize` of this window alone, for a network that shall not look at old pixels.

        Returns:
            Tokens whose first step is whole, see above; None if no step is complete.

        Raises:
            InvalidArgumentError: for frames of another dtype, shape or size.
        """
        steps = self._whole_steps(frames)
        if steps is None:
            return None
        new = self._mark(steps)
        self.carried = torch.zeros_like(new[0]) if anew else ~new[0]
        are_new = [part > self.scene_share for part in new.flatten(1).float().mean(1).tolist()]
        before = [self._was_new, *are_new]
        self.scene_changes = tuple(step for step, is_new in enumerate(are_new) if is_new and not before[step])
        self._was_new = are_new[-1]
        if anew:
            mask = self.rule(PatchView(steps[None], self.spec), seeds=[0])[0]
        else:
            mask = torch.cat([torch.ones_like(new[:1]), new[1:]])
        shown = steps if anew else self._with_standing(steps, new[0])
        [tokens] = select_tokens(shown[None], mask[None], spec=self.spec)
        self._remember(tokens, steps, ~mask[1:].any(0) & self.carried)
        return tokens

    def _whole_steps(self, frames: Tensor) -> Tensor | None:
        """Frames of whole tubelets, from those that waited on; None if there is not one."""
        check_frames(frames, dims=(4,))
        self.spec.grid((self.spec.tubelet_size, *frames.shape[1:]))
        known = next((held for held in (self._waiting, self._standing) if held is not None), None)
        if known is not None and known.shape[1:] != frames.shape[1:]:
            raise InvalidArgumentError(
                f"frames are {frames.shape[1]}x{frames.shape[2]} pixels, those before are {known.shape[1]}x"
                f"{known.shape[2]}; scale them, or begin a new video with reset()"
            )
        if self._waiting is not None:
            frames = torch.cat([self._waiting, frames])
        whole = len(frames) // self.spec.tubelet_size * self.spec.tubelet_size
        self._waiting = frames[whole:].clone() if whole < len(frames) else None
        return frames[:whole] if whole else None

    def _mark(self, steps: Tensor) -> Tensor:
        """Which tokens are new, given what came before: bool [T', H', W']."""
        if self.rule.exposure == "gain" and self._noise is None:
            self._noise = PatchView(steps[None, : self.spec.tubelet_size], self.spec).noise
        by_anchor = self.rule.reference == "anchor"
        before = self._standing if by_anchor else self._before
        if not (by_anchor and self.rule.exposure == "gain"):
            return self._compare(before, steps)
        # One by one, so that the picture that stands is the same however many frames come at once.
        found = []
        for step in steps.split(self.spec.tubelet_size):
            found.append(self._compare(before, step))
            before = step if before is None else self._composed(found[-1][0], step, before)
        return torch.cat(found)

    def _compare(self, before: Tensor | None, steps: Tensor) -> Tensor:
        frames = steps if before is None else torch.cat([before, steps])
        mask = self.rule(PatchView(frames[None], self.spec, noise=self._noise), seeds=[0])[0]
        return mask if before is None else mask[1:]

    def _with_standing(self, steps: Tensor, new: Tensor) -> Tensor:
        """The frames with the pixels of what stands where nothing is new in the first step."""
        if self._standing is None:
            return steps
        tubelet = self.spec.tubelet_size
        return torch.cat([self._composed(new, steps[:tubelet], self._standing), steps[tubelet:]])

    def _composed(self, new: Tensor, step: Tensor, standing: Tensor) -> Tensor:
        """Pixels of a tubelet where it is new, those of what stands elsewhere: uint8 [tubelet, H, W, 3]."""
        patch = self.spec.patch_size
        is_new = new.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
        return torch.where(is_new[:, :, None], step, standing)

    def _remember(self, tokens: RunLengthTokens, steps: Tensor, unchanged: Tensor) -> None:
        tubelet, last = self.spec.tubelet_size, tokens.expand(tokens.lengths)[-1]
        self.ages = last + torch.where(unchanged, self.ages, 0) if bool(unchanged.any()) else last
        self._before, self._standing = steps[-tubelet:].clone(), tokens.expand()[-tubelet:].clone()
        self.num_steps += tokens.grid.time

    def state_dict(self) -> dict[str, Any]:
        """All that the next call depends on: tensors, numbers and the settings, for `torch.save`."""
        return {**{name: getattr(self, name) for name in _STATE}, "settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream was when it gave `state`.

        Raises:
            InvalidArgumentError: for the state of a stream with other settings, or what is none.
        """
        if missing := [name for name in (*_STATE, "settings") if name not in state]:
            raise InvalidArgumentError(f"state has no {missing[0]!r}; give what TokenStream.state_dict returned")
        if state["settings"] != self._settings():
            raise InvalidArgumentError(
                f"state is of a stream with {state['settings']}, this one has {self._settings()}; make it alike"
            )
        for name in _STATE:
            setattr(self, name, state[name])

    def _settings(self) -> dict[str, Any]:
        sizes = {"tubelet_size": self.spec.tubelet_size, "patch_size": self.spec.patch_size}
        return {**asdict(self.rule), **sizes, "scene_share": self.scene_share}


_STATE = ("carried", "ages", "scene_changes", "num_steps", "_waiting", "_before", "_standing", "_noise", "_was_new")
