"""Make sessions to measure with, once, under data/bench.

They have film from a headset as a recorder would encode it, sound, metadata and text.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "data" / "bench"
FILM = ROOT.parent / "shared/sessions/session_neon_glasses/vision_left.mp4"
RATE_HZ = 30
AUDIO_RATE_HZ = 48_000
METADATA_RATE_HZ = 90
MINUTE_S = 60


@dataclass(frozen=True)
class Case:
    """One kind of recording."""

    name: str
    width: int
    height: int
    gop: int
    bit_rate: str
    b_frames: int = 3


def make_sessions(case: Case, seconds: int, film: Path) -> Path:
    """Make a folder of the folders `1` and `2`, with one and two equal sessions."""
    folder = CACHE / f"{case.name}-{seconds}s"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        session = folder / "1" / "session_a"
        session.mkdir(parents=True)
        for eye, shift in (("left", 0), ("right", 24)):
            make_video(session / f"vision_{eye}.mp4", case, seconds, film, shift)
        make_sound(session / "audio.wav", seconds)
        make_lines(session, seconds)
        for name in ("session_a", "session_b"):
            (folder / "2" / name).mkdir(parents=True)
            for path in session.iterdir():
                (folder / "2" / name / path.name).hardlink_to(path)
        (folder / "done").touch()
    return folder


def make_video(path: Path, case: Case, seconds: int, film: Path, shift: int) -> None:
    """Make a video of the length from a minute of film, cut or repeated."""
    minute = CACHE / "film" / f"{case.name}.{path.name}"
    if not minute.exists():
        minute.parent.mkdir(parents=True, exist_ok=True)
        part = minute.with_suffix(".part.mp4")
        encode_film(part, case, film, shift)
        part.replace(minute)
    run_quietly(
        [
            "ffmpeg",
            "-nostdin",
            "-v",
            "error",
            "-y",
            "-stream_loop",
            str(max(0, -(-seconds // MINUTE_S) - 1)),
            "-i",
            str(minute),
            "-t",
            str(seconds),
            "-c",
            "copy",
            str(path),
        ]
    )


def encode_film(path: Path, case: Case, film: Path, shift: int) -> None:
    """Encode a minute of film, forward and backward, panned, with grain."""
    if film.exists():
        source = ["-i", str(film)]
        begin = (
            f"[0:v]fps={RATE_HZ},trim=end_frame=140,split[a][b];[b]reverse[r];"
            "[a][r]concat=n=2:v=1,loop=loop=-1:size=280"
        )
    else:
        source = ["-f", "lavfi", "-i", f"testsrc2=s=1600x1200:r={RATE_HZ}"]
        begin = "[0:v]null"
    picture = (
        f",setpts=N/{RATE_HZ}/TB,crop=1500:844:x='38+{shift}+37*sin(t*1.3)':"
        f"y='170+90*sin(t*0.9)',scale={case.width}:{case.height}:flags=bicubic,"
        "noise=alls=5:allf=t[o]"
    )
    run_quietly(
        [
            "ffmpeg",
            "-nostdin",
            "-v",
            "error",
            "-y",
            *source,
            "-filter_complex",
            begin + picture,
            "-map",
            "[o]",
            "-t",
            str(MINUTE_S),
            "-c:v",
            "libx264",
            "-preset",
            "veryfast",
            "-bf",
            str(case.b_frames),
            "-g",
            str(case.gop),
            "-b:v",
            case.bit_rate,
            "-pix_fmt",
            "yuv420p",
            str(path),
        ]
    )


def make_sound(path: Path, seconds: int) -> None:
    """Make 48 kHz stereo of tones that come and go in noise."""
    import numpy as np  # here, so that a job's start-up is measured without it
    import soundfile

    rng = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", AUDIO_RATE_HZ, 2, "PCM_16") as file:
        for second in range(seconds):
            time_s = second + np.arange(AUDIO_RATE_HZ) / AUDIO_RATE_HZ
            wave = 0.2 * np.sin(2 * np.pi * 300 * time_s) * np.sin(time_s) ** 2
            grain = rng.normal(scale=0.02, size=(AUDIO_RATE_HZ, 2))
            file.write((wave[:, None] + grain).astype(np.float32))


def make_lines(session: Path, seconds: int) -> None:
    """Make metadata at 90 Hz and a text every 2 s."""
    with (session / "metadata.jsonl").open("w") as file:
        for i in range(seconds * METADATA_RATE_HZ):
            time_s = i / METADATA_RATE_HZ
            touch = [round(0.5 + 0.5 * math.sin(time_s + k), 6) for k in range(5)]
            proprio = [round(math.sin(time_s * (1 + k / 20) + k), 6) for k in range(20)]
            line = {"timestamp": round(time_s, 6), "touch": touch, "proprio": proprio}
            file.write(json.dumps(line) + "\n")
    with (session / "text.jsonl").open("w") as file:
        for second in range(0, seconds, 2):
            stream = "internal" if second % 4 else "external"
            line = {"timestamp": second + 0.5, "stream": stream, "text": f"now at second {second}"}
            file.write(json.dumps(line) + "\n")


def run_quietly(command: list[str]) -> None:
    subprocess.run(command, check=True)
