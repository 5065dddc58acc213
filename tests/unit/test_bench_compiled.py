"""Compiled steps: what is compiled, that each is switched alone, and that the numbers stay."""

from __future__ import annotations

import json

import pytest
import torch

from rgbench.core.errors import UsageError
from tests.unit.test_bench_parts import subject
from tools.bench import api, compiled

SAME_ORDER = 4  # of magnitude: a compiled step sums in another order than either layout


def test_networks_of_both_choices(tmp_path):
    trainer = subject("lrm", tmp_path).trainer
    recipe, every = compiled.networks(trainer, "recipe"), compiled.networks(trainer, "all")
    assert recipe == [trainer.models.unet, trainer.student, trainer.target]
    assert every[3:] == [trainer.models.vae.encoder, trainer.models.vae.decoder, trainer.models.text_encoder,
                         trainer.expert.model.visual, trainer.proxy.clip.visual]  # fmt: skip


def test_the_switch_turns_on_what_it_says(tmp_path):
    trainer = subject("rg_lcd", tmp_path).trainer
    switch = compiled.Switch(trainer)  # compiles at the first call, which does not come

    def on() -> list[torch.nn.Module]:
        return [n for n in compiled.networks(trainer, "all") if n._compiled_call_impl is not None]

    assert on() == []
    switch.to("recipe")
    assert on() == compiled.networks(trainer, "recipe")
    switch.to("all")
    assert on() == compiled.networks(trainer, "all")
    switch.to("eager")
    assert on() == []


def test_gradients_are_of_one_batch_and_change_nothing(tmp_path):
    found = subject("lrm", tmp_path)
    before = [p.detach().clone() for p in found.trainer.student.parameters()]
    first, again = compiled.gradients(found), compiled.gradients(found)
    assert set(first) == {"student", "proxy"} and set(compiled.difference(first, again).values()) == {0.0}
    assert all(torch.equal(a, b) for a, b in zip(before, found.trainer.student.parameters(), strict=True))
    assert all(p.grad is None for p in found.trainer.student.parameters())
    doubled = {name: [2 * g for g in parts] for name, parts in first.items()}
    assert compiled.difference(doubled, first) == {"student": pytest.approx(1.0), "proxy": pytest.approx(1.0)}


def test_another_order_of_sums_is_rounding_and_leaves_the_layout(tmp_path):
    found = subject("lcd", tmp_path)
    first = compiled.gradients(found)
    apart = compiled.difference(compiled.reordered(found), first)
    assert 0 < apart["student"] < 1e-2
    assert all(p.is_contiguous() for p in found.trainer.student.parameters())
    assert compiled.difference(compiled.gradients(found), first) == {"student": 0.0}


def test_what_compiling_took_is_paid_back_by_what_it_saves():
    told = compiled._compared([2.0, 2.0], [1.5, 1.5], {"first_sec": [31.5, 1.5, 1.4], "gradient_difference": {}})
    assert told["compile_sec"] == 30.0 and told["steps_to_pay"] == 60.0
    assert told["gain"]["median"] == pytest.approx(4 / 3)
    slower = compiled._compared([1.0], [1.5], {"first_sec": [9.0], "gradient_difference": {}})
    assert slower["steps_to_pay"] is None


def test_a_recipe_that_compiles_is_refused(tmp_path):
    with pytest.raises(UsageError, match="leave train.compile out"):
        compiled.measure(subject("lcd", tmp_path, compile="true"), ["recipe"], 1, tmp_path)
    with pytest.raises(UsageError, match="--networks al: did you mean 'all'"):
        api.compile_gains(preset="benchtop", methods=["lcd"], choices=["al"], device="cpu", overrides=[], rounds=1,
                          say=print)  # fmt: skip


@pytest.mark.long
def test_a_compiled_step_has_the_same_gradients(tmp_path):
    row = compiled.measure(subject("lrm", tmp_path), compiled.CHOICES, 1, tmp_path / "cache")
    json.dumps(row, allow_nan=False)
    assert any((tmp_path / "cache").iterdir())  # it did compile
    for choice in compiled.CHOICES:
        found = row["compiled"][choice]
        assert found["compile_sec"] > 1 and set(found["gradient_difference"]) == {"student", "proxy"}
        for name, apart in found["gradient_difference"].items():
            assert apart < SAME_ORDER * row["rounding_difference"][name]
