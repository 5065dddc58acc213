"""Which prompt belongs to which latents, what the proxy learns from, and what is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rgbench.core.errors import RgbenchError
from rgbench.data.batches import Batch
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.train.lrm import LRM
from rgbench.train.rg_lcd import RGLCD
from tests.parity import tiny
from tests.tiny_trainers import assert_equal, backward, batch, loop, make, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("trainers") / "teacher")


@pytest.fixture
def models(folder) -> DiffusionModels:
    return tiny.models(folder)


def test_a_permuted_batch_permutes_every_loss(models):
    """Latents that lose their prompts on the way show up here, in the rewards and in the pairs."""
    order = [2, 0, 3, 1]
    trainer, plain = make("lrm", models), batch()
    shuffled = Batch(plain.images_BCHW[order], [plain.prompts[i] for i in order], [plain.ids[i] for i in order])
    draws = tiny.draws()
    draws.positions = order  # type: ignore[assignment]
    first, second = trainer.step(plain, tiny.draws()), trainer.step(shuffled, draws)
    for optimiser, terms in first.losses.items():
        for term, value in terms.items():
            assert torch.allclose(value[order], second.losses[optimiser][term], atol=1e-5), term
    for name, value in first.stats.items():
        assert torch.allclose(value[order], second.stats[name], atol=1e-5), name


class PromptReward:
    """A reward of the prompt alone: the image's mean brightness plus the prompt's own number."""

    name, differentiable, logit_scale = "prompt", True, 10.0

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, list[str]]] = []

    def fingerprint(self) -> dict:
        return {"name": self.name}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        self.calls.append((images, list(prompts)))
        numbers = torch.tensor([float(tiny.PROMPTS.index(p)) for p in prompts])
        return images.mean((1, 2, 3)) + numbers


def test_the_expert_labels_each_image_by_its_own_prompt(models):
    reward = PromptReward()
    trainer = LRM(tiny.recipe(), models, reward, tiny.proxy())
    prompts_of_proxy = []
    trainer.proxy.register_forward_hook(lambda module, inputs, output: prompts_of_proxy.append(inputs))
    sample = batch()
    trainer.step(sample, tiny.draws())
    (images, prompts), (latents, with_prompts) = reward.calls[0], prompts_of_proxy[-1]
    assert prompts == with_prompts == sample.prompts * 3
    decoded = decode_images(models.vae, latents)
    assert torch.equal(decoded, images)
    inputs = trainer.prepare(sample, tiny.draws())
    truth = decode_images(models.vae, inputs.latents / models.scaling_factor)
    assert torch.allclose(images[8:], truth, atol=1e-6), "the last third is the ground truth, in the batch's order"


@pytest.mark.parametrize("loss", ["kl", "smooth", "cross_entropy"])
def test_each_pair_loss_trains_the_proxy(models, loss):
    sections = {"loss": loss, "trainable": {"image_layers": "all", "text_layers": "all"}}
    trainer = make("lrm", models, proxy=sections)
    optimiser = torch.optim.AdamW(trainer.optimiser_groups()["proxy"].parameters, lr=3e-3)
    values = []
    for _ in range(12):
        result = trainer.step(batch(), tiny.draws())
        optimiser.zero_grad()
        backward(result, "proxy")
        optimiser.step()
        values.append(float(result.losses["proxy"]["pairs"].detach().mean()))
    assert values[-1] < 0.7 * values[0], values


def test_rewards_of_a_wrong_shape_do_not_pass(models, tmp_path):
    class Column(PromptReward):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return super().__call__(images, prompts)[:, None]

    trainer = RGLCD(tiny.recipe(), models, Column())
    with pytest.raises(RgbenchError, match=r"reward of the student has shape \(4, 1\)"):
        loop(trainer, tmp_path).train_step()


# ---- finiteness -------------------------------------------------------------------------


class BadReward(PromptReward):
    """NaN for one prompt, from the third step on; or infinite gradient with a finite value."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = super().__call__(images, prompts)
        if len(self.calls) < 3:
            return scores
        if self.how == "value":
            return scores * torch.tensor([float("nan")] + [1.0] * (len(prompts) - 1))
        return scores + (images.mean((1, 2, 3)) * 0).sqrt()


@pytest.mark.parametrize("how", ["value", "gradient"])
def test_what_is_not_finite_stops_the_run_unchanged(models, tmp_path, how):
    trainer = RGLCD(tiny.recipe(), models, BadReward(how))
    own = loop(trainer, tmp_path)
    for _ in range(2):
        own.train_step()
    adamw = own.updater.optimisers["student"]
    before, moments = state(trainer.student), adamw.state_dict()["state"][0]["exp_avg"].clone()
    first_id = own.load_batch(2).ids[0]
    what = {
        "value": f"loss term reward of the student is not finite for {first_id};",
        "gradient": "gradient of the student",
    }
    with pytest.raises(RgbenchError, match=f"step 2: .*{what[how]}") as caught:
        own.train_step()
    assert first_id in str(caught.value) and "no parameter was changed" in str(caught.value)
    assert_equal(state(trainer.student), before)
    assert torch.equal(adamw.state_dict()["state"][0]["exp_avg"], moments)
    assert own.step == 2
