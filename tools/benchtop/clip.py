"""CLIP and reward stages.

The CLIP is open_clip's own class, tiny, trained contrastively on (scene, caption) with
one hard negative caption per image (Yuksekgonul et al. 2023). The reward model is that
CLIP fine-tuned on simulated preferences the way HPSv2 is (Wu et al. 2023, eq. 1-3):
softmax over the two images of a pair, cross-entropy to the choice.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CLIP
from safetensors.torch import save_file
from torch import Tensor, nn

from rgbench.benchtop.preferences import (
    TRAINED_DEGRADATIONS,
    PreferenceConfig,
    choose,
    corrupt,
    degrade,
    share_right,
    swap_objects,
    utility,
)
from rgbench.benchtop.scenes import Scenes, captions, render
from rgbench.rewards.clip import hps_preprocess
from tools.benchtop.common import StageLog, autocast, linear_decay, set_lr, stage_seed, training_scenes
from tools.benchtop.tokenizer import CONTEXT_LENGTH, build_tokenizer

CLIP_IMAGE_SIZE = 28
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": CLIP_IMAGE_SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 128, "heads": 4, "layers": 4},
}


@dataclass(frozen=True)
class CLIPConfig:
    """Hyper-parameters of the contrastive stage."""

    seed: int = 0
    steps: int = 800
    batch_size: int = 128
    lr: float = 1e-3
    dtype: str = "fp32"


@dataclass(frozen=True)
class RewardConfig:
    """Hyper-parameters of the preference stage."""

    seed: int = 0
    steps: int = 400
    batch_size: int = 96
    lr: float = 1e-3
    contrastive_weight: float = 0.5
    dtype: str = "fp32"
    preferences: PreferenceConfig = field(default_factory=PreferenceConfig)


def scene_key(scenes: Scenes) -> Tensor:
    """(B,) one integer per attribute tuple: equal keys are not negatives of each other."""
    key = scenes.layout
    for values, base in ((scenes.shape, 7), (scenes.colour, 9), (scenes.size, 3)):
        for slot in (0, 1):
            key = key * base + values[:, slot] + 1
    return key


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor, image_key: Tensor, text_key: Tensor) -> Tensor:
    """InfoNCE in both directions, targets spread over all entries of the same scene.

    Args:
        image: (B, D) unit vectors.
        text: (T, D) unit vectors, T ≥ B: the first B match the images, the rest are extra negatives.
        scale: logit scale.
        image_key: (B,) scene keys.
        text_key: (T,) scene keys.
    """
    logits = scale * image @ text.T
    same = (image_key[:, None] == text_key[None]).float()
    to_text = -(same / same.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    own, same = logits[:, : len(image)], same[:, : len(image)]
    to_image = -(same / same.sum(0, keepdim=True) * own.log_softmax(0)).sum(0).mean()
    return 0.5 * (to_text + to_image)


def train_clip(config: CLIPConfig, out: Path, device: torch.device) -> None:
    """Train the CLIP and write it to ``out/clip`` in open_clip's local-dir layout."""
    folder = out / "clip"
    tokenizer = build_tokenizer(folder)
    torch.manual_seed(stage_seed(config.seed, "clip", -1))
    text_cfg = {**CLIP_CONFIG["text_cfg"], "vocab_size": len(tokenizer)}
    model = CLIP(CLIP_CONFIG["embed_dim"], CLIP_CONFIG["vision_cfg"], text_cfg, output_dict=False).to(device)
    optimiser = torch.optim.AdamW(weight_groups(model, 0.05), lr=config.lr, betas=(0.9, 0.98))
    log = StageLog(out / "clip.jsonl")
    for step in range(config.steps):
        torch.manual_seed(stage_seed(config.seed, "clip", step))
        generator = torch.Generator().manual_seed(stage_seed(config.seed, "clip_negatives", step))
        set_lr(optimiser, config.lr * linear_decay(step, config.steps))
        images, scenes, texts = training_scenes("train", step, config.batch_size, device)
        wrong, wrong_texts = hard_negatives(scenes, generator)
        with autocast(device, config.dtype):
            image = model.encode_image(hps_preprocess(images, CLIP_IMAGE_SIZE, antialias=True), normalize=True)
            text = model.encode_text(tokenize(tokenizer, texts + wrong_texts).to(device), normalize=True)
        key = scene_key(scenes).to(device)
        text_key = torch.cat([key, scene_key(wrong).to(device)])
        loss = contrastive_loss(image.float(), text.float(), model.logit_scale.exp(), key, text_key)
        update(model, optimiser, loss)
        hit = (image @ text[: len(image)].T).argmax(1)
        log(step, loss=loss, retrieval=(key[hit] == key).float().mean(), logit_scale=model.logit_scale.exp())
    save_clip(model.eval(), text_cfg, folder)


def hard_negatives(scenes: Scenes, generator: torch.Generator) -> tuple[Scenes, list[str]]:
    """One wrong scene per scene, and its caption.

    Half of the two-object scenes have their objects swapped: without those negatives a
    text tower need not learn which object stands left or above, and none does (Yuksekgonul
    et al. 2023). All others have one or two attributes changed.
    """
    num_wrong = 1 + (torch.rand(len(scenes), generator=generator) < 0.3).long()
    swapped = (torch.rand(len(scenes), generator=generator) < 0.5) & (scenes.count == 2)
    wrong = swap_objects(corrupt(scenes, num_wrong.masked_fill(swapped, 0), generator), swapped)
    start = int(torch.randint(2**30, (), generator=generator))
    return wrong, captions(wrong, "train", range(start, start + len(wrong)))


def train_reward(config: RewardConfig, out: Path, device: torch.device) -> None:
    """Fine-tune ``out/clip`` on simulated preferences; write ``out/reward`` in the same layout."""
    from open_clip import create_model, get_tokenizer

    source = f"local-dir:{out / 'clip'}"
    model, tokenizer = create_model(source).to(device).train(), get_tokenizer(source).tokenizer
    optimiser = torch.optim.AdamW(weight_groups(model, 0.05), lr=config.lr, betas=(0.9, 0.98))
    log = StageLog(out / "reward.jsonl")
    for step in range(config.steps):
        torch.manual_seed(stage_seed(config.seed, "reward", step))
        generator = torch.Generator().manual_seed(stage_seed(config.seed, "preferences", step))
        set_lr(optimiser, config.lr * linear_decay(step, config.steps))
        _, scenes, texts = training_scenes("train", step + 10**6, config.batch_size, device)
        pair, first, clean = preference_pairs(scenes, step, config.preferences, generator)
        with autocast(device, config.dtype):
            flat = hps_preprocess(torch.cat([*pair, clean]).to(device), CLIP_IMAGE_SIZE, antialias=True)
            image = model.encode_image(flat, normalize=True).float().chunk(3)
            text = model.encode_text(tokenize(tokenizer, texts).to(device), normalize=True).float()
        scale = model.logit_scale.exp()
        logits = scale * torch.stack([(image[k] * text).sum(1) for k in (0, 1)], 1)
        preference = F.cross_entropy(logits, (~first).long().to(device))
        key = scene_key(scenes).to(device)
        contrast = contrastive_loss(image[2], text, scale, key, key)
        update(model, optimiser, preference + config.contrastive_weight * contrast)
        agreed = ((logits[:, 0] > logits[:, 1]).cpu() == first).float().mean()
        log(step, preference=preference, contrastive=contrast, agreement=agreed, cosine=(image[2] * text).sum(1).mean())
    shutil.copytree(out / "clip", out / "reward", dirs_exist_ok=True)
    save_clip(model.eval(), json.loads((out / "clip" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"],
              out / "reward")  # fmt: skip


def preference_pairs(
    scenes: Scenes, step: int, config: PreferenceConfig, generator: torch.Generator, kinds: tuple = TRAINED_DEGRADATIONS
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Two candidate images per wanted scene, the simulated choice, and a clean image of the scene.

    Wrong attributes number 0-3 (none in over half of the images), the objects of one
    two-object candidate in six stand in each other's place, and half of the images are degraded.

    Returns:
        ((B, 3, 64, 64), (B, 3, 64, 64)), (B,) bool first preferred, (B, 3, 64, 64).
    """
    n = len(scenes)
    base = 10**9 + 3 * step * n
    images, utilities = [], []
    for k in (0, 1):
        num_wrong = torch.randint(4, (n,), generator=generator)
        num_wrong[torch.rand(n, generator=generator) < 0.4] = 0
        candidate = corrupt(scenes, num_wrong, generator)
        candidate = swap_objects(candidate, torch.rand(n, generator=generator) < 1 / 6)
        strength = torch.rand(n, generator=generator)
        strength[torch.rand(n, generator=generator) < 0.5] = 0.0
        picture = render(candidate, "train", range(base + k * n, base + (k + 1) * n))
        images.append(degrade(picture, strength, kinds, generator))
        utilities.append(utility(share_right(candidate, scenes), strength, config))
    first = choose(utilities[0] - utilities[1], config, generator)
    clean = render(scenes, "train", range(base + 2 * n, base + 3 * n))
    return (images[0], images[1]), first, clean


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """(B, context) token ids, padded and truncated as open_clip's wrapper does."""
    return tokenizer(
        texts, return_tensors="pt", max_length=CONTEXT_LENGTH, padding="max_length", truncation=True
    ).input_ids


def save_clip(model: nn.Module, text_cfg: dict, folder: Path) -> None:
    """Write config and fp16 weights so that ``open_clip.create_model('local-dir:…')`` loads them."""
    config = {
        "model_cfg": {**CLIP_CONFIG, "text_cfg": {**text_cfg, "hf_tokenizer_name": "."}},
        "preprocess_cfg": {"interpolation": "bicubic", "resize_mode": "longest"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
    state = {k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def update(model: CLIP, optimiser: torch.optim.Optimizer, loss: Tensor) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    with torch.no_grad():
        model.logit_scale.clamp_(max=4.6052)  # ln 100, as CLIP
