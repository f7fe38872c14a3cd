"""What people name when they mean many videos: files, folders, manifests, lists, and addresses of stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rlt.checks import some
from rlt.data.manifest import MANIFEST_EXTENSIONS, read_manifest
from rlt.data.tables import list_store, open_in_store
from rlt.data.token_files import StoredVideo, TokenFile, is_token_file
from rlt.errors import InvalidArgumentError, VideoError
from rlt.video import VIDEO_EXTENSIONS, list_videos

LIST_EXTENSION = ".txt"


def list_sources(names: Sequence[str | Path]) -> dict[str, str | None]:
    """Videos in the order in which they are named, each once; with what a manifest says is wrong with it, else None.

    A name is a video, a folder of videos, a manifest of `rlt prepare` (.csv, .parquet), a list with a path per line
    (.txt, relative to its folder), a file of `rlt tokens` (.parquet), or the address of one or of a folder in a store
    (file://, s3://, gs://, hdfs://).

    Raises:
        VideoError: if something named does not exist, or a folder has no video.
        InvalidArgumentError: for a manifest or a list that cannot be read or names no video.
    """
    found: dict[str, str | None] = {}
    for name in map(str, names):
        path = Path(name)
        if is_address(name):
            found |= dict.fromkeys(list_store(name, VIDEO_EXTENSIONS))
        elif is_token_file(path):
            stored = TokenFile(path).windows
            if both := found.keys() & stored.keys():
                raise InvalidArgumentError(f"{path} has tokens of {some(sorted(both))}, named before; name each once")
            found |= dict.fromkeys(stored)
        elif path.suffix.lower() in MANIFEST_EXTENSIONS and path.is_file():
            found |= {entry.path: None if entry.usable else entry.status for entry in read_manifest(path).entries}
        elif path.suffix.lower() == LIST_EXTENSION and path.is_file():
            found |= dict.fromkeys(_listed(path))
        else:
            found |= dict.fromkeys(map(str, list_videos(name)))
    if not found:
        raise InvalidArgumentError("no video is named; give videos, folders, a manifest or a list")
    return found


def stored_videos(names: Sequence[str | Path]) -> dict[str, StoredVideo]:
    """Videos of those names that are files of `rlt tokens`."""
    files = [TokenFile(name) for name in names if is_token_file(name)]
    return {source: StoredVideo(file, source) for file in files for source in file.windows}


def labels_of(names: Sequence[str | Path]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Label ids by video and the names of the classes, where manifests say them.

    Raises:
        InvalidArgumentError: for manifests of other classes.
    """
    label_ids: dict[str, int] = {}
    known: dict[tuple[str, ...], str] = {}
    for path in map(Path, names):
        if path.suffix.lower() in MANIFEST_EXTENSIONS and path.is_file() and not is_token_file(path):
            manifest = read_manifest(path)
            known.setdefault(manifest.class_names, str(path))
            label_ids |= {entry.path: entry.label_id for entry in manifest.entries}
    if len(known) > 1:
        raise InvalidArgumentError(
            f"{some(list(known.values()))} have other classes; prepare them with the same labels, or write two files"
        )
    return label_ids, next(iter(known), ())


def is_address(name: object) -> bool:
    """Whether a name is the address of something in a store."""
    return isinstance(name, str) and "://" in name


def opened(video: Any) -> AbstractContextManager[Any]:
    """A video as `windows_of` takes it: what is in a store is opened for as long as the block runs.

    Of a dictionary of `bytes` and `path`, as data sets of Hugging Face have it, whichever is there.
    """
    if isinstance(video, Mapping):
        video = video.get("bytes") or video.get("path")
    return open_in_store(video) if is_address(video) else nullcontext(video)


def _listed(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise InvalidArgumentError(f"{path} cannot be read as a list of paths ({error})") from error
    names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not names:
        raise VideoError(f"{path}: the list names no video; write one path a line")
    return [name if is_address(name) else str(path.parent / name) for name in names]
