"""The one exception family: every message is one line that says what failed, why, and what to do."""

from typing import Any


class InvdiffError(Exception):
    """Base of all errors that invdiff raises on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class UsageError(InvdiffError, ValueError):
    """An option, a name or an argument that cannot be used as given."""

    exit_code = 2


class InputError(InvdiffError, ValueError):
    """A file or array that is missing, damaged, or not what the operation needs."""

    exit_code = 3


class ShapeError(InputError):
    """An array whose whole shape differs from what an operator or prior expects."""


class PriorError(InvdiffError, ValueError):
    """A prior checkpoint that cannot be trusted or does not fit."""

    exit_code = 4


class ResourceError(InvdiffError, RuntimeError):
    """Not enough memory, disk, or permission."""

    exit_code = 5


class NumericalError(InvdiffError, ArithmeticError):
    """A computation that diverged or produced values that are not finite.

    Attributes:
        state: last good State of the solver, or None.
        volume: what that state shows, as a Volume, where the runner raised the error.
    """

    exit_code = 6
    state: Any = None
    volume: Any = None


class Interrupted(InvdiffError):
    """The run was asked to stop and is saved."""

    exit_code = 130


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's or numpy's, torch's on a CPU or GPU, or that of a CUDA library."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


def choose(name: str, table, what: str):
    """Return ``table[name]``; an unknown name raises :class:`UsageError` that lists the choices and the nearest."""
    if name not in table:
        raise UsageError(f"unknown {what} '{name}': choose one of {', '.join(sorted(table))}{nearest(name, table)}")
    return table[name]


def nearest(name: str, known) -> str:
    """`` (did you mean 'x'?)`` for the known name most like ``name``, or nothing."""
    from difflib import get_close_matches

    found = get_close_matches(name, list(known), 1)
    return f" (did you mean '{found[0]}'?)" if found else ""


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def from_text(kind: type, key: str, text: str, what: str):
    """The value of option ``key`` of a ``what`` ("solver", "sampler"), given as text.

    Args:
        kind: of the option's default; a truth value is true, 1, yes, false, 0 or no.
        key: name of the option, for messages.
        text: as it was given.
        what: it is an option of.

    Raises:
        UsageError: the text is no such value.
    """
    if kind is bool:
        return choose(text.lower(), _TRUTH, f"value of {key}")
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{what} option {key} takes a {kind.__name__}, got '{text}'") from None
