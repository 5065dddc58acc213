"""What a GPU's memory asks of the benchmarks: rows that do not fit, nothing left alive, operands cut."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from rgbench.core.errors import UsageError
from rgbench.train.lcd import LCD
from rgbench.train.rg_lcd import RGLCD
from tests.unit.test_bench_parts import SMALL, TINY, subject
from tools.bench import api, compiled, levers, machine
from tools.bench.counting import Product
from tools.bench.document import DOES_NOT_FIT
from tools.bench.growth_tables import dimensions
from tools.bench.page import page
from tools.bench.subject import RANDOM, RECIPES

SETTINGS = ["train.batch_size=2", "train.dtype=float32", "lcd.time_cond_proj_dim=16"]
WORDS = "CUDA out of memory. Tried to allocate 20.00 MiB."


@pytest.fixture
def tiny(monkeypatch):
    """A preset of tiny networks, on a machine whose rates are measured in no time."""
    monkeypatch.setitem(RANDOM, "tiny", TINY)
    monkeypatch.setitem(RECIPES, "tiny", "sd21/{}")
    monkeypatch.setitem(machine.SQUARE, "cpu", 64)
    monkeypatch.setitem(machine.COPY_BYTES, "cpu", 1 << 16)
    monkeypatch.setattr(machine, "PRODUCT_SEC", 1e-5)


def too_large(*_):
    raise torch.OutOfMemoryError(f"{WORDS}\nSee the documentation")


def written(folder: Path, content: dict) -> str:
    """The page of one result."""
    api.save(folder, ["rgbench", "bench", content["what"]], "cpu", None, content)
    return page(folder)


def train(methods: list[str], say) -> dict:
    return api.train_step(preset="tiny", methods=methods, device="cpu", overrides=SETTINGS, rounds=1, say=say)


def test_a_step_that_does_not_fit_leaves_the_rows_before_it(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(RGLCD, "step", too_large)
    found = train(["lcd", "rg_lcd"], print)
    lcd, rg_lcd = found["rows"]
    assert lcd["method"] == "lcd" and lcd["steps"]["rgbench"]["flops"] > 0
    assert rg_lcd == {"method": "rg_lcd", "batch_size": 2, "dtype": "float32", DOES_NOT_FIT: WORDS}
    text = written(tmp_path, found)
    assert "| lcd | rgbench, latents cached |" in text and "Peak memory: " in text
    assert "| rg_lcd | batch 2 | does not fit | – | – | – | – | – | – | – | – |" in text


def test_nothing_of_a_row_is_alive_in_the_next(tiny, monkeypatch):
    alive: list[weakref.ref] = []
    load = api.load_subject

    def watched(*words):
        found = load(*words)
        alive.append(weakref.ref(found.trainer.expert if isinstance(found.trainer, RGLCD) else found.trainer.student))
        return found

    monkeypatch.setattr(api, "load_subject", watched)
    before: list[list] = []
    gc.disable()  # whose own hour would hide it
    try:
        train(["rg_lcd", "lcd"], lambda _: before.append([network() for network in alive]))
    finally:
        gc.enable()
    assert before == [[], [None]] and [network() for network in alive] == [None, None]


def test_growth_tells_from_which_size_on_it_does_not_fit(tiny, tmp_path, monkeypatch):
    step = LCD.step
    monkeypatch.setattr(
        LCD, "step", lambda s, batch, draws: (too_large if len(batch.prompts) > 1 else step)(s, batch, draws)
    )
    found = api.cost_growth(over="batch", values=[1, 2], preset="tiny", methods=["lcd"], device="cpu",
                            overrides=SETTINGS, rounds=1, say=print)  # fmt: skip
    assert [DOES_NOT_FIT in row for row in found["rows"]] == [False, True]
    text = written(tmp_path, found)
    assert "| lcd | 1 | " in text and "| lcd | 2 | does not fit | – | – | – | – |" in text
    none = found | {"rows": found["rows"][1:], "machine": {"device": "a GPU"}, "command": "x"}
    assert "a GPU. `x`\n\n| method" in dimensions({"growth": none})


def test_levers_and_compilation_tell_what_does_not_fit(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(levers.LEVERS, "foreach EMA", levers.Lever(True, True, too_large))
    rows = levers.measure(subject("lrm", tmp_path), ["foreach EMA", "fused AdamW"], 1)
    assert rows[0] == {"lever": "foreach EMA", "kept": True, "exact": True, DOES_NOT_FIT: WORDS}
    assert rows[1]["gain"]["median"] > 0
    content = {"preset": "tiny", "overrides": [], "rounds": 1}
    text = written(tmp_path, content | {"what": "levers", "rows": rows})
    assert "| foreach EMA | kept | does not fit | – | – | – |" in text and "| fused AdamW | kept | 0.0" in text
    monkeypatch.setattr(LCD, "step", too_large)
    found = api.compile_gains(preset="tiny", methods=["lcd"], choices=[], device="cpu", overrides=SETTINGS, rounds=1,
                              say=print)  # fmt: skip
    assert "| lcd | batch 2 | does not fit | – | – | – | – | – | – |" in written(tmp_path, found)


def test_levers_run_in_the_recipes_arithmetic(tmp_path):
    bench = levers.Bench(subject("lrm", tmp_path, dtype="bfloat16"))
    seen: set[torch.dtype] = set()
    hook = register_module_forward_hook(
        lambda module, _, out: seen.add(out.dtype) if isinstance(module, (nn.Linear, nn.Conv2d)) else None
    )
    kinds = {}
    try:
        for name, lever in levers.LEVERS.items():
            for which, work in enumerate(lever.make(bench)):
                seen.clear()
                work()
                kinds[name, which] = set(seen)
    finally:
        hook.remove()
    assert kinds.pop(("bfloat16", 0)) == {torch.float32} and kinds.pop(("bfloat16", 1)) == {torch.bfloat16}
    without = {("latents cached", 1), *((name, i) for name in ("fused AdamW", "foreach EMA") for i in (0, 1))}
    assert kinds == {key: set() if key in without else {torch.bfloat16} for key in kinds}


def test_operands_are_cut_to_the_memory():
    image = Product(1, 16 * 512 * 512, 9 * 128, 128)  # a convolution of the decoder at batch 16
    for shape in (image, Product(4096, 4096, 64, 4096), Product(64, 16 * 256 * 256, 4608, 512)):
        cut = machine.cut_to_memory(shape)
        assert machine.LARGEST_OPERAND / 2 < cut.batch * cut.m * max(cut.k, cut.n) <= machine.LARGEST_OPERAND
        assert (cut.k, cut.n) == (shape.k, shape.n)
    usual = Product(8, 1024, 320, 320)
    assert machine.cut_to_memory(usual) == usual


def test_the_machine_holds_no_memory_between_two_rates():
    SMALL.large_rate()
    assert not [leaf for leaf in tree_leaves(vars(SMALL)) if isinstance(leaf, torch.Tensor)]


def test_another_method_finds_nothing_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "before")
    made = []

    def backend(graph, _):
        made.append(os.environ["TRITON_CACHE_DIR"])
        return graph.forward

    for name in ("lcd", "lrm"):
        with compiled.nothing_compiled(tmp_path / name):
            network = nn.Linear(2, 2)
            network.compile(backend=backend)
            network(torch.ones(1, 2))
    assert len(made) == 2 and [Path(place).relative_to(tmp_path).parts[0] for place in made] == ["lcd", "lrm"]
    assert os.environ["TRITON_CACHE_DIR"] == "before"


def test_a_compiler_is_looked_for_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    for device, words in (("cuda", "Triton needs a C compiler"), ("cpu", r"needs a C\+\+ compiler on the CPU")):
        with pytest.raises(UsageError, match=words):
            api.compile_gains(preset="benchtop", methods=["lcd"], choices=[], device=device, overrides=[], rounds=1,
                              say=pytest.fail)  # fmt: skip
    (tmp_path / "gcc").touch(mode=0o755)
    compiled.check_compiler("cuda")
    (tmp_path / "gcc").unlink()
    monkeypatch.setenv("CC", "cc")
    compiled.check_compiler("cuda")
