"""What has to be built: pure arithmetic on scans, the recipe and what the old manifest says.

Sessions keep the shards they are in. New sessions make new shards; a changed one is re-made in its
place, a removed one leaves its shard. A column of a shard is due when its fingerprint differs; the
others are not even opened. A changed window, split or packing recipe starts over.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from shared.layout import COLUMNS, Column, column_basis, presence_bits
from shared.manifest import FORMAT_VERSION, fingerprint_of
from shared.recipe import SPLITS, Recipe, Split, json_of, split_of
from shared.session import AUDIO_FILE, METADATA_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from shared.scan import SessionScan

_BYTES_PER_PIXEL = {"h264": 0.1, "mjpeg": 0.35, "yuv420": 1.5, "raw": 3.0}
"""Bytes of a stored picture per pixel, for packing only."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Some windows of a session that lie together in a shard."""

    session: str
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltColumn:
    """A finished column file, as a shard's index describes it."""

    file: str
    length_bytes: int
    sha256: str
    fingerprint: str
    basis: Mapping[str, Any]
    rows: Mapping[str, str]
    """Session -> hash of its rows and of what the column takes from it; one that is the same in
    the new column is copied. Empty where not known: the column was made in format 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltShard:
    """A finished shard, as the old manifest and its index describe it."""

    name: str
    split: Split
    slices: tuple[Slice, ...]
    index_file: str
    columns: Mapping[str, BuiltColumn]
    lacks_statistics: bool = False
    """Its index is of a version of this program that made fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to write: which columns are due and why, and which stay as they are."""

    name: str
    split: Split
    slices: tuple[Slice, ...]
    due: Mapping[str, str]
    """Column name -> reason."""
    bases: Mapping[str, Mapping[str, Any]]
    """Column name -> what it depends on; the hash of it is its fingerprint."""
    rows: Mapping[str, Mapping[str, str]]
    """Column name -> session -> hash of its rows, see :class:`BuiltColumn`."""
    kept: Mapping[str, BuiltColumn]
    kept_index_file: str | None
    """Describes the columns that are kept."""
    copied: Mapping[str, tuple[str, ...]]
    """Column name -> sessions whose rows are copied from the old column, encoded as they are."""
    old_index_file: str | None
    generation: int

    @property
    def num_samples(self) -> int:
        """Rows of the shard."""
        return sum(len(s.windows) for s in self.slices)

    def file_name(self, suffix: str) -> str:
        """Name of a file of this shard that never replaces one that a reader may have open."""
        name = f"{self.name}.{suffix}"
        return versioned(name, self.generation) if self.generation else name


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything a build will do."""

    tasks: tuple[ShardTask, ...]
    unchanged: tuple[BuiltShard, ...]
    dropped: tuple[str, ...]
    """Names of old shards that go."""
    order: tuple[str, ...]
    """Names of all shards of the new set, in its order."""
    old_version: int = FORMAT_VERSION
    """Format of the old set; that of the new one is always the newest."""

    @property
    def is_empty(self) -> bool:
        """Whether the old set is up to date."""
        return not self.tasks and not self.dropped and self.old_version == FORMAT_VERSION

    @property
    def keeps_samples(self) -> bool:
        """Whether every sample stays as it is, in its place."""
        return not self.dropped and not any(task.due for task in self.tasks)

    @property
    def upgrade(self) -> str | None:
        """What a set of an older format needs besides :meth:`reasons`."""
        if self.old_version == FORMAT_VERSION:
            return None
        rest = ", columns stay" if self.keeps_samples else ""
        return f"format {self.old_version} -> {FORMAT_VERSION}: indexes are rewritten{rest}"

    def reasons(self) -> list[str]:
        """One line per column and reason: ``3 of 9 audio columns: mel.levels 16 -> 32``."""
        total = len(self.order)
        counts: dict[tuple[str, str], int] = {}
        for task in self.tasks:
            for column, reason in task.due.items():
                counts[column, reason] = counts.get((column, reason), 0) + 1
        lines = [f"{n} of {total} {column} columns: {why}" for (column, why), n in counts.items()]
        num_bare = sum(not task.due for task in self.tasks)
        if num_bare and self.upgrade is None:
            lines.append(
                f"{num_bare} of {total} indexes: they lack hashes or statistics of their sessions"
            )
        if self.dropped:
            lines.append(f"{len(self.dropped)} shards go: their sessions are gone or moved")
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class OldSet:
    """What a plan may keep."""

    recipe: Recipe
    generation: int
    shards: tuple[BuiltShard, ...]
    format_version: int = FORMAT_VERSION


@dataclass(slots=True)
class _Draft:
    """A shard while it is being planned."""

    name: str
    split: Split
    slices: list[Slice] = field(default_factory=list)
    old: BuiltShard | None = None


def plan_shards(
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    *,
    tokenizer_sha256: str,
    old: OldSet | None = None,
) -> Plan:
    """Plan a build.

    Args:
        scans: every session, by name.
        recipe: the recipe to build by.
        tokenizer_sha256: hash of the tokenizer that text will be encoded with.
        old: the set that is there, if any.
    """
    kept = {name: _kept_windows(scan, recipe) for name, scan in sorted(scans.items())}
    repacked = setting_changes(_packing(old.recipe), _packing(recipe)) if old is not None else []
    drafts = _inherit(old.shards, kept) if old is not None and not repacked else []
    why_new = "; ".join(repacked) or "new"
    placed = {s.session for d in drafts for s in d.slices}
    fresh = [name for name, windows in kept.items() if windows and name not in placed]
    drafts += _pack(fresh, kept, recipe, drafts)
    drafts = sorted((d for d in drafts if d.slices), key=lambda d: (SPLITS.index(d.split), d.name))
    generation = 0 if old is None else old.generation + 1
    version = FORMAT_VERSION if old is None else old.format_version
    tasks, unchanged = [], []
    for draft in drafts:
        task = _task(draft, scans, recipe, tokenizer_sha256, generation, why_new=why_new)
        if draft.old is None or version < FORMAT_VERSION or _changes(task, draft.old):
            tasks.append(task)
        else:
            unchanged.append(draft.old)
    names = {d.name for d in drafts}
    return Plan(
        tasks=tuple(tasks),
        unchanged=tuple(unchanged),
        dropped=tuple(s.name for s in old.shards if s.name not in names) if old else (),
        order=tuple(d.name for d in drafts),
        old_version=version,
    )


def versioned(name: str, generation: int) -> str:
    """``train-000000.audio.tar`` -> ``train-000000.g2.audio.tar``."""
    stem, _, rest = name.partition(".")
    return f"{stem}.g{generation}.{rest}"


def _kept_windows(scan: SessionScan, recipe: Recipe) -> tuple[int, ...]:
    """Windows of a session that become samples."""
    if scan.session_rejection(recipe) is not None:
        return ()
    windows = scan.windows(recipe)
    return tuple(w.index for w in windows if scan.rejection(w, recipe) is None)


def _packing(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide which sample lies in which shard, and their values."""
    sections = json_of(recipe)
    return {
        f"{part}.{key}": value
        for part in ("window", "split", "shard")
        for key, value in sections[part].items()
    }


def setting_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """``key old -> new`` of each key whose value is another one."""
    return [
        f"{key} {_short(before.get(key))} -> {_short(value)}"
        for key, value in after.items()
        if before.get(key) != value
    ]


def _short(value: Any) -> str:  # noqa: ANN401
    """A value in few letters; of a hash the first ones."""
    return str(value) if len(str(value)) < 64 else f"{str(value)[:12]}..."


def _inherit(shards: Sequence[BuiltShard], kept: Mapping[str, tuple[int, ...]]) -> list[_Draft]:
    """Old shards with the sessions that can stay where they are."""
    homes: dict[str, list[Slice]] = {}
    for shard in shards:
        for piece in shard.slices:
            homes.setdefault(piece.session, []).append(piece)
    is_same = {
        name: tuple(w for p in pieces for w in p.windows) == kept.get(name, ())
        for name, pieces in homes.items()
    }
    drafts = []
    for shard in shards:
        draft = _Draft(shard.name, shard.split, old=shard)
        for piece in shard.slices:
            if is_same[piece.session]:
                draft.slices.append(piece)
            elif len(homes[piece.session]) == 1 and kept.get(piece.session):
                draft.slices.append(Slice(piece.session, kept[piece.session]))
        drafts.append(draft)
    return drafts


def _pack(
    sessions: Sequence[str],
    kept: Mapping[str, tuple[int, ...]],
    recipe: Recipe,
    drafts: Sequence[_Draft],
) -> list[_Draft]:
    """Sessions in order of name into new shards of about the target size; long ones are divided."""
    capacity = max(1, int(recipe.shard.target_bytes / sample_bytes(recipe)))
    new: list[_Draft] = []
    for split in SPLITS:
        numbers = [int(d.name.rpartition("-")[2]) for d in drafts if d.split == split]
        number = max(numbers, default=-1) + 1
        room = 0
        for session in sessions:
            if split_of(session, recipe) != split:
                continue
            windows = kept[session]
            while windows:
                if room == 0:
                    new.append(_Draft(f"{split}-{number:06d}", split))
                    number, room = number + 1, capacity
                part, windows = windows[:room], windows[room:]
                new[-1].slices.append(Slice(session, part))
                room -= len(part)
    return new


def sample_bytes(recipe: Recipe) -> float:
    """About how many bytes a sample takes, both eyes and sound included."""
    frames = recipe.count(recipe.vision.rate_hz)
    picture = recipe.vision.size**2 * _BYTES_PER_PIXEL[recipe.vision.codec]
    sound = 2 * recipe.count(recipe.audio.rate_hz)
    mel = recipe.count(recipe.mel.rate_hz) * recipe.mel.channels
    numbers = recipe.sensors.proprio_size + recipe.sensors.touch_size
    sensors = 4 * recipe.count(recipe.sensors.rate_hz) * numbers
    return 2 * frames * picture + sound + mel + sensors


def _task(
    draft: _Draft,
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    tokenizer_sha256: str,
    generation: int,
    *,
    why_new: str,
) -> ShardTask:
    """The task that brings a shard up to date."""
    facts = {n: _row_facts(draft.slices, c, scans, recipe) for n, c in COLUMNS.items()}
    rows = {n: {s: fingerprint_of(f) for s, f in of.items()} for n, of in facts.items()}
    bases = {
        name: {
            **column_basis(column, recipe, tokenizer_sha256=tokenizer_sha256),
            "rows": fingerprint_of(list(rows[name].values())),
        }
        for name, column in COLUMNS.items()
    }
    old = draft.old
    due: dict[str, str] = {}
    kept: dict[str, BuiltColumn] = {}
    copied: dict[str, tuple[str, ...]] = {}
    for name, basis in bases.items():
        built = old.columns.get(name) if old is not None else None
        if built is not None and _is_up_to_date(built, basis, facts[name]):
            fingerprint = fingerprint_of(basis)
            kept[name] = replace(built, fingerprint=fingerprint, basis=basis, rows=rows[name])
            continue
        due[name] = _reason(built, basis) if old is not None else why_new
        if built is not None and _settings(built.basis) == _settings(basis):
            copied[name] = tuple(s for s, h in rows[name].items() if built.rows.get(s) == h)
    return ShardTask(
        name=draft.name,
        split=draft.split,
        slices=tuple(draft.slices),
        due=due,
        bases=bases,
        rows=rows,
        kept=kept,
        kept_index_file=old.index_file if old is not None else None,
        copied=copied,
        old_index_file=old.index_file if old is not None else None,
        generation=generation,
    )


def _changes(task: ShardTask, old: BuiltShard) -> bool:
    """Whether a task makes anything of a shard new, if only its index."""
    is_changed = bool(task.due) or task.slices != old.slices or task.kept != old.columns
    return is_changed or old.lacks_statistics


def _is_up_to_date(
    built: BuiltColumn, basis: Mapping[str, Any], facts: Mapping[str, list[Any]]
) -> bool:
    """Whether a column is what it would be if it were made now."""
    if built.fingerprint == fingerprint_of(basis):
        return True
    # Format 1 hashed the facts of all sessions at once.
    in_format_1 = {**basis, "rows": fingerprint_of(list(facts.values()))}
    return not built.rows and built.fingerprint == fingerprint_of(in_format_1)


def _row_facts(
    slices: Sequence[Slice], column: Column, scans: Mapping[str, SessionScan], recipe: Recipe
) -> dict[str, list[Any]]:
    """Session -> its rows in a shard, and the sources and facts that a column takes from it."""
    facts = {}
    for piece in slices:
        scan = scans[piece.session]
        sources = {n: scan.sources[n].sha256 for n in column.sources if n in scan.sources}
        offset_s = scan.clock_offset_s if METADATA_FILE in column.sources else 0.0
        gain = scan.gain if AUDIO_FILE in column.sources else 1.0
        # Text lies over the whole session, so that another stream's new length can move it.
        windows = scan.windows(recipe)
        bits = [
            presence_bits(set(scan.present(windows[w], recipe)) & set(column.streams))
            for w in piece.windows
        ]
        moved = {s: scan.moved[s] for s in column.streams if s in scan.moved}
        facts[piece.session] = [piece.session, piece.windows, bits, sources, offset_s, gain]
        facts[piece.session] += [moved] if moved else []  # others hash as they always did
    return facts


def _settings(basis: Mapping[str, Any]) -> dict[str, Any]:
    """What a column depends on besides its rows."""
    return {key: value for key, value in basis.items() if key != "rows"}


def _reason(built: BuiltColumn | None, basis: Mapping[str, Any]) -> str:
    """Why a column is due, in words."""
    if built is None:
        return "its file is gone or cut"
    return "; ".join(setting_changes(built.basis, _settings(basis))) or "its sessions changed"
