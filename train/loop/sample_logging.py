"""Log one held-out window to TensorBoard: recorded compared with predicted.

::

    batch, outputs -> pick_window     the window of the first held-out batch with the most text
                   -> render_window   pictures, sounds and a text, pure
                   -> write_window    to TensorBoard, under held_out/

Every evaluation logs the same window. Nothing is drawn at random, and the model does not change.
On one core it adds about 0.3 s to an evaluation and 0.4 MB to the event file. Nearly all of this
time turns two times 4 s of dMel into sound; the first evaluation takes 3 s more, to import librosa.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.config import make_section
from shared.media.mel import decode_dmel
from shared.media.tokenizer import group_events, parse_tokenizer
from shared.page import TimeAxis, ValueAxis, draw_spectrogram, sampled_curves
from shared.recipe import PAD_TOKEN, VISION_STREAMS, Recipe
from shared.session.reader import MASKED_LEVEL
from train.config import HEAD_STREAM, TEXT_HEADS, Head
from train.data.pixels import IMAGENET_MEAN, IMAGENET_STD, normalized_frames

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.media.tokenizer import TextTokenizer
    from train.config import TrainConfig
    from train.data.batch import WindowShapes

MAX_FRAMES = 8
"""Frames logged of each video."""

MAX_FRAME_SIZE = 112
"""Larger frames are logged with every second, third, ... pixel only."""

LEVEL_PIXELS = 3
"""Height and width of a dMel level."""

JOINT_COLUMNS = 2
JOINT_WIDTH, JOINT_HEIGHT = 240, 70
"""Size of a joint's panel; its curves have margins for the labels."""

OVERSAMPLING = 2
"""Curves are drawn this much larger, then reduced, for smooth edges."""

RECORDED_COLOR, PREDICTED_COLOR = "#9aa6b6", "#d4570a"

Pair = tuple["NDArray[Any]", "NDArray[Any]"]
"""Recorded and predicted values at the same positions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedWindow:
    """Recorded and predicted values of one window of T ticks, on the CPU.

    The first tick is never predicted: its predicted values are masked (PAD, MASKED_LEVEL, NaN).
    """

    key: str
    """SESSION/WINDOW."""
    tick_rate_hz: float | None
    """None if the window is densely packed text, whose positions are not times."""
    frames: Mapping[str, NDArray[np.uint8]]
    """Per video input of the model RGB [F, H, W, 3]; gray if masked."""
    tokens: Mapping[Head, Pair]
    """Per text head, int64 [T]."""
    levels: Pair | None
    """dMel levels uint8 [A, channels]; MASKED_LEVEL if masked."""
    poses: Pair | None
    """Angles and velocities float32 [S, P]; NaN if masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedWindow:
    """A window in TensorBoard's formats, by tag."""

    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    """RGB [H, W, 3]."""
    sounds: dict[str, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    """Samples of full scale 1, and their rate in Hz."""
    text: str = ""
    """Markdown."""


def pick_window(
    batch: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    *,
    config: TrainConfig,
    shapes: WindowShapes,
) -> LoggedWindow:
    """Return the window of a batch with the most text tokens; the first one if there are none.

    Args:
        batch: docs/batch.md.
        outputs: of the model for it.
        config: heads of the model.
        shapes: sizes of the window.
    """
    targets = batch["targets"]
    num_tokens = torch.zeros(len(batch["weight"]))
    for head in TEXT_HEADS:
        if head in config.heads:
            is_token = (targets[head] != PAD_TOKEN) & targets[f"{head}_valid"]
            num_tokens += is_token.sum(1).cpu() * (batch["weight"].cpu() > 0)
    row = int(num_tokens.argmax())
    window = {
        group: {n: t[row : row + 1] for n, t in tensors.items()}
        for group, tensors in (("inputs", batch["inputs"]), ("targets", targets), ("out", outputs))
    }
    pairs = {
        head: _pair(head, window["out"][head], window["targets"], per_tick=_per_tick(head, shapes))
        for head in config.heads
    }
    return LoggedWindow(
        key=str(batch["keys"][row]),
        tick_rate_hz=None if config.is_text_only else shapes.tick_rate_hz,
        frames={
            str(stream): _frames(window["inputs"][stream], window["inputs"][f"{stream}_valid"])
            for stream in VISION_STREAMS
            if stream in window["inputs"]
        },
        tokens={head: pair for head, pair in pairs.items() if head in TEXT_HEADS},
        levels=pairs.get(Head.AUDIO),
        poses=pairs.get(Head.ANIMATION),
    )


def render_window(window: LoggedWindow, extras: Mapping[str, Any]) -> RenderedWindow:
    """Render a window as pictures, sounds and a text.

    Args:
        window: the window.
        extras: "recipe" and "tokenizer" of :func:`train.trained_model.checkpoint_extras`. Without
            a recipe there are no sounds; without a tokenizer tokens are written as numbers.
    """
    recipe = tokenizer = None
    if "recipe" in extras:
        recipe = make_section(Recipe, extras["recipe"], origin="recipe")
    if "tokenizer" in extras:
        tokenizer = parse_tokenizer(extras["tokenizer"], origin="tokenizer")
    rendered = RenderedWindow(text=_describe_texts(window, tokenizer))
    if window.frames:
        rendered.pictures["frames_recorded"] = _tile_frames(window.frames)
    for index, name in enumerate(("recorded", "predicted")):
        if window.levels is None:
            break
        levels = window.levels[index]
        num_levels = MASKED_LEVEL if recipe is None else recipe.mel.levels
        picture = draw_spectrogram(levels, num_levels=num_levels)
        rendered.pictures[f"spectrogram_{name}"] = picture.repeat(LEVEL_PIXELS, 0).repeat(
            LEVEL_PIXELS, 1
        )
        if recipe is not None:
            audible = np.where(levels == MASKED_LEVEL, np.uint8(0), levels)
            rate_hz = recipe.audio.rate_hz
            wave = decode_dmel(audible, rate_hz=rate_hz, recipe=recipe.mel)
            rendered.sounds[f"sound_{name}"] = (wave, rate_hz)
    if window.poses is not None:
        rendered.pictures["joints"] = _draw_joints(*window.poses)
    return rendered


def write_window(writer: Any, rendered: RenderedWindow, step: int) -> None:  # noqa: ANN401 (no types)
    """Write a window to TensorBoard's images, audio and text, under ``held_out/``."""
    for tag, picture in rendered.pictures.items():
        writer.add_image(f"held_out/{tag}", picture, step, dataformats="HWC")
    for tag, (wave, rate_hz) in rendered.sounds.items():
        writer.add_audio(f"held_out/{tag}", torch.from_numpy(wave)[None], step, rate_hz)
    writer.add_text("held_out/texts", rendered.text, step)
    writer.flush()


def _per_tick(head: Head, shapes: WindowShapes) -> int:
    if head is Head.AUDIO:
        return shapes.audio_frames_per_tick
    return shapes.sensor_samples_per_tick if head is Head.ANIMATION else 1


def _pair(head: Head, output: Tensor, targets: Mapping[str, Tensor], *, per_tick: int) -> Pair:
    """Return recorded and predicted values of one window, [positions, ...].

    The model's output at tick t predicts tick t + 1 and is returned at tick t + 1.
    """
    masked = {Head.AUDIO: float(MASKED_LEVEL), Head.ANIMATION: np.nan}.get(head, float(PAD_TOKEN))
    dtype = {Head.AUDIO: np.uint8, Head.ANIMATION: np.float32}.get(head, np.int64)
    recorded = targets[head][0].cpu().numpy().astype(dtype)
    recorded[~targets[f"{head}_valid"][0].cpu().numpy()] = masked
    chosen = output[0].float() if head is Head.ANIMATION else output[0].argmax(-1)
    predicted = np.full_like(recorded, masked)
    predicted[per_tick:] = chosen.cpu().numpy().reshape(recorded.shape)[:-per_tick]
    return recorded, predicted


def _frames(pixels: Tensor, valid: Tensor) -> NDArray[np.uint8]:
    """Return some frames of a window, RGB or yuv420, as small RGB [F, H, W, 3]."""
    chosen = torch.linspace(0, pixels.shape[1] - 1, min(MAX_FRAMES, pixels.shape[1])).round().int()
    index = chosen.to(pixels.device)
    frames = normalized_frames(pixels.index_select(1, index), torch.float32)[0].cpu()
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    stride = -(-frames.shape[-1] // MAX_FRAME_SIZE)
    rgb = ((frames * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    small: NDArray[np.uint8] = rgb[:, ::stride, ::stride].contiguous().numpy()
    small[~valid[0].cpu().numpy()[chosen.numpy()]] = 128
    return small


def _tile_frames(frames: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Tile frames: one row per video, the left one on top."""
    return np.concatenate([np.concatenate([*row], axis=1) for row in frames.values()], axis=0)


def _draw_joints(
    recorded: NDArray[np.float32], predicted: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Draw each joint's angle over the window: recorded wide and gray, predicted thin and orange.

    Args:
        recorded: angles, then velocities, [S, P].
        predicted: the same.
    """
    from PIL import Image, ImageDraw, ImageFont

    num_samples, num_joints = len(recorded), recorded.shape[1] // 2
    num_rows = -(-num_joints // JOINT_COLUMNS)
    size = (JOINT_COLUMNS * JOINT_WIDTH, 20 + num_rows * JOINT_HEIGHT)
    picture = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), "white")
    pen = ImageDraw.Draw(picture)
    labels = [(4, 2, "recorded, in rad over the window", RECORDED_COLOR)]
    labels.append((size[0] // 2, 2, "predicted", PREDICTED_COLOR))
    axis = TimeAxis(0.0, num_samples, width=(JOINT_WIDTH - 46) * OVERSAMPLING)
    for joint in range(num_joints):
        row, column = divmod(joint, JOINT_COLUMNS)
        left, top = column * JOINT_WIDTH + 38, row * JOINT_HEIGHT + 36
        pair = np.stack([recorded[:, joint], predicted[:, joint]]).astype(np.float64)
        finite = pair[np.isfinite(pair)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        margin = 0.05 * (high - low) or 0.1
        height = JOINT_HEIGHT - 22
        values = ValueAxis(low - margin, high + margin, height * OVERSAMPLING)
        for curve, color, width in zip(
            pair, (RECORDED_COLOR, PREDICTED_COLOR), (4, 1), strict=True
        ):
            for times, angles in sampled_curves(curve, rate_hz=1.0, axis=axis, max_jump=np.pi):
                xs = axis.xs(times) + left * OVERSAMPLING
                ys = values.ys(angles) + top * OVERSAMPLING
                points = [*zip(xs.tolist(), ys.tolist(), strict=True)]
                pen.line(points, fill=color, width=width * OVERSAMPLING, joint="curve")
        labels.append((left, top - 14, f"joint {joint}", "black"))
        labels += [(left - 36, top - 4, f"{values.high:.2f}", "gray")]
        labels += [(left - 36, top + height - 8, f"{values.low:.2f}", "gray")]
    picture = picture.reduce(OVERSAMPLING)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=10)
    for x, y, text, color in labels:
        pen.text((x, y), text, fill=color, font=font)
    return np.array(picture)


def _describe_texts(window: LoggedWindow, tokenizer: TextTokenizer | None) -> str:
    """Return a Markdown table: per text head the recorded and the predicted text."""
    lines = [f"window {html.escape(window.key)}", ""]
    if window.tokens:
        lines += ["| | recorded | predicted | tokens right |", "|---|---|---|---|"]
    for head, (recorded, predicted) in window.tokens.items():
        # The first tick is never predicted, so it is not counted.
        is_token = recorded[1:] != PAD_TOKEN
        num_right = int((is_token & (recorded == predicted)[1:]).sum())
        cells = [
            _format_events(tokens.tolist(), tokenizer, window.tick_rate_hz)
            for tokens in (recorded, predicted)
        ]
        name = HEAD_STREAM[head].replace("_", " ")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {num_right} of {int(is_token.sum())} |")
    return "\n".join(lines)


def _format_events(
    tokens: Sequence[int], tokenizer: TextTokenizer | None, rate_hz: float | None
) -> str:
    """Format events with their times for one cell of a table."""
    if tokenizer is None:
        return " ".join(str(token) for token in tokens if token != PAD_TOKEN)
    times_s = [index / (rate_hz or 1.0) for index in range(len(tokens))]
    events = group_events(tokens, times_s, tokenizer)
    return "<br>".join(
        (f"{event['timestamp']:.1f} s: " if rate_hz else "") + _escape(event["text"])
        for event in events
    )


def _escape(text: str) -> str:
    """Escape a text for Markdown and HTML."""
    escaped = html.escape(text.replace("\n", " "))
    return "".join(f"&#{ord(c)};" if c in r"\`*_{}[]()#+!|~" else c for c in escaped)
