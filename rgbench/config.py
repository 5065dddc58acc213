"""Recipes: strict YAML, ``key=value`` overrides, frozen pydantic models, errors with file:line:key."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from rgbench.errors import ConfigError, UsageError, suggest
from rgbench.strict_yaml import MAX_BYTES, MAX_DEPTH, load_yaml, parse_value

__all__ = ["Section", "apply_overrides", "find_recipe", "load_yaml", "packaged_recipes", "validate"]

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_YAML_11_BOOLEANS = {"yes", "no", "on", "off", "y", "n"}

M = TypeVar("M")


class Section(BaseModel):
    """Base of every part of a recipe: frozen, no unknown keys, no silent conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``data`` with ``key=value`` pairs put in.

    Args:
        data: from :func:`load_yaml`.
        overrides: like ``train.lr=1e-4`` or ``train.betas=[0.9, 0.95]``; values are YAML.

    Raises:
        ConfigError: no ``=``, an empty key, a value that is not YAML, a path through a value that holds no keys.
    """
    out: dict[str, Any] = json.loads(json.dumps(data))
    for override in overrides:
        key, parts, value = _split_override(override)
        here = out
        for depth, part in enumerate(parts[:-1]):
            inner = here.setdefault(part, {})
            if not isinstance(inner, dict):
                parent = ".".join(parts[: depth + 1])
                raise ConfigError(f"'{parent}' holds no keys of its own", path="command line", key=key)
            here = inner
        here[parts[-1]] = value
    return out


def _split_override(override: str) -> tuple[str, list[str], Any]:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > MAX_DEPTH:
        raise ConfigError(f"expected KEY=VALUE like train.lr=1e-4, got {override[:80]!r}", path="command line")
    if len(text) > MAX_BYTES:
        raise ConfigError(f"value longer than {MAX_BYTES} characters", path="command line", key=key)
    try:
        return key, parts, parse_value(text, "command line")
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
        overrides: what was applied, so that a message blames the command line where it is at fault.

    Returns:
        The frozen model.

    Raises:
        ConfigError: the first fault, with file:line:key and the nearest known name.
    """
    try:
        return TypeAdapter(model_cls).validate_json(json.dumps(data))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    keys, known = _trace(model_cls, fault["loc"])
    if fault["type"] == "union_tag_invalid":
        keys = (*keys, fault["ctx"]["discriminator"].strip("'"))
    key = ".".join(keys)
    given = [f"{override.partition('=')[0]}." for override in overrides]
    if any(f"{key}.".startswith(own) or (key not in lines and own.startswith(f"{key}.")) for own in given):
        raise ConfigError(_explain(fault, known), path="command line", key=key)
    line = lines.get(key) or lines.get(key.rpartition(".")[0])
    raise ConfigError(_explain(fault, known), path=path, line=line, key=key or None)


def _trace(annotation: Any, loc: Sequence[str | int]) -> tuple[tuple[str, ...], set[str]]:
    """What a pydantic location points at; it names union members too, which are no keys.

    Returns:
        The true keys on the way, and the keys known to the innermost model.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _trace(arguments[0], loc)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields
        if not loc or loc[0] not in fields:
            return tuple(map(str, loc[:1])), set(fields)
        keys, known = _trace(fields[str(loc[0])].annotation, loc[1:])
        return (str(loc[0]), *keys), known or set(fields)
    if not loc or not arguments:
        return tuple(str(part) for part in loc if isinstance(part, int)), set()
    if origin in (Union, types.UnionType):
        members = [a for a in arguments if a is not type(None)]
        if len(members) == 1:
            return _trace(members[0], loc)
        return _trace(next((m for m in members if loc[0] in _tags(m)), None), loc[1:])
    keys, known = _trace(arguments[-1], loc[1:])  # an item of a list, tuple or dict
    return (str(loc[0]), *keys), known


def _tags(annotation: Any) -> set[Any]:
    """Names that pydantic may give a union's member in a location."""
    if get_origin(annotation) is Annotated:
        return _tags(get_args(annotation)[0])
    fields = getattr(annotation, "model_fields", {}).values()
    literals = [field.annotation for field in fields if get_origin(field.annotation) is Literal]
    return {getattr(annotation, "__name__", ""), *(value for literal in literals for value in get_args(literal))}


def _explain(fault: Mapping[str, Any], known: set[str]) -> str:
    kind, name = fault["type"], str(fault["loc"][-1]) if fault["loc"] else ""
    context = fault.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key '{name[:80]}'; {suggest(name, known)}"
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
    if kind in ("float_type", "int_type") and isinstance(given, str) and _NUMBER.fullmatch(given):
        message += "; write it without quotes"
    return message


def _quoted(context: Mapping[str, Any]) -> list[str]:
    return re.findall(r"'([^']*)'", str(context.get("expected", context.get("expected_tags", ""))))


def packaged_recipes() -> dict[str, Path]:
    """Recipes that come with rgbench, by name (``lrm``, ``study/…``), sorted."""
    package = Path(__file__).parent
    folder = next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package / "recipes")
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


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
