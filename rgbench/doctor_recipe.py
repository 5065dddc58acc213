"""``rgbench doctor RECIPE``: what a recipe needs, what of it is here, and how to get the rest. Loads no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rgbench.config import find_recipe
from rgbench.data.config import HFDatasetData, ImageFolderData, WebDatasetData
from rgbench.doctor import Check
from rgbench.errors import UsageError
from rgbench.hub import MissingFiles, readable_size
from rgbench.pipeline_folder import check_folder, read_config
from rgbench.rewards.config import HPS, Aesthetic, Plugin, Process, RewardFields, Sum
from rgbench.rewards.published import find_published
from rgbench.rewards.scorers import look
from rgbench.trainers.proxy_folder import MissingProxy, find_clip, find_proxy
from rgbench.trainers.recipe import BaseRecipe, LRMPretrainRecipe, LRMRecipe, RGLCDRecipe, load_recipe

GET_TARS = 'see docs/how-to/train-on-my-own-teacher.md, "The data"'


def recipe_checks(name_or_path: str, overrides: list[str] | None = None) -> list[Check]:
    """What a recipe needs, one check a part.

    Args:
        name_or_path: a YAML file, or the name of a packaged recipe.
        overrides: ``key.path=value`` settings.

    Raises:
        ConfigError: the recipe itself is wrong.
    """
    recipe = load_recipe(name_or_path, overrides)
    found = [Check("recipe", "ok", f"{find_recipe(name_or_path)}: {recipe.kind}, {recipe.train.steps} steps")]
    found.append(_look("teacher", lambda: _teacher(recipe)))
    if isinstance(recipe, RGLCDRecipe):
        found += _rewards(recipe)
    if isinstance(recipe, LRMRecipe):
        found.append(_look("proxy", lambda: _described(find_proxy(recipe), "proxy.path")))
    if isinstance(recipe, LRMPretrainRecipe):
        found.append(_look("clip", lambda: _described(find_clip(recipe), "proxy.clip")))
    return [*found, *_data(recipe)]


def _look(name: str, find: Callable[[], str]) -> Check:
    """``ok`` with what is found, or ``missing`` with the reason and the command that mends it."""
    try:
        return Check(name, "ok", find())
    except (MissingFiles, MissingProxy) as error:
        return Check(name, "missing", error.what, error.command)
    except UsageError as error:
        what, _, command = str(error).partition("; name another place, or get them with: ")
        what, _, install = what.partition("; install it with: ")
        return Check(name, "missing", what, command or install or "give another path, or write the folder again")


def _teacher(recipe: BaseRecipe) -> str:
    folder = recipe.model.teacher_folder()
    weights = check_folder(folder)
    size = sum(file.stat().st_size for part in weights.values() for file in part.files)
    kind = read_config(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    side = _side(folder)
    if recipe.model.preset:
        preset = recipe.model.find("model.preset")
        if (side, kind) != (preset.resolution, preset.prediction_type):
            raise UsageError(
                f"{folder}: {side} px, {kind}; the preset is {preset.resolution} px, {preset.prediction_type}"
            )
    wanted = getattr(recipe.data, "resolution", side)
    if wanted != side:
        raise UsageError(f"{folder}: takes images of {side} px, data.resolution is {wanted}: set it to {side}")
    variants = {part.variant for part in weights.values()} - {None}
    precision = f", {', '.join(sorted(map(str, variants)))} weights" if variants else ""
    return f"{folder}: {side} px, {kind}, {readable_size(size)}{precision}"


def _side(folder: Path) -> int:
    """Image side in pixels of a pipeline folder."""
    blocks = read_config(folder / "vae" / "config.json").get("block_out_channels", [64])
    return read_config(folder / "unet" / "config.json").get("sample_size", 64) * 2 ** (len(blocks) - 1)


def _rewards(recipe: RGLCDRecipe) -> Iterator[Check]:
    """The reward, or each term of a sum; of the aesthetic predictor its head as well."""
    section = recipe.reward
    terms: dict[str, RewardFields] = {"reward": section}
    if isinstance(section, Sum):
        terms = {f"reward.terms.{i}": term for i, term in enumerate(section.terms)}
    for key, term in terms.items():
        yield _look(f"{key} ({term.kind})", partial(_reward, recipe, term, key))
        if isinstance(term, Aesthetic):
            path, name = term.head_path, f"aesthetic {term.head} head"
            yield _look(f"{key} ({term.kind} head)", partial(_path_or, path, f"{key}.head_path", name))


def _reward(recipe: RGLCDRecipe, term: RewardFields, key: str) -> str:
    """Where a reward's weights are looked for, as :func:`rgbench.rewards.load.load_reward` does."""
    path = getattr(term, "path", None)
    if isinstance(term, Process):
        return look(term.python, term.worker, key) + (f"; {_described(Path(path), f'{key}.path')}" if path else "")
    if isinstance(term, Plugin):
        return _described(Path(path), f"{key}.path") if path else "a plug-in that brings its own weights"
    if not isinstance(term, HPS):
        return _path_or(path, f"{key}.path", term.kind)
    preset = recipe.model.find(f"{key}.path") if recipe.model.preset else None
    if path is None and term.version is None and preset is not None and preset.root is not None:
        path = str(preset.reward_folder())
    return _path_or(path, f"{key}.path", f"hps {term.version or '2.1'}")


def _path_or(path: str | None, key: str, published: str) -> str:
    """A path that the recipe gives, or the published weights in the local cache."""
    return _described(Path(path) if path else find_published(published, key), key)


def _described(path: Path, key: str) -> str:
    """A file or folder and its size.

    Raises:
        UsageError: neither is there.
    """
    if not path.exists():
        raise UsageError(f"{key} {path}: no such file or folder")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{path}: {readable_size(sum(file.stat().st_size for file in files))}"


def _data(recipe: BaseRecipe) -> Iterator[Check]:
    """Whether the data lies where the recipe says; ``--dry-run`` reads it."""
    section = recipe.data
    if isinstance(section, ImageFolderData):
        path = Path(section.path)
        captions = path if section.captions == "txt" else path / section.captions
        state = _look("data", lambda: _described(captions, "data.path"))
        yield Check("data", state.status, state.detail, GET_TARS if state.status == "missing" else "")
    elif isinstance(section, WebDatasetData):
        yield _tars([section.path] if isinstance(section.path, str) else section.path)
    elif isinstance(section, HFDatasetData):
        local = Path(section.path).exists()
        found = _look("data", lambda: _described(Path(section.path), "data.path"))
        yield found if local else Check("data", "note", f"{section.path}: not a path, so a data set of the hub's cache")
    else:
        yield Check("data", "ok", f"{section.kind}: made as it is needed")


def _tars(paths: list[str]) -> Check:
    tars = [tar for path in map(Path, paths) for tar in (sorted(path.glob("*.tar")) if path.is_dir() else [path])]
    absent = [str(path) for path in map(Path, paths) if not path.exists()]
    if absent or not tars:
        detail = f"data.path {', '.join(absent)}: no such folder or tar" if absent else f"{paths[0]}: holds no tar"
        return Check("data", "missing", detail, GET_TARS)
    return Check("data", "ok", f"{len(tars)} tars, {readable_size(sum(tar.stat().st_size for tar in tars))}")
