"""Draw the table as a picture: ``python picture.py TABLE.csv OUT.png``.

It runs in the peers' environment.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

from matplotlib import pyplot

TITLES = {"rgb": "to uint8 frames (RGB, or planes)", "model": "to floats on the device (the CPU)"}
COLORS = {"ours": "#1b7f5c", "limit": "#b8b8b8", "": "#4472a8"}
SHADES = (0.35, 0.65, 1.0)


def main() -> None:
    """Draw bars of samples per second: a panel per table, a shade per number of workers."""
    with Path(sys.argv[1]).open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["samples_per_s"]]
    tables = [t for t in TITLES if any(line["table"] == t for line in lines)]
    figure, axes = pyplot.subplots(1, len(tables), figsize=(8 * len(tables), 7), squeeze=False)
    for axis, table in zip(axes[0], tables, strict=True):
        draw(axis, [line for line in lines if line["table"] == table])
        axis.set_title(f"Stereo windows per second, {TITLES[table]}")
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=120, bbox_inches="tight")


def draw(axis: pyplot.Axes, lines: list[dict[str, str]]) -> None:
    """Draw one table; bars of limits are cut at the edge, with their value."""
    labels = list(dict.fromkeys(line["loader"] for line in lines))
    counts = sorted({int(line["workers"]) for line in lines})
    loaders = [float(v["samples_per_s"]) for v in lines if not v["loader"].startswith("limit")]
    edge = 1.25 * max(loaders or [1.0])
    height = 0.8 / len(counts)
    for line in lines:
        rate, which = float(line["samples_per_s"]), counts.index(int(line["workers"]))
        kind = line["loader"].partition(",")[0].partition(":")[0]
        at = labels.index(line["loader"]) + (which - (len(counts) - 1) / 2) * height
        shade = SHADES[-len(counts) :][which]
        color = COLORS.get(kind, COLORS[""])
        axis.barh(at, min(rate, edge), height=height, color=color, alpha=shade)
        axis.text(min(rate, edge), at, f" {rate:.0f}", va="center", fontsize=7, clip_on=False)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, edge * 1.08)
    axis.set_xlabel(f"samples/s; shades: {', '.join(map(str, counts))} workers")
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
