"""Golden files: the shipped ones, one of another shape made here by plain code, and broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from rgbench.core.errors import UsageError
from tools.golden import main, relative_error, replay

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", ["step_epsilon", "step_v"])
def test_golden_steps(name):
    report = replay(GOLDEN / name)
    assert report.kind == "step" and report.unknown == []
    assert len(report.errors) == 13 + 4 * 3 + 2 * 2 + 1
    assert report.passed and max(report.errors.values()) <= 1e-9


def test_golden_preprocessing():
    report = replay(str(GOLDEN / "hps_preprocess.safetensors"))
    assert report.kind == "preprocess" and len(report.errors) == 12 and report.unknown == []
    assert max(report.errors.values()) <= 1e-6


def test_the_command_prints_a_line_for_each_golden_value(capsys):
    stems = [str(GOLDEN / stem) for stem in ("step_epsilon", "hps_preprocess")]
    assert main(stems) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 30 + 12 and {row[0] for row in rows} == set(stems)
    assert all(float(error) <= 1e-6 and verdict == "ok" for _, _, error, verdict in rows)


@pytest.mark.parametrize(
    ("stem", "name", "relative"), [("step_v", "out_target", 1e-8), ("hps_preprocess", "expected_0_28_aa1", 1e-5)]
)
def test_the_command_fails_where_a_value_is_off(stem, name, relative, tmp_path, capsys):
    tensors = load_file(GOLDEN / f"{stem}.safetensors")
    tensors[name] = tensors[name] * (1 + relative)
    tensors["out_of_another_time"] = torch.zeros(1)
    save_file(tensors, tmp_path / f"{stem}.safetensors")
    if (GOLDEN / f"{stem}.json").exists():
        (tmp_path / f"{stem}.json").write_bytes((GOLDEN / f"{stem}.json").read_bytes())
    assert main([str(tmp_path / stem)]) == 1
    said = capsys.readouterr()
    bad = [line for line in said.out.splitlines() if "above" in line]
    assert len(bad) == 1 and f"\t{name}\t" in bad[0]
    assert ("not replayed: out_of_another_time" in said.err) == (stem == "step_v")


def test_the_command_names_files_that_are_absent(capsys):
    assert main(["nowhere/step"]) == 2 and main([]) == 2
    said = capsys.readouterr().err
    assert "error: nowhere/step" in said and "usage: " in said


def test_preprocessing_of_unseen_sizes(tmp_path):
    tensors = {}
    for i, (shape, size) in enumerate([((40, 224), 224), ((500, 333), 224), ((9, 28), 28)]):
        image = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        tensors[f"image_{i}"] = image
        scale = size / max(shape)
        new = [round(side * scale) for side in shape]
        for aa in (False, True):
            small = image[None] / 255
            if scale != 1:
                small = F.interpolate(small, new, mode="bicubic", antialias=aa)
            square = torch.zeros(3, size, size)
            top, left = (size - new[0]) // 2, (size - new[1]) // 2
            square[:, top : top + new[0], left : left + new[1]] = small[0]
            mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
            std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
            tensors[f"expected_{i}_{size}_aa{int(aa)}"] = (square - mean) / std
    save_file(tensors, tmp_path / "own.safetensors")
    report = replay(tmp_path / "own")
    assert len(report.errors) == 6 and report.passed


def test_step_of_another_kind(tmp_path):
    """Prediction of the sample, N = 30 (which does not divide 1000), other sizes, linear betas."""
    config, tensors = _reference_step("sample", batch=2, grid=30, scaling=7.0, huber_c=0.02)
    (tmp_path / "own.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "own.safetensors")
    report = replay(tmp_path / "own")
    assert max(report.errors.values()) <= 1e-9, report.errors
    assert {"huber.grad_norm", "l2.value", "out_x_prev", "ema_l2", "lrm_pair_kl.loss"} <= report.errors.keys()


def test_a_wrong_number_is_found(tmp_path):
    tensors = load_file(GOLDEN / "step_v.safetensors")
    config = json.loads((GOLDEN / "step_v.json").read_text())
    tensors["out_x_prev"] = tensors["out_x_prev"] * (1 + 1e-8)
    config["expected"]["l2"]["grad_norm"] *= 1 + 1e-8
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "wrong.safetensors")
    report = replay(tmp_path / "wrong")
    assert not report.passed
    wrong = {name for name, error in report.errors.items() if error > report.tolerance}
    assert wrong == {"out_x_prev", "l2.grad_norm"}


def test_errors_say_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match=r"nowhere\.safetensors"):
        replay(tmp_path / "nowhere")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="expected_"):
        replay(tmp_path / "other")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="unet, student_time_cond_proj_dim"):
        replay(tmp_path / "other")


def test_relative_error():
    assert relative_error(torch.tensor([1.0, 4.0]), torch.tensor([1.0, 5.0])) == pytest.approx(0.2)
    assert relative_error(torch.tensor([0.5]), torch.tensor([0.0])) == 0.5
    assert relative_error(torch.zeros(2), torch.zeros(3)) == math.inf


def _reference_step(kind: str, batch: int, grid: int, scaling: float, huber_c: float) -> tuple[dict, dict]:
    """A golden step from plain code: loops over samples, diffusers' schedulers, nothing of the package."""
    unet_config = {
        "sample_size": 4,
        "layers_per_block": 1,
        "block_out_channels": [4, 8],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "cross_attention_dim": 6,
        "attention_head_dim": 4,
        "norm_num_groups": 2,
    }
    vae_config = {
        "block_out_channels": [4, 4],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 2,
        "sample_size": 8,
        "scaling_factor": 1.7,
    }
    schedule = {"num_train_timesteps": 1000, "beta_schedule": "linear", "prediction_type": kind}
    config = {
        "unet": unet_config,
        "student_time_cond_proj_dim": 10,
        "vae": vae_config,
        "scheduler": schedule,
        "num_ddim_timesteps": grid,
        "timestep_scaling": scaling,
        "huber_c": huber_c,
        "w_min": 0,
        "w_max": 3,
        "dtype": "float64",
    }
    torch.manual_seed(5)
    parts = {
        "teacher": UNet2DConditionModel(**unet_config),
        "student": UNet2DConditionModel(**unet_config, time_cond_proj_dim=10),
        "target": UNet2DConditionModel(**unet_config, time_cond_proj_dim=10),
        "vae": AutoencoderKL(**vae_config),
    }
    for part in parts.values():
        torch.nn.Module.to(part, torch.float64).eval()
    double = torch.float64
    given = {
        "latents": torch.randn(batch, 4, 4, 4, dtype=double),
        "noise": torch.randn(batch, 4, 4, 4, dtype=double),
        "prompt_embeds": torch.randn(batch, 3, 6, dtype=double),
        "uncond_embeds": torch.randn(batch, 3, 6, dtype=double),
        "index": torch.tensor([0, grid - 1])[:batch],
        "w": torch.tensor([0.25, 2.5], dtype=double)[:batch],
        "rm_projection": torch.randn(3 * 8 * 8, 5, dtype=double),
        "rm_text": torch.randn(batch, 5, dtype=double),
        "lrm_expert_logits": torch.randn(3, 7, dtype=double),
        "lrm_latent_logits": torch.randn(3, 7, dtype=double),
    }
    out, losses = _reference_losses(config, parts, given)
    student = dict(parts["student"].named_parameters())
    expected = {}
    for name, loss in losses.items():
        gradients = dict(
            zip(student, torch.autograd.grad(loss, list(student.values()), retain_graph=True), strict=True)
        )
        squares = sum(float((g**2).sum()) for g in gradients.values())
        conv_in = float(gradients["conv_in.weight"].norm())
        expected[name] = {"value": float(loss.detach()), "grad_norm": math.sqrt(squares), "grad_norm_conv_in": conv_in}
    averaged = [0.95 * t + 0.05 * s for t, s in zip(parts["target"].parameters(), student.values(), strict=True)]
    expected["ema_l2"] = math.sqrt(sum(float((p.detach() ** 2).sum()) for p in averaged))
    for name, smooth in (("lrm_pair_kl", False), ("lrm_pair_kl_smooth_gt", True)):
        expected[name] = _reference_pairs(given["lrm_expert_logits"], given["lrm_latent_logits"], smooth)
    states = {f"{n}.{k}": v.contiguous() for n, part in parts.items() for k, v in part.state_dict().items()}
    out = {name: value.detach().contiguous() for name, value in out.items()}
    return {**config, "expected": expected}, {**states, **given, **out}


def _reference_losses(config: dict, parts: dict, given: dict) -> tuple[dict, dict]:
    ddpm, rows = DDPMScheduler(**config["scheduler"]), []
    k, scaling = 1000 // config["num_ddim_timesteps"], config["timestep_scaling"]
    cumprod = ddpm.alphas_cumprod.double()
    for b in range(len(given["latents"])):
        w, z, eps = given["w"][b], given["latents"][b : b + 1], given["noise"][b : b + 1]
        prompt, empty = given["prompt_embeds"][b : b + 1], given["uncond_embeds"][b : b + 1]
        start = k * (int(given["index"][b]) + 1) - 1
        below = max(start - k, 0)
        noisy = cumprod[start].sqrt() * z + (1 - cumprod[start]).sqrt() * eps
        half = torch.exp(-torch.arange(5, dtype=torch.float64) * math.log(10000) / 4)
        embedding = torch.cat([torch.sin(1000 * w * half), torch.cos(1000 * w * half)])[None]

        def f(net, z, t, embedding=embedding, prompt=prompt):
            # a network that predicts the sample: x0 is its output
            x0 = net(z, t, timestep_cond=embedding, encoder_hidden_states=prompt).sample
            st = scaling * t
            return 0.25 / (st**2 + 0.25) * z + st / math.sqrt(st**2 + 0.25) * x0

        with torch.no_grad():
            # one DDIM step of diffusers' scheduler is linear in the output: guide its two results
            ddim = DDIMScheduler(**config["scheduler"], clip_sample=False, set_alpha_to_one=False)
            ddim.alphas_cumprod, ddim.final_alpha_cumprod = cumprod, cumprod[0]
            ddim.num_inference_steps = config["num_ddim_timesteps"]
            step = [
                ddim.step(parts["teacher"](noisy, start, encoder_hidden_states=e).sample, start, noisy).prev_sample
                for e in (prompt, empty)
            ]
            previous = step[0] + w * (step[0] - step[1])
            target = f(parts["target"], previous, below)
        prediction = f(parts["student"], noisy, start)
        image = (parts["vae"].decode(prediction / config["vae"]["scaling_factor"]).sample / 2 + 0.5).clamp(0, 1)
        feature = image.flatten() @ given["rm_projection"]
        reward = feature @ given["rm_text"][b] / feature.norm()
        rows.append((noisy, embedding, prediction, previous, target, image, reward[None]))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    names = ["noisy", "w_embedding", "model_pred", "x_prev", "target", "decoded", "reward"]
    out = {f"out_{name}": column for name, column in zip(names, columns, strict=True)}
    d = out["out_model_pred"] - out["out_target"]
    huber = (torch.sqrt(d**2 + config["huber_c"] ** 2) - config["huber_c"]).mean()
    reward_loss = -out["out_reward"].mean()
    losses = {"huber": huber, "l2": (d**2).mean(), "reward_loss": reward_loss, "huber_plus_reward": huber + reward_loss}
    return out, losses


def _reference_pairs(expert: torch.Tensor, proxy: torch.Tensor, smooth: bool) -> dict:
    total, right = 0.0, 0
    for column in range(expert.shape[1]):
        for first, second in ((0, 1), (0, 2), (1, 2)):
            e, p = (x[[first, second], column].tolist() for x in (expert, proxy))
            label, guess = (1 / (1 + math.exp(x[1] - x[0])) for x in (e, p))
            right += (e[0] > e[1]) == (p[0] > p[1])
            if smooth and second == 2 and e[0] > e[1]:
                label = 0.5
            total += label * math.log(label / guess) + (1 - label) * math.log((1 - label) / (1 - guess))
    return {"loss": total / expert.shape[1], "pair_accuracy": right / (3 * expert.shape[1])}
