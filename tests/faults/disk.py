"""A disk that fails at the n-th call: every file operation of our writers goes through ``os``."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

CALLS = ("open", "write", "fsync", "mkdir", "rename", "replace")


class FailingDisk:
    """Counts file operations and fails one of them, after half a write where it is a write.

    Args:
        monkeypatch: undoes the change after the test.
        fail_at: 1-based number of the call that fails; 0 for none.
        code: the errno raised.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int, code: int = errno.ENOSPC) -> None:
        self.count, self.fail_at, self.code = 0, fail_at, code
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counting(name, getattr(os, name)))

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.count += 1
            if self.count == self.fail_at:
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **keywords)

        return call
