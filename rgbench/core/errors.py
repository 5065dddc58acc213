"""Errors that users see: what, where, what to do; each with its exit code."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

RESUMABLE = 75  # exit code: stopped by a signal, saved; the same command continues


class RgbenchError(Exception):
    """A failure that rgbench explains. Exit code 1."""

    exit_code = 1


class UsageError(RgbenchError):
    """A wrong argument, name, key or file. Exit code 2; nothing was written."""

    exit_code = 2


class ConfigError(UsageError):
    """A recipe that cannot be used, with the file, line and key at fault.

    Args:
        message: what is wrong and what to do.
        path: the file.
        line: 1-based line, where known.
        key: dotted key path, where known.
    """

    def __init__(
        self, message: str, *, path: str | Path | None = None, line: int | None = None, key: str | None = None
    ):
        self.path, self.line, self.key, self.message = path, line, key, message
        where = ":".join(str(part) for part in (path, line, key) if part is not None)
        super().__init__(f"{where}: {message}" if where else message)


class Interrupted(RgbenchError):
    """A run stopped by a signal with its state saved. Exit code 75, or 130 for Ctrl-C.

    Args:
        message: what was saved and where.
        resume_command: the exact command that continues the run.
        exit_code: 75 (resumable) or 130 (Ctrl-C).
    """

    def __init__(self, message: str, *, resume_command: str, exit_code: int = RESUMABLE):
        self.resume_command, self.exit_code = resume_command, exit_code
        super().__init__(f"{message}\nresume with: {resume_command}")


def suggest(name: str, options: Iterable[str]) -> str:
    """End an "unknown name" message: the nearest option and all of them.

    Args:
        name: what the user wrote.
        options: what exists.

    Returns:
        ``"did you mean 'lcd'? (known: lcd, lrm)"`` or ``"known: lcd, lrm"``.
    """
    import difflib

    known = sorted(options)
    listed = f"known: {', '.join(known) or 'none'}"
    near = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'? ({listed})" if near else listed
