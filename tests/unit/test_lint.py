"""House rules that no linter knows."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

from rgbench.train.recipe import load_recipe
from tests.conftest import ROOT

SOURCES = [path for folder in ("rgbench", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]


def faults_of(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    module = ast.parse(text)
    found = [f"line {node.lineno}" for node in ast.walk(module) if isinstance(node, ast.ExceptHandler) and broad(node)]
    if module.body and not ast.get_docstring(module):
        found.append("no docstring")
    if unfinished := re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text):
        found.append(unfinished[0])
    for node in ast.walk(module):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
            found.append(f"class {node.name} in line {node.lineno} has no docstring")
    return [f"{path.relative_to(ROOT)}: {fault}" for fault in found]


def broad(handler: ast.ExceptHandler) -> bool:
    return handler.type is None or "Exception" in ast.unparse(handler.type).split()


def test_files_are_explained_and_finished() -> None:
    assert [fault for path in SOURCES for fault in faults_of(path)] == []


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_constraints_meet_the_floors_and_are_plain() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line), line
        name, _, number = line.partition("==")
        pinned[normal(name)] = number
    declared = project()
    wanted = [Requirement(r) for r in (*declared["dependencies"], *declared["optional-dependencies"]["dev"])]
    for requirement in wanted:
        assert pinned[normal(requirement.name)] in requirement.specifier, requirement


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_floors_that_protect_from_known_holes() -> None:
    floors = {r.name: r.specifier for r in map(Requirement, project()["dependencies"])}
    assert "2.9.9" not in floors["torch"] and "2.10.0" in floors["torch"]
    assert "5.2.9" not in floors["transformers"] and "5.3.0" in floors["transformers"]
    assert all(str(specifier).startswith(">=") for specifier in floors.values())


BY_TORCH = {"tensorboard": "torch.utils.tensorboard"}  # what imports it for us


def test_every_dependency_is_imported() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES if path.is_relative_to(ROOT / "rgbench"))
    provided: dict[str, list[str]] = {}
    for module, owners in packages_distributions().items():
        for owner in owners:
            provided.setdefault(normal(owner), []).append(module)
    for requirement in map(Requirement, project()["dependencies"]):
        own = [normal(requirement.name).replace("-", "_"), BY_TORCH.get(requirement.name, "none")]
        modules = own + provided.get(normal(requirement.name), [])
        names = "|".join(re.escape(module) for module in modules)
        used = rf"^\s*(import|from) ({names})\b|find_spec\(\"({names})\"\)"
        assert re.search(used, text, re.M), f"nothing imports {requirement.name}"


def test_makefile_and_ci_call_what_the_readme_says() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "lint", "test", "test-long", "test-gpu"):
        assert re.search(rf"^{target}: ", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "rm -rf build" not in makefile, "build/ holds worlds that took hours"


def test_the_readme_and_the_makefile_tell_of_the_same_demo() -> None:
    done = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loop = re.search(r"for recipe in ([\w ]+); do \S+ train recipes/\$recipe\.yaml train\.steps=(\d+) ", done)
    made = re.search(r" eval .*--num (\d+) .*\n.* report \S+ --out (\S+)", done)
    assert loop and made, done
    said = re.search(
        r"make demo # [^#]*?writes (\S+) .*? trains (\d+) students for (\d+) steps \(their recipes take (\d+)\) "
        r"and evaluates (\d+) images each",
        " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()),
    )
    assert said, "the README no longer says what make demo does"
    recipes = loop[1].split()
    (whole,) = {load_recipe(str(ROOT / "recipes" / f"{recipe}.yaml")).train.steps for recipe in recipes}
    assert said.groups() == (f"{made[2]}/report.html", str(len(recipes)), loop[2], str(whole), made[1])
