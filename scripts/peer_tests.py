"""Run transformers' own tests of models that `rlt.patch` knows, as they are and with every model patched.

python scripts/peer_tests.py CHECKOUT [MODEL...] [--json FILE]

CHECKOUT is the folder of a checkout of transformers, of the installed version; MODEL a folder of its tests/models. A
test that fails patched and passes unpatched is an error, unless KNOWN says why it cannot pass. Tests that need a hub,
a GPU or long downloads are skipped, as transformers' own defaults have it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from markdown_tables import table

from rlt.errors import InvalidArgumentError, RltError
from rlt.files import write_json

MODELS = (
    "siglip",
    "siglip2",
    "clip",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "videomae",
    "vivit",
    "timesformer",
    "vjepa2",
)
NO_OTHER_ATTENTION = "compares or sets implementations of attention, of which a patched model has its own"
NO_WEIGHTS = "asks for attention weights, which packed attention does not have"
KNOWN = {
    "test_eager_matches_sdpa_inference": NO_OTHER_ATTENTION,
    "test_can_set_attention_dynamically": NO_OTHER_ATTENTION,
    "test_sdpa_can_dispatch_composite_models": NO_OTHER_ATTENTION,
    "test_sdpa_can_dispatch_non_composite_models": NO_OTHER_ATTENTION,
    "test_attention_outputs": NO_WEIGHTS,
    "test_retain_grad_hidden_states_attentions": NO_WEIGHTS,
    "test_capture_outputs_decorator": NO_WEIGHTS,
    "test_model_outputs_equivalence": NO_WEIGHTS,
    "test_for_image_classification": "ends with grey pictures of one channel; frames have three",
}
"""Why a test cannot pass on a patched model, by its name without the number of a case."""


@dataclass
class Outcomes:
    """What came of the tests of a model, by name: passed, failed or skipped."""

    by_test: dict[str, str]
    patched: int

    def count(self, outcome: str) -> int:
        """Number of tests with this outcome."""
        return sum(found == outcome for found in self.by_test.values())


def run_tests(checkout: Path, model: str, *, patched: bool) -> Outcomes:
    """Run the module of one model in a process of its own.

    Raises:
        RltError: if the tests cannot be collected, or no model was patched.
    """
    module = Path("tests", "models", model, f"test_modeling_{model}.py")
    scripts = str(Path(__file__).parent)
    path = os.pathsep.join([scripts, str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    plugin = ["-p", "peer_tests_plugin"] if patched else []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", f"--junitxml={report}"]
        run = subprocess.run(
            [*command, *plugin, f"--rootdir={checkout}", str(module)],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if run.returncode not in (0, 1) or not report.exists():
            raise RltError(f"{checkout / module}: the tests did not run: {(run.stdout + run.stderr).strip()[-2000:]}")
        outcomes = read_report(report)
    if patched and not outcomes.patched:
        raise RltError(f"{checkout / module}: no model was patched; MODEL is one that rlt.patch knows")
    return outcomes


def read_report(report: Path) -> Outcomes:
    """The outcomes in a JUnit file."""
    suite = ElementTree.parse(report).getroot()
    outcomes: dict[str, str] = {}
    for case in suite.iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        test = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        if outcomes.get(test) != "failed":  # subtests are cases of the same name
            outcomes[test] = outcome
    patched = sum(int(found.get("value", 0)) for found in suite.iter("property") if found.get("name") == "patched")
    return Outcomes(outcomes, patched)


def reason(test: str) -> str | None:
    """Why a test cannot pass, if that is known."""
    name = re.sub(r"_\d+(_.*)?$", "", test.partition("::")[2])
    return KNOWN.get(name)


def compare(model: str, plain: Outcomes, patched: Outcomes) -> tuple[dict[str, object], list[str]]:
    """A row of the table, and the tests that fail only on patched models and are not known to."""
    failed = [test for test, outcome in patched.by_test.items() if outcome == "failed"]
    known = {test: found for test in failed if plain.by_test.get(test) != "failed" and (found := reason(test))}
    new = [test for test in failed if plain.by_test.get(test) != "failed" and test not in known]
    both = [test for test in failed if plain.by_test.get(test) == "failed"]
    for test in failed:
        print(f"  {test}: {'fails unpatched, too' if test in both else known.get(test, 'fails only patched')}")
    row: dict[str, object] = {
        "model": model,
        "passed unpatched": plain.count("passed"),
        "passed patched": patched.count("passed"),
        "fail both ways": len(both),
        "cannot pass": len(known),
        "fail only patched": len(new),
        "skipped": patched.count("skipped"),
        "models patched": patched.patched,
    }
    return row, new


def main() -> int:
    """0 if nothing fails that is not known to, 1 if something does, 2 for arguments that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("models", nargs="*", default=[], metavar="MODEL")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, new = [], []
    try:
        checkout = options.checkout.resolve()
        models = options.models or [name for name in MODELS if (checkout / "tests" / "models" / name).is_dir()]
        missing = [name for name in models if not (checkout / f"tests/models/{name}/test_modeling_{name}.py").is_file()]
        if missing or not models:
            raise InvalidArgumentError(
                f"{checkout} has no tests/models/{(missing or MODELS)[0]}; the folder of a checkout of transformers is "
                "needed, and names of folders of its tests/models"
            )
        for model in models:
            print(f"{model}: unpatched, then patched ...", flush=True)
            plain = run_tests(checkout, model, patched=False)
            row, failed = compare(model, plain, run_tests(checkout, model, patched=True))
            rows.append(row)
            new += [f"{model}: {test}" for test in failed]
        if options.json:
            write_json(options.json, {"models": rows, "known": KNOWN, "new": new})
    except RltError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table([tuple(rows[0]), *(tuple(map(str, row.values())) for row in rows)]))
    return 1 if new else 0


if __name__ == "__main__":
    sys.exit(main())
