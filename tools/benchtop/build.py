"""Stages of a benchtop build: what each reads, writes and is configured by.

A stage is done when its entry in ``manifest.json`` names the present configuration, the present inputs (by sha256) and
the outputs that are on disk; otherwise it runs. The same seeds give the same files.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import read_json, sha256_file, sha256_tree, write_json_atomic
from tools.benchtop.align import AlignConfig, align_proxy
from tools.benchtop.classifiers import ClassifierConfig, train_classifiers
from tools.benchtop.clip import CLIPConfig, ProxyConfig, RewardConfig, train_clip, train_proxy, train_reward
from tools.benchtop.flow import FlowConfig, train_flow
from tools.benchtop.regressors import RegressorConfig, train_regressors
from tools.benchtop.teacher import LatentsConfig, TeacherConfig, assemble_pipeline, encode_latents, train_teacher
from tools.benchtop.vae import TextureConfig, VAEConfig, train_texture, train_vae


@dataclass(frozen=True)
class WorldRecipe:
    """Hyper-parameters of all stages; the defaults made the shipped weights."""

    classifiers: ClassifierConfig = field(default_factory=ClassifierConfig)
    clip: CLIPConfig = field(default_factory=CLIPConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    texture: TextureConfig = field(default_factory=TextureConfig)
    latents: LatentsConfig = field(default_factory=LatentsConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    regressors: RegressorConfig = field(default_factory=RegressorConfig)

    @staticmethod
    def quick() -> WorldRecipe:
        """A few steps of each stage: runs the build, trains nothing."""
        return WorldRecipe(
            ClassifierConfig(steps={"resnet": 2, "vit": 2, "convnext": 2}, batch_size=8),
            CLIPConfig(steps=2, batch_size=16),
            RewardConfig(steps=2, batch_size=8),
            VAEConfig(steps=2, batch_size=4),
            TextureConfig(steps=3, discriminator_steps=1, batch_size=4),
            LatentsConfig(num_latents=64),
            TeacherConfig(cycles=((2, 1e-3), (2, 1e-3)), batch_size=8),
            FlowConfig(cycles=((2, 1e-3), (2, 1e-3)), batch_size=8),
            ProxyConfig(steps=2, batch_size=16),
            AlignConfig(student_steps=1, num_batches=2, cycles=((1, 1, 1e-3), (2, 2, 1e-3)), batch_size=16),
            RegressorConfig(steps={"resnet": 2, "vit": 2, "convnext": 2}, batch_size=8, num_decoded=16),
        )


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        inputs: files or folders of earlier stages.
        outputs: files or folders that it writes.
        section: name of its hyper-parameters in :class:`WorldRecipe`.
        run: called with hyper-parameters, build folder and device.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    section: str
    run: Callable[[Any, Path, torch.device], None]


STAGES: dict[str, Stage] = {
    "classifiers": Stage((), ("classifiers",), "classifiers", train_classifiers),
    "clip": Stage((), ("clip",), "clip", train_clip),
    "reward": Stage(("clip",), ("reward",), "reward", train_reward),
    "vae": Stage((), ("vae",), "vae", train_vae),
    "latents": Stage(("vae",), ("latents.safetensors",), "latents", encode_latents),
    "teacher": Stage(("vae", "clip", "latents.safetensors"), ("unet", "text_encoder"), "teacher", train_teacher),
    "texture": Stage(("vae",), ("vae_texture",), "texture", train_texture),
    "pipeline": Stage(("clip", "unet", "text_encoder", "vae_texture"), ("teacher",), "teacher", assemble_pipeline),
    "flow": Stage(("vae", "clip", "teacher", "latents.safetensors"), ("teacher_flow",), "flow", train_flow),
    "proxy": Stage(("vae", "clip", "latents.safetensors"), ("proxy",), "proxy", train_proxy),
    "align": Stage(("teacher", "reward", "proxy"), ("latent_proxy",), "align", align_proxy),
    "regressors": Stage(("teacher", "classifiers"), ("regressors",), "regressors", train_regressors),
}
SHIPPED = ("classifiers", "clip", "reward", "teacher", "teacher_flow", "latent_proxy", "regressors")


def build(recipe: WorldRecipe, out: Path, names: Sequence[str], device: torch.device, *, force: bool = False) -> None:
    """Run stages in order; those that are done are skipped.

    Args:
        recipe: hyper-parameters.
        out: build folder, kept between calls.
        names: of stages; empty for all.
        device: where they train.
        force: also run stages that are done.

    Raises:
        UsageError: an unknown stage, or a stage whose inputs are missing.
    """
    for name in names:
        if name not in STAGES:
            raise UsageError(f"--stage {name}: {suggest(name, STAGES)}")
    out.mkdir(parents=True, exist_ok=True)
    for name in names or STAGES:
        _run_stage(name, recipe, out, device, force)


def install(out: Path, target: Path) -> None:
    """Copy the shipped parts and the manifest of a finished build.

    Raises:
        UsageError: a part is not built.
    """
    missing = [name for name in SHIPPED if not (out / name).exists()]
    if missing:
        raise UsageError(f"{out}: not built yet: {', '.join(missing)}")
    for name in SHIPPED:
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(out / name, target / name)
    write_json_atomic(target / "manifest.json", read_json(out / "manifest.json"))


def _run_stage(name: str, recipe: WorldRecipe, out: Path, device: torch.device, force: bool) -> None:
    stage, config = STAGES[name], getattr(recipe, STAGES[name].section)
    missing = [i for i in stage.inputs if not (out / i).exists()]
    if missing:
        raise UsageError(f"stage {name}: {out} lacks {', '.join(missing)}; build the earlier stages first")
    settings = json.loads(json.dumps(dataclasses.asdict(config)))  # as the manifest returns it
    entry: dict[str, Any] = {"config": settings, "inputs": _hashes(out, stage.inputs)}
    done = _manifest(out)["stages"].get(name)
    if not force and done and done == done | entry | {"outputs": _hashes(out, stage.outputs)}:
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
