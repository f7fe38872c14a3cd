"""What can be configured, as dataclasses: `rlt train --help` and the configuration reference are made from them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints

from rlt.checkpoints.models import MODELS
from rlt.checks import at_least, one_of
from rlt.data.augment import AugmentConfig
from rlt.data.clips import ViewConfig
from rlt.errors import InvalidArgumentError
from rlt.network.run_lengths import RunLengthParts
from rlt.tokens import RULES, Rule, make_rule
from rlt.video import DECODERS, ClipSpec

PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}
"""Values of `TrainerConfig.precision`, and what Lightning calls them."""
PROFILERS = {"simple": "SimpleProfiler", "advanced": "AdvancedProfiler", "pytorch": "PyTorchProfiler"}
"""Values of `TrainerConfig.profiler`, and what Lightning calls them."""
NO_CHECKPOINT = "none"
"""Value of `Config.checkpoint` that says that random weights are meant."""


@dataclass
class DataConfig:
    """Manifests (`rlt prepare`) and how clips are taken from their videos."""

    train: str | None = None
    """Manifest to train on, or a file of `rlt tokens`."""
    val: str | None = None
    """Manifest that training is validated on, or a file of `rlt tokens`; a manifest is also evaluated where there is no
    test manifest."""
    test: str | None = None
    """Manifest to evaluate."""
    clip: ClipSpec = field(default_factory=ClipSpec)
    """Frames, stride, size and sampling of a clip."""
    views: ViewConfig = field(default_factory=ViewConfig)
    """Clips and crops per video in `rlt evaluate`."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation in training."""
    decoder: str = "pyav"
    """pyav, pyav_whole, torchcodec, or another name in `rlt.video.DECODERS`."""
    num_workers: int = 0
    """Processes that decode, per device; 0 decodes in the training process."""

    def __post_init__(self) -> None:
        one_of(DECODERS, **{"data.decoder": self.decoder})
        _ = self.clip.frame_size  # clips of one batch are of one size


@dataclass
class TokenizerConfig:
    """Which tokens the network gets: `tokenizer=NAME` chooses a rule, these are its options. Those that are not given
    stay as the rule has them. Of threshold, keep_ratio and max_tokens the last that is given replaces the others."""

    rule: str = "rlt"
    """Name of the rule, set by `tokenizer=NAME`: "rlt" drops repeats, "budget" keeps those that differ most, "none"
    keeps all tokens, "random" a random subset, "uniform_frames" all tokens of evenly spread time steps, both as many
    as "rlt" or "budget" with the options below would. "drawn" trains one network for a range: it draws the threshold of
    each clip from `tokenizer.lowest` to `tokenizer.highest`, or the share with `tokenizer.over=keep_ratio`. Or a file
    that `rlt calibrate` wrote."""
    threshold: float | None = None
    """For "rlt", "random" and "uniform_frames": see `rlt.keep_mask`; 0 or more, 0.1 if nothing is given."""
    keep_ratio: float | None = None
    """For "budget", "random" and "uniform_frames": share of each clip's tokens, above 0 and up to 1."""
    max_tokens: int | None = None
    """For "budget", "random" and "uniform_frames": number of each clip's tokens at most, at least 1."""

    reference: str | None = None
    """What a token is compared with: "previous" (the paper) or "anchor", see `rlt.Threshold`."""
    exposure: str | None = None
    """"gain" undoes automatic exposure, flicker and fades first, "none" (the paper) does not, see `rlt.Threshold`."""
    motion: str | None = None
    """"global" undoes one shift of the whole picture first, "none" (the paper) does not, see `rlt.Threshold`."""

    def build(self) -> Rule:
        """The rule itself.

        Raises:
            InvalidArgumentError: for an unknown rule, options that it does not have, or clips that share a budget.
        """
        rule = make_rule(
            self.rule, **{option.name: getattr(self, option.name) for option in fields(self) if option.name != "rule"}
        )
        if getattr(rule, "shared", False):
            raise InvalidArgumentError(
                "tokenizer.shared is true, but clips are tokenized one by one here; leave it out"
            )
        return rule

    @staticmethod
    def presets() -> dict[str, TokenizerConfig]:
        """One of each registered rule, with whatever further fields it has."""
        return {name: _tokenizer_class(kind)(rule=name) for name, kind in RULES.items()}


def _tokenizer_class(kind: type[Any]) -> type[TokenizerConfig]:
    known = {given.name for given in fields(TokenizerConfig)} | {"like"}
    own = [(given.name, given) for given in fields(kind) if given.name not in known]
    if not own:
        return TokenizerConfig
    hints = get_type_hints(kind)
    unset = dataclasses.MISSING
    added = [
        (name, hints[name], field(default=None if given.default is unset else given.default)) for name, given in own
    ]
    return dataclasses.make_dataclass(f"{kind.__name__}Config", added, bases=(TokenizerConfig,))


@dataclass
class ModelConfig:
    """The network."""

    name: str | None = "vit_base"
    """One of `rlt models`. In evaluation the checkpoint tells, and one that is typed must be its own."""
    drop_path: float = 0.1
    """Stochastic depth of the last block, 0 or more and below 1."""
    length_encoding: str = "none"
    """"learned" tells the network how long each token stands; starts at zero."""
    new_head: bool = False
    """Take a fresh head where the checkpoint has none or another, as after pretraining."""
    num_heads: int | None = None
    """Attention heads where they are not those of the named size. No tensor of a VideoMAE file tells their number."""
    merge_per_block: int = 0
    """Tokens that each block merges away (ToMe), 0 or more; best with tokenizer=none."""
    run_lengths: str | None = None
    """Where run lengths count: "aware" everywhere, "ignored" nowhere (the paper), or parts, such as
    "pooling+attention". If not given, evaluation does as the checkpoint says, which is "aware" for networks that were
    trained on all tokens, and training ignores them unless the checkpoint is one of ours that says otherwise."""

    def __post_init__(self) -> None:
        one_of((None, *MODELS), **{"model.name": self.name})
        one_of(("none", "learned"), **{"model.length_encoding": self.length_encoding})
        at_least(0, **{"model.merge_per_block": self.merge_per_block})
        at_least(1, **{"model.num_heads": self.num_heads})
        if self.run_lengths is not None:
            RunLengthParts.of(self.run_lengths)


@dataclass
class OptimizerConfig:
    """AdamW, layer-wise decay of the learning rate, warm-up and cosine."""

    lr: float = 1.5e-3
    """Peak learning rate for 256 clips per step; scaled linearly with the clips that a step really holds."""
    weight_decay: float = 0.05
    """Decoupled weight decay, 0 or more; not applied to biases, norms and the length encoding."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's two decay rates of its moments."""
    layer_decay: float = 0.75
    """Factor of the learning rate from each block to the one before it, above 0 and up to 1; 1 = none."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    warmup_fraction: float = 0.05
    """Share of all steps that is warm-up where warmup_steps is 0."""
    min_lr: float = 1e-6
    """Learning rate at the end of the cosine, for 256 clips per step like `lr`."""

    def __post_init__(self) -> None:
        for name, low, high in (("lr", 0, math.inf), ("layer_decay", 0, 1)):
            value = getattr(self, name)
            if not low < value <= high:
                raise InvalidArgumentError(f"optimizer.{name} is {value}; above {low} and up to {high:g} is needed")
        for name, low, high in (("weight_decay", 0, math.inf), ("warmup_steps", 0, math.inf), ("min_lr", 0, self.lr)):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidArgumentError(f"optimizer.{name} is {value}; {low} to {high:g} is needed")
        if not 0 <= self.warmup_fraction < 1:
            raise InvalidArgumentError(
                f"optimizer.warmup_fraction is {self.warmup_fraction}; 0 or more and below 1 is needed"
            )
        if len(self.betas) != 2:
            raise InvalidArgumentError(f"optimizer.betas is {self.betas}; two numbers are needed")


@dataclass
class TrainerConfig:
    """How long, how much at once, where, and in which precision."""

    max_steps: int | None = None
    """Optimizer steps of the whole run."""
    max_epochs: int | None = None
    """Length in passes over the training manifest, instead of max_steps."""
    batch_size: int = 8
    """Clips per device and step."""
    token_budget: int | None = None
    """Kept tokens per device and step, instead of batch_size; needs `rlt prepare --measure-tokens`."""
    accumulate: int = 1
    """Batches whose gradients are added up to one optimizer step."""
    precision: str = "float32"
    """float32, bfloat16 or float16 (the last two by autocast)."""
    gradient_clip: float | None = None
    """Largest norm of the gradient; none by default."""
    accelerator: str = "auto"
    """cpu, gpu or auto."""
    devices: int = 1
    """Devices per machine."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """auto, ddp or fsdp, or another name that Lightning knows."""
    validate_every: int | None = None
    """Steps between validations, besides the one at the end. The best weights by val/top1 stay in RUN/best."""
    early_stopping: int | None = None
    """Stop after so many validations without a better val/top1."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 10
    """Steps between log entries; the first step has one too."""
    limit_train_batches: int | None = None
    """For trials: take so many batches, again and again. Such a run cannot be gone on with."""
    limit_val_batches: int | None = None
    """For trials: validate on so many batches."""
    overfit_batches: int | None = None
    """For trials: train and validate on the same so many batches, to see that the network can learn them."""
    profiler: str | None = None
    """simple, advanced or pytorch: Lightning's profiler of that name, whose report lies in the run's folder."""
    compile: bool = False
    """Compile the network with `torch.compile`: one graph for any token counts."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is then what is kept, such as 0.999."""

    def __post_init__(self) -> None:
        one_of(PRECISIONS, **{"trainer.precision": self.precision})
        one_of((None, *PROFILERS), **{"trainer.profiler": self.profiler})
        whole = {name: value for name, value in vars(self).items() if isinstance(value, int)}
        at_least(1, **{f"trainer.{name}": value for name, value in whole.items() if not isinstance(value, bool)})
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InvalidArgumentError(f"trainer.ema_decay is {self.ema_decay}; between 0 and 1 is needed")


@dataclass
class LoggerConfig:
    """Where measurements go, all in the run's folder."""

    csv: bool = True
    """metrics.csv."""
    tensorboard: bool = True
    """Event files for TensorBoard."""
    wandb: bool = False
    """Weights & Biases (`logger=wandb`)."""
    project: str = "rlt"
    """Project in Weights & Biases."""
    name: str | None = None
    """Name of the run in Weights & Biases; that of its folder if not given."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run in Weights & Biases."""
    group: str | None = None
    """Group of the run in Weights & Biases."""
    offline: bool = False
    """Keep Weights & Biases' records on disk, to be uploaded later by `wandb sync`."""


@dataclass
class FrontierConfig:
    """What `rlt frontier` holds against the dense network."""

    thresholds: list[float] = field(default_factory=lambda: [0.05, 0.1, 0.2, 0.4, 0.8])
    """Thresholds of the rules, each with all options and baselines."""
    keep_ratios: list[float] = field(default_factory=lambda: [0.25])
    """Shares of tokens that budgets keep, each with all options and baselines."""
    seeds: int = 3
    """Draws of each random arm."""
    cache: str | None = None
    """Folder for the numbers of single videos, which are not measured twice; beside the JSON file if not given."""

    def __post_init__(self) -> None:
        at_least(1, **{"frontier.seeds": self.seeds})


@dataclass
class Config:
    """A whole experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    frontier: FrontierConfig = field(default_factory=FrontierConfig)
    checkpoint: str | None = None
    """Weights to start from or to evaluate: a file, a folder, a hub id, or the folder of a run. Where model.new_head is
    set, as in the presets for fine-tuning, training needs it; none says that random weights are meant."""
    run_dir: str = "runs/default"
    """Folder of the run."""
    resume: str | None = None
    """auto goes on from the run's newest readable checkpoint, if there is one; a path from that one. What is not typed
    is as the run had it."""
    change: bool = False
    """With resume: what is typed differs from how the run was trained so far, and this is meant."""
    seed: int = 0
    """Everything random is a function of it."""
    device: str = "auto"
    """Device of `rlt evaluate` and `rlt frontier`: cpu, cuda or auto."""
    batch_videos: int = 1
    """Videos whose views go through the network together in `rlt evaluate`: more of them fill a GPU better."""
    max_videos: int | None = None
    """Evaluate only so many videos, evenly spread over the manifest."""
    predictions: str | None = None
    """Parquet file for the predictions of `rlt evaluate`, one row per video."""
    compare_with: str | None = None
    """Predictions of another evaluation of the same videos, to be compared with pair by pair."""
    pictures: str | None = None
    """Folder for the confusion matrix and the histogram of tokens of `rlt evaluate`, or the plot of `rlt frontier`."""
    json: str | None = None
    """File for the numbers of `rlt evaluate` or `rlt frontier`."""

    def __post_init__(self) -> None:
        self.tokenizer.build()


_TRAINING = ("data.train", "data.augment", "model.drop_path", "model.length_encoding", "model.new_head", "optimizer",
             "trainer", "logger", "run_dir", "resume", "change")  # fmt: skip
_FILES_OF_EVALUATION = ("batch_videos", "predictions", "compare_with")
NOT_READ_BY = {
    "train": ("data.test", "data.views", "device", "max_videos", "pictures", "json", "frontier", *_FILES_OF_EVALUATION),
    "evaluate": (*_TRAINING, "frontier"),
    "frontier": (
        *_TRAINING,
        "data.num_workers",
        "tokenizer",
        "model.run_lengths",
        "model.merge_per_block",
        *_FILES_OF_EVALUATION,
    ),
}
"""Options and sections that a command does not read, all but `READ_BY_ALL`."""
READ_BY_ALL = ("trainer.precision",)
"""Exceptions from `NOT_READ_BY`."""


def is_read_by(command: str, key: str) -> bool:
    """Whether `rlt train`, `rlt evaluate` or `rlt frontier` reads an option or a section."""
    return key in READ_BY_ALL or not any(key == other or key.startswith(f"{other}.") for other in NOT_READ_BY[command])
