"""Tokenizer, CLIP, reward and latent proxy of the benchtop.

The tokenizer is CLIP's byte-level BPE with merges for the caption vocabulary: every caption word is one token, other
text falls back to bytes. The end token has the highest id (open_clip pools at the arg-max), padding is id 0, as in
Stable Diffusion 2.1.

The CLIP is open_clip's class, tiny, trained contrastively on scenes and captions with one hard negative caption for
each image (Yuksekgonul et al. 2023). The reward model is that CLIP fine-tuned on simulated preferences as HPSv2 is (Wu
et al. 2023, eq. 1-3): softmax over the two images of a pair, cross-entropy to the choice. The proxy is a latent CLIP:
its text tower starts from the CLIP's, its image tower reads 4×8×8 latents; loss and negatives are the CLIP's. The
reward's preferences come later, in ``lrm``.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from open_clip import CLIP, create_model, get_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer

from rgbench.benchtop.preferences import TRAINED_DEGRADATIONS, PreferenceConfig, change_attributes, choose, utility
from rgbench.benchtop.scenes import Scenes, captions, render, vocabulary
from rgbench.benchtop.web import described_scenes
from rgbench.rewards.clip import hps_preprocess
from rgbench.rewards.latent_proxy import LatentCLIP
from tools.benchtop.degradations import degrade
from tools.benchtop.stage import LATENTS_SPLIT, StageLog, autocast, linear_decay, set_lr, stage_seed, training_scenes

CONTEXT_LENGTH = 32
CLIP_IMAGE_SIZE = 28
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": CLIP_IMAGE_SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "width": 128, "heads": 4, "layers": 4},
}
PROXY_VISION = {"image_size": 8, "patch_size": 1, "layers": 4, "width": 96, "head_width": 24}


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


@dataclass(frozen=True)
class ProxyConfig:
    """Hyper-parameters of the proxy's pre-training."""

    seed: int = 0
    steps: int = 800
    batch_size: int = 128
    lr: float = 1e-3
    dtype: str = "fp32"


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


def train_reward(config: RewardConfig, out: Path, device: torch.device) -> None:
    """Fine-tune ``out/clip`` on simulated preferences; write ``out/reward`` in the same layout."""
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


def train_proxy(config: ProxyConfig, out: Path, device: torch.device) -> None:
    """Train on the cached latents of the latents stage; write ``out/proxy``."""
    scale = float(AutoencoderKL.load_config(out / "vae")["scaling_factor"])
    cache = load_file(out / "latents.safetensors")
    torch.manual_seed(stage_seed(config.seed, "proxy", -1))
    proxy = LatentCLIP.from_clip(out / "clip", PROXY_VISION, latent_channels=4, latent_scale=scale).to(device).train()
    optimiser = torch.optim.AdamW(weight_groups(proxy.clip, 0.05), lr=config.lr, betas=(0.9, 0.98))
    log = StageLog(out / "proxy.jsonl")
    n = len(cache["mean"])
    for step in range(config.steps):
        torch.manual_seed(stage_seed(config.seed, "proxy", step))
        generator = torch.Generator().manual_seed(stage_seed(config.seed, "proxy_negatives", step))
        set_lr(optimiser, config.lr * linear_decay(step, config.steps))
        index = np.random.default_rng(stage_seed(config.seed, "proxy_batch", step)).integers(n, size=config.batch_size)
        mean, std = (cache[k][torch.from_numpy(index)].float() for k in ("mean", "std"))
        latents = (mean + std * torch.randn(mean.shape)).to(device)
        scenes = described_scenes(LATENTS_SPLIT, index)
        texts = captions(scenes, LATENTS_SPLIT, index + n * (1 + step))
        wrong, wrong_texts = hard_negatives(scenes, generator)
        with autocast(device, config.dtype):
            image, text = proxy.encode_latents(latents), proxy.encode_texts(texts + wrong_texts)
        key = scene_key(scenes).to(device)
        text_key = torch.cat([key, scene_key(wrong).to(device)])
        loss = contrastive_loss(image.float(), text.float(), proxy.logit_scale(), key, text_key)
        update(proxy.clip, optimiser, loss)
        hit = (image @ text[: len(image)].T).argmax(1)
        log(step, loss=loss, retrieval=(key[hit] == key).float().mean(), logit_scale=proxy.logit_scale())
    proxy.clip.half()
    proxy.eval().save(out / "proxy")


def corrupt(scenes: Scenes, num_wrong: Tensor, generator: torch.Generator) -> Scenes:
    """Change ``num_wrong`` (B,) attributes of scenes to another value, drawn by a CPU generator."""
    order = torch.rand(len(scenes), 7, generator=generator)
    steps = torch.stack([torch.rand(len(scenes), generator=generator) for _ in range(8)], 1)
    return change_attributes(scenes, num_wrong, order, steps)


def swap_objects(scenes: Scenes, where: Tensor) -> Scenes:
    """Swap the two objects of scenes where ``where`` (B,) holds; one-object scenes stay."""
    where = (where & (scenes.count == 2))[:, None]
    shape, colour, size = (torch.where(where, x.flip(1), x) for x in (scenes.shape, scenes.colour, scenes.size))
    return Scenes(scenes.layout, shape, colour, size)


def share_right(scenes: Scenes, wanted: Scenes) -> Tensor:
    """Share (B,) of the wanted scene's attributes that a scene of the same count has."""
    slots = wanted.shape >= 0
    hits = (scenes.layout == wanted.layout).float()
    for name in ("shape", "colour", "size"):
        hits = hits + ((getattr(scenes, name) == getattr(wanted, name)) & slots).sum(1).float()
    return hits / (1 + 3 * wanted.count)


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


def scene_key(scenes: Scenes) -> Tensor:
    """(B,) one integer per attribute tuple: equal keys are not negatives of each other."""
    key = scenes.layout
    for values, base in ((scenes.shape, 7), (scenes.colour, 9), (scenes.size, 3)):
        for slot in (0, 1):
            key = key * base + values[:, slot] + 1
    return key


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


def build_tokenizer(out: Path) -> CLIPTokenizer:
    """Write the tokenizer's files to ``out`` and return it."""
    merges = bpe_merges([*vocabulary()])
    alphabet = _byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        pad_token="!",
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def bpe_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges (Sennrich et al. 2016) until every word is one symbol."""
    symbols = {w: [*w[:-1], w[-1] + "</w>"] for w in words}
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for s in symbols.values() for pair in itertools.pairwise(s)):
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        symbols = {w: _merge(s, best) for w, s in symbols.items()}
    return merges


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
