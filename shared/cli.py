"""What both command lines share: errors of ours end in one clear message and their exit code, no
traceback.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click

from shared.errors import EngineError

INTERRUPTED_EXIT_CODE = 130

PIPE_COLUMNS = 120
"""Width of what goes into a file or pipe, where COLUMNS does not say one: tables need it."""

_IN_THE_WAY = "a file stands where a folder has to be; name another place, or move the file away"
_MENDS = {
    errno.EEXIST: _IN_THE_WAY,
    errno.ENOTDIR: _IN_THE_WAY,
    errno.EISDIR: "a folder stands where a file has to be; name another place",
}
_MEND = "is the disk full, or the folder not yours?"


class CommandGroup(click.Group):
    """A group of commands whose CreatureErrors become messages without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's own signature)
        """Run the command.

        Raises:
            click.exceptions.Exit: with the error's code, after its message.
        """
        try:
            return super().invoke(ctx)
        except EngineError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever read our output has gone; click ends quietly
                raise
            click.echo(f"Error: {error}; {_MENDS.get(error.errno or 0, _MEND)}", err=True)
            ctx.exit(EngineError.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted. What was finished is kept; run it again to go on.", err=True)
            ctx.exit(INTERRUPTED_EXIT_CODE)


def widen_pipes() -> None:
    """Let tables be :data:`PIPE_COLUMNS` wide where no terminal says how wide it is."""
    if not (sys.stdout.isatty() or sys.stderr.isatty()):
        os.environ.setdefault("COLUMNS", str(PIPE_COLUMNS))
