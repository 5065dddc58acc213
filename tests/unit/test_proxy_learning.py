"""How the latent proxy learns from its expert by regression, and the watch over one that has died."""

from __future__ import annotations

import pytest
import torch

from rgbench.core.errors import ConfigError, RgbenchError, UsageError
from rgbench.core.run import RunDirectory
from rgbench.rewards.base import CallableReward, score
from rgbench.train import lrm
from rgbench.train.base import StepDraws
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM, Moments, correlation, shuffled
from rgbench.train.recipe import load_recipe
from tests.parity import tiny
from tests.tiny_trainers import batch

LABELS = ("expert", "shuffled")
WHOLE = {"trainable": {"image_layers": "all", "text_layers": "all"}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny.models(tiny.save_pipeline(tmp_path_factory.mktemp("proxy") / "teacher"))


@pytest.fixture
def make(models, monkeypatch):
    """Makes an LRM trainer on tiny data."""
    monkeypatch.setattr("rgbench.train.lrm.open_source", lambda section: tiny.TinySource())

    def make(expert=None, guidance=None, **proxy) -> LRM:
        recipe = tiny.recipe(
            proxy={"loss": "regression", **proxy}, guidance=guidance or {}, train={"latents_cache": "never"}
        )
        return LRM(recipe, models, expert or tiny.expert(), tiny.proxy())

    return make


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def test_the_loss_is_half_the_squared_difference_of_standard_scores():
    moments = Moments(expert=(2.0, 0.5), proxy=(-1.0, 2.0))
    scores = torch.tensor([[2.0], [2.5], [1.0]])  # standard scores 0, 1, −2
    cosines = torch.tensor([[-1.0], [1.0], [1.0]])  # 0, 1, 1
    assert moments.losses(scores, cosines).tolist() == [0.5 * 3**2]


def test_moments_are_those_of_the_first_samples(make):
    trainer, again = make(), make()
    assert trainer.moments == again.moments, "a resumed run measures the same"
    source = tiny.TinySource().load(list(range(10)))
    truths = score(
        tiny.expert(), trainer.models.decode(trainer.models.encode_images(source.images_BCHW)[0]), source.prompts
    )
    mean, std = trainer.moments.expert
    assert abs(mean - float(truths.mean())) < 3 * std


def test_a_reward_without_spread_is_refused(make):
    with pytest.raises(UsageError, match="flat.*alike"):
        make(CallableReward(lambda images, prompts: [0.5] * len(prompts), "flat"))


def test_it_takes_an_expert_without_logit_scale_and_learns(make):
    trainer = make(CallableReward(brightness, "brightness"), **WHOLE)
    optimiser = torch.optim.AdamW(trainer.optimiser_groups()["proxy"].parameters, lr=1e-2)
    rows = []
    for _ in range(40):
        result = trainer.step(batch(), tiny.draws())
        (terms,) = result.losses["proxy"].values()
        optimiser.zero_grad()
        terms.mean().backward()
        optimiser.step()
        rows.append((float(terms.detach().mean()), correlation(result.stats["proxy_reward"], result.stats["reward"])))
    assert rows[-1][0] < 0.3 * rows[0][0]
    assert rows[-1][1] > 0.9


def test_a_truth_may_be_the_datas_own_image(make):
    given = batch()
    calls = []
    for truth in ("decoded", "image"):
        expert = CallableReward(lambda images, prompts: calls.append(images) or images.mean((1, 2, 3)), "mean")
        trainer = make(expert, truth=truth)
        calls.clear()
        trainer.step(given, tiny.draws())
    assert torch.equal(torch.cat(calls)[8:], given.images_BCHW), "predictions and targets come first"


def test_a_truth_is_no_image_where_a_cache_may_stand_in_for_the_images():
    with pytest.raises(ConfigError, match=r"proxy\.truth: image.*latents_cache: never"):
        load_recipe("lrm", ["proxy.truth=image"])
    assert load_recipe("lrm", ["proxy.truth=image", "train.latents_cache=never"]).proxy.truth == "image"


def rows(trainer, tmp_path, steps):
    directory = RunDirectory(tmp_path).create(trainer.recipe.model_dump(mode="json"), {"status": "running", "step": 0})
    loop = Loop(trainer, tiny.TinySource(), trainer.recipe, directory)
    return [loop.train_step() for _ in range(steps)]


def test_correlation_by_hand():
    assert correlation(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0.0, 1.0, 1.0])) == pytest.approx(0.7559289)
    assert correlation(torch.ones(3), torch.tensor([0.0, 1.0, 1.0])) == 0


def test_a_dead_proxy_stops_the_run_once_it_guides(make, tmp_path, monkeypatch):
    monkeypatch.setattr(lrm, "WATCHED", 3)
    trainer = make(min_correlation=0.99, guidance={"warmup": [2, 3]}, lr=1e-9)
    with pytest.raises(RgbenchError, match=r"step 5: the proxy does not follow hps.*proxy\.min_correlation"):
        rows(trainer, tmp_path / "dead", 8)
    found = rows(make(min_correlation=-0.99), tmp_path / "alive", 5)
    assert all(-1 <= row["proxy_correlation"] <= 1 for row in found)


def test_a_resumed_run_stops_where_the_uninterrupted_one_does(make, tmp_path, monkeypatch):
    """The window over which the correlation is averaged is in the checkpoint; older checkpoints lack it."""
    monkeypatch.setattr(lrm, "WATCHED", 4)
    options = {"min_correlation": 0.99, "guidance": {"warmup": [1, 2]}, "lr": 1e-9}

    def begin(path):
        trainer = make(**options)
        directory = RunDirectory(path).create(trainer.recipe.model_dump(mode="json"), {"status": "running", "step": 0})
        loop = Loop(trainer, tiny.TinySource(), trainer.recipe, directory)
        loop.restore()
        return loop

    def stops_at(loop):
        for _ in range(20):
            try:
                loop.train_step()
            except RgbenchError:
                return loop.step
        raise AssertionError("not stopped")

    straight = stops_at(begin(tmp_path / "straight"))
    first = begin(tmp_path / "resumed")
    for _ in range(straight - 1):
        first.train_step()
    first.save()
    assert stops_at(begin(tmp_path / "resumed")) == straight
    modules = first.trainer.modules()
    first.trainer.modules = lambda: {name: each for name, each in modules.items() if name != "correlations"}
    first.step += 1
    first.save()
    assert stops_at(begin(tmp_path / "resumed")) == straight + lrm.WATCHED - 1, "the window begins anew"


def test_a_finished_run_has_its_proxy(make, tmp_path):
    from rgbench.rewards.latent_proxy import LatentCLIP

    trainer = make()
    saved = trainer.export_proxy(RunDirectory(tmp_path))
    loaded = LatentCLIP.load(saved, "cpu")
    assert all(torch.equal(value, trainer.proxy.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_shuffled_labels_are_the_prompts_own_at_random_places():
    scores = torch.arange(12.0).view(3, 4)
    found = torch.stack([shuffled(scores, StepDraws(0, step, 4)) for step in range(300)])
    assert torch.equal(found.sort(1).values, scores.expand(300, 3, 4)), "each prompt keeps its three scores"
    shares = torch.stack([(found[:, 0] == row).float().mean(0) for row in scores])
    assert torch.allclose(shares, torch.full((3, 4), 1 / 3), atol=0.09), "no image is favoured"
    parts = [shuffled(scores[:, at : at + 2], StepDraws(0, 0, 2, first=at)) for at in (0, 2)]
    assert torch.equal(torch.cat(parts, 1), found[0]), "whatever the micro-batches"


def test_shuffled_labels_change_what_the_proxy_learns_and_nothing_that_is_logged(make):
    plain, control = (make(loss="kl", labels=labels, **WHOLE).step(batch(), tiny.draws()) for labels in LABELS)
    assert not torch.equal(*(result.losses["proxy"]["pairs"] for result in (plain, control)))
    assert torch.equal(*(result.losses["student"]["reward"] for result in (plain, control)))
    assert all(torch.equal(plain.stats[name], control.stats[name]) for name in plain.stats)


def test_more_steps_of_the_proxy_for_one_of_the_student(models):
    """The student moves at the last of a cycle, by the step that it would make there anyway."""
    settings = {"train": {"log_every": 1}}
    twice, once = (
        LRM(tiny.recipe(proxy={"ratio": n}, **settings), models, tiny.expert(), tiny.proxy()) for n in (2, 1)
    )
    first, last, plain = (t.step(batch(), tiny.draws(step=n)) for t, n in ((twice, 0), (twice, 1), (once, 1)))
    assert list(first.losses) == ["proxy"] and {"reward", "proxy_reward", "pair_accuracy"} <= first.stats.keys()
    assert last.losses.keys() == plain.losses.keys() == {"student", "proxy"}
    for name, terms in plain.losses.items():
        assert all(torch.equal(last.losses[name][term], value) for term, value in terms.items())
    first.losses["proxy"]["pairs"].sum().backward()
    assert all(p.grad is None for p in twice.student.parameters())
    with pytest.raises(ConfigError, match=r"train\.log_every 3: the student moves at multiples of proxy\.ratio 2"):
        load_recipe("lrm", ["proxy.ratio=2", "train.log_every=3"])
    with pytest.raises(ConfigError, match=r"proxy\.ratio"):
        load_recipe("dollar", ["proxy.ratio=2"])
