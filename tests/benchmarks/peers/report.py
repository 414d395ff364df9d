"""Print the tables to the terminal, and write them as CSV."""

from __future__ import annotations

import csv
import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from measure import Row
    from recordings import Store

FORMAT_OF = {
    "WebDataset, Pillow": "tar-frames",
    "WebDataset, simplejpeg": "tar-eyes",
    "HF datasets": "tar-eyes",
    "MosaicML Streaming": "mds",
    "LitData": "litdata",
    "Megatron-Energon": "energon",
}
READ_COLUMNS = ("vision_left", "vision_right", "text", "proprio", "dmel", "index")
"""What our loader reads of a set; the waveform's column is not touched."""

TITLES = {
    "rgb": "To uint8 frames in the trainer's memory: RGB, or planes that a GPU turns into RGB",
    "model": "To the model's input: normalized float32 RGB on the device (here the CPU)",
}


def write_csv(
    path: Path, rows: Sequence[Row], results: dict[str, Any], store: Store
) -> list[dict[str, Any]]:
    """Write a line per row and number of workers, and return them."""
    lines = [
        _line(row, workers, answers, results, store)
        for (row, workers), answers in results["passes"].items()
    ]
    for row in rows:
        check = results["checks"].get(row.loader, {})
        if "error" in check:
            lines.append(_line(row, 0, [check], results, store))
    _add_ratios(lines)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return lines


def _line(
    row: Row, workers: int, answers: list[dict[str, Any]], results: dict[str, Any], store: Store
) -> dict[str, Any]:
    check = results["checks"].get(row.loader, {})
    good = [a for a in answers if "error" not in a]
    rates = sorted(a["samples_per_s"] for a in good)

    def median(name: str) -> float | None:
        values = [a[name] for a in good if name in a]
        return statistics.median(values) if values else None

    return {
        "table": row.table,
        "loader": row.label,
        "workers": workers,
        "passes": len(good),
        "samples_per_s": median("samples_per_s"),
        "lowest": rates[0] if rates else None,
        "highest": rates[-1] if rates else None,
        "ratio_to_best_peer": None,
        "share_of_limit": None,
        "bytes_per_sample": bytes_per_sample(row.loader, store),
        "cpu_s_per_1000": median("cpu_s_per_1000"),
        "memory_mib": results["memory"].get(row, {}).get("memory_mib"),
        "psnr_db": check.get("psnr_db"),
        "agrees": _agreement(check),
        "error": next((a["error"] for a in answers if "error" in a), ""),
    }


def _agreement(check: dict[str, Any]) -> str:
    """Summarize the result of the check in a few words."""
    if "has_same_numbers" not in check:
        return ""
    pictures = "same pixels" if check["has_same_pictures"] else "near"
    if check["psnr_db"] is None:
        pictures = "lossless"
    parts = [pictures, "" if check["has_same_numbers"] else "OTHER NUMBERS"]
    parts.append("" if check["is_complete"] in (None, True) else "NOT EACH SAMPLE ONCE")
    return ", ".join(filter(None, parts))


def _add_ratios(lines: list[dict[str, Any]]) -> None:
    """Add ratios to the fastest peer and to the limit of the same decoder, table and workers."""
    for line in lines:
        same = [
            other
            for other in lines
            if (other["table"], other["workers"]) == (line["table"], line["workers"])
            and other["samples_per_s"]
        ]
        peers = [o["samples_per_s"] for o in same if not o["loader"].startswith(("ours", "limit"))]
        decoder = "h264 to yuv" if "h264" in line["loader"] else "JPEG to RGB"
        limits = [o["samples_per_s"] for o in same if o["loader"] == f"limit: {decoder}"]
        if line["samples_per_s"] and peers:
            line["ratio_to_best_peer"] = line["samples_per_s"] / max(peers)
        if line["samples_per_s"] and limits:
            line["share_of_limit"] = line["samples_per_s"] / limits[0]


def bytes_per_sample(loader: str, store: Store) -> float | None:
    """Return the bytes on disk that a loader reads, per window."""
    files = files_of(loader, store)
    num_windows = len(list(store.sessions.iterdir())) * store.seconds // 4
    return sum(f.stat().st_size for f in files) / num_windows if files else None


def files_of(loader: str, store: Store) -> list[Path]:
    """List the files that a loader reads."""
    files: list[Path] = []
    if loader.startswith("sessions"):
        files = [*store.sessions.glob("*/*.mp4"), *(store.root / "formats/numbers").glob("*.npz")]
    elif loader.startswith("ours"):
        folder = store.shards(loader.removeprefix("ours, ").partition(" ")[0])
        files = [f for f in folder.glob("train-*") if set(f.name.split(".")) & set(READ_COLUMNS)]
    elif loader in FORMAT_OF:
        files = [f for f in (store.root / "formats" / FORMAT_OF[loader]).rglob("*") if f.is_file()]
    return files


def print_tables(lines: Sequence[dict[str, Any]]) -> None:
    """Print both tables: a line per row; rates and ratios for every number of workers."""
    counts = sorted({line["workers"] for line in lines})
    most = counts[-1]
    for table, title in TITLES.items():
        labels = list(dict.fromkeys(line["loader"] for line in lines if line["table"] == table))
        if not labels:
            continue
        rates = "".join(f"{f'{c} w.':>8}" for c in counts)
        ratios = "".join(f"{f'{c} w.':>7}" for c in counts)
        print(
            f"\n{title}\n{'':42}{'samples/s':>{8 * len(counts)}}{'/ best peer':>{7 * len(counts)}}"
            f"{'of its':>9}{'kB per':>8}{'CPU s':>8}{'memory':>8}{'PSNR':>7}"
        )
        print(f"{'':42}{rates}{ratios}{'limit':>9}{'sample':>8}{'/ 1000':>8}{'MiB':>8}{'dB':>7}")
        for label in labels:
            by = {
                line["workers"]: line
                for line in lines
                if line["table"] == table and line["loader"] == label
            }
            last = by.get(most) or next(iter(by.values()))
            cells = "".join(_cell(by.get(c), "samples_per_s", 8, 1) for c in counts)
            cells += "".join(_cell(by.get(c), "ratio_to_best_peer", 7, 2) for c in counts)
            cells += _cell(last, "share_of_limit", 9, 2)
            cells += _cell(last, "bytes_per_sample", 8, 0, scale=1e-3)
            cells += _cell(last, "cpu_s_per_1000", 8, 2) + _cell(last, "memory_mib", 8, 0)
            cells += _cell(last, "psnr_db", 7, 1)
            errors = " ".join(dict.fromkeys(line["error"] for line in by.values() if line["error"]))
            print(f"{label:42}{cells}  {errors or last['agrees']}")
    print(
        "\nThe limit of H.264 is its decoder's, that of all others the JPEG decoder's. Shares, "
        f"processor time and memory are those of {most} workers; PSNR against the frames before "
        "any codec."
    )


def _cell(
    line: dict[str, Any] | None, name: str, width: int, digits: int, *, scale: float = 1.0
) -> str:
    value = None if line is None else line[name]
    return f"{'-' if value is None else f'{value * scale:.{digits}f}':>{width}}"
