"""Train a MultiModalCreature on streamed shard sets, and run inference with it.

Public names are imported when they are first used (PEP 562). So ``python -m train`` reports a wrong
configuration, and reacts to Ctrl-C, without waiting seconds for torch.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from train.checkpoints import load_checkpoint
    from train.data.loader import Loader, open_source
    from train.data.session_source import RealMultiModalDataset, real_data_collate_fn
    from train.loop.trainer import Trainer
    from train.model.multimodal import MultiModalCreature

__all__ = [
    "Loader",
    "MultiModalCreature",
    "RealMultiModalDataset",
    "Trainer",
    "load_checkpoint",
    "open_source",
    "real_data_collate_fn",
]

_MODULES: Final[Mapping[str, str]] = {
    "Loader": "train.data.loader",
    "MultiModalCreature": "train.model.multimodal",
    "RealMultiModalDataset": "train.data.session_source",
    "Trainer": "train.loop.trainer",
    "load_checkpoint": "train.checkpoints",
    "open_source": "train.data.loader",
    "real_data_collate_fn": "train.data.session_source",
}

# Put large CPU tensors on pages of 2 MiB. Touching new memory in small pages takes longer than the
# arithmetic on it (pixels to floats: 17 ms per sample, 10 ms with large pages). torch reads the
# variable at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any of the public names)
    """Import a public name at its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
