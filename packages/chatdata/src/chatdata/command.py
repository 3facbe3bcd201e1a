"""Running a command line so that a person reads one line when something is wrong. Shared by the three packages."""

from __future__ import annotations

import signal
import sys

import click


def run_command(cli: click.Group, name: str, interrupted: str) -> None:
    """Run `cli`; errors a user can cause become one line (`interrupted`: that of Ctrl-C). Exit codes: DESIGN 12.

    0 done · 1 anything wrong with data or a run · 2 usage · 3 verify found damage · 130 interrupted. What a user can
    cause is an OSError or has an `exit_code` (ChatdataError and its like); `--debug`, anywhere, shows its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for →, not a traceback
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = cli.main(arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.Abort:
        _stop(interrupted, 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (ValueError, OSError) as error:
        if debug or not (isinstance(error, OSError) or hasattr(error, "exit_code")):
            raise
        _stop(str(error), getattr(error, "exit_code", 1))
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(number: int, frame: object) -> None:
    """A polite kill cleans up like Ctrl-C; also in the background of a script, where SIGINT itself is ignored."""
    raise KeyboardInterrupt


def examples(*lines: str) -> str:
    """The examples at the end of a command's --help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def _stop(message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
