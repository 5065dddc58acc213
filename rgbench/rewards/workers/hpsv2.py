"""HPSv2's own package (arXiv 2306.09341): a scorer for an environment with the package hpsv2 1.2.0.

Source: tgxs002/HPSv2, hpsv2/img_score.py, whose ``score`` is called for each image. It unpickles the checkpoint anew
for each, after a download of the CLIP that HPSv2 was trained from; here it is loaded once, without either.

    image   8-bit RGB; the longer side to 224, bicubic, padded with black before the normalisation
    prompt  CLIP's tokens, 77 with their marks; what is beyond is cut
    score   one image at a time, half precision on a GPU, float32 on a CPU; a cosine, about 0.2 to 0.35

rgbench's own ``hps`` scores the same checkpoint in float32, without another environment. ``antialias`` of the resize is
torchvision's default, which became true with 0.17. The package's wheel lacks CLIP's vocabulary, which open_clip brings.
The environment (Python 3.10) is made with ``INSTALL``. Nothing is downloaded; ``WEIGHTS`` gets what is needed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.util
import inspect
import os
import types

PACKAGES = ("hpsv2", "open-clip-torch")
INSTALL = (
    "pip install hpsv2==1.2.0 open-clip-torch==2.24.0 setuptools==69.5.1 transformers==4.36.2 huggingface-hub==0.20.3 "
    "timm==0.9.16 numpy==1.26.3 pandas==2.2.0 pyarrow==15.0.0 torch==2.2.2 torchvision==0.17.2"
)
REPO, FILES = "xswu/HPSv2", {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
WEIGHTS = f"hf download {REPO} {FILES['v2.1']}"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"


class Scorer:
    """HPSv2's ``score``.

    Args:
        package: its module ``img_score``, ready to score.
        model: the CLIP that it scores with.
        path: the checkpoint.
    """

    def __init__(self, package, model, path):
        from torchvision.transforms.functional import resize

        self.package, self.path = package, path
        self.contract = {
            "takes": "uint8",
            "weights_sha256": sha256_file(path),
            "size": 224,
            "resize": "longest side",
            "pad": "centre, black",
            "kernel": "bicubic",
            "antialias": inspect.signature(resize).parameters["antialias"].default is True,
            "dtype": "float32" if package.device == "cpu" else "float16",
            "token_limit": 77,
            "logit_scale": float(model.logit_scale.exp()),
        }

    def __call__(self, images, prompts):
        from PIL import Image

        for image, prompt in zip(images, prompts):
            yield self.package.score(Image.fromarray(image), prompt, cp=self.path)[0]


@contextlib.contextmanager
def vocabulary():
    """Let the package find open_clip's vocabulary where its own is missing."""
    opened, spec = gzip.open, importlib.util.find_spec("open_clip")
    folder = spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else ""

    def open_either(path, *rest, **more):
        return opened(path if os.path.isfile(path) else os.path.join(folder, VOCABULARY), *rest, **more)

    gzip.open = open_either  # type: ignore[assignment]
    try:
        yield
    finally:
        gzip.open = opened


def sha256_file(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 24), b""):
            digest.update(part)
    return digest.hexdigest()


def find(version):
    """The checkpoint in the Hugging Face cache.

    Raises:
        FileNotFoundError: it is not there; says how to get it.
    """
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(REPO, FILES[version], local_files_only=True)
    except (OSError, ValueError) as error:
        command = f"hf download {REPO} {FILES[version]}"
        raise FileNotFoundError(f"{FILES[version]}: not in the Hugging Face cache; get it with: {command}") from error


def load(device, path=None, version="v2.1"):
    """The scorer.

    Args:
        device: of torch.
        path: a checkpoint of HPSv2; by default the published one of ``version``, from the Hugging Face cache.
        version: "v2.0" or "v2.1".

    Raises:
        FileNotFoundError: no checkpoint; says how to get it.
        ValueError: another version, or other weights.
    """
    with vocabulary():
        from hpsv2 import img_score as package
    import torch

    if version not in FILES:
        raise ValueError(f"version {version!r}: known are {', '.join(FILES)}")
    path = find(version) if path is None else path
    model, _, preprocess = package.create_model_and_transforms(
        "ViT-H-14", precision="amp", device=device, light_augmentation=True, output_dict=True
    )
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(state["state_dict"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint of HPSv2 ({str(error).splitlines()[0]})") from error
    package.device = device
    package.model_dict.update(model=model, preprocess_val=preprocess)
    # score() would load the checkpoint for every image; the weights are in the model already
    package.torch = types.ModuleType("torch")
    package.torch.__dict__.update(vars(torch), load=lambda *_, **__: {"state_dict": None})
    model.load_state_dict = lambda state: None
    return Scorer(package, model, path)
