"""The shard job: scan, plan, build, commit.

Scans and shard tasks are independent functions; :mod:`preprocess.build.cluster` runs them.
Nothing of the old set is touched before the new manifest is there, and what a killed run had
finished is taken over by the next.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from preprocess.build.cluster import Joint
from preprocess.build.commit import commit, count_windows, make_manifest, rejected_lines, sweep
from preprocess.build.plan import plan_shards
from preprocess.build.previous_set import find_corrupt_files
from preprocess.build.scans import scan_sessions
from preprocess.build.shards import Plan, PreviousSet, ShardTask, versioned
from preprocess.build.sources import column_seconds, find_recordings
from preprocess.build.task import build_shard, describe_shard, salvage_shard
from preprocess.build.task_context import TaskContext
from preprocess.build.video_subtasks import (
    TASK_S,
    EncodedVideo,
    VideoSubtask,
    encode_subtask,
    split_task,
)
from shared.errors import ConfigError, CorruptError, FormatVersionError, ShardError
from shared.media.tokenizer import TextTokenizer, load_tokenizer, train_tokenizer
from shared.recipe import Recipe, assign_split
from shared.session.folder import METADATA_FILE, TEXT_FILE, read_text_events
from shared.shardset.manifest import ShardEntry
from shared.shardset.store import KEEP_OLD_S, claim_shard_set
from shared.storage import parse_location

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from preprocess.build.cluster import Cluster
    from preprocess.build.shards import SessionWindows
    from preprocess.build.sources import Recording
    from shared.session.scan import SessionScan
    from shared.shardset.manifest import Manifest
    from shared.shardset.store import ShardSetStore

_TEXT_FILES = (METADATA_FILE, TEXT_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    """What a build did."""

    plan: Plan
    manifest: Manifest | None
    """None after a dry run."""
    num_sessions: int
    num_scanned: int
    """Sessions looked over anew; the others had not changed."""
    rejected: tuple[Mapping[str, Any], ...]


def build_shards(
    sessions: Path | str,
    out: Path | str,
    *,
    recipe: Recipe,
    cluster: Cluster,
    dry_run: bool = False,
    task_s: float = TASK_S,
    keep_old_s: float = KEEP_OLD_S,
    verify: bool = False,
    compact: bool = False,
) -> BuildSummary:
    """Bring the shard set `out` up to date with the sessions and the recipe.

    Args:
        sessions: a folder of sessions, or its URL.
        out: the set's folder, or its URL.
        recipe: the recipe to build by.
        cluster: runs scans and shard tasks.
        dry_run: only plan; what it leaves is the cache of scans.
        task_s: about how many seconds of video one task decodes; changes no byte of the set.
        keep_old_s: see :func:`shared.shardset.store.claim_shard_set`.
        verify: check every byte of the old set's columns, and make again what is damaged.
        compact: pack the samples as a fresh build does.

    Raises:
        SessionError: no session there, one went away while it was read, or its name is no name.
        ConfigError: the recipe's tokenizer can't be used.
        ShardError: another job builds the same set, or the old set is of a newer format.
        JobError: the disk is full, or another job took over the set.
        StorageError: what is behind a URL can't be read or written.
    """
    recordings = find_recordings(sessions)
    with claim_shard_set(parse_location(out), dry_run=dry_run, keep_old_s=keep_old_s) as place:
        sizes = place.list_sizes()
        old = _read_old(place)
        scans, num_scanned = scan_sessions(recordings, place, recipe, cluster)
        tokenizer, tokenizer_file = _choose_tokenizer(recordings, recipe, old, cluster, place)
        plan = plan_shards(
            scans,
            recipe,
            tokenizer_sha256=tokenizer.sha256,
            old=None if old is None else _describe(old, place, sizes, cluster, verify=verify),
            compacts=compact,
        )
        if dry_run:
            return _summary(plan, None, scans, num_scanned, ())
        entries, tasks = _salvage(plan, place, sizes, cluster, verify=verify)
        entries |= _run(tasks, recordings, scans, place, recipe, tokenizer, cluster, task_s)
        kept = {s.name: s for s in old.shards} if old is not None else {}
        shards = tuple(entries.get(name) or kept[name] for name in plan.order)
        facts = [place.read_index(entry.index_file).header for entry in shards]
        manifest = _manifest(
            place, recipe, shards, facts, scans, tokenizer, tokenizer_file, old, plan
        )
        rejected = rejected_lines(scans, recipe, [loss for f in facts for loss in f["losses"]])
        commit(manifest, place, old=old, tokenizer_json=tokenizer.json, rejected=rejected)
        sweep(manifest, place, facts)
        return _summary(plan, manifest, scans, num_scanned, rejected)


def _summary(
    plan: Plan,
    manifest: Manifest | None,
    scans: Mapping[str, SessionScan],
    num_scanned: int,
    rejected: Iterable[Mapping[str, Any]],
) -> BuildSummary:
    return BuildSummary(
        plan=plan,
        manifest=manifest,
        num_sessions=len(scans),
        num_scanned=num_scanned,
        rejected=tuple(rejected),
    )


def _read_old(place: ShardSetStore) -> Manifest | None:
    """The set that is there; None where there is none or its manifest is damaged."""
    try:
        return place.read_manifest()
    except CorruptError:
        return None
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _describe(
    manifest: Manifest,
    place: ShardSetStore,
    sizes: Mapping[str, int],
    cluster: Cluster,
    *,
    verify: bool,
) -> PreviousSet:
    """The old set for planning; shards whose index is damaged are lost and so built anew."""
    indexes = [entry.index_file for entry in manifest.shards] if verify else []
    damage = find_corrupt_files(indexes, place, sizes, cluster)
    shards, lost = [], []
    for entry in manifest.shards:
        try:
            shards.append(describe_shard(entry, place, sizes, damage))
        except FormatVersionError:
            raise
        except (ShardError, KeyError, TypeError):
            lost.append(entry)
    return PreviousSet(
        recipe=manifest.recipe,
        generation=manifest.generation,
        shards=tuple(shards),
        lost=tuple(lost),
        format_version=manifest.format_version,
    )


def _choose_tokenizer(
    recordings: Mapping[str, Recording],
    recipe: Recipe,
    old: Manifest | None,
    cluster: Cluster,
    place: ShardSetStore,
) -> tuple[TextTokenizer, str]:
    """The tokenizer and its file name: given, kept from the old set, or trained on the train
    sessions.
    """
    tokenizer: TextTokenizer | None = None
    if recipe.text.tokenizer is not None:
        tokenizer = load_tokenizer(recipe.text.tokenizer)
        if tokenizer.vocab_size > recipe.text.vocab_size:
            raise ConfigError(
                f"{recipe.text.tokenizer}: has {tokenizer.vocab_size} tokens, more than "
                f"text.vocab_size; set text.vocab_size: {tokenizer.vocab_size}"
            )
    elif old is not None and old.recipe.text == recipe.text and old.recipe.split == recipe.split:
        try:
            return old.load_tokenizer(), old.tokenizer_file
        except ShardError:
            tokenizer = None
    if tokenizer is None:
        train = [r for name, r in recordings.items() if assign_split(name, recipe) == "train"]
        seconds = sum(column_seconds(recording, "text") for recording in train)
        texts = cluster.map(_Texts(place), train, what="read texts", work_s=seconds)
        tokenizer = train_tokenizer(
            [text for session in texts for text in session], vocab_size=recipe.text.vocab_size
        )
    if old is None or tokenizer.sha256 == old.tokenizer_sha256:
        return tokenizer, "tokenizer.json" if old is None else old.tokenizer_file
    return tokenizer, versioned("tokenizer.json", old.generation + 1)


@dataclass(frozen=True, slots=True)
class _Texts:
    """Texts of a session in order of time; crosses processes."""

    place: ShardSetStore

    def __call__(self, recording: Recording) -> list[str]:
        with recording.files(_TEXT_FILES, self.place) as folder:
            return [event.text for event in read_text_events(folder)]


def _salvage(
    plan: Plan, place: ShardSetStore, sizes: Mapping[str, int], cluster: Cluster, *, verify: bool
) -> tuple[dict[str, ShardEntry], list[ShardTask]]:
    """Shards of a plan that a killed job had finished, and what is to do for the others; to verify
    leaves out files that are damaged.
    """
    if verify:
        finished = [f for task in plan.tasks if (f := task.file_name("index")) in sizes]
        damaged = find_corrupt_files(finished, place, sizes, cluster)
        sizes = {name: size for name, size in sizes.items() if name not in damaged}
    found = [salvage_shard(task, place, sizes) for task in plan.tasks]
    entries = {entry.name: entry for entry in found if isinstance(entry, ShardEntry)}
    return entries, [task for task in found if isinstance(task, ShardTask)]


def _run(
    tasks: Sequence[ShardTask],
    recordings: Mapping[str, Recording],
    scans: Mapping[str, SessionScan],
    place: ShardSetStore,
    recipe: Recipe,
    tokenizer: TextTokenizer,
    cluster: Cluster,
    task_s: float,
) -> dict[str, ShardEntry]:
    """Build the shards that are to do, over a cluster in parts."""

    def given(slices: Sequence[SessionWindows], tokenizer_json: str) -> TaskContext:
        names = [piece.session for piece in slices]
        return TaskContext(
            out=place,
            recipe=recipe,
            tokenizer_json=tokenizer_json,
            recordings={n: recordings[n] for n in names},
            scans={n: scans[n] for n in names},
        )

    seconds = sum(
        column_seconds(recordings[piece.session], column)
        for task in tasks
        for column in task.due
        for piece in task.slices
        if piece.session not in task.copied.get(column, {})
    )
    is_whole = cluster.is_in_process(work_s=seconds)
    work = []
    for task in tasks:
        parts = () if is_whole else split_task(task, scans, recipe, task_s=task_s)
        pieces = [(part, given(part.slices, "")) for part in parts]
        work.append(Joint((task, given(task.slices, tokenizer.json)), pieces))
    num_tasks = sum(joint.num_tasks for joint in work)
    if work and (num_idle := cluster.num_idle(num_tasks, work_s=seconds)):
        cluster.say(
            f"{num_tasks} tasks leave {num_idle} workers idle; a smaller --task-seconds "
            f"(now {task_s:g}) gives more"
        )
    entries = cluster.join(_build, work, part=_build_part, what="build shards", work_s=seconds)
    return {entry.name: entry for entry in entries}


def _build(work: tuple[ShardTask, TaskContext], parts: Sequence[EncodedVideo]) -> ShardEntry:
    return build_shard(*work, parts)


def _build_part(work: tuple[VideoSubtask, TaskContext]) -> EncodedVideo:
    return encode_subtask(*work)


def _manifest(
    place: ShardSetStore,
    recipe: Recipe,
    shards: tuple[ShardEntry, ...],
    facts: Sequence[Mapping[str, Any]],
    scans: Mapping[str, SessionScan],
    tokenizer: TextTokenizer,
    tokenizer_file: str,
    old: Manifest | None,
    plan: Plan,
) -> Manifest:
    is_same = plan.is_empty and old is not None and tokenizer_file == old.tokenizer_file
    manifest = make_manifest(
        place,
        shards,
        facts,
        recipe=recipe,
        generation=0 if old is None else old.generation + (0 if is_same else 1),
        tokenizer_file=tokenizer_file,
        tokenizer_sha256=tokenizer.sha256,
        num_sessions=len(scans),
        num_planned=sum(len(scan.windows(recipe)) for scan in scans.values()),
        num_rejected=count_windows(rejected_lines(scans, recipe, ())),
    )
    if old is not None and plan.keeps_samples and tokenizer.sha256 == old.tokenizer_sha256:
        return replace(manifest, fingerprint=old.fingerprint)  # runs that read the set can go on
    return manifest
