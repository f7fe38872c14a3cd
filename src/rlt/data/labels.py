"""Names of classes: the lists that ship with the package, lists from files, and names as other people spell them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from importlib import resources
from pathlib import Path

from rlt.checks import closest, one_of, some
from rlt.data.manifest import MANIFEST_EXTENSIONS, read_manifest
from rlt.errors import InvalidArgumentError

CLASS_LISTS = ("kinetics400", "ssv2")
"""Data sets whose class names ship with the package."""


@cache
def class_names(name: str) -> tuple[str, ...]:
    """Names of the classes of a data set of `CLASS_LISTS`, in the order of their label ids."""
    one_of(CLASS_LISTS, name=name)
    text = (resources.files("rlt.data") / "class_names" / f"{name}.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Class names from a file: one name a line, a JSON map from name to label id, a JSON list, or a manifest."""
    file = Path(path)
    if file.suffix.lower() in MANIFEST_EXTENSIONS:
        return read_manifest(file).class_names
    text = read_text(file)
    names = _json_names(text, file) if file.suffix.lower() == ".json" else text.splitlines()
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise InvalidArgumentError(f"{path}: no class name in it; one name a line is needed, in the order of label ids")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InvalidArgumentError(f"{path}: {min(twice)!r} stands in it twice; every class needs a name of its own")
    return tuple(names)


def _json_names(text: str, file: Path) -> list[str]:
    remedy = 'a list of names, or a map such as {"Closing something": "5"}, is needed'
    try:
        content = json.loads(text)
        if isinstance(content, list):
            return [str(name) for name in content]
        by_id = {int(label_id): str(name) for name, label_id in content.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgumentError(f"{file}: not a JSON file of class names ({error}); {remedy}") from None
    if len(by_id) != len(content) or sorted(by_id) != list(range(len(content))):
        raise InvalidArgumentError(f"{file}: its label ids are not 0 to {len(content) - 1}, each once; {remedy}")
    return [by_id[label_id] for label_id in range(len(by_id))]


def read_text(path: Path) -> str:
    """A text file in UTF-8 as it is, without the mark that some editors put first."""
    try:
        if path.exists() and not path.is_file():
            raise InvalidArgumentError(f"{path}: a folder, a device or a pipe; give the list of the data set")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidArgumentError(f"{path}: not a text file in UTF-8; give the list of the data set") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path}: cannot be read ({error.strerror}); check the path") from None


class ClassIndex:
    """Finds label ids by names whose case, spaces, underscores, brackets or quotes differ.

    Published copies of Kinetics spell the same class "massaging person's head", "massaging_persons_head" and
    "passing_American_football_-in_game-"; templates of Something-Something stand with and without brackets. `origin`
    says in messages where the names come from.
    """

    def __init__(self, names: Sequence[str], *, origin: str) -> None:
        self.names = tuple(names)
        self._origin = origin
        self._exact = {name: label_id for label_id, name in enumerate(names)}
        spelled = [_letters(name) for name in names]
        alike = Counter(spelled)
        self._spelled = {letters: label_id for label_id, letters in enumerate(spelled) if alike[letters] == 1}

    def find(self, name: str) -> int | None:
        """Label id of a name, None if it is not in the list."""
        return self._exact.get(name, self._spelled.get(_letters(name)))

    def find_all(self, names: Iterable[str], *, source: str) -> dict[str, int]:
        """Label id of each of these names, which stand in `source`; all must be in the list."""
        found = {name: self.find(name) for name in names}
        unknown = sorted(name for name, label_id in found.items() if label_id is None)
        if unknown:
            raise InvalidArgumentError(
                f"{source}: {some([repr(name) for name in unknown], 3)} {'is' if len(unknown) == 1 else 'are'} not "
                f"among the {len(self.names)} classes of {self._origin}; "
                f"correct the names, or give the right list with --labels{self._meant(unknown[:3])}"
            )
        return {name: label_id for name, label_id in found.items() if label_id is not None}

    def _meant(self, unknown: Sequence[str]) -> str:
        """ "; did you mean 'zumba' for 'zumbaa'?" """
        close = {name: closest(_letters(name), self._spelled) for name in unknown}
        meant = [f"{self.names[self._spelled[letters]]!r} for {name!r}" for name, letters in close.items() if letters]
        return f"; did you mean {', '.join(meant)}?" if meant else ""

    def check(self, label_id: int, *, source: str) -> None:
        """Hold that there is a class of this label id, which stands in `source`."""
        if not 0 <= label_id < len(self.names):
            raise InvalidArgumentError(
                f"{source}: label {label_id} is not among the {len(self.names)} classes of {self._origin} "
                f"(0 to {len(self.names) - 1}); give the right list with --labels"
            )


def class_index(names: Sequence[str] | None, dataset: str = "") -> ClassIndex | None:
    """The names that are given, else those that ship for a data set, if any do."""
    if names is None and dataset not in CLASS_LISTS:
        return None
    return ClassIndex(class_names(dataset), origin=dataset) if names is None else ClassIndex(names, origin="--labels")


def _letters(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())
