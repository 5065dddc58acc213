"""Weighted consistency training: the teacher's samples and their scores, the weights, what they move and what not."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rgbench.core.errors import ConfigError, UsageError
from rgbench.core.io import read_json, write_json_atomic
from rgbench.core.run import RunDirectory
from rgbench.data import latents
from rgbench.data.batches import Batch, Encoded
from rgbench.data.config import TeacherData
from rgbench.data.latents import TeacherSource
from rgbench.evaluate.targets import resolve_targets
from rgbench.models.pipeline import load_models
from rgbench.train.cache import cache_samples
from rgbench.train.lcd import LCD, Networks
from rgbench.train.recipe import WeightedSection, WeightedSolverSection, load_recipe
from rgbench.train.train import train
from rgbench.train.weighted import Weighted, WeightedInputs, effective_samples, sample_weights
from tests import gaussian
from tests.gaussian import Linear
from tests.parity import tiny
from tests.resume.loops import weighted_recipe
from tests.tiny_trainers import assert_equal, backward

CAPTIONS = tiny.PROMPTS[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("weighted") / "teacher")


@pytest.fixture
def recipe(folder, tmp_path, monkeypatch) -> str:
    """Six images of four captions, and an LCD recipe whose caches lie in the test's folder."""
    from PIL import Image

    monkeypatch.setattr(latents, "SHARD_SAMPLES", 5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "images" / f"{i}.txt").write_text(CAPTIONS[i % 4])
    values = tiny.recipe(train={"steps": 4, "log_every": 1, "save_every": 2}).model_dump(mode="json")
    values = {key: values[key] for key in ("name", "seed", "train", "lcd", "sampling")}
    values["train"]["latents_cache_root"] = str(tmp_path / "caches")
    values |= {"kind": "lcd", "model": {"path": str(folder)}}
    values["data"] = {"kind": "image_folder", "path": str(tmp_path / "images"), "resolution": 16}
    (tmp_path / "lcd.yaml").write_text(yaml.safe_dump(values))
    return str(tmp_path / "lcd.yaml")


@pytest.fixture
def scored(monkeypatch) -> None:
    monkeypatch.setattr("rgbench.train.cache.load_reward", lambda *_, **__: tiny.expert())


def weighted_words(data: Path) -> list[str]:
    return [
        "kind=weighted",
        f"data={{kind: teacher, path: {data}}}",
        "lcd={num_ddim_timesteps: 50}",
        "sampling={steps: 2}",
    ]


# ---- the teacher's samples --------------------------------------------------------------


def test_samples_are_a_function_of_caption_and_number(recipe, folder, scored):
    path = cache_samples(recipe, [], samples=3, kind="hps", device="cpu")
    source = TeacherSource(TeacherData(path=str(path)))
    assert source.length == 12, "each distinct caption once"
    batch = source.load([0, 2, 3, 11])
    assert batch.prompts == [CAPTIONS[0], CAPTIONS[0], CAPTIONS[1], CAPTIONS[3]] and batch.ids[1].endswith("#2")
    assert batch.encoded is not None and not batch.encoded.std.any()
    assert not torch.equal(batch.encoded.mean[0], batch.encoded.mean[1])
    models, expert = load_models(folder, "cpu", torch.float32), tiny.expert()
    images = models.decode(batch.encoded.mean * models.scaling_factor)
    rows = batch.scores.gather(1, batch.rank[:, None])[:, 0]
    assert torch.allclose(rows, expert(images, batch.prompts).double(), atol=1e-5)
    assert torch.equal(batch.scores[0], batch.scores[1]) and batch.rank.tolist() == [0, 2, 0, 2]
    again = cache_samples(recipe, ["train.batch_size=2", "train.latents_cache_root=other"], samples=3, kind="hps")
    other = TeacherSource(TeacherData(path=str(again))).load([0, 2, 3, 11])
    assert torch.allclose(other.encoded.mean, batch.encoded.mean, atol=1e-4), "whatever the batch"
    more = TeacherSource(TeacherData(path=str(cache_samples(recipe, [], samples=4, device="cpu"))))
    assert more.scores is None and more.load([0]).scores is None
    assert torch.allclose(more.load([2]).encoded.mean[0], batch.encoded.mean[1], atol=1e-4), "whatever their number"
    assert more.fingerprint() != source.fingerprint()


def test_every_student_trains_on_them(recipe, scored):
    path = cache_samples(recipe, [], samples=2, kind="hps", device="cpu")
    run = RunDirectory.open(train(recipe, weighted_words(path)[1:2], device="cpu"))
    assert run.read()["data"]["kind"] == "teacher" and run.read()["data"]["samples"] == 2


def test_samples_of_a_teacher_with_another_noise_schedule_are_refused(recipe, folder, tmp_path):
    path = cache_samples(recipe, [], samples=1, device="cpu")
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    write_json_atomic(file, read_json(file) | {"beta_end": 0.02})
    words = [*weighted_words(path)[1:2], f"model.path={tmp_path / 'other'}"]
    with pytest.raises(UsageError, match="samples of another teacher"):
        train(recipe, words, device="cpu")


def test_what_cannot_be_trained_on_is_refused(recipe, folder, scored, tmp_path):
    unscored = cache_samples(recipe, [], samples=2, device="cpu")
    with pytest.raises(UsageError, match=r"no scores; .*--score hps"):
        train(recipe, weighted_words(unscored), device="cpu")
    alone = cache_samples(recipe, [], samples=1, kind="hps", device="cpu")
    with pytest.raises(UsageError, match=r"no weight is left; .*weights: none"):
        train(recipe, weighted_words(alone), device="cpu")
    with pytest.raises(UsageError, match="no complete cache"):
        train(recipe, weighted_words(tmp_path / "none"), device="cpu")
    index = {
        "schema_version": latents.SCHEMA_VERSION,
        "shard_samples": latents.SHARD_SAMPLES,
        "identity": {"data": {}},
        "num": 8,
    }
    (unscored / "cache.json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="holds no samples of a teacher"):
        train(recipe, weighted_words(unscored), device="cpu")
    torch.manual_seed(5)
    tiny.save_pipeline(tmp_path / "teacher", "v_prediction")
    other = load_models(tmp_path / "teacher", "cpu", torch.float32)
    with torch.no_grad():
        other.unet.conv_in.bias += 1
    other.unet.save_pretrained(tmp_path / "teacher" / "unet")
    with pytest.raises(UsageError, match=r"samples of another teacher .*--from teacher"):
        train(recipe, [*weighted_words(alone), f"model.path={tmp_path / 'teacher'}"], device="cpu")
    tiny.save_pipeline(tmp_path / "noise", beta_end=0.02)  # the same weights
    with pytest.raises(UsageError, match=r"samples of another teacher .*--from teacher"):
        train(recipe, [*weighted_words(alone), f"model.path={tmp_path / 'noise'}"], device="cpu")
    with pytest.raises(UsageError, match="--score hsp: no reward of this kind .*hps"):
        cache_samples(recipe, [], samples=2, kind="hsp", device="cpu")
    with pytest.raises(UsageError, match="endless data cannot be sampled"):
        cache_samples(recipe, ["data={kind: scenes}"], samples=2, device="cpu")
    with pytest.raises(ConfigError, match=r"lcd\.time_cond_proj_dim: .*use null"):
        load_recipe("weighted", ["lcd.time_cond_proj_dim=16"])


def test_damaged_scores_are_told(recipe, scored):
    path = cache_samples(recipe, [], samples=2, kind="hps", device="cpu")
    shard = min(path.glob("*.safetensors"))
    source = TeacherSource(TeacherData(path=str(path)))
    raw, value = bytearray(shard.read_bytes()), source.scores[0, 0].numpy().tobytes()
    at = raw.find(value)
    raw[at] ^= 1
    shard.write_bytes(bytes(raw))
    with pytest.raises(UsageError, match="damaged in its scores"):
        TeacherSource(TeacherData(path=str(path)))


@pytest.mark.parametrize("lora", [[], ["lora={rank: 2}", "train.lr=0.03"]], ids=["full", "lora"])
def test_a_run_on_them_resumes_bit_exactly_and_logs_its_weights(recipe, scored, tmp_path, lora):
    path = cache_samples(recipe, [], samples=2, kind="hps", device="cpu")
    words = [*weighted_words(path), *lora, f"weighted.weights={'softmax' if lora else 'best'}"]
    runs = [RunDirectory.open(train(recipe, words, out=tmp_path / name, device="cpu")) for name in ("a", "b")]
    shutil.rmtree(runs[1].checkpoints / "step-00000004")
    runs[1].update(status="interrupted", step=2)
    train(recipe, words, out=tmp_path / "b", device="cpu")
    files = [run.pipeline / "unet" / "diffusion_pytorch_model.safetensors" for run in runs]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert (runs[0].pipeline / "lora" / "README.md").is_file() == bool(lora)
    row = runs[0].read_log()[-1]
    (target,) = resolve_targets([str(runs[0].path)], tmp_path)
    assert target.cost.get("selection_kl") == (None if lora else math.log(2) - 1 / 2), "of the better of two samples"
    assert 1 <= row["weight/samples"] <= 2 and 1 <= row["weight/batch_samples"] <= 4 and 0 < row["weight/top10"] <= 1


# ---- the weights ------------------------------------------------------------------------


def normal(rows: int, num: int) -> torch.Tensor:
    return torch.randn(rows, num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("weights", ["softmax", "best", "positive", "none"])
@pytest.mark.parametrize("advantage", ["standardised", "centred"])
def test_weights_have_mean_one_and_equal_scores_weigh_exactly_one(weights, advantage):
    own = WeightedSection(weights=weights, advantage=advantage)
    found = sample_weights(normal(50, 7), own)
    assert torch.allclose(found.mean(1), torch.ones(50, dtype=torch.float64)) and (found >= 0).all()
    for alike in (torch.full((3, 7), 0.3, dtype=torch.float64), normal(3, 1)):
        assert torch.equal(sample_weights(alike, own), torch.ones_like(alike))


def test_the_softmax_has_its_expected_number_of_samples():
    scores = normal(20_000, 8)
    for temperature, wanted in ((0.2, 1.4), (0.5, 2.4), (1.0, 4.2), (2.0, 6.4)):
        own = WeightedSection(temperature=temperature)
        found = float(effective_samples(sample_weights(scores, own)).mean())
        assert found == pytest.approx(wanted, abs=0.15), temperature
    best = sample_weights(scores, WeightedSection(weights="best"))
    assert torch.equal(best.argmax(1), scores.argmax(1)) and torch.equal(
        best.max(1).values, torch.full((20_000,), 8.0).double()
    )
    positive = sample_weights(scores, WeightedSection(weights="positive"))
    assert torch.equal(positive > 0, scores > scores.mean(1, keepdim=True))
    loud, quiet = (sample_weights(scores * scale, WeightedSection(advantage="centred")) for scale in (1.0, 1e-3))
    assert effective_samples(loud).mean() < 6 < 7.99 < effective_samples(quiet).mean()


# ---- the step ---------------------------------------------------------------------------


def rows(scores: torch.Tensor) -> Batch:
    num = len(scores)
    generator = torch.Generator().manual_seed(1)
    mean, embeds = torch.randn(num, 4, 8, 8, generator=generator), torch.randn(num, 32, 16, generator=generator)
    encoded = Encoded(mean, torch.zeros_like(mean), embeds)
    rank = torch.arange(num) % scores.shape[1]
    return Batch(None, CAPTIONS[:num], [str(i) for i in range(num)], encoded, scores, rank)


def moved(trainer: LCD) -> LCD:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        trainer.student.conv_out.weight += torch.randn(trainer.student.conv_out.weight.shape, generator=generator)
    return trainer


def gradients(trainer: LCD, batch: Batch) -> dict[str, torch.Tensor]:
    backward(trainer.step(batch, tiny.draws()), "student")
    return {name: p.grad for name, p in trainer.student.named_parameters()}


def test_equal_scores_train_as_no_weights_and_share_zero_is_lcd(folder):
    scores, models = normal(4, 4), tiny.models(folder)
    found = {
        name: gradients(moved(trainer), rows(given))
        for name, trainer, given in (
            ("none", Weighted(weighted_recipe(weights="none"), models), scores),
            ("alike", Weighted(weighted_recipe(), models), torch.zeros_like(scores)),
            ("weighted", Weighted(weighted_recipe(), models), scores),
            ("share 0", Weighted(weighted_recipe(weights="none", share=0.0), models), scores),
            ("lcd", LCD(weighted_recipe(), models), scores),
        )
    }
    assert_equal(found["none"], found["alike"])
    assert_equal(found["share 0"], found["lcd"])
    for name in ("weighted", "lcd"):
        assert not torch.equal(found["none"]["conv_out.weight"], found[name]["conv_out.weight"])


def test_losses_are_multiplied_by_the_samples_own_weight(folder):
    scores, models = normal(4, 4), tiny.models(folder)
    plain, weighted = (Weighted(weighted_recipe(weights=kind), models) for kind in ("none", "softmax"))
    losses = [moved(trainer).step(rows(scores), tiny.draws()).losses["student"]["lcd"] for trainer in (plain, weighted)]
    wanted = sample_weights(scores, WeightedSection())[torch.arange(4), torch.arange(4)]
    assert torch.allclose(losses[1], losses[0] * wanted.float(), rtol=1e-6)


def test_z_n_is_the_same_data_and_noise(folder):
    models = tiny.models(folder)
    half = Weighted(weighted_recipe(share=0.5), models)
    whole, none = Weighted(weighted_recipe(share=1.0), models), Weighted(weighted_recipe(share=0.0), models)
    batch = rows(normal(4, 4))
    previous = [t.distil(t.prepare(batch, tiny.draws())).previous for t in (half, whole, none)]
    inputs = half.prepare(batch, tiny.draws())
    chosen = inputs.fraction < 0.5
    assert 0 < chosen.sum() < 4
    for row, of_data in enumerate(chosen.tolist()):
        assert torch.equal(previous[0][row], previous[1 if of_data else 2][row])
    cumprod, t = models.schedule, half.distil(inputs).timesteps.view(-1, 1, 1, 1)
    noised = cumprod[t].sqrt() * inputs.latents + (1 - cumprod[t]).sqrt() * inputs.noise
    assert torch.allclose(previous[1], noised, atol=1e-6)


def best_prediction(share: float, omega: tuple[float, float], mu: float, z: float) -> float:
    """f at the minimum of the real step's loss, weighted, over two data points ±μ that reach one z at t = 499."""
    cumprod, t = gaussian.CUMPROD.clone(), 499
    cumprod[0] = 1.0
    trainer, student = object.__new__(Weighted), Linear(gaussian.TEACHER)
    trainer.recipe = weighted_recipe(share=share)
    settings = {"num_ddim_timesteps": 2, "loss": "l2"}
    trainer.recipe = trainer.recipe.model_copy(update={"lcd": WeightedSolverSection(**settings)})
    trainer.networks = Networks(Linear(gaussian.TEACHER), student, Linear(gaussian.TEACHER), cumprod, "sample")
    alpha, sigma = gaussian.ALPHA[t], gaussian.SIGMA[t]
    data = torch.tensor([mu, -mu], dtype=torch.float64).view(2, 1, 1, 1)
    noise, row, zeros = (z - alpha * data) / sigma, torch.zeros(2, 1, 1).double(), torch.zeros(2)
    inputs = WeightedInputs(data, noise, row, row, zeros.long(), zeros, zeros + 0.5)
    density = (-(noise.flatten() ** 2) / 2).exp() * torch.tensor(omega)
    slopes = []
    for value in (0.0, 1.0):
        student.factors.data[t] = value
        loss = (trainer.distil(inputs).losses * density).sum()
        slopes.append(float(torch.autograd.grad(loss, student.factors)[0][t]))
    student.factors.data[t] = slopes[0] / (slopes[0] - slopes[1])
    return float(trainer.distil(inputs).prediction[0].detach())


def test_weights_tilt_the_optimum_over_data_and_not_that_of_the_teachers_jump():
    """Over data it is μ·tanh(αμz/σ² + ½ ln(ω₊/ω₋)), the weighted posterior mean of two modes."""
    mu, z, heavy, even = 0.8, 0.4, (1.5, 0.5), (1.0, 1.0)
    slope = float(gaussian.ALPHA[499] * mu * z / gaussian.SIGMA[499] ** 2)
    for omega in (even, heavy):
        wanted = mu * math.tanh(slope + 0.5 * math.log(omega[0] / omega[1]))
        assert best_prediction(1.0, omega, mu, z) == pytest.approx(wanted, rel=0, abs=1e-10)
    assert best_prediction(0.0, heavy, mu, z) == pytest.approx(best_prediction(0.0, even, mu, z), rel=0, abs=1e-12)


@pytest.mark.parametrize(
    "override", ["proxy.loss=regression", "proxy.truth=image", "proxy.fidelity.every=10"], ids=lambda o: o.split("=")[0]
)
def test_latents_alone_cannot_stand_for_images(override):
    words = ["data={kind: teacher, path: x}", "proxy.loss=kl", "proxy.truth=decoded"]
    load_recipe("lrm", words)
    with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}: needs images"):
        load_recipe("lrm", [*words, override])
