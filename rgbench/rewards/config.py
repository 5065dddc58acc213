"""Rewards in a recipe: one model a kind, weighted sums, plug-ins; and where their published weights lie.

Published weights are looked up in the local caches alone. A missing file is an error that names its size and the
command that fetches it.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rgbench.core.config import Section
from rgbench.core.errors import UsageError, suggest
from rgbench.core.io import sha256_file, user_cache
from rgbench.core.registry import names
from rgbench.models.presets import HPS_REPO, HPS_REVISION

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Options = dict[str, bool | int | float | str | list[bool | int | float | str] | None]


class RewardSection(Section):
    """A reward of a recipe.

    Attributes:
        kind: its name in the registry.
    """

    kind: str


class SingleReward(RewardSection):
    """A reward that is not a sum.

    Attributes:
        path: its weights; null for the preset's, or the published ones in the local cache.
        blur_sigma: standard deviation, in pixels of the decoded image, of a Gaussian blur before the reward; 0: none.
        random_crop: share of each side that the reward sees, at a place drawn per sample and step; null: all.
    """

    path: str | None = None
    blur_sigma: NonNegative = 0.0
    random_crop: Annotated[float, Field(gt=0, lt=1)] | None = None


class PixelReward(SingleReward):
    """A reward that rgbench resizes the images for.

    Attributes:
        antialias: filter before subsampling. No default: it changes the result.
    """

    antialias: bool


class HPS(PixelReward):
    """HPSv2.1, HPSv2.0, or an open_clip folder scored the same way, such as the benchtop's reward.

    Attributes:
        version: the published checkpoint in the local cache; null: ``path``, or the preset's reward.
    """

    kind: Literal["hps"] = "hps"
    version: Literal["2.1", "2.0"] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> HPS:
        if self.path and self.version:
            raise ValueError("give path or version, not both")
        return self


class CLIPScore(PixelReward):
    """CLIPScore with an open_clip CLIP."""

    kind: Literal["clip_score"]


class PickScore(PixelReward):
    """PickScore."""

    kind: Literal["pickscore"]


class Aesthetic(PixelReward):
    """LAION's aesthetic predictor.

    Attributes:
        head: ``mlp``, the improved predictor, or ``linear``, the first one; their scores are not comparable.
        head_path: the head's file; null for the published one in the local cache.
    """

    kind: Literal["aesthetic"]
    head: Literal["mlp", "linear"]
    head_path: str | None = None


class Process(SingleReward):
    """A reward that a worker process computes in another Python environment; without gradient.

    Attributes:
        path: its weights; null for where the scorer itself looks.
        python: interpreter of that environment.
        worker: a scorer that comes with rgbench, a .py file, or a module of that environment.
        options: keyword arguments of the scorer's ``load``.
        device: torch device of the worker; null for rgbench's own.
        timeout: seconds without progress after which the worker is stopped.
    """

    kind: Literal["process"]
    python: str
    worker: str
    options: Options = Field(default={})
    device: str | None = None
    timeout: Positive = 600.0

    @field_validator("options")
    @classmethod
    def _fields_of_their_own(cls, options: Options) -> Options:
        for name in ("path", "device"):
            if name in options:
                raise ValueError(f"{name} is a field of its own, beside options")
        return options


class Plugin(PixelReward):
    """A reward of an installed plug-in.

    Attributes:
        options: keyword arguments of its ``load``.
    """

    options: Options = Field(default={})

    @field_validator("kind")
    @classmethod
    def _known(cls, kind: str) -> str:
        known = names("reward")
        if kind == "sum":
            raise ValueError("a sum cannot be a term of a sum")
        if kind not in known:
            raise ValueError(f"unknown reward; {suggest(kind, known)}")
        return kind


CLOSED: dict[str, type[SingleReward]] = {
    "hps": HPS, "clip_score": CLIPScore, "pickscore": PickScore, "aesthetic": Aesthetic, "process": Process
}  # fmt: skip


def _class_name(value: Any) -> str:
    """Name of the model that validates a reward; a missing ``kind`` is ``hps``, an unknown one a plug-in's."""
    kind = value.get("kind", "hps") if isinstance(value, dict) else getattr(value, "kind", "hps")
    return CLOSED[kind].__name__ if isinstance(kind, str) and kind in CLOSED else "Plugin"


OneReward = Annotated[
    Annotated[HPS, Tag("HPS")]
    | Annotated[CLIPScore, Tag("CLIPScore")]
    | Annotated[PickScore, Tag("PickScore")]
    | Annotated[Aesthetic, Tag("Aesthetic")]
    | Annotated[Process, Tag("Process")]
    | Annotated[Plugin, Tag("Plugin")],
    Discriminator(_class_name),
]


class Weighted(Section):
    """What a term of a sum has in addition.

    Attributes:
        scale: the term's weight.
    """

    scale: NonNegative = 1.0


class HPSTerm(HPS, Weighted):
    """An HPS in a sum."""


class CLIPScoreTerm(CLIPScore, Weighted):
    """A CLIPScore in a sum."""


class PickScoreTerm(PickScore, Weighted):
    """A PickScore in a sum."""


class AestheticTerm(Aesthetic, Weighted):
    """An aesthetic rating in a sum."""


class ProcessTerm(Process, Weighted):
    """A process in a sum."""


class PluginTerm(Plugin, Weighted):
    """A plug-in in a sum."""


Term = Annotated[
    Annotated[HPSTerm, Tag("HPSTerm")]
    | Annotated[CLIPScoreTerm, Tag("CLIPScoreTerm")]
    | Annotated[PickScoreTerm, Tag("PickScoreTerm")]
    | Annotated[AestheticTerm, Tag("AestheticTerm")]
    | Annotated[ProcessTerm, Tag("ProcessTerm")]
    | Annotated[PluginTerm, Tag("PluginTerm")],
    Discriminator(lambda value: f"{_class_name(value)}Term"),
]


class Sum(RewardSection):
    """A weighted sum of rewards.

    Attributes:
        terms: its rewards and their weights.
        standardise: ``calibrated``: each term is (score − mean) / std over images of the training data, measured before
            the first step and kept in the checkpoint; ``none``: raw scores.
        calibration_images: how many images that takes.
        balance: ``gradient``: each term's gradient at the image gets the same length per weight; ``none``: as it is.
    """

    kind: Literal["sum"]
    terms: Annotated[list[Term], Field(min_length=2)]
    standardise: Literal["calibrated", "none"] = "calibrated"
    calibration_images: Annotated[int, Field(ge=2)] = 64
    balance: Literal["none", "gradient"] = "none"


def _class_name_or_sum(value: Any) -> str:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "Sum" if kind == "sum" else _class_name(value)


RewardConfig = Annotated[
    Annotated[HPS, Tag("HPS")]
    | Annotated[CLIPScore, Tag("CLIPScore")]
    | Annotated[PickScore, Tag("PickScore")]
    | Annotated[Aesthetic, Tag("Aesthetic")]
    | Annotated[Process, Tag("Process")]
    | Annotated[Plugin, Tag("Plugin")]
    | Annotated[Sum, Tag("Sum")],
    Discriminator(_class_name_or_sum),
]


def reward_section(kind: str) -> SingleReward:
    """The settings of a reward that is asked for by its kind alone: defaults, with antialiasing.

    Raises:
        UsageError: no such kind, or one that has no defaults.
    """
    known = [name for name in CLOSED if name != "process"]
    if kind not in known:
        raise UsageError(
            f"--score {kind[:80]}: no reward of this kind without a recipe's reward; {suggest(kind, known)}"
        )
    options = {"antialias": True} if issubclass(CLOSED[kind], PixelReward) else {}
    return CLOSED[kind].model_validate({"kind": kind, **options})


@dataclass(frozen=True)
class HubWeights:
    """Files of one repository on the Hugging Face hub.

    Attributes:
        repo: ``owner/name``.
        revision: commit, 40 hex digits; another one may hold other weights under the same name.
        files: paths in the repository.
        size: of all of them, for people.
        whole: whether the reward is the folder, and not its one file.
    """

    repo: str
    revision: str
    files: tuple[str, ...]
    size: str
    whole: bool = False

    def find(self) -> Path | None:
        """The file or folder in the local hub cache (``HF_HOME``), or None."""
        from huggingface_hub import try_to_load_from_cache

        found = [try_to_load_from_cache(self.repo, file, revision=self.revision) for file in self.files]
        paths = [Path(path) for path in found if isinstance(path, str)]
        if len(paths) < len(found):
            return None
        return paths[0].parent if self.whole else paths[0]

    def command(self) -> str:
        """The command that fetches them into the cache."""
        return shlex.join(["hf", "download", self.repo, *self.files, "--revision", self.revision])


@dataclass(frozen=True)
class FileWeights:
    """One published file outside of a model hub.

    Attributes:
        name: in the local cache.
        url: where it is published, at one commit.
        size: for people.
        sha256: of its bytes; None where none is published, so that the commit of the address has to do.
    """

    name: str
    url: str
    size: str
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Where it is looked for: ``$XDG_CACHE_HOME/rgbench/weights``, else ``~/.cache/rgbench/weights``."""
        return user_cache("weights") / self.name

    def find(self) -> Path | None:
        """The file, or None.

        Raises:
            UsageError: another file is in its place, such as half a download.
        """
        if not self.path.is_file():
            return None
        digest = sha256_file(self.path)
        if self.sha256 not in (None, digest):
            raise UsageError(
                f"{self.path}: not the published file (sha256 {digest}, expected {self.sha256}); get it again with: "
                f"{self.command()}"
            )
        return self.path

    def command(self) -> str:
        """The command that fetches it to :attr:`path`."""
        return shlex.join(["curl", "--fail", "--location", "--create-dirs", "--output", str(self.path), self.url])


_GITHUB = "https://github.com"
_MLP_COMMIT, _LINEAR_COMMIT = "6934dd81792f086e613a121dbce43082cb8be85e", "7e37768a02b0863eac390a702903aaa90ecf938e"
HPS_V21_FILE = "HPS_v2.1_compressed.pt"
_WHOLE = ("config.json", "model.safetensors")
PUBLISHED: dict[str, HubWeights | FileWeights] = {
    "hps 2.1": HubWeights(HPS_REPO, HPS_REVISION, (HPS_V21_FILE,), "2 GB"),
    "hps 2.0": HubWeights(HPS_REPO, HPS_REVISION, ("HPS_v2_compressed.pt",), "2 to 4 GB"),
    "clip_score": HubWeights(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
        ("open_clip_config.json", "open_clip_model.safetensors"),
        "4 GB",
        whole=True,
    ),
    "pickscore": HubWeights(
        "yuvalkirstain/PickScore_v1", "a4e4367c6dfa7288a00c550414478f865b875800", _WHOLE, "4 GB", whole=True
    ),
    "aesthetic": HubWeights(
        "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", _WHOLE, "1.7 GB", whole=True
    ),
    "aesthetic mlp head": FileWeights(
        "sac+logos+ava1-l14-linearMSE.pth",
        f"{_GITHUB}/christophschuhmann/improved-aesthetic-predictor/raw/{_MLP_COMMIT}/"
        "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "4 MB",
        sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "aesthetic linear head": FileWeights(
        "sa_0_4_vit_l_14_linear.pth",
        f"{_GITHUB}/LAION-AI/aesthetic-predictor/raw/{_LINEAR_COMMIT}/sa_0_4_vit_l_14_linear.pth",
        "4 kB",
    ),
}


def find_published(name: str, key: str) -> Path:
    """The local copy of published weights.

    Args:
        name: in :data:`PUBLISHED`.
        key: of the recipe, that may name another place.

    Raises:
        UsageError: names the files, their size and the command that fetches them.
    """
    weights = PUBLISHED[name]
    found = weights.find()
    if found is None:
        where = f"{weights.repo}: {', '.join(weights.files)}" if isinstance(weights, HubWeights) else str(weights.path)
        raise UsageError(
            f"{key}: the weights of {name} are not here ({where}; about {weights.size}); name another "
            f"place, or get them with: {weights.command()}"
        )
    return found
