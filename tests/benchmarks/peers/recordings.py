"""Real footage as long stereo sessions, and our shard sets of them.

Each film is repeated forward and backward under a panning crop until it is long enough; the right
video is a crop that is moved to the side, as recorders would encode both (x264, 30 frames/s, a
keyframe every 2 s). Four sessions share a film and differ in everything else. Sound is real too;
sensors and texts are made.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from environment import ROOT

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

RECORDINGS = ROOT.parent / "shared" / "sessions"

FILMS = (
    ("session_gopro_walk", 300, "session_gopro_walk"),
    ("session_nasa_narrated", 380, "session_nasa_narrated"),
    ("session_neon_glasses", 140, "session_neon_glasses"),
    ("session_g1_ep037", 440, "session_reachy2_sleep1"),
)
"""Session of the film, how many of its frames are used, session of the sound."""

COPIES = 4
"""Sessions that share a film."""

WINDOW_S = 4
RATE_HZ = 30
SENSOR_RATE_HZ = 90
WIDTH, HEIGHT = 640, 480

SETS: Mapping[str, dict[str, Any]] = {
    "mjpeg": {"codec": "mjpeg", "quality": 90},
    "raw": {"codec": "raw"},
    "h264": {"codec": "h264"},
    "yuv420": {"codec": "yuv420"},
}
"""Our shard sets: name and the recipe's section ``video``."""


@dataclass(frozen=True)
class Store:
    """Folders of all files that are made once for sessions of one length."""

    root: Path
    seconds: int

    @property
    def sessions(self) -> Path:
        """Session folders."""
        return self.root / "sessions"

    def shards(self, name: str) -> Path:
        """One of our shard sets."""
        return self.root / "sets" / name


def make_sessions(store: Store) -> None:
    """Make the sessions once.

    Raises:
        SystemExit: the recordings are missing, or sessions end within a window.
    """
    if store.seconds % WINDOW_S:
        raise SystemExit(f"{store.seconds} s are no whole windows; fix: a multiple of {WINDOW_S}")
    mark = store.root / "sessions.done"
    if mark.exists():
        return
    missing = [str(p) for f in FILMS for p in _sources(f) if not p.exists()]
    if missing:
        raise SystemExit(
            f"no real recordings: {', '.join(missing)} missing; nothing is measured without them"
        )
    shutil.rmtree(store.sessions, ignore_errors=True)
    for number, film in enumerate(FILMS):
        first = store.sessions / f"session_{number}_0"
        first.mkdir(parents=True)
        video, sound = _sources(film)
        print(f"{first}: encoding {store.seconds} s of {film[0]}", file=sys.stderr, flush=True)
        for eye, shift in (("left", 0), ("right", 24)):
            _encode_film(first / f"vision_{eye}.mp4", video, film[1], store.seconds, shift)
        _ffmpeg("-stream_loop", "-1", "-i", sound, "-t", store.seconds, first / "audio.wav")
        for copy in range(COPIES):
            session = store.sessions / f"session_{number}_{copy}"
            session.mkdir(exist_ok=True)
            for path in first.glob("*.*") if copy else ():
                if path.suffix in {".mp4", ".wav"}:
                    (session / path.name).hardlink_to(path)
            _write_lines(session, store.seconds, phase=COPIES * number + copy)
    mark.touch()


def build_sets(store: Store) -> dict[str, str]:
    """Update our shard sets by our own job; return reasons of those that can't be built."""
    failures = {}
    for name, video in SETS.items():
        recipe = store.root / f"{name}.yaml"
        values = {
            "video": video,
            "split": {"val_fraction": 0},
            "shard": {"target_bytes": 64_000_000},
        }
        recipe.write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "preprocess", "shards", "--recipe", str(recipe)]
        places = ["--sessions", str(store.sessions), "--out", str(store.shards(name))]
        done = subprocess.run([*command, *places], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            failures[name] = (done.stderr or done.stdout).strip().splitlines()[-1][:200]
    return failures


def _sources(film: tuple[str, int, str]) -> tuple[Path, Path]:
    return RECORDINGS / film[0] / "vision_left.mp4", RECORDINGS / film[2] / "audio.wav"


def _encode_film(path: Path, source: Path, num_frames: int, seconds: int, shift: int) -> None:
    pan_x, pan_y = "sin(t*0.7)", "sin(t*0.4)"
    graph = (
        f"[0:v]fps={RATE_HZ},trim=end_frame={num_frames},"
        f"scale={WIDTH * 9 // 8}:{HEIGHT * 9 // 8}:force_original_aspect_ratio=increase,"
        "split[a][b];"
        f"[b]reverse[r];[a][r]concat=n=2:v=1,loop=loop=-1:size={2 * num_frames},"
        f"setpts=N/{RATE_HZ}/TB,crop={WIDTH}:{HEIGHT}:"
        f"x='(iw-{WIDTH}-{shift})/2*(1+{pan_x})+{shift}':y='(ih-{HEIGHT})/2*(1+{pan_y})'[o]"
    )
    encoding = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-g", 2 * RATE_HZ]
    length = ["-t", seconds, "-pix_fmt", "yuv420p", "-an"]
    _ffmpeg("-i", source, "-filter_complex", graph, "-map", "[o]", *encoding, *length, path)


def _ffmpeg(*arguments: object) -> None:
    command = ["ffmpeg", "-nostdin", "-v", "error", "-y", *map(str, arguments)]
    subprocess.run(command, check=True)


def _write_lines(session: Path, seconds: int, *, phase: int) -> None:
    """Write metadata at 90 Hz and a text every 2 s; numbers depend on the phase."""
    with (session / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for i in range(seconds * SENSOR_RATE_HZ):
            time_s = i / SENSOR_RATE_HZ
            touch = [round(0.5 + 0.5 * math.sin(time_s + phase + k), 6) for k in range(5)]
            proprio = [round(math.sin(time_s * (1 + k / 20) + phase + k), 6) for k in range(20)]
            line = {"timestamp": round(time_s, 6), "touch": touch, "proprio": proprio}
            file.write(json.dumps(line) + "\n")
    with (session / "text.jsonl").open("w", encoding="utf-8") as file:
        for second in range(0, seconds, 2):
            stream = "internal" if second % 4 else "external"
            text = f"in life {phase} it is second {second} now"
            line = {"timestamp": second + 0.5, "stream": stream, "text": text}
            file.write(json.dumps(line) + "\n")
