"""Recipes: what YAML means here, and where errors point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import Field

from rgbench.core.config import Section, apply_overrides, dump_yaml, find_recipe, load_yaml, packaged_recipes, validate
from rgbench.core.errors import ConfigError, UsageError


class Optimiser(Section):
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    steps: Annotated[int, Field(ge=1)] = 10
    amsgrad: bool = False


class Cat(Section):
    kind: Literal["cat"]
    lives: int = 9


class Dog(Section):
    kind: Literal["dog"]
    tricks: tuple[str, ...] = ()


class Alpha(Section):
    kind: Literal["alpha"]
    alpha: Optimiser = Optimiser()  # a section of the kind's own name, as real recipes have
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None
    folder: Path | None = None


class Beta(Alpha):
    kind: Literal["beta"]  # type: ignore[assignment]
    scale: float


Model = Annotated[Alpha | Beta, Field(discriminator="kind")]

GOOD = """\
# A comment.
kind: alpha
alpha:
  lr: 1e-4
  betas: [0.9, 0.95]
pet: {kind: dog, tricks: [sit]}
folder: some/where
"""


def read(tmp_path: Path, text: str, *overrides: str) -> Any:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    data, lines = load_yaml(file)
    return validate(Model, apply_overrides(data, overrides), lines, "r.yaml", overrides)


def test_a_recipe_becomes_a_frozen_model(tmp_path: Path) -> None:
    model = read(tmp_path, GOOD)
    assert model == Alpha(
        kind="alpha",
        alpha=Optimiser(lr=1e-4, betas=(0.9, 0.95)),
        pet=Dog(kind="dog", tricks=("sit",)),
        folder=Path("some/where"),
    )
    with pytest.raises(ValueError, match="frozen"):
        model.kind = "beta"


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    given_ = ("alpha.lr=3e-5", "alpha.betas=[0, 0.5]", "pet={kind: cat, lives: 3}", "folder=null", "alpha.steps=7")
    model = read(tmp_path, GOOD, *given_)
    assert model.alpha == Optimiser(lr=3e-5, betas=(0.0, 0.5), steps=7)
    assert model.pet == Cat(kind="cat", lives=3)
    assert model.folder is None


def test_overrides_leave_their_input_alone() -> None:
    data = {"a": {"b": 1}}
    assert apply_overrides(data, ["a.b=2", "c.d=x"]) == {"a": {"b": 2}, "c": {"d": "x"}}
    assert data == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("0", 0),
        ("123456789012345678901", 123456789012345678901),
        ("-7", -7),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("Yes", "Yes"),
        ("on", "on"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2025-01-01", "2025-01-01"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("=", "="),
        ("[1, a]", [1, "a"]),
        ("{a: 1e3}", {"a": 1000.0}),
        ("|\n  text\n", "text\n"),
    ],
)
def test_what_scalars_mean(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "r.yaml").write_text(f"key: {text}")
    found = load_yaml(tmp_path / "r.yaml")[0]["key"]
    assert found == value
    assert type(found) is type(value)


def test_lines_of_dotted_keys(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(GOOD)
    lines = load_yaml(tmp_path / "r.yaml")[1]
    expected = {"kind": 2, "alpha": 3, "alpha.lr": 4, "alpha.betas.1": 5, "pet.tricks.0": 6, "folder": 7}
    assert {key: lines[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD + "kind: beta\n", "r.yaml:8:kind: occurs twice; first in line 2"),
        (GOOD.replace("lr: 1e-4", "lr: 1\n  lr: 2"), "r.yaml:5:alpha.lr: occurs twice; first in line 4"),
        (GOOD + "pets: 1\n", "r.yaml:8:pets: unknown key 'pets'; did you mean 'pet'?"),
        (GOOD.replace("betas", "beta"), "r.yaml:5:alpha.beta: unknown key 'beta'; did you mean 'betas'?"),
        (GOOD.replace("tricks", "trick"), "r.yaml:6:pet.trick: unknown key 'trick'; did you mean 'tricks'?"),
        (GOOD.replace("kind: dog", "kind: dogg"), "r.yaml:6:pet.kind: unknown 'kind' 'dogg'; did you mean 'dog'?"),
        (GOOD.replace("kind: dog, ", ""), "r.yaml:6:pet: lacks the key 'kind'"),
        (GOOD.replace("kind: alpha", "kind: alhpa"), "r.yaml:2:kind: unknown 'kind' 'alhpa'; did you mean 'alpha'?"),
        (GOOD.replace("kind: alpha", "kind: beta"), "r.yaml:scale: missing; give it a value"),
        (GOOD.replace("0.95", "x"), 'r.yaml:5:alpha.betas.1: Input should be a valid number; got "x"'),
        (GOOD.replace("lr: 1e-4", "steps: 0"), "r.yaml:4:alpha.steps: Input should be greater than"),
        (GOOD.replace("lr: 1e-4", "steps: 1.5"), "r.yaml:4:alpha.steps: "),
        (GOOD.replace("lr: 1e-4", "lr: '1e-4'"), 'r.yaml:4:alpha.lr: Input should be a valid number; got "1e-4"'),
        (GOOD.replace("lr: 1e-4", "amsgrad: no"), "r.yaml:4:alpha.amsgrad: Input should be a valid boolean; got "
         '"no"; write true or false'),
        (GOOD.replace("lr: 1e-4", "lr: true"), "r.yaml:4:alpha.lr: Input should be a valid number; got true"),
        (GOOD.replace("lr: 1e-4", "lr: .nan"), "r.yaml:4:alpha.lr: .nan: a recipe holds finite numbers only"),
        (GOOD.replace("lr: 1e-4", "lr: 1e999"), "r.yaml:4:alpha.lr: 1e999 is too large for a float"),
        (GOOD.replace("[sit]", "[sit, 3]"), "r.yaml:6:pet.tricks.1: Input should be a valid string; got 3"),
        ("a: &x 1\nb: *x\n", "r.yaml:1:a: anchors and aliases"),
        ("a: !!python/object/apply:os.system ['touch executed']\n", "r.yaml:1:a: tags are not read"),
        ("!!set {a, b}\n", "r.yaml:1: tags are not read"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: a second document"),
        ("- 1\n", "r.yaml:1: expected a mapping"),
        ("", "r.yaml:1: expected a mapping"),
        ("just words\n", "r.yaml:1: expected a mapping"),
        ("a: [1, 2\nb: 3\n", "r.yaml:2: not YAML: while parsing a flow sequence"),
        ("a:\n\t- 1\n", "r.yaml:2: not YAML: while scanning for the next token"),
        ("? [1]\n: 2\n", "r.yaml:1: a key must be a plain word"),
        ("a: " + "[" * 9000, "nested deeper than 24 levels"),
        ("a: " + "x" * 40_000, "larger than 32768 bytes"),
        ("a: \x00\n", "not YAML"),
    ],
)  # fmt: skip
def test_errors_name_file_line_key_and_remedy(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("text", "hint"), [('"1e-4"', True), ("'3'", True), ("fast", False), ('"1e-4x"', False)])
def test_a_number_in_quotes_is_recognised(tmp_path: Path, text: str, hint: bool) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"kind: alpha\nalpha:\n  lr: {text}\n")
    assert str(caught.value).startswith("r.yaml:3:alpha.lr: ") and ("without quotes" in str(caught.value)) is hint


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("alpha.lr=fast", 'command line:alpha.lr: Input should be a valid number; got "fast"'),
        ("alpha.lrr=1", "command line:alpha.lrr: unknown key 'lrr'; did you mean 'lr'?"),
        ("alhpa.lr=1", "command line:alhpa: unknown key 'alhpa'; did you mean 'alpha'?"),
        ("kind.x=1", "command line:kind.x: 'kind' holds no keys of its own"),
        ("alpha.lr", "expected KEY=VALUE like train.lr=1e-4, got 'alpha.lr'"),
        ("=1", "expected KEY=VALUE"),
        ("a..b=1", "expected KEY=VALUE"),
        ("alpha.lr=[1", "command line:alpha.lr: not YAML"),
        ("alpha.lr=*x", "command line:alpha.lr: anchors and aliases"),
        ("pet.kind=cow", "command line:pet.kind: unknown 'kind' 'cow'; known: cat, dog"),
    ],
)
def test_errors_of_overrides_blame_the_command_line(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, GOOD, override)
    assert said in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read: No such file"):
        load_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot read: Is a directory"):
        load_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8 at byte 8"):
        load_yaml(tmp_path / "latin.yaml")


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats(-1e9, 1e9) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
@example({"7e3": ["0E0", "1e-4", ".5e1", "1_0", "7e3x", "~", "no", 1e-7, -2.5e30, 10**25, True, None]})
def test_what_rgbench_writes_it_reads_back(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]) -> None:
    file = tmp_path_factory.mktemp("dump") / "r.yaml"
    file.write_text(dump_yaml(data))
    assert load_yaml(file)[0] == data


# ---- the recipes that come with rgbench --------------------------------------------------


def test_packaged_recipes_are_found_by_name_and_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = packaged_recipes()
    assert {"lcd", "rg_lcd", "lrm"} <= known.keys()
    monkeypatch.chdir(tmp_path)
    for name in ("lrm", "lrm.yaml", "recipes/lrm.yaml"):
        assert find_recipe(name) == known["lrm"]
    (tmp_path / "lrm").write_text("mine")
    assert find_recipe("lrm") == Path("lrm")  # a file comes first


@pytest.mark.parametrize("name", ["lrmm", "recipes/lrmm.yaml", "../lrm", "/etc/passwd.yaml", "", "a\0b"])
def test_unknown_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="neither a file nor a packaged recipe"):
        find_recipe(name)


def test_every_packaged_recipe_validates() -> None:
    from rgbench.train.recipe import load_recipe

    names = list(packaged_recipes())
    assert len(names) == 22
    for name in names:
        recipe = load_recipe(name)
        known = ("lcd", "rg_lcd", "lrm", "lrm_pretrain", "tcd", "mlcm", "weighted", "vsd", "dollar")
        assert json.loads(recipe.model_dump_json())["kind"] in known


def test_an_override_that_replaces_a_section_drops_its_old_keys(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, "pet.lives=3", "pet.kind=cat").pet == Cat(kind="cat", lives=3)
    assert read(tmp_path, GOOD, "pet.kind=dog").pet == Dog(kind="dog", tricks=("sit",)), "the same kind: nothing goes"
    model = read(tmp_path, GOOD, "kind=beta", "scale=1.0")
    assert model.alpha.lr == 1e-4, "another kind of recipe keeps its sections"


def test_of_two_rivals_the_one_that_is_given_stays() -> None:
    data, rivals = {"a": {"x": 1, "y": 2}}, [("a.x", "a.z")]
    assert apply_overrides(data, ["a.z=3"], rivals) == {"a": {"y": 2, "z": 3}}
    assert apply_overrides(data, ["a.z=null"], rivals) == {"a": {"x": 1, "y": 2, "z": None}}
    assert apply_overrides(data, ["a.x=4", "a.z=3"], rivals) == {"a": {"x": 4, "y": 2, "z": 3}}, "both were asked for"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("pet.lives=3", r"unknown key 'lives'; set kind to one that has it \(cat\)"),
        ("lr=1e-3", r"unknown key 'lr'; did you mean 'alpha.lr'\?"),
        ("pet.tricsk=[sit]", r"unknown key 'tricsk'; did you mean 'tricks'\?"),
    ],
)
def test_a_key_in_the_wrong_place_is_sent_to_its_own(tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path, GOOD, override)
