"""Replay of golden numbers through the code of trainers and rewards: ``python -m tools.golden PATH_STEM...``.

Two kinds of file: one distillation step (STEM.json beside STEM.safetensors), and preprocessing (STEM.safetensors
alone). Each golden value gets a line: stem, name, error, ``ok`` or ``above TOLERANCE``. The error is
max|a − b| / max|b|, absolute where max|b| = 0. Exit code 0: all within the tolerance; 1: not; 2: no such file, or one
of another format.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn

from rgbench.core.errors import UsageError
from rgbench.core.io import load_safetensors, read_json
from rgbench.diffusion.consistency import boundary_scalings
from rgbench.models.pipeline import decode_images
from rgbench.rewards.clip import hps_preprocess
from rgbench.rewards.latent_proxy import PairLoss, pair_losses
from rgbench.train.lcd import Distillation, Inputs, Networks, distil, ema_update
from rgbench.train.recipe import LCDSection

STEP_TOLERANCE = 1e-9
PREPROCESS_TOLERANCE = 1e-6
EMA_DECAY = 0.95
EXPECTED_IMAGE = re.compile(r"expected_(\d+)_(\d+)_aa([01])")
KEYS = (
    "unet",
    "student_time_cond_proj_dim",
    "vae",
    "scheduler",
    "num_ddim_timesteps",
    "timestep_scaling",
    "huber_c",
    "expected",
)
INPUTS = ("latents", "noise", "prompt_embeds", "uncond_embeds", "index", "w", "rm_projection", "rm_text")


@dataclass(frozen=True)
class GoldenReport:
    """Errors of a replay.

    Attributes:
        kind: ``step`` or ``preprocess``.
        errors: name of a golden value → largest relative error.
        tolerance: largest error that passes.
        unknown: golden values that were not replayed.
    """

    kind: str
    errors: dict[str, float]
    tolerance: float
    unknown: list[str]

    @property
    def passed(self) -> bool:
        """Whether there are errors and all are within the tolerance; NaN is not."""
        return bool(self.errors) and all(error <= self.tolerance for error in self.errors.values())


def replay(path_stem: str | Path) -> GoldenReport:
    """Replay a golden file.

    Args:
        path_stem: path without its extension; .json or .safetensors is removed.

    Raises:
        UsageError: missing files, or files of another format.
    """
    stem = Path(path_stem)
    if stem.suffix in (".json", ".safetensors"):
        stem = stem.with_suffix("")
    tensors_file, config_file = stem.parent / f"{stem.name}.safetensors", stem.parent / f"{stem.name}.json"
    tensors = load_safetensors(tensors_file)
    if config_file.is_file():
        config = read_json(config_file)
        return _report("step", _step_errors(config, tensors, config_file), STEP_TOLERANCE, _step_names(config, tensors))
    names = [name for name in tensors if name.startswith("expected_")]
    if any(EXPECTED_IMAGE.fullmatch(name) for name in names):
        return _report("preprocess", _preprocess_errors(tensors, tensors_file), PREPROCESS_TOLERANCE, names)
    raise UsageError(f"{tensors_file}: neither {config_file.name} beside it nor expected_* tensors in it")


def _report(kind: str, errors: dict[str, float], tolerance: float, names: list[str]) -> GoldenReport:
    return GoldenReport(kind, errors, tolerance, [name for name in names if name not in errors])


def _step_names(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """All golden values of a step, as they are named in the errors."""
    names = [name for name in tensors if name.startswith("out_")]
    for name, value in config["expected"].items():
        names += [f"{name}.{key}" for key in value] if isinstance(value, dict) else [name]
    return names


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return max|a − b| / max|b|, absolute where max|b| = 0; infinity where the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = float(expected.abs().max())
    return float((actual - expected).abs().max()) / (scale or 1.0)


def _preprocess_errors(tensors: dict[str, Tensor], file: Path) -> dict[str, float]:
    errors = {}
    for name, expected in sorted(tensors.items()):
        match = EXPECTED_IMAGE.fullmatch(name)
        if not match:
            continue
        image = tensors.get(f"image_{match[1]}")
        if image is None:
            raise UsageError(f"{file}: image_{match[1]} of {name} is missing")
        images = image[None].to(expected.dtype) / 255
        errors[name] = relative_error(hps_preprocess(images, int(match[2]), match[3] == "1")[0], expected)
    return errors


def _step_errors(config: dict[str, Any], tensors: dict[str, Tensor], file: Path) -> dict[str, float]:
    missing = [k for k in KEYS if k not in config]
    missing += [k for k in INPUTS if k not in tensors]
    if missing:
        raise UsageError(f"{file}: not a golden step; it lacks {', '.join(missing)}")
    networks, vae = _load_networks(config, tensors)
    student, target = cast(nn.Module, networks.student), cast(nn.Module, networks.target)
    settings = _settings(config)
    inputs = Inputs(
        latents=tensors["latents"],
        noise=tensors["noise"],
        prompt_embeds=tensors["prompt_embeds"],
        uncond_embeds=tensors["uncond_embeds"],
        index=tensors["index"],
        guidance_scale=tensors["w"],
    )
    distilled = distil(networks, settings, inputs)
    images = decode_images(vae, distilled.prediction / config["vae"]["scaling_factor"])
    rewards = toy_reward(images, tensors["rm_projection"], tensors["rm_text"])
    errors = _tensor_errors(distilled, images, rewards, settings, tensors)
    squared = distil(networks, settings.model_copy(update={"loss": "l2"}), inputs).losses.mean()
    huber, reward = distilled.losses.mean(), -rewards.mean()
    losses = {"huber": huber, "l2": squared, "reward_loss": reward, "huber_plus_reward": huber + reward}
    for name, loss in losses.items():
        errors |= _loss_errors(name, loss, student, config["expected"])
    errors |= _pair_errors(tensors, config["expected"])
    if "ema_l2" in config["expected"]:
        ema_update(target, student, EMA_DECAY)
        errors["ema_l2"] = _scalar_error(_norm(list(target.parameters())), config["expected"]["ema_l2"])
    return errors


def _load_networks(config: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Networks, AutoencoderKL]:
    """diffusers' classes with the file's weights and dtype; the schedule is float32, widened."""
    dtype = tensors["latents"].dtype
    dim = config["student_time_cond_proj_dim"]
    parts: dict[str, nn.Module] = {
        "teacher": UNet2DConditionModel.from_config(config["unet"]),
        "student": UNet2DConditionModel.from_config(config["unet"], time_cond_proj_dim=dim),
        "target": UNet2DConditionModel.from_config(config["unet"], time_cond_proj_dim=dim),
        "vae": AutoencoderKL.from_config(config["vae"]),
    }
    for name, part in parts.items():
        state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
        nn.Module.to(part, dtype)  # diffusers' own `to` warns about every change of dtype
        part.eval().requires_grad_(name == "student").load_state_dict(state)
    scheduler = DDIMScheduler.from_config(config["scheduler"])
    networks = Networks(
        teacher=parts["teacher"],
        student=parts["student"],
        target=parts["target"],
        schedule=scheduler.alphas_cumprod.to(dtype),
        prediction_type=scheduler.config.prediction_type,
    )
    return networks, parts["vae"]


def _settings(config: dict[str, Any]) -> LCDSection:
    """The step's settings, unchecked: a golden file may have values that no recipe may have."""
    return LCDSection.model_construct(
        num_ddim_timesteps=config["num_ddim_timesteps"],
        timestep_scaling=config["timestep_scaling"],
        huber_c=config["huber_c"],
        loss="huber",
    )


def toy_reward(images: Tensor, projection: Tensor, text: Tensor) -> Tensor:
    """The golden files' reward, (B,): flatten, project, L2-normalise, dot with the text features."""
    return (F.normalize(images.flatten(1) @ projection, dim=-1) * text).sum(-1)


def _tensor_errors(
    distilled: Distillation, images: Tensor, rewards: Tensor, settings: LCDSection, tensors: dict[str, Tensor]
) -> dict[str, float]:
    dtype, scaling = distilled.noisy.dtype, settings.timestep_scaling
    c_skip_start, c_out_start = boundary_scalings(distilled.start_timesteps, scaling, dtype)
    c_skip, c_out = boundary_scalings(distilled.timesteps, scaling, dtype)
    outputs = {
        "out_start_timesteps": distilled.start_timesteps,
        "out_timesteps": distilled.timesteps,
        "out_c_skip_start": c_skip_start,
        "out_c_out_start": c_out_start,
        "out_c_skip": c_skip,
        "out_c_out": c_out,
        "out_noisy": distilled.noisy,
        "out_w_embedding": cast(Tensor, distilled.w_embedding),
        "out_model_pred": distilled.prediction,
        "out_x_prev": distilled.previous,
        "out_target": distilled.target,
        "out_decoded": images,
        "out_reward": rewards,
    }
    return {name: relative_error(value, tensors[name]) for name, value in outputs.items() if name in tensors}


def _loss_errors(name: str, loss: Tensor, student: nn.Module, expected: dict[str, Any]) -> dict[str, float]:
    """Errors of a loss's value and of the L2 norms of its gradient."""
    parameters = dict(student.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    by_name = dict(zip(parameters, gradients, strict=True))
    found = {
        "value": loss,
        "grad_norm": _norm(list(gradients)),
        "grad_norm_conv_in": _norm([by_name["conv_in.weight"]]),
    }
    wanted = expected.get(name, {})
    return {f"{name}.{key}": _scalar_error(found[key], value) for key, value in wanted.items() if key in found}


def _pair_errors(tensors: dict[str, Tensor], expected: dict[str, Any]) -> dict[str, float]:
    kinds: dict[str, PairLoss] = {"lrm_pair_kl": "kl", "lrm_pair_kl_smooth_gt": "smooth"}
    errors = {}
    for name, kind in kinds.items():
        if name not in expected:
            continue
        losses, agreement = pair_losses(tensors["lrm_expert_logits"], tensors["lrm_latent_logits"], kind)
        errors[f"{name}.loss"] = _scalar_error(losses.mean(), expected[name]["loss"])
        errors[f"{name}.pair_accuracy"] = _scalar_error(agreement.mean(), expected[name]["pair_accuracy"])
    return errors


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.detach().norm() for tensor in tensors]).norm()


def _scalar_error(actual: Tensor, expected: float) -> float:
    return relative_error(actual.reshape(1), torch.tensor([expected], dtype=torch.float64))


def main(stems: Sequence[str]) -> int:
    """Print the errors of each file; return the exit code."""
    if not stems:
        print("usage: python -m tools.golden PATH_STEM [PATH_STEM ...]", file=sys.stderr)
        return 2
    passed = True
    for stem in stems:
        try:
            report = replay(stem)
        except UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        passed = passed and report.passed
        for name, found in report.errors.items():
            verdict = "ok" if found <= report.tolerance else f"above {report.tolerance:g}"
            print(f"{stem}\t{name}\t{found:.3e}\t{verdict}")
        if report.unknown:
            print(f"{stem}: not replayed: {', '.join(report.unknown)}", file=sys.stderr)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
