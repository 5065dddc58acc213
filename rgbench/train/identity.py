"""Identity of a run: what a resume may change, and what the training seeds of one method share.

Contents of teacher, rewards, data and proxy are compared by their hashes, so that paths may differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rgbench.core.errors import ConfigError, UsageError
from rgbench.core.io import sha256_file, sha256_tree
from rgbench.core.run import RunDirectory
from rgbench.data.batches import DataSource
from rgbench.models.folder import config_hashes, weights_sha256
from rgbench.rewards.base import fingerprint_id
from rgbench.train.base import Trainer
from rgbench.train.recipe import (
    BaseRecipe,
    LRMPretrainRecipe,
    LRMRecipe,
    VSDRecipe,
    find_clip,
    find_proxy,
    load_recipe,
)

_REWARDS = ("reward", "reward.terms.*")
CONTENTS = ("teacher", "rewards", "data", "proxy", "fake")  # of what a run trains on, in run.json
NEWER = {
    "lcd.teacher_steps": 1,
    "proxy.truth": "decoded",
    "proxy.labels": "expert",
    "proxy.ratio": 1,
}  # keys that older runs lack, with what those runs did
# How a run computes, what it logs and saves, and where things lie.
FREE_KEYS = frozenset(
    {f"train.{key}" for key in ("gradient_accumulation_steps", "gradient_checkpointing", "compile", "num_workers")}
    | {f"train.{key}" for key in ("save_every", "keep_checkpoints", "sample_every", "log_every", "wandb", "trackio")}
    | {"monitor.*", "train.shard", "train.latents_cache", "train.latents_cache_root"}
    | {"model.path", "data.path", "proxy.path", "vsd.path"}
    | {f"{reward}.{key}" for reward in _REWARDS for key in ("path", "head_path", "version")}
    | {f"{reward}.{key}" for reward in _REWARDS for key in ("python", "device", "timeout")}
)


def free_keys(recipe: BaseRecipe) -> frozenset[str]:
    """Dotted keys that may differ between the start of a run and its resume; ``*`` is any item of a list."""
    free = FREE_KEYS
    sections = [section for name in ("proxy", "vsd") if (section := getattr(recipe, name, None)) is not None]
    if all(section.optimiser.schedule == "constant" for section in sections):
        free |= {"train.steps"}
    if isinstance(recipe, LRMPretrainRecipe):  # its negatives are the captions of a micro-batch
        free -= {"train.gradient_accumulation_steps"}
    return free


def check_recipe(run: RunDirectory, recipe: BaseRecipe) -> None:
    """Refuse to resume a run with another recipe.

    Keys that its ``config.yaml`` lacks, since it is older than they are, count as their defaults.

    Raises:
        UsageError: names the keys that differ; nothing is overwritten.
    """
    try:
        before = load_recipe(str(run.config_file))
    except ConfigError as error:
        raise UsageError(
            f"{error}. Another version of rgbench began this run: edit its config.yaml, or train with --out elsewhere"
        ) from error
    old, new = (_flat(each.model_dump(mode="json")) for each in (before, recipe))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    changed = [key for key in changed if not _matches(key, free_keys(recipe))]
    if changed:
        shown = ", ".join(f"{key}: {old.get(key, '-')} → {new.get(key, '-')}" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UsageError(
            f"{run.path}: holds a run of another config ({shown}{more}); choose another place with --out, or move the "
            "old run away"
        )
    step = run.read()["step"]
    if recipe.train.steps < step:
        raise UsageError(f"{run.path}: train.steps {recipe.train.steps}: {step} steps are done already")


def read_contents(recipe: BaseRecipe, trainer: Trainer, source: DataSource) -> dict[str, Any]:
    """What a run trains on, as ``run.json`` records it: teacher, rewards, data, and where proxy and fake start."""
    fingerprints = trainer.reward_fingerprints()
    contents: dict[str, Any] = {
        "teacher": teacher_contents(recipe),
        "rewards": [{"name": f["name"], "fingerprint": f, "fingerprint_id": fingerprint_id(f)} for f in fingerprints],
        "data": source.fingerprint(),
    }
    if isinstance(recipe, LRMRecipe) and (proxy := find_proxy(recipe)) is not None:
        contents["proxy"] = _part(proxy)
    if isinstance(recipe, VSDRecipe) and recipe.vsd.path is not None:
        contents["fake"] = {"path": recipe.vsd.path, "sha256": weights_sha256(Path(recipe.vsd.path))}
    if isinstance(recipe, LRMPretrainRecipe):
        contents["proxy"] = _part(find_clip(recipe))
    return contents


def teacher_contents(recipe: BaseRecipe) -> dict[str, Any]:
    """The teacher's name, folder and hashes."""
    folder = recipe.model.teacher_folder()
    hashes = {"sha256": weights_sha256(folder), "config_sha256": config_hashes(folder)}
    return {"preset": recipe.model.preset, "path": str(folder), **hashes, **recipe.model.published()}


def _part(path: Path) -> dict[str, str]:
    return {"path": str(path), "sha256": sha256_tree(path) if path.is_dir() else sha256_file(path)}


def check_contents(run: RunDirectory, contents: Mapping[str, Any]) -> None:
    """Refuse to resume a run on another teacher, reward, data set or proxy than it began with; paths may differ.

    Fields that its ``run.json`` lacks, since it is older than they are, are not compared, nor is a data set's sha256
    of names and sizes, as older versions made it.

    Raises:
        UsageError: names what changed.
    """
    for part, what in _changed_parts(run.read(), contents):
        raise UsageError(
            f"{run.path}: its {part} changed since the run began{what}; train with --out in another place, or move the "
            "old run away"
        )


def check_checkpoint(
    path: Path,
    meta: Mapping[str, Any],
    config: Mapping[str, Any],
    contents: Mapping[str, Any],
    free: frozenset[str] = FREE_KEYS | {"train.steps"},
) -> None:
    """Refuse a checkpoint of another run: of another seed, recipe, teacher, reward, data set or proxy.

    Args:
        path: the checkpoint.
        meta: its own; older ones do not say of which run they are.
        config: this run's recipe as it was resolved, plain data.
        contents: of :func:`read_contents`, or the run's ``run.json``.
        free: keys of the recipe that may differ.

    Raises:
        UsageError: names what differs.
    """
    recorded = meta.get("run")
    if recorded is None:
        return
    if not isinstance(recorded, dict) or not isinstance(recorded.get("recipe"), dict):
        raise UsageError(f"{path}: does not say of which run it is; remove it")
    old, new = _flat(recorded["recipe"]), _flat(config)
    both = sorted(old.keys() & new.keys())  # a key may be newer, or have moved since
    changed = [key for key in both if old[key] != new[key] and not _matches(key, free)]
    found = [f"{key}: {old[key]} → {new[key]}" for key in changed[:5]]
    found += [f"{part}{what}" for part, what in _changed_parts(recorded, contents)]
    if found:
        raise UsageError(f"{path}: a checkpoint of another run ({', '.join(found)}); remove it, or put back this run's")


def _changed_parts(recorded: Mapping[str, Any], contents: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The parts that differ, paths aside, with what of each; parts and fields that ``recorded`` lacks are skipped."""
    for part, now in contents.items():
        before = recorded.get(part) if part in CONTENTS else None
        if isinstance(now, dict) and isinstance(before, dict):
            skipped = {"path"} if before.get("hashed") == now.get("hashed") else {"path", "sha256"}
            changed = [key for key in sorted(before.keys() & now.keys() - skipped) if before[key] != now[key]]
        else:
            changed = [""] if before is not None and not _is_same(before, now) else []
        if changed:
            yield part, _named(changed, before, now)


def _is_same(before: Any, now: Any) -> bool:
    """Whether the rewards are those of before; a fingerprint may have fields now that older ones lack."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(map(_is_same, before, now))
    if isinstance(before, dict) and isinstance(now, dict):
        return all(key in now and _is_same(before[key], now[key]) for key in before.keys() - {"fingerprint_id"})
    return bool(before == now)


def _named(changed: list[str], before: Any, now: Any) -> str:
    """The changed fields, and of ``config_sha256`` the components."""
    if changed == ["config_sha256"]:
        before, now = before["config_sha256"], now["config_sha256"]
        changed = [f"configuration of the {key}" for key in sorted(now) if before.get(key) != now[key]]
    return f" ({', '.join(changed)})" if changed != [""] else ""


def recipe_sha256(recipe: BaseRecipe, contents: Mapping[str, Any]) -> str:
    """What training seeds of one method share: a hash of the recipe without seed, name, place, logging and saving.

    Null keys, and those of :data:`NEWER` at the value there, count as absent, so that older hashes stay as they are.

    Args:
        recipe: resolved.
        contents: of :func:`read_contents`, which stand in for paths.

    Returns:
        64 hex digits of the sha256 of canonical JSON.
    """
    free = (free_keys(recipe) - {"train.steps"}) | {"seed", "name", "model.preset", "proxy.clip", "gradients.*"}
    if isinstance(recipe, LRMRecipe) and recipe.proxy.fidelity.gate is None:
        free |= {"proxy.fidelity.*"}  # without a gate it is logged alone
    values = {key: value for key, value in _flat(recipe.model_dump(mode="json")).items() if not _matches(key, free)}
    values = {key: value for key, value in values.items() if value != NEWER.get(key)}
    canonical = json.dumps([values, _hashes(contents)], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def method_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a run's ``config.yaml`` by dotted key, without seed, name, places, logging and sampling."""
    own = FREE_KEYS | {"kind", "name", "seed", "sampling.*", "model.preset", "proxy.clip"}
    return {key: value for key, value in _flat(config).items() if not _matches(key, own)}


def _hashes(contents: Mapping[str, Any]) -> dict[str, Any]:
    """The contents without names and places."""
    fake = {"fake": contents["fake"]["sha256"]} if "fake" in contents else {}
    return fake | {
        "teacher": [contents["teacher"][key] for key in ("sha256", "config_sha256")],
        "rewards": [reward["fingerprint"] for reward in contents["rewards"]],
        "data": {key: value for key, value in contents["data"].items() if key != "path"},
        "proxy": contents["proxy"]["sha256"] if "proxy" in contents else None,
    }


def _matches(key: str, patterns: frozenset[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; items of a list of sections by their number."""
    if isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        data = dict(enumerate(data))
    if not isinstance(data, dict) or not data:
        return {prefix: data}
    out: dict[str, Any] = {}
    for key, value in data.items():
        out |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return out
