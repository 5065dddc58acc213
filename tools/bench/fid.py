"""``python -m tools.bench fid``: the Fréchet distance beside its eigenvalues and beside clean-fid."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cleanfid.fid import frechet_distance as clean_frechet
from cleanfid.fid import get_folder_features
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from torchvision.models import inception_v3

from rgbench.metrics.fid import Moments, frechet_distance, moments_of_rows
from rgbench.metrics.networks import INCEPTION_FILE, InceptionNetwork
from rgbench.metrics.reference import from_uint8
from tools.bench.clock import Clock, Spread, alternate, ratio

DIM = 2048
CPU = torch.device("cpu")


class RandomInception(torch.nn.Module):
    """The published file's layout with random weights at He's scale, so that features do not die out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = inception_v3(weights=None, aux_logits=False, init_weights=False)
        self.layers.fc = torch.nn.Identity()
        with torch.no_grad():
            for layer in self.layers.modules():
                if isinstance(layer, torch.nn.Conv2d):
                    layer.weight.mul_(6**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def save_inception(file: Path) -> Path:
    """A random Inception in the published file's layout."""
    torch.manual_seed(0)
    with torch.no_grad():
        torch.jit.trace(RandomInception().eval(), torch.zeros(1, 3, 299, 299), check_trace=False).save(file)
    return file


def solve(dim: int, num: int, rounds: int) -> dict[str, Any]:
    """Seconds of the distance from two sets' moments, and of ``numpy.linalg.eigvalsh`` of two such matrices.

    Args:
        dim: features.
        num: samples of each set, more than features.
        rounds: how often each is timed.
    """
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((dim, dim)) / np.sqrt(dim)
    one, two = (Moments.of(rng.standard_normal((num, dim)) @ mixing + shift) for shift in (0.0, 0.1))
    first, second = one.covariance, two.covariance
    found: list[float] = []

    def eigenvalues() -> None:
        np.linalg.eigvalsh(first)
        np.linalg.eigvalsh(second)

    work: dict[str, Callable[[], Any]] = {
        "eigvalsh twice": eigenvalues,
        "rgbench": lambda: found.append(frechet_distance(one, two)),
        "clean-fid": lambda: found.append(clean_frechet(one.mean, first, two.mean, second)),
    }
    seconds = alternate(work, rounds, Clock(CPU))
    return {
        "dim": dim,
        "samples": num,
        "seconds": {name: Spread.of(values).to_json() for name, values in seconds.items()},
        "times_eigvalsh_twice": ratio(seconds["rgbench"], seconds["eigvalsh twice"]).to_json(),
        "gain_over_clean_fid": ratio(seconds["clean-fid"], seconds["rgbench"]).to_json(),
        "relative_difference": abs(found[0] - found[1]) / abs(found[1]),
    }


def memory(dim: int, chunks: tuple[int, int] = (4, 8)) -> dict[str, int]:
    """Peak bytes that numpy takes to gather moments, for twice as many samples too: they must be the same.

    Args:
        dim: features.
        chunks: how many chunks of 1,024 rows each time.
    """
    peaks = {}
    for number in chunks:
        tracemalloc.start()
        try:
            whole = Moments.zeros(dim)
            for seed in range(number):
                whole = whole + Moments.of(np.random.default_rng(seed).standard_normal((1024, dim)))
            peaks[str(number * 1024)] = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    return peaks


def end_to_end(folder: Path, *, num: int, side: int, device: str, rounds: int) -> dict[str, Any]:
    """Images of a folder to a distance: clean-fid's route through files, ours from images in memory.

    Args:
        folder: an empty one.
        num: images.
        side: in pixels.
        device: ``cpu`` or ``cuda``.
        rounds: how often each is timed.
    """
    images, files = folder / "images", folder / INCEPTION_FILE
    images.mkdir()
    save_inception(files)
    pixels = write_images(images, num, side)
    place = torch.device(device)
    theirs_network = InceptionV3W(str(folder), download=False).eval().to(place)
    ours_network = InceptionNetwork(files, "patch299", place)
    rows: dict[str, np.ndarray] = {}

    def clean() -> None:
        settings = {"num_workers": 0, "batch_size": 16, "device": place, "verbose": False}
        rows["clean-fid"] = get_folder_features(str(images), model=theirs_network, **settings)
        rows["clean moments"] = np.cov(rows["clean-fid"], rowvar=False)

    def ours() -> None:
        parts = [ours_network(ours_network.prepare(from_uint8(part))) for part in pixels.split(16)]
        rows["rgbench"] = torch.cat(parts).numpy()
        rows["moments"] = moments_of_rows(rows["rgbench"].__getitem__, np.arange(num)).covariance

    seconds = alternate({"clean-fid": clean, "rgbench": ours}, rounds, Clock(place))
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    scale = float(np.abs(rows["clean-fid"]).max())
    return {
        "images": num,
        "side": side,
        "weights": "random",
        "images_per_sec": {name: num / spread.median for name, spread in spreads.items()},
        "gain_over_clean_fid": ratio(seconds["clean-fid"], seconds["rgbench"]).to_json(),
        "largest_relative_difference": float(np.abs(rows["clean-fid"] - rows["rgbench"]).max()) / scale,
    }


def write_images(folder: Path, num: int, side: int) -> torch.Tensor:
    """PNGs in a folder and the same as (num, 3, side, side) uint8, in the order of their names."""
    rng = np.random.default_rng(0)
    kept = []
    for i in range(num):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        image = coarse.resize((side, side), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:06d}.png")
        kept.append(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1))
    return torch.stack(kept)
