"""Strict JSON: no NaN, no infinity, no key twice."""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(data: bytes | str) -> Any:
    """Parse strict JSON.

    Raises:
        ValueError: not UTF-8, not JSON, NaN or infinity, or a key twice.
        RecursionError: nested too deep.
    """
    text = data.decode("utf-8") if isinstance(data, bytes) else data
    return json.loads(text, object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return out


def _finite(token: str) -> float:
    value = float(token)
    if not math.isfinite(value):
        raise ValueError(f"{token} is not a JSON number")
    return value
