"""Names of sessions, and names in sessions that nearly are those of declared streams."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import SessionError
from shared.recipe import Recipe
from shared.session.folder import (
    read_timed_lines,
    source_files,
    survey_sessions,
    unused_files,
)
from shared.session.names import (
    UnusedName,
    closest,
    describe_unused,
    explain_bad_name,
    find_unused_files,
    list_folder,
    list_names,
    session_folder,
    session_name,
)

RECIPE = Recipe()
SOURCES = source_files(RECIPE)

COMPANIONS = [
    "session.json", "README.md", "LICENSE", "Thumbs.db", "desktop.ini", ".DS_Store", ".repair",
    "metadata.jsonl.orig", "metadata.jsonl.orig.2", "audio.wav.bak", "._vision_left.mp4",
]  # fmt: skip


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


# --- names of folders ------------------------------------------------------------------------


@given(st.binary(min_size=1, max_size=60).filter(lambda raw: not {0, 47} & set(raw)))
def test_a_name_is_the_folders_bytes_as_utf8(raw: bytes) -> None:
    folder = Path("x") / os.fsdecode(raw)
    if folder.name != os.fsdecode(raw):  # "." and ".."
        return
    name = session_name(folder)
    assert name.encode("utf-8", "surrogateescape") == raw
    assert session_folder(Path("x"), name) == folder
    try:
        is_good = raw.decode().isprintable()
    except UnicodeDecodeError:
        is_good = False
    assert (explain_bad_name(name) == "") is is_good


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"a\tb", r"contains \t, which is not printable"),
        (b"a\nb", r"contains \n, which is not printable"),
        (b"caf\xe9", "is not UTF-8"),
        ("a\u202eb".encode(), r"contains \u202e, which is not printable"),
    ],
)
def test_a_bad_name_is_left_out_and_the_others_are_found(tmp_path: Path, raw: bytes, fault: str):
    touch(tmp_path / "good", "audio.wav")
    touch(tmp_path / os.fsdecode(raw), "audio.wav")
    found = survey_sessions(tmp_path, RECIPE)
    assert [path.name for path in found.folders] == ["good"]
    [skipped] = found.skipped
    assert skipped.is_recording
    assert skipped.name.isprintable()
    assert skipped.reason == f"the name of its folder {fault}; fix: rename the folder"
    with pytest.raises(SessionError, match=r"no session in it; .*fix: rename the folder"):
        survey_sessions(tmp_path / os.fsdecode(raw), RECIPE)


def test_names_of_many_scripts_are_good(tmp_path: Path) -> None:
    names = ["grün", "日本", "сессия 1", "a.b-c", "🥽", "x" * 200]
    for name in names:
        touch(tmp_path / name, "audio.wav")
    found = survey_sessions(tmp_path, RECIPE)
    assert [session_name(path) for path in found.folders] == sorted(names)
    assert found.skipped == ()


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Vision_Left.MP4", "vision_left.mp4"),
        ("vision-left.mp4", "vision_left.mp4"),
        ("left_vision.mp4", "vision_left.mp4"),
        ("VisionLeft.mp4", "vision_left.mp4"),
        ("vision_left.mov", "vision_left.mp4"),
        ("vision_left", "vision_left.mp4"),
        ("vision_rigth.mp4", "vision_right.mp4"),
        ("Audio.WAV", "audio.wav"),
        ("audio.mp3", "audio.wav"),
        ("audio.mp4", "audio.wav"),
        ("audio (1).wav", "audio.wav"),
        ("audoi.wav", "audio.wav"),
        ("metadata.json", "metadata.jsonl"),
        ("metadata.jsonl.txt", "metadata.jsonl"),
        ("metadata.jsonl.gz", "metadata.jsonl"),
        ("meta_data.jsonl", "metadata.jsonl"),
        ("metadata.csv", "metadata.jsonl"),
        ("texts.jsonl", "text.jsonl"),
        ("audio.json", ""),
        ("vision_left.csv", ""),
        ("imu.csv", ""),
        ("frame_times.txt", ""),
        ("controller_events.jsonl", ""),
        ("positions.jsonl", ""),
        ("gaze.mp4", ""),
    ],
)
def test_a_file_of_nearly_a_declared_name_is_meant_to_be_it(name: str, meant: str) -> None:
    [unused] = find_unused_files([name], SOURCES)
    assert (unused.file, unused.meant) == (name, meant)


def test_nothing_is_meant_to_be_a_file_that_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "vision_left.mp4", "Vision_Left.MP4", "vision_left.mov")
    assert [name.meant for name in unused_files(tmp_path, RECIPE)] == ["", ""]


def test_usual_companions_of_recordings_are_no_unknown_names(tmp_path: Path) -> None:
    touch(tmp_path, *SOURCES, *COMPANIONS, "__MACOSX/x", ".git/x")
    assert unused_files(tmp_path, RECIPE) == ()


def test_folders_in_a_session_are_named_and_what_belongs_above_them(tmp_path: Path) -> None:
    touch(tmp_path, "metadata.jsonl", "frames/000.png", "media/vision_left.mp4", "media/x.txt")
    unused = unused_files(tmp_path, RECIPE)
    assert [(name.file, name.meant) for name in unused] == [
        ("frames/", ""),
        ("media/vision_left.mp4", "vision_left.mp4"),
    ]
    sentences, others = describe_unused(unused)
    [sentence] = sentences.values()
    assert sentence == (
        "media/vision_left.mp4: not read, as it is in a folder of the session; fix: move it out of "
        "there"
    )
    assert others == "not used by the recipe: folder frames"


def test_a_session_folder_above_session_folders_names_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        touch(tmp_path / name, "metadata.jsonl", "vision_left.mp4")
    touch(tmp_path, "metadata.jsonl")
    assert survey_sessions(tmp_path, RECIPE).folders == (tmp_path,)
    sentences, _ = describe_unused(unused_files(tmp_path, RECIPE))
    assert any("a/metadata.jsonl, b/metadata.jsonl: not read" in s for s in sentences.values())


def test_a_file_name_that_is_not_utf8_is_listed_in_printable_form(tmp_path: Path) -> None:
    touch(tmp_path, "audio.wav", os.fsdecode(b"caf\xe9.bin"))
    assert list_names(list_folder(tmp_path), SOURCES) == ["audio.wav", r"caf\udce9.bin"]


# --- folders that are no sessions ------------------------------------------------------------


def test_sessions_one_folder_deeper_are_named_with_the_command(tmp_path: Path) -> None:
    touch(tmp_path / "good", "audio.wav")
    for name in ("a", "b"):
        touch(tmp_path / "day 1" / name, "audio.wav")
    touch(tmp_path / "notes", "todo.txt")
    touch(tmp_path / ".trash" / "x", "audio.wav")
    [skipped] = survey_sessions(tmp_path, RECIPE).skipped
    assert (skipped.name, skipped.is_recording) == ("day 1", False)
    assert skipped.reason == (
        f"2 sessions are deeper, in {tmp_path}/day 1; fix: give that folder instead, as in "
        f"`python -m preprocess validate '{tmp_path}/day 1'`"
    )


def test_sessions_that_are_all_deeper_are_named(tmp_path: Path) -> None:
    for person in range(5):
        touch(tmp_path / f"p{person}" / "monday" / "1", "vision_left.mp4")
    with pytest.raises(SessionError) as error:
        survey_sessions(tmp_path, RECIPE)
    assert f"p0: 1 session is deeper, in {tmp_path}/p0/monday;" in str(error.value)
    assert str(error.value).endswith("; and 2 more like these")


def test_a_folder_of_nearly_right_names_is_a_recording_that_is_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "good", "audio.wav")
    touch(tmp_path / "odd", "Audio.WAV", "Vision_Left.MP4")
    [skipped] = survey_sessions(tmp_path, RECIPE).skipped
    assert (skipped.name, skipped.is_recording) == ("odd", True)
    assert (
        "Vision_Left.MP4: not used by the recipe; did you mean vision_left.mp4?" in skipped.reason
    )
    with pytest.raises(
        SessionError, match=r"did you mean audio\.wav\? fix: rename it to audio\.wav"
    ):
        survey_sessions(tmp_path / "odd", RECIPE)


def test_links_are_followed_and_dangling_ones_named(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "audio.wav")
    root = tmp_path / "sessions"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "lost").symlink_to(tmp_path / "gone")
    (root / "part").mkdir()
    (root / "part" / "audio.wav").symlink_to(tmp_path / "gone.wav")
    found = survey_sessions(root, RECIPE)
    assert [path.name for path in found.folders] == ["linked", "part"]
    [skipped] = found.skipped
    assert (skipped.name, skipped.is_recording) == ("lost", True)
    assert skipped.reason.startswith("links to a missing folder; fix: restore")


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    touch(tmp_path / "good", "audio.wav")
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "loop").symlink_to(tmp_path / "outer")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert [path.name for path in survey_sessions(tmp_path, RECIPE).folders] == ["good"]


# --- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("tuoch", "touch"),
        ("Touch", "touch"),
        ("touches", "touch"),
        ("touch_0", "touch"),
        ("propio", "proprio"),
        ("proprioception", "proprio"),
        ("internalText", "internal_text"),
        ("gaze", ""),
        ("action", ""),
        ("context", ""),
        ("timestamp_ns", "timestamp"),
    ],
)
def test_a_key_of_nearly_a_declared_name_is_meant_to_be_it(key: str, meant: str) -> None:
    declared = ["touch", "proprio", "timestamp", "internal_text", "external_text"]
    assert closest(key, declared) == meant


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("cam_1", "cam_2"),
        ("hand_l", "hand_r"),
        ("touch_left", "touch_right"),
        ("joint7", "joint8"),
        ("external", "internal"),
    ],
)
def test_numbered_and_opposite_names_are_not_the_same(one: str, other: str) -> None:
    assert closest(one, [other]) == ""


def unused_keys(folder: Path, **lines: str) -> list[tuple[str, str, str]]:
    for name, content in lines.items():
        (folder / f"{name}.jsonl").write_text(content)
    unused = read_timed_lines(folder, RECIPE).unused
    return [(name.file, name.key, name.meant) for name in unused]


def test_unused_keys_of_lines_are_found_and_what_they_mean(tmp_path: Path) -> None:
    metadata = (
        '{"timestamp": 0, "tuoch": [1], "proprio": [1], "gaze": 1}\n{"timestamp": 1, "rpoprio": 2}'
    )
    assert unused_keys(tmp_path, metadata=metadata) == [
        ("metadata.jsonl", "gaze", ""),
        ("metadata.jsonl", "rpoprio", ""),  # proprio is there
        ("metadata.jsonl", "tuoch", "touch"),
    ]


def test_a_text_that_is_in_its_own_file_is_not_missed_in_another(tmp_path: Path) -> None:
    metadata = '{"timestamp": 0, "internal": "a"}\n'
    text = '{"timestamp": 0, "stream": "internal", "text": "a", "mood": 1}\n'
    meant = ("metadata.jsonl", "internal", "internal_text")
    assert unused_keys(tmp_path, metadata=metadata) == [meant]
    assert unused_keys(tmp_path, text=text) == [
        ("metadata.jsonl", "internal", ""),
        ("text.jsonl", "mood", ""),
    ]


def test_columns_of_tables_count_as_keys(tmp_path: Path) -> None:
    values = [{"count": 2, "type": "scalar"}]
    recipe = Recipe.model_validate(
        {
            "streams": {
                "gaze": {"kind": "sensor", "file": "eyes.csv", "key": "gaze", "values": values}
            }
        }
    )
    table = tmp_path / "eyes.csv"
    table.write_text("timestamp,gaze_0,gaze_1,pupil\n0,1,2,3\n")
    assert read_timed_lines(tmp_path, recipe).unused == (UnusedName(file="eyes.csv", key="pupil"),)
    table.write_text("timestamp,gase_0,gase_1\n0,1,2\n")
    assert [name.meant for name in read_timed_lines(tmp_path, recipe).unused] == ["gaze", "gaze"]


def test_keys_that_no_terminal_shows_are_escaped(tmp_path: Path) -> None:
    metadata = '{"timestamp": 0, "\\ud800\\u001b[2J": 1, "' + "k" * 999 + '": 1}\n'
    keys = [key for _, key, _ in unused_keys(tmp_path, metadata=metadata)]
    assert keys == ["k" * 80, r"\ud800\x1b[2J"]


def test_a_file_of_countless_keys_is_read_in_bounded_time(tmp_path: Path) -> None:
    lines = (f'{{"timestamp": {n}, "key{n}": 0}}\n' for n in range(5000))
    assert len(unused_keys(tmp_path, metadata="".join(lines))) == 100


def test_names_are_listed_briefly() -> None:
    unused = [UnusedName(file="metadata.jsonl", key=f"k{i:02}") for i in range(12)]
    unused += [UnusedName(file="imu.csv"), UnusedName(file="frames/")]
    sentences, others = describe_unused(unused)
    assert not sentences
    assert others == (
        "not used by the recipe: keys k00, k01, k02, k03, k04, k05, k06, k07 and 4 more of "
        "metadata.jsonl; file imu.csv; folder frames"
    )
