"""The Lightning module: one step, its loss and what is logged. The loop around it is Lightning's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from typing_extensions import override

from rlt.conf.schema import OptimizerConfig
from rlt.data.batch import Batch, EvaluationBatch
from rlt.errors import TrainingError
from rlt.network.vit import VisionTransformer
from rlt.training.optimizer import make_optimizer

_NAMED_FILES = 8
_SEEN = ("failed", "tokens_seen", "tokens_possible")
"""What a run that goes on remembers of its earlier parts."""


class VideoClassifier(LightningModule):
    """Trains a `VisionTransformer` on packed batches with soft targets.

    Args:
        model: the network; classes are those of its head.
        optimizer: see `OptimizerConfig`.
        total_steps: optimizer steps of the whole run.
        clips_per_step: clips of one optimizer step over all devices, for the scaling of the learning rate.
        seed: of stochastic depth; each step draws from a generator seeded by it and the step's place in the run.
    """

    def __init__(
        self,
        model: VisionTransformer,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        clips_per_step: float,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = optimizer
        self.total_steps = total_steps
        self.clips_per_step = clips_per_step
        self.seed = seed
        self.failed: dict[str, str] = {}
        """Videos that could not be decoded: path -> error."""
        self.tokens_seen = 0
        """Kept tokens of all training batches of the run on this device."""
        self.tokens_possible = 0
        """Tokens of the same batches when nothing is dropped."""
        self.imbalance: list[float] = []
        """Per step, tokens of the busiest device over the mean of all devices; empty with one device."""

    @override
    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch.packed)

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Random numbers are a function of the step's place in the run, so that a run can go on exactly.
        torch.manual_seed((self.seed * 1_000_003 + batch.position) * 65_537 + self.global_rank)

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy with soft targets, averaged over the clips of all devices.

        Raises:
            TrainingError: if the loss is not finite, naming the step and the files of the batch.
        """
        per_clip = -(batch.targets * F.log_softmax(self(batch).float(), dim=1)).sum(1)
        loss = per_clip.mean()
        if not torch.isfinite(loss):
            raise TrainingError(self._not_finite(batch, per_clip))
        self._say_replaced(batch)
        self.tokens_seen += batch.packed.num_tokens
        self.tokens_possible += batch.packed.num_dense
        rate = self.optimizers().param_groups[-1]["lr"]  # type: ignore[union-attr]
        values = {"train/loss": loss.detach(), "train/tokens_kept": batch.packed.share_kept, "train/lr": rate}
        self.log_dict(values, batch_size=len(batch.packed), prog_bar=True)
        return loss * self._share_of_clips(batch)

    @override
    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Accuracy and loss on the middle view of each video that can be decoded."""
        if batch.packed is None:
            return
        decoded = [sample for sample in batch.samples if sample.error is None]
        label_ids = torch.tensor([sample.label_id for sample in decoded], device=self.device)
        logits = self.model(batch.packed).float()
        top1 = (logits.argmax(1) == label_ids).float().mean()
        loss = F.cross_entropy(logits, label_ids)
        self.log_dict(
            {"val/top1": top1, "val/loss": loss}, on_epoch=True, prog_bar=True, sync_dist=True, batch_size=len(decoded)
        )

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["seen"] = {name: getattr(self, name) for name in _SEEN}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint.get("seen", {}).items():  # which those of earlier versions lack
            setattr(self, name, value)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer, schedule = make_optimizer(
            self.model,
            self.model.config.depth,
            self.optimizer_config,
            clips_per_step=self.clips_per_step,
            total_steps=self.total_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_clips(self, batch: Batch) -> Tensor | float:
        """Weight of this device's mean, so that averaging over devices gives the mean over all clips."""
        if self.trainer.world_size == 1:
            return 1.0
        mine = torch.tensor([len(batch.packed), batch.packed.num_tokens], dtype=torch.float32, device=self.device)
        gathered = self.all_gather(mine)
        assert isinstance(gathered, Tensor)
        clips, tokens = gathered.unbind(1)
        self.imbalance.append(float(tokens.max() / tokens.mean()))
        self.log("train/tokens_max_over_mean", self.imbalance[-1], batch_size=len(batch.packed))
        return mine[0] / clips.mean()

    def _say_replaced(self, batch: Batch) -> None:
        new = {path: error for path, error in batch.failed if path not in self.failed}
        self.failed.update(new)
        for path, error in new.items():
            self.print(f"replaced {path}: {error}")

    def _not_finite(self, batch: Batch, per_clip: Tensor) -> str:
        guilty = [path for path, value in zip(batch.paths, per_clip.tolist(), strict=False) if value - value != 0]
        names = ", ".join((guilty or list(batch.paths))[:_NAMED_FILES])
        return (
            f"loss is {per_clip.mean().item()} at step {self.global_step}; the clips are from {names}; "
            "look at these files, or lower optimizer.lr or use trainer.precision=float32"
        )
