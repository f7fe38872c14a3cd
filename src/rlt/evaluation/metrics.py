"""Accuracy over a data set. The only module of the package that imports torchmetrics for evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from rlt.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from torchmetrics import Metric

MAX_TOP = 5
"""Top-k accuracy is taken for this k, or for the number of classes where there are fewer."""


class ClassificationMetrics:
    """Top-1, top-k and the confusion matrix, video by video, by torchmetrics."""

    def __init__(self, num_classes: int) -> None:
        """Start with no videos.

        Raises:
            InvalidArgumentError: for fewer than 2 classes.
            MissingDependencyError: if torchmetrics cannot be imported.
        """
        if num_classes < 2:
            raise InvalidArgumentError(f"the model has {num_classes} classes; accuracy needs at least 2")
        try:
            from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
        except ImportError as error:
            raise MissingDependencyError(
                'evaluation needs torchmetrics, which cannot be imported; install with: pip install "rlt[train]"'
            ) from error
        self.top_k = min(MAX_TOP, num_classes)
        self._top1: Metric = MulticlassAccuracy(num_classes, average="micro")
        self._top_k: Metric = MulticlassAccuracy(num_classes, top_k=self.top_k, average="micro")
        self._confusion: Metric = MulticlassConfusionMatrix(num_classes)
        self._num_videos = 0

    def update(self, ranking: Tensor, label_ids: Tensor) -> None:
        """Add videos.

        Args:
            ranking: int64 [videos, classes] on the CPU, the classes of each video from the most to the least probable.
                A ranking has no ties, which every metric would resolve in its own way.
            label_ids: int64 [videos] on the CPU, the right classes.
        """
        self._num_videos += len(ranking)
        self._top1.update(ranking[:, 0], label_ids)
        self._top_k.update(-ranking.argsort(1).float(), label_ids)
        self._confusion.update(ranking[:, 0], label_ids)

    def compute(self) -> tuple[float, float, tuple[tuple[int, ...], ...]]:
        """Top-1, top-k, and the confusion matrix: row = class of the video, column = class that was predicted."""
        confusion = tuple(tuple(map(int, row)) for row in self._confusion.compute().tolist())
        return self._share(self._top1), self._share(self._top_k), confusion

    def _share(self, metric: Metric) -> float:
        # torchmetrics divides in float32; the number of videos behind it is whole.
        return round(float(metric.compute()) * self._num_videos) / self._num_videos
