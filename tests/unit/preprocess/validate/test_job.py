"""Kept verdicts: what makes a session be looked at again; the same results on any cluster."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from helpers.oracles import tiny_recipe, write_tiny_session
from helpers.processes import launch
from helpers.sessions import read_lines, write_lines
from helpers.stores import count_requests, s3_server, upload
from helpers.validation import validated
from rich.console import Console

from preprocess.__main__ import cli
from preprocess.cluster import Cluster
from preprocess.recordings import survey_recordings
from preprocess.validate import job, page, report
from preprocess.validate.job import validate_recordings
from preprocess.validate.verdicts import Verdict, Verdicts, bases_of_recipe, open_verdicts
from shared.errors import JobError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from preprocess.validate.job import ValidatedSession

NAMES = ("ann", "bob", "cat")
RECIPE = tiny_recipe()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    for name in NAMES:
        write_tiny_session(root / name, 1.0)
    (root / "bob" / "text.jsonl").write_text("no JSON\n")  # a warning at least
    return root


@pytest.fixture
def sessions(recorded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(recorded, tmp_path / "in")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often a session is read, and a file hashed."""
    counted: Counter[str] = Counter()

    def counting(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*args: Any, **options: Any) -> Any:
            counted[name] += 1
            return function(*args, **options)

        monkeypatch.setattr(module, name, call)

    counting(report, "probe_session")
    counting(job, "sha256_of_file")
    return counted


def plain(results: Iterable[ValidatedSession]) -> list[str]:
    """Return the reports as lines of JSON."""
    return [json.dumps(result.report.as_dict()) for result in results]


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def replace_bytes(path: Path, *, keeps_time: bool) -> None:
    """Change a letter of a text; the size stays."""
    status = path.stat()
    path.write_text(path.read_text().replace("hello", "hallo"))
    assert path.stat().st_size == status.st_size
    time_ns = status.st_mtime_ns + (0 if keeps_time else 1)
    os.utime(path, ns=(time_ns, time_ns))


def copy_tree(root: Path) -> None:
    """Replace all sessions by copies, which have other times."""
    for name in NAMES:
        shutil.copytree(root / name, root / "copy", copy_function=shutil.copyfile)
        shutil.rmtree(root / name)
        (root / "copy").rename(root / name)


CHANGES: dict[str, tuple[Callable[[Path], object], int, int]] = {
    "nothing": (lambda root: None, 0, 0),
    "a file is touched": (lambda root: os.utime(root / "ann" / "audio.wav", (1, 1)), 0, 1),
    "all are copied": (copy_tree, 0, 12),
    "bytes": (lambda root: replace_bytes(root / "ann/text.jsonl", keeps_time=False), 1, 1),
    "bytes of the same size and time, a known limit": (
        lambda root: replace_bytes(root / "ann/text.jsonl", keeps_time=True), 0, 0
    ),
    "size": (lambda root: append(root / "ann" / "text.jsonl", "\n"), 1, 1),
    "a file of a stream is new": (
        lambda root: shutil.copy(root / "ann/vision_left.mp4", root / "ann/vision_right.mp4"), 1, 1
    ),
    "session.json is new": (lambda root: append(root / "ann" / "session.json", "{}"), 1, 1),
    "a file is removed": (lambda root: (root / "ann" / "audio.wav").unlink(), 1, 0),
    "an unused file is new": (lambda root: append(root / "ann" / "notes.txt", "x"), 1, 4),
    "a session is new": (lambda root: shutil.copytree(root / "ann", root / "dan"), 1, 4),
    "a session is removed": (lambda root: shutil.rmtree(root / "ann"), 0, 0),
    "the verdicts are removed": (lambda root: shutil.rmtree(root / ".verdicts"), 3, 12),
    "a verdict is damaged": (lambda root: damage_verdict(root), 1, 4),
}  # fmt: skip
"""Change -> how many sessions are read then, and files hashed."""


def damage_verdict(root: Path) -> None:
    path = root / ".verdicts" / "verdicts.jsonl"
    first, *others = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([first[: len(first) // 2], *others, b""]))


@pytest.mark.parametrize("change", CHANGES)
def test_a_session_is_looked_at_only_if_it_changed(
    change: str, sessions: Path, counts: Counter[str]
) -> None:
    first = validated(sessions, recipe=RECIPE)
    assert (counts["probe_session"], counts["sha256_of_file"]) == (3, 12)
    assert all(result.is_new and result.verdict for result in first)
    counts.clear()
    act, num_read, num_hashed = CHANGES[change]
    act(sessions)
    again = validated(sessions, recipe=RECIPE)
    assert (counts["probe_session"], counts["sha256_of_file"]) == (num_read, num_hashed)
    assert sum(result.is_new for result in again) == num_read
    if not num_read:
        assert plain(again) == plain(r for r in first if (sessions / r.report.session).exists())
    counts.clear()
    assert plain(validated(sessions, recipe=RECIPE)) == plain(again)
    assert not counts
    expected = validated(sessions, recipe=RECIPE, force=True)
    if "known limit" not in change:
        assert plain(again) == plain(expected)
    assert counts["probe_session"] == len(expected)


RECIPES: dict[str, tuple[dict[str, Any], bool]] = {
    "quality of video": ({"video": {"qp": 30}}, False),
    "size of video": ({"video": {"size": 64, "fit": "pad", "codec": "mjpeg"}}, False),
    "spectrogram": ({"audio": {"dmel": {"channels": 20}}}, False),
    "vocabulary": ({"text": {"vocab_size": 400}}, False),
    "split": ({"split": {"val_fraction": 0.5}}, False),
    "shards": ({"shard": {"target_bytes": 1 << 20}}, False),
    "length of segments": ({"segment": {"duration_s": 2.0}}, True),
    "least coverage": ({"segment": {"min_coverage": 0.9}}, True),
    "rate of video": ({"video": {"rate_hz": 10.0}}, True),
    "gaps of sensors": ({"sensor": {"max_gap_s": 0.01}}, True),
    "a stream is required": ({"required": ["vision_right"]}, True),
}
"""Change of the recipe -> whether sessions are looked at again."""


@pytest.mark.parametrize("change", RECIPES)
def test_a_verdict_holds_for_recipes_that_no_check_can_tell_apart(
    change: str, sessions: Path, counts: Counter[str]
) -> None:
    first = validated(sessions / "ann", recipe=RECIPE, verdicts_at=str(sessions / "kept"))
    counts.clear()
    sections, is_new = RECIPES[change]
    recipe = tiny_recipe(**sections)
    again = validated(sessions / "ann", recipe=recipe, verdicts_at=str(sessions / "kept"))
    assert (counts["probe_session"], again[0].is_new) == (is_new, is_new)
    if not is_new:
        forced = validated(sessions / "ann", recipe=recipe, force=True)
        assert plain(forced) == plain(first)


@pytest.mark.parametrize("depth", ["quick", "full"])
@pytest.mark.parametrize("check", report.CHECKS)
def test_a_newer_check_is_run_if_the_depth_asks_for_it(
    check: str, depth: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bases_of_recipe(RECIPE, depth)[depth]
    assert bases_of_recipe(RECIPE, depth)[depth] == before
    monkeypatch.setitem(report.CHECK_VERSIONS, check, "newer")  # type: ignore[arg-type]
    assert ("full" in bases_of_recipe(RECIPE, depth)) is (depth == "full")
    is_wanted = depth == "full" or report.CHECKS[check].depth == "quick"
    assert (bases_of_recipe(RECIPE, depth)[depth] != before) is is_wanted


def test_sessions_are_looked_at_by_newer_checks(
    sessions: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    validated(sessions, recipe=RECIPE)
    counts.clear()
    monkeypatch.setitem(report.CHECK_VERSIONS, "frames", "newer")  # type: ignore[arg-type]
    assert not any(r.is_new for r in validated(sessions, recipe=RECIPE, depth="quick"))
    assert all(r.is_new for r in validated(sessions, recipe=RECIPE))
    assert not any(r.is_new for r in validated(sessions, recipe=RECIPE))
    assert counts["probe_session"] == 3


def test_full_implies_quick_and_not_the_reverse(sessions: Path, counts: Counter[str]) -> None:
    for depth, num_read in (("quick", 3), ("quick", 0), ("full", 3), ("full", 0), ("quick", 0)):
        counts.clear()
        results = validated(sessions, recipe=RECIPE, depth=depth)  # type: ignore[arg-type]
        assert counts["probe_session"] == num_read
    assert {r.report.depth for r in results} == {"full"}


def test_a_quick_look_keeps_the_verdict_of_a_full_one(sessions: Path, counts: Counter[str]) -> None:
    validated(sessions, recipe=RECIPE)
    with (sessions / "ann" / "metadata.jsonl").open("a") as file:
        file.write("{}\n")
    quick = validated(sessions, recipe=RECIPE, depth="quick", force=True)
    assert {(r.report.depth, r.is_new) for r in quick} == {("quick", True)}
    counts.clear()
    full = validated(sessions, recipe=RECIPE)
    assert [r.is_new for r in full] == [True, False, False]
    assert {r.report.depth for r in full} == {"full"}
    assert counts["probe_session"] == 1


def test_what_could_not_be_read_is_not_kept(
    sessions: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (sessions / "ann" / "audio.wav").unlink()
    (sessions / "ann" / "audio.wav").mkdir()
    (sessions / "bob" / "vision_right.mp4").symlink_to("nowhere")
    with monkeypatch.context() as patched:
        patched.setattr(report, "probe_session", lambda *_, **__: exec("raise MemoryError"))
        assert {r.report.status for r in validated(sessions, recipe=RECIPE)} == {"unchecked"}
    assert [r.verdict is not None for r in validated(sessions, recipe=RECIPE)] == [
        False,
        False,
        True,
    ]
    counts.clear()
    assert [r.is_new for r in validated(sessions, recipe=RECIPE)] == [True, True, False]
    assert counts["probe_session"] == 2


def test_repairs_are_tried_of_sessions_that_did_not_pass(
    sessions: Path, counts: Counter[str]
) -> None:
    lines = read_lines(sessions / "ann" / "metadata.jsonl")
    write_lines(sessions / "ann" / "metadata.jsonl", [*lines[1:], lines[0]])
    assert validated(sessions, recipe=RECIPE)[0].report.status != "passed"
    counts.clear()
    results = validated(sessions, recipe=RECIPE, fix=True)
    assert [bool(r.repairs) for r in results] == [True, False, False]
    assert [r.is_new for r in results] == [True, False, False]
    assert results[0].report.status == "passed"
    assert counts["probe_session"] == 1
    assert not any(r.is_new for r in validated(sessions, recipe=RECIPE, fix=True))
    assert counts["probe_session"] == 1


def test_a_single_session_keeps_its_verdict_where_some_are(
    sessions: Path, counts: Counter[str]
) -> None:
    validated(sessions / "ann", recipe=RECIPE)
    assert not (sessions / ".verdicts").exists()
    validated(sessions, recipe=RECIPE)
    counts.clear()
    assert not any(r.is_new for r in validated(sessions / "ann", sessions / "bob", recipe=RECIPE))
    append(sessions / "ann" / "text.jsonl", "\n")
    assert [r.is_new for r in validated(sessions / "ann", recipe=RECIPE)] == [True]
    assert not any(r.is_new for r in validated(sessions, recipe=RECIPE))
    assert counts["probe_session"] == 1


def test_sessions_of_one_name_are_kept_apart(sessions: Path, tmp_path: Path) -> None:
    others = shutil.copytree(sessions, tmp_path / "others")
    shutil.rmtree(others / "cat")
    (others / "ann" / "audio.wav").unlink()
    for num_new in (5, 2):
        results = validated(sessions, others, recipe=RECIPE, verdicts_at=str(tmp_path / "kept"))
        assert sum(r.is_new for r in results) == num_new
        assert plain(results[:3]) == plain(validated(sessions, recipe=RECIPE, force=True))
        assert plain(results[3:]) == plain(validated(others, recipe=RECIPE, force=True))


def test_verdicts_of_removed_sessions_are_dropped_and_of_others_kept(sessions: Path) -> None:
    validated(sessions, recipe=RECIPE)
    shutil.rmtree(sessions / "bob")
    append(sessions / "ann" / "text.jsonl", "\n")
    validated(sessions, recipe=RECIPE)
    lines = (sessions / ".verdicts" / "verdicts.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["session"] for line in lines) == ["ann", "cat"]


def test_a_folder_that_can_not_be_written_gives_one_warning(
    sessions: Path, tmp_path: Path, recipe_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sessions / ".verdicts").write_text("not a folder")
    monkeypatch.setattr(job, "SAVE_S", -1.0)  # saves after each session
    arguments = ["validate", str(sessions), "--recipe", recipe_file]
    result = CliRunner().invoke(cli, arguments)
    assert result.output.count("warning: verdicts are not kept") == 1
    [warning] = [line for line in result.output.splitlines() if "verdicts are not kept" in line]
    assert warning.endswith("; fix: give another folder for them (--verdicts FOLDER)")
    assert warning.count("fix:") == 1
    assert "3 sessions, " in result.output
    elsewhere = [*arguments, "--verdicts", str(tmp_path / "kept")]
    assert "verdicts are not kept" not in CliRunner().invoke(cli, elsewhere).output
    assert "3 were not looked at again" in CliRunner().invoke(cli, elsewhere).output


def test_two_runs_at_the_same_time_give_the_results_of_one(sessions: Path) -> None:
    results: list[list[Any]] = [[], []]

    def run(number: int) -> None:
        results[number] = plain(validated(sessions, recipe=RECIPE))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert plain(validated(sessions, recipe=RECIPE)) == results[0]
    assert len(Verdicts(sessions / ".verdicts")) == 3


class ShuffledCluster(Cluster):
    """Yields outcomes in another order, as workers do, that of `dying` as their deaths."""

    def __init__(self, order: Sequence[int], dying: Sequence[int] = ()) -> None:
        super().__init__(scheduler=None, num_workers=0, console=Console(file=io.StringIO()))
        self._order, self._dying = order, dying

    def iterate(
        self, function: Any, arguments: Any, *, label: str, weights: Any = None, work_s: float = 0.0
    ) -> Iterator[tuple[int, Any]]:
        assert len(weights) == len(arguments) == len(self._order)
        for number in self._order:
            died = JobError("a worker died; fix: use fewer workers")
            yield number, died if number in self._dying else function(arguments[number])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)])
def test_results_are_in_the_order_of_the_names_whoever_ends_first(
    order: tuple[int, ...], sessions: Path
) -> None:
    sound = sessions / "ann" / "audio.wav"
    cluster = ShuffledCluster(order)
    results = validated(sessions, sound, recipe=RECIPE, cluster=cluster)
    assert [r.report.session for r in results] == [*NAMES, "audio.wav"]
    expected = validated(sessions, sound, recipe=RECIPE, force=True)
    assert plain(results) == plain(expected)


def test_a_page_is_in_order_and_its_details_are_made_once(
    sessions: Path, tmp_path: Path, counts: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "SESSIONS_INLINE", 0)
    path, pages = tmp_path / "out.html", []
    validated(sessions / "nothing", sessions, recipe=RECIPE)  # verdicts, but no details
    for num_read, num_new in ((3, 3), (0, 0)):
        counts.clear()
        cluster = ShuffledCluster((2, 0, 1)) if num_new else None
        with page.ReportPage(path) as report_page:
            results = validated(
                sessions / "nothing", sessions, recipe=RECIPE, cluster=cluster, page=report_page
            )
        assert counts["probe_session"] == num_read
        assert sum(r.is_new for r in results[1:]) == num_new
        pages.append(path.read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    files = re.findall(r"[A-Za-z0-9_-]+-[0-9a-f]{16}\.html", pages[0])
    assert [name.partition("-")[0] for name in files[1:]] == [*NAMES]
    assert sorted(files) == sorted(p.name for p in (tmp_path / "out_files").iterdir())


def test_workers_give_the_results_of_this_process(sessions: Path) -> None:
    expected = validated(sessions, recipe=RECIPE)
    console = Console(file=io.StringIO())
    with Cluster(scheduler=None, num_workers=2, console=console, start_s=0.0) as cluster:
        results = validated(sessions, recipe=RECIPE, cluster=cluster, force=True)
    assert results == expected


def test_a_session_whose_worker_dies_is_unchecked_and_the_others_are_kept(sessions: Path) -> None:
    cluster = ShuffledCluster((1, 0, 2), dying=(1,))
    results = validated(sessions, recipe=RECIPE, cluster=cluster)
    assert [r.report.is_unchecked for r in results] == [False, True, False]
    assert results[1].report.errors == ("bob: not checked: a worker died; fix: use fewer workers",)
    assert [r.is_new for r in validated(sessions, recipe=RECIPE)] == [False, True, False]


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(RECIPE.as_json()))
    return str(path)


def test_copies_at_two_locations_are_in_their_rows_of_the_page(
    sessions: Path, tmp_path: Path, recipe_file: str
) -> None:
    other = shutil.copytree(sessions, tmp_path / "other")
    command = ["validate", str(sessions), str(other), "--recipe", recipe_file, "--summary"]
    result = CliRunner().invoke(cli, [*command, "--report", str(tmp_path / "page.html")])
    words = [line.split()[:2] for line in result.stdout.splitlines()]
    statuses = [status for name, status in words if name in ("ann", "bob", "cat")]
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert re.findall('<td class="status [a-z]+">([a-z]+)</td>', page) == statuses
    assert sorted(statuses[:3]) != sorted(statuses[3:])


def test_copies_are_reported_in_every_form(
    sessions: Path, tmp_path: Path, recipe_file: str
) -> None:
    def run(*options: str) -> tuple[int, list[str]]:
        command = ["validate", str(sessions), "--recipe", recipe_file, *options]
        result = CliRunner().invoke(cli, command)
        return result.exit_code, result.stdout.splitlines()

    shutil.rmtree(sessions / "bob")
    code, before = run("--json", "--strict")
    assert code == 0
    shutil.copytree(sessions / "ann", sessions / "dan")
    code, lines = run()
    at = lines.index("dan, compared with the other sessions:")
    assert code == 0
    assert lines[at + 1].startswith("  warning  session: same content as ann (")
    assert lines[-1].startswith("3 sessions, 3.0 s: 2 passed, 1 with warnings")
    assert "2 were not looked at again (--all looks at all)" in lines[-1]
    code, lines = run("--json", "--strict", "--report", str(tmp_path / "page.html"))
    assert code == 1
    assert lines[:2] == before
    assert json.loads(lines[2])["status"] == "passed"
    assert list(json.loads(lines[3])["duplicates"]) == ["dan"]
    assert "same content as ann" in (tmp_path / "page.html").read_text(encoding="utf-8")
    code, lines = run("--summary")
    [row] = [line for line in lines if line.startswith("dan")]
    assert row.split()[1] == "warnings"


def test_an_interrupt_keeps_what_is_finished(sessions: Path, counts: Counter[str]) -> None:
    recordings = survey_recordings(sessions, RECIPE)
    cluster = Cluster(scheduler=None, num_workers=0, console=Console(file=io.StringIO()))
    verdicts = open_verdicts(sessions, recordings)
    results = validate_recordings(
        recordings.recordings, recipe=RECIPE, cluster=cluster, verdicts=verdicts
    )
    assert next(results).report.session == "ann"
    assert not (sessions / ".verdicts").exists()
    with pytest.raises(KeyboardInterrupt):
        results.throw(KeyboardInterrupt)
    assert len(Verdicts(sessions / ".verdicts")) == 1
    counts.clear()
    assert [r.is_new for r in validated(sessions, recipe=RECIPE)] == [False, True, True]
    assert counts["probe_session"] == 2


def test_ctrl_c_ends_with_its_code_and_keeps_verdicts(sessions: Path, tmp_path: Path) -> None:
    for number in range(60):
        shutil.copytree(sessions / "ann", sessions / f"more{number:02}")
    command = [sys.executable, "-m", "preprocess", "validate", str(sessions), "--workers", "0"]
    process = launch(command, scratch=tmp_path / "scratch")
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert first.startswith("ann: "), first
    assert process.returncode == 130, output
    assert "Interrupted. Finished work is kept; run the command again to continue." in output
    assert 1 <= len(Verdicts(sessions / ".verdicts")) < 63


def test_verdicts_behind_a_url_cost_one_request(recorded: Path) -> None:
    with s3_server() as fs:
        upload(recorded, fs, "here/sessions")
        url = "s3://here/sessions"
        first = validated(url, recipe=RECIPE)
        with count_requests() as requests:
            again = validated(url, recipe=RECIPE)
        assert [r.is_new for r in again] == [False] * 3
        assert plain(again) == plain(first)
        assert requests == {"ListObjectsV2": 1, "GetObject": 1}
        fs.pipe_file("here/sessions/bob/text.jsonl", b"no JSON either\n")
        with count_requests() as requests:
            assert [r.is_new for r in validated(url, recipe=RECIPE)] == [False, True, False]
        assert requests == {"ListObjectsV2": 1, "GetObject": 5, "PutObject": 1}
        assert [r.is_new for r in validated(f"{url}/bob", recipe=RECIPE)] == [False]


def test_a_verdict_survives_its_line(sessions: Path) -> None:
    for result in validated(sessions, recipe=RECIPE):
        assert result.verdict is not None
        line = result.verdict.as_line()
        read = Verdict.from_line(line)
        assert read is not None
        assert read.as_line() == line
        assert (read.key, read.stamp) == (result.verdict.key, result.verdict.stamp)
        values = json.loads(line)
        for key in values.keys() - {"session"}:
            assert Verdict.from_line(json.dumps({**values, key: [3]}).encode()) is None
            assert Verdict.from_line(json.dumps({**values, key: None}).encode()) is None
