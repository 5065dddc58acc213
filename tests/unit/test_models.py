"""Loading diffusers folders, and the student made from a teacher."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from rgbench.core.errors import UsageError
from rgbench.models.folder import weights_sha256
from rgbench.models.pipeline import load_models
from rgbench.models.student import make_student
from tests.parity import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("models") / "teacher")


def test_a_folder_is_described_by_its_own_files(folder):
    models = tiny.models(folder)
    assert (models.resolution, models.latent_shape, models.sampler) == (16, (4, 8, 8), "ddim")
    assert (models.prediction_type, models.scaling_factor) == ("epsilon", tiny.SCALING_FACTOR)
    assert models.ddim == {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}
    assert models.schedule.shape == (1000,) and models.schedule.dtype == torch.float32
    assert not any(p.requires_grad for net in (models.unet, models.vae, models.text_encoder) for p in net.parameters())


def test_prompts_are_encoded_as_the_pipeline_does(folder):
    models = tiny.models(folder)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    prompts = [*tiny.PROMPTS[:2], "word " * 100]
    theirs, _ = pipeline.encode_prompt(prompts, "cpu", 1, False)
    assert torch.equal(models.encode_prompts(prompts), theirs)


def test_images_survive_in_range(folder):
    models = tiny.models(folder)
    mean, std = models.encode_images(torch.rand(2, 3, 16, 16))
    assert mean.shape == std.shape == (2, 4, 8, 8) and (std > 0).all()
    images = models.decode(torch.randn(2, 4, 8, 8) * 50)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1


def test_a_guidance_embedding_that_starts_at_zero_learns(folder):
    student = make_student(tiny.models(folder).unet, 16)
    z, embeds, w = torch.randn(1, 4, 8, 8), torch.randn(1, 32, 16), torch.randn(1, 16)
    student(z, torch.tensor([19]), encoder_hidden_states=embeds, timestep_cond=w).sample.sum().backward()
    assert student.time_embedding.cond_proj.weight.grad.abs().max() > 0


def test_the_weights_hash_names_weights_alone(folder, tmp_path):
    before = weights_sha256(folder)
    (folder / "README.md").write_text("changed")
    assert weights_sha256(folder) == before
    other = tiny.save_pipeline(tmp_path / "other")
    assert weights_sha256(other) == before
    file = other / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert weights_sha256(other) != before


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'benchtop'"):
        load_models("benchtob", "cpu", torch.float32)
    other = tiny.save_pipeline(tmp_path / "other")
    (other / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UsageError, match="vae/diffusion_pytorch_model.safetensors"):
        load_models(other, "cpu", torch.float32)


def test_pickled_weights_are_not_opened(tmp_path):
    folder = tiny.save_pipeline(tmp_path / "teacher")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UsageError, match="safetensors"):
        load_models(folder, "cpu", torch.float32)
