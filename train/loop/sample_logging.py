"""Log one held-out window to TensorBoard: recorded compared with predicted.

::

    batch, outputs -> pick_window     the window of the first held-out batch with the most text
                   -> render_window   pictures, sounds and a text, by the kinds of streams
                   -> write_window    to TensorBoard, under held_out/

Every evaluation logs the same window. Nothing is drawn at random, and the model does not change.
On one core it adds about 0.3 s to an evaluation and 0.4 MB to the event file. Nearly all of this
time turns two times 4 s of dMel into sound; the first evaluation takes 3 s more, to import librosa.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from shared.config import make_section
from shared.kinds.audio import MASKED_LEVEL
from shared.media.mel import decode_dmel
from shared.media.tokenizer import group_events, parse_tokenizer
from shared.page import MAX_JUMPS, TimeAxis, ValueAxis, draw_spectrogram, sampled_curves
from shared.recipe import PAD_TOKEN, Recipe
from shared.streams import Kind
from shared.values import VALUE_TYPES
from train.data.pixels import IMAGENET_MEAN, IMAGENET_STD, normalized_frames
from train.shapes import sample_positions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.media.tokenizer import TextTokenizer
    from shared.streams import ValueGroup
    from train.shapes import StreamShape, WindowShapes

MAX_FRAMES = 8
"""Frames logged of each video."""

MAX_FRAME_SIZE = 112
"""Wider frames are logged with every second, third, ... pixel only."""

LEVEL_PIXELS = 3
"""Height and width of a dMel level."""

MAX_CURVES = 24
"""Values drawn of each value group."""

CURVE_COLUMNS = 2
CURVE_WIDTH, CURVE_HEIGHT = 240, 70
"""Size of a value's panel; its curves have margins for the labels."""

OVERSAMPLING = 2
"""Curves are drawn this much larger, then reduced, for smooth edges."""

RECORDED_COLOR, PREDICTED_COLOR = "#9aa6b6", "#d4570a"

EMPTY: Final[dict[Kind, np.generic]] = {
    Kind.TEXT: np.int64(PAD_TOKEN),
    Kind.AUDIO: np.uint8(MASKED_LEVEL),
    Kind.SENSOR: np.float32(np.nan),
}
"""What stands for a value that was not recorded or not predicted, by the kind of the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedHead:
    """Recorded and predicted values of one head, at the same samples."""

    stream: str
    shape: StreamShape
    recorded: NDArray[Any]
    """Tokens int64 [T]; dMel levels uint8 [A, channels]; values float32 [S, D]."""
    predicted: NDArray[Any]
    """The same; those of the first tick are :data:`EMPTY`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedWindow:
    """Recorded and predicted values of one window of T ticks, on the CPU."""

    key: str
    """SESSION@FIRST_TICK."""
    tick_rate_hz: float | None
    """None if the window is densely packed text, whose positions are not times."""
    frames: Mapping[str, NDArray[np.uint8]]
    """Per video input of the model RGB [F, H, W, 3]; gray if masked."""
    heads: Mapping[str, LoggedHead]


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
    batch: Mapping[str, Any], outputs: Mapping[str, Tensor], *, shapes: WindowShapes
) -> LoggedWindow:
    """Return the window of a batch with the most text tokens; the first one if there are none."""
    inputs, targets = batch["inputs"], batch["targets"]
    heads = [head for head in shapes.heads if head in outputs and head in targets]
    num_tokens = torch.zeros(len(batch["weight"]))
    for head in heads:
        if shapes.target_shape(head).kind is Kind.TEXT:
            is_token = (targets[head] != PAD_TOKEN) & targets[f"{head}_valid"]
            num_tokens += is_token.sum(1).cpu() * (batch["weight"].cpu() > 0)
    row = int(num_tokens.argmax())
    return LoggedWindow(
        key=str(batch["keys"][row]),
        tick_rate_hz=None if shapes.is_text_only else shapes.tick_rate_hz,
        frames={
            name: _frames(inputs[name][row : row + 1], inputs[f"{name}_valid"][row])
            for name in shapes.inputs_of_kind(Kind.VIDEO)
            if name in inputs
        },
        heads={
            head: _compare(
                outputs[head][row],
                targets[head][row],
                targets[f"{head}_valid"][row],
                stream=shapes.targets[head],
                shapes=shapes,
            )
            for head in heads
        },
    )


def _compare(
    output: Tensor, target: Tensor, valid: Tensor, *, stream: str, shapes: WindowShapes
) -> LoggedHead:
    """Return recorded and predicted values of one head in one window.

    The model's output at tick t predicts tick t + 1 and is returned at tick t + 1.
    """
    shape = shapes.streams[stream]
    empty = EMPTY[shape.kind]
    recorded = target.cpu().numpy().astype(empty.dtype)
    recorded[~valid.cpu().numpy()] = empty
    chosen = output.float() if shape.kind is Kind.SENSOR else output.argmax(-1)
    predicted = np.full_like(recorded, empty)
    predicted[shape.per_tick :] = chosen.cpu().numpy().reshape(recorded.shape)[: -shape.per_tick]
    if shape.kind is not Kind.TEXT:  # leave out positions of ticks that hold no sample
        num_ticks = len(recorded) // shape.per_tick
        samples = sample_positions(shape, num_ticks=num_ticks, tick_rate_hz=shapes.tick_rate_hz)
        recorded, predicted = recorded[samples], predicted[samples]
    return LoggedHead(stream=stream, shape=shape, recorded=recorded, predicted=predicted)


def _frames(pixels: Tensor, valid: Tensor) -> NDArray[np.uint8]:
    """Return some frames [1, F, ...] of a window, RGB or yuv420, as small RGB [F, H, W, 3]."""
    chosen = torch.linspace(0, pixels.shape[1] - 1, min(MAX_FRAMES, pixels.shape[1])).round().int()
    index = chosen.to(pixels.device)
    frames = normalized_frames(pixels.index_select(1, index), torch.float32)[0].cpu()
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    stride = -(-frames.shape[-1] // MAX_FRAME_SIZE)
    rgb = ((frames * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    small: NDArray[np.uint8] = rgb[:, ::stride, ::stride].contiguous().numpy()
    small[~valid.cpu().numpy()[chosen.numpy()]] = 128
    return small


def render_window(window: LoggedWindow, extras: Mapping[str, Any]) -> RenderedWindow:
    """Render a window as pictures, sounds and a text.

    `extras`: "recipe" and "tokenizer" of :func:`train.trained_model.checkpoint_extras`. Without
        a recipe there are no sounds; without a tokenizer tokens are written as numbers.
    """
    recipe = tokenizer = None
    if "recipe" in extras:
        recipe = make_section(Recipe, extras["recipe"], origin="recipe")
    if "tokenizer" in extras:
        tokenizer = parse_tokenizer(extras["tokenizer"], origin="tokenizer")
    rendered = RenderedWindow(text=_describe_texts(window, tokenizer))
    for camera, frames in window.frames.items():
        rendered.pictures[camera] = np.concatenate([*frames], axis=1)
    for head, values in window.heads.items():
        if values.shape.kind in _RENDERERS:
            _RENDERERS[values.shape.kind](rendered, head, values, recipe)
    return rendered


def write_window(writer: Any, rendered: RenderedWindow, step: int) -> None:  # noqa: ANN401 (no types)
    """Write a window to TensorBoard's images, audio and text, under ``held_out/``."""
    for tag, picture in rendered.pictures.items():
        writer.add_image(f"held_out/{tag}", picture, step, dataformats="HWC")
    for tag, (wave, rate_hz) in rendered.sounds.items():
        writer.add_audio(f"held_out/{tag}", torch.from_numpy(wave)[None], step, rate_hz)
    writer.add_text("held_out/texts", rendered.text, step)
    writer.flush()


def _render_sound(
    rendered: RenderedWindow, head: str, values: LoggedHead, recipe: Recipe | None
) -> None:
    """Add the spectrograms and, with a recipe, the sounds of an audio head."""
    for name, levels in (("recorded", values.recorded), ("predicted", values.predicted)):
        picture = draw_spectrogram(levels, num_levels=values.shape.num_classes)
        picture = picture.repeat(LEVEL_PIXELS, 0).repeat(LEVEL_PIXELS, 1)
        rendered.pictures[f"{head}/{name}"] = picture
        if recipe is not None:
            spec = recipe.audios[values.stream]
            audible = np.where(levels == MASKED_LEVEL, np.uint8(0), levels)
            wave = decode_dmel(audible, rate_hz=spec.rate_hz, settings=spec.dmel)
            rendered.sounds[f"{head}/{name}"] = (wave, spec.rate_hz)


def _render_curves(
    rendered: RenderedWindow, head: str, values: LoggedHead, recipe: Recipe | None
) -> None:
    """Add a picture of curves for each value group of a sensor head."""
    del recipe  # the shape has everything
    start = 0
    for number, group in enumerate(values.shape.values):
        columns = slice(start, start := start + group.count)
        tag = f"{head}/{group.type}"
        if tag in rendered.pictures:
            tag += f"_{number}"
        predicted = values.predicted[:, columns].astype(np.float64)
        vectors = predicted.reshape(len(predicted), -1, group.vector_size)
        predicted = VALUE_TYPES[group.type].clean(vectors).reshape(predicted.shape)
        rendered.pictures[tag] = draw_curves(values.recorded[:, columns], predicted, group)


_RENDERERS: Final[
    Mapping[Kind, Callable[[RenderedWindow, str, LoggedHead, Recipe | None], None]]
] = {Kind.AUDIO: _render_sound, Kind.SENSOR: _render_curves}
"""How a head's values become pictures and sounds, by the kind of its target; text is a table."""


def draw_curves(
    recorded: NDArray[np.floating[Any]], predicted: NDArray[np.floating[Any]], group: ValueGroup
) -> NDArray[np.uint8]:
    """Draw a group's values over the window: recorded wide and gray, predicted thin and orange.

    Both are [S, count], NaN if masked. At most :data:`MAX_CURVES` values are drawn.
    """
    from PIL import Image, ImageDraw, ImageFont

    num_samples, num_curves = len(recorded), min(MAX_CURVES, group.count)
    num_rows = -(-num_curves // CURVE_COLUMNS)
    size = (CURVE_COLUMNS * CURVE_WIDTH, 20 + num_rows * CURVE_HEIGHT)
    picture = Image.new("RGB", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING), "white")
    pen = ImageDraw.Draw(picture)
    unit = f", in {group.unit_label}" if group.unit_label else ""
    labels = [(4, 2, f"recorded{unit} over the window", RECORDED_COLOR)]
    note = f"; {num_curves} of {group.count} values" if num_curves < group.count else ""
    labels.append((size[0] // 2, 2, f"predicted{note}", PREDICTED_COLOR))
    axis = TimeAxis(0.0, num_samples, width=(CURVE_WIDTH - 46) * OVERSAMPLING)
    for number, label in enumerate(group.labels[:num_curves]):
        row, column = divmod(number, CURVE_COLUMNS)
        left, top = column * CURVE_WIDTH + 38, row * CURVE_HEIGHT + 36
        pair = np.stack([recorded[:, number], predicted[:, number]]).astype(np.float64)
        finite = pair[np.isfinite(pair)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
        margin = 0.05 * (high - low) or 0.1
        height = CURVE_HEIGHT - 22
        values = ValueAxis(low - margin, high + margin, height * OVERSAMPLING)
        for curve, color, width in zip(
            pair, (RECORDED_COLOR, PREDICTED_COLOR), (4, 1), strict=True
        ):
            max_jump = MAX_JUMPS.get(group.type, np.inf)
            for times, points in sampled_curves(curve, rate_hz=1.0, axis=axis, max_jump=max_jump):
                xs = axis.xs(times) + left * OVERSAMPLING
                ys = values.ys(points) + top * OVERSAMPLING
                line = [*zip(xs.tolist(), ys.tolist(), strict=True)]
                pen.line(line, fill=color, width=width * OVERSAMPLING, joint="curve")
        labels.append((left, top - 14, label.replace("_", " "), "black"))
        labels += [(left - 36, top - 4, f"{values.high:.4g}", "gray")]
        labels += [(left - 36, top + height - 8, f"{values.low:.4g}", "gray")]
    picture = picture.reduce(OVERSAMPLING)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=10)
    for x, y, text, color in labels:
        pen.text((x, y), text, fill=color, font=font)
    return np.array(picture)


def _describe_texts(window: LoggedWindow, tokenizer: TextTokenizer | None) -> str:
    """Return a Markdown table: per text head the recorded and the predicted text."""
    lines = [f"window {html.escape(window.key)}", ""]
    texts = {h: each for h, each in window.heads.items() if each.shape.kind is Kind.TEXT}
    if texts:
        lines += ["| | recorded | predicted | tokens right |", "|---|---|---|---|"]
    for head, values in texts.items():
        # The first tick is never predicted, so it is not counted.
        is_token = values.recorded[1:] != PAD_TOKEN
        num_right = int((is_token & (values.recorded == values.predicted)[1:]).sum())
        cells = [
            _format_events(tokens.tolist(), tokenizer, window.tick_rate_hz)
            for tokens in (values.recorded, values.predicted)
        ]
        name = head.replace("_", " ")
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
