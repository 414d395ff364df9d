"""Run the passes of every row in turn, round by round, each loader in its own process."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from environment import PYTHON, ROOT
from report import files_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from recordings import Store

ANSWER_TIMEOUT_S = 120
"""A pass that takes longer has hung."""

EXIT_TIMEOUT_S = 5

_BEGIN_S = time.perf_counter()

Form = Literal["rgb", "device", "worker"]
"""What a pass ends with: RGB uint8 in the trainer's memory; the model's input, made on the device
by the function that our trainer uses; the model's input, normalized in the worker as users do."""


@dataclass(frozen=True)
class Row:
    """A row of one of the tables."""

    table: Literal["rgb", "model"]
    loader: str
    form: Form

    @property
    def label(self) -> str:
        """The row's title in the tables."""
        return f"{self.loader}, floats from the worker" if self.form == "worker" else self.loader


class Server:
    """A loader's process, started at the first request and after it died."""

    def __init__(self, loader: str, store: Store) -> None:
        self._loader = loader
        self._store = store
        self._log = store.root / "logs" / f"{loader.replace(' ', '_').replace(':', '')}.log"
        self._log.parent.mkdir(exist_ok=True)
        self._process: subprocess.Popen[str] | None = None

    def ask(self, **request: Any) -> dict[str, Any]:
        """Send a request; return its response, or {"error": reason}."""
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                is_there = bool(selector.select(ANSWER_TIMEOUT_S))
            line = process.stdout.readline() if is_there else ""
        except BrokenPipeError:
            is_there, line = True, ""
        if line:
            return dict(json.loads(line))
        self.close()
        if not is_there:
            return {"error": f"no answer within {ANSWER_TIMEOUT_S} s"}
        last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return {"error": f"its process ended: {' '.join(last)[:200]}"}

    def close(self) -> None:
        """End the process and its children."""
        if self._process is not None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
                self._process.stdin.close()
                self._process.wait(timeout=EXIT_TIMEOUT_S)  # it clears away what it named
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            script = Path(__file__).with_name("server.py")
            place = [str(self._store.root), str(self._store.seconds)]
            with self._log.open("a", encoding="utf-8") as log:
                self._process = subprocess.Popen(
                    [str(PYTHON), str(script), self._loader, *place],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=server_environment(),
                    start_new_session=True,
                )
        return self._process


def server_environment() -> dict[str, str]:
    """Return variables: ours from the source tree, peers offline, nothing that slows numpy."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    return {
        **os.environ,
        **quiet,
        "PYTHONPATH": str(ROOT),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }


def measure(
    rows: Sequence[Row], store: Store, *, rounds: int, workers: Iterable[int], seconds: float
) -> dict[str, Any]:
    """Check each loader once, then measure all rows in turn, from a warm page cache.

    Returns:
        "checks": loader -> answer; "memory": row -> answer with the most workers; "passes":
        (row, workers) -> answers, one per round.
    """
    counts = sorted(workers)
    servers = {row.loader: Server(row.loader, store) for row in rows}
    checks: dict[str, Any] = {}
    memory: dict[Row, Any] = {}
    passes: dict[tuple[Row, int], list[dict[str, Any]]] = {}
    try:
        for name, server in servers.items():
            if not name.startswith("limit"):
                checks[name] = server.ask(do="check")
                _say(f"check: {name}: {checks[name]}")
        sound = [row for row in rows if "error" not in checks.get(row.loader, {})]
        for row in (r for r in sound if r.loader in checks):
            memory[row] = servers[row.loader].ask(do="memory", workers=counts[-1], form=row.form)
        for number in range(rounds):
            for row in sound:
                for count in counts:
                    warm(files_of(row.loader, store))
                    request = {"workers": count, "form": row.form, "seconds": seconds}
                    answer = servers[row.loader].ask(do="pass", **request)
                    passes.setdefault((row, count), []).append(answer)
                    rate = answer.get("error") or f"{answer['samples_per_s']:.1f} samples/s"
                    _say(f"round {number + 1} of {rounds}: {row.label}, {count} workers: {rate}")
    finally:
        for server in servers.values():
            server.close()
    return {"checks": checks, "memory": memory, "passes": passes}


def warm(files: Iterable[Path]) -> None:
    """Bring files into the page cache: systems that reclaim memory early drop them meanwhile."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _say(text: str) -> None:
    print(f"{time.perf_counter() - _BEGIN_S:5.0f} s  {text}", file=sys.stderr, flush=True)
