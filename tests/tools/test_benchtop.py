"""The benchtop's builder: a short build makes every part, restarts where it stopped, and repeats itself."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.fft
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from open_clip import CLIP
from open_clip.tokenizer import HFTokenizer
from safetensors.torch import load_file
from typer.testing import CliRunner

from rgbench.benchtop.gold import Gold
from rgbench.benchtop.oracle import load_classifier
from rgbench.benchtop.scenes import captions, sample_scenes, scene_batch, vocabulary
from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, sha256_tree
from rgbench.models.pipeline import load_models
from rgbench.train.train import train
from tests.results_maker import make_result
from tools.benchtop import teacher
from tools.benchtop.__main__ import app
from tools.benchtop.align import candidates_folder
from tools.benchtop.build import SHIPPED, STAGES, WorldRecipe, build, install
from tools.benchtop.check import (
    Row,
    agreement_with_expert,
    high_energy,
    pick_rows,
    rank_correlation,
    regressor_rows,
    spectrum_rows,
    spread_row,
)
from tools.benchtop.clip import CLIP_CONFIG, CONTEXT_LENGTH, bpe_merges, build_tokenizer, contrastive_loss
from tools.benchtop.degradations import HELDOUT_DEGRADATIONS, KINDS, compress
from tools.benchtop.regressors import FIRST, RegressorConfig, decoded_scenes, regressor_batch, train_regressor
from tools.benchtop.teacher import TeacherConfig, to_transformers, train_teacher

CPU, QUICK = torch.device("cpu"), WorldRecipe.quick()


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("world")
    done = CliRunner().invoke(app, ["build", "--quick", "--device", "cpu", "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_every_stage_is_recorded_with_its_outputs(quick):
    stages = read_json(quick / "manifest.json")["stages"]
    assert list(stages) == sorted(stages, key=list(STAGES).index) and set(stages) == set(STAGES)
    assert stages["clip"]["outputs"]["clip"] == sha256_tree(quick / "clip")
    assert stages["teacher"]["inputs"].keys() == {"vae", "clip", "latents.safetensors"}


def test_candidates_are_kept_under_what_they_were_made_from(quick):
    kept = candidates_folder(QUICK.align, quick)
    assert (kept / "candidates.safetensors").is_file() and (kept / "student" / "pipeline").is_dir()
    assert candidates_folder(replace(QUICK.align, weight_decay=0.5), quick) == kept, (
        "the proxy's own settings make no candidates"
    )
    assert candidates_folder(replace(QUICK.align, num_batches=3), quick) != kept


def test_finished_stages_are_skipped_and_a_damaged_one_is_made_again(quick, capsys):
    build(QUICK, quick, ["reward"], CPU)
    assert "reward: done already" in capsys.readouterr().out
    before = sha256_tree(quick / "reward")
    (quick / "reward" / "open_clip_model.safetensors").write_bytes(b"torn")
    build(QUICK, quick, ["reward"], CPU)
    assert "reward: running" in capsys.readouterr().out
    assert sha256_tree(quick / "reward") == before  # the same weights, from the same seeds


def test_a_short_build_is_deterministic(quick, tmp_path):
    build(QUICK, tmp_path, ["clip", "vae", "latents", "teacher"], CPU)
    for part in ("clip", "vae", "unet"):
        assert sha256_tree(tmp_path / part) == sha256_tree(quick / part)


def test_unknown_stage_and_missing_input(tmp_path):
    with pytest.raises(UsageError, match="did you mean 'teacher'"):
        build(QUICK, tmp_path, ["teachers"], CPU)
    with pytest.raises(UsageError, match="lacks clip"):
        build(QUICK, tmp_path, ["reward"], CPU)


def test_install_copies_whole_parts_and_refuses_an_unfinished_build(quick, tmp_path):
    install(quick, tmp_path / "assets")
    for name in SHIPPED:
        assert sha256_tree(tmp_path / "assets" / name) == sha256_tree(quick / name)
    with pytest.raises(UsageError, match="not built yet"):
        install(tmp_path / "nothing", tmp_path / "assets")


@pytest.mark.long
def test_the_shipped_benchtop_is_checked(tmp_path):
    out = tmp_path / "check.json"
    student = train("lcd", ["train.steps=1", "train.sample_every=0"], out=tmp_path / "lcd", device="cpu") / "pipeline"
    words = ["check", "--num", "8", "--student", str(student), "--device", "cpu", "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(out)])
    rows = json.loads(done.stdout)
    assert done.exit_code == (0 if all(row["ok"] for row in rows) else 1)
    assert len(rows) > 60 and read_json(out)["rows"] == rows
    bounds = {row["name"]: (row["floor"], row["ceiling"]) for row in rows}
    assert bounds["teacher, DDIM 50: all right, test prompts"] == (0.55, 0.8)
    assert bounds["latent proxy: pair accuracy on an LCD student's candidates"] == (0.68, None)
    assert sum(name.startswith("regressors") and of == (0.85, None) for name, of in bounds.items()) == 3


def test_a_row_is_short_outside_its_bounds_or_without_a_value():
    assert Row("x", 0.95, 0.95).ok and not Row("x", 0.949, 0.95).ok
    assert Row("x", -3.9, -4.0, unit="dB", ceiling=4.0).ok and not Row("x", 4.1, -4.0, ceiling=4.0).ok
    assert not Row("x", None, 0.5).ok
    assert Row("reported only", 0.0).ok and "—" in str(Row("x", None))
    assert Row("x", 1.0, 0.5).to_dict()["ok"] is True


def test_pick_rows_by_hand():
    """Prompt 1: 2 of 4 right, the reward picks one; prompt 2: 1 of 4, it picks a wrong one."""
    rewards = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 3.0]])
    right = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    ours, best, agreed = pick_rows(rewards, right, right)
    assert ours.value == pytest.approx((1 + 0) / 2 - (0.5 + 0.25) / 2) and ours.floor == 0.06
    assert best.value == pytest.approx(1 - 0.375) and best.floor == 0.12
    assert agreed.value == pytest.approx(np.mean([np.corrcoef(*x)[0, 1] for x in zip(rewards, right, strict=True)]))
    assert not pick_rows(rewards, np.ones((2, 4)), np.ones((2, 4)))[2].ok, "no spread, no correlation"


def test_agreement_of_a_proxy_with_its_expert_by_hand():
    expert = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 2.0]])  # prediction, target, truth
    ours = torch.tensor([[1.0, 3.0], [0.0, 5.0], [2.0, 4.0]])
    whole, *pairs, correlation, cosine = agreement_with_expert(ours, expert, torch.tensor([0.5, -0.1]))
    assert [row.value for row in pairs] == [0.5, 1.0, 1.0], "of the first prediction and target the order is wrong"
    assert whole.value == pytest.approx(2.5 / 3) and correlation.value == pytest.approx(1)
    assert cosine.value == pytest.approx(0.2) and cosine.ok and (whole.floor, correlation.floor) == (0.68, 0.85)


def test_the_headroom_in_quality_is_counted_in_spreads_of_lcd_seeds(tmp_path):
    for seed, hps in enumerate((70.0, 71.0, 72.0)):  # a standard deviation of 1, hundredths of a cosine
        make_result(tmp_path, f"lcd-s{seed}", values={"hps": hps})
    row = spread_row(0.025, tmp_path)
    assert row.value == pytest.approx(2.5) and not row.ok and "3 LCD seeds" in row.name


def test_rank_correlation_is_spearmans():
    a, b = torch.tensor([0.1, 5.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0, 4.0])
    assert rank_correlation(a, b) == pytest.approx(1 - 6 * (0 + 1 + 0 + 1) / (4 * 15))


def test_regressors_that_are_missing_are_short(tmp_path):
    rows = regressor_rows(tmp_path / "none", None, 4, CPU)
    assert [row.name.split(" of ")[-1] for row in rows] == ["pixelate", "salt and pepper", "motion blur"]
    assert not any(row.ok for row in rows)


def test_spectrum_rows_of_blurred_scenes_fall_in_the_upper_octaves():
    images, _ = scene_batch("test", range(16))
    same = spectrum_rows(images, images)
    assert all(abs(row.value) < 1e-9 and row.ok for row in same)
    blurred = torch.nn.functional.avg_pool2d(images, 3, 1, 1)
    rows = {row.name: row for row in spectrum_rows(blurred, images)}
    assert not rows["VAE: energy above 0.25 against real"].ok
    assert rows["VAE: energy above 0.25 against real"].value < -4


def test_high_energy_sees_noise_and_not_contrast_of_slow_waves():
    x = torch.arange(64) / 64
    slow = (0.5 + 0.4 * torch.sin(2 * torch.pi * 3 * x)).expand(1, 3, 64, 64)
    checker = 0.5 + 0.1 * (torch.arange(64)[:, None] + torch.arange(64)[None]).remainder(2).sub(0.5).sign()
    assert high_energy(slow) < 1e-3
    assert high_energy(checker.expand(1, 3, 64, 64)) > 1e3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(out)
    return out


def test_every_word_is_one_token_and_other_text_falls_back_to_bytes(folder):
    tokenizer = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)
    for word in vocabulary():
        ids = tokenizer([word])[0]
        assert (ids != 0).sum() == 3, word  # begin, word, end
    assert tokenizer(["zyx é"])[0].count_nonzero() > 5


def test_longest_captions_fit_the_context(folder):
    tokenizer = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)
    texts = captions(sample_scenes("test", range(2000)), "test", range(2000))
    ids = tokenizer(texts)
    assert (ids.max(1).values == ids.max()).all()  # the end token was never cut off
    assert (ids[:, -1] == 0).all()


def test_merges_rebuild_words():
    assert bpe_merges(["aab", "ab"])[0] == ("a", "b</w>")


def test_text_encoder_equals_open_clips_penultimate_layer(folder):
    torch.manual_seed(0)
    config = {**CLIP_CONFIG["text_cfg"], "vocab_size": 654}
    clip = CLIP(CLIP_CONFIG["embed_dim"], CLIP_CONFIG["vision_cfg"], config).eval()
    encoder = to_transformers(clip.state_dict(), config, CLIP_CONFIG["embed_dim"])
    ids = HFTokenizer(str(folder), context_length=CONTEXT_LENGTH)(
        ["a red ring at the top", "one blue star, in the middle"]
    )
    with torch.no_grad():
        x = clip.token_embedding(ids) + clip.positional_embedding
        for block in clip.transformer.resblocks[:-1]:
            x = block(x, attn_mask=clip.attn_mask)
        torch.testing.assert_close(encoder(ids).last_hidden_state, clip.ln_final(x), rtol=0, atol=1e-6)


def test_equal_scenes_are_not_negatives():
    torch.manual_seed(0)
    image = torch.nn.functional.normalize(torch.randn(2, 8), dim=1)
    text = image.clone()
    key = torch.tensor([5, 5])
    apart = torch.tensor([5, 6])
    same = contrastive_loss(image[:1].expand(2, -1), text[:1].expand(2, -1), torch.tensor(100.0), key, key)
    assert float(same) == pytest.approx(math.log(2), abs=1e-5)  # uniform over the two equal ones
    assert contrastive_loss(image, text, torch.tensor(100.0), apart, apart) < 1e-3


def test_an_interrupted_teacher_continues_as_if_it_had_not_stopped(quick, tmp_path, monkeypatch):
    config = TeacherConfig(cycles=((3, 1e-3),), batch_size=8)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        for part in ("clip", "vae"):
            shutil.copytree(quick / part, tmp_path / name / part)
        shutil.copy(quick / "latents.safetensors", tmp_path / name)
    train_teacher(config, tmp_path / "whole", CPU)
    monkeypatch.setattr(teacher, "SAVE_EVERY", 2)
    monkeypatch.setattr(teacher, "_update_average", Interrupt(teacher._update_average, calls=3))
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config, tmp_path / "stopped", CPU)
    monkeypatch.undo()
    train_teacher(config, tmp_path / "stopped", CPU)
    for part in ("unet", "text_encoder"):
        assert sha256_tree(tmp_path / "stopped" / part) == sha256_tree(tmp_path / "whole" / part)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "teacher.jsonl").read_text().splitlines()]
    assert steps == [0], "the second start went on from its third step"


class Interrupt:
    """Calls a function, and raises KeyboardInterrupt in its place at a given call."""

    def __init__(self, function, calls: int) -> None:
        self.function, self.left = function, calls

    def __call__(self, *arguments):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return self.function(*arguments)


def test_regressors_read_a_strength_of_each_image(quick):
    gold = Gold(quick / "regressors")
    images, _ = scene_batch("test", range(3))
    read = gold.read(images)
    assert read.shape == (3, 3) and ((read > 0) & (read < 1)).all()
    assert torch.equal(gold.degradation(images), read.median(0).values)


@pytest.fixture(scope="module")
def vae(quick):
    return AutoencoderKL.from_pretrained(quick / "teacher" / "vae").eval()


def test_a_regressors_batch_is_pure_in_its_step_and_clean_where_its_strength_is_zero(vae):
    config = RegressorConfig(batch_size=32, num_decoded=8)
    decoded = decoded_scenes(config, vae)
    (images, strength), (again, _) = (
        regressor_batch(5, 1, config, decoded, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    scenes, _ = scene_batch("all", range(3 * FIRST + 80, 3 * FIRST + 96))
    assert images.shape == (32, 3, 64, 64) and torch.equal(images, again)
    clean = strength[:16] == 0
    assert 0 < int(clean.sum()) < 16 and torch.equal(images[:16][clean], scenes[clean])
    assert (images[:16][~clean] != scenes[~clean]).flatten(1).any(1).all()
    known = decoded.degraded.float().flatten(1)
    assert all((known == image.flatten()).all(1).any() for image in images[28:])


def test_what_the_vae_repairs_lowers_the_strength():
    """A decoder that halves every difference from grey; one that returns a constant leaves nothing."""
    config = RegressorConfig(num_decoded=70)
    drawn = decoded_scenes(config, Scale(1.0)).strength
    assert (drawn == 0).sum() > 5 and torch.allclose(decoded_scenes(config, Scale(0.5)).strength, drawn / 2, atol=2e-3)
    assert (decoded_scenes(config, Scale(0.0)).strength == 0).all()


class Scale:
    """Stands for a VAE: scales images in [-1, 1]."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def encode(self, images):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=images))

    def decode(self, latents):
        return SimpleNamespace(sample=self.factor * latents)


def test_a_regressor_begins_with_its_classifiers_trunk(quick, vae, tmp_path):
    shutil.copytree(quick / "classifiers", tmp_path / "classifiers")
    config = RegressorConfig(steps={"convnext": 0}, num_decoded=8)
    network = train_regressor("convnext", 2, config, decoded_scenes(config, vae), tmp_path, CPU)
    trunk = load_classifier(tmp_path / "classifiers" / "convnext").backbone.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in network.backbone.state_dict().items())


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
def test_a_degradation_grows_with_its_strength(kind):
    images, _ = scene_batch("all", range(16))
    changed = []
    for strength in (0.1, 0.5, 1.0):
        worse, again = (kind(images, torch.full((16,), strength), torch.Generator().manual_seed(1)) for _ in range(2))
        assert worse.shape == images.shape and torch.equal(worse, again)
        changed.append(float((worse.clamp(0, 1) - images).pow(2).mean()))
    assert 0 < 1.2 * changed[0] < changed[1] and 1.2 * changed[1] < changed[2]
    assert kind not in HELDOUT_DEGRADATIONS


def test_compression_rounds_the_dct():
    images, _ = scene_batch("all", range(2))
    worse = compress(images, torch.tensor([1e-6, 1.0]), torch.Generator())
    assert torch.allclose(worse[0], images[0], atol=1e-4), "the transform is orthonormal"
    block = scipy.fft.dctn(worse[1, 0, :8, :8].double().numpy(), norm="ortho")
    step = 0.1 + 0.25 * np.add.outer(np.arange(8), np.arange(8))
    np.testing.assert_allclose(block / step, np.round(block / step), atol=1e-4)


def test_the_flow_teacher_is_stable_diffusion_3s_form(quick):
    """On the teacher's latents, of at most 10 MB beside its VAE; plain diffusers makes the same images of it."""
    folder = quick / "teacher_flow"
    models = load_models(folder, "cpu", torch.float32)
    assert (models.latent_shape, models.resolution, models.sampler) == ((4, 8, 8), 64, "euler")
    assert torch.equal(models.schedule.sigmas[[0, 499, 999]], torch.tensor([0.0, 0.5, 1.0]).double())
    sizes = {file: file.stat().st_size for file in folder.rglob("*.safetensors") if file.parent.name != "vae"}
    assert len(sizes) == 3 and sum(sizes.values()) <= 10e6
    teacher = load_file(quick / "teacher" / "text_encoder" / "model.safetensors")
    ours = {name.split("text_model.")[-1]: value for name, value in models.text_encoder.state_dict().items()}
    for name, value in teacher.items():
        if "final_layer_norm" not in name:
            assert torch.equal(ours[name.split("text_model.")[-1]], value.float()), name
    prompts = ["a small red circle on the left", "a blue star above a green ring"]
    generators = [[torch.Generator().manual_seed(i) for i in range(2)] for _ in range(2)]
    pipeline = DiffusionPipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    sigmas = [1.0, 0.75, 0.5, 0.25]
    theirs = pipeline(prompts, generator=generators[0], guidance_scale=3.0, sigmas=sigmas, output_type="pt").images
    images = models.sample(prompts, generators[1], num_steps=4, guidance_scale=3.0)
    assert (images - theirs).abs().max() <= 1e-5
