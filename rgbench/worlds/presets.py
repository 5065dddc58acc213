"""Full sets of models by name: where a teacher, its reward and its latent proxy lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rgbench.errors import UsageError, suggest

ASSETS = Path(__file__).parent / "assets"


@dataclass(frozen=True)
class Preset:
    """One named set of models.

    Attributes:
        name: as recipes say it.
        root: folder of its parts.
        teacher: ``StableDiffusionPipeline`` folder under ``root``.
        reward: open_clip folder of the trained reward, under ``root``.
        latent_proxy: latent CLIP folder, under ``root``.
        teacher_guidance: the teacher's default guidance scale, in the pipelines' form.
        teacher_steps: its default DDIM steps.
    """

    name: str
    root: Path
    teacher: str
    reward: str
    latent_proxy: str
    teacher_guidance: float
    teacher_steps: int

    def teacher_folder(self) -> Path:
        """The teacher's folder.

        Raises:
            UsageError: it is not there.
        """
        return self._folder(self.teacher)

    def reward_folder(self) -> Path:
        """The reward's folder; raises as :meth:`teacher_folder`."""
        return self._folder(self.reward)

    def latent_proxy_folder(self) -> Path:
        """The latent proxy's folder; raises as :meth:`teacher_folder`."""
        return self._folder(self.latent_proxy)

    def _folder(self, part: str) -> Path:
        folder = self.root / part
        if not folder.is_dir():
            raise UsageError(f"{folder}: missing; make it with: rgbench world build {self.name}")
        return folder


PRESETS = {
    "benchtop": Preset(
        name="benchtop",
        root=ASSETS / "benchtop",
        teacher="teacher",
        reward="reward",
        latent_proxy="latent_proxy",
        teacher_guidance=3.0,
        teacher_steps=50,
    ),
}


def find_preset(name: str) -> Preset:
    """A preset by name.

    Raises:
        UsageError: no such preset; says which there are, and the nearest.
    """
    if name in PRESETS:
        return PRESETS[name]
    raise UsageError(f"{name!r} is neither a folder nor a preset; {suggest(name, PRESETS)}")
