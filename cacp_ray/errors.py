"""The error tree. Every message says what is wrong, where, and the next step.

    CacpError
    ├── ConfigError            a setting, name or path that the user gave
    ├── UnsupportedModelError  a network that cannot be traced or pruned
    ├── InfeasibleRateError    a rate that no keep counts can reach
    ├── ArtifactError          a file that is missing, corrupt, or of another run or version
    └── EvaluationError        a candidate that could not be measured

The first four are bad input (exit code 2), the last is a failed run (exit code 1).
"""

import difflib
from collections.abc import Generator, Iterable
from contextlib import contextmanager

OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "bad_alloc", "bad allocation")


class CacpError(Exception):
    """Base of all errors that a user can act on."""

    exit_code = 2


class ConfigError(CacpError):
    """A setting, name, path or address that does not work."""


class UnsupportedModelError(CacpError):
    """A network that cannot be traced, cut or rebuilt."""


class InfeasibleRateError(CacpError):
    """A compression rate that no allowed keep counts can reach."""


class ArtifactError(CacpError):
    """A file that is missing, corrupt, or belongs to something else."""


class EvaluationError(CacpError):
    """A candidate that could not be measured."""

    exit_code = 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, a GPU's, or that of torch, which has no type for it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY))
    )


@contextmanager
def users_code(what: str) -> Generator[None]:
    """Runs code of the user's own; `what` begins the message about its failure.

    Raises:
        ConfigError: It failed; our own errors and a lack of memory pass.
    """
    try:
        yield
    except CacpError:
        raise
    except (Exception, SystemExit) as error:  # whatever that code raises
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"{what} ({type(error).__name__}: {one_line(error)})") from error


def nearest_names(name: str, known: Iterable[str]) -> str:
    """End of a message that offers the closest known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(known)}"


def first_line(error: BaseException | None) -> str:
    """First line of an error's message, without the details that libraries add below."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def one_line(error: BaseException) -> str:
    """The whole message of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__
