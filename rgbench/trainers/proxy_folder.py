"""Where an LRM's latent proxy lies, what its pre-training starts from, and the command that makes one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from rgbench.errors import UsageError
from rgbench.rewards.config import HPS
from rgbench.rewards.published import find_published
from rgbench.trainers.recipe import LRMPretrainRecipe, LRMRecipe, load_recipe

PROXY_FOLDER = "latent_proxy"  # in the run of a pre-training


class MissingProxy(UsageError):
    """A latent proxy that has to be pre-trained first.

    Args:
        what: names the key and the folder.
        command: makes it.
    """

    def __init__(self, what: str, command: str) -> None:
        self.what, self.command = what, command
        super().__init__(f"{what}; pre-train one with: {command}")


def find_proxy(recipe: LRMRecipe) -> Path:
    """The latent CLIP folder that a recipe names, or the preset's.

    Raises:
        MissingProxy: it is not there.
        UsageError: neither is named.
    """
    if recipe.proxy.path is not None:
        folder = Path(recipe.proxy.path)
        if not folder.is_dir():
            raise MissingProxy(f"proxy.path {folder}: no such folder", pretrain_command(recipe))
        return folder
    preset = recipe.model.find("proxy.path")
    if preset.latent_proxy is None:
        what = f"proxy.path: nobody has published a latent CLIP for {preset.name}; name one, of your own training"
        raise MissingProxy(what, pretrain_command(recipe))
    return preset.latent_proxy_folder()


def pretrain_command(recipe: LRMRecipe) -> str:
    """The command that pre-trains a proxy for a recipe: its model and data, written where the recipe looks."""
    base = "lrm_pretrain" if recipe.model.preset == "benchtop" else "sd21/lrm_pretrain"
    wanted = load_recipe(base)
    words = ["rgbench", "train", base]
    if recipe.model != wanted.model:
        words += [f"model={_flow(recipe.model.model_dump(exclude_none=True))}"]
    if isinstance(recipe.reward, HPS) and recipe.reward.path is not None:
        words += [f"proxy.clip={recipe.reward.path}"]
    if recipe.data != wanted.data:
        words += [f"data={_flow(recipe.data.model_dump(exclude_defaults=True) | {'kind': recipe.data.kind})}"]
    path = Path(recipe.proxy.path or "")
    if path.name == PROXY_FOLDER:
        words += ["--out", str(path.parent)]
    return shlex.join(words)


def _flow(section: dict[str, object]) -> str:
    """A section as the value of an override, which is YAML."""
    return json.dumps(section, ensure_ascii=False)


def find_clip(recipe: LRMPretrainRecipe) -> Path:
    """The CLIP whose text tower a pre-training starts from: the recipe's, the preset's reward, or HPSv2.1.

    Raises:
        UsageError: it is not there; says how to get it.
    """
    if recipe.proxy.clip is not None:
        return Path(recipe.proxy.clip)
    if recipe.model.preset is not None:
        return recipe.model.find("proxy.clip").reward_folder()
    return find_published("hps 2.1", "proxy.clip")
