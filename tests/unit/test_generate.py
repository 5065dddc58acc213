"""Generation: a pure function of (prompt id, seed), the same as diffusers', and clear about bad settings."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.data.prompts import Prompt, benchtop_prompts
from rgbench.diffusion.consistency import boundary_scalings, guidance_embedding
from rgbench.diffusion.schedule import alphas_sigmas
from rgbench.evaluate.images import ImageStream, Sampling, fitting_batch_size, noise_seed, settle_sampling
from rgbench.evaluate.targets import Target
from rgbench.models.pipeline import DiffusionModels, load_models
from rgbench.models.student import sampled_as
from tests.tiny_models import BENCHTOP, save_pipeline

PROMPTS = benchtop_prompts(11).prompts
SETTINGS = {"lcm": Sampling("lcm", 2, 5.0), "ddim": Sampling("ddim", 3, 3.0)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_pipeline(root / name, student=name == "lcm") for name in SETTINGS}
    return {name: load_models(folder, "cpu", torch.float32) for name, folder in folders.items()}


def images(models, sampling: Sampling, prompts=PROMPTS, seed: int = 0, batch_size: int = 4) -> dict[str, torch.Tensor]:
    stream = ImageStream(models, [replace(p, seed=seed) for p in prompts], sampling, batch_size)
    return {p.id: image for batch in stream for p, image in zip(batch.prompts, batch.images, strict=True)}


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_bytes_depend_on_neither_order_nor_company_nor_resume(models, sampler):
    whole = images(models[sampler], SETTINGS[sampler])
    assert len(whole) == 11 and whole["test/0"].dtype == torch.uint8 and whole["test/0"].shape == (3, 64, 64)
    shuffled = images(models[sampler], SETTINGS[sampler], [PROMPTS[i] for i in (7, 2, 9, 0, 10, 3, 1)])
    shard = images(models[sampler], SETTINGS[sampler], PROMPTS[6:])
    for other in (shuffled, shard):
        assert all(torch.equal(image, whole[identity]) for identity, image in other.items())


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_batch_sizes_differ_by_one_level_at_most(models, sampler):
    reference = images(models[sampler], SETTINGS[sampler])
    for size in (1, 3, 64):
        other = images(models[sampler], SETTINGS[sampler], batch_size=size)
        gap = max((other[i].int() - reference[i].int()).abs().max() for i in reference)
        assert gap <= 1


def test_prompt_and_seed_change_the_image(models):
    first = images(models["lcm"], SETTINGS["lcm"])
    second = images(models["lcm"], SETTINGS["lcm"], seed=1)
    assert not any(torch.equal(first[i], second[i]) for i in first)
    assert not torch.equal(first["test/0"], first["test/1"])


def test_noise_seeds_are_for_ever():
    assert noise_seed("test/0", 0) == 4825582970882661103
    assert noise_seed("test/0", 1) != noise_seed("test/0", 0) != noise_seed("test/01", 0)
    assert noise_seed("a", 10) != noise_seed("a1", 0)
    assert all(0 <= noise_seed(f"test/{i}", 0) < 2**63 for i in range(100))


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_plain_diffusers_gives_the_same_images(models, sampler):
    settings, prompts = SETTINGS[sampler], PROMPTS[:4]
    pipeline = DiffusionPipeline.from_pretrained(models[sampler].path)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [prompt.text for prompt in prompts],
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        generator=[torch.Generator().manual_seed(noise_seed(prompt.id, 0)) for prompt in prompts],
        output_type="np",
    ).images
    ours = torch.stack(list(images(models[sampler], settings, prompts).values()))
    levels = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255
    assert (ours.float() - levels).abs().max() <= 0.5 + 255e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_half_types_differ_from_float32_by_their_rounding_alone(models, sampler, dtype):
    """Mean difference in 8-bit levels; plain diffusers in the same type is as far from float32."""
    half = load_models(models[sampler].path, "cpu", dtype)
    full, ours = (
        torch.stack(list(images(m, SETTINGS[sampler], PROMPTS[:4]).values())) for m in (models[sampler], half)
    )
    pipeline = DiffusionPipeline.from_pretrained(models[sampler].path).to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        [prompt.text for prompt in PROMPTS[:4]],
        num_inference_steps=SETTINGS[sampler].steps,
        guidance_scale=SETTINGS[sampler].guidance_scale,
        generator=[torch.Generator().manual_seed(noise_seed(prompt.id, 0)) for prompt in PROMPTS[:4]],
        output_type="np",
    ).images
    levels = torch.from_numpy(theirs).permute(0, 3, 1, 2) * 255
    away = {"ours": (ours.float() - full.float()).abs().mean(), "diffusers": (levels - full.float()).abs().mean()}
    assert 0 < away["ours"] < max(2 * away["diffusers"], 0.3)


@pytest.mark.parametrize("sampler", ["lcm", "ddim"])
def test_each_sampling_step_is_told(models, sampler):
    """A batch of 64 images and 50 steps takes minutes at full size."""
    told: list[float] = []
    stream = ImageStream(models[sampler], PROMPTS[:5], SETTINGS[sampler], 4)
    for _ in stream.stream(np.arange(5), told.append):
        pass
    steps = SETTINGS[sampler].steps
    assert told == pytest.approx([4 / steps] * steps + [1 / steps] * steps)
    next(stream.stream(np.arange(1)))
    assert len(told) == 2 * steps, "nothing stays on the network"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_student_in_half_is_told_its_guidance_to_the_last_bit(models, dtype):
    half, told = load_models(models["lcm"].path, "cpu", dtype), []
    half.unet.register_forward_pre_hook(lambda *call: told.append(call[2]["timestep_cond"]), with_kwargs=True)
    next(iter(ImageStream(half, PROMPTS[:1], Sampling("lcm", 1, 7.3), 1)))
    assert torch.equal(told[0], guidance_embedding(torch.tensor([7.3 - 1]), 16).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coefficients_of_half_types_are_rounded_last(dtype):
    """In their own arithmetic 9,990² overflows, 1 − 0.999 is 0, and an angle of 4,000 is off by whole turns."""
    timesteps, cumprod, eps = torch.tensor([0, 30, 999]), torch.tensor([0.9991, 0.97, 0.0047]), torch.finfo(dtype).eps
    times = torch.arange(3)
    pairs = zip(
        (*boundary_scalings(timesteps, 10.0, dtype), *alphas_sigmas(cumprod, times, torch.zeros(3, 1, dtype=dtype))),
        (
            *boundary_scalings(timesteps, 10.0, torch.float64),
            *alphas_sigmas(cumprod, times, torch.zeros(3, 1).double()),
        ),
        strict=True,
    )
    for half, exact in pairs:
        assert half.dtype == dtype
        torch.testing.assert_close(half.double(), exact, rtol=eps, atol=1e-7)


def test_stream_counts_images_and_positions(models):
    stream = ImageStream(models["lcm"], PROMPTS, SETTINGS["lcm"], 4)
    assert stream.images_per_sec is None
    positions = np.concatenate([batch.positions for batch in stream])
    assert positions.tolist() == list(range(11))
    assert stream.num_images == 11 and stream.images_per_sec > 0


def test_nan_images_stop_generation_and_name_the_prompt(models, tmp_path):
    broken = shutil.copytree(models["lcm"].path, tmp_path / "broken")
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(RgbenchError, match="4 of 4 images hold NaN .first: 'test/0'"):
        images(load_models(broken, "cpu", torch.float32), SETTINGS["lcm"])


def test_generation_id_holds_weights_and_settings(models):
    generation = SETTINGS["lcm"].generation(models["lcm"])
    assert generation.id.startswith("lcm2-")
    assert generation.fields == {
        "sampler": "lcm",
        "steps": 2,
        "guidance_scale": 5.0,
        "resolution": 64,
        "dtype": "float32",
        "weights_sha256": models["lcm"].weights_sha256,
        "config_sha256": models["lcm"].config_sha256,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    }
    assert set(SETTINGS["ddim"].generation(models["ddim"]).fields) == set(list(generation.fields)[:7])
    assert Sampling("lcm", 2, 6.0).generation(models["lcm"]).id != generation.id
    json.dumps(generation.fields)


def test_settings_come_from_the_call_the_run_or_the_world(models):
    run = Target("s", "lcd", models["lcm"].path, "benchtop", BENCHTOP, 0, sampling={"steps": 3, "guidance_scale": 4.5})
    teacher = Target("teacher", "teacher", models["ddim"].path, "benchtop", BENCHTOP)
    assert settle_sampling(run, models["lcm"], None, None) == Sampling("lcm", 3, 4.5)
    assert settle_sampling(run, models["lcm"], 1, 2) == Sampling("lcm", 1, 2.0)
    assert settle_sampling(teacher, models["ddim"], None, None) == Sampling("ddim", 50, 3.0)
    assert settle_sampling(teacher, models["ddim"], 4, None) == Sampling("ddim", 4, 3.0)
    larger = replace(models["ddim"], resolution=512)
    foreign = Target("sd", "external", larger.path, "full-size", None)
    assert settle_sampling(foreign, larger, None, None) == Sampling("ddim", 50, 7.5), "as diffusers would"
    like = Target("sd", "external", larger.path, "benchtop", BENCHTOP)
    assert settle_sampling(like, models["ddim"], None, None) == Sampling("ddim", 50, 3.0)


def test_another_sampler_may_be_asked_for(models):
    """Such as LCM for a distilled UNet without a guidance embedding, whose folder names its teacher's scheduler."""
    ddim, lcm = models["ddim"], models["lcm"]
    as_lcm = sampled_as(ddim, "lcm")
    assert (as_lcm.sampler, as_lcm.original_inference_steps) == ("lcm", 50) and sampled_as(ddim, "ddim") is ddim
    assert sampled_as(lcm, "lcm") is lcm and sampled_as(as_lcm, "ddim") == ddim
    images = [next(iter(ImageStream(m, PROMPTS[:1], Sampling(m.sampler, 2, 1.0), 1))).images for m in (ddim, as_lcm)]
    assert not torch.equal(*images)
    with pytest.raises(UsageError, match="guidance embedding says that it is an LCM; leave out --sampler ddim"):
        sampled_as(lcm, "ddim")


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance", "expected"),
    [
        ("lcm", 4, 5.0, 4),
        ("ddim", 3, 3.0, 6),
        ("ddim", 3, 1.0, 3),
        ("lcm without embedding", 2, 3.0, 4),
        ("lcm without embedding", 2, 1.0, 2),
    ],
)
def test_network_evaluations_are_the_rows_that_the_network_sees(models, sampler, steps, guidance, expected):
    """A student without a guidance embedding is guided as a teacher is."""
    chosen = models[sampler] if sampler in models else models["ddim"].with_student(models["ddim"].unet, 50, 10.0)
    seen: list[int] = []
    handle = chosen.unet.register_forward_pre_hook(lambda unet, args: seen.append(len(args[0])))
    stream = ImageStream(chosen, PROMPTS[:2], Sampling(chosen.sampler, steps, guidance), 2)
    next(iter(stream))
    handle.remove()
    assert sum(seen) / 2 == expected == stream.network_evaluations


@pytest.mark.parametrize(
    ("sampler", "steps", "guidance", "message"),
    [
        ("lcm", 51, None, "cannot sample in 51 steps; use 1 to 50"),
        ("lcm", 0, None, "cannot sample in 0 steps"),
        ("ddim", 1001, None, "use 1 to 1000"),
        ("ddim", None, float("nan"), "guidance nan is not a finite number"),
    ],
)
def test_bad_settings(models, sampler, steps, guidance, message):
    target = Target(
        "x", "external", models[sampler].path, "benchtop", BENCHTOP, sampling={"steps": 4, "guidance_scale": 5.0}
    )
    with pytest.raises(UsageError, match=message):
        settle_sampling(target, models[sampler], steps, guidance)


def test_student_without_a_run_must_be_told_its_guidance(models):
    target = Target("x", "external", models["lcm"].path, "benchtop", BENCHTOP)
    with pytest.raises(UsageError, match="does not say its guidance; give --guidance"):
        settle_sampling(target, models["lcm"], 4, None)
    assert settle_sampling(target, models["lcm"], None, 5.0) == Sampling("lcm", 4, 5.0)


def test_a_tcd_student_is_sampled_with_its_runs_gamma(models):
    tcd = sampled_as(models["lcm"], "tcd")
    run = Target(
        "s", "tcd", tcd.path, "benchtop", BENCHTOP, 0, sampling={"steps": 3, "guidance_scale": 4, "gamma": 1.0}
    )
    other = replace(run, sampling=run.sampling | {"gamma": 0.0})
    found = {chosen.gamma: chosen for chosen in (settle_sampling(target, tcd, None, None) for target in (run, other))}
    assert found[1.0] == Sampling("tcd", 3, 4.0, 1.0) and found.keys() == {0.0, 1.0}
    assert settle_sampling(replace(run, sampling={}), tcd, 4, 2.0) == Sampling("tcd", 4, 2.0, 0.3), "the scheduler's"
    assert tcd.network_evaluations(3, 4.0) == 3
    ids = {chosen.generation(tcd).id for chosen in found.values()}
    assert len(ids) == 2 and found[1.0].generation(tcd).fields["gamma"] == 1.0
    assert "gamma" not in SETTINGS["lcm"].generation(models["lcm"]).fields
    noisy, plain = (images(tcd, chosen) for chosen in (found[1.0], found[0.0]))
    assert any(not torch.equal(noisy[key], plain[key]) for key in noisy)


def test_a_students_segments_are_its_steps_where_no_noise_is_added(models):
    student = replace(sampled_as(models["lcm"], "tcd"), segments=4, gamma=0.0)
    target = Target("m", "mlcm", student.path, "benchtop", BENCHTOP)
    assert settle_sampling(target, student, 4, 2.0) == Sampling("tcd", 4, 2.0, 0.0)
    with pytest.raises(UsageError, match="a student of 4 segments cannot be sampled in 2 steps without noise"):
        settle_sampling(target, student, 2, 2.0)
    assert settle_sampling(target, replace(student, gamma=0.3), 2, 2.0).steps == 2


def test_one_prompt_alone_is_one_image_a_batch(models):
    stream = ImageStream(models["lcm"], [Prompt("a", "a red circle")], SETTINGS["lcm"], 64)
    assert stream.batch_size == 1 and len(list(stream)) == 1


class SmallMemory(DiffusionModels):
    """A model on a device that holds three images at once."""

    room, error = 3, torch.OutOfMemoryError("CUDA out of memory")

    def sample(self, prompts, generators, **settings):
        if len(prompts) > self.room:
            raise self.error
        return super().sample(prompts, generators, **settings)


def test_batches_shrink_until_they_fit_and_the_images_stay(models, caplog):
    small = SmallMemory(**vars(models["lcm"]))
    found = images(small, SETTINGS["lcm"], batch_size=8)
    reference = images(models["lcm"], SETTINGS["lcm"], batch_size=2)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[i], reference[i]) for i in reference), "as at the batch size that fits"
    assert caplog.text.count("halved to") == 2
    small.room = 0
    with pytest.raises(RgbenchError, match="one image of 64 px does not fit into the memory of cpu"):
        images(small, SETTINGS["lcm"], batch_size=8)


def test_only_a_lack_of_memory_makes_batches_smaller(models):
    small = SmallMemory(**vars(models["lcm"]))
    for said in ("unable to find an engine", "CUDNN_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_ALLOC_FAILED"):
        small.error = RuntimeError(said)
        assert len(images(small, SETTINGS["lcm"], batch_size=8)) == 11
    small.error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="device-side assert"):
        images(small, SETTINGS["lcm"], batch_size=8)


def test_batch_size_by_memory():
    cpu, gib = torch.device("cpu"), 1 << 30
    assert fitting_batch_size(64, cpu, 8 * gib) == 64
    assert fitting_batch_size(512, cpu, 8 * gib) == 2 and fitting_batch_size(512, cpu, 64 * gib) == 16
    assert fitting_batch_size(1024, cpu, gib) == 1
    assert fitting_batch_size(512, torch.device("cuda")) == 64
    assert 1 <= fitting_batch_size(512, cpu) <= 64
