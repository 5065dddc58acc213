"""Scores of the ImageReward worker beside those of the package image-reward itself, for random weights.

    python -m tools.imagereward_worker ~/envs/imagereward/bin/python

Random weights have the published shapes (but a text encoder of two layers) and the published file's layout. They score
the same images twice: in the package's own ``load`` and ``score``, and through rgbench's worker. Prints both and the
largest difference; exit code 1 where they differ at all. Takes 4 GB of memory and 1.5 GB of disk.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from rgbench.rewards.remote import ProcessReward

MED: dict[str, int | bool | str] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 2,
}
MED |= {"vocab_size": 30524, "encoder_width": 768, "add_cross_attention": True, "model_type": "bert"}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
PROMPTS = ["a red circle", "a large blue star, left of a small green square", "word " * 60]
SIZES = [(64, 64), (96, 160), (512, 512)]

PACKAGE = """
import json, sys
import torch
from ImageReward.ImageReward import ImageReward
import ImageReward as RM

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
torch.manual_seed(0)
model = ImageReward(device="cpu", med_config=folder + "/med_config.json")
for layer in model.mlp.layers:
    if hasattr(layer, "weight"):
        torch.nn.init.kaiming_normal_(layer.weight)  # their own start gives scores of 1e-12
torch.save(model.state_dict(), folder + "/ImageReward.pt")
del model
model = RM.load(folder + "/ImageReward.pt", device="cpu", med_config=folder + "/med_config.json")
with torch.no_grad():
    scores = [model.score(prompt, "%s/%d.png" % (folder, i)) for i, prompt in enumerate(prompts)]
print("scores", json.dumps(scores))
"""


def prepare(folder: Path) -> list[torch.Tensor]:
    """Write what the package reads besides weights; returns the images (3, H, W) uint8 that lie there as PNG."""
    (folder / "med_config.json").write_text(json.dumps(MED))
    snapshot = folder / "hf" / "hub" / "models--bert-base-uncased" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    words = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    (snapshot / "vocab.txt").write_text("\n".join(words))
    (snapshot / "tokenizer_config.json").write_text('{"do_lower_case": true, "tokenizer_class": "BertTokenizer"}')
    (snapshot / "config.json").write_text('{"model_type": "bert"}')
    generator, images = torch.Generator().manual_seed(0), []
    for i, (height, width) in enumerate(SIZES):
        images.append(torch.randint(0, 256, (3, height, width), generator=generator).byte())
        Image.fromarray(images[-1].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    return images


def main(python: str) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = prepare(folder)
        os.environ |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        command = [python, "-I", "-W", "ignore", "-c", PACKAGE, name, json.dumps(PROMPTS)]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        theirs = json.loads(said.split("scores ")[-1])
        reward = ProcessReward.load(python, "imagereward", path=name)
        pairs = zip(images, PROMPTS, strict=True)
        ours = [float(reward(image[None].double() / 255, [prompt])) for image, prompt in pairs]
        print(json.dumps({key: reward.fingerprint()[key] for key in ("python", "versions")}))
        reward.close()
    difference = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(f"package {theirs}\nworker  {ours}\nlargest difference {difference:g}")
    return int(difference > 0 or len(set(ours)) < len(ours))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
