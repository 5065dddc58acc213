"""Scores of the hpsv2 worker beside those of the package hpsv2 itself and of rgbench's own HPS, for random weights.

    python -m tools.hpsv2_worker ~/envs/hpsv2/bin/python

Random weights have ViT-H-14's widths in two layers and the published file's layout. They score the same lossless images
by the package's own ``score``, through rgbench's worker, and by rgbench's ``hps`` in this process. Prints them and
the largest differences on a CPU, where the package computes in float32; exit code 1 where the worker's differ from the
package's at all, or rgbench's by more than 1e-5.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from open_clip import factory
from PIL import Image

from rgbench.rewards.clip import HPSReward
from rgbench.rewards.remote import ProcessReward, scorer_module

PROMPTS = ["a red circle", "a large blue star, left of a small green square", "word " * 100]
SIZES = [(64, 64), (96, 160), (512, 512)]
LAYERS = 2
TOLERANCE = 1e-5

# Replaces the configuration of ViT-H-14 in the package by one of fewer layers, with the worker's own vocabulary().
SMALLER = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("worker", {str(scorer_module("hpsv2").__file__)!r})
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
with worker.vocabulary():
    from hpsv2.src.open_clip import factory
for tower in ("vision_cfg", "text_cfg"):
    factory._MODEL_CONFIGS["ViT-H-14"][tower]["layers"] = {LAYERS}
load = worker.load
"""
PACKAGE = (
    SMALLER
    + """
import json
import torch
from hpsv2 import img_score

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
model, _, preprocess = img_score.create_model_and_transforms(
    "ViT-H-14", precision="amp", device="cpu", light_augmentation=True, output_dict=True)
torch.save({"state_dict": model.state_dict()}, folder + "/HPS.pt")
img_score.device = "cpu"
img_score.model_dict.update(model=model, preprocess_val=preprocess)
scores = [img_score.score("%s/%d.png" % (folder, i), prompt, cp=folder + "/HPS.pt") for i, prompt in enumerate(prompts)]
print("scores", json.dumps([float(score[0]) for score in scores]))
"""
)


def main(python: str) -> int:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (3, *size), generator=generator).byte() for size in SIZES]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
        command = [python, "-I", "-W", "ignore", "-c", PACKAGE, name, json.dumps(PROMPTS)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        package = json.loads(said.split("scores ")[-1])
        (folder / "smaller.py").write_text(SMALLER)
        reward = ProcessReward.load(python, str(folder / "smaller.py"), path=str(folder / "HPS.pt"))
        pairs = list(zip(images, PROMPTS, strict=True))
        worker = [float(reward(image[None].double() / 255, [prompt])) for image, prompt in pairs]
        fingerprint = reward.fingerprint()
        reward.close()
        for tower in ("vision_cfg", "text_cfg"):
            factory._MODEL_CONFIGS["ViT-H-14"][tower]["layers"] = LAYERS
        own = HPSReward.load(folder / "HPS.pt", antialias=fingerprint["antialias"], device="cpu")
        with torch.no_grad():
            ours = [float(own(image[None].float() / 255, [prompt])) for image, prompt in pairs]
    print(json.dumps({key: fingerprint[key] for key in ("python", "versions", "antialias")}))
    print(f"package {package}\nworker  {worker}\nrgbench {ours}")
    apart = [max(abs(a - b) for a, b in zip(scores, package, strict=True)) for scores in (worker, ours)]
    print(f"largest difference: worker {apart[0]:g}, rgbench {apart[1]:g}")
    return int(apart[0] > 0 or apart[1] > TOLERANCE or len(set(package)) < len(package))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
