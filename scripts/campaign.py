"""Measurements, each a process of its own with a time limit and a JSON file; they go on where they were ended.

A piece whose JSON says "done" is not run again. One that was killed with the campaign left no JSON and is run again.
One that failed or took too long left a JSON that says why, and is tried again after all others.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlt.files import write_json

DONE, FAILED = "done", "failed"
_SECONDS_BETWEEN_LINES = 10.0
_LEAST_SECONDS = 20.0
"""What a piece needs to have a chance."""


@dataclass(frozen=True)
class Piece:
    """One measurement."""

    name: str
    """Also of its JSON file."""
    shows: str
    """What it is for, for people."""
    arguments: tuple[str, ...]
    """Of the Python interpreter; "{json}" stands for the file that the process has to write, "{folder}" for the one of
    all results, where it may leave more."""
    limit_seconds: int
    """After which it is ended."""


def read_state(folder: Path, piece: Piece) -> dict[str, Any] | None:
    """What the JSON of a piece says; None if it was never finished."""
    path = folder / f"{piece.name}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def run_campaign(
    pieces: Sequence[Piece],
    folder: Path,
    *,
    budget_seconds: float,
    environment: dict[str, str] | None = None,
    say: Callable[[str], None] = lambda text: print(text, flush=True),
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Run what is missing, the first of the list first, until the time is over; gives the names of what is not done.

    A piece that only the end of the whole time cut short leaves no JSON.
    """
    begin = clock()
    states = {piece.name: read_state(folder, piece) for piece in pieces}
    missing = [piece for piece in pieces if (states[piece.name] or {}).get("state") != DONE]
    todo = sorted(missing, key=lambda piece: states[piece.name] is not None)
    say(f"{len(pieces) - len(todo)} of {len(pieces)} pieces are there, {len(todo)} to run")
    done = set[str]()
    for number, piece in enumerate(todo, start=1):
        left = budget_seconds - (clock() - begin)
        if left < min(_LEAST_SECONDS, piece.limit_seconds):
            say(f"the time is over; {len(todo) - number + 1} pieces are left for the next run")
            break
        limit = min(piece.limit_seconds, left)
        say(f"[{number} of {len(todo)}] {piece.name}: {piece.shows} (at most {limit:.0f} s, {left:.0f} s are left)")
        content = _run(piece, folder, limit, environment, say)
        why = f": {content['reason']}" if content["reason"] else ""
        say(f"  {content['state']} after {content['seconds']:.0f} s{why}")
        if content["state"] == DONE:
            done.add(piece.name)
        elif content["seconds"] >= limit and limit < piece.limit_seconds:
            continue
        write_json(folder / f"{piece.name}.json", content)
    return [piece.name for piece in missing if piece.name not in done]


def _run(
    piece: Piece, folder: Path, limit: float, environment: dict[str, str] | None, say: Callable[[str], None]
) -> dict[str, Any]:
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    log, numbers = work / f"{piece.name}.log", work / f"{piece.name}.json"
    numbers.unlink(missing_ok=True)
    places = {"{json}": str(numbers), "{folder}": str(folder)}
    command = [sys.executable, *(_filled(argument, places) for argument in piece.arguments)]
    begin = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )
        try:
            ended = _wait(process, begin + limit, lambda: say(f"    {_last_line(log)}"))
        finally:
            _end(process)
    seconds = time.monotonic() - begin
    reason = ""
    if not ended:
        reason = f"ended after {limit:.0f} s"
    elif process.returncode != 0 or not numbers.exists():
        reason = f"exit code {process.returncode}: {_last_line(log)}"
    result = json.loads(numbers.read_text(encoding="utf-8")) if not reason else None
    return {
        "piece": piece.name,
        "state": FAILED if reason else DONE,
        "reason": reason,
        "seconds": seconds,
        "command": ["python", *piece.arguments],
        "result": result,
    }


def _filled(argument: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        argument = argument.replace(name, place)
    return argument


def _wait(process: subprocess.Popen[bytes], until: float, tell: Callable[[], None]) -> bool:
    """Whether it ended by itself in time."""
    while (left := until - time.monotonic()) > 0:
        try:
            process.wait(min(left, _SECONDS_BETWEEN_LINES))
        except subprocess.TimeoutExpired:
            tell()
        else:
            return True
    return process.poll() is not None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a piece with all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # which has a session, and so a group, of its own
    process.wait()


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output yet"
