"""The sentences of all errors about arguments: the value, what is allowed, and the remedy, in one line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from rlt.errors import InvalidArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def number(**values: object) -> None:
    """Hold that each value is a number that a float can be; None is not looked at.

    Raises:
        InvalidArgumentError: naming the first that is not.
    """
    for name, value in values.items():
        if value is None:
            continue
        try:
            fits = not isinstance(value, str | bytes) and isinstance(float(value), float)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: of a tensor with several values
            fits = False
        if not fits:
            raise InvalidArgumentError(f"{name} is {value!r:.80}; a number is needed")


def whole(**values: object) -> None:
    """Hold that each value is a whole number, which 16.0 is not; None is not looked at.

    Raises:
        InvalidArgumentError: naming the first that is not.
    """
    for name, value in values.items():
        if value is not None and not hasattr(value, "__index__"):
            raise InvalidArgumentError(f"{name} is {value!r:.80}; a whole number is needed")


def at_least(minimum: int, **values: float | None) -> None:
    """Hold that each value is `minimum` or more; None is not looked at.

    Raises:
        InvalidArgumentError: naming the first that is not.
    """
    number(**values)
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise InvalidArgumentError(f"{name} is {value}; at least {minimum} is needed")


def share(**values: float | None) -> None:
    """Hold that each value is above 0 and up to 1; None is not looked at.

    Raises:
        InvalidArgumentError: naming the first that is not.
    """
    number(**values)
    for name, value in values.items():
        if value is not None and not 0 < value <= 1:
            raise InvalidArgumentError(f"{name} is {value}; above 0 and up to 1 is needed")


def one_of(allowed: Iterable[Any], **values: object) -> None:
    """Hold that each value is among `allowed`.

    Raises:
        InvalidArgumentError: naming the first that is not, what is allowed, and the nearest of it.
    """
    known = tuple(allowed)
    for name, value in values.items():
        if value not in known:
            listed = ", ".join(str(item) for item in known if item is not None)
            raise InvalidArgumentError(f"{name} is {value!r}; allowed are {listed}{nearest(value, known)}")


def exclusive(**values: object) -> None:
    """Hold that at most one value is given, that is, not None.

    Raises:
        InvalidArgumentError: naming all that are.
    """
    given = [f"{name} is {value}" for name, value in values.items() if value is not None]
    if len(given) > 1:
        raise InvalidArgumentError(f"{' and '.join(given)}; give one of them")


def nearest(value: object, allowed: Iterable[object]) -> str:
    """ "; did you mean 'x'?" with the `closest` name, "" if there is none."""
    close = closest(value, allowed)
    return "" if close is None else f"; did you mean {close!r}?"


def closest(value: object, allowed: Iterable[object]) -> str | None:
    """The name that looks most like `value`, begins with it, or is its beginning; None if there is none."""
    text, names = str(value), [str(item) for item in allowed]
    close = get_close_matches(text, names, n=1) or [name for name in names if text and name.startswith(text)]
    begun = sorted((name for name in names if len(name) > 2 and text.startswith(name)), key=len)
    return next(iter([*close, *reversed(begun)]), None)


def some(names: Collection[str], count: int = 4) -> str:
    """The first few names for a message, and how many more there are: "a, b, c, d and 7 more"."""
    first = ", ".join(list(names)[:count]) or "nothing"
    return first if len(names) <= count else f"{first} and {len(names) - count} more"


def named_options(**moved: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a public function: a keyword that it does not know is one line that names those it knows.

    Args:
        moved: keywords of earlier versions, and what is written instead.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        allowed = [
            name
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
        ]
        known = set(inspect.signature(function).parameters)

        @wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name in moved:
                    raise InvalidArgumentError(f"{function.__name__} takes no {name}= any more; {moved[name]}")
                if name not in known:
                    raise InvalidArgumentError(
                        f"{function.__name__} has no option {name!r}; allowed are {', '.join(allowed)}"
                        f"{nearest(name, allowed)}"
                    )
            return function(*args, **kwargs)

        return checked

    return decorate


class Renamed:
    """A property of earlier versions: reading it is an AttributeError that says what it is called now."""

    def __init__(self, now: str) -> None:
        """`now` is its name today, with whatever else a user should know."""
        self.now = now

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn the old name."""
        self.before = f"{owner.__name__}.{name}"

    def __get__(self, instance: object, owner: type) -> Any:
        """Say the new name.

        Raises:
            AttributeError: always.
        """
        raise AttributeError(f"{self.before} is now {self.now}")
