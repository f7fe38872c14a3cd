"""Measuring a model on a labelled data set: accuracy with its uncertainty, tokens, speed, and paired comparisons."""

from __future__ import annotations

from rlt.evaluation.comparison import PairedComparison, compare_predictions
from rlt.evaluation.evaluator import evaluate
from rlt.evaluation.pictures import write_pictures
from rlt.evaluation.predictions import VideoPrediction, read_predictions, write_predictions
from rlt.evaluation.results import EvaluationResult, EvaluationSettings

__all__ = [
    "EvaluationResult",
    "EvaluationSettings",
    "PairedComparison",
    "VideoPrediction",
    "compare_predictions",
    "evaluate",
    "read_predictions",
    "write_pictures",
    "write_predictions",
]
