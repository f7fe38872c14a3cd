"""From videos to the tokens of their windows: the half of the work that no network is needed for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlt.data.token_files import StoredVideo, columns_of_tokens, token_settings
from rlt.encoding.rows import STORED, failed_row, window_row
from rlt.encoding.sources import opened
from rlt.encoding.windows import Video, WindowSpec, windows_of
from rlt.errors import InvalidArgumentError, VideoError, one_line
from rlt.structures import Clip, PatchSpec, RunLengthTokens
from rlt.tokens import Rule, TokenStream, tokenize
from rlt.video import source_name

Row = dict[str, Any]
VIDEO, DONE = "video", "done"


@dataclass
class Cut:
    """A window on its way into the network."""

    row: Row
    """What is known of it."""
    tokens: RunLengthTokens | None
    """None for a row that is an error."""
    carried: Tensor | None = None
    """Of a window that goes on from the one before: which places of its first step stand since then, bool [H', W']."""
    share_read: float = 0.0
    """Of its video, for whoever shows progress."""


@dataclass
class Cutter:
    """Windows of videos as tokens; what `encode_videos` writes of it are the tokens themselves."""

    windows: WindowSpec
    rule: Rule
    patches: PatchSpec = PatchSpec()
    _: KW_ONLY
    class_names: tuple[str, ...] = ()
    """For training: by label id."""
    label_ids: Mapping[str, int] = field(default_factory=dict)
    """Those of the videos that have one, by path."""
    carry: bool = False
    """Whether what stands goes on from window to window, see `rlt.TokenStream`."""

    outputs = (STORED,)
    name = None
    is_random = False

    @property
    def window_tokens(self) -> int:
        """Tokens of a window when nothing is dropped."""
        clip = self.windows.clip
        return self.patches.grid((clip.num_frames, *clip.frame_size, 3)).num_tokens

    def settings(self) -> dict[str, Any]:
        """What decides the tokens, ready for JSON."""
        return {
            "outputs": list(self.outputs),
            **self.settings_of_tokens(),
            "mean": list(self.patches.mean),
            "std": list(self.patches.std),
            "class_names": list(self.class_names),
        }

    def settings_of_tokens(self) -> dict[str, Any]:
        """Those that stored tokens must have to stand for what it would cut."""
        spec = self.windows
        more = {"overlap": spec.overlap, "every": spec.every, "decoder": spec.decoder}
        return {**token_settings(spec.clip, self.rule, self.patches), **more}

    def cut(self, batch: Mapping[str, Sequence[Any]]) -> Iterator[Cut]:
        """Windows and their tokens, one at a time; see `Encoder.__call__`."""
        if VIDEO not in batch:
            raise InvalidArgumentError(f"the batch has columns {', '.join(batch) or 'none'}; {VIDEO!r} is needed")
        others = [name for name in batch if name not in (VIDEO, DONE, "source")]
        for place, video in enumerate(batch[VIDEO]):
            more = {name: batch[name][place] for name in others}
            name = str(batch["source"][place]) if "source" in batch else _name_of(video)
            done = set(batch[DONE][place]) if DONE in batch else set()
            cut = self._stored if isinstance(video, StoredVideo) else self._cut_video
            yield from cut(video, name, done, more)

    def _cut_video(self, video: Video, name: str, done: set[int], more: Row) -> Iterator[Cut]:
        share, number, before = 0.0, 0, -1
        state = TokenStream(rule=self.rule, spec=self.patches) if self.carry else None

        def on_read(now: float) -> None:
            nonlocal share
            share = now

        waiting: Cut | None = None  # a window is the last one if no other comes
        try:
            with opened(video) as source:
                for number, clip in enumerate(windows_of(source, self.windows, on_read), 1):
                    if waiting is not None:
                        yield waiting
                    waiting = None
                    if number - 1 in done:
                        continue
                    row, goes_on = window_row(name, number - 1, clip) | more, 0 < number - 1 == before + 1
                    waiting, before = Cut(row, *self._tokens(clip, number - 1, state, goes_on), share), number - 1
        except (VideoError, InvalidArgumentError) as error:
            if waiting is not None:
                yield waiting
            said = one_line(error).replace(video, name) if isinstance(video, str) else one_line(error)
            waiting = None if number in done else Cut(failed_row(name, number, said) | more, None)
        if waiting is not None:
            waiting.row["last"], waiting.share_read = True, 1.0
            yield waiting

    def _stored(self, video: StoredVideo, name: str, done: set[int], more: Row) -> Iterator[Cut]:
        """Windows that were cut before, under the same settings."""
        windows = video.file.windows[video.source]
        for place, window in enumerate(windows, 1):
            if window.window in done:
                continue
            try:
                if place == 1:
                    video.file.check(self.settings_of_tokens())
                tokens = None if window.error else video.file.tokens(window.row, self.patches)
            except InvalidArgumentError as error:
                yield Cut(failed_row(name, window.window, one_line(error)) | more, None, share_read=1.0)
                return
            known = {"source": name, **window._asdict(), **more}
            del known["row"]
            yield Cut(known, tokens, share_read=place / len(windows))

    def _tokens(
        self, clip: Clip, number: int, state: TokenStream | None, goes_on: bool
    ) -> tuple[RunLengthTokens, Tensor | None]:
        """Tokens of a window, and what of its first step stands since the one before."""
        found: Any
        if state is None:
            found = tokenize(clip, rule=self.rule, spec=self.patches, seeds=[number])
            return found, None
        if not goes_on:
            state.reset()
        found = state.push(clip.frames)
        return found, state.carried if goes_on else None

    def run(self, cuts: Iterable[Cut]) -> Iterator[Cut]:
        """The same windows with their tokens as columns."""
        for cut in cuts:
            label_id = self.label_ids.get(cut.row["source"])
            if label_id is not None:
                cut.row |= {"label_id": label_id, "label": self.class_names[label_id]}
            if cut.tokens is not None:
                about = {"tokens_kept": cut.tokens.share_kept, "num_tokens": len(cut.tokens)}
                cut.row |= about | columns_of_tokens(cut.tokens)
            yield cut


def _name_of(video: Any) -> str:
    if isinstance(video, Mapping):
        return str(video.get("path") or "<bytes>")
    if isinstance(video, StoredVideo | Clip):
        return video.source
    return "<frames>" if isinstance(video, torch.Tensor | np.ndarray) else source_name(video)
