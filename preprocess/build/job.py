"""The shard job: scan, plan, build, commit.

Scans and shard tasks are independent functions; :mod:`preprocess.cluster` runs them. Nothing
of the previous set changes before the new manifest is written. The next run takes over the shards
that a killed run finished.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from preprocess.build.commit import NewSet, commit_set, rejected_lines
from preprocess.build.explain import (
    advise_compaction,
    explain_left_out,
    explain_unused,
    list_losses,
)
from preprocess.build.only import ChosenSessions, choose_sessions
from preprocess.build.plan import plan_shards
from preprocess.build.plan_types import FromShards, ShardTask, add_generation
from preprocess.build.previous_set import find_corrupt_files, read_previous_set
from preprocess.build.sources import OPEN_S, TaskContext, column_seconds, scan_sessions
from preprocess.build.task import build_shard, resume_shard
from preprocess.build.upgrade import refresh_upgraded, upgrade_set
from preprocess.build.video_subtasks import TASK_S, encode_video, split_task
from preprocess.cluster import TaskWithSubtasks
from preprocess.recordings import survey_recordings
from shared.errors import ConfigError, CorruptError, ShardError
from shared.media.tokenizer import load_tokenizer, train_tokenizer
from shared.recipe import DEFAULT_SEGMENT_S, assign_split
from shared.session.folder import files_of_stream, read_text_events
from shared.shardset.layout import columns_of
from shared.shardset.manifest import ShardEntry
from shared.shardset.store import KEEP_OLD_S, claim_shard_set, map_small_files
from shared.storage import parse_location
from shared.streams import Kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from preprocess.build.explain import Loss
    from preprocess.build.only import Only
    from preprocess.build.plan_types import Plan, SessionSegments
    from preprocess.build.video_subtasks import EncodedVideo, VideoSubtask
    from preprocess.cluster import Cluster
    from preprocess.recordings import Recording
    from shared.media.tokenizer import TextTokenizer
    from shared.recipe import Recipe
    from shared.session.folder import SkippedFolder
    from shared.session.names import UnusedName
    from shared.session.scan import SessionScan
    from shared.shardset.manifest import Manifest
    from shared.shardset.store import ShardSetStore


MAX_WARNINGS = 20
"""Warnings of a build that are listed one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSummary:
    """What a build did."""

    plan: Plan
    manifest: Manifest | None
    """None after a dry run."""
    num_sessions: int
    num_scanned: int
    """Sessions that were scanned; the others had not changed."""
    rejected: tuple[Mapping[str, Any], ...]
    absent: Mapping[str, str]
    """Declared stream that no session has -> why, in the first session."""
    slow: Mapping[str, str]
    """Sensor that is recorded too slowly to interpolate it -> how, in the first such session."""
    losses: tuple[Loss, ...]
    """What no sample shows of a stream; a dry run doesn't know what does not decode."""
    unused: Mapping[str, Sequence[UnusedName]]
    """Session -> its files and keys that no stream uses."""
    skipped: tuple[SkippedFolder, ...]
    """Folders that are left out, but were probably meant."""
    left_out: tuple[SkippedFolder, ...]
    """Sessions that are left out because of their verdict."""

    @property
    def warnings(self) -> list[str]:
        """What is probably not as it was meant, in few lines."""
        lines = [
            *(f"no session has {n}, so it is masked: {r}" for n, r in self.absent.items()),
            *self.slow.values(),
            *(f"{folder.name} is left out: {folder.reason}" for folder in self.skipped),
            *explain_unused(self.unused)[0],
        ]
        if num_others := len(lines[MAX_WARNINGS:]):
            lines[MAX_WARNINGS:] = [f"{num_others} more like these; see rejected.jsonl of the set"]
        return lines

    @property
    def notes(self) -> list[str]:
        """What the set lacks, in few lines, and whether it has too many small shards."""
        unused = explain_unused(self.unused)[1]
        title = ["masked, or missing where it was recorded:"] if self.losses else []
        left_out = explain_left_out(self.left_out, self.num_sessions)
        losses = [*title, *(f"  {loss}" for loss in self.losses)]
        advice = advise_compaction(self.manifest) if self.manifest else ""
        return [note for note in (*left_out, unused, *losses, advice) if note]


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What one run of the job works with."""

    store: ShardSetStore
    """The set."""
    sizes: Mapping[str, int]
    """File name -> bytes, of all files of the set when the job began."""
    cluster: Cluster
    recipe: Recipe
    recordings: Mapping[str, Recording]
    scans: Mapping[str, SessionScan]
    """Every session, by name."""
    skipped: tuple[SkippedFolder, ...]
    """Folders that are left out, but were probably meant."""
    left_out: tuple[SkippedFolder, ...]
    """Sessions that are left out because of their verdict."""
    num_scanned: int
    tokenizer: TextTokenizer
    tokenizer_file: str
    previous: Manifest | None
    """The set before, if its manifest can be read."""
    headers: Mapping[str, Mapping[str, Any]]
    """The headers of its indexes, by file name."""
    plan: Plan
    task_s: float
    verify: bool

    @property
    def num_sessions(self) -> int:
        """Recordings, those that can't be used included."""
        num_skipped = sum(folder.is_recording for folder in self.skipped)
        return len(self.scans) + num_skipped + len(self.left_out)

    @property
    def unused(self) -> dict[str, tuple[UnusedName, ...]]:
        """Files and keys that no stream uses, by session."""
        return _unused_names(self.recordings, self.scans)

    def summary(self, manifest: Manifest | None = None, new: NewSet | None = None) -> BuildSummary:
        """Summarize the build; without a manifest and a new set, a dry run."""
        failures = [f for header in (new.headers if new else ()) for f in header["decode_failures"]]
        return BuildSummary(
            plan=self.plan,
            manifest=manifest,
            num_sessions=self.num_sessions,
            num_scanned=self.num_scanned,
            rejected=tuple(new.rejected if new else ()),
            losses=list_losses(self.scans, failures, self.recipe.segment_s),
            unused=self.unused,
            skipped=self.skipped,
            left_out=self.left_out,
            absent=absent_streams(self.scans, self.recipe),
            slow={
                stream: f"{name}/{sentence}"
                for name in sorted(self.scans, reverse=True)
                for stream, sentence in self.scans[name].slow.items()
            },
        )


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
    only: Only | None = None,
    verdicts_at: str | None = None,
) -> BuildSummary:
    """Update the shard set `out` to the sessions and the recipe; upgrade an older format first.

    Args:
        sessions: a folder of sessions, or its URL.
        out: the set's folder, or its URL.
        recipe: the recipe to build by.
        cluster: runs scans and shard tasks.
        dry_run: only plan; writes nothing but the cache of scans, and verdicts.
        task_s: seconds of video per subtask, about; changes no byte of the set.
        keep_old_s: see :func:`shared.shardset.store.claim_shard_set`.
        verify: check every byte of the previous set's columns, and rebuild corrupt columns.
        compact: pack the samples as a fresh build would.
        only: the worst verdict of sessions that are used; None validates nothing.
        verdicts_at: where verdicts are kept, if not beside the sessions.

    Raises:
        SessionError: there is no session, or one disappeared while it was read.
        ConfigError: the recipe's tokenizer or the set's length of segments can't be used, or no
            session has a required stream.
        FormatVersionError: the set has another format.
        ShardError: another job builds the same set.
        JobError: the disk is full, or another job took over the set.
        StorageError: a store can't be read or written.
    """
    survey = survey_recordings(sessions, recipe)
    if not dry_run:
        upgrade_set(out, keep_old_s=keep_old_s)
    with claim_shard_set(parse_location(out), dry_run=dry_run, keep_old_s=keep_old_s) as store:
        sizes, previous = store.list_sizes(), _read_previous(store)
        recipe = _with_segment(recipe, previous)
        chosen = ChosenSessions(recordings=survey.recordings)
        if only is not None:
            chosen = choose_sessions(
                sessions, survey, only=only, verdicts_at=verdicts_at, recipe=recipe, cluster=cluster
            )
        recordings = chosen.recordings
        scans, num_scanned = scan_sessions(recordings, store, recipe, cluster, present=sizes)
        _require_streams(scans, recipe, _unused_names(recordings, scans))
        tokenizer, tokenizer_file = _choose_tokenizer(
            recordings, recipe=recipe, previous=previous, store=store, cluster=cluster
        )
        described = None
        if previous is not None:
            indexes = [entry.index_file for entry in previous.shards] if verify else []
            corrupt = find_corrupt_files(indexes, store, sizes, cluster)
            described = read_previous_set(previous, store, sizes, corrupt=corrupt)
            described = refresh_upgraded(described, scans, recipe)
        build = Build(
            store=store,
            sizes=sizes,
            cluster=cluster,
            recipe=recipe,
            recordings=recordings,
            scans=scans,
            skipped=survey.skipped,
            left_out=chosen.left_out,
            num_scanned=num_scanned,
            tokenizer=tokenizer,
            tokenizer_file=tokenizer_file,
            previous=previous,
            headers={} if described is None else described.headers,
            plan=plan_shards(
                scans,
                recipe,
                tokenizer_sha256=tokenizer.sha256,
                previous=described,
                compacts=compact,
                verdicts=chosen.verdicts,
            ),
            task_s=task_s,
            verify=verify,
        )
        if dry_run:
            return build.summary()
        finished, tasks = _take_over_finished(build)
        finished |= _write_shards(build, tasks)
        new = _new_set(build, finished)
        return build.summary(commit_set(new), new)


def _read_previous(store: ShardSetStore) -> Manifest | None:
    """Read the manifest of the set; None if there is none or it is damaged."""
    try:
        return store.read_manifest()
    except CorruptError:
        return None
    except ShardError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def _with_segment(recipe: Recipe, previous: Manifest | None) -> Recipe:
    """Decide the length of segments: the recipe's, that of the set, or the default."""
    if recipe.segment.duration_s is not None:
        return recipe
    segment_s = DEFAULT_SEGMENT_S if previous is None else previous.recipe.segment_s
    try:
        return recipe.with_segment(segment_s)
    except ValueError as error:
        raise ConfigError(
            f"segment.duration_s is null, which keeps the segments of {segment_s:g} s of the set; "
            f"{error}"
        ) from error


def absent_streams(scans: Mapping[str, SessionScan], recipe: Recipe) -> dict[str, str]:
    """Return the declared streams that no session has, and why the first session lacks each."""
    recorded = {name for scan in scans.values() for name in scan.intervals}
    first = next(iter(scans.values()))
    return {n: first.absent.get(n, "") for n in recipe.streams if n not in recorded}


def _unused_names(
    recordings: Mapping[str, Recording], scans: Mapping[str, SessionScan]
) -> dict[str, tuple[UnusedName, ...]]:
    """Return the files and keys of each session that no stream uses."""
    return {
        name: names
        for name, scan in scans.items()
        if (names := (*scan.unused, *recordings[name].unused))
    }


def _require_streams(
    scans: Mapping[str, SessionScan],
    recipe: Recipe,
    unused: Mapping[str, Sequence[UnusedName]],
) -> None:
    """Check that some session has each required stream."""
    for name, reason in absent_streams(scans, recipe).items():
        if name in recipe.required:
            names = ": ".join([reason, *explain_unused(unused)[0][:1]])
            raise ConfigError(
                f"streams.{name} is required, but none of {len(scans)} sessions has it: {names}; "
                f"fix: correct streams.{name} in the recipe, or remove `required: true`"
            )


def _choose_tokenizer(
    recordings: Mapping[str, Recording],
    *,
    recipe: Recipe,
    previous: Manifest | None,
    store: ShardSetStore,
    cluster: Cluster,
) -> tuple[TextTokenizer, str]:
    """Load the recipe's tokenizer, keep the previous one, or train one; return its file too."""
    tokenizer: TextTokenizer | None = None
    texts, streams = recipe.text, recipe.of_kind(Kind.TEXT)
    if texts.tokenizer is not None:
        tokenizer = load_tokenizer(texts.tokenizer)
        if tokenizer.vocab_size > texts.vocab_size:
            raise ConfigError(
                f"{texts.tokenizer}: has {tokenizer.vocab_size} tokens, more than text.vocab_size "
                f"{texts.vocab_size}; fix: set text.vocab_size: {tokenizer.vocab_size}"
            )
    elif previous is not None and _trains_alike(previous.recipe, recipe):
        try:
            return previous.load_tokenizer(), previous.tokenizer_file
        except ShardError:
            tokenizer = None
    if tokenizer is None:
        train = [r for n, r in recordings.items() if streams and assign_split(n, recipe) == "train"]
        columns = columns_of(recipe)
        weights = [
            OPEN_S + sum(column_seconds(recording, columns[name], recipe) for name in streams)
            for recording in train
        ]
        read = partial(_read_texts, recipe=recipe, store=store)
        texts_of = cluster.map(read, train, label="read texts", weights=weights)
        tokenizer = train_tokenizer(
            [text for session in texts_of for text in session], vocab_size=texts.vocab_size
        )
    # Another tokenizer gets another file name, as readers of the previous set need the old one.
    if previous is None or tokenizer.sha256 == previous.tokenizer_sha256:
        return tokenizer, "tokenizer.json" if previous is None else previous.tokenizer_file
    return tokenizer, add_generation("tokenizer.json", previous.generation + 1)


def _trains_alike(before: Recipe, after: Recipe) -> bool:
    """Return whether a set's tokenizer stays: same settings, and texts to train it on if any."""
    settings = [(r.text.vocab_size, r.text.tokenizer, r.split) for r in (before, after)]
    has_texts = bool(before.of_kind(Kind.TEXT)) or not after.of_kind(Kind.TEXT)
    return settings[0] == settings[1] and has_texts


def _read_texts(recording: Recording, *, recipe: Recipe, store: ShardSetStore) -> list[str]:
    """Read the texts of a session in order of time."""
    names = recipe.of_kind(Kind.TEXT)
    files = {file for name in names for file in files_of_stream(recipe.streams[name])}
    with recording.open_files(sorted(files), store) as folder:
        events = read_text_events(folder, recipe, names)
    timed = [(event.time_s, name, event.text) for name in names for event in events[name]]
    return [text for _, _, text in sorted(timed, key=lambda item: item[:2])]


def _take_over_finished(build: Build) -> tuple[dict[str, ShardEntry], list[ShardTask]]:
    """Take over what a killed job finished: entries of shards by name, and what is still to do.

    With `verify`, corrupt files are not taken over.
    """
    tasks, sizes = build.plan.tasks, build.sizes
    if build.verify:
        indexes = [file for task in tasks if (file := task.file_name("index")) in sizes]
        corrupt = find_corrupt_files(indexes, build.store, sizes, build.cluster)
        sizes = {name: size for name, size in sizes.items() if name not in corrupt}
    resumed = [resume_shard(task, build.store, sizes, build.recipe) for task in tasks]
    entries = {entry.name: entry for entry in resumed if isinstance(entry, ShardEntry)}
    return entries, [task for task in resumed if isinstance(task, ShardTask)]


def _write_shards(build: Build, tasks: Sequence[ShardTask]) -> dict[str, ShardEntry]:
    """Write shards; on a cluster, with subtasks for their video. Shard name -> entry."""
    cluster, columns = build.cluster, columns_of(build.recipe)
    seconds = sum(
        column_seconds(build.recordings[session], columns[name], build.recipe)
        for task in tasks
        for name, column in task.columns.items()
        for session, source in column.sources.items()
        if not isinstance(source, FromShards)
    )
    is_in_process = cluster.is_in_process(work_s=seconds)
    work = []
    for task in tasks:
        subtasks: tuple[VideoSubtask, ...] = ()
        if not is_in_process:
            task, subtasks = split_task(task, build.scans, build.recipe, task_s=build.task_s)
        argument = task, _context(build, task.sessions, build.tokenizer.json)
        arguments = [(subtask, _context(build, subtask.sessions, "")) for subtask in subtasks]
        work.append(TaskWithSubtasks(argument, arguments, task.name))
    num_parallel = sum(task.num_parallel for task in work)
    if work and (num_idle := cluster.num_idle(num_parallel, work_s=seconds)):
        cluster.log(
            f"tasks: {num_parallel}, idle workers: {num_idle}; a smaller --task-seconds "
            f"(now {build.task_s:g}) gives more tasks"
        )
    entries = cluster.run(
        _build_shard, work, subtask=_encode_video, label="build shards", work_s=seconds
    )
    return {entry.name: entry for entry in entries}


def _context(build: Build, sessions: Sequence[SessionSegments], tokenizer_json: str) -> TaskContext:
    """Collect what a task over some sessions needs."""
    names = [stored.session for stored in sessions]
    return TaskContext(
        out=build.store,
        recipe=build.recipe,
        tokenizer_json=tokenizer_json,
        recordings={name: build.recordings[name] for name in names},
        scans={name: build.scans[name] for name in names},
    )


def _build_shard(argument: tuple[ShardTask, TaskContext], *encoded: EncodedVideo) -> ShardEntry:
    return build_shard(*argument, encoded)


def _encode_video(argument: tuple[VideoSubtask, TaskContext]) -> EncodedVideo:
    return encode_video(*argument)


def _new_set(build: Build, finished: Mapping[str, ShardEntry]) -> NewSet:
    """Describe the set of the finished and the unchanged shards."""
    previous, plan, tokenizer = build.previous, build.plan, build.tokenizer
    kept = {} if previous is None else {entry.name: entry for entry in previous.shards}
    shards = tuple(finished.get(name) or kept[name] for name in plan.order)
    headers = map_small_files(
        build.store,
        lambda file: build.headers.get(file) or build.store.read_index(file).header,
        [entry.index_file for entry in shards],
    )
    failures = [failure for header in headers for failure in header["decode_failures"]]
    generation, fingerprint = 0, None
    if previous is not None:
        is_same = plan.is_empty and build.tokenizer_file == previous.tokenizer_file
        generation = previous.generation + (0 if is_same else 1)
        if plan.keeps_samples and tokenizer.sha256 == previous.tokenizer_sha256:
            fingerprint = previous.fingerprint
    return NewSet(
        store=build.store,
        recipe=build.recipe,
        shards=shards,
        headers=headers,
        generation=generation,
        tokenizer=tokenizer,
        tokenizer_file=build.tokenizer_file,
        num_sessions=build.num_sessions,
        rejected=rejected_lines(
            build.scans,
            build.recipe,
            failures,
            unused=build.unused,
            skipped=(*build.skipped, *build.left_out),
        ),
        previous=previous,
        fingerprint=fingerprint,
        files=build.sizes,
    )
