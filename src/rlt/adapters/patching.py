"""What every adapter is: edits of one model on the instance that can be undone, and the record of the last call."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from rlt.adapters.options import DEFAULT_RUN_LENGTHS, FOR_IMAGES, LastForward, PatchOptions
from rlt.adapters.statistics import Statistics, checkpoint_statistics
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import AWARE, IGNORED, NOWHERE, RunLengthParts
from rlt.structures import IMAGENET_MEAN, IMAGENET_STD, PatchSpec


class Override(NamedTuple):
    """An attribute of a submodule that is replaced on the instance."""

    module: nn.Module
    name: str
    value: Any
    """The adapter or what is bound to it, so that copies and pickles of the model work."""


class Hook(NamedTuple):
    """A function that runs before or after `forward` of a submodule.

    Unlike an overridden `forward` it works beside those of other libraries and leaves the signature readable.
    """

    module: nn.Module
    function: Callable[..., Any]
    """Bound to the adapter; called as torch calls hooks, before `forward` with the keywords too."""
    before: bool = False


class Patch(abc.ABC):
    """Runs one model on fewer tokens until it is detached.

    Nothing of the model is copied and no class is changed: `edits` says what is replaced or hooked on which submodule,
    so that weights, their names and saving stay as they are, and copies and pickles of the model stay patched.
    """

    model_classes: ClassVar[tuple[str, ...]]
    """Names of the classes of models that it can patch."""
    library: ClassVar[str]
    """Top-level package that the classes come from."""
    takes_images: ClassVar[bool] = False
    """Whether a call takes frames as a batch of images."""
    counts_once: ClassVar[str] = ""
    """Why run lengths do not count in other parts than `counted` has, for messages."""

    def __init__(self, model: nn.Module, options: PatchOptions) -> None:
        self.model: Any = model  # classes of other libraries, whose attributes no type checker knows
        self.options = self.settle(options)
        self._trained_with = checkpoint_statistics(model) or self.default_statistics()
        self.last: LastForward | None = None
        """What the last call kept; None before the first."""
        self._running: tuple[tuple[bool, int] | None, Any] = (None, None)
        self._overridden: list[tuple[nn.Module, str]] = []
        self._hooked: list[tuple[nn.Module, int]] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options}, last={self.last})"

    @property
    def _call(self) -> Any:
        """What the adapter knows of the call that runs.

        Raises:
            InvalidArgumentError: if another thread has called the model since: two calls at once would mix their clips.
        """
        if not torch.compiler.is_compiling():  # graphs know no threads: `check_runner` looks when they have run
            self.check_runner()
        return self._running[1]

    @_call.setter
    def _call(self, call: Any) -> None:
        self._running = (None if torch.compiler.is_exporting() else _runner()), call

    def check_runner(self) -> None:
        """Hold, at the end of a call too, that the one who began it is still the last who called the model.

        Raises:
            InvalidArgumentError: if another thread has called it since.
        """
        runner, _ = self._running
        if not torch.compiler.is_exporting() and runner not in (None, _runner()):
            raise InvalidArgumentError(
                "another thread called the patched model in the middle of this call; give each thread a copy.deepcopy "
                "of the model"
            )

    @abc.abstractmethod
    def token_size(self) -> tuple[int, int]:
        """Frames of a token, and its height and width in pixels."""

    def default_statistics(self) -> Statistics:
        """What the processor of the family normalises by, where none lies beside the checkpoint."""
        return IMAGENET_MEAN, IMAGENET_STD

    @property
    def spec(self) -> PatchSpec:
        """How the model cuts frames into tokens, and what their pixels are normalised by."""
        mean, std = self._trained_with
        return PatchSpec(*self.token_size(), self.options.pixel_mean or mean, self.options.pixel_std or std)

    @property
    def counted(self) -> RunLengthParts:
        """Where run lengths can count in this model, if they are asked to."""
        return NOWHERE

    def settle(self, options: PatchOptions) -> PatchOptions:
        """Options as this model takes them, with nothing left open.

        Raises:
            InvalidArgumentError: for what it cannot do.
        """
        name = type(self.model).__name__
        for option in FOR_IMAGES if not self.takes_images else ():
            if getattr(options, option) is not None:
                raise InvalidArgumentError(f"{option} is {getattr(options, option)}; {name} takes clips, leave it out")
        counted = self.counted
        text = options.run_lengths or (DEFAULT_RUN_LENGTHS if any(counted) else IGNORED)
        asked = RunLengthParts.of(text).names if text != AWARE else counted.names or (AWARE,)
        if not set(asked) <= set(counted.names):
            where = " and ".join(counted.names) or "no part"
            allowed = ", ".join([AWARE, IGNORED, *counted.names] if any(counted) else [IGNORED])
            why = f" ({self.counts_once})" if self.counts_once else ""
            raise InvalidArgumentError(
                f"run_lengths is {text!r}, but {name} counts them in {where}{why}; allowed are {allowed}"
            )
        return replace(options, run_lengths=text)

    @abc.abstractmethod
    def edits(self) -> Sequence[Override | Hook]:
        """What is replaced or hooked on which submodule while the patch is on."""

    @abc.abstractmethod
    def run_static(self) -> None:
        """Call the model with a clip in which nothing changes."""

    def attach(self) -> None:
        """Begin: from now on the model drops tokens."""
        self.check_attachable()
        for edit in self.edits():
            if isinstance(edit, Override):
                edit.module.__dict__[edit.name] = edit.value
                self._overridden.append((edit.module, edit.name))
            else:
                if edit.before:
                    handle = edit.module.register_forward_pre_hook(edit.function, with_kwargs=True)
                else:
                    handle = edit.module.register_forward_hook(edit.function)
                # By number: of a copied model a handle would still remove the hook of the original.
                self._hooked.append((edit.module, handle.id))
        self.model.__dict__["rlt"] = self

    def detach(self) -> None:
        """End: the model is as it was."""
        for module, name in self._overridden:
            module.__dict__.pop(name, None)
        for module, number in self._hooked:
            for hooks in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks):
                hooks.pop(number, None)
        self._overridden.clear()
        self._hooked.clear()
        self.model.__dict__.pop("rlt", None)

    def check_attachable(self) -> None:
        """Hold, before anything changes, that what `edits` changes is as its library made it."""
        # A half-done patch would let clips see each other.
        for edit in self.edits():
            if isinstance(edit, Override) and edit.name in edit.module.__dict__:
                raise InvalidArgumentError(
                    f"{type(edit.module).__name__}.{edit.name} is overridden on the instance already; undo that before "
                    "rlt.patch"
                )

    @contextmanager
    def override(self, **changes: Any) -> Iterator[None]:
        """Other options within a `with` block.

        Raises:
            InvalidArgumentError: for values out of range, or a name that is no option.
        """
        before = self.options
        self.options = self.settle(before.changed(**changes))
        try:
            yield
        finally:
            self.options = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Calls within a `with` block leave no trace: afterwards `last` is that of the call before."""
        before = self.last, self._running
        self.last = self._call = None
        try:
            yield
        finally:
            self.last, self._running = before

    @torch.no_grad()
    def check(self) -> None:
        """Run a clip in which nothing changes, and see that tokens are dropped.

        Raises:
            InvalidArgumentError: if the network got as many tokens as without the patch.
        """
        with self.aside():
            self.run_static()
            seen = self.last
        if seen is None or seen.share_kept >= 1:
            raise InvalidArgumentError(
                f"no token of a static clip was dropped with {self.options}; the patch does not engage"
            )


def _runner() -> tuple[bool, int]:
    from rlt.adapters.runners import runner  # loads torch's compiler

    return runner()


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, for which configurations hold one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def square_side(size: int | Sequence[int]) -> int:
    """Height and width of a patch, which must be one."""
    height, width = sides(size)
    if height != width:
        raise InvalidArgumentError(f"the model has patches of {height}x{width} pixels; rlt.patch needs square ones")
    return height
