"""VSD and DOLLAR: slopes and fixed points in closed form, what they nest, two time scales, the small latent reward."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rgbench.core.errors import ConfigError, UsageError
from rgbench.core.launch import Ranks
from rgbench.core.run import RunDirectory
from rgbench.diffusion.schedule import alphas_sigmas, predicted_x0
from rgbench.models.pipeline import load_models
from rgbench.rewards.latent_regressor import LatentRegressor
from rgbench.train.base import OptimiserGroup
from rgbench.train.dollar import Dollar
from rgbench.train.lcd import Networks
from rgbench.train.loop import Updater
from rgbench.train.lrm import load_proxy
from rgbench.train.recipe import TrainSection, load_recipe
from rgbench.train.vsd import FIRST, LAST, VSD, denoised, load_origin, matching_losses
from tests import gaussian
from tests.gaussian import ALPHA, CUMPROD, SIGMA
from tests.parity import tiny
from tests.tiny_trainers import assert_equal, backward, batch, loop, make, state
from tests.unit.test_trainers import DecodedExpert

LIKE_LCD = {"ratio": 1, "scale": 0.0, "consistency": 1.0}  # where nothing of VSD is left
TIMES = torch.arange(FIRST, LAST + 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("dollar") / "teacher")


@pytest.fixture
def models(folder):
    return tiny.models(folder)


# ---- the gradient of VSD ----------------------------------------------------------------


class Gaussian(nn.Module):
    """Predicts the sample of data N(m·e, q²), e the first text state: x̂0 = m e + G_t (z − α_t m e)."""

    config = SimpleNamespace(time_cond_proj_dim=None)

    def __init__(self, mean: float, std: float = gaussian.C) -> None:
        super().__init__()
        self.mean, self.factors = mean, ALPHA * std**2 / (ALPHA**2 * std**2 + SIGMA**2)

    def forward(self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **unused) -> tuple[Tensor]:
        t, mean = timesteps.view(-1, 1, 1, 1), self.mean * encoder_hidden_states[:, :1, :1, None]
        return (mean + self.factors[t] * (latents - ALPHA[t] * mean),)


def difference(teacher: nn.Module, fake: nn.Module, x: Tensor, noise: Tensor, t: Tensor, w: float) -> Tensor:
    """x̂0_fake − x̂0_real of the real functions, (B, 1, 1, 1); the prompt's text state is 1, the empty prompt's 0."""
    networks = Networks(teacher, teacher, teacher, CUMPROD, "sample")  # type: ignore[arg-type]
    ones = torch.ones(len(t), 1, 1, dtype=torch.float64)
    inputs = SimpleNamespace(prompt_embeds=ones, uncond_embeds=0 * ones)
    scale = torch.full((len(t),), w, dtype=torch.float64)
    found, real = denoised(networks, fake, inputs, None, x, noise, t, scale)  # type: ignore[arg-type]
    return found - real


@pytest.mark.parametrize(("std", "slope"), [(0.5, -0.1344), (0.7, 0.0), (0.9, 0.1498)])
def test_the_slope_at_normal_data(std, slope):
    t = torch.tensor([499])
    x, noise = torch.tensor([[0.3, -1.1]], dtype=torch.float64).T.view(2, 1, 1, 1, 1)
    found = difference(Gaussian(0.0), Gaussian(0.0, std), x, noise, t, 3.0) / (ALPHA[499] * x + SIGMA[499] * noise)
    assert float(found) == pytest.approx(slope, abs=5e-5)
    assert std != gaussian.C or float(found) == 0.0, "the teacher itself has no gradient"


def test_descent_leads_to_the_teachers_spread():
    """x = q ε, with the fake at its optimum; both signs of ε and of the noise give the exact expectation."""
    q, signs = 0.4, torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    t = TIMES.repeat(4)
    eps, noise = (column.repeat_interleave(len(TIMES)).view(-1, 1, 1, 1) for column in signs.T)
    for _ in range(150):
        q -= 2 * float((difference(Gaussian(0.0), Gaussian(0.0, q), q * eps, noise, t, 0.0) * eps).mean())
    assert q == pytest.approx(gaussian.C, abs=1e-6)


def test_a_guided_teacher_draws_the_mean_to_its_own_and_a_linear_reward_beyond_it():
    mean, w, beta_h = 0.4, 2.5, 0.05
    zeros = torch.zeros(len(TIMES), 1, 1, 1, dtype=torch.float64)
    pull = 1 - ALPHA[TIMES] * gaussian.TEACHER[TIMES]

    def found(m: float) -> Tensor:
        return difference(Gaussian(mean), Gaussian(m), zeros + 0.7, zeros - 0.2, TIMES, w).flatten()

    assert found((1 + w) * mean).abs().max() < 1e-14
    assert torch.allclose(found(0.9), (0.9 - (1 + w) * mean) * pull, rtol=0, atol=1e-14)
    shift = beta_h / float(pull.mean())  # δ E[1 − α G] = β h
    assert float(found((1 + w) * mean + shift).mean()) == pytest.approx(beta_h, abs=1e-14)


def test_the_loss_has_this_gradient_normalised():
    generator = torch.Generator().manual_seed(0)
    x, fake, real = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(3))
    x.requires_grad_()
    losses = matching_losses(x, fake, real)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    wanted = (fake - real) / (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    assert torch.equal(gradient, wanted / 16)
    assert torch.allclose(losses, 0.5 * wanted.square().mean((1, 2, 3)))
    assert matching_losses(x, real, real).tolist() == [0.0] * 3
    assert matching_losses(real.clone().requires_grad_(), fake, real).isfinite().all(), "images that are perfect"


class Drawn:
    """The draws that a test chooses."""

    def __init__(self, timesteps: Tensor, noise: Tensor) -> None:
        self.timesteps, self.noise = timesteps, noise

    def integers(self, stream: str, high: int) -> Tensor:
        assert (stream, high) == ("fake_t", 1000)
        return self.timesteps

    def normal(self, stream: str, shape) -> Tensor:
        return self.noise


class Answer(nn.Module):
    """One number for every input."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, latents: Tensor, timesteps: Tensor, **unused) -> tuple[Tensor]:
        return (self.value.expand_as(latents),)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_fakes_optimum_at_two_modes_is_their_posterior_mean(kind):
    """Of images ±μ it is μ·tanh(αμz/σ²), whatever it predicts."""
    mu, z, t = 0.8, 0.4, torch.full((2,), 499)
    trainer = object.__new__(VSD)
    trainer.models = SimpleNamespace(denoiser=lambda network: network)  # type: ignore[assignment]
    trainer.fake = Answer()  # type: ignore[assignment]
    trainer.networks = Networks(None, None, None, CUMPROD, kind)  # type: ignore[arg-type]
    images = torch.tensor([mu, -mu], dtype=torch.float64).view(2, 1, 1, 1)
    alphas, sigmas = alphas_sigmas(CUMPROD, t, images)
    noise = (z - alphas * images) / sigmas
    density = (-(noise.flatten() ** 2) / 2).exp()
    begin, inputs, slopes = SimpleNamespace(w_embedding=None), SimpleNamespace(prompt_embeds=None), []
    for value in (0.0, 1.0):
        trainer.fake.value.data.fill_(value)
        losses = trainer.denoise(inputs, begin, images, Drawn(t, noise))["fake"]  # type: ignore[arg-type]
        slopes.append(float(torch.autograd.grad((losses * density).sum(), trainer.fake.value)[0]))
    best = torch.full_like(images[:1], slopes[0] / (slopes[0] - slopes[1]))
    found = predicted_x0(best, torch.full_like(best, z), t[:1], CUMPROD, kind)
    wanted = mu * math.tanh(float(ALPHA[499] * mu * z / SIGMA[499] ** 2))
    assert float(found) == pytest.approx(wanted, rel=0, abs=1e-10)


# ---- what they nest ---------------------------------------------------------------------


def trained(trainer, tmp_path, steps: int = 4):
    own = loop(trainer, tmp_path)
    for _ in range(steps):
        own.train_step()
    return trainer


@pytest.mark.parametrize("kind", ["vsd", "dollar"])
def test_without_their_own_terms_they_are_lcd(models, tmp_path, kind):
    lcd = trained(make("lcd", models), tmp_path / "lcd")
    sections = {"vsd": LIKE_LCD, "lcd": {"teacher_steps": 1}, "guidance": {"scale": 0.0}}
    other = trained(make(kind, models, **sections), tmp_path / kind)
    assert_equal(state(lcd.student), state(other.student))
    assert_equal(state(lcd.target), state(other.target))
    assert not torch.equal(other.fake.conv_out.weight, models.unet.conv_out.weight), "the fake learns all the same"


class Learning(DecodedExpert):
    """With a parameter in its scores, as the regression needs one, though of no influence."""

    def forward(self, latents, prompts):
        return super().forward(latents, prompts) + 0 * self.scale


def test_with_the_expert_as_its_proxy_it_is_rg_lcd(models, tmp_path, monkeypatch):
    monkeypatch.setattr("rgbench.train.lrm.open_source", lambda section: tiny.TinySource())
    direct = trained(make("rg_lcd", models), tmp_path / "direct")
    recipe = tiny.recipe("vsd", vsd=LIKE_LCD, lcd={"teacher_steps": 1}, proxy={"small": None})
    dollar = trained(Dollar(recipe, models, tiny.expert(), Learning(tiny.expert(), models)), tmp_path / "dollar")
    assert_equal(state(direct.student), state(dollar.student))


# ---- two time scales --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vsd", "dollar"])
def test_the_student_and_its_ema_move_at_the_last_step_of_a_cycle_alone(models, tmp_path, kind):
    trainer = make(kind, models, vsd={"ratio": 3}, train={"log_every": 3})
    own = loop(trainer, tmp_path)
    for step in range(6):
        before = {stem: state(module) for stem, module in trainer.modules().items()}
        values = own.train_step()
        moved = {stem for stem, module in trainer.modules().items() if any(
            not torch.equal(value, before[stem][name]) for name, value in state(module).items())}  # fmt: skip
        learners = {"fake", *(["proxy"] if kind == "dollar" else [])}
        assert moved == learners | ({"student", "target"} if step % 3 == 2 else set())
        terms = {key for key in values if key.startswith(("loss/", "grad_norm/"))}
        own_terms = {"loss/lcd", "loss/vsd", "grad_norm/student"}
        assert (own_terms <= terms) if step % 3 == 2 else not (own_terms & terms), "no mean over steps of both kinds"
    assert ("proxy_correlation" in values) == (kind == "dollar")


def test_a_run_resumes_before_the_student_ever_moved(folder, tmp_path):
    def begin(name: str):
        return loop(make("vsd", tiny.models(folder), vsd={"ratio": 3}, train={"log_every": 3}), tmp_path / name)

    straight, stopped = begin("straight"), begin("stopped")
    for run in (straight, stopped):
        run.run.create({}, {"step": 0})
    stopped.train_step()
    stopped.save()
    resumed = begin("stopped")
    resumed.restore()
    assert resumed.step == 1
    for run, steps in ((straight, 4), (resumed, 3)):
        for _ in range(steps):
            run.train_step()
    for stem, module in straight.trainer.modules().items():
        assert_equal(state(module), state(resumed.trainer.modules()[stem]))


def test_each_loss_reaches_its_own_network(models):
    trainer = make("dollar", models)
    networks = {"student": trainer.student, "fake": trainer.fake, "proxy": trainer.proxy}
    for name in networks:
        backward(trainer.step(batch(), tiny.draws(step=1)), name)
        reached = {key for key, each in networks.items() if any(p.grad is not None for p in each.parameters())}
        assert reached == {name}
        assert all(p.grad is not None for p in networks[name].parameters())
        networks[name].zero_grad(set_to_none=True)


def test_adapters_on_the_shared_teacher_are_a_fake_score(models, tmp_path):
    trainer = make("vsd", models, vsd={"lora": {"rank": 2}})
    shared = {value.data_ptr() for value in models.unet.state_dict().values()}
    own = {name for name, value in trainer.fake.state_dict().items() if value.data_ptr() not in shared}
    assert own == set(trainer.modules()["fake"].state_dict()) and any(".lora_" in name for name in own)
    before = state(models.unet)
    trained(trainer, tmp_path, 2)
    assert_equal(state(models.unet), before)


def test_an_optimiser_without_a_loss_rests_under_a_loss_scale():
    """float16's scaler refuses an optimiser without gradients."""
    layers = {name: nn.Linear(2, 1) for name in ("student", "fake")}
    groups = {name: OptimiserGroup(list(each.parameters()), 1e-2, TrainSection()) for name, each in layers.items()}
    updater = Updater(groups, "float16", Ranks(), "cpu")
    before = state(layers["student"])
    updater.scaler.scale(layers["fake"](torch.ones(3, 2)).sum()).backward()
    assert updater.reduce().keys() == {"fake"} and updater.step(0, finite=True) == ["fake"]
    assert_equal(state(layers["student"]), before)


# ---- the small latent reward ------------------------------------------------------------


def texts(prompts: list[str]) -> Tensor:
    """Three text states of each prompt."""
    rows = [torch.randn(3, 16, generator=torch.Generator().manual_seed(len(prompt))) for prompt in prompts]
    return torch.stack(rows)


def small(**options) -> LatentRegressor:
    torch.manual_seed(0)
    return LatentRegressor((4, 8, 8), 0.37, 16, **{"patch_size": 2, "width": 32} | options).reading(texts)


def test_it_reads_image_and_text():
    """Unlike the printed form, whose one key makes the softmax 1 for any image."""
    proxy, prompts = small(), ["a", "bb", "ccc"]
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    scores = proxy(latents, prompts)
    (gradient,) = torch.autograd.grad(scores.sum(), latents)
    assert scores.shape == (3,) and (gradient.abs().flatten(1).max(1).values > 1e-6).all()
    assert (proxy(latents, ["dddd", "bb", "ccc"]) - scores).abs().tolist()[0] > 1e-4
    shuffled = proxy(latents[[2, 0, 1]], [prompts[i] for i in (2, 0, 1)])
    assert torch.allclose(shuffled, scores[[2, 0, 1]], atol=1e-6)


def test_its_folder_is_of_the_same_latents_and_network_or_refused(tmp_path):
    proxy, latents = small(), torch.randn(2, 4, 8, 8)
    proxy.save(tmp_path / "whole")
    torch.manual_seed(1)
    again = LatentRegressor((4, 8, 8), 0.37, 16, patch_size=2, width=32).reading(texts)
    again.load_weights(tmp_path / "whole")
    assert torch.equal(again(latents, ["a", "bb"]), proxy(latents, ["a", "bb"]))
    other_vae = LatentRegressor((4, 8, 8), 0.13, 16, patch_size=2, width=32)
    with pytest.raises(UsageError, match=r"config\.json: latent_scale is 0\.37, not 0\.13"):
        other_vae.load_weights(tmp_path / "whole")
    with pytest.raises(UsageError, match=r"config\.json: patch_size is 2, not 4"):
        small(patch_size=4).load_weights(tmp_path / "whole")

    def spoilt(name: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / name))
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")
        (folder / "rgbench.sha256").unlink()
        return folder

    faults = {
        "missing": lambda state: state.pop("places"),
        "more": lambda state: state.update(extra=torch.zeros(1)),
        "whole numbers": lambda state: state.update(places=state["places"].to(torch.int8)),
        "shape": lambda state: state.update(places=state["places"].T.contiguous()),
    }
    for name, change in faults.items():
        with pytest.raises(UsageError, match=r"1 tensors are not those of config\.json: '(places|extra)'"):
            small().load_weights(spoilt(name, change))
    data = bytearray((tmp_path / "whole" / "model.safetensors").read_bytes())
    data[-3] ^= 1
    (tmp_path / "whole" / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="sha256"):
        small().load_weights(tmp_path / "whole")


@pytest.mark.parametrize(("shape", "text_width"), [((4, 64, 64), 768), ((4, 64, 64), 1024)])
def test_it_has_as_many_parameters_as_dollars(shape, text_width):
    num = sum(p.numel() for p in LatentRegressor(shape, 0.18215, text_width, patch_size=4, width=128).parameters())
    assert 0.2e6 < num < 0.8e6


def test_it_learns_a_linear_reward_and_its_gradient():
    proxy, direction = small(), torch.tensor([1.0, -0.5, 0.0, 0.2]).view(1, 4, 1, 1)
    generator, optimiser = torch.Generator().manual_seed(2), torch.optim.AdamW(proxy.parameters(), lr=3e-3)
    prompts = ["a", "bb"] * 32

    def drawn() -> Tensor:
        level = torch.randn(64, 4, 1, 1, generator=generator)
        return (level + 0.5 * torch.randn(64, 4, 8, 8, generator=generator)) / 0.37

    def expert(latents: Tensor) -> Tensor:
        return 0.37 * (latents * direction).mean((2, 3)).sum(1)

    for step in range(250):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / 250)
        latents = drawn()
        loss = (proxy(latents, prompts) - expert(latents)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    latents = drawn().requires_grad_()
    found, wanted = proxy(latents, prompts), expert(latents)
    assert float((found - wanted).square().mean().detach()) < 0.1 * float(wanted.var().detach())
    a, b = (torch.autograd.grad(values.sum(), latents)[0].mean((2, 3)) for values in (found, wanted))
    assert float(torch.cosine_similarity(a, b).mean()) > 0.9


def test_a_finished_runs_proxy_starts_another(models, tmp_path):
    trainer = make("dollar", models)
    with torch.no_grad():
        trainer.proxy.head.weight += 1
    saved = trainer.export_proxy(RunDirectory(tmp_path))
    recipe = tiny.recipe("vsd", proxy={"path": str(saved)})
    assert_equal(state(load_proxy(recipe, models)), state(trainer.proxy))
    with pytest.raises(UsageError, match=r"config\.json: (patch_size|width) is \d+, not \d+ as of this"):
        load_proxy(tiny.recipe("vsd", proxy={"path": str(saved), "small": {"width": 8}}), models)
    with pytest.raises(UsageError, match="small latent reward is needed"):
        load_proxy(tiny.recipe("vsd", proxy={"path": str(tmp_path)}), models)
    with pytest.raises(UsageError, match="no such folder; pre-train one with: rgbench train dollar_pretrain"):
        load_proxy(tiny.recipe("vsd", proxy={"path": str(tmp_path / "none")}), models)
    with pytest.raises(UsageError, match=r"patch_size 3: does not divide latents of \[8, 8\]"):
        load_proxy(tiny.recipe("vsd", proxy={"small": {"patch_size": 3}}), models)


# ---- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["lcd.time_cond_proj_dim=256"], r"vsd\.w: the student is told w"),
        (["train.log_every=3", "vsd.ratio=2"], r"train\.log_every 3: the student moves at multiples of vsd\.ratio 2"),
        (["train.steps=1"], r"train\.steps 1: the student first moves at step 2"),
        (["gradients.every=3", "train.log_every=1"], r"gradients\.every 3 is no multiple of vsd\.ratio 2"),
        (["proxy.loss=kl"], r"proxy\.loss"),
        (["proxy.trainable.text_layers=2"], "a small proxy learns whole"),
        (["proxy.small.width=20"], "width"),
        (["vsd.ratio=0"], r"vsd\.ratio"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe("dollar", overrides)


def test_a_small_proxy_serves_lrm_by_regression_alone():
    words = ["proxy.small={}", "proxy.trainable={}"]
    assert load_recipe("lrm", [*words, "proxy.loss=regression"]).proxy.small.width == 128
    with pytest.raises(ConfigError, match=r"loss kl: a small proxy has no logit scale"):
        load_recipe("lrm", words)


def test_a_fake_score_of_another_kind_is_refused(models, folder, tmp_path):
    def origin(path):
        return load_origin(tiny.recipe("vsd", vsd={"path": str(path)}), models)

    assert origin(folder) is not None and load_origin(tiny.recipe("vsd"), models) is None
    with pytest.raises(UsageError, match=r"vsd\.path .*: no such folder"):
        origin(tmp_path / "none")
    with pytest.raises(UsageError, match="predicts v_prediction, the teacher epsilon"):
        origin(tiny.save_pipeline(tmp_path / "v", "v_prediction"))
    with pytest.raises(UsageError, match="another noise schedule"):
        origin(tiny.save_pipeline(tmp_path / "noise", beta_end=0.02))
    changed = tiny.save_pipeline(tmp_path / "wide")
    unet = load_models(changed, "cpu", torch.float32).unet
    type(unet).from_config(dict(unet.config) | {"layers_per_block": 2}).save_pretrained(changed / "unet")
    with pytest.raises(UsageError, match=r"tensors are not the teacher's in shape, first"):
        origin(changed)
