"""The path of a flow, its steps and its fixed points, against diffusers and closed forms, in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.diffusion.consistency import consistency_function, guidance_embedding
from rgbench.diffusion.ddim import ddim_grid, ddim_jump, guided_ddim_step, jump
from rgbench.diffusion.sampling import even_timesteps, flow_grid
from rgbench.diffusion.schedule import FLOW, Flow, add_noise, predicted_eps, predicted_x0, prediction_of
from rgbench.models.families import SD3, SD3Denoiser, flow_scheduler, pack, read_flow, unpack
from rgbench.train.lcd import Inputs, Networks, distil
from rgbench.train.recipe import LCDSection
from tests.families import sd3
from tests.unit.test_diffusion import randn

SHIFT = 3.0  # of SD3
PATH = Flow.shifted(SHIFT)
GRID = ddim_grid(1000, 50).tolist()
C = 0.7  # standard deviation of the Gaussian world's data


def sigma(t: int) -> float:
    """σ_t by hand: the data at t = 0, else the shifted (t + 1)/1000."""
    return 0.0 if t == 0 else SHIFT * (t + 1) / (1000 + (SHIFT - 1) * (t + 1))


def close(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype == torch.float64 and bool((a - b).abs().max() <= 1e-10)


# ---- schedule ---------------------------------------------------------------------------


def test_the_path_leads_from_the_data_to_noise():
    assert PATH.sigmas[0] == 0 and PATH.sigmas[-1] == 1 and (PATH.sigmas.diff() > 0).all()
    assert [float(PATH.sigmas[t]) for t in GRID] == pytest.approx([sigma(t) for t in GRID], rel=1e-15)


@pytest.mark.parametrize(
    ("settings", "mu"),
    [({}, None), ({"shift": 3.0}, None), ({"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}, 0.63)],
)
def test_times_are_diffusers(settings, mu):
    """1000 σ that a network is told in each of 4 even steps, with fixed and with resolution-dependent shift."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    config = {**scheduler.config, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    tokens = 1024 if mu is None else round(256 + (mu - 0.5) * 3840 / 0.65)
    flow = read_flow(config, "scheduler_config.json", tokens)
    ours = flow.times(even_timesteps(4, 1000))
    assert torch.allclose(ours.float(), scheduler.timesteps, rtol=2e-5 if mu else 1e-6)
    assert flow_grid(4, 40) == [1.0, 0.75, 0.5, 0.25]
    again = flow_scheduler(config)
    again.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
    assert torch.equal(again.timesteps, scheduler.timesteps)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "cannot do few steps.*FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal is on"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas is on"),
    ],
)
def test_other_grids_are_refused(config, message):
    with pytest.raises(UsageError, match=message):
        read_flow(config, "scheduler_config.json", 64)


# ---- steps ------------------------------------------------------------------------------


def test_conversions_invert_the_path():
    latents, noise, t = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1), torch.tensor([0, 19, 999])
    noisy, velocity = add_noise(latents, noise, t, PATH), prediction_of(latents, noise, t, PATH, FLOW)
    for row, each in enumerate(t.tolist()):
        assert close(noisy[row], (1 - sigma(each)) * latents[row] + sigma(each) * noise[row])
    assert close(velocity, noise - latents)
    assert close(predicted_x0(velocity, noisy, t, PATH, FLOW), latents)
    assert close(predicted_eps(velocity, noisy, t, PATH, FLOW), noise)


def test_the_teachers_step_is_a_guided_euler_step():
    """z + (σ_n − σ_{n+k}) (c + w(c − u)) on the whole grid, and diffusers' own step without guidance."""
    start = torch.tensor(GRID)
    below = (start - 20).clamp(min=0)
    z, cond, uncond = (randn(50, 4, 2, 2, seed=s) for s in range(3))
    w = torch.linspace(0, 12, 50, dtype=torch.float64)
    ours = guided_ddim_step(cond, uncond, z, start, below, w, PATH, FLOW)
    for i, (t, s) in enumerate(zip(start.tolist(), below.tolist(), strict=True)):
        assert close(ours[i], z[i] + (sigma(s) - sigma(t)) * (cond[i] + w[i] * (cond[i] - uncond[i]))), t
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(sigmas=[1 - i / 50 for i in range(50)])
    plain = guided_ddim_step(cond, uncond, z, start, below, torch.zeros_like(w), PATH, FLOW)
    for i, t in enumerate(scheduler.timesteps):
        row = 49 - i
        theirs = scheduler.step(cond[row].float(), t, z[row].float()).prev_sample
        assert torch.allclose(plain[row].float(), theirs, atol=1e-5)


def test_the_consistency_function_is_the_identity_on_data_and_exact_on_the_path():
    latents, noise = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
    zero = torch.tensor([0, 0])
    assert torch.equal(consistency_function(noise, latents, zero, PATH, FLOW, 10.0), latents)
    t = torch.tensor([19, 999])
    assert close(
        consistency_function(noise - latents, add_noise(latents, noise, t, PATH), t, PATH, FLOW, 10.0), latents
    )
    assert close(jump(noise - latents, add_noise(latents, noise, t, PATH), t, zero, PATH, FLOW), latents)


def test_w_itself_is_told_where_a_network_embeds_it():
    assert guidance_embedding(torch.tensor([2.5, 4.0]), 1).tolist() == [[2.5], [4.0]]


def test_latents_are_packed_as_flux_packs_them():
    z = randn(2, 4, 6, 6)
    theirs = FluxPipeline._pack_latents(z, 2, 4, 6, 6)
    assert torch.equal(pack(z), theirs) and torch.equal(unpack(theirs, 3, 3), z)


# ---- the Gaussian world -----------------------------------------------------------------


class Velocity(nn.Module):
    """Predicts v = k_t z."""

    config = SimpleNamespace(time_cond_proj_dim=None)

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = nn.Parameter(factors.clone())

    def forward(self, latents: Tensor, timesteps: Tensor, **unused: object) -> tuple[Tensor]:
        return (self.factors[timesteps].view(-1, 1, 1, 1) * latents,)


def teacher_factors() -> Tensor:
    """E[ε − x | z] = (σ − α c²)/(α² c² + σ²) z of data N(0, c²)."""
    s = PATH.sigmas
    return (s - (1 - s) * C**2) / ((1 - s) ** 2 * C**2 + s**2)


def solved(teacher_steps: int) -> tuple[Velocity, Velocity]:
    """The student at the fixed point of the real step's loss, found from the lowest grid point up; and its teacher."""
    teacher, student = Velocity(teacher_factors()), Velocity(torch.zeros(1000, dtype=torch.float64))
    settings = LCDSection(loss="l2", teacher_steps=teacher_steps, time_cond_proj_dim=None)
    networks = Networks(teacher, student, student, PATH, FLOW)
    rows = torch.zeros(4, 1, 1, dtype=torch.float64)
    for index, t in enumerate(GRID):
        inputs = Inputs(
            latents=randn(4, 1, 2, 2),
            noise=randn(4, 1, 2, 2, seed=1),
            prompt_embeds=rows,
            uncond_embeds=rows,
            index=torch.full((4,), index),
            guidance_scale=torch.full((4,), 3.0, dtype=torch.float64),
        )
        slopes = []
        for value in (0.0, 1.0):
            student.factors.data[t] = value
            loss = distil(networks, settings, inputs).losses.sum()
            slopes.append(float(torch.autograd.grad(loss, student.factors)[0][t]))
        student.factors.data[t] = slopes[0] / (slopes[0] - slopes[1])
    return student, teacher


@pytest.mark.parametrize("teacher_steps", [1, 2])
def test_the_steps_fixed_point_is_the_teachers_own_path(teacher_steps):
    """1 − σ_t k_t = Π (1 + (σ_s − σ_t) K_t) over the Euler steps from t down to the data."""
    student, teacher = solved(teacher_steps)
    product = 1.0
    for t in GRID:
        below, at = max(t - 20, 0), t
        for i in range(1, teacher_steps + 1):
            to = t - round((t - below) * i / teacher_steps)
            product *= 1 + (sigma(to) - sigma(at)) * float(teacher.factors.data[at])
            at = to
        assert 1 - sigma(t) * float(student.factors.data[t]) == pytest.approx(product, rel=0, abs=1e-10), t


def test_more_steps_come_nearer_to_the_data():
    """The exact flow takes N(0, 1) to N(0, c²); Euler's steps come nearer with their number."""
    ends = []
    for num in (10, 50, 500):
        z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        teacher = Velocity(teacher_factors())
        for t, s in zip(grid := [*ddim_grid(1000, num).flip(0).tolist(), 0], grid[1:], strict=False):
            z = jump(teacher(z, torch.tensor([t]))[0], z, torch.tensor([t]), torch.tensor([s]), PATH, FLOW)
        ends.append(abs(float(z) - C))
    assert ends[1] < ends[0] / 4 and ends[2] < ends[1] / 8, "the error is of the first order"


def test_a_jump_is_the_straight_line():
    z, x0, eps = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1), randn(2, 4, 2, 2, seed=2)
    t = torch.tensor([499, 0])
    ours = ddim_jump(x0, eps, t, PATH)
    assert close(ours[0], (1 - sigma(499)) * x0[0] + sigma(499) * eps[0]) and torch.equal(ours[1], x0[1])
    assert torch.equal(jump(eps, z, t, t, PATH, FLOW), z)


# ---- rows that stand for T5 -------------------------------------------------------------


@pytest.fixture(scope="module")
def without_t5() -> Any:
    """SD3.5's form, with attention to the image alone, and no T5: what the family reads of it."""
    whole = sd3()
    torch.manual_seed(0)
    settings = {**whole.transformer.config, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    transformer = SD3Transformer2DModel.from_config(settings).double()
    for parameter in transformer.parameters():  # some begin as zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    parts = {**whole.components, "transformer": transformer, "text_encoder_3": None, "tokenizer_3": None}
    return SimpleNamespace(path="sd3", pipeline=StableDiffusion3Pipeline(**parts), device="cpu", schedule=PATH)


@torch.no_grad()
def encoded(models: Any) -> Tensor:
    return SD3().encode(models, ["a circle", ""]).double()


def denoised(models: Any, conditioning: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The prediction and its gradients."""
    network, generator = models.pipeline.transformer, torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator, dtype=torch.float64)
    network.zero_grad()
    prediction = SD3().denoiser(models, network)(latents, torch.tensor([10, 900]), conditioning)[0]
    prediction.pow(2).mean().backward()
    return prediction.detach(), [p.grad.clone() for p in network.parameters() if p.grad is not None]


def test_rows_of_zeros_are_computed_once_and_count_as_all(without_t5, monkeypatch):
    """In place of T5 the pipeline gives 256 of them; diffusers' own call of the network is what stays."""
    conditioning = encoded(without_t5)
    assert not conditioning[:, -257:-1].any() and conditioning[:, -258].any()
    found, gradients = denoised(without_t5, conditioning)
    monkeypatch.setattr(SD3Denoiser, "_runs_as_written", lambda self: False)
    wanted, wanted_gradients = denoised(without_t5, conditioning)
    assert close(found, wanted) and all(map(close, gradients, wanted_gradients))
    monkeypatch.setattr(math, "log", lambda copies: 0.0)
    monkeypatch.setattr(SD3Denoiser, "_runs_as_written", lambda self: True)
    assert not close(denoised(without_t5, conditioning)[0], wanted), "their number matters"


def test_a_network_that_computes_again_gets_all_rows(without_t5):
    """What gradient checkpointing computes in the backward pass, and what is compiled, sees no weights of keys."""
    conditioning, network = encoded(without_t5), without_t5.pipeline.transformer
    found, gradients = denoised(without_t5, conditioning)
    network.enable_gradient_checkpointing()
    again, gradients_again = denoised(without_t5, conditioning)
    network.disable_gradient_checkpointing()
    assert close(found, again) and all(map(close, gradients, gradients_again))
    network._compiled_call_impl = network._call_impl
    seen: list[int] = []  # text rows
    hook = network.register_forward_pre_hook(
        lambda _, __, said: seen.append(said["encoder_hidden_states"].shape[1]), with_kwargs=True
    )
    denoised(without_t5, conditioning)
    network._compiled_call_impl = None
    denoised(without_t5, conditioning)
    hook.remove()
    assert seen[0] - seen[1] == 255
