"""The table of all measured loaders: name, function that opens it, and location."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import ours
import peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from recordings import Store

Kind = Literal["peer", "ours", "limit"]


def _nothing(_store: Store, _workers: int, _normalize: bool) -> Iterable[dict[str, Any]]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One row of the tables."""

    kind: Kind
    open: Callable[[Store, int, bool], Iterable[dict[str, Any]]] = _nothing
    limit: Callable[[Store], Callable[[int], None]] | None = None
    is_slow: bool = False
    """Few batches are enough: each takes seconds."""


def _ours(name: str, pixels: str) -> Entry:
    return Entry(
        kind="ours",
        open=lambda store, workers, _: ours.open_ours(store, name, workers, pixels),
    )


_peer = partial(Entry, kind="peer")

LOADERS: dict[str, Entry] = {
    "sessions, PyAV": _peer(open=peers.open_sessions_pyav, is_slow=True),
    "sessions, torchcodec": _peer(open=peers.open_sessions_torchcodec, is_slow=True),
    "WebDataset, Pillow": _peer(open=peers.open_webdataset_pillow),
    "WebDataset, simplejpeg": _peer(open=peers.open_webdataset_simplejpeg),
    "MosaicML Streaming": _peer(open=peers.open_mosaic),
    "LitData": _peer(open=peers.open_litdata),
    "HF datasets": _peer(open=peers.open_huggingface),
    "Megatron-Energon": _peer(open=peers.open_energon),
    "ours, mjpeg to RGB": _ours("mjpeg", "rgb"),
    "ours, h264 to RGB": _ours("h264", "rgb"),
    "ours, yuv420 to RGB": _ours("yuv420", "rgb"),
    "ours, raw to RGB": _ours("raw", "rgb"),
    "ours, mjpeg to yuv420": _ours("mjpeg", "yuv420"),
    "ours, h264 to yuv420": _ours("h264", "yuv420"),
    "ours, yuv420 to yuv420": _ours("yuv420", "yuv420"),
    "limit: memcpy": Entry(kind="limit", limit=ours.memcpy),
    "limit: JPEG to RGB": Entry(kind="limit", limit=ours.jpeg_to_rgb),
    "limit: h264 to yuv": Entry(kind="limit", limit=ours.h264_to_yuv),
}
"""By name, in the order of the tables."""
