"""Protocol footnotes: what each column was measured under, and where two columns of one metric differ."""

from __future__ import annotations

import re
from typing import Any

from rgbench.reporting.gather import Column, Comparison

SHA256 = re.compile(r"\b[0-9a-f]{40,64}\b")
SHORT_HASH = 12


def flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested fields as dotted keys with printable values; hashes cut to 12 digits.

    >>> flatten({"prompts": {"num": 2048}, "antialias": True, "jpeg": None})
    {'prompts.num': '2048', 'antialias': 'true', 'jpeg': 'none'}
    """
    flat: dict[str, str] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = _printable(value)
    return flat


def protocol_notes(comparison: Comparison) -> list[str]:
    """One line per distinct set of fields, with the numbers and ids of the protocols that have it."""
    numbers = comparison.protocol_numbers
    protocols = {name: describe(fields) for name, fields in comparison.protocols.items()}
    lines = []
    for fields in dict.fromkeys(protocols.values()):
        named = [f"{numbers[name]} {name}" for name, found in protocols.items() if found == fields]
        lines.append(f"{', '.join(named)}: {fields}")
    return lines


def describe(fields: dict[str, Any]) -> str:
    """A protocol's fields in one line."""
    return "; ".join(f"{key}: {value}" for key, value in flatten(fields).items()) or "no fields recorded"


def differences(comparison: Comparison, columns: list[Column]) -> list[str]:
    """Which metrics have several columns, and the fields in which those protocols differ."""
    numbers = comparison.protocol_numbers
    pairs: dict[str, list[str]] = {}
    for name in dict.fromkeys(column.metric.name for column in columns):
        first, *others = [column for column in columns if column.metric.name == name]
        for other in others:
            pair = f"{first.metric.label} ({numbers[first.protocol_id]} and {numbers[other.protocol_id]})"
            pairs.setdefault(_differing(first, other), []).append(pair)
    return [
        f"Two columns, because the protocols differ in {fields}: {', '.join(found)}. Do not compare across them."
        for fields, found in pairs.items()
    ]


def _differing(first: Column, second: Column) -> str:
    one, two = flatten(first.protocol), flatten(second.protocol)
    keys = [key for key in one | two if one.get(key) != two.get(key)]
    return ", ".join(f"{key} ({one.get(key, '—')} against {two.get(key, '—')})" for key in keys) or "their ids alone"


def _printable(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return SHA256.sub(lambda match: match[0][:SHORT_HASH], str(value))
