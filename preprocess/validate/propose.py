"""Propose a recipe from one good recording (``preprocess validate --init``).

::

    files -> proposals (keys, columns) -> probe (readings) -> types, rates, expectations -> YAML

The first pass only finds where values are; each stream is then read as a build reads it, and its
values decide types and rates. Guesses are conservative: what no rule recognizes is a scalar, and
comments mark every guess. Streams that fail validation are written as comments, so that the
recording passes with the recipe.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import yaml

from preprocess.validate.report import check_session, describe_stream
from preprocess.validate.value_checks import fit_velocities
from shared.clock import measure_rate_hz
from shared.config import make_section
from shared.errors import ConfigError, SessionError
from shared.recipe import Recipe
from shared.session.names import SOUND_SUFFIXES, VIDEO_SUFFIXES
from shared.session.records import open_records, parse_records
from shared.session.tables import TableError, open_table
from shared.streams import METADATA_FILE, VECTOR_SIZES, Kind, ValueType, check_stream_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from preprocess.validate.probe import SessionProbe
    from shared.session.lines import Readings
    from shared.streams import SensorStream

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".parquet"})

NUM_LINES = 5000
MAX_BYTES = 64 << 20
"""Lines and bytes at the start of a file that are searched for keys and columns."""

MAX_VIDEO_RATE_HZ = 5.0
MAX_VIDEO_SIDE = 224
"""Rate and shorter side of a proposed video, as in the default recipe."""

MAX_MISSING = 0.01
"""Share of missing values above which columns are streams of their own."""

IRREGULAR_FACTOR = 3.0
"""Readings whose 95th percentile of intervals is this many medians are events: `hold`."""

UNIT_NORM_TOLERANCE = 0.02

_TIME = re.compile(r"(?i)^(time_?stamp|time|t|ts|timeline|seconds?|.*time_?stamp.*|time\W.*)$")
_TIME_UNIT = re.compile(r"(?i)(?:[\[(_ ])(100ns|ns|us|ms|s)(?:[\])]|$)")
_UNIT = re.compile(r"[\[(]([^\])]{1,16})[\])]\s*$")
_AXIS = re.compile(r"(?i)^(.*?)[\s._-]*([xyzw])(?:\s*[\[(][^\])]*[\])])?$")
_ROTATION = re.compile(r"(?i)quat|rot|orient|attitude|(^|[\s._])q([\s._]|$)")
_DIRECTION = re.compile(r"(?i)dir|gaze|normal|forward|ray|axis")
_POSITION = re.compile(
    r"(?i)pos(e|ition)?s?(?![a-z])|loc|transl|origin|point|(^|[\s._])[pt]([\s._]|$)"
)
_ANGLE = re.compile(
    r"(?i)angle|theta|azimuth|elevation|joint|(?<![a-z])(yaw|pitch|roll|qpos|rad(ian)?s?)(?![a-z])"
)
_VELOCITY = re.compile(r"(?i)vel|omega|rad/s|rad_s")
_DEGREES = re.compile(r"(?i)deg|dps|°")


@dataclass(slots=True)
class _Proposal:
    """A stream that is being proposed."""

    spec: dict[str, Any]
    comments: list[str] = field(default_factory=list)


def propose_recipe(folder: Path) -> str:
    """Return a recipe, as YAML with comments, for recordings like the one in a folder.

    Raises:
        SessionError: the folder contains nothing that can be a stream.
    """
    proposals: dict[str, _Proposal] = {}
    notes: list[str] = []
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if path.is_file() and not path.name.startswith("."):
            try:
                for name, proposal in _find_streams(path, notes):
                    _recipe({"stream": proposal})  # refuses names of files and counts of values
                    proposals[_free_name(name, proposals, proposal.spec["kind"])] = proposal
            except (OSError, ValueError, ConfigError, av.FFmpegError) as error:
                notes.append(f"{path.name} is left out: {str(error).splitlines()[0]}")
    if not proposals:
        causes = "; ".join([*notes, "fix: give the folder of one recording"])
        raise SessionError(f"{folder}: nothing in it can be a stream; {causes}")
    _measure(folder, proposals)
    rejected = _reject_failed(folder, proposals)
    if not proposals:
        reasons = [comment for proposal in rejected.values() for comment in proposal.comments[-1:]]
        raise SessionError(f"{folder}: no stream of it passes validation: {'; '.join(reasons)}")
    return _render(folder, proposals, rejected, notes)


def _reject_failed(folder: Path, proposals: dict[str, _Proposal]) -> dict[str, _Proposal]:
    """Take out the streams that fail validation; the others may be judged otherwise then."""
    rejected: dict[str, _Proposal] = {}
    while proposals:
        checked = check_session(folder, recipe=_recipe(proposals))
        if checked.probe is None:
            raise SessionError(checked.report.errors[0])
        statuses = checked.report.streams.items()
        failed = [name for name, status in statuses if status in ("failed", "absent")]
        for name in failed:
            rejected[name] = proposals.pop(name)
            messages = [f.message for f in checked.findings if name in f.streams]
            rejected[name].comments.append(f"left out: {messages[0]}")
        if not failed:
            break
    return rejected


def _recipe(proposals: Mapping[str, _Proposal]) -> Recipe:
    streams = {name: proposal.spec for name, proposal in proposals.items()}
    return make_section(Recipe, {"streams": streams}, origin="proposal")


def _free_name(text: str, taken: Mapping[str, object], kind: str) -> str:
    """Return a stream name like a text that is not taken."""
    plain = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:28].rstrip("_")
    try:
        check_stream_name(plain)
    except ValueError:
        plain = f"{kind}_{plain}"[:28].rstrip("_")
    numbered = (f"{plain}_{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain([plain], numbered) if name not in taken)


def _find_streams(path: Path, notes: list[str]) -> Iterator[tuple[str, _Proposal]]:
    """Yield a name and a proposal for each stream of a file."""
    suffix = path.suffix.lower()
    if suffix in VIDEO_SUFFIXES or suffix in SOUND_SUFFIXES:
        yield from _find_media(path)
    elif path.suffix == ".jsonl":
        yield from _find_in_lines(path, notes)
    elif path.suffix in TABLE_SUFFIXES:
        yield from _find_in_table(path, notes)


def _find_media(path: Path) -> Iterator[tuple[str, _Proposal]]:
    """Find the video of a file, and its audio tracks if the folder has no sound file."""
    with av.open(str(path)) as container:
        videos = [v for v in container.streams.video if v.codec_context.name not in ("png", "bmp")]
        has_video = bool(videos) and path.suffix.lower() not in SOUND_SUFFIXES
        num_tracks = len(container.streams.audio)
        frame = next(container.decode(videos[0]), None) if has_video else None
    if frame is not None:
        is_turned = round(frame.rotation / 90) % 2 == 1
        sides = (frame.width, frame.height) if is_turned else (frame.height, frame.width)
        scale = min(1.0, MAX_VIDEO_SIDE / min(sides))
        size = [min(2048, max(16, round(side * scale / 16) * 16)) for side in sides]
        spec = {"kind": "video", "file": path.name, "rate_hz": MAX_VIDEO_RATE_HZ, "size": size}
        yield path.stem, _Proposal(spec)
    is_beside = any(p.suffix.lower() in SOUND_SUFFIXES for p in path.parent.iterdir())
    for track in range(num_tracks if not (has_video and is_beside) else 0):
        name = path.stem if not has_video else f"{path.stem}_sound"
        track_key = {"track": track} if track else {}
        yield name, _Proposal({"kind": Kind.AUDIO.value, "file": path.name, **track_key})


def _find_in_lines(path: Path, notes: list[str]) -> Iterator[tuple[str, _Proposal]]:
    """Find the sensors and texts of a file of JSON lines."""
    lines = _read_objects(path)
    keys = list(dict.fromkeys(key for line in lines for key in line))
    sizes = {key: size for key in keys if (size := _size(lines, key)) is not None}
    numbers = [key for key, size in sizes.items() if size == 0]
    time_key = _choose_time(
        {key: [line[key] for line in lines if line.get(key) is not None] for key in numbers}
    )
    if time_key is None:
        notes.append(f"{path.name} is left out: none of its keys is an increasing time")
        return
    is_metadata = path.name == METADATA_FILE
    file = {} if is_metadata else {"file": path.name}
    time = {} if time_key == "timestamp" else {"time": time_key}
    time["time_unit"] = _unit_of(time_key)
    for key, size in sizes.items():
        if key != time_key:
            spec = {"kind": "sensor", **file, "key": key, **time}
            values = {"values": [{"count": max(1, size), "type": "scalar"}]}
            yield key if is_metadata else f"{path.stem}_{key}", _Proposal(spec | values)
    texts = [k for k in keys if any(isinstance(line.get(k), str) for line in lines)]
    own_keys: dict[str, dict[str, str]] = {}
    used = {*sizes}
    if is_metadata:
        own_keys = {key: {"key": key} for key in texts}
        used |= {*texts}
    elif "text" in texts:
        labels = sorted({str(line["stream"]) for line in lines if line.get("stream") is not None})
        own_keys = {f"{label}_text": {"stream": label} for label in labels} or {path.stem: {}}
        used |= {"text", "stream"}
    for name, own in own_keys.items():
        yield name, _Proposal({"kind": "text", "file": path.name, **own, **time})
    if left_out := [key for key in keys if key not in used]:
        notes.append(
            f"{path.name}: neither numbers of one length nor a text under `text`: "
            f"{', '.join(left_out)}"
        )


def _read_objects(path: Path) -> list[dict[str, Any]]:
    """Return the first lines that hold a JSON object."""
    with path.open("rb") as file:
        nearby = itertools.takewhile(lambda _: file.tell() < MAX_BYTES, open_records(file).lines)
        first = itertools.islice(nearby, NUM_LINES)
        records = (record for _, raw in first for record in parse_records(raw))
        return [record.values for record in records if record.values is not None]


def _size(lines: Sequence[Mapping[str, Any]], key: str) -> int | None:
    """Return the length of a key's lists of numbers, 0 for plain numbers, None for all else."""
    values = [line[key] for line in lines if line.get(key) is not None]
    if all(map(_is_number, values)):
        return 0 if values else None
    if not all(isinstance(value, list) and value for value in values):
        return None
    is_numbers = all(v is None or _is_number(v) for value in values for v in value)
    return len(values[0]) if is_numbers and len(set(map(len, values))) == 1 else None


def _find_in_table(path: Path, notes: list[str]) -> Iterator[tuple[str, _Proposal]]:
    """Find the sensors of a table: columns with the same missing values are one stream."""
    cells = _read_columns(path)
    time_key = _choose_time({name: values[np.isfinite(values)] for name, values in cells.items()})
    if time_key is None:
        raise TableError("none of its columns is an increasing time")
    together: dict[bytes, list[str]] = {}
    left_out: list[str] = []
    spec = {"kind": "sensor", "file": path.name, "time": time_key, "time_unit": _unit_of(time_key)}
    del cells[time_key]
    for name, values in cells.items():
        is_time = _TIME.fullmatch(name) is not None and _share_of_steps(values[:, 0], 0.0) > 0.9
        is_missing = np.isnan(values).any(axis=1)
        if is_time or np.isinf(values).any() or np.isnan(values).all():
            left_out.append(name)
        elif values.shape[1] > 1:
            group = {"count": values.shape[1], "type": "scalar"}
            yield f"{path.stem}_{name}", _Proposal(spec | {"key": name, "values": [group]})
        else:
            missing = is_missing.tobytes() if is_missing.mean() > MAX_MISSING else b""
            together.setdefault(missing, []).append(name)
    for missing, names in together.items():
        groups = [{"count": 1, "type": "scalar", "names": [name]} for name in names]
        stem = f"{path.stem}_{names[0]}" if missing else path.stem
        yield stem, _Proposal(spec | {"values": groups})
    if left_out:
        notes.append(f"{path.name}: columns without numbers, or times: {', '.join(left_out)}")


def _read_columns(path: Path) -> dict[str, NDArray[np.float64]]:
    """Return the first rows of each column of a table, [N, values]."""
    with path.open("rb") as file:
        table = open_table(file, path.suffix, wanted=())
        names = [name for name in table.names if table.names.count(name) == 1 and name]
        widths = dict.fromkeys(names, 1)
        if table.list_columns:
            widths = _list_widths(path, names, table.list_columns)
        block = next(table.iter_blocks(widths), None)
    if block is None or not len(block.lines):
        raise TableError("it has no rows")
    return {name: cells[:NUM_LINES] for name, cells in block.cells.items()}


def _list_widths(path: Path, names: Sequence[str], list_columns: frozenset[str]) -> dict[str, int]:
    """Return the values per row of the columns of a Parquet file that can hold numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = pq.ParquetFile(path)
    first = next(file.iter_batches(batch_size=1))
    widths: dict[str, int] = {}
    for name in names:
        kind = first.column(name).type
        kind = kind.value_type if name in list_columns else kind
        if pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_timestamp(kind):
            widths[name] = len(first.column(name)[0]) if name in list_columns else 1
    return {name: width for name, width in widths.items() if width > 0}


def _choose_time(columns: Mapping[str, Any]) -> str | None:
    """Return the key of the timestamps: named like one, else the first that increases."""
    values = {name: np.ravel(column) for name, column in columns.items()}
    named = (n for n, v in values.items() if _TIME.fullmatch(n) and _share_of_steps(v, 0.0) > 0.9)
    increasing = (n for n, v in values.items() if len(v) > 2 and _share_of_steps(v, 1e-12) > 0.99)
    return next(itertools.chain(named, increasing), None)


def _share_of_steps(values: NDArray[np.float64], least: float) -> float:
    """Return the share of the steps between values that are large enough; 1 for one value."""
    return float((np.diff(values) >= least).mean()) if len(values) > 1 else float(len(values))


def _unit_of(time_key: str) -> str:
    """Return the unit that the name of a time column says; seconds if it says none."""
    match = _TIME_UNIT.search(time_key)
    return match[1].lower() if match else "s"


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _measure(folder: Path, proposals: dict[str, _Proposal]) -> None:
    """Read the proposed streams, and complete each proposal by what was read."""
    checked = check_session(folder, recipe=_recipe(proposals))
    probe = checked.probe
    if probe is None:
        return
    own_clocks = _own_clocks(probe)
    for proposal in proposals.values():
        unit = probe.units.get(proposal.spec.get("file", METADATA_FILE))
        if unit is not None and "time_unit" in proposal.spec:
            proposal.spec["time_unit"] = unit.unit
    for name in own_clocks:
        proposals[name].spec["clock"] = "own"
        proposals[name].comments.append("guess: its times begin at 0, those of other files do not")
    if probe.units or own_clocks:
        checked = check_session(folder, recipe=_recipe(proposals))
        probe = checked.probe or probe
    for name, stats in checked.report.stats["streams"].items():
        # The types of values are not known yet.
        proposals[name].comments.insert(0, describe_stream({**stats, "values": ()}))
        if name in probe.videos:
            times_s, spec = probe.videos[name].track.times_s, proposals[name].spec
            if (rate_hz := measure_rate_hz(times_s)) is not None:
                spec["rate_hz"] = min(MAX_VIDEO_RATE_HZ, round_rate(rate_hz))
                spec["expect"] = _expect_times(times_s)
        elif name in probe.readings:
            _complete_sensor(proposals[name], probe.readings[name], probe.recipe.sensors[name])


def _own_clocks(probe: SessionProbe) -> list[str]:
    """Return the sensors whose times begin at 0 while those of other files are on another clock."""
    spans = {
        file: (float(lines[0].times_s[0]), float(lines[0].times_s[-1]))
        for file, lines in probe.files.items()
        if len(lines[0].times_s) and probe.sensors_of(file)
    }
    if not spans or max(s for s, _ in spans.values()) <= min(s for _, s in spans.values()):
        return []
    begins_at_0 = [f for f, (first_s, last_s) in spans.items() if abs(first_s) <= last_s - first_s]
    if len(begins_at_0) == len(spans):
        return []
    return [name for file in begins_at_0 for name in probe.sensors_of(file)]


def _complete_sensor(proposal: _Proposal, readings: Readings, spec: SensorStream) -> None:
    """Set types, rate, rule of resampling and expectations of a sensor."""
    values, times_s = readings.values.astype(np.float64), readings.times_s
    stem = "" if spec.file == METADATA_FILE else spec.file.rpartition(".")[0]
    label = f"{stem} {spec.key or ''}".strip()
    groups = guess_groups(values, times_s=times_s, names=spec.names or (), label=label)
    proposal.spec["values"] = groups
    if any(group["type"] != "scalar" for group in groups):
        proposal.comments.append("guess: the types of the values")
    rate_hz = measure_rate_hz(times_s)
    if rate_hz is None:
        return
    proposal.spec["rate_hz"] = round_rate(rate_hz)
    intervals_s = np.diff(times_s)
    is_irregular = float(np.percentile(intervals_s, 95)) > IRREGULAR_FACTOR / rate_hz
    if is_irregular or rate_hz < proposal.spec["rate_hz"] / 1.05:
        proposal.spec["resample"] = "hold"
        proposal.spec["max_age_s"] = _round_out(1.5 * float(intervals_s.max()), 1)
        proposal.comments.append("guess: readings are too rare or irregular to interpolate")
    expect = _expect_times(times_s)
    if all(group["type"] in ("scalar", "position", "velocity") for group in groups):
        margin = 0.1 * float(np.ptp(values)) or 1.0
        low, high = float(values.min()) - margin, float(values.max()) + margin
        expect["range"] = [_round_out(low, -1), _round_out(high, 1)]
    proposal.spec["expect"] = expect


def _expect_times(times_s: NDArray[np.float64]) -> dict[str, Any]:
    """Return the rate and the longest gap to expect of times like these."""
    rate_hz = (len(times_s) - 1) / float(times_s[-1] - times_s[0])
    gap_s = max(1.5 * float(np.diff(times_s).max()), 3 / rate_hz)
    return {"min_rate_hz": _round_out(0.9 * rate_hz, -1), "max_gap_s": _round_out(gap_s, 1)}


def round_rate(rate_hz: float) -> float:
    """Return a round rate at or just below a measured one, with whole samples in 2 s."""
    for step in (10.0, 5.0, 1.0, 0.5):
        rounded = math.floor(rate_hz * 1.02 / step) * step
        if rounded >= 0.9 * rate_hz and rounded > 0:
            return min(rounded, 2000.0)
    return max(0.5, math.floor(2 * rate_hz) / 2)


def _round_out(value: float, side: int) -> float:
    """Round a value to three digits, up if `side` is 1, down if it is -1."""
    if value == 0 or not math.isfinite(value):
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 2)
    rounded = math.ceil(value / unit) if side > 0 else math.floor(value / unit)
    return float(f"{rounded * unit:.6g}")


def guess_groups(
    values: NDArray[np.float64], *, times_s: NDArray[np.float64], names: Sequence[str], label: str
) -> list[dict[str, Any]]:
    """Guess the value groups of a sensor from its readings [N, D].

    A list under a key has no `names`; its label has the file's name without suffix, and the key.
    """
    if names:
        groups: list[dict[str, Any]] = []
        guessed = _guess_columns(values, names, label)
        for (guess, unit), members in itertools.groupby(guessed, key=lambda value: value[:2]):
            columns = [name for _, _, of_value in members for name in of_value]
            group = {"count": len(columns), "type": str(guess)} | ({"unit": unit} if unit else {})
            groups.append(group | {"names": columns})
        return groups
    size = values.shape[1]
    if size == 7 and _has_unit_norms(values[:, 3:]):
        return [{"count": 3, "type": "position"}, {"count": 4, "type": "quaternion"}]
    half = max(1, size // 2)
    kind = _guess_list(values, label)
    is_angle = bool(np.abs(values[:, :half]).max(initial=0.0) <= math.pi + 1e-3)
    fit = fit_velocities(times_s, values[:, :half], values[:, -half:], is_angle=is_angle)
    is_close = fit is not None and fit.correlation > 0.9 and 0.8 <= fit.slope <= 1.25
    if size % 2 == 0 and is_close and kind in (ValueType.SCALAR, ValueType.ANGLE):
        pose = "angle" if is_angle else "scalar"
        return [{"count": half, "type": pose}, {"count": half, "type": "velocity"}]
    return [{"count": size, "type": str(kind)}]


def _guess_list(values: NDArray[np.float64], label: str) -> ValueType:
    """Guess the type of a list of values by its name and its norms."""
    size = values.shape[1]
    for kind, pattern in ((ValueType.QUATERNION, _ROTATION), (ValueType.DIRECTION, _DIRECTION)):
        is_w_last = "wxyz" not in label.lower()
        if size % VECTOR_SIZES[kind] == 0 and pattern.search(label) and is_w_last:
            vectors = values.reshape(-1, VECTOR_SIZES[kind])
            if _has_unit_norms(vectors):
                return kind
    if size % 3 == 0 and _POSITION.search(label):
        return ValueType.POSITION
    return _guess_scalar(values, label)


def _guess_columns(
    values: NDArray[np.float64], names: Sequence[str], label: str
) -> Iterator[tuple[ValueType, str, list[str]]]:
    """Yield type, unit and names of each value or vector of a table's columns."""
    index = 0
    while index < len(names):
        vector = next((v for n in (4, 3) if (v := _vector_columns(names, index, n))), None)
        columns = vector or [index]
        axis = _AXIS.fullmatch(names[index])
        prefix = axis[1].lower() if axis else names[index]
        context = prefix if len(prefix) > 2 else f"{prefix} {label}"
        kind = _guess_list(values[:, columns], context)
        if vector is None:
            kind = _guess_scalar(values[:, columns], names[index])
        elif kind not in VECTOR_SIZES:  # components of an unknown vector are scalars together
            kind = ValueType.SCALAR
        unit = _UNIT.search(names[index])
        yield kind, unit[1] if unit else "", [names[i] for i in columns]
        index += len(columns)


def _vector_columns(names: Sequence[str], first: int, size: int) -> list[int] | None:
    """Return the columns of a vector in the order x, y, z, w, if it begins at a column."""
    matches = [_AXIS.fullmatch(name) for name in names[first : first + size]]
    axes = {match[2].lower(): first + i for i, match in enumerate(matches) if match}
    is_one = len({match[1].lower() for match in matches if match}) == 1
    wanted = "xyzw"[:size]
    return [axes[axis] for axis in wanted] if is_one and axes.keys() == set(wanted) else None


def _has_unit_norms(vectors: NDArray[np.float64]) -> bool:
    norms = np.linalg.norm(vectors, axis=1)
    return bool((np.abs(norms - 1) < UNIT_NORM_TOLERANCE).mean() > 0.99)


def _guess_scalar(values: NDArray[np.float64], name: str) -> ValueType:
    """Guess the type of single values by name and range."""
    is_degrees = _DEGREES.search(name) is not None
    if _VELOCITY.search(name) and not is_degrees:
        return ValueType.VELOCITY
    is_moving = bool(np.ptp(values))
    if _ANGLE.search(name) and not is_degrees and np.abs(values).max() <= math.pi + 1e-3:
        return ValueType.ANGLE if is_moving else ValueType.SCALAR
    if is_moving and values.min() >= 0 and values.max() <= 1:
        return ValueType.FRACTION
    return ValueType.SCALAR


def _render(
    folder: Path,
    proposals: Mapping[str, _Proposal],
    rejected: Mapping[str, _Proposal],
    notes: Sequence[str],
) -> str:
    """Write the recipe with its comments."""
    lines = [
        f"# Proposed from {folder.name} by `python -m preprocess validate --init`.",
        "# Check each guess; write `required: true` into streams that a session must have.",
        *(f"# {_plain(note)}" for note in notes),
        "streams:",
    ]
    for start, some in (("  ", proposals), ("  # ", rejected)):
        for name, proposal in sorted(some.items()):
            lines += [f"  # {_plain(comment)}" for comment in proposal.comments]
            spec = {k: v for k, v in proposal.spec.items() if (k, v) != ("time_unit", "s")}
            flow = yaml.safe_dump(spec, default_flow_style=True, sort_keys=False, width=math.inf)
            lines.append(f"{start}{name}: {flow.strip()}")
    text = "\n".join(lines) + "\n"
    Recipe.model_validate(yaml.safe_load(text))
    return text


def _plain(text: str) -> str:
    """Return a text as one printable line."""
    return " ".join(text.encode("ascii", "backslashreplace").decode().split())
