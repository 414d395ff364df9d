"""Measure the report page of many sessions: size, time, memory, and time to open it.

    python tests/benchmarks/bench_report.py [--sessions 10000] [--out FOLDER]

Varies the report of one demo session, with messages such as the checks write, and renders each by
the program's own code, without pictures. Writes the page, and again with every session kept.
With chromium installed, it opens the page, reads how long the script took, and takes pictures:
the index, the failed sessions in order of their length, and one of them opened.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import random
import re
import resource
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preprocess.demo.world import write_demo_sessions
from preprocess.validate.page import ReportPage, render_session
from preprocess.validate.report import CheckedSession, ValidationReport, check_session
from shared.files import fingerprint_of
from shared.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

WARNINGS = """
metadata.jsonl line {n} ({s:.3f} s): no line for {ms} ms after it, the longest of {k} gaps of 35-100
ms, {p:.1f}% of the session; values in between are interpolated; fix: fill in single lost lines with
--fix
|vision_left.mp4 {s:.2f}-{t:.2f} s: one picture repeats; masked; fix: check the camera and its
recorder; if that is real, set `mask: [clock, damaged]` or a larger expect.max_still_s
|audio.wav ends at {s:.2f} s, metadata.jsonl at {t:.2f} s, {p:.2f} s apart; the rest is masked; if
they ran together, a copy was cut off or a clock is wrong; fix: copy it again
""".replace("\n", " ").split("|")
ERRORS = """
session: required stream {stream} is missing ({stream}.mp4: no such file); fix: record it, or remove
`required` from streams.{stream} in the recipe
|vision_left.mp4 {s:.2f}-{t:.2f} s: {n} frames do not decode; masked; fix: copy it again
""".replace("\n", " ").split("|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--out", type=Path, help="keep the page and the pictures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(args.out or Path(temporary), args.sessions)


def measure(out: Path, num_sessions: int) -> None:
    path = out / "report.html"
    shutil.rmtree(out / "report_files", ignore_errors=True)
    base = check_session(
        write_demo_sessions(out / "demo", num_sessions=1, duration_s=4)[0], recipe=Recipe()
    ).report
    for name in ("first", "all kept"):
        wall_s, cpu_s, num_kept = time.perf_counter(), time.process_time(), 0
        with ReportPage(path) as page:
            for report in vary(base, num_sessions):
                key = fingerprint_of(report.as_dict())
                if page.has_details(report.session, key):
                    page.keep(report, key)
                    num_kept += 1
                else:
                    page.add(render_session(CheckedSession(folder=out, report=report)), key)
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
        peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{name}: {num_sessions} sessions, {num_kept} kept, index "
            f"{path.stat().st_size / 1e6:.2f} MB, {wall_s:.1f} s, CPU {cpu_s:.1f} s, "
            f"{cpu_s / num_sessions * 1e3:.2f} ms each, peak memory {peak_mib:.0f} MiB"
        )
    files = list((out / "report_files").iterdir())
    mean_kb = sum(f.stat().st_size for f in files) / len(files) / 1e3
    print(f"details: {len(files)} files, {mean_kb:.1f} kB each, without panels")
    if chromium := shutil.which("chromium"):
        browse(chromium, path, out)


def vary(base: ValidationReport, num_sessions: int) -> Iterator[ValidationReport]:
    """Yield reports like those of real sessions: 60 % passed, 30 % with warnings, 10 % failed."""
    rng = random.Random(0)
    for number in range(num_sessions):
        length_s, fate = rng.lognormvariate(6, 0.8), rng.random()
        measured: dict[str, Any] = {
            name: {**stats, "stop_s": length_s} for name, stats in base.stats["streams"].items()
        }
        statuses = dict(base.streams)
        for name in rng.sample(list(measured), 0 if fate < 0.6 else rng.randint(1, 3)):
            measured[name] |= {"share_used": round(rng.betavariate(8, 1), 6), "flaws": 3}
            statuses[name] = "failed" if fate > 0.9 else "warnings"
        texts = rng.sample(WARNINGS, rng.randint(1, 3)) if fate > 0.6 else []
        yield replace(
            base,
            session=f"2026-{number % 12 + 1:02d}-{number % 28 + 1:02d}_room{number:06d}",
            streams=statuses,
            warnings=tuple(fill(text, rng) for text in texts),
            errors=(fill(rng.choice(ERRORS), rng),) if fate > 0.9 else (),
            stats={**base.stats, "length_s": length_s, "streams": measured},
        )


def fill(text: str, rng: random.Random) -> str:
    return text.strip().format(
        n=rng.randint(1, 100_000),
        s=rng.uniform(0, 900),
        t=rng.uniform(900, 1800),
        ms=rng.randint(36, 99),
        k=rng.randint(2, 50),
        p=rng.uniform(0, 5),
        stream=rng.choice(("vision_left", "vision_right")),
    )


def browse(chromium: str, path: Path, out: Path) -> None:
    """Open the page in chromium; print how long it took, and take pictures."""
    text = path.read_text("utf-8")
    click = "onload=()=>document.querySelector('tbody a').click()"
    report = (
        "onload=()=>setTimeout(()=>{const t=performance.getEntriesByType('navigation')[0];document."
        "title=`TIMES ${Math.round(t.loadEventEnd)} ${document.querySelectorAll('tr').length}`})"
    )
    views = {"index": ("", ""), "filtered": ("#status=failed&sort=-3", "")}
    views |= {"opened": ("#status=failed&sort=-3", click), "timed": ("", report)}
    for name, (fragment, script) in views.items():
        copy = path.with_name(f"{name}.html")  # the page, with a script of its own
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed = text.replace("; script-src ", f"; script-src 'sha256-{digest}' ")
        copy.write_text(allowed.replace("</body>", f"<script>{script}</script></body>"))
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,1000"]
        options += ["--virtual-time-budget=5000", f"--screenshot={out.absolute() / name}.png"]
        if name == "timed":
            options[-1] = "--dump-dom"
        command = [chromium, *options, copy.absolute().as_uri() + fragment]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if times := re.search(r"TIMES (\d+) (\d+)", shown):
            print(f"chromium: loaded after {times[1]} ms, {times[2]} rows")
        else:
            print(f"picture: {out / name}.png")
        copy.unlink()


if __name__ == "__main__":
    main()
