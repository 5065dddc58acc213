"""Checkpoints that are whole or absent: commit, verify, find the newest intact one, prune.

A checkpoint is a folder ``step-00000250`` with one safetensors file per part, ``meta.json``, and ``manifest.json`` with
the sha256 of each; it is written under a temporary name, synced, and renamed. Older ones are removed only after that,
and every byte is checked before a checkpoint is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rgbench.core.errors import RgbenchError
from rgbench.core.io import load_safetensors, parse_json, safetensors_chunks, sha256_file, sync_folder, write_synced

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

SCHEMA_VERSION = 1
MANIFEST, META = "manifest.json", "meta.json"
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"
log = logging.getLogger("rgbench")


class CorruptCheckpoint(RgbenchError):
    """A checkpoint with a file that is missing, changed or truncated; names the file."""


def commit(
    folder: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], meta: Mapping[str, Any], *, keep: int = 2
) -> Path:
    """Save a checkpoint whole, then remove older ones.

    Args:
        folder: holds the run's checkpoints and nothing else.
        step: optimiser steps done, ≥ 0.
        tensors: file stem → tensors by name.
        meta: anything JSON can hold, finite.
        keep: how many of the newest checkpoints stay, ≥ 1.

    Returns:
        The checkpoint. An intact one of the same step stays as it is.

    Raises:
        OSError: the disk refused; every older checkpoint is untouched.
        ValueError: NaN in ``meta``.
    """
    final = path_of(folder, step)
    if not (final.is_dir() and _is_intact(final)):
        _save(final, step, tensors, meta)
    _prune(folder, step, keep)
    return final


def latest(folder: Path) -> Path | None:
    """Find the newest intact checkpoint; log a warning for each damaged one, with the file.

    Returns:
        Its path; None where none was ever committed.

    Raises:
        CorruptCheckpoint: there are checkpoints, and none is intact.
        RgbenchError: another version of rgbench wrote the newest.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        try:
            verify(path)
        except CorruptCheckpoint as error:
            damaged.append(str(error))
            continue
        for message in damaged:
            log.warning("%s; using %s instead", message, path)
        return path
    if damaged:
        raise CorruptCheckpoint(
            f"{folder}: no checkpoint is intact:\n  "
            + "\n  ".join(damaged)
            + "\nremove this folder to start again at 0"
        )
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint, after verifying it.

    Returns:
        ``tensors`` and ``meta`` as they were given to :func:`commit`, tensors on the CPU.

    Raises:
        CorruptCheckpoint: see :func:`verify`.
    """
    stems = [name.removesuffix(".safetensors") for name in verify(path) if name != META]
    tensors = {stem: load_safetensors(path / f"{stem}.safetensors") for stem in stems}
    return tensors, read_meta(path)


def read_meta(path: Path) -> dict[str, Any]:
    """``meta`` of a checkpoint that :func:`verify` found whole."""
    return parse_json((path / META).read_bytes())


def remove_leftovers(folder: Path) -> None:
    """Remove the folders of saves and prunes that were killed; only the process that holds the run's lock may."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def verify(path: Path) -> list[str]:
    """Check every byte of a checkpoint against its manifest.

    Returns:
        The names of its files without the manifest.

    Raises:
        CorruptCheckpoint: a file or the manifest is missing, changed or truncated; names it.
        RgbenchError: another version of rgbench wrote it.
    """
    files = _read_manifest(path)
    for name, (num_bytes, sha256) in files.items():
        try:
            same = (path / name).stat().st_size == num_bytes and sha256_file(path / name) == sha256
        except OSError as error:
            raise CorruptCheckpoint(f"{path / name}: {error.strerror or error}") from error
        if not same:
            raise CorruptCheckpoint(f"{path / name}: damaged: sha256 or size differ from the manifest's")
    return list(files)


def checkpoints(folder: Path) -> list[Path]:
    """List committed checkpoints, newest first, unverified."""
    found = [p for p in folder.glob("step-*") if p.is_dir() and _STEP.fullmatch(p.name)]
    return sorted(found, key=step_of, reverse=True)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Optimiser steps done in a checkpoint, from its name."""
    match = _STEP.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: not a checkpoint's name")
    return int(match[1])


def flatten_optimiser(optimiser: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and plain data.

    Returns:
        Tensors named ``{parameter index}.{name}``, and the rest (other state, parameter groups) as plain data.
    """
    import torch

    state = optimiser.state_dict()
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                rest[f"{index}.{name}"] = value
    groups = [dict(group) for group in state["param_groups"]]
    return tensors, {"state": rest, "param_groups": groups}


def restore_optimiser(optimiser: Optimizer, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Undo :func:`flatten_optimiser` on an optimiser over the same parameters.

    Raises:
        RgbenchError: its groups hold other numbers of parameters, or a shape differs; nothing has changed then.
    """
    from rgbench.core.shard import part_of  # with torch

    own = optimiser.state_dict()["param_groups"]
    if [len(g["params"]) for g in own] != [len(g["params"]) for g in meta["param_groups"]]:
        raise RgbenchError("the checkpoint's optimiser holds other parameter groups; it belongs to another recipe")
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *meta["state"].items()):
        index, _, name = key.partition(".")
        if getattr(value, "ndim", 0):
            parameter = parameters[int(index)]
            if value.shape != parameter.shape:
                found, wanted = tuple(value.shape), tuple(parameter.shape)
                raise RgbenchError(f"the checkpoint's optimiser state {key} has shape {found}, the parameter {wanted}")
            value = part_of(value, parameter)
        state.setdefault(int(index), {})[name] = value
    groups = [_as_before(saved, now) for saved, now in zip(meta["param_groups"], own, strict=True)]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _as_before(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Restore the tuples that JSON turned into lists, by the optimiser's own group."""
    return {key: tuple(v) if isinstance(now.get(key), tuple) else v for key, v in saved.items()}


def _save(final: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], meta: Mapping[str, Any]) -> None:
    folder = final.parent
    folder.mkdir(exist_ok=True)  # without parents: a run that was moved away is not begun again here
    remove_leftovers(folder)
    temporary = folder / f"{_TEMPORARY}{final.name}-{secrets.token_hex(4)}"
    os.mkdir(temporary)
    try:
        _write(temporary, step, tensors, meta)
        if final.exists():  # damaged, or it would have been kept
            os.rename(final, folder / f"{_TEMPORARY}damaged-{secrets.token_hex(4)}")
        os.rename(temporary, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(folder: Path, step: int, tensors: Mapping[str, dict[str, Tensor]], meta: Mapping[str, Any]) -> None:
    files: dict[str, dict[str, Any]] = {}
    for stem, part in tensors.items():
        name = f"{stem}.safetensors"
        files[name] = {"sha256": write_synced(folder / name, safetensors_chunks(part))}
    files[META] = {"sha256": write_synced(folder / META, [_json(meta)])}
    for name, entry in files.items():
        entry["bytes"] = (folder / name).stat().st_size
    body = {"schema_version": SCHEMA_VERSION, "step": step, "files": dict(sorted(files.items()))}
    write_synced(folder / MANIFEST, [_manifest(body)])
    sync_folder(folder)


def _json(obj: Any) -> bytes:
    return (json.dumps(obj, indent=1, allow_nan=False) + "\n").encode()


def _manifest(body: Mapping[str, Any]) -> bytes:
    """Write a manifest in its only spelling, so that a change of any of its bytes shows."""
    return _json({**body, "sha256": hashlib.sha256(_json(body)).hexdigest()})


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file."""
    manifest = path / MANIFEST
    try:
        raw = manifest.read_bytes()
        body = {key: value for key, value in parse_json(raw).items() if key != "sha256"}
        intact = raw == _manifest(body) and body["step"] == step_of(path)
        version = body["schema_version"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in body["files"].items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpoint(f"{manifest}: missing or damaged ({error})") from error
    if not intact or META not in files or any(Path(name).name != name for name in files):
        raise CorruptCheckpoint(f"{manifest}: damaged: its contents are not those that were committed")
    if version != SCHEMA_VERSION:
        raise RgbenchError(
            f"{manifest}: schema version {version}; this rgbench reads {SCHEMA_VERSION}; use the one that wrote it"
        )
    return files


def _is_intact(path: Path) -> bool:
    with contextlib.suppress(CorruptCheckpoint):
        verify(path)
        return True
    return False


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest ``keep`` up to ``step``; later ones are damaged, or they would have been resumed."""
    older = [path for path in checkpoints(folder) if step_of(path) <= step]
    for path in older[keep:]:
        doomed = folder / f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}"
        os.rename(path, doomed)  # at once: a half-removed folder must not look like a checkpoint
        shutil.rmtree(doomed)
    remove_leftovers(folder)
