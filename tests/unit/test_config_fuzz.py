"""Whatever a recipe file or an override holds, nothing but ConfigError comes out, within half a second of CPU."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rgbench.core.config import packaged_recipes
from rgbench.core.errors import ConfigError
from rgbench.train.recipe import load_recipe


def attempt(file: Path, text: bytes, overrides: list[str]) -> None:
    """Read a recipe. What is wrong is said within 0.5 s of CPU: of the file, and of the line of a key that is there.

    The clock is this thread's and garbage is not collected meanwhile: in a long run of tests, spinning threads of
    earlier ones and a heap of millions of objects cost more than the reading.
    """
    file.write_bytes(text)
    gc.disable()
    start = time.thread_time()
    try:
        load_recipe(str(file), overrides)
    except ConfigError as error:
        assert error.path is not None
        there = error.key and f"{error.key.rpartition('.')[2]}:" in text.decode(errors="replace")
        assert error.line or error.path == "command line" or not there
    finally:
        spent = time.thread_time() - start
        gc.enable()
    assert spent < 0.5


SCALARS = st.sampled_from(
    ["1", "-1e-4", "no", "null", ".nan", "'x", "[", "]", "{a: 1}", "&a 1", "*a", "!t 1", "|", ": :"]
)
VALUES = SCALARS | st.text(max_size=20)
KEYS = st.sampled_from(
    [
        "kind",
        "seed",
        "train",
        "train.lr",
        "train.betas",
        "data.kind",
        "model.preset",
        "reward.kind",
        "lcd.w_min",
        "lora",
    ]
)
GOOD = {name: file.read_text() for name, file in packaged_recipes().items()}


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A shipped recipe with lines dropped, doubled, indented, cut or replaced."""
    text = GOOD[draw(st.sampled_from(sorted(GOOD)))]
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        change = draw(st.sampled_from(["drop", "double", "indent", "replace", "value", "cut"]))
        if change == "drop" and len(lines) > 1:
            del lines[at]
        elif change == "double":
            lines.insert(at, lines[at])
        elif change == "indent":
            lines[at] = draw(st.sampled_from([" ", "  ", "\t", "- "])) + lines[at]
        elif change == "replace":
            lines[at] = draw(st.text(max_size=30))
        elif change == "value":
            lines[at] = lines[at].partition(":")[0] + ": " + draw(VALUES)
        else:
            lines[at] = lines[at][: draw(st.integers(0, 10))]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


FUZZ = st.tuples(
    mutated() | st.binary(max_size=120) | st.text(max_size=120).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(st.tuples(KEYS, VALUES).map("=".join) | st.text(max_size=25), max_size=2),
)


@given(FUZZ)
@settings(max_examples=200)
def test_fuzz(tmp_path_factory: pytest.TempPathFactory, case: tuple[bytes, list[str]]) -> None:
    attempt(tmp_path_factory.getbasetemp() / "fuzz.yaml", *case)


@pytest.mark.long
@given(FUZZ)
@settings(max_examples=2000)
def test_fuzz_long(tmp_path_factory: pytest.TempPathFactory, case: tuple[bytes, list[str]]) -> None:
    attempt(tmp_path_factory.getbasetemp() / "fuzz_long.yaml", *case)


@pytest.mark.parametrize(
    "text",
    ["[" * 32_000, "{" * 32_000, "a: " * 10_000, "- " * 16_000, "a" * 32_000 + ":", "'" + "''" * 16_000, "? " * 16_000,
     "a: {" + "b: {" * 8000, "!" * 32_000, "\n" * 32_000, "k: v\n" * 6000, "".join(f"k{i}: v\n" for i in range(3000)),
     "a: >\n" + " x\n" * 10_000, "%" * 32_000, "#" * 32_000, "-" * 32_000],
)  # fmt: skip
def test_inputs_made_to_be_slow(tmp_path: Path, text: str) -> None:
    attempt(tmp_path / "slow.yaml", text.encode(), [])
