"""The stages of a world build: what each reads, writes and is configured by.

A stage is done when its entry in ``manifest.json`` names the same configuration, the
same inputs (by sha256) and the same outputs that lie on disk; otherwise it is run.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from rgbench.core.errors import UsageError
from rgbench.core.io import read_json, sha256_file, sha256_tree, write_json_atomic
from tools.benchtop.clip import CLIPConfig, RewardConfig, train_clip, train_reward
from tools.benchtop.judges import JudgeConfig, train_judges
from tools.benchtop.proxy import ProxyConfig, train_proxy
from tools.benchtop.teacher import LatentsConfig, TeacherConfig, assemble_pipeline, encode_latents, train_teacher
from tools.benchtop.vae import TextureConfig, VAEConfig, reconstruct, texture


@dataclass(frozen=True)
class WorldRecipe:
    """Every hyper-parameter of the benchtop world; the defaults are what ships."""

    judges: JudgeConfig = field(default_factory=JudgeConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    texture: TextureConfig = field(default_factory=TextureConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)

    @staticmethod
    def quick() -> WorldRecipe:
        """A few steps of everything: exercises the build, trains nothing."""
        return WorldRecipe(
            JudgeConfig(steps={"resnet": 2, "vit": 2, "convnext": 2}, batch_size=8),
            CLIPConfig(steps=2, batch_size=16),
            RewardConfig(steps=2, batch_size=8),
            VAEConfig(steps=2, batch_size=4),
            TextureConfig(steps=3, discriminator_steps=1, batch_size=4),
            LatentsConfig(num_latents=64),
            TeacherConfig(cycles=((2, 1e-3), (2, 1e-3)), batch_size=8),
            ProxyConfig(steps=2, batch_size=16),
        )


@dataclass(frozen=True)
class Stage:
    """One stage: its inputs (files or folders of earlier stages), outputs and function."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    section: str
    run: Callable[[Any, Path, torch.device], None]


def _vae(config: VAEConfig, out: Path, device: torch.device) -> None:
    reconstruct(config, out, device).cpu().save_pretrained(out / "vae")


def _texture(config: TextureConfig, out: Path, device: torch.device) -> None:
    vae = AutoencoderKL.from_pretrained(out / "vae")
    texture(vae, config, out, device).cpu().save_pretrained(out / "vae_texture")


def _latents(config: LatentsConfig, out: Path, device: torch.device) -> None:
    encode_latents(AutoencoderKL.from_pretrained(out / "vae"), config, out, device)


def _teacher(config: TeacherConfig, out: Path, device: torch.device) -> None:
    unet, text_encoder = train_teacher(AutoencoderKL.from_pretrained(out / "vae"), config, out, device)
    unet.half().cpu().save_pretrained(out / "unet")
    text_encoder.half().cpu().save_pretrained(out / "text_encoder")


def _pipeline(config: TeacherConfig, out: Path, device: torch.device) -> None:
    vae = AutoencoderKL.from_pretrained(out / "vae_texture")
    unet = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float16)
    text_encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float16)
    assemble_pipeline(vae, unet, text_encoder, out)


STAGES: dict[str, Stage] = {
    "judges": Stage((), ("judges",), "judges", train_judges),
    "clip": Stage((), ("clip",), "clip", train_clip),
    "reward": Stage(("clip",), ("reward",), "reward", train_reward),
    "vae": Stage((), ("vae",), "vae", _vae),
    "latents": Stage(("vae",), ("latents.safetensors",), "latents", _latents),
    "teacher": Stage(("clip", "latents.safetensors"), ("unet", "text_encoder"), "teacher", _teacher),
    "texture": Stage(("vae",), ("vae_texture",), "texture", _texture),
    "pipeline": Stage(("clip", "unet", "text_encoder", "vae_texture"), ("teacher",), "teacher", _pipeline),
    "proxy": Stage(("clip", "latents.safetensors"), ("latent_proxy",), "proxy", train_proxy),
}
SHIPPED = ("judges", "clip", "reward", "teacher", "latent_proxy")


def run_stages(recipe: WorldRecipe, out: Path, names: list[str], device: torch.device, force: bool = False) -> None:
    """Run the named stages in order, skipping those that are done.

    Raises:
        UsageError: an unknown stage, or an input that no earlier stage has made.
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in names or list(STAGES):
        if name not in STAGES:
            raise UsageError(f"unknown stage {name!r}; known: {', '.join(STAGES)}")
        run_stage(name, recipe, out, device, force)


def run_stage(name: str, recipe: WorldRecipe, out: Path, device: torch.device, force: bool = False) -> None:
    stage, config = STAGES[name], getattr(recipe, STAGES[name].section)
    missing = [i for i in stage.inputs if not (out / i).exists()]
    if missing:
        raise UsageError(f"stage {name} needs {', '.join(missing)} in {out}: build the earlier stages first")
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as the manifest gives it back
    entry: dict[str, Any] = {"config": settings, "inputs": _hashes(out, stage.inputs)}
    manifest = _manifest(out)
    done = manifest["stages"].get(name)
    if (
        not force
        and done
        and all(done[k] == entry[k] for k in entry)
        and done["outputs"] == _hashes(out, stage.outputs)
    ):
        print(f"{name}: done already", flush=True)
        return
    print(f"{name}: running", flush=True)
    start = time.monotonic()
    stage.run(config, out, device)
    entry |= {
        "outputs": _hashes(out, stage.outputs),
        "elapsed_sec": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": str(torch.__version__),
    }
    manifest = _manifest(out)  # another process may have finished another stage meanwhile
    manifest["stages"][name] = entry
    write_json_atomic(out / "manifest.json", manifest)


def _manifest(out: Path) -> dict:
    path = out / "manifest.json"
    return read_json(path) if path.exists() else {"schema_version": 1, "world": "benchtop", "stages": {}}


def _hashes(out: Path, names: tuple[str, ...]) -> dict[str, str]:
    paths = {n: out / n for n in names if (out / n).exists()}
    return {n: sha256_tree(p) if p.is_dir() else sha256_file(p) for n, p in paths.items()}
