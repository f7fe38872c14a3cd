"""`rlt train`, `rlt evaluate` and `rlt frontier`: Hydra's `key=value` overrides on the command line."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typing_extensions import override

from rlt.cli.console import output, progress, say, show
from rlt.errors import MissingDependencyError

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Presets and values, see docs/configuration.md.", show_default=False),
]


class WithOptions(TyperCommand):
    """A command whose help ends with every option of the configuration, which is read only when it is asked for."""

    @override
    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from rlt.conf.reference import help_text

        self.epilog = help_text()
        super().format_epilog(ctx, formatter)


def train(overrides: Overrides = None) -> None:
    """Fine-tune a model, or train it from scratch: rlt train experiment=NAME data.train=FILE run_dir=DIR.

    Presets: experiment, data, model, tokenizer (rlt, budget, none, random, uniform_frames), logger. resume=auto goes
    on with a run that was cut off.
    """
    _require("lightning", "hydra", "kornia", "pyarrow")
    from rlt.conf.saved import training_config
    from rlt.training.run import train as run_training

    given = overrides or []
    config = training_config(given)
    _say_what_is_not_read("train", given)
    with progress("Training") as update:
        summary = run_training(config, overrides=given, say=say, on_progress=update)
    kept = f"{summary.tokens_kept:.1%} of the tokens kept"
    accuracy = "" if summary.val_top1 is None else f", validation top-1 {summary.val_top1:.1%}"
    show(f"{summary.run_dir}: step {summary.steps}, {summary.train_seconds:.1f} s of training, {kept}{accuracy}")
    if summary.failed:
        say(f"replaced videos: {len(summary.failed)}, see {summary.run_dir}/summary.json")


def evaluate(overrides: Overrides = None) -> None:
    """Evaluate a checkpoint or a run on a manifest: rlt evaluate checkpoint=RUN data.test=FILE tokenizer=rlt.

    json=FILE keeps the numbers, predictions=FILE.parquet one row per video, pictures=DIR the confusion matrix;
    compare_with=FILE.parquet compares with the predictions of another evaluation, pair by pair.
    """
    from rlt.cli.show import evaluation_report, paired_report
    from rlt.evaluation.run import evaluate_config, evaluation_config
    from rlt.plots import require_viz

    given = overrides or []
    config = evaluation_config(given)
    # What is needed in the end is asked for before hours of work.
    if config.predictions is not None:
        _require("pyarrow")
    if config.pictures is not None:
        require_viz()
    _say_what_is_not_read("evaluate", given)
    with progress("Evaluating") as update:
        run = evaluate_config(config, on_progress=update)
    output.print(evaluation_report(run.result))
    if run.comparison is not None:
        output.print(paired_report(run.comparison))


def frontier(overrides: Overrides = None) -> None:
    """Hold fewer tokens against the dense network: rlt frontier checkpoint=RUN data.test=FILE json=FILE.

    Every rule, option and way to count run lengths, beside random tokens, fewer frames and token merging at the same
    cost: agreement with the dense answer, KL divergence, cosine of the features and accuracy, with paired intervals.
    pictures=DIR draws it. What was measured is kept beside the JSON file; the same line goes on after Ctrl-C.
    """
    from rlt.cli.show import frontier_report
    from rlt.evaluation.run import evaluation_config
    from rlt.frontier import frontier_config
    from rlt.plots import require_viz

    given = overrides or []
    config = evaluation_config(given)
    if config.pictures is not None:
        require_viz()
    _say_what_is_not_read("frontier", given)
    with progress("Measuring") as update:
        result = frontier_config(config, on_progress=update)
    output.print(frontier_report(result))


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f'{", ".join(missing)} cannot be imported; install what experiments need with: pip install "rlt[train]"'
        )


def _say_what_is_not_read(command: str, overrides: list[str]) -> None:
    """Both commands take one set of options, so that one line serves both; what has no effect is said."""
    from rlt.conf import typed
    from rlt.conf.schema import is_read_by

    unread = [key for key in typed(overrides) if not is_read_by(command, key)]
    if unread:
        say(f"warning: without effect on rlt {command}: {', '.join(unread)}")
