"""Imports run down, without a cycle, and nothing but rgbench/core/io.py opens what could run code."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.conftest import ROOT

# From the bottom to the top: a package imports from itself and from those below it.
PACKAGES = [
    *("core", "diffusion", "benchtop", "models", "data", "rewards"),
    *("train", "metrics", "evaluate", "judge", "report", "arena", "cli"),
]
DIFFUSION_MAY_IMPORT = {"torch", "math", "typing", "collections", "itertools", "dataclasses", "__future__", "rgbench"}


@cache
def modules() -> dict[str, Path]:
    found = {}
    for folder in ("rgbench", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
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


def module_of(target: str) -> str | None:
    """The module of ours that an imported name comes from."""
    while target and target not in modules():
        target = target.rpartition(".")[0]
    return target or None


def rank(module: str) -> int:
    """How high a module stands: tools and the Python interface above the package, the version below everything."""
    parts = module.split(".")
    if parts[0] == "tools" or parts[1:] in (["__main__"], ["api"]):
        return len(PACKAGES)
    return PACKAGES.index(parts[1]) if len(parts) > 1 else -1


def test_every_package_has_its_place() -> None:
    folders = {path.name for path in (ROOT / "rgbench").iterdir() if list(path.glob("*.py"))}
    assert folders == set(PACKAGES)
    assert rank("rgbench.judge.verdict") < rank("rgbench.report.tables") < rank("tools.golden")


def upward() -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line}: {name} imports {module}"
        for name, path in modules().items()
        for line, target in imported(path)
        if (module := module_of(target)) and rank(module) > rank(name)
    ]


def test_imports_run_down() -> None:
    assert upward() == []


def test_no_import_cycle() -> None:
    """Neither at import time, nor in functions, nor for types alone."""
    below = {
        name: {module for _, target in imported(path) if (module := module_of(target)) and module != name}
        for name, path in modules().items()
    }
    done: set[str] = set()
    while ready := {name for name, targets in below.items() if name not in done and targets <= done}:
        done |= ready
    assert set(below) - done == set(), "these import each other, or from those that do"


def test_diffusion_imports_torch_alone() -> None:
    for name, path in modules().items():
        if name.startswith("rgbench.diffusion"):
            targets = [target for _, target in imported(path)]
            assert {target.split(".")[0] for target in targets} <= DIFFUSION_MAY_IMPORT, name
            assert all(t.startswith("rgbench.diffusion") for t in targets if t.startswith("rgbench")), name


UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {
    *("torch.load", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive", "np.load", "numpy.load", "Image.open"),
    *("eval", "exec", "compile", "__import__", "os.system"),
}
UNSAFE_OPTIONS = ("allow_pickle", "shell", "trust_remote_code")
READER = "rgbench.core.io"
# Writing a tar is no reading of one. A scorer that runs in another environment has no rgbench.core.io there, and
# unpickles with weights_only=True.
ALLOWED = {
    ("rgbench.rewards.workers.hpsv2", "torch.load"),
    ("rgbench.rewards.workers.imagereward", "torch.load"),
    ("rgbench.data.tars", "tarfile.open"),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def unsafe(name: str, call: ast.Call) -> bool:
    """Whether a call opens what could run code, in a module that may not."""
    function = dotted(call.func)
    options = {k.arg: k.value.value for k in call.keywords if isinstance(k.value, ast.Constant)}
    if function == "tarfile.open" and (name, function) in ALLOWED:
        return options.get("mode") != "w" and "w" not in [v.value for v in call.args if isinstance(v, ast.Constant)]
    if function == "torch.load" and options.get("weights_only") is not True:
        return True
    if {k.arg for k in call.keywords} & set(UNSAFE_OPTIONS):
        return True
    return function in UNSAFE_CALLS and (name, function) not in ALLOWED


def test_one_module_alone_opens_untrusted_bytes() -> None:
    faults = []
    for name, path in modules().items():
        if name == READER:
            continue
        faults += [f"{path}:{line}: {t}" for line, t in imported(path) if t.split(".")[0] in UNSAFE_MODULES]
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        faults += [f"{path}:{call.lineno}: {dotted(call.func)}" for call in calls if unsafe(name, call)]
    assert faults == []


def test_the_checks_see_what_they_look_for() -> None:
    """A check that finds nothing anywhere may be blind."""
    reader = modules()[READER]
    found = {dotted(n.func) for n in ast.walk(tree(reader)) if isinstance(n, ast.Call)}
    assert {"torch.load", "tarfile.open", "Image.open"} <= found
    assert any(target == "pickle" for _, target in imported(reader))


LIGHT = ["api", "cli.main", "cli.show", "cli.doctor", "core.io", "core.run", "core.checkpoint", "models.presets"]
HEAVY = ["torch", "numpy", "diffusers", "transformers", "matplotlib", "pandas", "PIL"]


def test_light_modules_import_nothing_heavy() -> None:
    names = ", ".join(f"rgbench.{name}" for name in LIGHT)
    code = f"import sys, {names}; print(*[m for m in {HEAVY} if m in sys.modules])"
    ours = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=ours, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
