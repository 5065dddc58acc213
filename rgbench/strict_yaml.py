"""YAML as a recipe needs it, built from PyYAML's event stream with rules of our own.

PyYAML's YAML 1.1 reads ``1e-4`` as a string, ``no`` as False, ``1:30`` as 90 and takes the
last of two equal keys. Here ``true``/``false``, ``null``, integers and floats mean what
JSON's do, everything else is a string; anchors, tags and equal keys are errors.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import yaml

from rgbench.errors import ConfigError

MAX_BYTES = 32_768  # the longest recipe here has 4 KB; a megabyte would take PyYAML seconds
MAX_DEPTH = 24

_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,40})")
_FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_WORDS = {"": None, "~": None, "null": None, "true": True, "True": True, "false": False, "False": False}


def load_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML mapping.

    Args:
        path: a UTF-8 file of at most 32 KB.

    Returns:
        The data, and the 1-based line of every dotted key (list items by their index).

    Raises:
        ConfigError: unreadable, not YAML, not a mapping, an equal key twice, an anchor, alias or
            tag, a number that is not finite.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read: {error.strerror or error}", path=path) from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"not UTF-8 at byte {error.start}", path=path, line=line) from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES} bytes: not a recipe", path=path)
    reader = _Reader(text, path)
    data = reader.document()
    if not isinstance(data, dict):
        raise ConfigError("expected a mapping of keys to values", path=path, line=1)
    return data, reader.lines


def dump_yaml(data: dict[str, Any]) -> str:
    """Plain data as YAML that :func:`load_yaml` reads back; keys stay in order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=False)  # unescaped, U+0085 would be lost


def parse_value(text: str, where: str) -> Any:
    """Read one YAML value, as ``load_yaml`` would.

    Args:
        text: like ``1e-4`` or ``[0.9, 0.95]``.
        where: stands for the file in messages.

    Raises:
        ConfigError: as :func:`load_yaml`.
    """
    return _Reader(text, where).document()


class _TooDeep(yaml.MarkedYAMLError):
    """More brackets open than a recipe may nest."""


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which would leave the text ``7e3`` without the quotes that it needs here."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), [*"-+.0123456789"])


class _Loader(yaml.BaseLoader):
    """PyYAML's, without its long look ahead into brackets that nothing can close in time."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Read ``[`` or ``{``: the scanner keeps each one open as a possible key, at a cost of their number squared."""
        if self.flow_level > MAX_DEPTH:
            raise _TooDeep(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)


class _Reader:
    """Builds plain data and the line index from PyYAML's events."""

    def __init__(self, text: str, path: str | Path) -> None:
        self.path = path
        self.lines: dict[str, int] = {}
        self.events = yaml.parse(text, Loader=_Loader)

    def document(self) -> Any:
        self._next()  # start of the stream
        event = self._next()
        data = None
        if isinstance(event, yaml.DocumentStartEvent):
            data = self._value(self._next(), "", 0)
            self._next()  # end of the document
            event = self._next()
        if not isinstance(event, yaml.StreamEndEvent):
            raise self._error("a second document; a recipe is one", event, "")
        return data

    def _next(self) -> Any:
        try:
            return next(self.events)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            what = " ".join(part for part in (error.context, error.problem) if part)
            what = what if isinstance(error, _TooDeep) else f"not YAML: {what}"
            raise ConfigError(what, path=self.path, line=mark.line + 1 if mark else None) from error
        except (yaml.YAMLError, ValueError, OverflowError) as error:
            raise ConfigError(f"not YAML: {error}", path=self.path) from error

    def _value(self, event: Any, key: str, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._error("anchors and aliases (& and *) are not read; write the value out", event, key)
        if event.tag is not None:
            raise self._error(f"tags are not read; remove {event.tag!r}", event, key)
        if depth > MAX_DEPTH:
            raise self._error(f"nested deeper than {MAX_DEPTH} levels", event, key)
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(key, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(key, depth)
        if event.style is not None:
            return event.value
        return self._scalar(event, key)

    def _mapping(self, prefix: str, depth: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
                raise self._error("a key must be a plain word", event, prefix)
            key = _join(prefix, event.value)
            if event.value in out:
                raise self._error(f"occurs twice; first in line {self.lines[key]}", event, key)
            self.lines[key] = _line(event)
            out[event.value] = self._value(self._next(), key, depth + 1)
        return out

    def _sequence(self, prefix: str, depth: int) -> list[Any]:
        out: list[Any] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            key = _join(prefix, str(len(out)))
            self.lines[key] = _line(event)
            out.append(self._value(event, key, depth + 1))
        return out

    def _scalar(self, event: yaml.ScalarEvent, key: str) -> Any:
        text: str = event.value
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            value = float(text)
            if not math.isfinite(value):
                raise self._error(f"{text} is too large for a float", event, key)
            return value
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            raise self._error(f"{text}: a recipe holds finite numbers only", event, key)
        return text

    def _error(self, message: str, event: Any, key: str) -> ConfigError:
        return ConfigError(message, path=self.path, line=_line(event), key=key or None)


def _line(event: Any) -> int:
    return event.start_mark.line + 1


def _join(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key
