"""Full-size parts with random weights: they load in the published layout, and memory stays where the docs say."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from rgbench.metrics.features import FeatureRows
from rgbench.metrics.fid import Gaussian, moments_of_rows
from rgbench.metrics.statistics import jackknife_groups

# Each in a process of its own, so that the peak is that of one thing.
MAKE = """
import sys, open_clip, torch
with torch.device("meta"):
    model = open_clip.create_model("ViT-H-14", pretrained=None, device="meta")
generator = torch.Generator().manual_seed(0)
state = {}
for name, tensor in model.state_dict().items():
    state[name] = torch.empty(tensor.shape, dtype=torch.float16).normal_(0, 0.02, generator=generator)
assert len(state) == 686 and sum(t.numel() for t in state.values()) == 986_109_441, len(state)
torch.save({"epoch": 1, "name": "random", "state_dict": state}, sys.argv[1])
"""
SCORE = """
import resource, sys, torch
from rgbench.rewards.clip import HPSReward
images = torch.rand(2, 3, 512, 512, generator=torch.Generator().manual_seed(0))
texts = ["a cat", "a dog on a red sofa"]
loaded = HPSReward.load(sys.argv[1], antialias=True, device="cpu")
for antialias in (True, False):
    reward = loaded.with_antialias(antialias)
    scores = reward(images, texts)
    alone = torch.cat([reward(images[i : i + 1], texts[i : i + 1]) for i in range(2)])
    assert scores.dtype == torch.float32 and scores.isfinite().all() and scores[0] != scores[1], scores
    assert (scores - alone).abs().max() <= 1e-5, (scores, alone)
    assert reward.size == 224 and reward.fingerprint()["antialias"] is antialias
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
raw = torch.load(sys.argv[1], weights_only=True, mmap=True)["state_dict"]
own = loaded.model.state_dict()
assert own.keys() == raw.keys() and all(torch.equal(own[name], tensor.float()) for name, tensor in raw.items())
"""
LIMIT_GIB = 10


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_an_hps_checkpoint_loads_and_scores(tmp_path, capsys):
    """ViT-H-14 in the layout of HPS_v2.1_compressed.pt: 686 tensors under ``state_dict``, in half precision."""
    path = tmp_path / "HPS_v2.1_compressed.pt"
    python(MAKE, str(path))
    assert path.stat().st_size == pytest.approx(1.972e9, rel=0.01), "as large as the published file"
    peak_gib = float(python(SCORE, str(path)))
    with capsys.disabled():
        print(f"\nHPSv2.1 on the CPU, float32: {peak_gib:.1f} GiB at most")
    assert peak_gib < LIMIT_GIB


def fill(num: int, dim: int) -> FeatureRows:
    rows, rng = FeatureRows(num, dim), np.random.default_rng(num)
    for start in range(0, num, 500):
        at = np.arange(start, min(start + 500, num))
        rows.put(at, torch.from_numpy(np.abs(rng.normal(0.4, 0.3, size=(len(at), dim))).astype(np.float32)))
    return rows


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_distance_of_30000_images_takes_the_memory_of_6000(capsys):
    """2,048 features, moments and jackknife: the features lie on disk, so only d matters."""
    dim, peaks, values = 2048, {}, {}
    gaussian = Gaussian.of_rows(fill(4096, dim).everything())
    for num in (6_000, 30_000):
        rows = fill(num, dim)
        tracemalloc.start()
        value = gaussian.distance(moments_of_rows(rows.take, np.arange(num)))
        replicates = gaussian.replicates(rows.take, jackknife_groups(num))
        peaks[num] = tracemalloc.get_traced_memory()[1] / 2**30
        tracemalloc.stop()
        values[num] = value
        assert len(replicates) == 20 and min(replicates) > 0
    with capsys.disabled():
        shown = ", ".join(f"{peak:.2f} GiB at {num:,} images" for num, peak in peaks.items())
        print(f"\nFréchet distance, 2,048 features: {shown}")
    assert peaks[30_000] < 1.1 * peaks[6_000] and peaks[30_000] < 2
    assert values[30_000] < values[6_000], "the bias falls with n"
