"""What a recipe may say of a reward: one pydantic model per kind, weighted sums, plug-ins."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from rgbench.config import Section
from rgbench.errors import suggest
from rgbench.registry import names

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Options = dict[str, bool | int | float | str | list[bool | int | float | str] | None]
Timestep = Annotated[int, Field(ge=0, le=999)]


class GradientShare(Section):
    """A reward's weight by what it does: the share of its gradient in the gradient at the student's prediction.

    Each sample's weight is β = s/(1 − s) · ‖∂L_LCD/∂f‖ / ‖∂R/∂f‖ (Esser et al. 2021, eq. 7, taken for each sample, so
    that batch splits and ranks cannot change it).

    Attributes:
        share: s = β‖∂R/∂f‖ / (‖∂L_LCD/∂f‖ + β‖∂R/∂f‖).
        max_scale: upper bound of β, for samples on which the reward is flat (Esser et al.: 10⁴).
    """

    share: Annotated[float, Field(gt=0, lt=1)]
    max_scale: Positive = 1e4


class RewardFields(Section):
    """What every reward has, a sum included.

    Attributes:
        kind: its name in the registry.
        scale: β, weight of the reward against the distillation loss, as a number or as a share of the gradient; in a
            sum, a term's weight.
        window: first and last timestep at which the reward guides the student; null: all.
        logit_scale: factor from score to the logit of a preference, by which an LRM's proxy learns it; null: the
            reward's own.
    """

    kind: str
    scale: NonNegative | GradientShare = 1.0
    window: tuple[Timestep, Timestep] | None = None
    logit_scale: Positive | None = None

    @model_validator(mode="after")
    def _ordered(self) -> RewardFields:
        if self.window and self.window[0] > self.window[1]:
            raise ValueError(f"window {list(self.window)} ends before it begins")
        return self


class ViewFields(RewardFields):
    """What every reward has that looks at images.

    Attributes:
        path: its weights; null for the preset's, or for the published ones in the local model hub cache.
        blur_sigma: standard deviation, in pixels of the decoded image, of a Gaussian blur before the reward; 0: none.
        random_crop: share of each side that a window at a random place keeps, drawn for each sample and step; null:
            the whole image.
    """

    path: str | None = None
    blur_sigma: NonNegative = 0.0
    random_crop: Annotated[float, Field(gt=0, lt=1)] | None = None


class PixelReward(ViewFields):
    """What every reward has that looks at images with a resize of ours.

    Attributes:
        antialias: whether its image resize filters before it subsamples. No default: it changes the result.
    """

    antialias: bool


class HPS(PixelReward):
    """HPSv2.1 or v2.0, or any open_clip folder scored the same way, such as the benchtop's reward.

    Attributes:
        version: the published checkpoint, from the local model hub cache; null: ``path`` or the preset's reward.
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
        head: ``mlp``, the improved predictor, or ``linear``, the first one; their scores cannot be compared.
        head_path: the head's file; null for the published one in the local cache.
    """

    kind: Literal["aesthetic"]
    head: Literal["mlp", "linear"]
    head_path: str | None = None


class Process(ViewFields):
    """A reward in another Python environment, whose worker process scores; it gives no gradient.

    Attributes:
        path: its weights; null for where the scorer looks by itself.
        python: interpreter of that environment.
        worker: a scorer that comes with rgbench, a .py file, or a module of that environment.
        options: keyword arguments of the scorer's ``load``.
        device: of torch, for the worker; null for rgbench's own.
        timeout: seconds without a sign of progress after which the worker is given up.
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


CLOSED: dict[str, type[ViewFields]] = {"hps": HPS, "clip_score": CLIPScore, "pickscore": PickScore}
CLOSED |= {"aesthetic": Aesthetic, "process": Process}


def _term_tag(value: Any) -> str:
    """Name of the model that validates a reward: that of its kind; ``hps`` where no kind is said."""
    kind = value.get("kind", "hps") if isinstance(value, dict) else getattr(value, "kind", "hps")
    return CLOSED[kind].__name__ if isinstance(kind, str) and kind in CLOSED else "Plugin"


def _tag(value: Any) -> str:
    """The same, with sums."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "Sum" if kind == "sum" else _term_tag(value)


OneReward = Annotated[
    Annotated[HPS, Tag("HPS")]
    | Annotated[CLIPScore, Tag("CLIPScore")]
    | Annotated[PickScore, Tag("PickScore")]
    | Annotated[Aesthetic, Tag("Aesthetic")]
    | Annotated[Process, Tag("Process")]
    | Annotated[Plugin, Tag("Plugin")],
    Discriminator(_term_tag),
]


class Sum(RewardFields):
    """A weighted sum of rewards.

    Attributes:
        terms: its rewards; a term's ``scale`` is its weight.
        standardise: ``calibrated``: each term as (score − mean) / std, with mean and std over images of the training
            data before the first step, recorded in the checkpoint; ``none``: raw scores.
        calibration_images: how many images that takes.
        balance: ``gradient``: each term pulls on the image with the same force per weight, whatever its scores'
            steepness; ``none``: as its scores are.
    """

    kind: Literal["sum"]
    terms: Annotated[list[OneReward], Field(min_length=2)]
    standardise: Literal["calibrated", "none"] = "calibrated"
    calibration_images: Annotated[int, Field(ge=2)] = 64
    balance: Literal["none", "gradient"] = "none"

    @model_validator(mode="after")
    def _weights(self) -> Sum:
        for i, term in enumerate(self.terms):
            if isinstance(term.scale, GradientShare):
                raise ValueError(f"terms.{i}.scale: a weight is a number; a share belongs to the sum's own scale")
            if term.window or term.logit_scale:
                raise ValueError(f"terms.{i}: window and logit_scale belong to the sum")
        return self


RewardConfig = Annotated[
    Annotated[HPS, Tag("HPS")]
    | Annotated[CLIPScore, Tag("CLIPScore")]
    | Annotated[PickScore, Tag("PickScore")]
    | Annotated[Aesthetic, Tag("Aesthetic")]
    | Annotated[Process, Tag("Process")]
    | Annotated[Plugin, Tag("Plugin")]
    | Annotated[Sum, Tag("Sum")],
    Discriminator(_tag),
]
