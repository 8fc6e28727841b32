"""The application, its settings, and its exit codes."""

import errno
import io
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from cacp_ray.errors import CacpError, is_out_of_memory
from cacp_ray.io.code import add_code_folder

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Conditional automated channel pruning: one search, a smaller network for every rate. "
    "A rate is the share of the cost that is KEPT: 0.3 is smaller than 0.7.",
)
state = {"quiet": False}
INTERRUPTED = 130  # exit code
# Why a place cannot be used: full, read-only, forbidden, or no such place.
UNWRITABLE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.ENOENT, errno.EIO),
)
RESUMABLE = ("demo", "run", "search", "train", "finetune", "tune-agent")
ANYWHERE = ("--debug", "--quiet")


class _PrintHandler(logging.Handler):
    """Prints to the current standard output, so that lines stay above a live table."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


def _print_version(wanted: bool) -> None:
    if wanted:
        from cacp_ray import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def setup(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Log everything and show tracebacks.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only the final result.")] = False,
) -> None:
    """Applies the options that stand before the command or after it."""
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_PrintHandler()])
    logging.getLogger("cacp_ray").setLevel(level)
    for name in () if debug else ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    state["quiet"] = quiet
    with suppress(OSError):  # the working directory may be gone
        add_code_folder(Path.cwd())  # for networks and tasks that a user names


def main() -> None:
    """Entry point: one line and exit code 2 for bad input, 1 for a failed run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for terminals and pipes that are not UTF-8
    try:
        code = app(args=_first_options(sys.argv[1:]), standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            typer.echo(f"cacp-ray: interrupted{_advice()}", err=True)
        if isinstance(sys.stdout, io.TextIOBase):  # None where the caller has closed it
            sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code, text = _explain(error, _advice())
        if code == 2:  # the line says it all; Ray's messages are no help
            logging.getLogger("cacp_ray").setLevel(logging.ERROR)
        typer.echo(text, err=True)
        sys.exit(code)


def _first_options(arguments: list[str]) -> list[str]:
    """The arguments with those of `setup` before the command, wherever they were given."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    first = [word for word in arguments[:end] if word in ANYWHERE]
    others = [word for word in arguments[:end] if word not in ANYWHERE]
    return [*first, *others, *arguments[end:]]


def _advice() -> str:
    """How to go on with the command; empty where nothing of it is kept."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return "; go on with --resume" if command in RESUMABLE else ""


def _explain(error: Exception, advice: str) -> tuple[int, str]:
    """The exit code of an error and the text to print; `advice` says how to go on."""
    if isinstance(error, CacpError):
        return error.exit_code, f"cacp-ray: {' '.join(str(error).splitlines())}"
    if (usage := getattr(error, "format_message", None)) is not None:  # typer's: wrong usage
        text = usage()
        return 2, text if "\n" in text else f"cacp-ray: {text} See cacp-ray --help."
    reason = " ".join(str(error).split())
    if is_out_of_memory(error):
        return 1, f"cacp-ray: memory ran out ({reason}): free some, or use a machine with more"
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = str(error.filename or "standard output").encode(errors="replace").decode()
        return 1, (
            f"cacp-ray: {where} cannot be read or written ({error.strerror}): make room, or name "
            f"another place{advice}"
        )
    return 1, f"cacp-ray: {type(error).__name__}: {reason} (cacp-ray --debug shows where)"
