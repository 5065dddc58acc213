"""Imports point one way, and nothing but rgbench/files.py opens what could run code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "rgbench"

# From the bottom to the top; a module may import from its own group and from layers below its own.
LAYERS: list[list[str]] = [
    ["rgbench.errors"],
    [
        "rgbench.writing",
        "rgbench.pixel_modes",
        "rgbench.strict_json",
        "rgbench.strict_yaml",
        "rgbench.registry",
        "rgbench.process",
    ],
    ["rgbench.files", "rgbench.config"],
    ["rgbench.run", "rgbench.checkpoint", "rgbench.launch", "rgbench.hub", "rgbench.pipeline_folder"],
    ["rgbench.diffusion", "rgbench.worlds", "rgbench.rewards"],
    ["rgbench.data"],
    ["rgbench.models", "rgbench.students"],
    ["rgbench.trainers", "rgbench.metrics"],
    ["rgbench.evaluation", "rgbench.golden"],
    ["rgbench.bench"],
    ["rgbench.reporting"],
    ["rgbench.worlds.building", "rgbench.doctor"],
    ["rgbench.doctor_recipe"],
    ["rgbench.listing", "rgbench.cli_shared"],
    ["rgbench.cli_bench_step"],
    [
        "rgbench.cli_world",
        "rgbench.cli_probes",
        "rgbench.cli_launch",
        "rgbench.cli_export",
        "rgbench.cli_doctor",
        "rgbench.cli_bench",
    ],
    ["rgbench.cli"],
    ["rgbench.__main__"],
]
FOUNDATIONS = {"rgbench"}  # holds the version alone
DIFFUSION_MAY_IMPORT = {"torch", "math", "typing", "collections", "dataclasses", "__future__", "rgbench"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def group_and_rank(name: str) -> tuple[str, int]:
    """The longest listed prefix of a module's name, and its layer."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        for rank, groups in enumerate(LAYERS):
            if prefix in groups:
                return prefix, rank
    raise AssertionError(f"{name} is in no layer: add it to LAYERS in {__file__}")


@pytest.mark.parametrize("name", [n for n in modules() if n not in FOUNDATIONS])
def test_imports_point_down(name: str) -> None:
    path = modules()[name]
    group, rank = group_and_rank(name)
    for line, target in imported(path):
        if not target.startswith("rgbench.") or target == "rgbench.__version__":
            continue
        other, other_rank = group_and_rank(target)
        assert other == group or other_rank < rank, f"{path}:{line}: {group} (layer {rank}) imports {target}"


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("rgbench.diffusion")])
def test_diffusion_imports_torch_alone(name: str) -> None:
    found = {target.split(".")[0] for _, target in imported(modules()[name])}
    assert found <= DIFFUSION_MAY_IMPORT
    assert all(t.startswith("rgbench.diffusion") for _, t in imported(modules()[name]) if t.startswith("rgbench"))


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "np.load", "numpy.load", "Image.open"),
    *("eval", "exec", "compile", "__import__", "os.system"),
}
# Writing a tar is no reading of one; the benchmark of decoding opens images that it made itself; a scorer that runs in
# another environment has no rgbench.files there, and unpickles with weights_only=True.
ALLOWED = {
    ("rgbench.rewards.workers.imagereward", "torch.load"),
    ("rgbench.data.export", "tarfile.open"),
    ("rgbench.bench.data", "tarfile.open"),
    ("rgbench.bench.data", "Image.open"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("name", [n for n in modules() if n != "rgbench.files"])
def test_one_module_alone_opens_untrusted_bytes(name: str) -> None:
    path = modules()[name]
    for line, target in imported(path):
        assert target.split(".")[0] not in UNSAFE_MODULES, f"{path}:{line}: {target}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and (name, dotted(node.func)) not in ALLOWED:
            assert dotted(node.func) not in UNSAFE_CALLS, f"{path}:{node.lineno}: {dotted(node.func)}"
            weights_only = [k.value for k in node.keywords if k.arg == "weights_only"]
            safe = any(isinstance(value, ast.Constant) and value.value is True for value in weights_only)
            assert dotted(node.func) != "torch.load" or safe, f"{path}:{node.lineno}: weights_only"
            unsafe = [k.arg for k in node.keywords if k.arg in ("allow_pickle", "shell", "trust_remote_code")]
            assert not unsafe, f"{path}:{node.lineno}: {unsafe}"


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    """A check that finds nothing anywhere may be blind."""
    found = {dotted(n.func) for n in ast.walk(tree(PACKAGE / "files.py")) if isinstance(n, ast.Call)}
    assert {"torch.load", "tarfile.open", "Image.open"} <= found
    assert any(target == "pickle" for _, target in imported(PACKAGE / "files.py"))
    assert group_and_rank("rgbench.worlds.building.api")[1] > group_and_rank("rgbench.reporting.api")[1]
    assert group_and_rank("rgbench.worlds.scenes.Scenes") == group_and_rank("rgbench.worlds.captions")


LIGHT = ["cli", "config", "registry", "files", "run", "checkpoint", "doctor", "listing", "worlds.presets"]
HEAVY = ["torch", "numpy", "diffusers", "transformers", "matplotlib", "pandas", "PIL"]


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    code = f"import sys, rgbench.{name}; print(*[m for m in {HEAVY} if m in sys.modules])"
    ours = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=ours, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
