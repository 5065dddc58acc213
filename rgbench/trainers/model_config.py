"""What a recipe may say of its teacher, and of what of the student learns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from rgbench.config import Section
from rgbench.errors import UsageError, suggest
from rgbench.worlds.presets import PRESETS, HubTeacher, Preset, find_preset

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class ModelSection(Section):
    """The teacher; exactly one of the two.

    Attributes:
        preset: ``benchtop``, ``sd15``, ``sd21-base`` or ``sd21``.
        path: any local ``StableDiffusionPipeline`` folder that predicts epsilon, v or the sample.
    """

    preset: str | None = None
    path: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> ModelSection:
        if (self.preset is None) == (self.path is None):
            raise ValueError("give either model.preset or model.path")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"no preset {self.preset[:80]!r}; {suggest(self.preset, PRESETS)}")
        return self

    def find(self, key: str) -> Preset:
        """The preset, for a part whose own ``key`` is null.

        Raises:
            UsageError: the model is a folder, so ``key`` must be given.
        """
        if self.preset is None:
            raise UsageError(f"{key}: give a path; only a model.preset brings one with it")
        return find_preset(self.preset)

    def teacher_folder(self) -> Path:
        """The teacher's folder.

        Raises:
            UsageError: it is not there.
        """
        if self.path is None:
            return self.find("model.path").teacher_folder()
        if not Path(self.path).is_dir():
            presets = ", ".join(PRESETS)
            raise UsageError(
                f"model.path {self.path}: no such folder; give a diffusers pipeline folder, or model.preset ({presets})"
            )
        return Path(self.path)

    def published(self) -> dict[str, str]:
        """Repository and revision of a preset on the hub; empty for others."""
        teacher = PRESETS[self.preset].teacher if self.preset else None
        return {"repo": teacher.hub.repo, "revision": teacher.hub.revision} if isinstance(teacher, HubTeacher) else {}

    @property
    def world(self) -> str:
        """Name under which results are kept: the preset's or the folder's."""
        return self.preset or Path(str(self.path)).resolve().name


class LoRASection(Section):
    """Low-rank adapters in place of full fine-tuning (LoRA, arXiv 2106.09685): W + (α/r)·B·A, of which A and B learn.

    Attributes:
        rank: r (LCM-LoRA: 64).
        alpha: α; null for the rank, so that the factor is 1.
        modules: ends of the names of the layers that are adapted; null for LCM-LoRA's: attention, feed-forward,
            convolutions and time embedding projections.
    """

    rank: Count = 64
    alpha: Positive | None = None
    modules: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
