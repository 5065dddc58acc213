"""Scorers for workers in other processes: real ones, and ones that misbehave, written as users write them."""

from __future__ import annotations

import sys
from pathlib import Path

from rgbench.rewards.remote import ProcessReward

# A number that depends on every byte of an image, of its place in the batch, and of the prompt.
CHECKSUM = """
import zlib
import numpy

class Scorer:
    contract = {{"takes": "{takes}", "weights_sha256": "none", "antialias": None}}

    def __call__(self, images, prompts):
        for image, prompt in zip(images, prompts):
            yield checksum(image, prompt)

def checksum(image, prompt):
    data = numpy.ascontiguousarray(image).tobytes() + prompt.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) / 2**16

def load(device):
    return Scorer()
"""

# HPS from its definition, with nothing of rgbench: an open_clip folder, bicubic, pad, normalise, cosine.
HPS = '''
import hashlib
import os

import open_clip
import torch
import torch.nn.functional as F


class Scorer:
    def __init__(self, folder, antialias):
        self.model = open_clip.create_model("local-dir:" + folder, device="cpu").requires_grad_(False).eval()
        self.tokenizer = open_clip.get_tokenizer("local-dir:" + folder)
        self.antialias = antialias
        with open(os.path.join(folder, "open_clip_model.safetensors"), "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
        self.contract = {"takes": "float32", "weights_sha256": digest, "antialias": antialias}
        self.contract["logit_scale"] = float(self.model.logit_scale.exp())

    @torch.no_grad()
    def __call__(self, images, prompts):
        """Square images alone."""
        size = self.model.visual.image_size
        size = size[0] if isinstance(size, tuple) else size
        options = {"mode": "bicubic", "align_corners": False, "antialias": self.antialias}
        pixels = F.interpolate(torch.from_numpy(images), (size, size), **options)
        config = open_clip.get_model_preprocess_cfg(self.model)
        mean, std = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
        seen = F.normalize(self.model.encode_image((pixels - mean) / std), dim=-1)
        unique = list(dict.fromkeys(prompts))
        read = F.normalize(self.model.encode_text(self.tokenizer(unique)), dim=-1)
        return (seen * read[[unique.index(prompt) for prompt in prompts]]).sum(-1)


def load(path, device, antialias):
    return Scorer(path, antialias)
'''

SIMPLE = """
import os, signal, subprocess, sys, time

class Scorer:
    contract = {"takes": "uint8", "weights_sha256": "none", "antialias": None}

    def __call__(self, images, prompts):
        print("scoring", len(prompts))
        %s
        return [1.0] * len(prompts)

def load(device):
    return Scorer()
"""


def scorer(folder: Path, text: str, name: str = "mine") -> str:
    """A scorer's file."""
    file = folder / f"{name}.py"
    file.write_text(text)
    return str(file)


def doing(folder: Path, line: str, **options) -> ProcessReward:
    """A reward whose scorer does something before it answers."""
    return ProcessReward.load(sys.executable, scorer(folder, SIMPLE % line), **options)
