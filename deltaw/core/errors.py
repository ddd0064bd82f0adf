"""The exceptions a user can meet. Each message is one line: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130


class DeltawError(Exception):
    """Root of every error that deltaw raises on purpose. `exit_code` is what the command returns for it."""

    exit_code = EXIT_FAILED


class InputError(DeltawError, ValueError):
    """Wrong usage or wrong input: a missing file, an unknown key, a target that matches nothing."""

    exit_code = EXIT_INPUT


class MissingExtraError(InputError):
    """An optional dependency is needed and absent; the message names the extra to install."""


class RunError(DeltawError, RuntimeError):
    """The input was fine and the work failed: a NaN loss, a full disk, a failed download."""

    exit_code = EXIT_FAILED


def near(name: str, known: Iterable[str], *, count: int = 3) -> list[str]:
    """Up to `count` of the known names that look most like `name`, best first."""
    return difflib.get_close_matches(name, sorted(set(known)), n=count, cutoff=0.5)


def unknown_name(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name outside a known set: lists near names first, then all of them when they are few.

    Args:
        what: the kind of thing, in the singular ("method", "configuration key").
        name: what the user gave.
        known: every valid name.
    """
    names = sorted(set(known))
    close = near(name, names)
    hint = f"did you mean {' or '.join(repr(n) for n in close)}? " if close else ""
    listed = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", ..."
    return InputError(f"unknown {what} {name!r}: {hint}known: {listed}")
