"""Tiny random models in the folders that users have, and what metrics are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from rgbench.core.run import RunDirectory
from rgbench.data.prompts import PromptSet
from rgbench.evaluate.config import EvalConfig
from rgbench.evaluate.evaluate import evaluate
from rgbench.evaluate.results import ModelResult, load_results
from rgbench.metrics.context import Context
from rgbench.metrics.features import FeatureRows, FeatureSet
from rgbench.metrics.networks import EFFLITE0_FEATURES, EffLite0Network
from rgbench.metrics.reference import ReferenceScenes
from rgbench.metrics.values import MetricValue
from rgbench.models.presets import PRESETS
from rgbench.rewards.base import fingerprint_id
from rgbench.rewards.clip import HPSReward

BENCHTOP = PRESETS["benchtop"]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
NOISE |= {"clip_sample": False, "steps_offset": 1}


def save_pipeline(folder: Path, *, student: bool, seed: int = 0, sample_size: int = 8) -> Path:
    """A diffusers folder of a random model with the benchtop's text encoder; by default it makes 64 px."""
    torch.manual_seed(seed)
    shipped = BENCHTOP.teacher_folder()
    text_encoder = CLIPTextModel.from_pretrained(shipped / "text_encoder")
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=4,
    )
    unet = UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=8,
        cross_attention_dim=text_encoder.config.hidden_size,
        time_cond_proj_dim=16 if student else None,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(shipped / "tokenizer"),
        unet=unet,
        scheduler=LCMScheduler(**NOISE) if student else DDIMScheduler(**NOISE, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_run(folder: Path, *, status: str = "finished", method: str = "rg_lcd", **fields: Any) -> Path:
    """A run with a random student, trained (so it says) on the benchtop's reward."""
    fingerprint = HPSReward.load(BENCHTOP.reward_folder(), antialias=False, device="cpu").fingerprint()
    meta = {
        "name": folder.name,
        "recipe": method,
        "method": method,
        "seed": 0,
        "world": "benchtop",
        "teacher": {"preset": "benchtop", "path": str(BENCHTOP.teacher_folder()), "sha256": "0" * 64},
        "rewards": [{"name": "hps", "fingerprint": fingerprint, "fingerprint_id": fingerprint_id(fingerprint)}],
        "status": status,
        "step": 3,
        "steps": 3 if status == "finished" else 9,
        "cost": {"wall_sec": 1.5, "cpu_sec": 2.5, "images": 12, "reward_calls": 12, "peak_rss_gib": 1.0},
        "sampling": {"sampler": "lcm", "steps": 2, "guidance_scale": 5.0},
        **fields,
    }
    run = RunDirectory(folder).create({"kind": method, "seed": 0}, meta)
    save_pipeline(run.pipeline, student=True)
    return folder


def make_context(prompts: PromptSet, cache: Path, **fields: Any) -> Context:
    """A metric's context on the CPU, 64 px, with the benchtop's weights."""
    scenes = ReferenceScenes(prompts, cache)
    given = {
        "prompts": prompts,
        "resolution": 64,
        "reference": scenes,
        "features": FeatureSet(scenes, EffLite0Network(torch.device("cpu"))),
        "rows": FeatureRows(len(prompts), EFFLITE0_FEATURES),
        "reward_folder": BENCHTOP.root / "reward",
        "classifiers_folder": BENCHTOP.root / "classifiers",
        "regressors_folder": BENCHTOP.root / "regressors",
        "trained_rewards": (),
        "device": torch.device("cpu"),
    }
    return Context(**{**given, **fields})


def run_eval(targets: Sequence[str], metrics: Sequence[str] = (), **options: Any) -> list[ModelResult]:
    """``rgbench eval`` from Python, on the CPU."""
    return evaluate(EvalConfig(targets=targets, metrics=metrics, **{"device": "cpu", **options}))


def stored_values(root: Path | str = "results") -> dict[str, MetricValue]:
    """Values of the one result under a folder, by metric; their rows are loaded."""
    (result,) = load_results(Path(root))
    rows = {value.metric: result.rows(*value.key) for value in result.values}
    return {value.metric: replace(value, rows=rows[value.metric]) for value in result.values}
