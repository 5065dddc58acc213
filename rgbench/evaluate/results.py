"""Result files: one scalar each, versioned, written atomically, readable for ever.

    results/{world}/{model}/{generation id}/{metric}@{protocol id}.json
                                            {metric}@{protocol id}.parquet   (per image, where there is one)

A generation id names how the images were made (a row of the report), a protocol id how
they were measured (a column). Each is a readable name with the hash of its fields, so a
figure is known to be done by its path alone.

What a run logged while it trained, kept beside its results as ``training.json``.

The report is made from the results folder alone, and runs are large and may be gone by
then. The log is thinned to at most 200 rows, each the mean of the steps up to its own:

    {"schema_version": 1, "rows": [{"step": 5, "loss/lcd": 0.03, "fidelity/kendall_tau": 0.6}, …]}

A row lacks what was not logged in its steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, PrivateAttr, ValidationError

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, write_bytes_atomic, write_json_atomic
from rgbench.core.progress import Track, untracked
from rgbench.core.run import RunDirectory
from rgbench.metrics.base import Interval, Metric
from rgbench.rewards.base import fingerprint_id

SCHEMA_VERSION = 1


class NewerResult(UsageError):
    """A result that a later rgbench wrote: whole, and not to be measured again over it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _plain(name: str) -> str:
    """Names of folders and files, which must not lead out of the results."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name[:80]!r} cannot name a folder")
    return name


FolderName = Annotated[str, AfterValidator(_plain)]


class Generation(_Frozen):
    """How the images were made: model weights, sampler, steps, guidance, resolution, dtype.

    Attributes:
        id: a name and 8 hex digits over ``fields``; a row of the report, and a folder of the results.
        fields: plain data.
    """

    id: FolderName
    fields: dict[str, Any]


class Protocol(_Frozen):
    """How they were measured: prompts, reference, preprocessing, networks, seed rule.

    Attributes:
        id: a name and 8 hex digits over ``fields``; two figures may be compared where it is the same.
        fields: plain data.
    """

    id: FolderName
    fields: dict[str, Any]


class Result(_Frozen):
    """One scalar with all that is needed to judge it.

    Attributes:
        world: the models' world, such as "benchtop".
        model: the evaluated model's name.
        method: "teacher", a trainer's kind, or "external".
        training_seed: None where nothing was trained here.
        training: ``step`` of the weights and ``steps`` of the whole run; below ``steps`` it is a checkpoint's figure.
        generation: how the images were made.
        metric: how the figure is named and shown.
        protocol: how it was measured.
        value: in the metric's unit; None where the figure is undefined, and ``flags`` then say why.
        interval: over images; None where there is none.
        flags: what a reader must know, such as "n<=d".
        num_samples: images that it was made from.
        in_sample: the model was trained on this very reward.
        trained_rewards: fingerprint ids of the rewards it was trained on.
        extra: vectors and further figures.
        cost: seconds of training, reward calls, images per second, network evaluations per image.
        samples: name of the per-image file beside this one.
        provenance: git revision, versions, device, threads and time of the process that measured.
        command: what made it.
    """

    schema_version: Literal[1] = 1
    world: FolderName
    model: FolderName
    method: str
    training_seed: int | None
    training: dict[str, int] = {}
    generation: Generation
    metric: Metric
    protocol: Protocol
    value: float | None
    interval: Interval | None
    num_samples: int
    flags: tuple[str, ...] = ()
    in_sample: bool = False
    trained_rewards: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    cost: dict[str, int | float | None] = {}
    samples: str | None = None
    provenance: dict[str, Any] = {}
    command: str = ""

    _path: Path | None = PrivateAttr(None)

    @property
    def path(self) -> Path | None:
        """The file it was read from or written to."""
        return self._path


def identify(name: str, fields: dict[str, Any]) -> str:
    """A readable name with 8 hex digits over the canonical JSON of the fields."""
    return f"{name}-{fingerprint_id(fields)}"


def generation_folder(root: Path, world: str, model: str, generation: Generation) -> Path:
    """Where the results of one model under one sampler setting lie."""
    return root / world / model / generation.id


def result_file(folder: Path, metric: Metric, protocol: Protocol) -> Path:
    """The file of one scalar in a generation's folder."""
    return folder / f"{metric.name}@{protocol.id}.json"


def write_result(root: Path, result: Result, rows: dict[str, list[Any]] | None = None) -> Path:
    """Write a result, and before it its per-image rows, so that a result never names a missing file.

    Args:
        root: the results folder.
        result: without ``samples``, which is filled in here.
        rows: columns ``prompt_id``, ``seed``, ``group``, ``value``.

    Returns:
        The JSON file.

    Raises:
        ValueError: NaN or infinity anywhere in it.
    """
    folder = generation_folder(root, result.world, result.model, result.generation)
    path = result_file(folder, result.metric, result.protocol)
    folder.mkdir(parents=True, exist_ok=True)
    samples = None
    if rows is not None:
        if not np.isfinite(rows["value"]).all():
            raise ValueError(f"{path.stem}: per-image values that are not finite")
        out = io.BytesIO()
        pq.write_table(pa.table(rows), out)
        samples = path.with_suffix(".parquet")
        write_bytes_atomic(samples, out.getvalue())
    stored = result.model_copy(update={"samples": samples.name if samples else None})
    write_json_atomic(path, stored.model_dump())  # not mode="json": that writes NaN as null, silently
    return path


def load_result(path: Path) -> Result:
    """Read one result file.

    Raises:
        NewerResult: a later schema version.
        UsageError: not strict JSON, no schema version, or not a result.
    """
    content = read_json(path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        found = "no schema version" if version is None else f"schema version {version}"
        refusal = NewerResult if isinstance(version, int) and version > SCHEMA_VERSION else UsageError
        raise refusal(f"{path}: {found}; this rgbench reads {SCHEMA_VERSION}: install the rgbench that wrote it")
    try:
        result = Result.model_validate(content)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(map(str, fault["loc"]))
        raise UsageError(f"{path}: not a result: {key}: {fault['msg']}; make it again with rgbench eval") from error
    result._path = path
    return result


def load_results(root: Path, track: Track = untracked) -> list[Result]:
    """All results under a folder, by path.

    Args:
        root: the folder.
        track: shows the reading.

    Raises:
        UsageError: as :func:`load_result`; one bad file is never skipped.
    """
    return [load_result(path) for path in track(sorted(root.rglob("*@*.json")), f"{root}: reading", "files")]


def read_columns(path: Path) -> dict[str, list[Any]]:
    """The columns of a parquet file. Without pyarrow's reader threads, which now and then abort a process at its end.

    Raises:
        OSError: no such file.
        pyarrow.ArrowInvalid: it is no parquet file.
    """
    return pq.ParquetFile(pa.BufferReader(path.read_bytes())).read(use_threads=False).to_pydict()


def load_samples(result: Result) -> dict[tuple[str, int], float] | None:
    """Per-image values by (prompt id, seed); None where the result has none.

    Raises:
        UsageError: the file is missing or damaged.
    """
    return _by_image(result, "value")


def load_groups(result: Result) -> dict[tuple[str, int], str] | None:
    """The prompt group of each image by (prompt id, seed), "" where there is none; None without per-image rows.

    Raises:
        UsageError: the file is missing or damaged.
    """
    return _by_image(result, "group")


def _by_image(result: Result, column: str) -> dict[tuple[str, int], Any] | None:
    if result.samples is None or result.path is None:
        return None
    path = result.path.with_name(Path(result.samples).name)
    try:
        table = read_columns(path)
        keys = zip(table["prompt_id"], table["seed"], strict=True)
        return dict(zip(keys, table[column], strict=True))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UsageError(f"{path}: per-image rows of {result.path.name} cannot be read ({error})") from error


FILE = "training.json"

NUM_ROWS = 200

Row = dict[str, float]


def keep_log(run: Path, folder: Path) -> None:
    """Writes the thinned log of a run into the folder of its results; nothing where the run has no log.

    Raises:
        UsageError: ``run`` is no run.
    """
    logged = RunDirectory.open(run).read_log()
    if not logged:
        return
    content = {"schema_version": SCHEMA_VERSION, "rows": thin(logged, NUM_ROWS)}
    if not _holds(folder / FILE, content):  # results that are complete may lie where nothing can be written
        write_json_atomic(folder / FILE, content)


def _holds(path: Path, content: dict[str, Any]) -> bool:
    try:
        return path.is_file() and bool(read_json(path) == content)
    except UsageError:
        return False


def load_log(folder: Path) -> list[Row]:
    """Rows by step; none where nothing was kept.

    Raises:
        UsageError: not such a file, or one of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return []
    content = read_json(path)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise UsageError(f"{path}: schema version {version}, not {SCHEMA_VERSION}; evaluate the run again")
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UsageError(f"{path}: rows must be objects of numbers with a step; evaluate the run again")
    return rows


def thin(rows: Sequence[dict[str, Any]], num: int) -> list[Row]:
    """At most `num` rows: means of consecutive rows' numbers, at the last step of each block.

    >>> thin([{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0, "b": 4.0}, {"step": 3, "a": 5.0}], 2)
    [{'step': 2, 'a': 2.0, 'b': 4.0}, {'step': 3, 'a': 5.0}]
    """
    size = max(1, -(-len(rows) // num))
    return [_mean(rows[start : start + size]) for start in range(0, len(rows), size)]


def _mean(block: Sequence[dict[str, Any]]) -> Row:
    values: dict[str, list[float]] = {}
    for row in block:
        for key, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and key != "step":
                values.setdefault(key, []).append(value)
    return {"step": block[-1]["step"], **{key: math.fsum(found) / len(found) for key, found in values.items()}}


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and "step" in row
        and all(isinstance(value, int | float) and not isinstance(value, bool) for value in row.values())
    )
