"""Import MosaicML Streaming without torchvision and transformers.

Only its example datasets and a type check need them, and PyPI's torchvision cannot be imported with
a CPU build of torch 2.13.
"""

from __future__ import annotations

import sys
import types

for _name in ("multimodal", "text", "vision"):
    sys.modules[f"streaming.{_name}"] = types.ModuleType(_name)
for _name, _class in (
    ("feature_extraction_utils", "BatchFeature"),
    ("tokenization_utils_base", "BatchEncoding"),
):
    _module = types.ModuleType(_name)
    setattr(_module, _class, type(_class, (dict,), {}))
    sys.modules[f"transformers.{_name}"] = _module
sys.modules["transformers"] = types.ModuleType("transformers")

from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402

__all__ = ["MDSWriter", "StreamingDataset", "clean_stale_shared_memory"]
