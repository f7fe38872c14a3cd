"""`rlt train`, `rlt evaluate` and `rlt frontier`: Hydra's `key=value` overrides on the command line."""

from __future__ import annotations

import json as json_text
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand
from typing_extensions import override

from rlt.checks import exclusive
from rlt.cli.console import kept_after_ctrl_c, output, progress, say, show
from rlt.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from rlt.conf.schema import Config

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Presets and values, see docs/configuration.md.", show_default=False),
]
PrintConfig = Annotated[
    bool, typer.Option("--print-config", help="Show the whole configuration as JSON, and do nothing else.")
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Also write the numbers to this file, as json=FILE.", show_default=False)
]


class WithOptions(TyperCommand):
    """A command whose help ends with every option of the configuration, which is read only when it is asked for."""

    @override
    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        from rlt.conf.reference import help_text

        self.epilog = help_text()
        super().format_epilog(ctx, formatter)


def train(
    overrides: Overrides = None,
    print_config: PrintConfig = False,
    test: Annotated[
        bool, typer.Option("--test", help="Then evaluate on data.test, as rlt evaluate does; RUN/test.json has it.")
    ] = False,
) -> None:
    """Fine-tune a model, or train it from scratch: rlt train experiment=NAME data.train=FILE run_dir=DIR.

    Presets: experiment, data, model, tokenizer (rlt, budget, none, random, uniform_frames, drawn),
    logger. A run that was cut off goes on with: rlt train run_dir=DIR resume=auto.
    """
    from rlt.conf.saved import training_config

    given = overrides or []
    config = training_config(given)
    if print_config:
        return _show_config(config)
    _require("lightning", "hydra", "kornia", "pyarrow")
    from rlt.training.run import is_first_process
    from rlt.training.run import train as run_training

    if test and config.data.test is None:
        raise InvalidArgumentError("--test needs a manifest to evaluate on: data.test=FILE")
    _say_what_is_not_read(given, "train", *(["evaluate"] if test else []))
    with progress("Training") as update:
        summary = run_training(config, overrides=given, say=say, on_progress=update)
    if not is_first_process():
        return None
    kept = f"{summary.tokens_kept:.1%} of the tokens kept"
    accuracy = "" if summary.val_top1 is None else f", validation top-1 {summary.val_top1:.1%}"
    best = "" if summary.best_val_top1 is None else f" (best {summary.best_val_top1:.1%}, see best/)"
    show(f"{summary.run_dir}: step {summary.steps}, {summary.train_seconds:.1f} s of training, {kept}{accuracy}{best}")
    if summary.failed:
        say(f"replaced videos: {len(summary.failed)}, see {summary.run_dir}/summary.json")
    if test:
        _evaluate(replace(config, checkpoint=config.run_dir, json=str(summary.run_dir / "test.json")))
    return None


def evaluate(overrides: Overrides = None, json: JsonFile = None, print_config: PrintConfig = False) -> None:
    """Evaluate a checkpoint or a run on a manifest: rlt evaluate checkpoint=RUN data.test=FILE tokenizer=rlt.

    json=FILE keeps the numbers, predictions=FILE.parquet one row per video, pictures=DIR the confusion matrix;
    compare_with=FILE.parquet compares with the predictions of another evaluation, pair by pair.
    """
    from rlt.evaluation.run import evaluation_config

    given = overrides or []
    config = _with_json(evaluation_config(given), json)
    if print_config:
        return _show_config(config)
    _say_what_is_not_read(given, "evaluate")
    return _evaluate(config)


def _evaluate(config: Config) -> None:
    from rlt.cli.show import evaluation_report, paired_report
    from rlt.evaluation.run import evaluate_config
    from rlt.plots import require_viz

    # What is needed in the end is asked for before hours of work.
    if config.predictions is not None:
        _require("pyarrow")
    if config.pictures is not None:
        require_viz()
    with progress("Evaluating") as update:
        run = evaluate_config(config, on_progress=update)
    output.print(evaluation_report(run.result))
    if run.comparison is not None:
        output.print(paired_report(run.comparison))


def frontier(overrides: Overrides = None, json: JsonFile = None, print_config: PrintConfig = False) -> None:
    """Hold fewer tokens against the dense network: rlt frontier checkpoint=RUN data.test=FILE json=FILE.

    Every rule, option and way to count run lengths, beside random tokens, fewer frames and token merging at the same
    cost: agreement with the dense answer, KL divergence, cosine of the features and accuracy, with paired intervals.
    A folder of VideoMAE, ViViT or V-JEPA 2 of transformers goes through rlt.patch. pictures=DIR draws it. What was
    measured is kept beside the JSON file; the same line goes on after Ctrl-C.
    """
    from rlt.cli.show import frontier_report
    from rlt.evaluation.run import evaluation_config
    from rlt.frontier import cache_folder, frontier_config
    from rlt.plots import require_viz

    given = overrides or []
    config = _with_json(evaluation_config(given, patched=True), json)
    if print_config:
        return _show_config(config)
    if config.pictures is not None:
        require_viz()
    _say_what_is_not_read(given, "frontier")
    with progress("Measuring") as update, kept_after_ctrl_c(cache_folder(config)):
        result = frontier_config(config, on_progress=update)
    output.print(frontier_report(result))
    return None


def _show_config(config: Config) -> None:
    show(json_text.dumps(asdict(config), indent=2, ensure_ascii=False))


def _with_json(config: Config, path: Path | None) -> Config:
    """The configuration with the file of --json, which is json=FILE as the other commands write it."""
    if path is None:
        return config
    exclusive(**{"json": config.json, "--json": path})
    return replace(config, json=str(path))


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f'{", ".join(missing)} cannot be imported; install what experiments need with: pip install "rlt[train]"'
        )


def _say_what_is_not_read(overrides: list[str], *commands: str) -> None:
    """All commands take one set of options, so that one line serves all; what has no effect is said."""
    from rlt.conf import typed
    from rlt.conf.schema import is_read_by

    unread = [key for key in typed(overrides) if not any(is_read_by(command, key) for command in commands)]
    if unread:
        say(f"warning: without effect on rlt {commands[0]}: {', '.join(unread)}")
