"""``python -m tools.bench count``: the arithmetic of a step of any size, on a machine that could not hold its networks.

The step runs on torch's fake tensors, which have shapes and no values: every operator is seen, none is computed. Time
is not measured; with a GPU's rate from its data sheet the count gives the least time a step can take there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rgbench.rewards.clip import HPSReward
from rgbench.train.base import StepDraws, autocast
from rgbench.train.lcd import LCD
from rgbench.train.lrm import LRM
from rgbench.train.recipe import LCDRecipe, LRMRecipe, RGLCDRecipe
from rgbench.train.rg_lcd import RGLCD
from tools.bench.counting import Count, count
from tools.bench.generate import untrained_student
from tools.bench.plain import PlainStep
from tools.bench.random_models import HeldImages, Shape, random_expert, random_models, random_proxy

MOMENTS = 2  # of AdamW
CPU = torch.device("cpu")
# A real reward of no size, to stand where a fake one's logit scale cannot be read.
SMALL_CLIP = {
    "embed_dim": 4,
    "vision_cfg": {"image_size": 8, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1},
}


def count_step(shape: Shape, recipe: LCDRecipe) -> dict[str, Any]:
    """FLOPs and bytes of our step and of the plain one, and the sizes of what learns and what does not.

    Args:
        shape: of the networks.
        recipe: its batch size, arithmetic and method.
    """
    small = random_expert(replace(shape, clip=SMALL_CLIP), CPU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = _trainer(shape, recipe, small)
        size = recipe.train.batch_size
        batch = HeldImages(shape.side, num=1).load([0] * size)
        plain = PlainStep(trainer)

        def ours() -> None:
            with autocast(recipe.train.dtype, "cpu"):
                result = trainer.step(batch, StepDraws(0, 0, size))
            for terms in result.losses.values():
                torch.stack([term.mean() for term in terms.values()]).sum().backward()
            trainer.after_update()

        def theirs() -> None:
            with autocast(recipe.train.dtype, "cpu"):
                losses = plain.losses(batch, StepDraws(0, 0, size))
            for loss in losses.values():
                loss.backward()
            plain.average()

        steps = {"plain": count(theirs), "rgbench": count(ours)}
    return {
        "method": recipe.kind,
        "batch_size": size,
        "dtype": recipe.train.dtype,
        "resolution": shape.side,
        "student_parameters": sum(p.numel() for p in trainer.student.parameters()),
        "proxy_parameters_learning": sum(p.numel() for p in trainer.proxy_parameters)
        if isinstance(trainer, LRM)
        else 0,
        "held_bytes": held(trainer),
        "steps": {name: _numbers(counted) for name, counted in steps.items()},
    }


def held(trainer: LCD) -> dict[str, int]:
    """Bytes that stay on the device from step to step whatever the batch: the least that a step can take.

    Args:
        trainer: in float32, as the trainers keep all networks.

    Returns:
        ``networks``: weights and buffers of all of them; ``learning``: gradients and AdamW's two moments.
    """
    parts: list[Any] = [*vars(trainer.models).values(), trainer.student, trainer.target]
    parts += [getattr(trainer.expert, "model", None)] if isinstance(trainer, RGLCD) else []
    parts += [trainer.proxy] if isinstance(trainer, LRM) else []
    networks = [part for part in parts if isinstance(part, torch.nn.Module)]
    tensors = {id(t): t.nbytes for network in networks for t in (*network.parameters(), *network.buffers())}
    learning = [p for group in trainer.optimiser_groups().values() for p in group.parameters]
    return {"networks": sum(tensors.values()), "learning": (1 + MOMENTS) * sum(p.nbytes for p in learning)}


def count_generation(shape: Shape, steps: int) -> dict[str, Any]:
    """FLOPs of one image of a student in ``steps`` network evaluations, its text and its decoding included."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        models = random_models(shape, CPU)
        student = untrained_student(models)
        generator = torch.Generator()
        counted = count(lambda: student.sample(["a"], [generator], num_steps=steps, guidance_scale=5.0))
    return {"method": "generate", "steps_per_image": steps, "resolution": shape.side, "flops": counted.flops}


def _numbers(counted: Count) -> dict[str, int]:
    return {"flops": counted.flops, "bytes": counted.bytes, "operators": counted.operators}


def _trainer(shape: Shape, recipe: LCDRecipe, small: HPSReward) -> LCD:
    models = random_models(shape, CPU)
    if not isinstance(recipe, RGLCDRecipe):
        return LCD(recipe, models)
    config = shape.clip
    clip = open_clip.CLIP(config["embed_dim"], dict(config["vision_cfg"]), dict(config["text_cfg"]))
    expert: Any = small
    expert.model, expert.size = clip.requires_grad_(False).eval(), config["vision_cfg"]["image_size"]
    if isinstance(recipe, LRMRecipe):
        return LRM(recipe, models, expert, random_proxy(shape, CPU))
    return RGLCD(recipe, models, expert)
