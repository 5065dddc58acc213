"""HPSv3 (arXiv 2508.03789): a scorer for an environment with the package hpsv3 1.0.0 and a GPU of 24 GB or more.

Source: MizzenAI/HPSv3, hpsv3/inference.py, class HPSv3RewardInferencer. Qwen2-VL-7B with a head of two outputs, mean μ
and log standard deviation of a preference's utility; the score is μ, as in the package's own example.

    image   8-bit RGB; resized to at most 256·28·28 pixels, sides multiples of 28, by PIL's bicubic (which filters),
            then by Qwen2-VL's processor as that finds it needful
    prompt  put into the package's instruction; no limit of its own
    score   μ of one image at a time, bfloat16 with a float32 head; about 0 to 15

The environment (Python 3.10) is made with ``INSTALL``. Nothing is downloaded; ``WEIGHTS`` gets what is needed. With
flash-attn installed the package uses it, and its scores then differ in their last digits.
"""

from __future__ import annotations

import hashlib
import os

PACKAGES = ("hpsv3", "accelerate", "flash-attn", "peft", "qwen-vl-utils", "trl")
# matplotlib and tensorboard are imported and not required.
INSTALL = "pip install hpsv3==1.0.0 trl==0.11.4 torch==2.4.1 torchvision==0.19.1 matplotlib tensorboard"
REPO, FILE = "MizzenAI/HPSv3", "HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
WEIGHTS = f"hf download {REPO} {FILE} && hf download {BASE}"


class Scorer:
    """HPSv3's μ.

    Args:
        inferencer: the package's.
        weights: file of its checkpoint.
        revision: of the base model, whose tokenizer and processor it uses.
    """

    def __init__(self, inferencer, weights, revision):
        self.inferencer = inferencer
        self.contract = {
            "takes": "uint8",
            "weights_sha256": sha256_file(weights),
            "base": BASE,
            "base_revision": revision,
            "size": 256 * 28 * 28,
            "resize": "to at most that many pixels, sides multiples of 28",
            "kernel": "bicubic",
            "antialias": True,
            "dtype": "bfloat16",
            "token_limit": None,
        }

    def __call__(self, images, prompts):
        import torch
        from PIL import Image

        for image, prompt in zip(images, prompts):
            with torch.inference_mode():
                # by keyword: releases differ in the order
                outputs = self.inferencer.reward(image_paths=[Image.fromarray(image)], prompts=[prompt])
            yield outputs[0][0].item()


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 24), b""):
            digest.update(part)
    return digest.hexdigest()


def load(device, path=None):
    """The scorer.

    Args:
        device: of torch.
        path: the checkpoint, ``HPSv3.safetensors``; None for the one in the local hub cache.

    Raises:
        FileNotFoundError: weights are missing; says how to get them.
    """
    from hpsv3 import HPSv3RewardInferencer
    from huggingface_hub import try_to_load_from_cache

    base = try_to_load_from_cache(BASE, "config.json")
    weights = path or try_to_load_from_cache(REPO, FILE)
    for found, name in ((base, BASE), (weights, f"{REPO}/{FILE}")):
        if not isinstance(found, str) or not os.path.isfile(found):
            raise FileNotFoundError(f"{name}: not here; get it with: {WEIGHTS}")
    inferencer = HPSv3RewardInferencer(checkpoint_path=weights, device=device)
    return Scorer(inferencer, weights, os.path.basename(os.path.dirname(str(base))))
