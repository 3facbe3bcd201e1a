"""Run a command line with one-line errors and the project's exit codes. Used by all three packages."""

import inspect
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from chatdata import version_of
from chatdata.disk import DISK_ERRORS, describe_os_error, home_path
from chatdata.errors import printable
from chatdata.progress import say, say_json

if TYPE_CHECKING:
    from chatdata.tokenizer.bpe import Tokenizer

NO_HOME = "there is no home folder (no HOME, no entry in passwd): set CHATDATA_CACHE (and HF_HOME)"
FILE = click.Path(path_type=Path)  # type of an option: a file or folder that may or may not exist
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
expect_option = click.option("--expect", metavar="BUILD_ID", help="Fail if it is another build (12 digits will do).")
task_files_option = click.option(
    "--task-file", "task_files", type=FILE, multiple=True, help="Python file that defines your own TASK."
)


def build_argument(command: Callable[..., Any], required: bool = True) -> Callable[..., Any]:
    """Adds BUILD, a folder or an address, and --expect: `command` gets the build's folder on this machine as `path`."""

    @click.argument("path", metavar="BUILD" if required else "[BUILD]", required=required)
    @expect_option
    @wraps(command)
    def with_local_build(path: str | None, expect: str | None, **options: Any) -> Any:
        from chatdata.shards.address import local_build

        folder = None if path is None else local_build(path, expect, quiet=bool(options.get("as_json")))
        return command(path=folder, **options)

    return with_local_build


# old → new spellings, for all three commands; an old one is refused with the new one in the message
RENAMED = {"--rows": "--layout", "--tensorboard": "--track tensorboard", "all": "ignore", "supervised": "apply"}


class Command(click.Command):
    """Its docstring may end with "Examples:" and a line for each, which --help shows last."""

    def __init__(self, name: str | None, help: str | None = None, **options: Any) -> None:
        text, title, lines = inspect.cleandoc(help or "").partition("Examples:\n")
        super().__init__(name, help=text, epilog=f"\b\n{title}{lines}" if title else None, **options)


class Group(click.Group):
    command_class = Command


def program(name: str, about: str) -> Group:
    """The command line of the package `name`, still without commands."""
    settings = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
    group = click.version_option(version_of(name))(Group(name, help=about, context_settings=settings))
    return click.option("--debug", is_flag=True, help="Show tracebacks of errors.")(group)


command = partial(click.command, cls=Command)


def choice(name: str, *values: str, **options: Any) -> Callable[..., Any]:
    """An option that takes one of these values."""
    return click.option(name, type=click.Choice(values), **options)


class MaskPolicyChoice(click.Choice[str]):
    """A mask policy. The names are repeated here because importing them would load numpy for `--help`."""

    def __init__(self) -> None:
        super().__init__(["ignore", "apply", "last-turn", "tools-only", "no-tools", "no-reasoning"])

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in RENAMED:
            self.fail(f"{value!r} is now {RENAMED[value]!r}", param, ctx)
        return super().convert(value, param, ctx)


mask_option = click.option("--mask", type=MaskPolicyChoice(), help="Mask policy (default: the stage's).")


def tokenizer_of(path: Path, *, native: bool = True, chat_format: str = "nanochat") -> "Tokenizer":
    """The tokenizer at `path` (see `load_tokenizer`); that of a build only if `open_build` accepts the build."""
    from chatdata.shards.read import open_build
    from chatdata.tokenizer.files import load_tokenizer
    from chatdata.tokenizer.folder import read_folder

    if (path / "manifest.json").is_file():
        open_build(path)
    return load_tokenizer(path, native=native) if chat_format == "nanochat" else read_folder(path)


def tell(facts: Any, lines: Iterable[str], as_json: bool) -> None:
    """Print what a command found: as JSON, or as lines of text."""
    if as_json:
        say_json(facts)
        return
    for line in lines:
        say(line)


def run_command(cli: click.Group, name: str, interrupted: str, only: str | None = None) -> None:
    """Run `cli`, print errors that a user can cause as one line, and exit.

    interrupted: message after Ctrl-C in the commands `only` (default: in every command; others just say "interrupted").
    Exit codes: 0 done, 1 anything wrong with data or a run, 2 usage, 3 a check found something, 130 stopped.
    `--debug`, anywhere, shows the traceback of an error.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an ASCII terminal gets ? for →, not a traceback
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    # SIGTERM cleans up like Ctrl-C; it also works in background jobs of a script, which ignore SIGINT
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        Path.home()
    except RuntimeError:  # the Hub, Altair and torch look for it too
        if os.environ.get("CHATDATA_CACHE"):
            os.environ["HOME"] = os.environ["CHATDATA_CACHE"]
    try:
        # a shell expands ~ in front of a word, but not in --out=~/x
        arguments = [re.sub(r"(?<=^--)([\w-]+=)(~[^/]*)", _at_home, argument) for argument in arguments]
        code = cli.main(arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.Abort as error:
        if isinstance(error.__cause__, EOFError):  # a file ended early; click takes it for Ctrl-D
            _fail(error.__cause__, debug)
        own = only is None or next((word for word in arguments if word in cli.commands), None) in only.split()
        _stop(interrupted if own else "interrupted", 130)
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption) and error.option_name in RENAMED:
            error = click.UsageError(f"{error.option_name} is now {RENAMED[error.option_name]}", error.ctx)
        error.show()
        sys.exit(error.exit_code)
    except (SystemExit, KeyboardInterrupt):
        raise
    except BaseException as error:  # also what Rust libraries raise for a panic, which is no Exception
        _fail(error, debug)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: BaseException, debug: bool) -> NoReturn:
    """Print an error as one line, whatever it is, and exit.

    One that a user can cause is an OSError or has an `exit_code`, and says all. Any other is a file that no check has
    refused or a fault of ours: the file is the innermost path that the code was at work on.
    """
    if debug:
        sys.stderr.write(printable("".join(traceback.format_exception(error))))
    code = getattr(error, "exit_code", 1)
    values = [value for frame, _ in traceback.walk_tb(error.__traceback__) for value in frame.f_locals.values()]
    path = next((str(value) for value in reversed(values) if isinstance(value, Path)), None)
    if hasattr(error, "exit_code"):
        message = str(error)
    elif isinstance(error, OSError) and error.errno is not None:
        if error.filename is None and error.errno in DISK_ERRORS:
            error.filename = path
        message = describe_os_error(error)
    elif isinstance(error, RuntimeError) and "home directory" in str(error):
        message = NO_HOME
    else:
        known = "not enough memory" if isinstance(error, MemoryError) else str(error).strip().partition("\n")[0]
        message = f"{path or 'unexpected'}: {known} ({type(error).__name__}); --debug shows where"
    _stop(message, code if isinstance(code, int) else 1)


def _at_home(found: re.Match[str]) -> str:
    return f"{found[1]}{home_path(found[2])}"


def _stop(message: str, code: int) -> NoReturn:
    say(f"Error: {message}", error=True)
    sys.exit(code)
