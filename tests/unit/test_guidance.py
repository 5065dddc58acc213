"""Where reward and distillation meet: β as number and as share, the window, and what is measured of both gradients."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rgbench.core.config import packaged_recipes
from rgbench.core.errors import ConfigError, UsageError
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.rewards.base import CallableReward, ViewedReward
from rgbench.train.base import StepResult
from rgbench.train.lcd import distil
from rgbench.train.log import per_bin
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM
from rgbench.train.recipe import load_recipe
from rgbench.train.rg_lcd import RGLCD, timestep_bins
from tests.parity import tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> DiffusionModels:
    return tiny.models(tiny.save_pipeline(tmp_path_factory.mktemp("guidance") / "teacher"))


def batch() -> Batch:
    return tiny.TinySource().load([3, 1, 4, 8])


def step(trainer, number: int = 0) -> StepResult:
    """A step and its backward pass, as the loop does it."""
    result = trainer.step(batch(), tiny.draws(number))
    torch.stack([term.mean() for term in result.losses["student"].values()]).sum().backward()
    return result


def gradients_at_prediction(models: DiffusionModels) -> tuple[Tensor, Tensor, Tensor]:
    """∂L_LCD/∂f and ∂R/∂f (B, n) of tiny.draws(0), each by its own backward pass; and the timesteps drawn."""
    trainer = RGLCD(tiny.recipe(), models, tiny.expert())
    found = distil(trainer.networks, trainer.recipe.lcd, trainer.prepare(batch(), tiny.draws()))
    leaf = found.prediction.detach().requires_grad_()
    huber = (((leaf - found.target) ** 2 + 0.001**2).sqrt() - 0.001).mean((1, 2, 3))
    rewards = tiny.expert()(decode_images(models.vae, leaf / models.scaling_factor), batch().prompts)
    lcd, reward = (torch.autograd.grad(value.sum(), leaf)[0].flatten(1) for value in (huber, rewards))
    return lcd, reward, found.start_timesteps


def test_norms_and_angle_are_those_of_two_separate_passes(models):
    lcd, reward, timesteps = gradients_at_prediction(models)
    stats = step(RGLCD(tiny.recipe(gradients={"bins": 2}), models, tiny.expert())).stats
    assert torch.allclose(stats["gradient/lcd"].float(), lcd.norm(dim=1), rtol=1e-4)
    assert torch.allclose(stats["gradient/reward"].float(), 2.0 * reward.norm(dim=1), rtol=1e-4), "β is 2"
    cosine = torch.nn.functional.cosine_similarity(lcd, -reward)
    assert torch.allclose(stats["gradient/cosine"].float(), cosine, atol=1e-4) and cosine.abs().max() > 0.01
    means = per_bin({name: float(value.mean()) for name, value in stats.items()})
    for name, low, high in (("t000-499", 0, 499), ("t500-999", 500, 999)):
        rows = (timesteps >= low) & (timesteps <= high)
        assert 0 < rows.sum() < 4, "both bins hold samples"
        assert means[f"gradient/cosine@{name}"] == pytest.approx(float(cosine[rows].mean()), abs=1e-4)
    assert not [name for name in means if name.startswith("weight")]


def test_bins():
    assert timestep_bins(3) == {"t000-332": (0, 332), "t333-665": (333, 665), "t666-999": (666, 999)}
    assert per_bin({"a@x": 0.5, "weight@x": 0.25, "a@y": 0.0, "weight@y": 0.0, "b": 1.0}) == {"a@x": 2.0, "b": 1.0}


@pytest.mark.parametrize("kind", [RGLCD, LRM])
def test_measuring_changes_no_bit(models, tmp_path, kind):
    students = []
    for settings in ({"at_prediction": False}, {"at_prediction": True}, {"every": 2}):
        recipe = tiny.recipe(gradients=settings, train={"log_every": 1})
        trainer = kind(recipe, models, tiny.expert(), *([tiny.proxy()] if kind is LRM else []))
        loop = Loop(trainer, tiny.TinySource(), recipe, RunDirectory(tmp_path))
        values = [loop.train_step() for _ in range(2)]
        students.append(trainer.student.state_dict())
        assert ("gradient/cosine" in values[0]) == (settings != {"at_prediction": False})
        assert all(v["gradient/lcd"] > 0 for v in values if "gradient/lcd" in v), "filled before the loop looks"
        assert ["gradient/parameters/cosine" in v for v in values] == [False, "every" in settings]
    for other in students[1:]:
        assert all(torch.equal(value, other[name]) for name, value in students[0].items())


def test_gradients_over_all_parameters(models):
    trainer = RGLCD(tiny.recipe(gradients={"every": 1}, train={"log_every": 1}), models, tiny.expert())
    result = trainer.step(batch(), tiny.draws())
    found = {name: float(result.stats[f"gradient/parameters/{name}"].mean()) for name in ("lcd", "reward", "cosine")}
    flat = {}
    for name, term in result.losses["student"].items():
        parts = torch.autograd.grad(term.mean(), list(trainer.student.parameters()), retain_graph=True)
        flat[name] = torch.cat([part.flatten() for part in parts])
        assert found[name] == pytest.approx(float(flat[name].norm()), rel=1e-4)
    cosine = torch.nn.functional.cosine_similarity(flat["lcd"], flat["reward"], dim=0)
    assert found["cosine"] == pytest.approx(float(cosine), abs=1e-4)


@pytest.mark.parametrize("kind", [RGLCD, LRM])
def test_a_share_of_the_gradient(models, kind):
    recipe = tiny.recipe(guidance={"scale": None, "share": 0.25})
    trainer = kind(recipe, models, tiny.expert(), *([tiny.proxy()] if kind is LRM else []))
    stats = step(trainer).stats
    assert torch.allclose(stats["gradient/share"], torch.full((4,), 0.25).double(), atol=1e-5)
    assert torch.allclose(stats["gradient/reward"], stats["gradient/lcd"] / 3, rtol=1e-4)
    assert stats["gradient/scale"].min() > 0 and stats["gradient/scale"].unique().numel() == 4


def test_a_share_is_what_reaches_the_student(models):
    """Equal to a run whose β is the number that the share comes to, sample by sample."""
    shared = RGLCD(tiny.recipe(guidance={"scale": None, "share": 0.4}), models, tiny.expert())
    scales = step(shared).stats["gradient/scale"]
    plain = RGLCD(tiny.recipe(guidance={"scale": 1.0}), models, tiny.expert())
    result = plain.step(batch(), tiny.draws())
    (result.losses["student"]["lcd"].mean() + (scales * result.losses["student"]["reward"]).mean()).backward()
    for own, wanted in zip(shared.student.parameters(), plain.student.parameters(), strict=True):
        assert torch.allclose(own.grad, wanted.grad, rtol=1e-3, atol=1e-6)


def test_a_share_has_an_upper_bound(models):
    settings = {"scale": None, "share": 0.9, "max_scale": 0.5}
    stats = step(RGLCD(tiny.recipe(guidance=settings), models, tiny.expert())).stats
    assert torch.equal(stats["gradient/scale"], torch.full((4,), 0.5).double()) and stats["gradient/share"].max() < 0.9


def test_the_window_holds_the_reward_back(models):
    timesteps = gradients_at_prediction(models)[2]
    middle = int(timesteps.sort().values[2])
    trainer = RGLCD(tiny.recipe(guidance={"window": [middle, 999]}), models, tiny.expert())
    result = step(trainer)
    guided = timesteps >= middle
    assert 0 < guided.sum() < 4
    assert torch.equal(result.stats["gradient/reward"] > 0, guided)
    assert torch.equal(result.losses["student"]["reward"] != 0, guided)
    assert (result.stats["reward"] != 0).all(), "all are scored"


@pytest.mark.parametrize("strength", [{"scale": 2.0}, {"share": 0.25}])
def test_guidance_warms_up(models, strength):
    def rewards(number: int, **more) -> Tensor:
        trainer = RGLCD(tiny.recipe(guidance={"scale": None, **strength, **more}), models, tiny.expert())
        return step(trainer, number).stats["gradient/reward"]

    assert rewards(3, warmup=[4, 8]).abs().max() == 0
    assert torch.allclose(rewards(6, warmup=[4, 8]), rewards(6) / 2, rtol=1e-5)
    assert torch.equal(rewards(8, warmup=[4, 8]), rewards(8))
    assert torch.equal(rewards(0, warmup=[0, 0]), rewards(0))


def test_no_guidance_above_the_ceiling(models):
    scores = step(RGLCD(tiny.recipe(), models, tiny.expert())).stats["reward"]
    ceiling = float(scores.sort().values[1:3].mean())
    result = step(RGLCD(tiny.recipe(guidance={"ceiling": ceiling}), models, tiny.expert()))
    assert torch.equal(result.stats["gradient/reward"] > 0, scores <= ceiling) and (scores > ceiling).any()
    assert torch.equal(result.stats["reward"], scores), "the log has the reward itself"


# ---- labels without gradient, windows, sums ---------------------------------------------


def contrast(images: Tensor, prompts: Sequence[str]) -> list[float]:
    """Standard deviation of the pixels, out of torch's sight."""
    return [float(image.numpy().std()) for image in images]


def test_an_lrm_learns_from_a_function_without_gradient(models):
    section = {"loss": "kl", "trainable": {"image_layers": "all", "text_layers": "all"}}
    expert = CallableReward(contrast, "contrast")
    trainer = LRM(tiny.recipe(proxy={"logit_scale": 50.0, **section}), models, expert, tiny.proxy())
    optimiser = torch.optim.AdamW(trainer.optimiser_groups()["proxy"].parameters, lr=3e-3)
    losses = []
    for _ in range(12):
        pairs = trainer.step(batch(), tiny.draws()).losses["proxy"]["pairs"].mean()
        optimiser.zero_grad()
        pairs.backward()
        optimiser.step()
        losses.append(float(pairs.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    assert torch.stack([p.grad.abs().max() for p in trainer.proxy.parameters() if p.grad is not None]).max() > 0


def test_what_cannot_guide_or_label_is_refused(models, monkeypatch):
    without_gradient = CallableReward(contrast, "contrast")
    monkeypatch.setattr("rgbench.train.rg_lcd.load_expert", lambda recipe, models: without_gradient)
    with pytest.raises(UsageError, match=r"reward\.kind .*gives no gradient.*lrm"):
        RGLCD.build(tiny.recipe(), models)
    with pytest.raises(UsageError, match=r"proxy\.logit_scale: contrast has none"):
        LRM(tiny.recipe(), models, without_gradient, tiny.proxy())


def test_windows_are_drawn_by_step_and_shared_by_the_images_of_a_prompt(models):
    seen: list[Tensor] = []

    class Watched(ViewedReward):
        def __call__(self, images, prompts, crop_offsets=None):
            seen.append(crop_offsets)
            return super().__call__(images, prompts, crop_offsets)

    expert = Watched(tiny.expert(), blur_sigma=0.0, random_crop=0.5)
    trainer = LRM(tiny.recipe(), models, expert, tiny.proxy())
    for number in (0, 0, 1):
        trainer.step(batch(), tiny.draws(number))
    assert seen[0].shape == (12, 2) and torch.equal(seen[0][:4], seen[0][4:8]) and torch.equal(seen[0][:4], seen[0][8:])
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    RGLCD(tiny.recipe(), models, expert).step(batch(), tiny.draws(0))
    assert torch.equal(seen[3], seen[0][:4])


# ---- recipes ----------------------------------------------------------------------------

SUM = "{kind: sum, terms: [{kind: hps, antialias: true, scale: 2}, {kind: pickscore, antialias: false}]}"


@pytest.mark.parametrize(
    "override",
    [
        "reward={kind: clip_score, path: x, antialias: true}",
        "reward={kind: pickscore, path: x, antialias: true, blur_sigma: 1, random_crop: 0.8}",
        "reward={kind: aesthetic, path: x, antialias: true, head: mlp, head_path: y}",
        "reward={kind: hps, version: '2.0', antialias: false}",
        f"reward={SUM}",
    ],
)
def test_a_recipe_may_name_any_reward(override):
    section = load_recipe("lrm", [override]).reward  # type: ignore[attr-defined]
    assert section.kind == override.split("kind: ")[1].split(",")[0]


@pytest.mark.parametrize(
    ("override", "key", "message"),
    [
        ("reward.kind=hsp", "reward.kind", "unknown reward; did you mean 'hps'"),
        ("reward.head=mlp", "reward.head", "unknown key 'head'"),
        ("reward={kind: pickscore}", "reward.antialias", "missing"),
        ("reward={kind: aesthetic, antialias: true}", "reward.head", "missing"),
        ("reward.random_crop=1.5", "reward.random_crop", "less than 1"),
        (f"reward={SUM.replace('scale: 2}', 'scale: {share: 0.5}}')}", "reward.terms.0.scale", "valid number"),
        (f"reward={SUM.replace('scale: 2}', 'window: [0, 9]}')}", "reward.terms.0.window", "unknown key"),
        (f"reward={SUM.replace('pickscore', 'sum')}", "reward.terms.1.kind", "a sum cannot be a term of a sum"),
        ("guidance.window=[900, 100]", "guidance", "ends before it begins"),
        ("guidance={share: 1.5}", "guidance.share", ""),
        ("guidance={scale: 2.0, share: 0.5}", "guidance", "give scale with share: null, or share with scale: null"),
        ("guidance.share=null", "guidance", "give scale with share: null, or share with scale: null"),
        ("reward.scale=2", "command line:reward.scale", "moved to guidance.scale"),
        ("reward.scale={share: 0.2}", "command line:reward.scale", "moved to guidance.share"),
        ("reward={kind: hps, antialias: true, window: [0, 9]}", "reward.window", "moved to guidance.window"),
        ("reward.logit_scale=10", "reward.logit_scale", "rg_lcd takes the raw score"),
        ("gradients.every=3", "", "no multiple of train.log_every"),
    ],
)
def test_a_wrong_reward_section_is_explained(override, key, message):
    extra = ["train.log_every=2"] if "every" in override else []
    with pytest.raises(ConfigError) as caught:
        load_recipe("rg_lcd", [override, *extra])
    assert key in str(caught.value) and message in str(caught.value), str(caught.value)


def test_a_recipe_of_an_older_version_is_told_where_its_keys_are_now(tmp_path):
    text = packaged_recipes()["lrm"].read_text()
    keys = {"scale: 2": "guidance.scale", "window: [0, 499]": "guidance.window", "logit_scale: 9": "proxy.logit_scale"}
    for number, (old, new) in enumerate(keys.items()):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text.replace("  antialias: true", f"  {old}\n  antialias: true"))
        line = next(i for i, row in enumerate(file.read_text().splitlines(), 1) if row == f"  {old}")
        with pytest.raises(ConfigError) as caught:
            load_recipe(str(file))
        assert str(caught.value) == f"{file}:{line}:reward.{old.partition(':')[0]}: moved to {new}"


def test_a_share_stands_in_for_the_scale():
    given = load_recipe("rg_lcd", ["guidance={share: 0.2}"]).guidance
    assert (given.scale, given.share) == (None, 0.2)
    assert load_recipe("rg_lcd", ["guidance.scale=null", "guidance.share=0.2"]).guidance == given
    assert type(given).model_validate(given.model_dump()) == given, "as a run's config.yaml is read again"
