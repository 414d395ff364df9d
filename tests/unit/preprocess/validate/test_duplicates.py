"""Sessions with the same content: found after re-encoding, and never by chance."""

import base64
import json
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.validate import duplicates
from preprocess.validate.duplicates import (
    DuplicateGroup,
    duplicate_findings,
    find_duplicates,
    signature_of,
)
from preprocess.validate.probe import probe_session
from shared.recipe import Recipe, assign_split
from shared.session.lines import TextEvent

RECIPE = Recipe.model_validate(
    {
        "streams": {
            "camera": {"kind": "video", "file": "camera.mp4"},
            "microphone": {"kind": "audio", "file": "sound.wav"},
            "arm": {"kind": "sensor", "key": "arm", "values": [{"type": "scalar", "count": 6}]},
            "notes": {"kind": "text", "file": "notes.jsonl"},
        }
    }
)
RATE_HZ = 16_000
LENGTH_S = 8.0


def make_pictures(rng, *, size=64, rate_hz=20):
    """A random pattern that changes smoothly: [N, size, size] gray levels."""
    knots = rng.normal(0, 1, (20, 8, 8))
    times = np.linspace(0, len(knots) - 1.001, int(LENGTH_S * rate_hz))
    low, share = times.astype(int), (times % 1)[:, None, None]
    pattern = knots[low] * (1 - share) + knots[low + 1] * share
    pattern = pattern.repeat(size // 8, axis=1).repeat(size // 8, axis=2)
    return np.clip(128 + 40 * pattern, 0, 255).astype(np.uint8)


def make_sound(rng):
    """Noise whose level and spectrum change ten times a second, as speech does."""
    noise = rng.normal(0, 0.05, (2, int(LENGTH_S * RATE_HZ)))
    noise[1] = np.convolve(noise[1], np.ones(12) / 3, mode="same")
    levels = np.exp(rng.normal(0, 1.0, (2, 81)))
    grid = np.arange(noise.shape[1]) / RATE_HZ * 10
    gains = np.stack([np.interp(grid, np.arange(81), own) for own in levels])
    return np.clip((noise * gains).sum(axis=0), -1, 1).astype(np.float32)


def write_pictures(path, pictures, *, codec="libx264", size=None, step=1, rate_hz=20, options=None):
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate_hz // step)
        stream.width = stream.height = size or pictures.shape[1]
        stream.pix_fmt, stream.options = "yuv420p", options or {}
        stream.codec_context.time_base = Fraction(step, rate_hz)
        for number, picture in enumerate(pictures[::step]):
            frame = av.VideoFrame.from_ndarray(picture, format="gray")
            frame = frame.reformat(width=stream.width, height=stream.height, format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(step, rate_hz)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def write_content(folder: Path, seed: int) -> Path:
    """Write a session with four streams."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    write_pictures(folder / "camera.mp4", make_pictures(rng), options={"crf": "20"})
    soundfile.write(folder / "sound.wav", make_sound(rng), RATE_HZ)
    walk = np.cumsum(rng.normal(0, 0.1, (400, 6)), axis=0)
    rows = [{"timestamp": i / 50, "arm": row.tolist()} for i, row in enumerate(walk)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    times = np.sort(rng.uniform(0, LENGTH_S, 90)).tolist()
    notes = [{"timestamp": t, "text": f"Word {rng.integers(1000)}"} for t in times]
    (folder / "notes.jsonl").write_text("".join(json.dumps(n) + "\n" for n in notes))
    return folder


def write_again(old: Path, new: Path, seed: int) -> Path:
    """Write the same content with other codecs, rates, rounding and another clock."""
    new.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    options = {"crf": "32", "preset": "veryfast"}
    write_pictures(new / "camera.mp4", make_pictures(rng), size=48, step=2, options=options)
    sound, rate_hz = soundfile.read(old / "sound.wav", dtype="float32")
    louder = soxr.resample(sound * 0.5, rate_hz, 24_000)
    soundfile.write(new / "sound.wav", louder, 24_000, format="OGG", subtype="VORBIS")
    for name in ("metadata.jsonl", "notes.jsonl"):
        rows = [json.loads(line) for line in (old / name).read_text().splitlines()]
        for row in rows:
            row["timestamp"] = round(row["timestamp"] + 1000.5, 3)
            row.update({"arm": [round(v, 3) for v in row["arm"]]} if "arm" in row else {})
            row.update({"text": row["text"].upper() + " "} if "text" in row else {})
        (new / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return new


def distance(left: str, right: str) -> int:
    return int.bit_count(
        int.from_bytes(base64.b64decode(left)) ^ int.from_bytes(base64.b64decode(right))
    )


def signature(folder: Path) -> dict[str, str]:
    return signature_of(probe_session(folder, recipe=RECIPE))


def test_content_is_recognized_after_encoding_it_again(tmp_path):
    first = signature(write_content(tmp_path / "a", 1))
    again = signature(write_again(tmp_path / "a", tmp_path / "b", 1))
    other = signature(write_content(tmp_path / "c", 2))
    assert set(first) == set(again) == set(other) == set(RECIPE.streams)
    assert len(json.dumps(first)) < 1000
    assert {name for name in first if distance(first[name], again[name]) > 60} == set()
    assert {name for name in first if distance(first[name], other[name]) < 160} == set()
    [group] = find_duplicates({"a": first, "b": again, "c": other})
    assert group.sessions == dict.fromkeys("ab", tuple(sorted(first)))


def test_a_removed_stream_does_not_hide_a_duplicate(tmp_path):
    folder = write_content(tmp_path / "a", 1)
    first = signature(folder)
    (folder / "camera.mp4").unlink()
    rest = signature(folder)
    assert rest == {name: code for name, code in first.items() if name != "camera"}
    [group] = find_duplicates({"a": first, "b": rest})
    assert group == DuplicateGroup(sessions=dict.fromkeys("ab", ("arm", "microphone", "notes")))


def excerpts(sound):
    length = min(len(sound) * 2 // 64, RATE_HZ // 2)
    starts = np.linspace(0, len(sound) - length, 64).astype(int)
    return np.stack([sound[start : start + length] for start in starts])


def test_content_without_information_has_no_hash():
    rng = np.random.default_rng(0)
    times_s = np.arange(500) / 50
    tone = np.sin(times_s)[:, None].astype(np.float32) * np.ones(6, np.float32)
    spike = np.zeros((500, 6), np.float32)
    spike[200] = 1
    for values in (np.ones((500, 6), np.float32), tone, spike, times_s[:, None].astype("f4")):
        assert duplicates.hash_readings(times_s, values) == ""
    assert duplicates.hash_readings(times_s[:1], tone[:1]) == ""
    steady = rng.normal(0, 0.1, 8 * RATE_HZ).astype(np.float32)
    for sound in (np.zeros(8 * RATE_HZ, np.float32), steady):
        assert duplicates.hash_sound(excerpts(sound), RATE_HZ) == ""
    scene = rng.integers(0, 256, (16, 16, 3))
    still = [(scene + rng.normal(0, 1, scene.shape)).clip(0, 255).astype("u1") for _ in range(14)]
    assert duplicates.hash_pictures(still) == duplicates.hash_pictures(still[:5]) == ""
    assert duplicates.hash_pictures([np.zeros((16, 16, 3), np.uint8)] * 14) == ""
    once = [TextEvent(1.0, "pick it up")]
    every_second = [TextEvent(float(i), str(i)) for i in range(100)]
    assert duplicates.hash_texts(once) == duplicates.hash_texts(every_second) == ""


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), correlation=st.floats(-1, 1))
def test_bits_differ_by_the_angle_between_features(seed, correlation):
    rng = np.random.default_rng(seed)
    first, other = rng.normal(size=(2, 32, 40))
    second = correlation * first + np.sqrt(1 - correlation**2) * other
    codes = [duplicates._hash(f, share=0.0, least_rms=0.1) for f in (first, second)]
    steps = [f[1:] - f[1:].mean(axis=0) for f in (first, second)]
    angle = np.arccos(np.corrcoef(*[s.ravel() for s in steps])[0, 1].clip(-1, 1)) / np.pi
    deviation = np.sqrt(512 * angle * (1 - angle))
    assert abs(distance(*codes) - 512 * angle) <= 5 * deviation + 4


def flip(code: bytes, share: float, rng) -> bytes:
    bits = np.unpackbits(np.frombuffer(code, np.uint8))
    return np.packbits(bits ^ (rng.random(512) < share)).tobytes()


def components(pairs):
    groups: list[set[str]] = []
    for pair in pairs:
        joined = set(pair).union(*(g for g in groups if not g.isdisjoint(pair)))
        groups = [g for g in groups if g.isdisjoint(pair)] + [joined]
    return {frozenset(group) for group in groups}


def expected_groups(sessions):
    """Compare all pairs, as the definition says."""
    same = []
    for left, right in combinations(sessions, 2):
        a, b = sessions[left], sessions[right]
        bits = [distance(a[name], b[name]) for name in a.keys() & b.keys()]
        if any(d <= 80 for d in bits) and all(d < 128 for d in bits):
            same.append((left, right))
    return components(same)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10_000))
def test_groups_are_those_of_comparing_all_pairs(data, seed):
    rng = np.random.default_rng(seed)
    takes = [[rng.bytes(64) for _ in "xyz"] for _ in range(4)]
    sessions = {}
    for number in range(data.draw(st.integers(0, 20))):
        own = takes[data.draw(st.integers(0, 3))]
        kept = data.draw(st.sets(st.integers(1, 2)))
        codes = {"xyz"[i]: flip(own[i], 0.05, rng) for i in (0, *kept)}
        name = f"s{number:02d}"
        sessions[name] = {k: base64.b64encode(code).decode() for k, code in codes.items()}
    groups = find_duplicates(sessions)
    assert {frozenset(group.sessions) for group in groups} == expected_groups(sessions)
    assert all(list(g.sessions) == sorted(g.sessions) for g in groups)


def test_the_cost_is_linear_if_all_sessions_are_similar(monkeypatch):
    compared = []
    real = duplicates._distances

    def count(hashes, pairs):
        compared.append(len(pairs))
        return real(hashes, pairs)

    monkeypatch.setattr(duplicates, "_distances", count)
    totals = []
    for num_sessions in (300, 600):
        compared.clear()
        rng = np.random.default_rng(0)
        take = rng.bytes(64)
        codes = [base64.b64encode(flip(take, 0.03, rng)).decode() for _ in range(num_sessions)]
        [group] = find_duplicates({f"s{n:04d}": {"x": code} for n, code in enumerate(codes)})
        assert len(group.sessions) == num_sessions
        totals.append(sum(compared))
    assert totals[1] <= 2.2 * totals[0]
    assert totals[1] < 100 * 600


def named(split: str) -> list[str]:
    return [n for n in (f"take_{i:03d}" for i in range(200)) if assign_split(n, RECIPE) == split]


def test_a_duplicate_across_the_split_says_which_one_is_held_out():
    train, val = named("train"), named("val")
    content = {"camera": base64.b64encode(bytes(range(64))).decode()}
    [warning] = duplicate_findings(find_duplicates({train[0]: content, val[0]: content}), RECIPE)[
        max(train[0], val[0])
    ]
    leak = "which trains while this one is held out"
    if train[0] > val[0]:
        leak = "which is held out while this one trains"
    assert warning.level == "warning"
    assert warning.message == (
        f"session: same content as {min(train[0], val[0])} (camera; re-encoded), {leak}; "
        "fix: remove one of the two folders"
    )
    findings = duplicate_findings(find_duplicates(dict.fromkeys(train[:3], content)), RECIPE)
    assert list(findings) == train[1:3]
    assert all("(camera; re-encoded); fix" in f.message for own in findings.values() for f in own)


def test_sessions_of_one_name_are_in_one_split():
    content = {"camera": base64.b64encode(bytes(range(64))).decode()}
    for name in (*named("train")[:9], *named("val")[:9]):
        sessions = dict.fromkeys([name, f"/other/{name}"], content)
        [[warning]] = duplicate_findings(find_duplicates(sessions), RECIPE).values()
        assert warning.message.startswith(f"session: same content as /other/{name} (camera")
        assert "held out" not in warning.message


def test_equal_files_are_duplicates_even_without_a_signature():
    files = {"a": "1", "b": "2", "c": "1", "d": "", "e": ""}
    [group] = find_duplicates({name: {} for name in files}, files=files)
    assert group == DuplicateGroup(sessions=dict.fromkeys("ac", ("all files",)))
    assert "(all files)" in duplicate_findings([group], RECIPE)["c"][0].message
    assert find_duplicates({}) == []


def test_one_copied_file_is_a_note_and_a_shared_script_is_not():
    rng = np.random.default_rng(0)
    codes = [base64.b64encode(rng.bytes(64)).decode() for _ in range(5)]
    a = {"camera": codes[0], "microphone": codes[1], "notes": codes[4]}
    b = {"camera": codes[0], "microphone": codes[2], "notes": codes[4]}
    c = {"camera": codes[3], "notes": codes[4]}
    groups = find_duplicates({"a": a, "b": b, "c": c})
    assert all(group.differing for group in groups)
    [note] = duplicate_findings(groups, RECIPE).pop("b")
    assert note.level == "note"
    assert "shares camera, notes with a, but not microphone" in note.message


@pytest.mark.parametrize("num_streams", [1, 7])
def test_unrelated_sessions_are_no_duplicates(num_streams):
    rng = np.random.default_rng(0)
    names = [f"stream_{n}" for n in range(num_streams)]
    sessions = {
        f"s{n}": {name: base64.b64encode(rng.bytes(64)).decode() for name in names}
        for n in range(500)
    }
    assert find_duplicates(sessions) == []


def test_a_large_group_names_the_first_of_the_other_split():
    names = sorted([*named("train"), *named("val")])
    content = {"camera": base64.b64encode(bytes(range(64))).decode()}
    findings = duplicate_findings(find_duplicates(dict.fromkeys(names, content)), RECIPE)
    assert list(findings) == names[1:]
    firsts = {"train": named("val")[0], "val": named("train")[0]}
    for name, [finding] in findings.items():
        assert f"same content as {firsts[assign_split(name, RECIPE)]} (" in finding.message
