"""The trainers' steps: nesting, shared randomness, where gradient goes, and which prompt belongs to which latents."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from rgbench.core.errors import RgbenchError
from rgbench.core.process import StopRequest
from rgbench.models.pipeline import DiffusionModels, decode_images
from rgbench.rewards.clip import HPSReward
from rgbench.train.lcd import ema_update
from tests.parity import tiny
from tests.tiny_trainers import (
    DIRECT,
    KINDS,
    OF_TWO_TIME_SCALES,
    PLAIN,
    SCORED,
    THROUGH_PROXY,
    assert_equal,
    backward,
    batch,
    distillation_of,
    loop,
    make,
    state,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("trainers") / "teacher")


@pytest.fixture
def models(folder) -> DiffusionModels:
    return tiny.models(folder)


# ---- nesting and shared randomness ------------------------------------------------------


@pytest.mark.parametrize(("plain", "guided"), [*zip(PLAIN, DIRECT, strict=True)])
def test_without_its_reward_it_is_the_plain_method(models, tmp_path, plain, guided):
    lcd, direct = make(plain, models), make(guided, models, guidance={"scale": 0.0})
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


@pytest.mark.parametrize(("guided", "learned"), [*zip(DIRECT, THROUGH_PROXY, strict=True)])
def test_with_the_expert_as_its_proxy_it_is_the_direct_method(models, tmp_path, guided, learned):
    direct, recipe = make(guided, models), tiny.recipe(distillation_of(learned))
    through = THROUGH_PROXY[learned](recipe, models, tiny.expert(), DecodedExpert(tiny.expert(), models))
    for trainer in (direct, through):
        own = loop(trainer, tmp_path)
        for _ in range(10):
            own.train_step()
    assert_equal(state(direct.student), state(through.student))
    assert_equal(state(direct.target), state(through.target))


def test_all_methods_see_the_same_draws(models):
    inputs = [make(kind, models).prepare(batch(), tiny.draws()) for kind in KINDS]
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


@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_the_student_alone(models, kind):
    trainer = make(kind, models)
    result = trainer.step(batch(), tiny.draws(step=1))  # in which all move
    backward(result, "student")
    assert all(p.grad is not None for p in trainer.student.parameters())
    others = [trainer.target, models.unet, models.vae, models.text_encoder]
    others += [trainer.expert.model] if kind in SCORED else []
    others += [trainer.proxy] if SCORED.get(kind, 0) > 1 else []
    others += [trainer.fake] if kind in OF_TWO_TIME_SCALES else []
    assert all(p.grad is None for module in others for p in module.parameters())


def test_the_proxys_loss_reaches_its_trainable_parameters_alone(models):
    trainer = make("lrm", models)
    backward(trainer.step(batch(), tiny.draws()), "proxy")
    assert all(p.grad is None for p in trainer.student.parameters())
    learning = {id(p) for p in trainer.optimiser_groups()["proxy"].parameters}
    assert all((p.grad is not None) == (id(p) in learning) for p in trainer.proxy.parameters())


def test_the_proxys_reward_moves_the_student(models):
    gradients = []
    for scale in (0.0, 5.0):
        trainer = make("lrm", models, guidance={"scale": scale})
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


def test_a_lack_of_gpu_memory_is_explained(folder, tmp_path, monkeypatch):
    running = loop(make("lcd", tiny.models(folder)), tmp_path)

    def step(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(running.trainer, "step", step)
    said = r"step 0: .* \(CUDA out of memory\); use .*gradient_accumulation_steps"
    with StopRequest() as stop, pytest.raises(RgbenchError, match=said):
        running.train(stop, "rgbench train again")


def test_many_large_images_are_decoded_in_parts(folder, monkeypatch):
    models, parts = tiny.models(folder), []
    models.vae.decoder.register_forward_pre_hook(lambda module, given: parts.append(len(given[0])))
    latents = torch.randn(5, *models.latent_shape)
    whole = models.decode(latents)
    monkeypatch.setattr("rgbench.models.pipeline.DECODED_PIXELS", 2 * models.resolution**2)
    assert torch.allclose(models.decode(latents), whole, atol=1e-5)
    assert parts == [5, 2, 2, 1]
