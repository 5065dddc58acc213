"""VQAScore (arXiv 2404.01291): a scorer for an environment with the package t2v-metrics 1.2 and a GPU.

Source: linzhiqiu/t2v_metrics, t2v_metrics/vqascore.py and models/vqascore_models/clip_t5_model.py. The probability that
CLIP-FlanT5 answers ``Yes`` to ``Does this figure show "{prompt}"? Please answer yes or no.``: the exponential of the
mean log probability of the answer's tokens, from 0 to 1.

    image   a file, so it is written as PNG, which loses nothing; padded to a square with CLIP's mean colour, then CLIP
            ViT-L/14's processor at 336 pixels: PIL's bicubic (which filters), CLIP's mean and std
    prompt  put into the question; 2,048 tokens with it
    score   one pair at a time; bfloat16 weights and, on a GPU, autocast

The environment (Python 3.10) is made with ``INSTALL``. Nothing is downloaded; ``WEIGHTS`` gets what is needed.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tempfile

PACKAGES = ("t2v-metrics", "open-clip-torch", "sentencepiece", "tokenizers")
# t2v-metrics 3.0 cannot be installed as it is published (it requires an apex that is another package of that name);
# 1.2 has the same CLIP-FlanT5. It imports ImageReward, which imports OpenAI's clip without requiring it.
INSTALL = (
    "pip install t2v-metrics==1.2 image-reward==1.5 openai-clip==1.0.1 setuptools==69.5.1 accelerate==0.26.1 "
    "datasets==2.16.1 diffusers==0.26.0 huggingface-hub==0.20.3 pyarrow==15.0.0 numpy==1.26.3 hpsv2==1.2.0 "
    "scikit-image torch==2.1.2 torchvision==0.16.2"
)
TOWER = "openai/clip-vit-large-patch14-336"
MODELS = {"clip-flant5-xxl": "google/flan-t5-xxl", "clip-flant5-xl": "google/flan-t5-xl"}
TOKENIZER = "special_tokens_map.json spiece.model tokenizer_config.json config.json"
QUESTION, ANSWER = 'Does this figure show "{}"? Please answer yes or no.', "Yes"


class Scorer:
    """VQAScore of one of ``MODELS``.

    Args:
        scorer: the package's.
        model: its name.
        folder: of its weights.
        question: with ``{}`` for the prompt.
        answer: whose probability is the score.
    """

    def __init__(self, scorer, model, folder, question, answer):
        self.scorer, self.question, self.answer = scorer, question, answer
        self.contract = {
            "takes": "uint8",
            "model": model,
            "weights_sha256": sha256_weights(folder),
            "weights_revision": os.path.basename(folder),
            "size": 336,
            "pad": "to a square, with CLIP's mean colour",
            "kernel": "bicubic",
            "antialias": True,
            "dtype": "bfloat16",
            "token_limit": 2048,
            "question": question,
            "answer": answer,
        }

    def __call__(self, images, prompts):
        import torch
        from PIL import Image

        with tempfile.TemporaryDirectory(prefix="rgbench-vqascore-") as folder:
            file = os.path.join(folder, "image.png")
            for image, prompt in zip(images, prompts):
                Image.fromarray(image).save(file)
                with torch.no_grad():
                    scores = self.scorer(
                        images=[file],
                        texts=[prompt],
                        question_template=self.question,
                        answer_template=self.answer,
                    )
                yield scores[0][0].item()


def sha256_weights(folder):
    """Of the names and contents of a folder's weight files."""
    digest = hashlib.sha256()
    files = sorted(file for end in ("bin", "safetensors") for file in glob.glob(os.path.join(folder, "*." + end)))
    for path in files:
        digest.update(os.path.basename(path).encode("utf-8") + b"\0")
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1 << 24), b""):
                digest.update(part)
    return digest.hexdigest()


def load(device, model="clip-flant5-xxl", question=QUESTION, answer=ANSWER):
    """The scorer.

    Args:
        device: of torch.
        model: in ``MODELS``.
        question: with ``{}`` for the prompt.
        answer: whose probability is the score.

    Raises:
        ValueError: another model.
        FileNotFoundError: weights are missing; says how to get them.
    """
    if model not in MODELS:
        raise ValueError(f"model {model!r}; known: {', '.join(MODELS)}")
    from huggingface_hub import constants, try_to_load_from_cache
    from t2v_metrics import VQAScore

    repo = "zhiqiulin/" + model
    configs = [try_to_load_from_cache(name, "config.json") for name in (repo, MODELS[model], TOWER)]
    if not all(isinstance(file, str) for file in configs):
        fetch = f"hf download {repo} && hf download {MODELS[model]} {TOKENIZER} && hf download {TOWER}"
        raise FileNotFoundError(f"{model}: not all is here; get it with: {fetch}")
    # the package's own default is a folder ./hf_cache beside whatever runs
    scorer = VQAScore(model=model, device=device, cache_dir=constants.HF_HUB_CACHE)
    return Scorer(scorer, model, os.path.dirname(str(configs[0])), question, answer)
