"""Pre-training of the latent proxy: the loss, what moves, any latent size, and a proxy that LRM takes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import yaml

from rgbench.core.errors import ConfigError, UsageError
from rgbench.core.io import read_json
from rgbench.core.run import RunDirectory
from rgbench.data.batches import Batch
from rgbench.evaluate.targets import resolve_targets
from rgbench.models.pipeline import DiffusionModels
from rgbench.rewards.base import CallableReward
from rgbench.rewards.latent_proxy import LatentCLIP, contrastive_losses
from rgbench.train.base import lr_factor
from rgbench.train.log import write_png
from rgbench.train.loop import Loop
from rgbench.train.lrm import LRM, load_proxy, small_proxy
from rgbench.train.pretrain import LRMPretrain
from rgbench.train.recipe import AlignSection, LRMPretrainRecipe, ScheduleSection, SmallSection, load_recipe
from rgbench.train.train import train
from tests.parity import tiny

VISION = {"patch_size": 2, "layers": 2, "width": 16, "head_width": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> DiffusionModels:
    return tiny.models(tiny.save_pipeline(tmp_path_factory.mktemp("pretrain") / "teacher"))


def recipe(**proxy) -> LRMPretrainRecipe:
    values = {
        "kind": "lrm_pretrain",
        "name": "tiny",
        "model": {"path": "unused"},
        "data": {"kind": "scenes"},
        "train": {"steps": 12, "batch_size": 4, "lr": 1e-3},
        "proxy": {"clip": str(tiny.CLIP_FOLDER), "vision": VISION, **proxy},
    }
    return LRMPretrainRecipe.model_validate(values, strict=False)


def unit(*shape: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_loss_is_clips():
    images, texts, scale = unit(5, 8, seed=0), unit(5, 8, seed=1), torch.tensor(20.0)
    losses, found = contrastive_losses(images, texts, scale, list("abcde"))
    logits, own = scale * images @ texts.T, torch.arange(5)
    wanted = 0.5 * (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))
    assert float(losses.mean()) == pytest.approx(float(wanted), rel=1e-6)
    assert torch.equal(found.bool(), logits.argmax(1) == own)


def test_equal_captions_are_no_negatives():
    texts = unit(3, 8, seed=1)[[0, 1, 0]]
    losses, found = contrastive_losses(texts, texts, torch.tensor(1000.0), ["a", "b", "a"])
    assert torch.allclose(losses, torch.tensor([2.0, 1.0, 2.0]).log(), atol=1e-4), "half of the label each"
    assert found.tolist() == [1, 1, 1]


class FourSource(tiny.TinySource):
    """Four pairs, met at every step; each image is one plain colour, so that there is something to tell apart."""

    length = 4

    def load(self, indices: list[int]) -> Batch:
        batch = super().load(indices)
        colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])[indices]
        return replace(batch, images_BCHW=colours[:, :, None, None].expand_as(batch.images_BCHW).clone())


def aligned(models, expert, steps: int = 2) -> LRMPretrain:
    reward, whole = load_recipe("lrm").reward, {"image_layers": "all", "text_layers": 0}
    settings = recipe(align={"steps": 0}, trainable=whole, optimiser={"schedule": "constant"})
    proxy = LRMPretrain.build(settings, models).proxy
    section = settings.proxy.model_copy(update={"align": AlignSection(steps=steps)})
    return LRMPretrain(settings.model_copy(update={"reward": reward, "proxy": section}), models, proxy, expert)


def test_the_last_steps_learn_the_experts_scores(models):
    """Of the teacher's predictions and of the ground truths, with their own captions and with their neighbours'."""
    calls = []

    def scored(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.append((images, prompts))
        return images.mean((1, 2, 3)) + 0.01 * torch.tensor([len(prompt) for prompt in prompts])

    trainer, batch = aligned(models, CallableReward(scored, "brightness")), tiny.TinySource().load([0, 1, 2, 3])
    assert list(trainer.step(batch, tiny.draws(step=9)).losses["proxy"]) == ["contrastive"] and not calls
    result = trainer.step(batch, tiny.draws(step=10))

    rng, schedule = tiny.draws(step=10), models.schedule
    mean, std = models.encode_images(batch.images_BCHW)
    truths = mean + std * rng.normal("vae", models.latent_shape)
    noise, t = rng.normal("align_noise", models.latent_shape), rng.integers("align_t", len(schedule))
    alpha, sigma = schedule[t].sqrt()[:, None, None, None], (1 - schedule[t]).sqrt()[:, None, None, None]
    noisy = alpha * truths * models.scaling_factor + sigma * noise
    output = models.unet(noisy, t, models.encode_prompts(batch.prompts)).sample
    x0 = (noisy - sigma * output) / alpha if models.prediction_type == "epsilon" else alpha * noisy - sigma * output
    predicted = x0 / models.scaling_factor
    decoded = torch.cat([models.decode(x * models.scaling_factor) for x in (predicted, truths)])
    others = [*batch.prompts[1:], batch.prompts[0]]
    assert [prompts for _, prompts in calls] == [batch.prompts * 2, others * 2]
    assert all(torch.allclose(images, decoded, atol=1e-5) for images, _ in calls)

    expert = torch.cat([scored(decoded, prompts * 2) for prompts in (batch.prompts, others)])
    latents = torch.cat([predicted, truths])
    cosines = torch.cat([trainer.proxy(latents, prompts * 2) for prompts in (batch.prompts, others)])
    z, found = ((x - x.mean()) / x.std() for x in (expert, cosines))
    wanted = (0.5 * (found - z) ** 2).view(4, 4).sum(0)
    losses = result.losses["proxy"]["align"]
    assert torch.allclose(losses, wanted, rtol=1e-4, atol=1e-5)
    losses.mean().backward()
    assert all(p.grad is None for network in (models.unet, models.vae) for p in network.parameters())
    assert trainer.reward_fingerprints()[0]["name"] == "brightness"


def test_alignment_brings_the_proxy_to_its_expert(models, tmp_path):
    trainer = aligned(models, tiny.expert(), steps=12)
    loop = Loop(trainer, FourSource(), trainer.recipe, RunDirectory(tmp_path))
    rows = [loop.train_step() for _ in range(12)]
    assert rows[-1]["loss/align"] < 0.6 * rows[0]["loss/align"]
    assert {"proxy_correlation", "pair_accuracy"} <= rows[-1].keys()


def small(models, expert, steps: int = 40) -> LRMPretrain:
    settings = load_recipe("dollar_pretrain", [f"train.steps={steps}", f"proxy.align.steps={steps}"])
    section = settings.proxy.model_copy(
        update={"small": SmallSection(patch_size=2, width=16), "optimiser": ScheduleSection()}
    )
    train_section = recipe().train.model_copy(update={"steps": steps, "lr": 1e-2})
    settings = settings.model_copy(update={"proxy": section, "train": train_section})
    return LRMPretrain(settings, models, small_proxy(0, section.small, models), expert)


def test_a_small_network_learns_the_level_of_the_scores(models):
    """Its score is in the expert's standard deviations, so that only the expert's are standardised."""

    def scored(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3)) + 0.01 * torch.tensor([len(prompt) for prompt in prompts])

    trainer, batch = small(models, CallableReward(scored, "brightness")), tiny.TinySource().load([0, 1, 2, 3])
    result, rng = trainer.step(batch, tiny.draws(step=0)), tiny.draws(step=0)
    mean, std = models.encode_images(batch.images_BCHW)
    truths = mean + std * rng.normal("vae", models.latent_shape)
    latents = torch.cat([trainer.predict(truths, batch, rng), truths])
    decoded = torch.cat([models.decode(x * models.scaling_factor) for x in latents.split(4)])
    captions = batch.prompts, [*batch.prompts[1:], batch.prompts[0]]
    expert = torch.cat([scored(decoded, texts * 2) for texts in captions])
    found = torch.cat([trainer.proxy(latents, texts * 2) for texts in captions])
    wanted = (0.5 * (found - (expert - expert.mean()) / expert.std()) ** 2).view(4, 4).sum(0)
    assert torch.allclose(result.losses["proxy"]["align"], wanted, rtol=1e-4, atol=1e-5)
    assert trainer.tokenizers().keys() >= {"text_encoder"} and "proxy" not in trainer.tokenizers()


def test_a_small_network_that_was_trained_alone_starts_another_run(models, tmp_path):
    trainer = small(models, tiny.expert())
    loop = Loop(trainer, FourSource(), trainer.recipe, RunDirectory(tmp_path))
    rows = [loop.train_step() for _ in range(40)]
    assert rows[-1]["loss/align"] < 0.8 * rows[0]["loss/align"]
    folder = trainer.export(RunDirectory(tmp_path))
    section = {"path": str(folder), "small": {"patch_size": 2, "width": 16}}
    found = load_proxy(tiny.recipe("vsd", proxy=section), models).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in trainer.proxy.state_dict().items())


def test_a_small_network_has_no_towers_and_no_contrast():
    with pytest.raises(ConfigError, match=r"clip: a small proxy has no towers"):
        load_recipe("dollar_pretrain", ["proxy.clip=folder"])
    with pytest.raises(ConfigError, match=r"proxy\.align\.steps 250: a small proxy learns scores alone; give all 700"):
        load_recipe("dollar_pretrain", ["train.steps=700"])
    assert load_recipe("dollar_pretrain").trial_steps == (0,)
    assert load_recipe("dollar").proxy.small == load_recipe("dollar_pretrain").proxy.small
    assert load_recipe("dollar").reward == load_recipe("dollar_pretrain").reward


def test_alignment_needs_an_expert_and_room():
    with pytest.raises(ConfigError, match=r"proxy\.align: needs the expert"):
        load_recipe("lrm_pretrain", ["reward=null"])
    with pytest.raises(ConfigError, match=r"proxy\.align\.steps 200: are the last of train\.steps, which is 100"):
        load_recipe("lrm_pretrain", ["train.steps=100"])
    assert load_recipe("lrm_pretrain").trial_steps == (0, 999), "a launch tries both kinds of step"


def test_it_learns_and_what_is_frozen_stays(models, tmp_path):
    settings = recipe(
        trainable={"image_layers": "all", "text_layers": 1}, optimiser={"schedule": "constant", "warmup": 2}
    )
    trainer = LRMPretrain.build(settings, models)
    before = {name: value.clone() for name, value in trainer.proxy.clip.state_dict().items()}
    loop = Loop(trainer, FourSource(), settings, RunDirectory(tmp_path))
    batch = loop.load_batch(0)
    first = trainer.step(batch, tiny.draws()).losses["proxy"]["contrastive"].mean().item()
    rows = [loop.train_step() for _ in range(40)]
    assert trainer.step(batch, tiny.draws()).losses["proxy"]["contrastive"].mean().item() < 0.8 * first
    assert {"retrieval", "logit_scale", "grad_norm/proxy"} <= rows[0].keys()
    after = trainer.proxy.clip.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    depth = len(trainer.proxy.clip.transformer.resblocks)
    own = ("visual.", "logit_scale", f"transformer.resblocks.{depth - 1}.", "ln_final.", "text_projection")
    assert moved == {name for name in after if name.startswith(own)}


def test_the_text_tower_is_the_clips_and_the_rest_the_seeds(models):
    clip = tiny.open_clip.create_model(f"local-dir:{tiny.CLIP_FOLDER}").state_dict()
    proxies = [LRMPretrain.build(recipe(), models).proxy.clip.state_dict() for _ in range(2)]
    assert all(torch.equal(proxies[0][name], value) for name, value in clip.items() if not name.startswith("visual."))
    assert all(torch.equal(value, proxies[1][name]) for name, value in proxies[0].items())
    assert proxies[0]["visual.conv1.weight"].shape == (16, 4, 2, 2)


def test_the_exported_proxy_is_what_an_lrm_takes(models, tmp_path):
    trainer = LRMPretrain.build(recipe(), models)
    folder = trainer.export(RunDirectory(tmp_path))
    proxy = LatentCLIP.load(folder, "cpu")
    proxy.check_fits(models.latent_shape, models.scaling_factor, folder)
    latents = torch.randn(2, 4, 8, 8)
    assert torch.allclose(proxy(latents, tiny.PROMPTS[:2]), trainer.proxy(latents, tiny.PROMPTS[:2]), atol=1e-6)


@pytest.mark.parametrize("size", [[6, 10], 12])
def test_latents_of_any_size(size, tmp_path):
    vision = {**VISION, "image_size": size}
    proxy = LatentCLIP.from_clip(tiny.CLIP_FOLDER, vision, latent_channels=16, latent_scale=0.36)
    proxy.save(tmp_path)
    again = LatentCLIP.load(tmp_path, "cpu")
    shape = (16, *size) if isinstance(size, list) else (16, size, size)
    again.check_fits(shape, 0.36, tmp_path)
    assert again(torch.randn(2, *shape), ["a", "b"]).shape == (2,)
    with pytest.raises(UsageError, match="not divided by patches of 4"):
        LatentCLIP.from_clip(tiny.CLIP_FOLDER, {**vision, "patch_size": 4, "image_size": [6, 8]},
                             latent_channels=16, latent_scale=0.36)  # fmt: skip


def test_a_text_tower_from_a_checkpoint_file(monkeypatch, tmp_path):
    """A file has no tokenizer beside it: CLIP's own is taken, and saved with the proxy."""
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 8, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    (tmp_path / "rgbench-proxy.json").write_text(json.dumps(config))
    tiny.open_clip.add_model_config(tmp_path / "rgbench-proxy.json")
    monkeypatch.setattr("rgbench.rewards.clip.ARCHITECTURE", "rgbench-proxy")
    clip = tiny.open_clip.create_model("rgbench-proxy", pretrained=None)
    torch.save({"state_dict": clip.state_dict()}, tmp_path / "HPS.pt")
    vision = {**VISION, "image_size": 8}
    proxy = LatentCLIP.from_clip(tmp_path / "HPS.pt", vision, latent_channels=4, latent_scale=0.5)
    assert torch.equal(proxy.clip.token_embedding.weight, clip.token_embedding.weight)
    proxy.save(tmp_path / "proxy")
    assert read_json(tmp_path / "proxy" / "config.json")["text_cfg"]["vocab_size"] == 49408
    again = LatentCLIP.load(tmp_path / "proxy", "cpu")
    latents = torch.randn(2, 4, 8, 8)
    assert torch.allclose(again(latents, ["a dog", "a cat"]), proxy(latents, ["a dog", "a cat"]), atol=1e-6)
    torch.save({"state_dict": {"logit_scale": torch.tensor(1.0)}}, tmp_path / "half.pt")
    with pytest.raises(UsageError, match="are not those of the text tower"):
        LatentCLIP.from_clip(tmp_path / "half.pt", vision, latent_channels=4, latent_scale=0.5)


# ---- its optimiser ----------------------------------------------------------------------


def test_schedules():
    factors = {
        kind: lr_factor(ScheduleSection(schedule=kind, warmup=2), 10) for kind in ("constant", "linear", "cosine")
    }
    assert [factors["constant"](s) for s in (0, 1, 2, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [factors["linear"](s) for s in (2, 6, 9)] == pytest.approx([1, 0.5, 0.125])
    assert [factors["cosine"](s) for s in (2, 6)] == pytest.approx([1, 0.5])


def test_each_group_has_its_own_optimiser(models, tmp_path):
    own = {"betas": [0.5, 0.9], "weight_decay": 0.3, "max_grad_norm": 0.01, "schedule": "linear", "warmup": 1}
    settings = tiny.recipe(proxy={"optimiser": own, "lr": 0.01}, train={"steps": 5})
    trainer = LRM(settings, models, tiny.expert(), tiny.proxy())
    loop = Loop(trainer, tiny.TinySource(), settings, RunDirectory(tmp_path))
    groups = {name: optimiser.param_groups[0] for name, optimiser in loop.updater.optimisers.items()}
    assert (groups["proxy"]["betas"], groups["proxy"]["weight_decay"]) == ((0.5, 0.9), 0.3)
    assert (groups["student"]["betas"], groups["student"]["weight_decay"]) == ((0.9, 0.999), 0.0)
    rates = []
    for _ in range(3):
        row = loop.train_step()
        rates.append(groups["proxy"]["lr"])
    assert rates == pytest.approx([0.005, 0.01, 0.0075]) and groups["student"]["lr"] == 1e-3
    assert row["grad_norm/proxy"] > 0.01
    for parameter in trainer.proxy_parameters:
        parameter.grad = torch.ones_like(parameter)
    loop.updater.reduce()
    assert float(torch.stack([p.grad.norm() for p in trainer.proxy_parameters]).norm()) == pytest.approx(0.01, rel=1e-3)


def test_the_recipe():
    settings = load_recipe("lrm_pretrain")
    assert isinstance(settings, LRMPretrainRecipe) and settings.train.sample_every == 0
    with pytest.raises(ConfigError, match=r"train\.sample_every"):
        load_recipe("lrm_pretrain", ["train.sample_every=5"])


def test_from_a_recipe_to_a_proxy(tmp_path, monkeypatch):
    """Through ``rgbench train``'s own function, on a folder of images; evaluation knows that it is no student."""
    teacher, images = tiny.save_pipeline(tmp_path / "teacher"), tmp_path / "images"
    images.mkdir()
    for i, picture in enumerate(torch.rand(4, 3, 16, 16)):
        write_png(picture, images / f"{i}.png")
        (images / f"{i}.txt").write_text(tiny.PROMPTS[i])
    values = recipe().model_dump(mode="json") | {"model": {"path": str(teacher)}}
    values |= {"data": {"kind": "image_folder", "path": str(images), "resolution": 16}}
    values["train"] |= {"steps": 2, "log_every": 1}
    (tmp_path / "pretrain.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    run = train(str(tmp_path / "pretrain.yaml"), [], device="cpu")
    LatentCLIP.load(run / "latent_proxy", "cpu").check_fits((4, 8, 8), tiny.SCALING_FACTOR, run)
    assert RunDirectory.open(run).read()["status"] == "finished" and not (run / "pipeline").exists()
    assert train(str(tmp_path / "pretrain.yaml"), [], device="cpu") == run, "finished already"
    with pytest.raises(UsageError, match=r"has no student; name its latent_proxy/ as proxy\.path"):
        resolve_targets([str(run)], tmp_path / "runs")
    with pytest.raises(UsageError, match="no finished run"):
        resolve_targets([], tmp_path / "runs")
