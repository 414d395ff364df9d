"""Trainer: streams shard sets, trains a MultiModalCreature, infers."""

from train.checkpoint import load_checkpoint
from train.dataset import RealMultiModalDataset, real_data_collate_fn
from train.loader import Loader, open_source
from train.model import MultiModalCreature
from train.trainer import Trainer

__all__ = [
    "Loader",
    "MultiModalCreature",
    "RealMultiModalDataset",
    "Trainer",
    "load_checkpoint",
    "open_source",
    "real_data_collate_fn",
]
