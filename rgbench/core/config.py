"""Recipes: strict YAML, ``key=value`` overrides, frozen pydantic models, errors with file:line:key."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rgbench.core.errors import ConfigError, UsageError, suggest

MAX_BYTES = 32_768  # the longest recipe here has 4 KB; a megabyte would take PyYAML seconds
MAX_DEPTH = 24
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,40})")
_FLOAT = re.compile(r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_WORDS = {"": None, "~": None, "null": None, "true": True, "True": True, "false": False, "False": False}
_YAML_11_BOOLEANS = {"yes", "no", "on", "off", "y", "n"}
M = TypeVar("M")
B = TypeVar("B", bound=BaseModel)


class Section(BaseModel):
    """Base class of a recipe's sections: frozen, no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


def read_as(model: type[B], content: Any, what: str, remedy: str, error: type[UsageError] = UsageError) -> B:
    """The content of a file as a model.

    Args:
        model: class of the model.
        content: parsed JSON.
        what: names the file and says what it is not, for the message.
        remedy: what to do about it.
        error: class of what is raised.

    Raises:
        UsageError: names the first key that does not fit.
    """
    try:
        return model.model_validate(content)
    except ValidationError as caught:
        fault = caught.errors(include_url=False)[0]
        raise error(f"{what}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}; {remedy}") from caught


def packaged_recipes() -> dict[str, Path]:
    """The recipes that come with rgbench, by name (``lrm``, ``sd21/lrm``), sorted; ``study/`` holds studies of them."""
    package = Path(__file__).parent.parent
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package / "recipes")
    found = {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}
    return {name: path for name, path in found.items() if not name.startswith("study/")}


def find_recipe(name_or_path: str | Path) -> Path:
    """The file of a recipe: an existing path, else the packaged recipe of that name.

    Raises:
        UsageError: neither; names the nearest.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    known = packaged_recipes()
    name = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if name in known:
        return known[name]
    raise UsageError(
        f"no recipe '{str(name_or_path)[:80]}': neither a file nor a packaged recipe; {suggest(name, known)}"
    )


def load_yaml(path: str | Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML mapping.

    PyYAML's YAML 1.1 reads ``1e-4`` as a string, ``no`` as False, ``1:30`` as 90 and takes the last of two equal keys.
    Here ``true``/``false``, ``null``, integers and floats mean what JSON's do, everything else is a string; anchors,
    tags and equal keys are errors.

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


def apply_overrides(
    data: Mapping[str, Any], overrides: Iterable[str], rivals: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Copy ``data`` with ``key=value`` pairs put in.

    What an override replaces goes: a section that gets another ``kind`` loses its keys, and of two rivals the one that
    is not given.

    Args:
        data: from :func:`load_yaml`.
        overrides: like ``train.lr=1e-4`` or ``train.betas=[0.9, 0.95]``; values are YAML.
        rivals: pairs of dotted keys that exclude each other.

    Raises:
        ConfigError: no ``=``, an empty key, a value that is not YAML, a path through a value that holds no keys.
    """
    out: dict[str, Any] = json.loads(json.dumps(data))
    split = [_split_override(override) for override in overrides]
    for key, parts, value in split:
        section = _section(out, parts[:-1])
        if len(parts) > 1 and parts[-1] == "kind" and section.get("kind", value) != value:
            section.clear()
        if value is not None:
            for rival in [other for pair in rivals if key in pair for other in pair if other != key]:
                *where, name = rival.split(".")
                _section(out, where).pop(name, None)
    for key, parts, value in split:
        here = out
        for depth, part in enumerate(parts[:-1]):
            inner = here.setdefault(part, {})
            if not isinstance(inner, dict):
                parent = ".".join(parts[: depth + 1])
                raise ConfigError(f"'{parent}' holds no keys of its own", path="command line", key=key)
            here = inner
        here[parts[-1]] = value
    return out


def _section(data: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """The section at a path; an empty one where there is none."""
    for part in parts:
        data = data.get(part) if isinstance(data, dict) else None  # type: ignore[assignment]
    return data if isinstance(data, dict) else {}


def _split_override(override: str) -> tuple[str, list[str], Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ConfigError(f"expected KEY=VALUE like train.lr=1e-4, got {override[:80]!r}", path="command line")
    if len(text) > MAX_BYTES:
        raise ConfigError(f"value longer than {MAX_BYTES} characters", path="command line", key=key)
    try:
        return key, parts, _Reader(text, "command line").document()
    except ConfigError as error:
        raise ConfigError(f"{error.message} in {text[:80]!r}", path="command line", key=key) from error


def validate(
    model_cls: type[M] | Any,
    data: Mapping[str, Any],
    lines: Mapping[str, int],
    path: str | Path,
    overrides: Sequence[str] = (),
) -> M:
    """Check data against a model, as strictly as JSON does: a list for a tuple, but never "1" for 1.

    Args:
        model_cls: a :class:`Section` or a union of them with a discriminator.
        data: from :func:`load_yaml`, after :func:`apply_overrides`.
        lines: line of every dotted key.
        path: the file, for messages.
        overrides: as applied to ``data``; errors in their keys name the command line.

    Returns:
        The frozen model.

    Raises:
        ConfigError: the first fault, with file:line:key and the nearest known name.
    """
    try:
        return TypeAdapter(model_cls).validate_json(json.dumps(data))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    keys, known, elsewhere = _trace(model_cls, fault["loc"])
    if fault["type"] == "union_tag_invalid":
        keys = (*keys, fault["ctx"]["discriminator"].strip("'"))
    key = ".".join(keys)
    given = [f"{override.partition('=')[0]}." for override in overrides]
    fresh = fault["type"] == "missing" and f"{key.rpartition('.')[0]}.kind." in given  # the file's keys are gone
    if fresh or any(f"{key}.".startswith(own) or (key not in lines and own.startswith(f"{key}.")) for own in given):
        raise ConfigError(_explain(fault, known, elsewhere), path="command line", key=key)
    line = lines.get(key) or lines.get(key.rpartition(".")[0])
    raise ConfigError(_explain(fault, known, elsewhere), path=path, line=line, key=key or None)


def _trace(annotation: Any, loc: Sequence[str | int]) -> tuple[tuple[str, ...], set[str], str]:
    """Resolve a pydantic location, which names union members too, to keys.

    Returns:
        The keys on the way, the keys known to the innermost model, and where the last key belongs if not there.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _trace(arguments[0], loc)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if not loc or loc[0] not in fields:
            inner = [name for name, info in fields.items() if loc and loc[0] in _fields(info.annotation)]
            return tuple(map(str, loc[:1])), set(fields), f"did you mean '{inner[0]}.{loc[0]}'?" if inner else ""
        keys, known, elsewhere = _trace(fields[str(loc[0])].annotation, loc[1:])
        return (str(loc[0]), *keys), known or set(fields), elsewhere
    if not loc or not arguments:
        return tuple(str(part) for part in loc if isinstance(part, int)), set(), ""
    if origin in (Union, types.UnionType):
        members = [a for a in arguments if a is not type(None)]
        if len(members) == 1:
            return _trace(members[0], loc)
        keys, known, elsewhere = _trace(next((m for m in members if loc[0] in _tags(m)), None), loc[1:])
        if len(loc) == 2 and not elsewhere:
            owners = [_fields(m)["kind"] for m in members if {loc[1], "kind"} <= _fields(m).keys()]
            kinds = ", ".join(str(kind) for owner in owners for kind in get_args(owner.annotation))
            elsewhere = f"set kind to one that has it ({kinds})" if kinds else ""
        return keys, known, elsewhere
    keys, known, elsewhere = _trace(arguments[-1], loc[1:])  # an item of a list, tuple or dict
    return (str(loc[0]), *keys), known, elsewhere


def _fields(annotation: Any) -> dict[str, Any]:
    """Fields of a section that may be null, or of all members of a union."""
    if hasattr(annotation, "model_fields"):
        return dict(annotation.model_fields)
    return {name: info for each in get_args(annotation) for name, info in _fields(each).items()}


def _tags(annotation: Any) -> set[Any]:
    """Names by which pydantic may call a union's member in a location."""
    if get_origin(annotation) is Annotated:
        return _tags(get_args(annotation)[0])
    fields = getattr(annotation, "model_fields", {}).values()
    literals = [field.annotation for field in fields if get_origin(field.annotation) is Literal]
    return {getattr(annotation, "__name__", ""), *(value for literal in literals for value in get_args(literal))}


def _explain(fault: Mapping[str, Any], known: set[str], elsewhere: str = "") -> str:
    kind, name = fault["type"], str(fault["loc"][-1]) if fault["loc"] else ""
    context = fault.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key '{name[:80]}'; {elsewhere or suggest(name, known)}"
    if kind == "missing":
        return "missing; give it a value"
    if kind == "union_tag_invalid":
        return (
            f"unknown {context['discriminator']} '{context['tag']}'; {suggest(str(context['tag']), _quoted(context))}"
        )
    if kind == "union_tag_not_found":
        return f"lacks the key {context['discriminator']}"
    given = fault.get("input")
    message = fault["msg"].removeprefix("Value error, ")
    if not isinstance(given, dict):
        message += f"; got {json.dumps(given, default=str)[:80]}"
    if kind == "literal_error" and isinstance(given, str):
        message += f"; {suggest(given, _quoted(context))}"
    if kind.startswith("bool") and str(given).lower() in _YAML_11_BOOLEANS:
        message += "; write true or false"
    if (
        kind in ("float_type", "int_type")
        and isinstance(given, str)
        and (_INT.fullmatch(given) or _FLOAT.fullmatch(given))
    ):
        message += "; write it without quotes"
    return message


def _quoted(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags", ""))))


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


class _TooDeep(yaml.MarkedYAMLError):
    """More brackets open than a recipe may nest."""


class _Loader(yaml.BaseLoader):
    """PyYAML's loader, without its quadratic look-ahead into nested brackets."""

    def fetch_flow_collection_start(self, token: Any) -> None:
        """Read ``[`` or ``{``, up to ``MAX_DEPTH`` of them: each stays open as a possible key."""
        if self.flow_level > MAX_DEPTH:
            raise _TooDeep(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(token)


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes texts like ``7e3`` that :func:`load_yaml` would read as numbers."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), [*"-+.0123456789"])
