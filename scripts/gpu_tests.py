"""Run the tests of a GPU and leave their counts as JSON; without a GPU, only collect them.

python scripts/gpu_tests.py FILE... --device cuda|cpu --json FILE
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from rlt.files import write_json
from rlt.measure import machine_info


class Counts:
    """What came of each test."""

    def __init__(self) -> None:
        self.collected = 0
        self.outcomes = {"passed": 0, "failed": 0, "skipped": 0}
        self.failed: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Count what will run."""
        self.collected = len(session.items)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a test once: by its call, or by what kept it from one."""
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            self.outcomes[report.outcome] += 1
            if report.failed:
                self.failed.append(f"{report.nodeid}: {str(report.longrepr).splitlines()[-1][:200]}")
                print(f"failed: {self.failed[-1]}", flush=True)


def main() -> int:
    """0 if all could be imported; failed tests stand in the JSON, so that they are there to be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    counts, only = Counts(), [] if options.device != "cpu" else ["--collect-only"]
    root = Path(__file__).parents[1]
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", f"--rootdir={root}", *only, *options.files]
    code = pytest.main(arguments, plugins=[counts])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)
    result = {"collected": counts.collected, **counts.outcomes, "failures": counts.failed}
    write_json(options.json, {"suite": "tests", **result, "machine": machine_info(options.device)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
