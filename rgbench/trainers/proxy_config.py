"""What a recipe may say of the latent proxy: what learns, how, how it is checked, and how it is pre-trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from rgbench.config import Section
from rgbench.data.config import DataConfig

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Layers = Annotated[int, Field(ge=0)] | Literal["all"]
Count = Annotated[int, Field(ge=1)]


class TrainableSection(Section):
    """What of the latent proxy learns; its logit scale always does.

    Attributes:
        image_layers: the last n image blocks with the final norm and the projection; 0 for none, ``all`` for the
            whole tower with its embeddings.
        text_layers: the same of the text tower.
    """

    image_layers: Layers = 1
    text_layers: Layers = 5


class ScheduleSection(Section):
    """How a learning rate changes over the run.

    Attributes:
        schedule: after the warm-up: ``constant``, or ``linear`` or ``cosine`` down to nothing at the last step.
        warmup: steps of linear rise from nothing.
    """

    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0


class OptimiserSection(ScheduleSection):
    """The proxy's own AdamW, beside the student's.

    Attributes:
        betas: AdamW's.
        weight_decay: AdamW's.
        max_grad_norm: the proxy's gradient is clipped to this L2 norm.
    """

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    weight_decay: NonNegative = 0.0
    max_grad_norm: Positive = 1.0


class FidelitySection(Section):
    """How well the proxy stands for its expert, on samples of the student that it does not learn from.

    Attributes:
        every: steps between measurements; 0 for none.
        prompts: prompts looked at, the first of ``data``.
        samples: student samples for each prompt and timestep bin, which are ranked among themselves.
        bins: ranges of timesteps.
        data: where prompts and ground truths come from; null: the training data, with noise of its own.
        gate: hold the reward back while Kendall's τ is under this; null: never.
    """

    every: Annotated[int, Field(ge=0)] = 0
    prompts: Count = 8
    samples: Annotated[int, Field(ge=2)] = 4
    bins: Annotated[int, Field(ge=1, le=20)] = 4
    data: DataConfig | None = None
    gate: Annotated[float, Field(gt=-1, lt=1)] | None = None

    @model_validator(mode="after")
    def _measured(self) -> FidelitySection:
        if self.gate is not None and not self.every:
            raise ValueError("a gate needs every, the steps between measurements")
        return self


class ProxySection(Section):
    """The latent proxy and how it learns from its expert (docs/method.md, "RG-LCD + LRM").

    Attributes:
        path: a latent CLIP folder; null for the preset's.
        lr: AdamW's learning rate of the proxy.
        loss: ``kl``, ``smooth`` or ``cross_entropy`` over pairs.
        trainable: what of it learns.
        optimiser: the rest of its AdamW.
        fidelity: how it is checked.
    """

    path: str | None = None
    lr: Positive = 3.3e-6
    loss: Literal["kl", "smooth", "cross_entropy"] = "kl"
    trainable: TrainableSection = TrainableSection()
    optimiser: OptimiserSection = OptimiserSection()
    fidelity: FidelitySection = FidelitySection()


class VisionSection(Section):
    """A fresh image tower: ViT on latents. Defaults are the full-size proxy's.

    Attributes:
        patch_size: in latent pixels.
        layers: transformer blocks.
        width: of the residual stream.
        head_width: of one attention head.
    """

    patch_size: Count = 4
    layers: Count = 12
    width: Count = 512
    head_width: Count = 64

    @model_validator(mode="after")
    def _whole_heads(self) -> VisionSection:
        if self.width % self.head_width:
            raise ValueError(f"width {self.width} is no multiple of head_width {self.head_width}")
        return self


class PretrainProxySection(Section):
    """The latent proxy that is pre-trained: the text tower of a CLIP, an image tower of its own.

    Attributes:
        clip: an open_clip folder, or a file of ViT-H-14 weights such as an HPS checkpoint; null for the preset's
            reward, which is one.
        vision: the image tower.
        trainable: what learns.
        optimiser: the schedule of ``train.lr``.
    """

    clip: str | None = None
    vision: VisionSection = VisionSection()
    trainable: TrainableSection = TrainableSection(image_layers="all", text_layers=5)
    optimiser: ScheduleSection = ScheduleSection(schedule="cosine")
