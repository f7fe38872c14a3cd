"""Data of a run as Lightning wants it: batches made in the workers, the same ones however often the run is cut off."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from typing_extensions import override

from rlt.checks import some
from rlt.conf.schema import Config
from rlt.data.batch import Collate, collate_evaluation
from rlt.data.clips import ViewConfig
from rlt.data.dataset import EvaluationDataset, EvaluationSample, TrainingDataset, TrainingSample
from rlt.data.loader import training_loader
from rlt.data.manifest import Manifest
from rlt.data.sampler import StepSampler
from rlt.data.stored import StoredCollate, StoredEvaluation, StoredTraining, check_augment
from rlt.data.token_files import TokenFile, token_settings
from rlt.errors import InvalidArgumentError
from rlt.network.vit import ViTConfig
from rlt.tokens import Budget, Drawn, Everything


class TrainingData(LightningDataModule):
    """Endless training batches from a given optimizer step on, and one view of every validation video."""

    def __init__(
        self,
        config: Config,
        training: Manifest,
        validation: Manifest | None,
        model: ViTConfig,
        *,
        start_step: int = 0,
        stored: Mapping[str, TokenFile] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        if not training.usable:
            raise InvalidArgumentError(f"{config.data.train} has no usable video; see its status column")
        if validation is not None and validation.class_names != training.class_names:
            raise InvalidArgumentError(
                f"{config.data.val} has the classes {some(validation.class_names)}, {config.data.train} has "
                f"{some(training.class_names)}; prepare both with the same labels"
            )
        for file in stored.values():
            file.check(token_settings(config.data.clip, config.tokenizer.build(), model.patches))
        if "data.train" in stored:
            check_augment(config.data.augment, str(config.data.train))
        self.config = config
        self.model = model
        self.stored = stored
        self.class_names = training.class_names
        self.training = training.usable
        self.validation = validation.usable if validation is not None else ()
        self.start_batch = start_step * config.trainer.accumulate
        self.expected_tokens = self._expected_tokens() if config.trainer.token_budget is not None else None

    @property
    def num_samples(self) -> int:
        """Usable training videos."""
        return len(self.training)

    @property
    def clips_per_step(self) -> float:
        """Clips of one optimizer step over all devices; their expected mean under a token budget."""
        trainer = self.config.trainer
        per_batch = float(trainer.batch_size)
        if self.expected_tokens is not None and trainer.token_budget is not None:
            per_batch = trainer.token_budget * len(self.expected_tokens) / sum(self.expected_tokens)
        return per_batch * trainer.devices * trainer.num_nodes * trainer.accumulate

    def sampler(self, rank: int, world_size: int) -> StepSampler:
        """Which samples each batch of a device holds."""
        trainer = self.config.trainer
        return StepSampler(
            self.num_samples,
            batch_size=trainer.batch_size if trainer.token_budget is None else None,
            token_budget=trainer.token_budget,
            expected_tokens=self.expected_tokens,
            seed=self.config.seed,
            rank=rank,
            world_size=world_size,
            start_step=self.start_batch,
        )

    @override
    def train_dataloader(self) -> DataLoader[TrainingSample]:
        config, data, patches = self.config, self.config.data, self.model.patches
        dataset: TrainingDataset | StoredTraining
        collate: Collate | StoredCollate
        if (file := self.stored.get("data.train")) is not None:
            dataset = StoredTraining(file, self.training, data.augment, patches, seed=config.seed)
            collate = StoredCollate(data.augment, len(self.class_names))
        else:
            dataset = TrainingDataset(self.training, data.clip, data.augment, seed=config.seed, decoder=data.decoder)
            rule = config.tokenizer.build()
            collate = Collate(rule, data.augment, len(self.class_names), patches, seed=config.seed)
        return training_loader(
            dataset,
            collate,
            self.sampler(*self._place()),
            num_workers=data.num_workers,
            pin_memory=config.trainer.accelerator != "cpu",
        )

    @override
    def val_dataloader(self) -> DataLoader[EvaluationSample] | list[DataLoader[EvaluationSample]]:
        if not self.validation:
            return []
        config, data = self.config, self.config.data
        rank, world_size = self._place()
        mine, patches = self.validation[rank::world_size], self.model.patches
        dataset: StoredEvaluation | EvaluationDataset
        if (file := self.stored.get("data.val")) is not None:
            dataset = StoredEvaluation(file, mine, patches)
        else:
            views, rule = ViewConfig(num_clips=1, num_crops=1), config.tokenizer.build()
            how = {"seed": config.seed, "decoder": data.decoder}
            dataset = EvaluationDataset(mine, data.clip, views, rule, patches, **how)  # type: ignore[arg-type]
        return DataLoader(
            dataset,
            batch_size=config.trainer.batch_size,
            collate_fn=collate_evaluation,
            num_workers=data.num_workers,
        )

    def _place(self) -> tuple[int, int]:
        """Number of this device, and of all."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _expected_tokens(self) -> list[float]:
        clip, rule = self.config.data.clip, self.config.tokenizer.build()
        grid = self.model.patches.grid((clip.num_frames, *clip.frame_size, 3))
        like = getattr(rule, "like", rule)
        if isinstance(like, Drawn) and like.over == "keep_ratio":
            like = Budget(keep_ratio=(like.lowest + like.highest) / 2)  # on average
        if isinstance(like, Budget | Everything):
            return [float(like.count(grid) if isinstance(like, Budget) else grid.num_tokens)] * len(self.training)
        unknown = [entry.path for entry in self.training if entry.tokens_kept is None]
        if unknown:
            raise InvalidArgumentError(
                f"trainer.token_budget needs the tokens of every video, {self.config.data.train} lacks those of "
                f"{len(unknown)}; prepare it with --measure-tokens"
            )
        return [grid.num_tokens * (entry.tokens_kept or 1.0) for entry in self.training]
