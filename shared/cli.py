"""Command groups of both programs: an error ends in one clear message and its exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from shared.errors import EngineError, MachineError
from shared.machine import describe_os_error, is_machine_trouble, raise_descriptor_limit

INTERRUPTED_EXIT_CODE = 130

PIPE_COLUMNS = 120
"""Width of tables that go to a file or pipe, if COLUMNS does not set one."""


class CommandGroup(click.Group):
    """A group of commands that prints an :class:`EngineError` as a message, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's own signature)
        """Run the command.

        Raises:
            click.exceptions.Exit: with the error's exit code, after its message.
        """
        raise_descriptor_limit()
        try:
            return super().invoke(ctx)
        except EngineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone: exit quietly
                raise
            click.echo(f"Error: {describe_os_error(error)}", err=True)
            is_trouble = is_machine_trouble(error)
            ctx.exit(MachineError.exit_code if is_trouble else EngineError.exit_code)
        except KeyboardInterrupt:
            click.echo(
                "Interrupted. Finished work is kept; run the command again to continue.", err=True
            )
            ctx.exit(INTERRUPTED_EXIT_CODE)


def widen_pipes() -> None:
    """Set tables to :data:`PIPE_COLUMNS` if no terminal gives a width."""
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        os.environ.setdefault("COLUMNS", str(PIPE_COLUMNS))
