"""What is computed from the networks' outputs under autocast: in float32, whatever the networks computed in."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rgbench.diffusion.ddim import ddim_jump, grid_timesteps
from rgbench.diffusion.schedule import add_noise, predicted_eps, predicted_x0
from rgbench.rewards.aesthetic import AestheticReward, make_head
from rgbench.rewards.base import CallableReward, score
from rgbench.rewards.clip import PickScoreReward
from rgbench.rewards.latent_proxy import contrastive_losses, pair_losses
from rgbench.train.base import autocast
from rgbench.train.lcd import LCD, distil
from rgbench.train.recipe import WeightedRecipe
from rgbench.train.weighted import Weighted
from tests.clip_folder import save_clip
from tests.parity import tiny
from tests.tiny_trainers import DIRECT, PLAIN, THROUGH_PROXY, batch, make

PROMPTS = tiny.PROMPTS[:4]
HALVES = ["bfloat16", "float16"]


def images(seed: int = 0) -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.mark.parametrize("kind", ["hps", "pickscore", "proxy"])
@pytest.mark.parametrize("dtype", HALVES)
def test_cosines_are_not_rounded(clip_folder, kind, dtype):
    """Each is within 1e-6 of float64's of the features that the network gave; bfloat16 is off by up to 1e-3."""
    reward = {
        "hps": tiny.expert,
        "pickscore": lambda: PickScoreReward.load(clip_folder, antialias=True, device="cpu"),
        "proxy": tiny.proxy,
    }[kind]()
    features: list[Tensor] = []
    model = reward.clip if kind == "proxy" else reward.model
    heads = ("get_image_features", "get_text_features") if kind == "pickscore" else ("encode_image", "encode_text")
    for name in heads:
        original = getattr(model, name)

        def spy(*args, original=original, **options):
            features.append(original(*args, **options))
            return features[-1]

        setattr(model, name, spy)
    given = torch.randn(4, 4, 8, 8) if kind == "proxy" else images()
    with torch.no_grad(), autocast(dtype, "cpu"):
        scores = reward(given, PROMPTS)
    found = [getattr(output, "pooler_output", output).double() for output in features]
    wanted = torch.nn.functional.cosine_similarity(*found, eps=0)
    assert scores.dtype == torch.float32 and (scores - wanted).abs().max() <= 1e-6
    assert (wanted.to(getattr(torch, dtype)) - wanted).abs().max() > 1e-5, "what rounding would have cost"


def test_labels_of_a_function_keep_differences_of_a_thousandth():
    """0.2713 and 0.2721 are one number in bfloat16, and the odds of a preference at a logit scale of 100 are 1.08."""
    values = [0.2713, 0.2721, 0.2717]
    reward = CallableReward(lambda images, prompts: values, "function", fingerprint={})
    scores = score(reward, images()[:3].bfloat16(), PROMPTS[:3])
    assert scores.dtype == torch.float32 and torch.equal(scores, torch.tensor(values))
    logits = 100 * scores[:, None]
    loss, agreement = pair_losses(logits, logits.flip(0)[[0, 2, 1]], "kl")
    assert float(loss) > 1e-4 and float(agreement) < 1
    assert torch.tensor(values).bfloat16().unique().numel() == 1


def test_a_plug_ins_half_precision_ends_at_its_score():
    class Half:
        name, differentiable = "half", True

        def __call__(self, images, prompts):
            return images.mean((1, 2, 3))

    assert score(Half(), images().bfloat16(), PROMPTS).dtype == torch.float32


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_ratings_are_not_rounded(clip_folder, tmp_path, head):
    torch.manual_seed(1)
    module = make_head(head, 12)
    with torch.no_grad():
        list(module.parameters())[-1].fill_(5.0)
    torch.save(module.state_dict(), tmp_path / "head.pth")
    reward = AestheticReward.load(clip_folder, head=head, head_path=tmp_path / "head.pth", antialias=True, device="cpu")
    with torch.no_grad(), autocast("bfloat16", "cpu"):
        scores = reward(images(), PROMPTS)
    assert scores.dtype == torch.float32 and scores.unique().numel() == 4
    assert scores.bfloat16().unique().numel() < 4, "ratings of 5 are 0.03 apart there"


def test_contrastive_logits_are_not_rounded():
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.nn.functional.normalize(torch.randn(8, 32, generator=generator), dim=1) for _ in range(2))
    plain, _ = contrastive_losses(one, other, torch.tensor(100.0), list("abcdefgh"))
    with autocast("bfloat16", "cpu"):
        losses, _ = contrastive_losses(one, other, torch.tensor(100.0), list("abcdefgh"))
    assert torch.equal(losses, plain)


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def teacher(request, tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp(request.param) / "teacher", request.param)


class Replay(torch.nn.Module):
    """Gives a network's outputs once more, in float64."""

    def __init__(self, network: torch.nn.Module, outputs: list[Tensor]) -> None:
        super().__init__()
        self.config, self.outputs = network.config, outputs

    def forward(self, *given, **options):
        return (self.outputs.pop(0).double(),)


def recorded(network: torch.nn.Module) -> list[Tensor]:
    outputs: list[Tensor] = []
    network.register_forward_hook(lambda module, given, output: outputs.append(output[0].detach()))
    return outputs


DISTILLATIONS = {
    "lcd": {},
    "two jumps of the teacher": {"lcd": {"teacher_steps": 2}},
    "tcd": {},
    "tcd, to the next point": {"tcd": {"s": "next"}},
    "mlcm": {},
    "mlcm, in x0": {"mlcm": {"space": "x0", "weight": "snr", "target": "ema"}},
    "weighted": {"weighted": {"share": 0.5}},
}


def own_trainer(name: str, models, dtype: str):
    kind, sections = name.partition(",")[0], DISTILLATIONS[name]
    if kind == "weighted":
        values = tiny.recipe(train={"dtype": dtype}).model_dump(mode="json")
        values = {key: values[key] for key in ("name", "train", "model")}
        values |= {"kind": kind, "sampling": {"steps": 2}, "data": {"kind": "teacher", "path": "unused"}, **sections}
        return Weighted(WeightedRecipe.model_validate(values, strict=False), models)
    if kind == "mlcm":
        sections = {"mlcm": {"stages": [{"segments": 4}], **sections.get("mlcm", {})}}
    return make(kind if kind in PLAIN else "lcd", models, train={"dtype": dtype}, **sections)


@pytest.mark.parametrize("name", DISTILLATIONS)
def test_what_a_distillation_computes_of_half_precision_is_float32(teacher, name):
    """Predictions, z_n, targets and losses are within float32's rounding of float64's of the same network outputs."""
    trainer = own_trainer(name, tiny.models(teacher), "bfloat16")
    networks = trainer.networks
    parts = {"teacher": networks.teacher, "student": networks.student, "target": networks.target}
    outputs = {part: recorded(network) for part, network in parts.items()}
    with autocast("bfloat16", "cpu"):
        inputs = trainer.prepare(batch(), tiny.draws())
        found = trainer.distil(inputs)
    assert {output.dtype for each in outputs.values() for output in each} == {torch.bfloat16}
    wide = {
        key: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for key, v in vars(inputs).items()
    }
    replays = {part: Replay(network, outputs[part]) for part, network in parts.items()}
    trainer.networks = replace(networks, schedule=networks.schedule.double(), **replays)
    wanted = trainer.distil(type(inputs)(**wide))
    for part in ("noisy", "prediction", "previous", "target", "losses"):
        value, exact = getattr(found, part).detach(), getattr(wanted, part).detach()
        assert value.dtype == torch.float32 and exact.dtype == torch.float64, part
        # a difference of nearly equal numbers, where the distance is measured at x0, keeps fewer digits
        assert (value - exact).abs().max() <= 2e-5 * exact.abs().max(), part
    assert not any(outputs.values()), "each output was used once"


@pytest.mark.parametrize("kind", [*DIRECT, *THROUGH_PROXY])
def test_rewards_of_half_precision_are_float32(teacher, kind):
    """Scores and loss terms, with the reward's gradient at a share of the distillation's."""
    options = {"guidance": {"scale": None, "share": 0.5}, "train": {"dtype": "bfloat16"}}
    trainer = make(kind, tiny.models(teacher), **options)
    with autocast("bfloat16", "cpu"):
        result = trainer.step(batch(), tiny.draws())
    values = {**result.stats, **{f"{k}/{name}": v for k, terms in result.losses.items() for name, v in terms.items()}}
    halves = [name for name, value in values.items() if value.dtype in (torch.bfloat16, torch.float16)]
    assert not halves and {"reward", "student/lcd", "student/reward"} <= values.keys()


@pytest.mark.parametrize("dtype", HALVES)
def test_guidance_and_jump_are_float32(teacher, dtype):
    """z_n within 1e-6 of what float64 makes of the teacher's half-precision outputs, at w up to 6.

    The network's own error, which the guidance multiplies by 1 + w, stays; its arithmetic adds nothing to it.
    """
    recipe = tiny.recipe(train={"dtype": dtype})
    trainer = LCD(recipe, tiny.models(teacher))
    outputs: list[Tensor] = []
    trainer.models.unet.register_forward_hook(lambda module, given, output: outputs.append(output[0]))
    with autocast(dtype, "cpu"):
        inputs = trainer.prepare(batch(), tiny.draws())
        found = distil(trainer.networks, recipe.lcd, inputs)
    assert outputs[0].dtype == getattr(torch, dtype) and inputs.latents.dtype == torch.float32
    cumprod, kind = trainer.networks.schedule.double(), trainer.networks.prediction_type
    start, end = grid_timesteps(inputs.index, 1000, 50)
    noisy = add_noise(inputs.latents.double(), inputs.noise.double(), start, cumprod)
    w = inputs.guidance_scale.double()[:, None, None, None]

    def previous(cond: Tensor, uncond: Tensor, noisy: Tensor, cumprod: Tensor) -> Tensor:
        parts = []
        for predicted in (predicted_x0, predicted_eps):
            c, u = (predicted(output, noisy, start, cumprod, kind) for output in (cond, uncond))
            parts.append(c + w.to(c.dtype) * (c - u))
        return ddim_jump(*parts, end, cumprod)

    wanted = previous(*outputs[0].double().chunk(2), noisy, cumprod)
    assert found.previous.dtype == torch.float32
    assert (found.previous - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    for part in (found.prediction, found.target, found.losses):
        assert part.dtype == torch.float32
