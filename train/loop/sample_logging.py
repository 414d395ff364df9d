"""One held-out window in TensorBoard: what was recorded beside what the model predicts.

::

    batch, outputs -> pick_window    the window of the first held-out batch in which most is said
                   -> render_window    pictures, sounds and a text, pure
                   -> write_window   to TensorBoard, under held_out/

It is the same window at every evaluation. Nothing is drawn at random and the model is not touched.
On one core it costs an evaluation about 0.5 s and 0.4 MB of the event file, half of the time for
turning two times 4 s of dMel into sound; the first one 3 s more, for importing librosa and
matplotlib.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from shared.config import make_section
from shared.media.mel import decode_dmel
from shared.media.tokenizer import parse_tokenizer
from shared.recipe import PAD_TOKEN, VISION_STREAMS, Recipe
from shared.session.reader import MASKED_LEVEL
from train.config import HEAD_STREAM, Head
from train.data.pixels import IMAGENET_MEAN, IMAGENET_STD, normalized_frames
from train.figures import draw_levels
from train.model.outputs import TEXT_HEADS, group_events

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from shared.media.tokenizer import TextTokenizer
    from train.config import TrainConfig
    from train.data.batch import WindowShapes

MAX_FRAMES = 8
"""Frames shown of each eye."""

MAX_FRAME_SIZE = 112
"""Larger frames are shown at every second, third, ... pixel."""

LEVEL_PIXELS = 3
"""Height and width of a dMel level."""

JOINT_COLUMNS = 2

Pair = tuple["NDArray[Any]", "NDArray[Any]"]
"""Recorded and predicted, on the same places."""


class Sizes(Protocol):
    """What a run is made of."""

    config: TrainConfig
    shapes: WindowShapes


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedWindow:
    """What was recorded and predicted in one window of T ticks, on the CPU.

    Nothing predicts the first tick; there the predicted values are masked: PAD, MASKED_LEVEL, NaN.
    """

    key: str
    """SESSION/WINDOW."""
    tick_rate_hz: float | None
    """None where the window is densely packed text, whose places are no times."""
    frames: Mapping[str, NDArray[np.uint8]]
    """Per eye that the model sees RGB [F, H, W, 3]; grey where masked."""
    tokens: Mapping[Head, Pair]
    """Per text head int64 [T]."""
    levels: Pair | None
    """DMel uint8 [A, channels]; MASKED_LEVEL where masked."""
    poses: Pair | None
    """Angles and velocities float32 [S, P]; NaN where masked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A window as TensorBoard takes it, by tag."""

    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)
    """RGB [H, W, 3]."""
    sounds: dict[str, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    """Full scale 1, and the rate in Hz."""
    text: str = ""
    """Markdown."""


def pick_window(
    batch: Mapping[str, Any],
    outputs: Mapping[str, Tensor],
    sizes: Sizes,
) -> LoggedWindow:
    """The window of a batch in which most is said, or else the first one.

    Args:
        batch: docs/architecture.md, "The batch".
        outputs: of the model for it.
        sizes: heads and sizes of the window, as :class:`train.loop.state.TrainState` has them.
    """
    config, shapes = sizes.config, sizes.shapes
    targets = batch["targets"]
    num_said = torch.zeros(len(batch["weight"]))
    for head in TEXT_HEADS:
        if head in config.heads:
            spoken = (targets[head] != PAD_TOKEN) & targets[f"{head}_valid"]
            num_said += spoken.sum(1).cpu() * (batch["weight"].cpu() > 0)
    row = int(num_said.argmax())
    one = {
        group: {n: t[row : row + 1] for n, t in tensors.items()}
        for group, tensors in (("inputs", batch["inputs"]), ("targets", targets), ("out", outputs))
    }
    pairs = {
        head: _pair(head, one["out"][head], one["targets"], per_tick=_per_tick(head, shapes))
        for head in config.heads
    }
    return LoggedWindow(
        key=str(batch["keys"][row]),
        tick_rate_hz=None if config.is_text_only else shapes.tick_rate_hz,
        frames={
            str(eye): _frames(one["inputs"][eye], one["inputs"][f"{eye}_valid"])
            for eye in VISION_STREAMS
            if eye in one["inputs"]
        },
        tokens={head: pair for head, pair in pairs.items() if head in TEXT_HEADS},
        levels=pairs.get(Head.AUDIO),
        poses=pairs.get(Head.ANIMATION),
    )


def render_window(window: LoggedWindow, reading: Mapping[str, Any]) -> Drawn:
    """Pictures, sounds and a text.

    Args:
        window: what to show.
        reading: "recipe" and "tokenizer" as :func:`train.trained_model.checkpoint_extras` gives
        them. Without
            the first there are no sounds, without the second tokens are shown as numbers.
    """
    recipe = tokenizer = None
    if "recipe" in reading:
        recipe = make_section(Recipe, reading["recipe"], origin="recipe")
    if "tokenizer" in reading:
        tokenizer = parse_tokenizer(reading["tokenizer"], origin="tokenizer")
    drawn = Drawn(text=_describe_texts(window, tokenizer))
    if window.frames:
        drawn.pictures["frames_recorded"] = _tile_frames(window.frames)
    for index, name in enumerate(("recorded", "predicted")):
        if window.levels is None:
            break
        levels = window.levels[index]
        num_levels = MASKED_LEVEL if recipe is None else recipe.mel.levels
        picture = draw_levels(levels, num_levels=num_levels)
        drawn.pictures[f"spectrogram_{name}"] = picture.repeat(LEVEL_PIXELS, 0).repeat(
            LEVEL_PIXELS, 1
        )
        if recipe is not None:
            heard = np.where(levels == MASKED_LEVEL, np.uint8(0), levels)
            rate_hz = recipe.audio.rate_hz
            wave = decode_dmel(heard, rate_hz=rate_hz, recipe=recipe.mel)
            drawn.sounds[f"sound_{name}"] = (wave, rate_hz)
    if window.poses is not None:
        drawn.pictures["joints"] = _draw_joints(*window.poses)
    return drawn


def write_window(writer: Any, drawn: Drawn, step: int) -> None:  # noqa: ANN401 (no types)
    """Put a window under ``held_out/`` of TensorBoard's images, audio and text."""
    for tag, picture in drawn.pictures.items():
        writer.add_image(f"held_out/{tag}", picture, step, dataformats="HWC")
    for tag, (wave, rate_hz) in drawn.sounds.items():
        writer.add_audio(f"held_out/{tag}", torch.from_numpy(wave)[None], step, rate_hz)
    writer.add_text("held_out/texts", drawn.text, step)
    writer.flush()


def _per_tick(head: Head, shapes: WindowShapes) -> int:
    if head is Head.AUDIO:
        return shapes.audio_frames_per_tick
    return shapes.sensor_samples_per_tick if head is Head.ANIMATION else 1


def _pair(head: Head, output: Tensor, targets: Mapping[str, Tensor], *, per_tick: int) -> Pair:
    """Recorded and predicted values of one window, [places, ...]; predictions of tick t + 1 stand
    at tick t + 1.
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
    """Some frames of one window, of either form, as small RGB [F, H, W, 3]."""
    chosen = torch.linspace(0, pixels.shape[1] - 1, min(MAX_FRAMES, pixels.shape[1])).round().int()
    index = chosen.to(pixels.device)
    frames = normalized_frames(pixels.index_select(1, index), torch.float32)[0].cpu()
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).view(2, 3, 1, 1)
    stride = -(-frames.shape[-1] // MAX_FRAME_SIZE)
    rgb = ((frames * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
    shown: NDArray[np.uint8] = rgb[:, ::stride, ::stride].contiguous().numpy()
    shown[~valid[0].cpu().numpy()[chosen.numpy()]] = 128
    return shown


def _tile_frames(frames: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Frames in a row per eye, the left one above."""
    return np.concatenate([np.concatenate([*row], axis=1) for row in frames.values()], axis=0)


def _draw_joints(
    recorded: NDArray[np.float32], predicted: NDArray[np.float32]
) -> NDArray[np.uint8]:
    """Each joint's angle over the window, recorded wide and grey, predicted thin and orange."""
    # Without pyplot there is no state outside this figure; it takes 0.5 s to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    num_joints = recorded.shape[1] // 2
    num_rows = -(-num_joints // JOINT_COLUMNS)
    height = 0.9 * num_rows + 0.4
    figure = Figure(figsize=(6, height), dpi=80)
    # A layout engine would take most of the time.
    figure.subplots_adjust(
        left=0.07, right=0.99, bottom=0.1 / height, top=1 - 0.5 / height, hspace=0.4, wspace=0.2
    )
    canvas = FigureCanvasAgg(figure)
    for joint in range(num_joints):
        axes = figure.add_subplot(num_rows, JOINT_COLUMNS, joint + 1)
        axes.plot(recorded[:, joint], color="#9aa6b6", linewidth=4)
        axes.plot(predicted[:, joint], color="#d4570a", linewidth=1.2)
        axes.set_title(f"joint {joint}", fontsize=8, pad=2)
        axes.set_xticks([])  # ticks are most of a figure's cost
        axes.yaxis.set_major_locator(MaxNLocator(2))
        axes.tick_params(labelsize=7)
    figure.legend(
        figure.axes[0].lines,
        ["recorded, in rad over the window", "predicted"],
        ncols=2,
        fontsize=8,
        loc="upper left",
    )
    canvas.draw()  # type: ignore[no-untyped-call]
    rgba = np.asarray(canvas.buffer_rgba(), dtype=np.uint8)  # type: ignore[no-untyped-call]
    return rgba[..., :3].copy()


def _describe_texts(window: LoggedWindow, tokenizer: TextTokenizer | None) -> str:
    """A Markdown table: per text head what was said, and what was predicted."""
    lines = [f"window {html.escape(window.key)}", ""]
    if window.tokens:
        lines += ["| | recorded | predicted | tokens right |", "|---|---|---|---|"]
    for head, (recorded, predicted) in window.tokens.items():
        # The first tick is never predicted, so it counts neither way.
        spoken = recorded[1:] != PAD_TOKEN
        right = int((spoken & (recorded == predicted)[1:]).sum())
        cells = [
            _say(tokens.tolist(), tokenizer, window.tick_rate_hz)
            for tokens in (recorded, predicted)
        ]
        name = HEAD_STREAM[head].replace("_", " ")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {right} of {int(spoken.sum())} |")
    return "\n".join(lines)


def _say(tokens: Sequence[int], tokenizer: TextTokenizer | None, rate_hz: float | None) -> str:
    """Events with their times, in one cell of a table."""
    if tokenizer is None:
        return " ".join(str(token) for token in tokens if token != PAD_TOKEN)
    times_s = [place / (rate_hz or 1.0) for place in range(len(tokens))]
    events = group_events(tokens, times_s, tokenizer)
    return "<br>".join(
        (f"{event['timestamp']:.1f} s: " if rate_hz else "") + _escape(event["text"])
        for event in events
    )


def _escape(text: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    escaped = html.escape(text.replace("\n", " "))
    return "".join(f"&#{ord(c)};" if c in r"\`*_{}[]()#+!|~" else c for c in escaped)
