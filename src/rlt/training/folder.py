"""The folder of a run: one process at a time writes to it, and it remembers how the run came to be what it is."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import rlt
from rlt.conf.saved import LENGTH, changes, run_to_go_on, saved_config
from rlt.conf.schema import Config
from rlt.data.manifest import Manifest
from rlt.errors import InvalidArgumentError, TrainingError
from rlt.files import not_writable, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(run_dir: str | Path) -> Iterator[None]:
    """Keep every other process from training in the same folder while the block runs.

    The lock is the system's on RUN/lock: it goes with the process, however that ends, and the file stays.

    Raises:
        TrainingError: if another process has it.
        InvalidArgumentError: if the folder cannot be written.
    """
    path = Path(run_dir) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise not_writable(run_dir, error) from error
    with stream:
        try:
            if fcntl is not None:
                fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            stream.seek(0)
            raise TrainingError(
                f"{run_dir} is being trained in by {stream.read().strip() or 'another process'}; wait for it, or name "
                "another run_dir"
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def check_same_run(config: Config, manifests: Mapping[str, Manifest | None]) -> dict[str, tuple[object, object]]:
    """What differs from how the run that is gone on with was trained: key -> (before, now).

    Raises:
        InvalidArgumentError: if anything but the length differs and `change` is not set; lists all of it.
    """
    folder = run_to_go_on(config.resume, config.run_dir)
    if folder is None:
        return {}
    found = changes(saved_config(folder), asdict(config))
    known = read_history(folder)
    before = known[-1].get("manifests", {}) if known else {}
    for key, content in fingerprints(manifests).items():
        if key in before and key not in found and before[key] != content:
            found[key] = (f"videos {before[key]}", f"videos {content}")
    meant = [f"{key} {was} -> {now}" for key, (was, now) in found.items() if key not in LENGTH]
    if meant and not config.change:
        raise InvalidArgumentError(
            f"{folder} was trained otherwise so far: {', '.join(meant)}; leave out what differs, or say that it is "
            "meant: change=true"
        )
    return found


def fingerprints(manifests: Mapping[str, Manifest | None]) -> dict[str, str]:
    """What tells one manifest from another: the first digits of a hash over its videos and labels, by option."""
    return {key: _fingerprint(manifest) for key, manifest in manifests.items() if manifest is not None}


def _fingerprint(manifest: Manifest) -> str:
    content = hashlib.sha256(json.dumps(manifest.class_names).encode())
    for entry in manifest.usable:
        content.update(f"{entry.path}\0{entry.label_id}\n".encode("utf-8", "surrogateescape"))
    return content.hexdigest()[:12]


def read_history(run_dir: str | Path) -> list[dict[str, Any]]:
    """One entry for each time that a run was started or gone on with; empty for a run of an earlier version."""
    path = Path(run_dir) / "history.json"
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []
    except ValueError as error:
        raise InvalidArgumentError(f"{path} cannot be read ({error}); remove it to go on without it") from error


def write_start(
    config: Config,
    overrides: Sequence[str],
    resumed_at: int,
    changed: Mapping[str, tuple[object, object]],
    manifests: Mapping[str, Manifest | None],
) -> None:
    """Write down that training starts or goes on: history.json, then config.json and overrides.json."""
    run_dir = Path(config.run_dir)
    entry = {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "rlt": rlt.__version__,
        "resumed_at": resumed_at,
        "overrides": list(overrides),
        "changed": {key: list(pair) for key, pair in changed.items()},
        "manifests": fingerprints(manifests),
    }
    write_json(run_dir / "history.json", [*read_history(run_dir), entry])
    write_json(run_dir / "config.json", asdict(config))  # before the last one, which makes the folder one of a run
    write_json(run_dir / "overrides.json", list(overrides))
