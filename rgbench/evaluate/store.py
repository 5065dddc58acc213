"""Result store: four files for each model and way of making its images.

    results/{world}/{model}/{generation id}/
      result.json       head, protocols, runs, metric values; vectors once
      samples.parquet   prompt_id, seed, group, and a column for each value that has one number an image
      training.parquet  the thinned training log
      images.webp       lossless contact sheet of the first images; result.json has its order

A generation id names how images were made (a row of a table), a protocol id how they were measured (a column); each is
a readable name with the hash of its fields. ``result.json`` ends with the sha256 of all before it and holds those of
every column of ``samples.parquet`` and of the other two files: what is read is verified.

A value is durable once :func:`write_values` returns: it lies in ``.partial/`` first, then is folded into the four
files under a lock. Folding is idempotent, so a crash or a lost race costs nothing, and readers see both places.
Results of schema 1, a JSON file for each value, are read as if they were these.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from rgbench.core.errors import UsageError
from rgbench.core.io import open_image, read_json, sha256_file, write_bytes_atomic, write_text_atomic
from rgbench.core.progress import Track, untracked
from rgbench.metrics.values import Interval, MetricInfo, MetricValue, Protocol, canonical_sha256

SCHEMA_VERSION = 2
RESULT, SAMPLES, TRAINING, SHEET = "result.json", "samples.parquet", "training.parquet", "images.webp"
PARTIAL = ".partial"
KEYS = ("prompt_id", "seed", "group")  # columns that name an image
MAX_LOG_ROWS = 200

log = logging.getLogger(__name__)


class NewerResult(UsageError):
    """A result of a later rgbench: whole, and never to be overwritten."""


class DamagedResult(UsageError):
    """A result whose bytes are not what was written."""


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or name.startswith(PARTIAL):
        raise ValueError(f"{name[:80]!r} cannot name a folder")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Generation(_Frozen):
    """How images were made: weights, sampler, steps, guidance, resolution, dtype.

    Attributes:
        id: a name and 8 hex digits over ``fields``.
        fields: plain data.
    """

    id: FolderName
    fields: dict[str, Any]


class Run(_Frozen):
    """One command that measured: its command line and provenance (git, versions, device, threads, time)."""

    command: str
    provenance: dict[str, Any] = {}


class SheetImage(_Frozen):
    """One image of the contact sheet; ``noise_seed`` gives the same image in a diffusers pipeline."""

    prompt_id: str
    prompt: str
    seed: int
    noise_seed: int | None = None


class Sheet(_Frozen):
    """The contact sheet: square tiles of ``side`` pixels, row by row, ``columns`` a row."""

    side: int
    columns: int
    images: tuple[SheetImage, ...]
    sha256: str


class _Figure(_Frozen):
    """One value as ``result.json`` has it; ``protocol`` and ``run`` number their lists."""

    metric: str
    protocol: int
    run: int
    value: float | None
    interval: Interval | None
    reference: str | None
    num_images: int
    flags: tuple[str, ...]
    in_sample: bool
    extra: dict[str, Any]
    rows_sha256: str | None


class Head(_Frozen):
    """What all values of one model and generation share.

    Attributes:
        world: group of models that compare, such as "benchtop".
        model: name of the run or folder.
        method: "teacher", a trainer's kind, or "external".
        generation: how its images were made.
        training_seed: None where nothing was trained here.
        recipe_sha256: of the resolved recipe without seed, place and logging: runs that share it are seeds of one
            method. None where it is unknown.
        training: ``step`` of the weights and ``steps`` of the whole run; a smaller ``step`` is a checkpoint.
        trained_rewards: fingerprint ids of the rewards it was trained on.
        cost: seconds of training, reward calls, images per second, network evaluations an image.
        metrics: infos of metrics that are not rgbench's own (plug-ins, a user's judges).
    """

    world: FolderName
    model: FolderName
    method: str
    generation: Generation
    training_seed: int | None = None
    recipe_sha256: str | None = None
    training: dict[str, int] = {}
    trained_rewards: tuple[str, ...] = ()
    cost: dict[str, int | float | None] = {}
    metrics: dict[str, MetricInfo] = {}


class _File(Head):
    """``result.json``, without its last key ``sha256``."""

    schema_version: Literal[2] = 2
    written_ns: int = 0
    protocols: tuple[Protocol, ...]
    runs: tuple[Run, ...]
    figures: tuple[_Figure, ...]
    vectors: dict[str, dict[str, Any]] = {}
    sheet: Sheet | None = None
    training_sha256: str | None = None


@dataclass(frozen=True)
class ImageRows:
    """One number for each image, by the image's name.

    Attributes:
        keys: (prompt id, seed, group) of each image.
        values: (n,) float64.
    """

    keys: tuple[tuple[str, int, str], ...]
    values: np.ndarray

    def by_image(self) -> dict[tuple[str, int], float]:
        """Values by (prompt id, seed)."""
        return {(prompt, seed): float(v) for (prompt, seed, _), v in zip(self.keys, self.values, strict=True)}


@dataclass(frozen=True, eq=False)
class ModelResult:
    """All values of one model and generation.

    Attributes:
        head: what they share.
        values: in the order of their keys.
        runs: the commands that measured.
        folder: where it was read from; None for one that was only made.
        sheet: the contact sheet's order.
        run_of: number of the run in ``runs``, by value key.
    """

    head: Head
    values: tuple[MetricValue, ...]
    runs: tuple[Run, ...] = ()
    folder: Path | None = None
    sheet: Sheet | None = None
    run_of: Mapping[tuple[str, str], int] = field(default_factory=dict)
    _old_rows: Mapping[tuple[str, str], Path] = field(default_factory=dict, repr=False)
    _training_sha256: str | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are of a step before the run's last."""
        return bool(self.head.training) and self.head.training["step"] < self.head.training["steps"]

    @cached_property
    def by_key(self) -> dict[tuple[str, str], MetricValue]:
        """Values by (metric, protocol id)."""
        return {value.key: value for value in self.values}

    def rows(self, metric: str, protocol_id: str) -> ImageRows | None:
        """Per-image numbers of a value; None where it has none.

        Raises:
            DamagedResult: they are missing or not what was written; names the file.
        """
        value = self.by_key[metric, protocol_id]
        if self.folder is None or value.rows_sha256 is None:
            return None
        if (metric, protocol_id) in self._old_rows:
            return _old_rows(self._old_rows[metric, protocol_id], value)
        for table in self._tables:
            found = _column(table, _column_name(*value.key))
            if found is not None and _digest(found) == value.rows_sha256:
                return found
        file = self.folder / SAMPLES
        raise DamagedResult(f"{file}: per-image values of {metric} are damaged; measure it again with --force")

    @cached_property
    def _tables(self) -> list[dict[str, list[Any]]]:
        assert self.folder is not None
        files = [*sorted((self.folder / PARTIAL).glob("*.parquet")), self.folder / SAMPLES]
        return [table for file in files if (table := _read_table(file)) is not None]

    @cached_property
    def training_log(self) -> list[dict[str, float]]:
        """The thinned training log, a dict a row; empty where none was kept.

        Raises:
            DamagedResult: the file is not what was written.
        """
        if self.folder is None:
            return []
        old = self.folder / "training.json"
        if self._training_sha256 is None:
            return read_json(old)["rows"] if old.is_file() else []
        path = self.folder / TRAINING
        if not path.is_file() or sha256_file(path) != self._training_sha256:
            raise DamagedResult(f"{path}: damaged or missing; evaluate the run again")
        columns = _read_table(path) or {}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [{key: value for key, value in row.items() if value is not None} for row in rows]

    @cached_property
    def images(self) -> dict[SheetImage, Image.Image]:
        """The kept images, in the order of their prompts; empty where none were kept.

        Raises:
            DamagedResult: the sheet is not what was written.
        """
        if self.folder is None:
            return {}
        if self.sheet is None:
            return _old_images(self.folder / "images")
        path = self.folder / SHEET
        if not path.is_file() or sha256_file(path) != self.sheet.sha256:
            raise DamagedResult(f"{path}: damaged or missing; evaluate the model again")
        whole, side = open_image(path), self.sheet.side
        places = [divmod(i, self.sheet.columns) for i in range(len(self.sheet.images))]
        tiles = [whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y, x in places]
        return dict(zip(self.sheet.images, tiles, strict=True))


def generation_folder(root: Path, world: str, model: str, generation: Generation) -> Path:
    """Where the result of one model and generation lies."""
    return root / _folder_name(world) / _folder_name(model) / generation.id


# Reading


def load_results(root: Path, track: Track = untracked) -> list[ModelResult]:
    """Every result under a folder, by path.

    Args:
        root: the folder; those whose names begin with a dot are passed over.
        track: shows the reading.

    Raises:
        UsageError: as :func:`load_result`; one bad file is never skipped.
    """
    names = (RESULT, "*@*.json", f"{PARTIAL}/*.json")
    files = {path for name in names for path in root.rglob(name)}
    folders = {path.parent.parent if path.parent.name == PARTIAL else path.parent for path in files}
    shown = sorted(folder for folder in folders if not any(p.startswith(".") for p in folder.relative_to(root).parts))
    return [load_result(folder) for folder in track(shown, f"{root}: reading", "results")]


def load_result(folder: Path) -> ModelResult:
    """The result of one model and generation, of either schema, with what is not folded yet.

    Raises:
        NewerResult: a later schema version.
        DamagedResult: not what was written.
        UsageError: no result there, or another folder's.
    """
    waiting = _waiting(folder)  # first: folding writes result.json before it removes what it folded
    parts = [
        part for path in (folder / RESULT, *waiting) if (part := waiting.get(path) or _read_file(path)) is not None
    ]
    old = _load_old(folder)
    if not parts:
        if old is None:
            raise UsageError(f"{folder}: holds no result; make one with: rgbench eval")
        return old
    found = _as_result(_union(parts), folder)
    return found if old is None else _with_old(found, old)


def stored_keys(folder: Path) -> set[tuple[str, str]]:
    """(metric, protocol id) of every whole value in a folder; damaged results are logged and count as missing.

    Raises:
        NewerResult: a later schema version, which would be overwritten.
    """
    try:
        found = load_result(folder)
    except NewerResult:
        raise
    except DamagedResult as error:
        log.warning("%s; measured again", error)
        return set()
    except UsageError:
        return set()
    whole = set()
    for key, value in found.by_key.items():
        try:
            if value.rows_sha256 is not None:
                found.rows(*key)
            whole.add(key)
        except DamagedResult as error:
            log.warning("%s; measured again", error)
    return whole


def _waiting(folder: Path) -> dict[Path, _File]:
    """What is not folded yet, oldest first; a part that another process folds meanwhile is in ``result.json`` then."""
    found = []
    for path in (folder / PARTIAL).glob("*.json"):
        part = _read_file(path)
        if part is not None:
            found.append((part.written_ns, path.name, path, part))
    return {path: part for _, _, path, part in sorted(found, key=lambda entry: entry[:2])}


def _read_file(path: Path) -> _File | None:
    """The file, verified; None where there is none."""
    try:
        content = read_json(path)
    except UsageError as error:
        if path.exists():
            raise DamagedResult(f"{error}; remove it and measure again") from error
        return None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise NewerResult(
            f"{path}: schema version {version}; this rgbench reads up to {SCHEMA_VERSION}; update rgbench"
        )
    if version != SCHEMA_VERSION:
        raise DamagedResult(f"{path}: not a result (schema version {version!r}); remove it and measure again")
    digest = content.pop("sha256", None)
    if digest != canonical_sha256(content):
        raise DamagedResult(f"{path}: its sha256 does not match its contents; remove it and measure again")
    try:
        return _File.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise DamagedResult(f"{path}: not a result: {key}: {fault['msg']}; remove it and measure again") from error


def _union(parts: Sequence[_File]) -> _File:
    """One file of several; of two values of one key the later part's stands."""
    protocols: dict[str, Protocol] = {}
    runs: dict[str, Run] = {}
    figures: dict[tuple[str, str], tuple[_Figure, Protocol, Run]] = {}
    vectors: dict[str, dict[str, Any]] = {}
    metrics: dict[str, MetricInfo] = {}
    for part in parts:
        metrics |= part.metrics
        for figure in part.figures:
            protocol, run = part.protocols[figure.protocol], part.runs[figure.run]
            whole = figure.model_copy(update={"extra": {**part.vectors.get(protocol.id, {}), **figure.extra}})
            figures[figure.metric, protocol.id] = whole, protocol, run
    for _, protocol, run in figures.values():
        protocols[protocol.id] = protocol
        runs[_run_key(run)] = run
    vectors = _shared([(figure, protocol.id) for figure, protocol, _ in figures.values()])
    numbers, places = list(protocols), list(runs)
    stored = tuple(
        figure.model_copy(
            update={
                "protocol": numbers.index(protocol.id),
                "run": places.index(_run_key(run)),
                "extra": {k: v for k, v in figure.extra.items() if k not in vectors.get(protocol.id, {})},
            }
        )
        for _, (figure, protocol, run) in sorted(figures.items())
    )
    last = parts[-1]
    sheets = [part for part in parts if part.sheet is not None]
    logs = [part.training_sha256 for part in parts if part.training_sha256 is not None]
    about = {name: getattr(last, name) for name in Head.model_fields}
    cost: dict[str, int | float | None] = {}
    for part in parts:
        cost |= {key: value for key, value in part.cost.items() if value is not None or key not in cost}
    return _File(
        **{**about, "metrics": metrics, "cost": cost},
        written_ns=last.written_ns,
        protocols=tuple(protocols.values()),
        runs=tuple(runs.values()),
        figures=stored,
        vectors=vectors,
        sheet=sheets[-1].sheet if sheets else None,
        training_sha256=logs[-1] if logs else None,
    )


def _run_key(run: Run) -> str:
    return canonical_sha256(run.model_dump())


def _shared(figures: Sequence[tuple[_Figure, str]]) -> dict[str, dict[str, Any]]:
    """Entries that every value of a protocol has alike, where it has several: stored once."""
    by_protocol: dict[str, list[_Figure]] = {}
    for figure, protocol in figures:
        by_protocol.setdefault(protocol, []).append(figure)
    shared = {}
    for protocol, members in by_protocol.items():
        first = members[0].extra
        same = {k: v for k, v in first.items() if all(k in m.extra and m.extra[k] == v for m in members[1:])}
        if len(members) > 1 and same:
            shared[protocol] = same
    return shared


def _as_result(file: _File, folder: Path) -> ModelResult:
    place = folder.parent.parent.name, folder.parent.name, folder.name
    if place != (file.world, file.model, file.generation.id):
        named = "/".join((file.world, file.model, file.generation.id))
        raise UsageError(f"{folder / RESULT}: is the result of {named}; move it there")
    values, run_of = [], {}
    for figure in file.figures:
        protocol = file.protocols[figure.protocol]
        extra = {**file.vectors.get(protocol.id, {}), **figure.extra}
        values.append(
            MetricValue(
                metric=figure.metric,
                protocol=protocol,
                value=figure.value,
                interval=figure.interval,
                num_images=figure.num_images,
                reference=figure.reference,
                flags=figure.flags,
                in_sample=figure.in_sample,
                extra=extra,
                rows_sha256=figure.rows_sha256,
            )
        )
        run_of[values[-1].key] = figure.run
    head = Head(**{name: getattr(file, name) for name in Head.model_fields})
    log_sha256 = file.training_sha256
    return ModelResult(head, tuple(values), file.runs, folder, file.sheet, run_of, _training_sha256=log_sha256)


# Writing


def write_values(
    root: Path, head: Head, run: Run, values: Sequence[MetricValue], keys: Sequence[tuple[str, int, str]]
) -> Path:
    """Store values durably, then fold them into the four files.

    Args:
        root: the results folder.
        head: of the model and generation.
        run: the command that measured.
        values: with their rows, in the order of ``keys``.
        keys: (prompt id, seed, group) of each image.

    Returns:
        The result's folder.

    Raises:
        ValueError: NaN or infinity in a value, or rows of another length.
        NewerResult: a result of a later rgbench lies there.
    """
    folder = generation_folder(root, head.world, head.model, head.generation)
    protocols = {value.protocol.id: value.protocol for value in values}
    columns: dict[str, list[Any]] = dict(zip(KEYS, map(list, zip(*keys, strict=True)), strict=True)) if keys else {}
    figures = []
    for value in values:
        digest = None
        if value.rows is not None:
            if len(value.rows) != len(keys) or not np.isfinite(value.rows).all():
                fault = f"{len(value.rows)} per-image values for {len(keys)} images, or not finite"
                raise ValueError(f"{value.metric}: {fault}")
            columns[_column_name(*value.key)] = np.asarray(value.rows, dtype=np.float64).tolist()
            digest = _digest(ImageRows(tuple(keys), np.asarray(value.rows, dtype=np.float64)))
        if value.value is not None and not math.isfinite(value.value):
            raise ValueError(f"{value.metric} is {value.value}; not stored")
        figures.append(_figure(value, list(protocols).index(value.protocol.id), digest))
    content = _File(
        **head.model_dump(),
        written_ns=time.time_ns(),
        protocols=tuple(protocols.values()),
        runs=(run,),
        figures=tuple(figures),
    )
    part = folder / PARTIAL / f"{os.getpid()}-{secrets.token_hex(6)}.json"
    if len(columns) > len(KEYS):
        write_bytes_atomic(part.with_suffix(".parquet"), _parquet(columns))
    _write_file(part, content)
    fold(folder)
    return folder


def write_sheet(folder: Path, head: Head, run: Run, images: Sequence[tuple[SheetImage, np.ndarray]]) -> None:
    """Store the contact sheet of the first images.

    Args:
        folder: of the result.
        head: of the model and generation.
        run: the command that made them.
        images: (side, side, 3) uint8 each, of one size.
    """
    side = images[0][1].shape[0]
    columns = math.ceil(math.sqrt(len(images)))
    whole = Image.new("RGB", (columns * side, math.ceil(len(images) / columns) * side))
    for i, (_, pixels) in enumerate(images):
        whole.paste(Image.fromarray(pixels), (i % columns * side, i // columns * side))
    out = io.BytesIO()
    whole.save(out, "WEBP", lossless=True, quality=100, method=4)
    sheet = Sheet(
        side=side,
        columns=columns,
        images=tuple(about for about, _ in images),
        sha256=hashlib.sha256(out.getvalue()).hexdigest(),
    )
    with _locked(folder):
        write_bytes_atomic(folder / SHEET, out.getvalue())
        _add_part(folder, head, run, sheet=sheet)
    fold(folder)


def write_training_log(folder: Path, head: Head, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store a training log, thinned to at most 200 rows, each the mean of the steps up to its own."""
    thinned = thin(rows, MAX_LOG_ROWS)
    names = list(dict.fromkeys(key for row in thinned for key in row))
    data = _parquet({name: [row.get(name) for row in thinned] for name in names})
    digest = hashlib.sha256(data).hexdigest()
    path = folder / TRAINING
    stored = _read_file(folder / RESULT)
    if stored and stored.training_sha256 == digest and path.is_file() and sha256_file(path) == digest:
        return  # complete results may lie where nothing can be written
    with _locked(folder):
        write_bytes_atomic(path, data)
        _add_part(folder, head, run, training_sha256=digest)
    fold(folder)


def fold(folder: Path) -> None:
    """Fold what lies in ``.partial/`` into ``result.json`` and ``samples.parquet``; wait for nobody.

    Who finds the lock taken leaves: its holder looks again before it lets go, and a part that is missed all the same is
    read where it lies and folded by the next.

    Raises:
        NewerResult: a result of a later rgbench lies there.
    """
    while (folder / PARTIAL).is_dir() and any((folder / PARTIAL).glob("*.json")):
        with _locked(folder, wait=False) as mine:
            if not mine:
                return
            _fold_once(folder)


def _fold_once(folder: Path) -> None:
    waiting = _waiting(folder)
    files: list[_File | None] = []
    tables: list[dict[str, list[Any]] | None] = []
    try:
        files.append(_read_file(folder / RESULT))
        tables.append(_read_table(folder / SAMPLES))
    except DamagedResult as error:
        log.warning("%s; its values are measured again", error)
    files += waiting.values()
    tables += [_read_table(path.with_suffix(".parquet")) for path in waiting]
    whole = _union([file for file in files if file is not None])
    names = [(_column_name(f.metric, whole.protocols[f.protocol].id), f.rows_sha256) for f in whole.figures]
    columns = _merged([table for table in tables if table], {name: sha256 for name, sha256 in names if sha256})
    if columns:
        write_bytes_atomic(folder / SAMPLES, _parquet(columns))
    _write_file(folder / RESULT, whole)
    for path in waiting:
        path.unlink(missing_ok=True)
        path.with_suffix(".parquet").unlink(missing_ok=True)


def _merged(tables: Sequence[dict[str, list[Any]]], wanted: Mapping[str, str]) -> dict[str, list[Any]]:
    """One table of several: a row for each image, and of each wanted column the one whose digest is right."""
    chosen: dict[str, ImageRows] = {}
    for table in tables:
        for name, digest in wanted.items():
            found = _column(table, name)
            if found is not None and _digest(found) == digest:
                chosen[name] = found
    images = list(dict.fromkeys(key for rows in chosen.values() for key in rows.keys))
    if not images:
        return {}
    place = {key: i for i, key in enumerate(images)}
    columns: dict[str, list[Any]] = dict(zip(KEYS, map(list, zip(*images, strict=True)), strict=True))
    for name in sorted(chosen):
        column: list[float | None] = [None] * len(images)
        for key, value in zip(chosen[name].keys, chosen[name].values.tolist(), strict=True):
            column[place[key]] = value
        columns[name] = column
    return columns


def _add_part(folder: Path, head: Head, run: Run, **more: Any) -> None:
    content = _File(**head.model_dump(), written_ns=time.time_ns(), protocols=(), runs=(run,), figures=(), **more)
    _write_file(folder / PARTIAL / f"{os.getpid()}-{secrets.token_hex(6)}.json", content)


def _write_file(path: Path, content: _File) -> None:
    plain = json.loads(json.dumps(content.model_dump(), allow_nan=False))  # lists for tuples, as a reader gets them
    entries = [f"{json.dumps(key)}: {_lines(value)}" for key, value in plain.items()]
    entries.append(f'"sha256": "{canonical_sha256(plain)}"')
    write_text_atomic(path, "{\n" + ",\n".join(entries) + "\n}\n")


def _lines(value: Any) -> str:
    """JSON of an entry, each part of it on a line of its own."""
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(part, ensure_ascii=False) for part in value) + "\n]"
    if isinstance(value, dict) and value:
        parts = (f"{json.dumps(key)}: {json.dumps(part, ensure_ascii=False)}" for key, part in value.items())
        return "{\n  " + ",\n  ".join(parts) + "\n}"
    return json.dumps(value, ensure_ascii=False)


def _figure(value: MetricValue, protocol: int, digest: str | None) -> _Figure:
    return _Figure(
        metric=value.metric,
        protocol=protocol,
        run=0,
        value=value.value,
        interval=value.interval,
        reference=value.reference,
        num_images=value.num_images,
        flags=value.flags,
        in_sample=value.in_sample,
        extra=dict(value.extra),
        rows_sha256=digest,
    )


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """The folder's lock; whether it was had, for who does not wait."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


# Tables


def _column_name(metric: str, protocol_id: str) -> str:
    return f"{metric}@{protocol_id}"


def _parquet(columns: Mapping[str, Sequence[Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), out, compression="zstd")
    return out.getvalue()


def _read_table(path: Path) -> dict[str, list[Any]] | None:
    """Columns of a parquet file; None where there is none.

    Without pyarrow's reader threads, which now and then abort a process at its end.
    """
    try:
        return pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False).to_pydict()
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DamagedResult(f"{path}: cannot be read ({error}); measure again with --force") from error


def _column(table: Mapping[str, Sequence[Any]], name: str) -> ImageRows | None:
    """A column with the images that it has a number for; None where the table lacks it."""
    if name not in table or any(key not in table for key in KEYS):
        return None
    keys = zip(*(table[key] for key in KEYS), strict=True)
    found = [(key, value) for key, value in zip(keys, table[name], strict=True) if value is not None]
    return ImageRows(tuple(key for key, _ in found), np.array([value for _, value in found], dtype=np.float64))


def _digest(rows: ImageRows) -> str:
    """sha256 over images and values, whatever their order."""
    order = sorted(range(len(rows.keys)), key=lambda i: rows.keys[i])
    text = json.dumps([rows.keys[i] for i in order], separators=(",", ":"))
    return hashlib.sha256(text.encode() + np.ascontiguousarray(rows.values[order], dtype="<f8").tobytes()).hexdigest()


def thin(rows: Sequence[Mapping[str, Any]], num: int) -> list[dict[str, float]]:
    """At most `num` rows: means of consecutive rows' numbers, at the last step of each block.

    >>> thin([{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0, "b": 4.0}, {"step": 3, "a": 5.0}], 2)
    [{'step': 2, 'a': 2.0, 'b': 4.0}, {'step': 3, 'a': 5.0}]
    """
    size = max(1, -(-len(rows) // num))
    return [_mean(rows[start : start + size]) for start in range(0, len(rows), size)]


def _mean(block: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in block:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                values.setdefault(key, []).append(value)
    return {"step": block[-1]["step"], **{key: math.fsum(found) / len(found) for key, found in values.items()}}


# Schema 1: a JSON file for each value


OLD_NAMES = {
    "hps_aa1": "hps",
    "hps_aa0": "hps_no_antialias",
    "hps_jpeg75_aa1": "hps_jpeg75",
    "hps_jpeg75_aa0": "hps_jpeg75_no_antialias",
}
OLD_GAP = re.compile(r"_gap(?=_db$|$)")  # of values that were differences to real images


def _load_old(folder: Path) -> ModelResult | None:
    files = sorted(folder.glob("*@*.json"))
    if not files:
        return None
    values, rows, run_of = {}, {}, {}
    runs: dict[str, Run] = {}
    head = None
    for path in files:
        content = read_json(path)
        if not isinstance(content, dict) or content.get("schema_version") != 1:
            raise DamagedResult(f"{path}: not a result of schema 1; remove it and measure again")
        try:
            value = _old_value(content, path)
            run = Run(command=content["command"], provenance=content["provenance"])
            head = Head(
                world=content["world"],
                model=content["model"],
                method=content["method"],
                generation=Generation(**content["generation"]),
                training_seed=content["training_seed"],
                training=content.get("training", {}),
                trained_rewards=tuple(content.get("trained_rewards", ())),
                cost=content.get("cost", {}),
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise DamagedResult(f"{path}: not a result of schema 1 ({error}); remove it and measure again") from error
        values[value.key] = value
        runs.setdefault(_run_key(run), run)
        run_of[value.key] = list(runs).index(_run_key(run))
        if content.get("samples"):
            rows[value.key] = path.with_name(Path(content["samples"]).name)
    assert head is not None
    return ModelResult(head, tuple(values.values()), tuple(runs.values()), folder, None, run_of, rows)


def _old_value(content: Mapping[str, Any], path: Path) -> MetricValue:
    old, extra = content["metric"]["name"], dict(content.get("extra", {}))
    name = OLD_GAP.sub("", OLD_NAMES.get(old, old))
    reference = "real" if name != old and OLD_GAP.search(old) else None
    value, interval = content["value"], content["interval"] and Interval(**content["interval"])
    if name.startswith("vendi") and isinstance(extra.get("reference"), float) and value is not None:
        reference, shift = "real", extra.pop("reference")  # schema 1 stored the score, not its difference to real's
        extra |= {"level": value, "real": shift, "jackknife": [x - shift for x in extra.get("jackknife", [])]}
        value -= shift
        interval = interval and interval.model_copy(update={"low": interval.low - shift, "high": interval.high - shift})
    fields = content["protocol"]["fields"]
    id = content["protocol"]["id"] if name == old else Protocol.of(name, fields).id
    return MetricValue(
        metric=name,
        protocol=Protocol(id=id, fields=fields),
        value=value,
        interval=interval,
        num_images=content["num_samples"],
        reference=reference,
        flags=tuple(content.get("flags", ())),
        in_sample=content.get("in_sample", False),
        extra=extra,
        rows_sha256="schema 1" if content.get("samples") else None,
    )


def _old_rows(path: Path, value: MetricValue) -> ImageRows:
    """Per-image numbers of schema 1, which has no digests: they must have the value as their mean."""
    table = _read_table(path)
    found = _column(table or {}, "value")
    if found is None or len(found.values) != value.num_images:
        raise DamagedResult(f"{path}: lacks per-image values; measure again with --force")
    if value.value is not None and not math.isclose(found.values.mean(), value.value, rel_tol=1e-9, abs_tol=1e-9):
        raise DamagedResult(f"{path}: the mean of its values is not the stored one; measure again with --force")
    return found


def _old_images(folder: Path) -> dict[SheetImage, Image.Image]:
    path = folder / "index.json"
    if not path.is_file():
        return {}
    found = {}
    for entry in read_json(path):
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{path}: each entry needs a plain file name, not {name!r}; evaluate again")
        about = SheetImage(**{key: entry.get(key) for key in SheetImage.model_fields})
        found[about] = open_image(folder / name)
    return found


def _with_old(new: ModelResult, old: ModelResult) -> ModelResult:
    """A result with the values of schema 1 that were not measured again."""
    extra = [value for value in old.values if value.key not in new.by_key]
    shift = len(new.runs)
    run_of = {**{v.key: shift + old.run_of[v.key] for v in extra}, **new.run_of}
    rows = {value.key: old._old_rows[value.key] for value in extra if value.key in old._old_rows}
    return replace(new, values=(*new.values, *extra), runs=(*new.runs, *old.runs), run_of=run_of, _old_rows=rows)
