from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import simplejpeg
import soundfile
import torch
import zarr
from helpers.svg_paths import path_curves
from helpers.trained_models import MODEL, TEXT_ONLY, make_checkpoint, make_session
from PIL import Image

from shared.clock import Segment
from train.infer.page import PAGE_NAME
from train.infer.run import infer, open_session
from train.trained_model import load_trained_model

TRAP = "</script><img src=x>{{7*7}}"
EVENTS = [(0.5, "internal", "reach"), (1.0, "external", TRAP), (4.2, "external", "the ball")]
VOID = {"meta", "input", "img", "br"}


class Page(HTMLParser):
    """A page's elements as (tag, attributes, own text)."""

    def __init__(self, html):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(html)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        element = SimpleNamespace(tag=tag, text="", attributes=dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append(SimpleNamespace(tag=tag, text="", attributes=dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, text):
        if self._open:
            self._open[-1].text += text

    def all(self, tag, **attributes):
        found = [e for e in self.elements if e.tag == tag]
        for name, value in attributes.items():
            found = [e for e in found if e.attributes.get(name.rstrip("_")) == value]
        return found


def unpack(uri):
    kind, _, data = uri.partition(";base64,")
    return kind, base64.b64decode(data, validate=True)


def infer_page(folder, session, config=None, **extra):
    """Run inference and read its page."""
    make_checkpoint(folder / "k.pt", config, **extra)
    metrics = infer(folder / "k.pt", session, folder / "out")
    trained = load_trained_model(folder / "k.pt", device=torch.device("cpu"))
    html = (folder / "out" / PAGE_NAME).read_text()
    page = Page(html)
    (values,) = page.all("script", id="values")
    return SimpleNamespace(
        html=html,
        page=page,
        values=json.loads(values.text),
        out=folder / "out",
        metrics=metrics,
        reader=open_session(session, trained).reader(0),
    )


@pytest.fixture(scope="module")
def inferred(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inferred")
    return infer_page(folder, make_session(folder / "<b>walk", video=True, events=EVENTS))


def test_the_page_needs_nothing_from_outside(inferred):
    links = [
        value
        for element in inferred.page.elements
        for name, value in element.attributes.items()
        if name in ("src", "href", "srcset", "poster", "action")
    ]
    assert len(links) == 4  # two sounds, two spectrograms
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in inferred.html
    assert "@import" not in inferred.html


def test_the_page_runs_its_own_script_only(inferred):
    (policy,) = inferred.page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    data, script = inferred.page.all("script")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert data.attributes["type"] == "application/json"
    assert "default-src 'none'" in policy.attributes["content"]
    assert f"script-src 'sha256-{digest}'" in policy.attributes["content"]


def test_texts_of_a_session_are_escaped(inferred):
    assert all(image.attributes["src"].startswith("data:") for image in inferred.page.all("img"))
    assert any(TRAP in element.text for element in inferred.page.all("text"))
    assert inferred.page.all("h1")
    assert not inferred.page.all("b", text="walk")
    assert "<b>walk" not in inferred.html


def test_sounds_are_those_recorded_and_predicted(inferred):
    recorded, predicted = (e.attributes["src"] for e in inferred.page.all("audio"))
    kind, data = unpack(recorded)
    samples, rate_hz = soundfile.read(io.BytesIO(data), dtype="int16")
    parts = [inferred.reader.read_audio("audio", Segment(i, 2.0)) for i in range(4)]
    assert (kind, rate_hz) == ("data:audio/wav", 8000)
    np.testing.assert_array_equal(samples, np.concatenate(parts))
    samples, _ = soundfile.read(io.BytesIO(unpack(predicted)[1]), dtype="int16")
    expected, _ = soundfile.read(inferred.out / "audio.wav", dtype="int16")
    np.testing.assert_array_equal(samples, expected)


def test_spectrograms_have_one_color_per_level(inferred):
    predicted = inferred.page.all("img")[1].attributes["src"]
    picture = np.asarray(Image.open(io.BytesIO(unpack(predicted)[1])))
    levels = zarr.open_group(inferred.out / "audio.dmel.zarr", mode="r")["dmel"][:]
    assert picture.shape == (8, 400, 3)
    assert (picture[:, :5] == 128).all()
    colors = {}
    for level, color in zip(levels[5:].T[::-1].ravel(), picture[:, 5:].reshape(-1, 3), strict=True):
        colors.setdefault(int(level), set()).add(tuple(int(c) for c in color))
    assert all(len(found) == 1 for found in colors.values())
    assert len({color for found in colors.values() for color in found}) == len(colors)


def test_frames_are_those_of_the_video_on_the_clock(tmp_path):
    session = make_session(tmp_path / "walk", duration_s=2.0, video=True, sound=False)
    inferred = infer_page(tmp_path, session, {"data": {"modalities": ["touch"]}, "model": MODEL})
    (video,) = inferred.values["videos"]
    assert len(video) == 20
    ((_, frames),) = inferred.reader.iter_frames("vision_left", [Segment(0, 2.0)])
    shown = [simplejpeg.decode_jpeg(unpack(uri)[1]) for uri in video]
    assert shown[0].shape == (160, 160, 3)
    for index in range(10):
        small = shown[2 * index].reshape(16, 10, 16, 10, 3).mean(axis=(1, 3))
        differences = np.abs(frames.pictures - small).mean(axis=(1, 2, 3))
        assert differences.argmin() == index
    assert "not an input of the model" in inferred.html


def test_each_joint_has_its_recorded_and_its_predicted_curve(inferred):
    paths = inferred.page.all("path")
    assert [p.attributes["class"] for p in paths] == ["curve recorded", "curve predicted"] * 20
    scale = inferred.values["pixelsPerS"]
    recorded = np.concatenate(path_curves(paths[6].attributes["d"]))
    times_s = np.arange(240) / 30
    np.testing.assert_allclose(recorded[:, 0], times_s * scale, atol=0.06)
    high, low = (float(e.text) for e in inferred.page.all("text", class_="range")[6:8])
    angles = high - recorded[:, 1] / 46 * (high - low)
    np.testing.assert_allclose(angles, np.sin(times_s + 3), atol=0.02)
    assert (
        sum(map(len, path_curves(paths[7].attributes["d"]))) == 237
    )  # nothing predicts the first tick
    velocity = paths[21].attributes["d"]  # changes by more than pi, but does not wrap
    assert sum(map(len, path_curves(velocity))) == 237
    assert velocity.count("M") == 1


def test_ticks_are_marked_right_wrong_missed_or_invented(inferred):
    scale = inferred.values["pixelsPerS"]
    recorded = {"internal_text": {}, "external_text": {}}
    tokenizer = inferred.reader.tokenizer
    for time_s, stream, text in EVENTS:
        said = recorded[f"{stream}_text"]  # an event waits for the tokens of the one before
        first = max([round(time_s * 10), *(tick + 1 for tick in said)])
        said |= {first + i: token for i, token in enumerate(tokenizer.encode(text))}
    expected = []
    for stream, said in sorted(recorded.items()):
        predicted = {}
        for line in (inferred.out / f"{stream}.jsonl").read_text().splitlines():
            event = json.loads(line)
            first = round(event["timestamp"] * 10)
            predicted |= {first + i: token for i, token in enumerate(event["tokens"])}
        for tick in sorted({*said, *predicted} - {0}):
            kind = "right" if said.get(tick) == predicted.get(tick) else "wrong"
            kind = "missed" if tick not in predicted else kind
            kind = "invented" if tick not in said else kind
            expected.append((f"tick {kind}", round(tick * scale / 10, 1)))
    found = [
        (e.attributes["class"], float(e.attributes["x"]))
        for e in inferred.page.all("rect")
        if e.attributes["class"].startswith("tick")
    ]
    assert found == expected


@pytest.mark.parametrize("start_s", [1.8, 1.95, 3.7, 3.9, 5.99])
def test_a_text_over_a_border_is_shown_and_counted_whole(tmp_path, start_s):
    events = [(start_s, "internal", "reach for the ball")]
    session = make_session(tmp_path / "walk", events=events)
    inferred = infer_page(tmp_path, session)
    (recorded, _), _ = sorted(inferred.values["texts"], key=lambda texts: not texts[0])
    assert [text for _, _, text in recorded] == ["reach for the ball"]
    assert recorded[0][0] == pytest.approx(start_s, abs=0.1)
    counted = [e for e in inferred.page.all("rect") if e.attributes["class"].startswith("tick")]
    ticks = {round(float(e.attributes["x"]) / inferred.values["pixelsPerS"] * 10) for e in counted}
    length = len(inferred.reader.tokenizer.encode("reach for the ball"))
    first = round(recorded[0][0] * 10)
    assert ticks >= set(range(first, first + length))


def test_a_head_that_never_had_a_target_is_not_shown(tmp_path):
    session = make_session(tmp_path / "walk", duration_s=1.0)
    inferred = infer_page(tmp_path, session, untrained_heads=["audio", "internal_text"])
    assert [e.text for e in inferred.page.all("span", class_="predicted")] == ["predicted"]
    assert len(inferred.page.all("audio")) == 1  # the recorded sound
    assert "the model has no trained head for it" in inferred.html
    assert not any(inferred.out.glob("audio*"))
    assert inferred.metrics["losses"]["loss_audio"] is None
    assert "never had a target" in inferred.metrics["reasons"]["loss_audio"]


def test_losses_and_latency_are_on_the_page(inferred):
    cells = [e.text for e in inferred.page.all("td")]
    for name, loss in inferred.metrics["losses"].items():
        assert cells[cells.index(name) + 1] == f"{loss:.4f}"
    assert f"p99 {inferred.metrics['tick_latency_ms']['p99']:.1f} ms of 100 ms" in inferred.html


@pytest.mark.slow
def test_the_page_of_a_long_session_shows_its_first_minute(tmp_path):
    config = {
        "training": {"loss_weights": {"internal_text": 0, "external_text": 0}},
        "model": MODEL,
    }
    session = make_session(tmp_path / "walk", duration_s=62.0, text=False)
    inferred = infer_page(tmp_path, session, config)
    assert inferred.values["durationS"] == 60
    assert "This page shows the first 60 s" in inferred.html
    for element in inferred.page.all("audio"):
        assert soundfile.info(io.BytesIO(unpack(element.attributes["src"])[1])).duration == 60
    last = path_curves(inferred.page.all("path")[1].attributes["d"])[-1][-1]
    assert last[0] < 60 * inferred.values["pixelsPerS"]


@pytest.mark.parametrize("kind", ["nothing but poses", "dense text", "no audio head"])
def test_sessions_and_models_with_few_streams_have_a_page(tmp_path, kind):
    has_sound = kind == "no audio head"
    session = make_session(
        tmp_path / "walk", duration_s=1.0, sound=has_sound, text=kind == "dense text"
    )
    config = {
        "nothing but poses": None,
        "dense text": TEXT_ONLY,
        "no audio head": {
            "training": {"loss_weights": {"audio": 0, "internal_text": 0}},
            "model": MODEL,
        },
    }[kind]
    inferred = infer_page(tmp_path, session, config)
    assert inferred.values["durationS"] == 1
    assert len(inferred.page.all("audio")) == (0 if kind == "dense text" else 1)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_in_a_browser_one_clock_moves_everything(inferred, tmp_path):
    dom = run_browser(f"file://{inferred.out / PAGE_NAME}#t=4.25", tmp_path)
    page = Page(re.sub("(?s)<script.*?</script>", "", dom))
    (clock,) = page.all("span", id="clock")
    (cursor,) = page.all("div", class_="cursor")
    assert clock.text == "4.25 s"
    place = 4.25 * inferred.values["pixelsPerS"]
    moved = float(re.search(r"translateX\(([\d.]+)px\)", cursor.attributes["style"])[1])
    assert moved == pytest.approx(place, rel=1e-4)
    (said,) = page.all("bdi", id="text-0-0")
    assert said.text == "the ball"


def run_browser(url, folder):
    """The document as a real browser has it once the page's script has run."""
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --no-first-run"
    command = ["chromium", *options.split(), f"--user-data-dir={folder}", "--dump-dom"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", url],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout
