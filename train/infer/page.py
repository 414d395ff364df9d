"""Predictions as one HTML page: what was recorded beside what was predicted, under one clock.

Everything is inside the file: styles, script, pictures, sound; it needs no network. It shows the
session's first minute (:data:`PAGE_S`), about 10 MB for two eyes and sound, however long the
session is; its losses are those of all of it.
"""

from __future__ import annotations

import base64
import hashlib
import math
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from train.config import HEAD_STREAM
from train.infer.page_panels import (
    CURVE_HEIGHT,
    FRAME_RATE_HZ,
    Shown,
    draw_curves,
    draw_eyes,
    draw_sounds,
    draw_texts,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from shared.session.reader import SessionReader
    from train.infer.page_panels import TextRow
    from train.trained_model import TrainedModel

PAGE_NAME = "index.html"

PAGE_S = 60.0
"""Only so much of a session's beginning is shown, so that a browser can hold it."""


def write_page(
    out: Path, fields: SessionReader, metrics: Mapping[str, Any], *, creature: TrainedModel
) -> Path:
    """Write ``index.html`` beside the predictions that lie in `out`.

    Args:
        out: folder that :class:`train.infer.predictions.PredictionWriter` has filled.
        fields: the session, by the creature's recipe.
        metrics: of :func:`train.infer.run.infer`.
        creature: who predicted.
    """
    tick_s = 1 / creature.shapes.tick_rate_hz
    length_s = math.ceil(fields.scan.length_s / tick_s - 1e-6) * tick_s
    shown = Shown(out=out, fields=fields, creature=creature, duration_s=min(length_s, PAGE_S))
    environment = Environment(
        loader=PackageLoader("train.infer", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    assert environment.loader is not None
    script = environment.loader.get_source(environment, "page.js")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    html = environment.get_template("page.html.j2").render(
        script=Markup(script),  # noqa: S704  (our own file; the header allows no other)
        script_hash=f"sha256-{digest}",
        metrics=metrics,
        length_s=fields.scan.length_s,
        duration_s=shown.duration_s,
        pixels_per_s=shown.pixels_per_s,
        curve_height=CURVE_HEIGHT,
        count_lanes=lambda marks: 1 + max((mark.lane for mark in marks), default=0),
        eyes=(eyes := draw_eyes(shown)),
        sounds=draw_sounds(shown),
        texts=(texts := draw_texts(shown)),
        curves=draw_curves(shown),
        losses=_loss_rows(metrics),
        script_values=_script_values(shown, eyes, texts),
    )
    path = out / PAGE_NAME
    path.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path


def _loss_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per head: its loss or why it has none, and the baselines."""
    rows = []
    for head in HEAD_STREAM:
        name = f"loss_{head}"
        if name in metrics["losses"]:
            rows.append(
                {
                    "name": name,
                    "loss": metrics["losses"][name],
                    "reason": metrics["reasons"].get(name, ""),
                    "baselines": [r for r in metrics["comparison"] if r["head"] == head],
                }
            )
    return rows


def _script_values(
    shown: Shown, eyes: Mapping[str, list[str | None]], texts: Sequence[TextRow]
) -> dict[str, Any]:
    """What the page's script needs."""
    return {
        "durationS": shown.duration_s,
        "pixelsPerS": shown.pixels_per_s,
        "frameRateHz": FRAME_RATE_HZ,
        "eyes": list(eyes.values()),
        "texts": [
            [[[m.start_s, m.stop_s, m.text] for m in marks or ()] for marks in pair]
            for pair in ((row.recorded, row.predicted) for row in texts)
        ],
    }
