"""Signals that end a program, at any moment after its start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from preprocess.__main__ import cli as preprocess_cli
from shared.cli import ContinuableCommand
from train.__main__ import cli as train_cli

CONTINUES = "Interrupted. Finished work is kept; run the command again to continue.\n"
OUR_FIRST_IMPORT = "shared.interrupts"


def start(arguments):
    """Start a program whose stderr has a line for each module that it imports."""
    return subprocess.Popen(
        [sys.executable, "-X", "importtime", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def read_lines(process, *, stop_after=None):
    """Read stderr; after so many imports, counted from our first one, press Ctrl-C.

    Returns the number of imports, and the lines that are not about imports.
    """
    num_imports, lines = 0, []
    with process:
        for line in process.stderr:
            if not line.startswith("import time:"):
                lines.append(line.rstrip())
            elif num_imports or line.endswith(f" {OUR_FIRST_IMPORT}\n"):
                num_imports += 1
                if num_imports == stop_after:
                    process.send_signal(signal.SIGINT)
    return num_imports, lines


def commands_that_import(tmp_path):
    """Return command lines that import all they need and then end for want of their input."""
    absent = str(tmp_path / "absent")
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{shards: {absent}}}")
    return [
        ["-m", "preprocess", "validate", absent],
        ["-m", "preprocess", "shards", "--sessions", absent, "--out", absent, "--workers", "0"],
        ["-m", "preprocess", "verify", absent],
        ["-m", "train", "run", "--config", str(config)],
        ["-m", "train", "profile", "--config", str(config)],
        ["-m", "train", "infer", "--checkpoint", absent, "--input", absent],
    ]


def check_moments(command, moments):
    """Press Ctrl-C after so many imports, in a process for each."""
    for moment in moments:
        process = start(command)
        _, lines = read_lines(process, stop_after=moment)
        if process.returncode == -signal.SIGINT and lines[0].startswith("Error:"):
            continue  # it came when the command had ended; a lost one would end with its own code
        assert (process.returncode, lines) == (130, ["Interrupted."]), (command, moment)


@pytest.mark.parametrize("number", [2, 3])
def test_ctrl_c_while_a_command_imports_ends_it_at_once(tmp_path, number):
    check_moments(commands_that_import(tmp_path)[number], [2, 150, 300])


@pytest.mark.slow
@pytest.mark.parametrize("number", range(6))
def test_ctrl_c_is_lost_at_no_moment_of_any_start(tmp_path, number):
    command = commands_that_import(tmp_path)[number]
    total, _ = read_lines(start(command))
    check_moments(command, range(2, total - 5, -(-total // 30)))


HEAD = """
import os, signal, sys, time, weakref
from shared.interrupts import catch_interrupts
catch_interrupts()
import click
from shared.cli import CommandGroup, ContinuableCommand
def press(number=signal.SIGINT):
    os.kill(os.getpid(), number)
    time.sleep(0.02)
@click.group(cls=CommandGroup)
def cli():
    pass
"""
TAIL = """
if __name__ == "__main__":
    cli(["work"])
"""


def run_program(tmp_path, body, *, modules=(), **options):
    """Run a program with one command; return its exit code, output and errors."""
    for name, content in dict(modules).items():
        (tmp_path / f"{name}.py").write_text(content)
    path = tmp_path / "program.py"
    path.write_text(HEAD + body + TAIL)
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch, request):
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))


CLEANS_UP = """
@cli.command({options})
def work():
    try:
        {press}
        time.sleep(50)
    finally:
        print("cleaned up")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_each_signal_cleans_up_and_has_its_exit_code(tmp_path, name):
    body = CLEANS_UP.format(options="", press=f"press(signal.{name})")
    code = 128 + getattr(signal, name)
    assert run_program(tmp_path, body) == (code, "cleaned up\n", "Interrupted.\n")


def test_a_command_that_continues_says_so(tmp_path):
    body = CLEANS_UP.format(options="cls=ContinuableCommand", press="press()")
    assert run_program(tmp_path, body) == (130, "cleaned up\n", CONTINUES)


def test_a_signal_that_make_repeats_does_not_disturb_the_cleanup(tmp_path):
    body = CLEANS_UP.format(options="", press="press(signal.SIGTERM)").replace(
        "        print(", "        press(signal.SIGTERM)\n        print("
    )
    assert run_program(tmp_path, body) == (143, "cleaned up\n", "Interrupted.\n")


def test_nohup_keeps_a_command_alive(tmp_path):
    body = CLEANS_UP.format(options="", press="press(signal.SIGHUP)").replace("(50)", "(0)")
    ignoring = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert run_program(tmp_path, body, preexec_fn=ignoring) == (0, "cleaned up\n", "")


DROPPED = """
@cli.command()
def work():
    class Thing: pass
    thing = Thing()
    reference = weakref.ref(thing, lambda _: press())
    del thing
    print("goes on")
    time.sleep(50)
"""


def test_an_interrupt_that_python_drops_in_a_callback_is_raised_again(tmp_path):
    assert run_program(tmp_path, DROPPED) == (130, "goes on\n", "Interrupted.\n")


IMPORTS = """
def load():
    import library
    print(library.state)
{function}
@cli.command()
def work():
    {call}
    time.sleep(50)
"""
LIBRARY = """
import __main__
try:
    __main__.press()
    state = "whole"
except BaseException:
    state = "broken"
"""


def test_an_import_of_the_main_module_is_left_at_once(tmp_path):
    body = IMPORTS.format(function="", call="import library; print('not reached')")
    assert run_program(tmp_path, body, modules={"library": LIBRARY}) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("ends", [False, True])
def test_an_import_in_the_middle_of_the_work_is_not_broken(tmp_path, ends):
    body = IMPORTS.format(function="", call="import helper; helper.load()")
    if ends:  # before the interrupt can be raised
        body = body.replace("time.sleep(50)", "")
    modules = {"library": LIBRARY, "helper": IMPORTS.partition("{")[0]}
    wanted = (130, "whole\n", "Interrupted.\n")
    assert run_program(tmp_path, body, modules=modules) == wanted


CALLED_BACK = """
import wave
from pathlib import Path

import av
import soundfile
from shared.machine import SteadyFile

@cli.command()
def work():
    with wave.open("tone.wav", "wb") as tone:
        tone.setparams((1, 2, 8000, 0, "NONE", ""))
        tone.writeframes(bytes(16000))
    read = os.preadv
    def read_and_press(*arguments):
        os.preadv = read
        press()
        return read(*arguments)
    os.preadv = read_and_press
    with SteadyFile(Path("tone.wav")) as file:
        print({opened})
    time.sleep(50)
"""


@pytest.mark.parametrize(
    ("opened", "length"),
    [("av.open(file).streams[0].duration", 8000), ("soundfile.SoundFile(file).frames", 8000)],
)
def test_a_library_in_c_that_reads_a_file_is_not_disturbed(tmp_path, monkeypatch, opened, length):
    monkeypatch.chdir(tmp_path)
    wanted = (130, f"{length}\n", "Interrupted.\n")
    assert run_program(tmp_path, CALLED_BACK.format(opened=opened)) == wanted


CONVERTED = """
@cli.command()
def work():
    try:
        press()
    except KeyboardInterrupt as error:
        raise RuntimeError("lost its connection") from error
"""


def test_an_error_that_a_library_makes_of_an_interrupt_is_an_interrupt(tmp_path):
    assert run_program(tmp_path, CONVERTED) == (130, "", "Interrupted.\n")


FORKED = """
@cli.command()
def work():
    child = os.fork()
    if child == 0:
        press(signal.{name})
        os._exit(0)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_forked_child_dies_of_a_signal_silently(tmp_path, name):
    wanted = (0, f"child {-getattr(signal, name)}\n", "")
    assert run_program(tmp_path, FORKED.format(name=name)) == wanted


def test_only_commands_that_continue_promise_it():
    commands = {**preprocess_cli.commands, **train_cli.commands}
    promising = {n for n, command in commands.items() if isinstance(command, ContinuableCommand)}
    assert promising == {"shards", "demo-sessions", "validate"}
