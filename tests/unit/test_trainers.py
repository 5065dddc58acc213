"""The trainers' steps: nesting, shared randomness, where gradient goes, and which prompt belongs to which latents."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rgbench.data.contract import Batch
from rgbench.errors import RgbenchError
from rgbench.models import DiffusionModels, decode_images
from rgbench.rewards.hps import HPSReward
from rgbench.run import RunDirectory
from rgbench.trainers.contract import Trainer
from rgbench.trainers.lcd import LCD, ema_update
from rgbench.trainers.loop import Loop
from rgbench.trainers.lrm import LRM
from rgbench.trainers.rg_lcd import RGLCD
from tests.parity import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("trainers") / "teacher")


@pytest.fixture
def models(folder) -> DiffusionModels:
    return tiny.models(folder)


def make(kind: str, models: DiffusionModels, **sections) -> Trainer:
    recipe = tiny.recipe(**sections)
    if kind == "lcd":
        return LCD(recipe, models)
    if kind == "rg_lcd":
        return RGLCD(recipe, models, tiny.expert())
    return LRM(recipe, models, tiny.expert(), tiny.proxy())


def batch() -> Batch:
    return tiny.TinySource().load([3, 1, 4, 8])


def loop(trainer: Trainer, tmp_path) -> Loop:
    return Loop(trainer, tiny.TinySource(), trainer.recipe, RunDirectory(tmp_path))  # type: ignore[attr-defined]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


# ---- nesting and shared randomness ------------------------------------------------------


def test_rg_lcd_without_reward_is_lcd(models, tmp_path):
    lcd, direct = make("lcd", models), make("rg_lcd", models, reward={"scale": 0.0})
    for trainer in (lcd, direct):
        own = loop(trainer, tmp_path)
        for _ in range(10):
            own.train_step()
    assert_equal(state(lcd.student), state(direct.student))
    assert_equal(state(lcd.target), state(direct.target))


class DecodedExpert(nn.Module):
    """The expert behind the latent reward's contract: decodes, then scores; learns nothing but a logit scale."""

    def __init__(self, expert: HPSReward, models: DiffusionModels) -> None:
        super().__init__()
        self.expert, self.decoder = expert, models.vae
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.expert(decode_images(self.decoder, latents), prompts)

    def logit_scale(self) -> Tensor:
        return self.scale.exp()

    def clamp_logit_scale(self) -> None:
        pass

    def unfreeze(self, image_layers: int | str, text_layers: int | str) -> list[nn.Parameter]:
        return [self.scale]


def test_lrm_with_the_expert_as_its_proxy_is_rg_lcd(models, tmp_path):
    direct, recipe = make("rg_lcd", models), tiny.recipe()
    through = LRM(recipe, models, tiny.expert(), DecodedExpert(tiny.expert(), models))
    for trainer in (direct, through):
        own = loop(trainer, tmp_path)
        for _ in range(10):
            own.train_step()
    assert_equal(state(direct.student), state(through.student))
    assert_equal(state(direct.target), state(through.target))


def test_all_methods_see_the_same_draws(models):
    inputs = [make(kind, models).prepare(batch(), tiny.draws()) for kind in ("lcd", "rg_lcd", "lrm")]
    for name in ("latents", "noise", "prompt_embeds", "index", "guidance_scale"):
        first, *others = [getattr(i, name) for i in inputs]
        assert all(torch.equal(first, other) for other in others), name
    assert inputs[0].index.unique().numel() > 1 and inputs[0].guidance_scale.unique().numel() == 4
    assert (inputs[0].guidance_scale >= 2).all() and (inputs[0].guidance_scale < 6).all()


def test_draws_depend_on_the_position_in_the_global_batch_alone():
    whole, part = tiny.draws(step=3, num=6), tiny.StepDraws(0, 3, 2, first=4)
    assert torch.equal(whole.normal("noise", (4, 2, 2))[4:], part.normal("noise", (4, 2, 2)))
    assert torch.equal(whole.integers("index", 50)[4:], part.integers("index", 50))
    assert torch.equal(whole.uniform("w", 2.0, 6.0)[4:], part.uniform("w", 2.0, 6.0))
    assert not torch.equal(whole.normal("noise", (4,)), whole.normal("vae", (4,)))
    assert not torch.equal(whole.normal("noise", (4,)), tiny.draws(step=4, num=6).normal("noise", (4,)))


@pytest.mark.parametrize("kind", ["lcd", "rg_lcd", "lrm"])
def test_a_step_changes_nothing(models, kind):
    trainer = make(kind, models)
    before = {stem: state(module) for stem, module in trainer.modules().items()}
    random_state = torch.get_rng_state()
    first, second = (trainer.step(batch(), tiny.draws()) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    for stem, module in trainer.modules().items():
        assert_equal(state(module), before[stem])
    for optimiser, terms in first.losses.items():
        for term, value in terms.items():
            assert value.shape == (4,) and value.requires_grad
            assert torch.equal(value, second.losses[optimiser][term])
    assert all(value.shape == (4,) and not value.requires_grad for value in first.stats.values())


# ---- gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [True, False])
def test_reward_through_the_decoder_against_finite_differences(folder, antialias):
    models, expert = tiny.models(folder, torch.float64), tiny.expert(antialias, torch.float64)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64).requires_grad_()
    direction = torch.randn(2, 4, 8, 8, generator=generator, dtype=torch.float64)

    def reward(z: Tensor) -> Tensor:
        return expert(decode_images(models.vae, z / models.scaling_factor), tiny.PROMPTS[:2]).sum()

    (gradient,) = torch.autograd.grad(reward(latents), latents)
    step = 1e-5
    with torch.no_grad():
        difference = (reward(latents + step * direction) - reward(latents - step * direction)) / (2 * step)
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-4
    assert float(difference) == pytest.approx(slope, rel=1e-5)


def backward(result, optimiser: str) -> None:
    torch.stack([term.mean() for term in result.losses[optimiser].values()]).sum().backward()


@pytest.mark.parametrize("kind", ["lcd", "rg_lcd", "lrm"])
def test_gradient_reaches_the_student_alone(models, kind):
    trainer = make(kind, models)
    result = trainer.step(batch(), tiny.draws())
    backward(result, "student")
    assert all(p.grad is not None for p in trainer.student.parameters())
    others = [trainer.target, models.unet, models.vae, models.text_encoder]
    others += [trainer.expert.model] if kind != "lcd" else []
    others += [trainer.proxy] if kind == "lrm" else []
    assert all(p.grad is None for module in others for p in module.parameters())


def test_the_proxys_loss_reaches_its_trainable_parameters_alone(models):
    trainer = make("lrm", models)
    backward(trainer.step(batch(), tiny.draws()), "proxy")
    assert all(p.grad is None for p in trainer.student.parameters())
    learning = {id(p) for p in trainer.learners()["proxy"].parameters}
    assert all((p.grad is not None) == (id(p) in learning) for p in trainer.proxy.parameters())


def test_the_proxys_reward_moves_the_student(models):
    gradients = []
    for scale in (0.0, 5.0):
        trainer = make("lrm", models, reward={"scale": scale})
        backward(trainer.step(batch(), tiny.draws()), "student")
        gradients.append(trainer.student.conv_out.weight.grad.clone())
    assert (gradients[0] - gradients[1]).abs().max() > 1e-4


def test_exactly_what_learns_moves(models, tmp_path):
    trainer = make("lrm", models)
    parts = {"teacher": models.unet, "vae": models.vae, "text": models.text_encoder, "expert": trainer.expert.model}
    frozen = {name: state(module) for name, module in parts.items()}
    student, proxy = state(trainer.student), state(trainer.proxy)
    own = loop(trainer, tmp_path)
    for _ in range(3):
        own.train_step()
    for name, module in parts.items():
        assert_equal(state(module), frozen[name])
    assert not [n for n, v in trainer.student.state_dict().items() if torch.equal(v, student[n])]
    moved = {n for n, v in trainer.proxy.state_dict().items() if not torch.equal(v, proxy[n])}
    prefixes = (
        "visual.transformer.resblocks.1.",
        "visual.ln_post",
        "visual.proj",
        "transformer.resblocks.1.",
        "ln_final",
    )
    prefixes += ("text_projection", "logit_scale")
    assert moved == {n for n in proxy if n.removeprefix("clip.").startswith(prefixes)}


def test_the_ema_is_exact(models, tmp_path):
    trainer = make("lcd", models, train={"ema_decay": 0.9})
    before = state(trainer.target)
    loop(trainer, tmp_path).train_step()
    for name, value in trainer.target.state_dict().items():
        assert torch.allclose(value, 0.9 * before[name] + 0.1 * trainer.student.state_dict()[name], atol=1e-7)
    target, student = nn.Linear(2, 2), nn.Linear(2, 2)
    ema_update(target, student, 0.0)
    assert_equal(state(target), state(student))


# ---- latents and their prompts ----------------------------------------------------------


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
    optimiser = torch.optim.AdamW(trainer.learners()["proxy"].parameters, lr=3e-3)
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
    before, moments = state(trainer.student), own.optimisers["student"].state_dict()["state"][0]["exp_avg"].clone()
    first_id = own.load_batch(2).ids[0]
    what = {
        "value": f"loss term reward of the student is not finite for {first_id};",
        "gradient": "gradient of the student",
    }
    with pytest.raises(RgbenchError, match=f"step 2: .*{what[how]}") as caught:
        own.train_step()
    assert first_id in str(caught.value) and "no parameter was changed" in str(caught.value)
    assert_equal(state(trainer.student), before)
    assert torch.equal(own.optimisers["student"].state_dict()["state"][0]["exp_avg"], moments)
    assert own.step == 2
