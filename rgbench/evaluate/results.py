"""Result store: four files for each model and generation.

    results/{world}/{model}/{generation id}/
      result.json       head, protocols, runs, metric values; shared vectors once
      samples.parquet   prompt_id, seed, group, and one column for each value with per-image numbers
      training.parquet  the thinned training log
      images.webp       lossless contact sheet of the first images; result.json has its order

A generation id names how images were made (a row of a table), a protocol id how they were measured (a column); each is
a readable name with the hash of its fields. ``result.json`` ends with the sha256 of everything before it and holds the
sha256 of each column of ``samples.parquet`` and of the other two files, so damage is found when it is read.

Values are durable once :func:`write_values` returns: they lie in ``.partial/`` first, and are then folded into the four
files under a lock. Folding is idempotent: a crash or a lost race costs nothing, and readers see both places. Results of
schema 1 (a JSON file for each value) are read as well.
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
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator

from rgbench.core.config import read_as
from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import (
    SEAL,
    canonical_sha256,
    open_image,
    read_json,
    seal,
    unseal,
    write_bytes_atomic,
    write_text_atomic,
)
from rgbench.core.progress import Track, untracked
from rgbench.data.files import walk_files
from rgbench.metrics.values import Interval, MetricInfo, MetricValue, Protocol, identify

SCHEMA_VERSION = 2
RESULT, SAMPLES, TRAINING, SHEET = "result.json", "samples.parquet", "training.parquet", "images.webp"
PARTIAL = ".partial"
KEYS = ("prompt_id", "seed", "group")  # columns that name an image
MAX_LOG_ROWS = 200
MAX_WEBP_SIDE = 16_383  # of the format
MAX_SHEET_PIXELS = 89_000_000  # below that at which Pillow warns
MAX_ROWS = 5_000_000  # of a parquet file that is opened
STALE_SEC = 3600  # after which a killed writer's leftovers are removed

log = logging.getLogger(__name__)


class NewerResult(UsageError):
    """A result of a later rgbench, which is never overwritten."""


class DamagedResult(UsageError):
    """A result whose bytes are not those that were written."""


def _folder_name(name: str) -> str:
    if not name or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(f"{name[:80]!r} cannot name a folder of results")
    return name


def _step_of_steps(training: dict[str, int]) -> dict[str, int]:
    if training and not {"step", "steps"} <= training.keys():
        raise ValueError("lacks step or steps")
    return training


FolderName = Annotated[str, AfterValidator(_folder_name)]
Key = tuple[str, str]  # metric and protocol id
ImageKey = tuple[str, int, str]  # prompt id, seed and group


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Generation(_Frozen):
    """How images were made: weights, configuration, sampler, steps, guidance, resolution, dtype.

    Attributes:
        id: a readable name and 8 hex digits over ``fields``.
        fields: plain data.
    """

    id: FolderName
    fields: dict[str, Any]

    @classmethod
    def of(cls, name: str, fields: Mapping[str, Any]) -> Generation:
        """The generation of a name such as "lcm4" and its fields."""
        return cls(id=identify(name, fields), fields=dict(fields))


class Run(_Frozen):
    """One command that measured, with its provenance (git, versions, device, threads, time)."""

    command: str
    provenance: dict[str, Any] = {}


class SheetImage(_Frozen):
    """One image of the contact sheet; ``noise_seed`` makes the same image in a diffusers pipeline."""

    prompt_id: str
    prompt: str
    seed: int
    noise_seed: int | None = None


class Sheet(_Frozen):
    """The contact sheet: square tiles of ``side`` pixels, row by row, ``columns`` a row."""

    side: PositiveInt
    columns: PositiveInt
    images: tuple[SheetImage, ...]
    sha256: str


class Head(_Frozen):
    """What all values of one model and generation share.

    Attributes:
        world: models of one world are compared, such as those of "benchtop".
        model: name of the run or folder.
        method: "teacher", a trainer's kind, or "external".
        generation: how its images were made.
        training_seed: None where nothing was trained here.
        recipe_sha256: of the resolved recipe without seed, place and logging; runs that share it are seeds of one
            method. None where it is unknown.
        recipe: what the run's recipe sets, by dotted key, without seed, places and logging; empty where it is unknown.
        training: ``step`` of the weights and ``steps`` of the whole run; a smaller ``step`` is a checkpoint.
        trained_rewards: fingerprint ids of the rewards that it was trained on.
        cost: seconds of training, reward calls, nats of choosing the best of n, images per second, network evaluations
            per image.
        metrics: infos of metrics that are not rgbench's own (plug-ins, a user's judges).
    """

    world: FolderName
    model: FolderName
    method: str
    generation: Generation
    training_seed: int | None = None
    recipe_sha256: str | None = None
    recipe: dict[str, Any] = {}
    training: Annotated[dict[str, int], AfterValidator(_step_of_steps)] = {}
    trained_rewards: tuple[str, ...] = ()
    cost: dict[str, int | float | None] = {}
    metrics: dict[str, MetricInfo] = {}


class _Entry(_Frozen):
    """One value in ``result.json``; ``protocol`` and ``run`` are places in their lists."""

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


_SHARED = ("metric", "value", "interval", "reference", "num_images", "flags", "in_sample")


class _Document(Head):
    """``result.json``, or a part of it under ``.partial/``, without its last key ``sha256``."""

    schema_version: Literal[2] = 2
    protocols: tuple[Protocol, ...] = ()
    runs: tuple[Run, ...] = ()
    figures: tuple[_Entry, ...] = ()
    vectors: dict[str, dict[str, Any]] = {}  # entries of ``extra`` that all values of a protocol share
    sheet: Sheet | None = None
    training_sha256: str | None = None

    @model_validator(mode="after")
    def _names_what_it_holds(self) -> _Document:
        for name in ("protocol", "run"):
            num = len(getattr(self, f"{name}s"))
            if not all(0 <= getattr(entry, name) < num for entry in self.figures):
                raise ValueError(f"a value names a {name} that is not among the {num} listed")
        return self


@dataclass(frozen=True)
class ImageRows:
    """One number for each image.

    Attributes:
        keys: (prompt id, seed, group) of each image.
        values: (n,) float64.
    """

    keys: tuple[ImageKey, ...]
    values: np.ndarray

    def by_image(self) -> dict[tuple[str, int], float]:
        """Values by (prompt id, seed)."""
        return {(prompt, seed): float(v) for (prompt, seed, _), v in zip(self.keys, self.values, strict=True)}


@dataclass(frozen=True, eq=False)
class ModelResult:
    """All values of one model and generation.

    Attributes:
        head: what they share.
        values: sorted by metric and protocol id.
        runs: the commands that measured them.
        folder: where it was read from; None for one that was only made.
        sheet: order of the contact sheet.
        run_of: place in ``runs`` of each value's command, by (metric, protocol id).
    """

    head: Head
    values: tuple[MetricValue, ...]
    runs: tuple[Run, ...] = ()
    folder: Path | None = None
    sheet: Sheet | None = None
    run_of: Mapping[Key, int] = field(default_factory=dict)
    _old_rows: Mapping[Key, Path | None] = field(default_factory=dict, repr=False)  # of values of schema 1
    _training_sha256: str | None = None

    @property
    def is_checkpoint(self) -> bool:
        """Whether the weights are of a step before the run's last."""
        return bool(self.head.training) and self.head.training["step"] < self.head.training["steps"]

    @cached_property
    def by_key(self) -> dict[Key, MetricValue]:
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
        if old := self._old_rows.get(value.key):
            return _old_rows(old, value)
        for table in self._tables:
            found = table.rows(_column_name(*value.key))
            if found is not None and _digest(found) == value.rows_sha256:
                return found
        raise DamagedResult(
            f"{self.folder / SAMPLES}: per-image values of {metric} are damaged; run rgbench eval again"
        )

    @cached_property
    def _tables(self) -> list[_Table]:
        assert self.folder is not None
        files = [*sorted((self.folder / PARTIAL).glob(f"*.{SAMPLES}")), self.folder / SAMPLES]
        return [table for file in files if (table := _read_table(file)) is not None]

    @cached_property
    def training_log(self) -> list[dict[str, float]]:
        """The thinned training log, a dict for each row; empty where none was kept.

        Raises:
            DamagedResult: the file is missing or not what was written.
        """
        if self.folder is None:
            return []
        if self._training_sha256 is None:
            return _old_log(self.folder / "training.json")
        data = _verified(self.folder, TRAINING, self._training_sha256)
        columns = pq.read_table(pa.BufferReader(data), use_threads=False).to_pydict()
        rows = (zip(columns, row, strict=True) for row in zip(*columns.values(), strict=True))
        return [{key: value for key, value in row if value is not None} for row in rows]

    @cached_property
    def images(self) -> dict[SheetImage, Image.Image]:
        """The kept images in the order of their prompts; empty where none were kept.

        Raises:
            DamagedResult: the sheet is missing or not what was written.
        """
        if self.folder is None:
            return {}
        if self.sheet is None:
            return _old_images(self.folder / "images") if self._old_rows else {}
        data, side = _verified(self.folder, SHEET, self.sheet.sha256), self.sheet.side
        whole = open_image(data, max_pixels=MAX_SHEET_PIXELS)
        places = [divmod(i, self.sheet.columns) for i in range(len(self.sheet.images))]
        tiles = [whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y, x in places]
        return dict(zip(self.sheet.images, tiles, strict=True))


def generation_folder(root: Path, world: str, model: str, generation: Generation) -> Path:
    """Folder of the result of one model and generation."""
    return root / _folder_name(world) / _folder_name(model) / generation.id


# Reading


def find_folders(root: Path, name: str) -> list[Path]:
    """Folders of the results that ``model``, ``model/generation`` or ``world/model/generation`` names.

    Raises:
        UsageError: none.
    """
    folders = sorted(path for path in root.glob("*/*/*") if path.is_dir() and not path.name.startswith("."))
    named = {path: path.parts[-3:] for path in folders if _holds_result(path, os.listdir(path))}
    wanted = tuple(name.strip("/").split("/"))
    spans = {1: slice(1, 2), 2: slice(1, 3), 3: slice(0, 3)}
    found = [folder for folder, parts in named.items() if parts[spans.get(len(wanted), slice(0))] == wanted]
    if not found:
        raise UsageError(f"{root}: no result {name!r}; {suggest(name, {parts[1] for parts in named.values()})}")
    return found


def remove_folder(folder: Path) -> None:
    """Remove a result; no reader sees a part of one.

    Raises:
        UsageError: a process is writing it.
    """
    with _locked(folder) as mine:
        if not mine:
            raise UsageError(f"{folder}: an evaluation is writing it; stop that first")
        gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
        folder.rename(gone)
    if gone.is_symlink():
        gone.unlink()
    else:
        shutil.rmtree(gone)
    with suppress(OSError):  # the model's last one
        folder.parent.rmdir()


def load_results(root: Path, track: Track = untracked) -> list[ModelResult]:
    """Every result under a folder, by path; hidden files and folders are passed over, and each folder is read once.

    Args:
        root: the folder.
        track: shows progress.

    Raises:
        UsageError: as :func:`load_result`; no result is skipped.
    """
    folders = []
    for path, names in walk_files(root) if root.is_dir() else ():
        if _holds_result(path, names):
            folders.append(path)
    return [load_result(folder) for folder in track(sorted(folders), f"{root}: reading", "results")]


def _holds_result(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder with files of these names is a result."""
    return RESULT in names or any(map(_is_old, names)) or any((folder / PARTIAL).glob("*.json"))


def load_result(folder: Path) -> ModelResult:
    """The result of one model and generation, of either schema, with what is not folded yet.

    Raises:
        NewerResult: a later schema version.
        DamagedResult: not what was written.
        UsageError: no result there, or one of another folder.
    """

    def refuse(_: Path, error: DamagedResult) -> None:
        raise error

    found = _load(folder, refuse)
    if found is None:
        raise UsageError(f"{folder}: holds no result; make one with: rgbench eval")
    return found


def stored_keys(folder: Path) -> set[Key]:
    """(metric, protocol id) of every intact value of a folder; damaged ones are logged and count as missing.

    Raises:
        NewerResult: a later schema version, which must not be overwritten.
        UsageError: the result of another folder.
    """

    def report(_: Path, error: DamagedResult) -> None:
        log.warning("%s; measured again", error)

    found = _load(folder, report)
    intact = set()
    for key in found.by_key if found else ():
        try:
            assert found is not None
            found.rows(*key)
            intact.add(key)
        except DamagedResult as error:
            report(folder, error)
    return intact


OnDamage = Callable[[Path, DamagedResult], None]


def _load(folder: Path, on_damage: OnDamage) -> ModelResult | None:
    waiting = _waiting(folder, on_damage)  # first: folding writes result.json before it removes what it folded
    whole = _read_document(folder / RESULT, on_damage)
    if whole is not None and (copies := [path.name for path in folder.glob("result*.json") if path.name != RESULT]):
        raise UsageError(f"{folder}: holds {copies[0]} beside {RESULT}; remove one of the two")
    parts = [part for part in (whole, *waiting.values()) if part is not None]
    old = _load_old(folder, on_damage)
    if not parts:
        return old
    found = _as_result(_union(parts), folder)
    return found if old is None else _with_old(found, old)


def _waiting(folder: Path, on_damage: OnDamage) -> dict[Path, _Document]:
    """Parts that are not folded yet, oldest first; one that another process folds meanwhile is in ``result.json``."""
    paths = sorted((folder / PARTIAL).glob("*.json"))
    return {path: part for path in paths if (part := _read_document(path, on_damage)) is not None}


def _read_document(path: Path, on_damage: OnDamage) -> _Document | None:
    """A verified document; None where there is none, or a damaged one that may be passed over."""
    if not path.exists():
        return None
    try:
        return _parse_document(path)
    except DamagedResult as error:
        if path.exists():  # else folded since
            on_damage(path, error)
        return None


def _parse_document(path: Path) -> _Document:
    remedy = "remove it and run rgbench eval again"
    try:
        content = read_json(path)
    except UsageError as error:
        raise DamagedResult(f"{error}; {remedy}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    _refuse_newer(version, path)
    if version != SCHEMA_VERSION:
        raise DamagedResult(f"{path}: not a result (schema version {version!r}); {remedy}")
    if SEAL not in content:
        raise DamagedResult(f"{path}: lacks its sha256; {remedy}")
    content = unseal(content, path, remedy, DamagedResult)
    return read_as(_Document, content, f"{path}: not a result", remedy, DamagedResult)


def _refuse_newer(version: Any, path: Path) -> None:
    if isinstance(version, int) and version > SCHEMA_VERSION:
        known = f"this rgbench reads up to {SCHEMA_VERSION}"
        raise NewerResult(f"{path}: schema version {version}, {known}; update rgbench")


def _union(parts: Sequence[_Document]) -> _Document:
    """One document of several; of two values of one key the later one counts."""
    found: dict[Key, tuple[_Entry, Protocol, str]] = {}
    known_runs: dict[str, Run] = {}
    metrics: dict[str, MetricInfo] = {}
    cost: dict[str, int | float | None] = {}
    sheet, training_sha256 = None, None
    for part in parts:
        metrics |= part.metrics
        cost |= {key: value for key, value in part.cost.items() if value is not None or key not in cost}
        sheet, training_sha256 = part.sheet or sheet, part.training_sha256 or training_sha256
        runs_of_part = [canonical_sha256(run.model_dump()) for run in part.runs]
        known_runs |= dict(zip(runs_of_part, part.runs, strict=True))
        for entry in part.figures:
            protocol = part.protocols[entry.protocol]
            extra = {**part.vectors.get(protocol.id, {}), **entry.extra}
            entry = entry.model_copy(update={"extra": extra})
            found[entry.metric, protocol.id] = entry, protocol, runs_of_part[entry.run]
    protocols = {protocol.id: protocol for _, protocol, _ in found.values()}
    runs = {run: known_runs[run] for _, _, run in found.values()}
    vectors = _shared([(entry, protocol.id) for entry, protocol, _ in found.values()])
    places = {name: i for names in (protocols, runs) for i, name in enumerate(names)}
    figures = []
    for _, (entry, protocol, run) in sorted(found.items(), key=lambda item: item[0]):
        own = {key: value for key, value in entry.extra.items() if key not in vectors.get(protocol.id, {})}
        update = {"protocol": places[protocol.id], "run": places[run], "extra": own}
        figures.append(entry.model_copy(update=update))
    about = {name: getattr(parts[-1], name) for name in Head.model_fields}
    return _Document(
        **{**about, "metrics": metrics, "cost": cost},
        protocols=tuple(protocols.values()),
        runs=tuple(runs.values()),
        figures=tuple(figures),
        vectors=vectors,
        sheet=sheet,
        training_sha256=training_sha256,
    )


def _shared(entries: Sequence[tuple[_Entry, str]]) -> dict[str, dict[str, Any]]:
    """Parts of ``extra`` that all values of a protocol have alike, where it has several."""
    by_protocol: dict[str, list[dict[str, Any]]] = {}
    for entry, protocol in entries:
        by_protocol.setdefault(protocol, []).append(entry.extra)
    shared = {}
    for protocol, (first, *others) in by_protocol.items():
        same = {key: v for key, v in first.items() if all(key in other and other[key] == v for other in others)}
        if others and same:
            shared[protocol] = same
    return shared


def _as_result(document: _Document, folder: Path) -> ModelResult:
    place = folder.absolute()
    if (document.world, document.model, document.generation.id) != place.parts[-3:]:
        named = "/".join((document.world, document.model, document.generation.id))
        raise UsageError(f"{folder / RESULT}: is the result of {named}; move it there, or remove this copy")
    values, run_of = [], {}
    for entry in document.figures:
        protocol = document.protocols[entry.protocol]
        extra = {**document.vectors.get(protocol.id, {}), **entry.extra}
        shared = {name: getattr(entry, name) for name in _SHARED}
        value = MetricValue(**shared, protocol=protocol, extra=extra, rows_sha256=entry.rows_sha256)
        values.append(value)
        run_of[value.key] = entry.run
    head = Head(**{name: getattr(document, name) for name in Head.model_fields})
    training = document.training_sha256
    return ModelResult(head, tuple(values), document.runs, folder, document.sheet, run_of, _training_sha256=training)


def _verified(folder: Path, name: str, sha256: str) -> bytes:
    """Contents of a file of a result, folded or not.

    Raises:
        DamagedResult: none of that sha256.
    """
    for path in [*sorted((folder / PARTIAL).glob(f"*.{name}")), folder / name]:
        try:
            data = path.read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            continue
        if hashlib.sha256(data).hexdigest() == sha256:
            return data
    raise DamagedResult(f"{folder / name}: damaged or missing; run rgbench eval again")


# Writing


def write_values(root: Path, head: Head, run: Run, values: Sequence[MetricValue], keys: Sequence[ImageKey]) -> Path:
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
        NewerResult: a result of a later rgbench is there.
    """
    protocols = {value.protocol.id: value.protocol for value in values}
    columns: dict[str, np.ndarray] = {}
    entries = []
    for value in values:
        if value.value is not None and not math.isfinite(value.value):
            raise ValueError(f"{value.metric} is {value.value}; not stored")
        digest = None
        if value.rows is not None:
            rows = np.asarray(value.rows, dtype=np.float64)
            if rows.shape != (len(keys),) or not np.isfinite(rows).all():
                raise ValueError(f"{value.metric}: rows of shape {rows.shape} for {len(keys)} images, or not finite")
            columns[_column_name(*value.key)] = rows
            digest = _digest(ImageRows(tuple(keys), rows))
        shared = {name: getattr(value, name) for name in _SHARED}
        number = list(protocols).index(value.protocol.id)
        entries.append(_Entry(**shared, protocol=number, run=0, extra=dict(value.extra), rows_sha256=digest))
    document = _Document(**head.model_dump(), protocols=tuple(protocols.values()), runs=(run,), figures=tuple(entries))
    folder = generation_folder(root, head.world, head.model, head.generation)
    _write_part(folder, document, {SAMPLES: _Table(tuple(keys), columns).to_parquet()} if columns else {})
    return folder


def write_sheet(folder: Path, head: Head, run: Run, images: Sequence[tuple[SheetImage, np.ndarray]]) -> None:
    """Store the contact sheet of the first images, as many as one WebP file holds.

    Args:
        folder: of the result.
        head: of the model and generation.
        run: the command that made them.
        images: (side, side, 3) uint8 each, of one size.
    """
    side = images[0][1].shape[0]
    most = min(MAX_WEBP_SIDE // side, math.isqrt(MAX_SHEET_PIXELS // side**2)) ** 2
    if len(images) > most:
        log.warning("%s: holds the first %s of %s images; --save-images keeps all", folder / SHEET, most, len(images))
        images = images[:most]
    columns = math.ceil(math.sqrt(len(images)))
    whole = Image.new("RGB", (columns * side, math.ceil(len(images) / columns) * side))
    for i, (_, pixels) in enumerate(images):
        whole.paste(Image.fromarray(pixels), (i % columns * side, i // columns * side))
    out = io.BytesIO()
    whole.save(out, "WEBP", lossless=True, quality=100, method=4)
    digest = hashlib.sha256(out.getvalue()).hexdigest()
    sheet = Sheet(side=side, columns=columns, images=tuple(about for about, _ in images), sha256=digest)
    _write_part(folder, _Document(**head.model_dump(), runs=(run,), sheet=sheet), {SHEET: out.getvalue()})


def write_training_log(folder: Path, head: Head, run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Store a training log, thinned to at most 200 rows, each the mean of the steps up to its own.

    Writes nothing where the same log is stored already: complete results may lie in a read-only place.
    """
    thinned = thin(rows, MAX_LOG_ROWS)
    names = list(dict.fromkeys(key for row in thinned for key in row))
    data = _parquet({name: [row.get(name) for row in thinned] for name in names})
    digest = hashlib.sha256(data).hexdigest()
    stored = _read_document(folder / RESULT, lambda *_: None)
    if stored is not None and stored.training_sha256 == digest:
        try:
            _verified(folder, TRAINING, digest)
            return
        except DamagedResult as error:
            log.warning("%s; written again", error)
    document = _Document(**head.model_dump(), runs=(run,), training_sha256=digest)
    _write_part(folder, document, {TRAINING: data})


def fold(folder: Path) -> None:
    """Fold the parts in ``.partial/`` into the four files; wait for nobody.

    A process that finds the lock taken leaves: its holder looks again after it has let go, and a part that stays behind
    all the same (a killed holder) is read where it lies and folded by the next writer.

    Raises:
        NewerResult: a result of a later rgbench is there.
    """
    while any((folder / PARTIAL).glob("*.json")):
        with _locked(folder) as mine:
            if not mine:
                return
            _fold_once(folder)


def _fold_once(folder: Path) -> None:
    def set_aside(path: Path, error: DamagedResult) -> None:
        kept = path.with_name(f"{path.name}.damaged")
        log.warning("%s; kept as %s", error, kept.name)
        path.replace(kept)

    waiting = _waiting(folder, set_aside)
    whole = _read_document(folder / RESULT, set_aside)
    if not waiting:
        return
    document = _union([part for part in (whole, *waiting.values()) if part is not None])
    columns = {
        _column_name(entry.metric, document.protocols[entry.protocol].id): entry.rows_sha256
        for entry in document.figures
        if entry.rows_sha256
    }
    added = {name for name in (SAMPLES, TRAINING, SHEET) if any(_blob(path, name).exists() for path in waiting)}
    if SAMPLES in added:
        write_bytes_atomic(folder / SAMPLES, _merged(_readable_tables(folder, waiting), columns).to_parquet())
    for name, digest in ((TRAINING, document.training_sha256), (SHEET, document.sheet and document.sheet.sha256)):
        if name in added and digest:
            write_bytes_atomic(folder / name, _verified(folder, name, digest))
    _write_document(folder / RESULT, document)
    for path in waiting:  # oldest first: after a crash here, the newest is still there to win
        path.unlink(missing_ok=True)
        for name in added:
            _blob(path, name).unlink(missing_ok=True)
    # Leftovers of writers that were killed.
    for path in (*folder.glob(".*.tmp"), *(folder / PARTIAL).glob("*.*")):
        with suppress(FileNotFoundError):  # renamed meanwhile, so of a writer that lives
            if path.suffix != ".json" and path.stat().st_mtime < time.time() - STALE_SEC:
                path.unlink()


def _readable_tables(folder: Path, waiting: Iterable[Path]) -> list[_Table]:
    tables = []
    for path in (folder / SAMPLES, *(_blob(path, SAMPLES) for path in waiting)):
        try:
            tables.append(_read_table(path))
        except DamagedResult as error:
            log.warning("%s; its values are measured again", error)
    return [table for table in tables if table is not None]


def _merged(tables: Sequence[_Table], wanted: Mapping[str, str]) -> _Table:
    """One table of several: a row for each image, and of each wanted column the one with the right digest."""
    chosen: dict[str, ImageRows] = {}
    for table in tables:
        for name, digest in wanted.items():
            found = table.rows(name)
            if found is not None and _digest(found) == digest:
                chosen[name] = found
    keys = tuple(dict.fromkeys(key for rows in chosen.values() for key in rows.keys))
    place = {key: i for i, key in enumerate(keys)}
    columns = {}
    for name in sorted(chosen):
        columns[name] = np.full(len(keys), np.nan)
        columns[name][[place[key] for key in chosen[name].keys]] = chosen[name].values
    return _Table(keys, columns)


def _write_part(folder: Path, document: _Document, blobs: Mapping[str, bytes]) -> None:
    """Write files and then the part that names them: from then on it is stored."""
    text = _document_text(document)  # first, since it refuses NaN
    path = folder / PARTIAL / f"{time.time_ns():020d}-{secrets.token_hex(6)}.json"
    for name, data in blobs.items():
        write_bytes_atomic(_blob(path, name), data)
    write_text_atomic(path, text)
    fold(folder)


def _blob(part: Path, name: str) -> Path:
    return part.with_name(f"{part.stem}.{name}")


def _write_document(path: Path, document: _Document) -> None:
    write_text_atomic(path, _document_text(document))


def _document_text(document: _Document) -> str:
    """JSON with the schema version first and the sha256 of everything before it last."""
    plain = document.model_dump()
    entries = seal({"schema_version": plain.pop("schema_version"), **plain}).items()
    lines = [f"{json.dumps(key)}: {_lines(value)}" for key, value in entries]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _lines(value: Any) -> str:
    """JSON of an entry, each of its parts on a line."""
    if isinstance(value, list) and value:
        return "[\n  " + ",\n  ".join(json.dumps(part, ensure_ascii=False) for part in value) + "\n]"
    if isinstance(value, dict) and value:
        parts = (f"{json.dumps(key)}: {json.dumps(part, ensure_ascii=False)}" for key, part in value.items())
        return "{\n  " + ",\n  ".join(parts) + "\n}"
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """The folder's lock, if nobody has it; whether it was had."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


# Tables


@dataclass(frozen=True)
class _Table:
    """Columns of ``samples.parquet``: NaN where an image has no number."""

    keys: tuple[ImageKey, ...]
    columns: Mapping[str, np.ndarray]

    def rows(self, name: str) -> ImageRows | None:
        """The numbers of a column; None where there is no such column."""
        column = self.columns.get(name)
        if column is None:
            return None
        there = ~np.isnan(column)
        keys = self.keys if there.all() else tuple(self.keys[i] for i in np.flatnonzero(there))
        return ImageRows(keys, column[there])

    def to_parquet(self) -> bytes:
        names = dict(zip(KEYS, zip(*self.keys, strict=True), strict=True)) if self.keys else {}
        return _parquet(names | {key: pa.array(c, mask=np.isnan(c)) for key, c in self.columns.items()})


def _column_name(metric: str, protocol_id: str) -> str:
    return f"{metric}@{protocol_id}"


def _parquet(columns: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(dict(columns)), out, compression="zstd")
    return out.getvalue()


def _read_table(path: Path) -> _Table | None:
    """A parquet file of per-image numbers; None where there is none.

    Reads without pyarrow's threads, which now and then abort a process at its end.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(path.read_bytes()))
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"{file.metadata.num_rows} rows")
        table = file.read(use_threads=False)
        keys = tuple(zip(*(table[name].to_pylist() for name in KEYS), strict=True))
        names = [name for name in table.column_names if name not in KEYS]
        return _Table(keys, {name: np.array(table[name].to_numpy(), dtype=np.float64) for name in names})
    except FileNotFoundError:
        return None
    except (OSError, pa.ArrowException, ValueError, TypeError, KeyError) as error:
        raise DamagedResult(f"{path}: cannot be read ({error}); run rgbench eval again") from error


def _digest(rows: ImageRows) -> str:
    """sha256 over images and values, whatever their order."""
    order, names = _ordered(rows.keys)
    return hashlib.sha256(names + np.ascontiguousarray(rows.values[order], dtype="<f8").tobytes()).hexdigest()


@lru_cache(maxsize=64)
def _ordered(keys: tuple[ImageKey, ...]) -> tuple[np.ndarray, bytes]:
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return np.array(order, dtype=np.int64), json.dumps([keys[i] for i in order], separators=(",", ":")).encode()


def thin(rows: Sequence[Mapping[str, Any]], num: int) -> list[dict[str, float]]:
    """At most ``num`` rows: means of consecutive rows' numbers, at the last step of each block.

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
    return {"step": block[-1]["step"], **{key: _mean_of(found) for key, found in values.items()}}


def _mean_of(values: Sequence[float]) -> float:
    try:
        return math.fsum(values) / len(values)
    except OverflowError:  # the sum's, of a run that diverged
        return math.fsum(value / len(values) for value in values)


# Schema 1: a JSON file for each value


OLD_NAMES = {
    "hps_aa1": "hps",
    "hps_aa0": "hps_no_antialias",
    "hps_jpeg75_aa1": "hps_jpeg75",
    "hps_jpeg75_aa0": "hps_jpeg75_no_antialias",
}
OLD_GAP = re.compile(r"_gap(?=_db$|$)")  # in names of differences to real images


def _is_old(name: str) -> bool:
    return "@" in name and name.endswith(".json") and not name.startswith(".")


def _load_old(folder: Path, on_damage: OnDamage) -> ModelResult | None:
    values, rows, run_of = {}, {}, {}
    runs: dict[str, Run] = {}
    head = None
    for path in sorted(path for path in folder.glob("*@*.json") if _is_old(path.name)):
        try:
            head, value, run, samples = _read_old(path)
        except DamagedResult as error:
            on_damage(path, error)
            continue
        values[value.key] = value
        run_key = canonical_sha256(run.model_dump())
        runs.setdefault(run_key, run)
        run_of[value.key] = list(runs).index(run_key)
        rows[value.key] = samples
    if head is None:
        return None
    return ModelResult(head, tuple(values.values()), tuple(runs.values()), folder, None, run_of, rows)


def _read_old(path: Path) -> tuple[Head, MetricValue, Run, Path | None]:
    """One file of schema 1: head, value, command, and the file of its rows."""
    remedy = "remove it and run rgbench eval again"
    try:
        content = read_json(path)
        _refuse_newer(content["schema_version"], path)
        if content["schema_version"] != 1:
            raise ValueError(f"schema version {content['schema_version']!r}")
        name = f"{content['metric']['name']}@{content['protocol']['id']}.json"
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
        value, samples = _old_value(content), content.get("samples")
        rows_file = path.with_name(Path(samples).name) if samples else None
    except NewerResult:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:  # ValueError: pydantic's too
        raise DamagedResult(f"{path}: not a result of schema 1 ({_first_line(error)}); {remedy}") from error
    if name != path.name:
        raise UsageError(f"{path}: is a copy of {name}; remove one of the two")
    return head, value, run, rows_file


def _first_line(error: Exception) -> str:
    return str(error).split("\n", 1)[0]


def _old_value(content: Mapping[str, Any]) -> MetricValue:
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
    """Per-image numbers of schema 1, which has no digests: their mean must be the value."""
    table = _read_table(path)
    found = table.rows("value") if table else None
    if found is None or len(found.values) != value.num_images:
        raise DamagedResult(f"{path}: per-image values are missing; run rgbench eval again")
    if value.value is not None and not math.isclose(found.values.mean(), value.value, rel_tol=1e-9, abs_tol=1e-9):
        raise DamagedResult(f"{path}: the mean of its values is not the stored one; run rgbench eval again")
    return found


def _old_log(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    content = read_json(path)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise DamagedResult(f"{path}: not a training log; evaluate the run again")
    return rows


def _old_images(folder: Path) -> dict[SheetImage, Image.Image]:
    path = folder / "index.json"
    if not path.is_file():
        return {}
    found = {}
    listed = read_json(path)
    for entry in listed if isinstance(listed, list) else [listed]:
        name = entry.get("file") if isinstance(entry, dict) else None
        if not isinstance(name, str) or Path(name).name != name:
            raise UsageError(f"{path}: each entry needs a plain file name, not {name!r}; evaluate again")
        try:
            about = SheetImage(**{key: entry.get(key) for key in SheetImage.model_fields})
        except ValidationError as error:
            raise UsageError(f"{path}: {name}: its prompt or seed is missing; evaluate again") from error
        found[about] = open_image(folder / name)
    return found


def _with_old(new: ModelResult, old: ModelResult) -> ModelResult:
    """A result with the values of schema 1 that were not measured again."""
    kept = [value for value in old.values if value.key not in new.by_key]
    run_of = {**{value.key: len(new.runs) + old.run_of[value.key] for value in kept}, **new.run_of}
    rows = {value.key: old._old_rows[value.key] for value in kept}
    return replace(new, values=(*new.values, *kept), runs=(*new.runs, *old.runs), run_of=run_of, _old_rows=rows)
