"""Checkpoints of VideoMAE, VideoMAEv2, the original RLT, Hugging Face and rlt, and named models."""

from rlt.checkpoints.models import MODELS, create_model, list_models, model_config
from rlt.checkpoints.read import LoadReport, convert, load_checkpoint, read_checkpoint

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
