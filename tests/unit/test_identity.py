"""The hash of a recipe that the training seeds of one method share."""

from __future__ import annotations

import warnings
from fnmatch import fnmatchcase
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgbench.train.identity import recipe_sha256
from rgbench.train.recipe import load_recipe

CONTENTS: dict[str, Any] = {
    "teacher": {"preset": "benchtop", "path": "/a", "sha256": "1", "config_sha256": {"unet": "2", "scheduler": "3"}},
    "rewards": [{"name": "hps", "fingerprint": {"weights_sha256": "4", "antialias": True}, "fingerprint_id": "5"}],
    "data": {"kind": "scenes", "num": None, "sha256": "6"},
    "proxy": {"path": "/b", "sha256": "7"},
    "latents_cache": False,
}
SUM = "reward={kind: sum, terms: [{kind: hps, antialias: true, scale: 2}, {kind: pickscore, antialias: false}]}"
GATE = ["proxy.fidelity={every: 10, gate: 0.2}", "lora={rank: 8}"]
RECIPES = [
    *(load_recipe(name) for name in ("lcd", "rg_lcd", "lrm", "lrm_pretrain")),
    load_recipe("rg_lcd", [SUM, "data={kind: webdataset, path: x, resolution: 64}"]),
    load_recipe("lrm", GATE),
]
# Seed, name, place, logging and saving; and how the same numbers are computed.
NOT_THE_METHOD = [
    *("seed", "name", "model.preset", "*.path", "*.head_path", "*.version", "*.python", "*.device", "*.timeout"),
    *("train.save_every", "train.keep_checkpoints", "train.sample_every", "train.log_every", "train.wandb"),
    *("train.trackio", "monitor.*"),
    *("train.latents_cache", "train.latents_cache_root", "train.num_workers", "train.compile", "proxy.clip"),
    "train.shard",
    *("train.gradient_checkpointing", "train.gradient_accumulation_steps", "gradients.*"),
]


def leaves(section: Any, prefix: str = "") -> list[str]:
    """Dotted keys of everything that can be set."""
    if isinstance(section, list) and section and isinstance(section[0], dict):
        section = dict(enumerate(section))
    if not isinstance(section, dict) or not section:
        return [prefix]
    return [leaf for key, value in section.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def with_value(section: Any, keys: list[str], value: Any) -> Any:
    """A copy with one value changed, whether it is valid or not."""
    key, *rest = keys
    if isinstance(section, list | tuple):
        return [with_value(v, rest, value) if str(i) == key and rest else v for i, v in enumerate(section)]
    return section.model_copy(update={key: with_value(getattr(section, key), rest, value) if rest else value})


def value_of(section: Any, keys: list[str]) -> Any:
    for key in keys:
        section = section[int(key)] if isinstance(section, list) else section[key]
    return section


def is_method(recipe: Any, key: str) -> bool:
    if recipe.kind == "lrm_pretrain" and key == "train.gradient_accumulation_steps":
        return True  # the captions of a micro-batch are its negatives
    if key.startswith("proxy.fidelity."):
        return recipe.proxy.fidelity.gate is not None or key == "proxy.fidelity.gate"
    return not any(fnmatchcase(key, pattern) for pattern in NOT_THE_METHOD)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(-5, 10**6), st.floats(-10, 10), st.text(max_size=5))


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(RECIPES), st.data())
def test_seed_and_logging_keep_the_hash_and_everything_else_changes_it(recipe, data):
    plain = recipe.model_dump(mode="json")
    key = data.draw(st.sampled_from(leaves(plain)))
    value = data.draw(VALUES)
    if value == value_of(plain, key.split(".")):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, of values that are not valid
        other = recipe_sha256(with_value(recipe, key.split("."), value), CONTENTS)
    assert (other != recipe_sha256(recipe, CONTENTS)) == is_method(recipe, key), (key, value)


def test_contents_stand_for_their_paths():
    own = recipe_sha256(RECIPES[2], CONTENTS)
    moved = {**CONTENTS, "teacher": {**CONTENTS["teacher"], "path": "/c", "preset": None}, "latents_cache": True}
    moved["proxy"] = {"path": "/d", "sha256": "7"}
    assert recipe_sha256(RECIPES[2], moved) == own and len(own) == 64
    changed = [
        {"teacher": {**CONTENTS["teacher"], "sha256": "0"}},
        {"teacher": {**CONTENTS["teacher"], "config_sha256": {"unet": "2", "scheduler": "0"}}},
        {"rewards": [{**CONTENTS["rewards"][0], "fingerprint": {"weights_sha256": "4", "antialias": False}}]},
        {"data": {**CONTENTS["data"], "sha256": "0"}},
        {"proxy": {"path": "/b", "sha256": "0"}},
    ]
    assert len({own, *(recipe_sha256(RECIPES[2], CONTENTS | change) for change in changed)}) == 6


@pytest.mark.parametrize(
    ("name", "override"),
    [("lcd", "lcd.teacher_steps=2"), ("lrm", "proxy.truth=image"), ("lrm", "proxy.labels=shuffled")],
)
def test_a_newer_key_leaves_the_hashes_of_older_runs(name, override):
    never = ["train.latents_cache=never"]
    recipe, changed = load_recipe(name, never), load_recipe(name, [*never, override])
    section, key = override.partition("=")[0].split(".")
    older = with_value(recipe, [section], getattr(recipe, section).model_copy())
    delattr_of(getattr(older, section), key)
    assert recipe_sha256(older, CONTENTS) == recipe_sha256(recipe, CONTENTS) != recipe_sha256(changed, CONTENTS)


def delattr_of(section: Any, key: str) -> None:
    """Take a key out of a frozen section, as in a run that is older than it."""
    del section.__dict__[key]
