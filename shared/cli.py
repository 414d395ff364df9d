"""Command groups of both programs: an error ends in one clear message and its exit code."""

from __future__ import annotations

import io
import os
import sys
from typing import Any, NoReturn

import click

from shared import interrupts
from shared.errors import EngineError, MachineError
from shared.machine import describe_os_error, is_machine_trouble, raise_descriptor_limit

PIPE_COLUMNS = 120
"""Width of tables that go to a file or pipe, if COLUMNS does not set one."""


class ContinuableCommand(click.Command):
    """A command that continues an interrupted run of itself from the work that it finished."""


class CommandGroup(click.Group):
    """A group of commands that prints an :class:`EngineError` as a message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's own signature)
        """Run the command.

        Raises:
            click.exceptions.Exit: with the error's exit code, after its message.
        """
        raise_descriptor_limit()
        try:
            return self._invoke(ctx)
        except KeyboardInterrupt:
            self._end_interrupted(ctx)
        except EngineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except (OSError, MemoryError) as error:
            if isinstance(error, BrokenPipeError):  # no process reads our output: exit quietly
                raise
            click.echo(f"Error: {describe_os_error(error)}", err=True)
            is_trouble = is_machine_trouble(error)
            ctx.exit(MachineError.exit_code if is_trouble else EngineError.exit_code)

    def _invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's own signature)
        """Run the command; an error that a library makes of an interrupt is an interrupt."""
        try:
            with interrupts.running_command():
                return super().invoke(ctx)
        except Exception as error:
            if interrupts.was_interrupted() and not isinstance(error, click.exceptions.Exit):
                raise KeyboardInterrupt from error
            raise

    def _end_interrupted(self, ctx: click.Context) -> NoReturn:
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        can_continue = isinstance(command, ContinuableCommand)
        hint = " Finished work is kept; run the command again to continue." if can_continue else ""
        click.echo(f"Interrupted.{hint}", err=True)
        ctx.exit(interrupts.exit_code())


def widen_pipes() -> None:
    """Set tables to :data:`PIPE_COLUMNS` if no terminal gives a width; escape what can't be shown.

    Names of sessions may have characters that are not in the encoding of the machine's locale.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        os.environ.setdefault("COLUMNS", str(PIPE_COLUMNS))
