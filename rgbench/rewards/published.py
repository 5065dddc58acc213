"""Where the published weights of each reward are looked for: in local caches alone, never on a network.

What is not here is named, with its size and the command that gets it; ``HF_HUB_OFFLINE`` changes nothing, since
nothing is ever fetched.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from rgbench.errors import UsageError
from rgbench.files import sha256_file
from rgbench.hub import HPS_REPO, HPS_REVISION


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
        """What fetches them into the cache."""
        return shlex.join(["hf", "download", self.repo, *self.files, "--revision", self.revision])


@dataclass(frozen=True)
class FileWeights:
    """One file that is no model of a hub.

    Attributes:
        name: in the local cache.
        url: where it is published, at one commit.
        size: for people.
        sha256: of its bytes; None where nobody has published one. The commit of the address then has to do.
    """

    name: str
    url: str
    size: str
    sha256: str | None = None

    @property
    def path(self) -> Path:
        """Where it is looked for: ``$XDG_CACHE_HOME/rgbench/weights``, else ``~/.cache/rgbench/weights``."""
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return root / "rgbench" / "weights" / self.name

    def find(self) -> Path | None:
        """The file, or None.

        Raises:
            UsageError: another file lies there, such as half a download.
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
        """What fetches it to where it is looked for."""
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
        UsageError: names the files, their size and the command that gets them.
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
