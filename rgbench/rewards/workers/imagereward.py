"""ImageReward-v1.0 (arXiv 2304.05977): a scorer for an environment with the package image-reward 1.5.

Source: THUDM/ImageReward, ImageReward/ImageReward.py. BLIP (ViT-L/16 and BERT with cross attention), five linear layers
on its first token, and ``(r − 0.16717362830052426) / 1.0333394966054072``. The raw r is the logit of a preference (the
package's training code: cross entropy over the r of two images), so the normalised score times 1.0333… is.

    image   8-bit RGB; PIL's bicubic (which filters) of the short side to 224, centre crop, CLIP's mean and std
    prompt  BERT's uncased tokens, 35 with their marks; what is beyond is cut
    score   one image at a time, float32; normalised, so about 0 in the mean

The environment (Python 3.10) is made with ``INSTALL``. Nothing is downloaded; ``WEIGHTS`` gets what is needed.
"""

from __future__ import annotations

import hashlib
import os

PACKAGES = ("image-reward", "timm")
# image-reward 1.5 pins timm and fairscale alone. Its classes need transformers 4, its __init__ imports diffusers and
# datasets of their time, and OpenAI's clip without requiring it, which needs setuptools' pkg_resources.
INSTALL = (
    "pip install image-reward==1.5 transformers==4.36.2 openai-clip==1.0.1 setuptools==69.5.1 accelerate==0.26.1 "
    "datasets==2.14.4 diffusers==0.26.0 huggingface-hub==0.20.3 pyarrow==15.0.0 numpy==1.26.3 "
    "torch==2.1.2 torchvision==0.16.2"
)
FOLDER = os.path.join("~", ".cache", "ImageReward")  # where the package keeps them
FILES = ("ImageReward.pt", "med_config.json")
WEIGHTS = (
    "hf download THUDM/ImageReward ImageReward.pt med_config.json --local-dir ~/.cache/ImageReward && "
    "hf download bert-base-uncased config.json tokenizer.json tokenizer_config.json vocab.txt"
)
BUFFER = "position_ids"  # that old checkpoints hold and that is no weight


class Scorer:
    """ImageReward-v1.0.

    Args:
        model: the package's, with its weights.
        folder: they came from.
    """

    def __init__(self, model, folder):
        self.model = model
        self.contract = {
            "takes": "uint8",
            "weights_sha256": sha256_file(os.path.join(folder, FILES[0])),
            "config_sha256": sha256_file(os.path.join(folder, FILES[1])),
            "size": 224,
            "resize": "short side",
            "crop": "centre",
            "kernel": "bicubic",
            "antialias": True,
            "dtype": "float32",
            "token_limit": 35,
            "score_mean": model.mean,
            "score_std": model.std,
            "logit_scale": model.std,
        }

    def __call__(self, images, prompts):
        import torch
        from PIL import Image

        for image, prompt in zip(images, prompts):
            with torch.no_grad():
                yield self.model.score(prompt, Image.fromarray(image))


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 24), b""):
            digest.update(part)
    return digest.hexdigest()


def load(device, path=FOLDER):
    """The scorer.

    Args:
        device: of torch.
        path: folder with ``FILES``.

    Raises:
        FileNotFoundError: a file is missing; says how to get it.
        ValueError: other weights.
    """
    from ImageReward.ImageReward import ImageReward  # isort: skip - where it is missing, that is to be said at once
    import torch

    folder = os.path.expanduser(path)
    weights, config = (os.path.join(folder, name) for name in FILES)
    for file in (weights, config):
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{file}: no such file; get it with: {WEIGHTS}")
    model = ImageReward(device=device, med_config=config)
    # The package's own load() unpickles whatever the file holds, and says nothing of weights that are missing.
    found = model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=False)
    wrong = [name for name in (*found.missing_keys, *found.unexpected_keys) if not name.endswith(BUFFER)]
    if wrong:
        raise ValueError(f"{weights}: not the weights of ImageReward-v1.0: {', '.join(wrong[:4])}")
    return Scorer(model.to(device).eval(), folder)
