"""Students of real UNet layouts: whole or through adapters, their targets, and what they share."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.models.families import LCM_LORA_MODULES
from rgbench.models.student import Learned, is_lora, lora_state, make_lora_student, make_student, merged, present
from rgbench.train.lcd import ema_update
from tests import sd_folders

of_one_layout = pytest.mark.parametrize("teacher", ["sd15"], indirect=True)


@pytest.fixture(params=["sd15", "sd21"], scope="module")
def teacher(request) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return sd_folders.unet(request.param).requires_grad_(False).eval()


def lora(teacher: UNet2DConditionModel, dim: int | None = 16, seed: int = 0, **options) -> UNet2DConditionModel:
    settings = {"rank": 4, "alpha": 4, "modules": present(teacher, LCM_LORA_MODULES)} | options
    return make_lora_student(teacher, dim, seed=seed, **settings)


@torch.no_grad()  # with gradient other kernels may run, whose rounding differs
def call(unet: UNet2DConditionModel, told: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    z, embeds = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 32, 16, generator=generator)
    w = torch.randn(2, 16, generator=generator) if told else None
    return unet(z, torch.tensor([19, 999]), encoder_hidden_states=embeds, timestep_cond=w, return_dict=False)[0]


def move(unet: UNet2DConditionModel) -> None:
    """Change everything that learns."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def storages(unet: UNet2DConditionModel) -> set[int]:
    return {value.data_ptr() for value in unet.state_dict().values()}


@pytest.mark.parametrize("dim", [16, None])
def test_every_student_begins_as_the_teacher(teacher, dim):
    theirs = call(teacher, told=False)
    for student in (make_student(teacher, dim), lora(teacher, dim)):
        assert torch.allclose(call(student, told=dim is not None), theirs, atol=1e-5)


@of_one_layout
def test_a_whole_student_shares_nothing(teacher):
    student, target = make_student(teacher, 16), make_student(teacher, 16).requires_grad_(False)
    assert not storages(student) & storages(teacher) and not storages(student) & storages(target)
    assert all(p.requires_grad for p in student.parameters())
    assert not is_lora(student) and merged(student) is student


def test_adapters_are_lcm_loras(teacher):
    """On each layer that LCM-LoRA adapts, and on nothing else."""
    student = lora(teacher)
    learned = {name for name, p in student.named_parameters() if p.requires_grad}
    bases = {name.rsplit(".lora_", 1)[0] for name in learned if ".lora_" in name}
    expected = {
        name
        for name, layer in teacher.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
        and any(name.endswith(f".{module}") for module in LCM_LORA_MODULES)
    }
    assert bases == expected and len(bases) > 40
    assert learned - {n for n in learned if ".lora_" in n} == {"time_embedding.cond_proj.weight"}
    assert all(p.shape[0] == 4 for n, p in student.named_parameters() if ".lora_A" in n)


def test_a_lora_student_shares_the_frozen_weights(teacher):
    student, target = lora(teacher), lora(teacher).requires_grad_(False)
    shared = storages(teacher)
    assert shared <= storages(student) and shared <= storages(target)
    own = {p.data_ptr() for p in student.parameters() if p.requires_grad}
    assert own == storages(student) - shared and not own & storages(target)


@of_one_layout
def test_the_target_follows_what_is_learned(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student, target = lora(teacher), lora(teacher).requires_grad_(False)
    start = {name: value.clone() for name, value in Learned(target, student).state_dict().items()}
    move(student)
    ema_update(target, student, 0.25)
    now = student.state_dict()
    for name, value in Learned(target, student).state_dict().items():
        assert torch.allclose(value, 0.25 * start[name] + 0.75 * now[name], atol=1e-6), name
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@of_one_layout
def test_alpha_scales_what_the_adapters_add(teacher):
    theirs = call(teacher, told=False)
    added = []
    for alpha in (4, 2):
        student = lora(teacher, dim=None, alpha=alpha, modules=["conv2"])
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if ".lora_B" in name:
                    parameter.fill_(1e-4)
        added.append(call(student, told=False) - theirs)
    assert torch.allclose(added[1], added[0] / 2, atol=1e-2 * float(added[0].abs().max()))
    assert added[0].abs().max() > 0


@of_one_layout
def test_adapters_follow_the_seed_alone(teacher):
    torch.manual_seed(1)
    first, state = lora(teacher, seed=3), torch.get_rng_state()
    torch.manual_seed(9)
    second, other = lora(teacher, seed=3), lora(teacher, seed=4)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()), "the global generator is left alone"
    a, b, c = (lora_state(unet) for unet in (first, second, other))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_merging_keeps_the_images_and_the_teacher(teacher):
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = lora(teacher, alpha=2)
    move(student)
    expected = call(student)
    plain = merged(student)
    assert not is_lora(plain) and plain.state_dict().keys() == make_student(teacher, 16).state_dict().keys()
    assert torch.allclose(call(plain), expected, atol=1e-4)
    assert torch.equal(call(student), expected), "the student itself is untouched"
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@of_one_layout
def test_a_checkpoint_holds_what_was_learned(teacher):
    student, other = lora(teacher), lora(teacher, seed=5)
    move(student)
    state = Learned(student, student).state_dict()
    assert sum(v.numel() for v in state.values()) < sum(v.numel() for v in teacher.state_dict().values())
    Learned(other, other).load_state_dict(state)
    assert torch.equal(call(other), call(student))
    first, *_ = state
    with pytest.raises(RgbenchError, match="other learned weights"):
        Learned(other, other).load_state_dict({name: value for name, value in state.items() if name != first})


def test_wrong_layers_and_teachers_are_refused(teacher):
    with pytest.raises(UsageError, match=r"lora\.modules: no layer of this UNet is named 'to_z'.*to_k"):
        lora(teacher, modules=["to_q", "to_z"])
    with pytest.raises(UsageError, match="distilled student"):
        lora(make_student(teacher, 16))
