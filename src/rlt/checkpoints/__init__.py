"""Checkpoints of VideoMAE, VideoMAEv2, the original RLT, Hugging Face and rlt, and named models."""

from rlt.checkpoints.exporting import convert
from rlt.checkpoints.models import MODELS, list_models, model_config
from rlt.checkpoints.read import LoadReport, create_model, load_checkpoint, read_checkpoint

__all__ = [
    "MODELS",
    "LoadReport",
    "convert",
    "create_model",
    "list_models",
    "load_checkpoint",
    "model_config",
    "read_checkpoint",
]
