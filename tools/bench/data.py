"""``python -m tools.bench data``: samples per second from webdataset tars, beside PIL in one plain loop."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rgbench.core.process import available_cores
from rgbench.data.batches import BatchLoader
from rgbench.data.config import WebDatasetData
from rgbench.data.sources import open_source
from tools.bench.clock import Clock, Spread, alternate

JPEG_QUALITY = 90
BATCH_SIZE = 16


def write_tar(path: Path, num: int, width: int, height: int) -> list[bytes]:
    """A tar of photographs' size: smooth random images with some grain, as JPEG, with captions.

    Returns:
        The JPEG files.
    """
    rng = np.random.default_rng(0)
    files = []
    with tarfile.open(path, "w") as tar:
        for i in range(num):
            coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
            grainy = (smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(grainy).save(buffer, "JPEG", quality=JPEG_QUALITY)
            files.append(buffer.getvalue())
            for suffix, content in (("jpg", files[-1]), ("txt", b"a photograph")):
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return files


def plain_decode(file: bytes, resolution: int) -> np.ndarray:
    """PIL's decode, resize of the short side and centre crop, (H, W, 3) float32 in [0, 1]: what a sample needs."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    square = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(square, dtype=np.float32) / 255


def measure(folder: Path, *, num: int, width: int, height: int, resolution: int, rounds: int) -> dict[str, Any]:
    """Samples per second of the loader with a thread per core, and of the plain loop in one thread.

    Args:
        folder: an empty one.
        num: samples, at least one batch.
        width: of the files, in pixels.
        height: of the files.
        resolution: that training sees.
        rounds: how often each is timed.
    """
    cores = available_cores()
    files = write_tar(folder / "00000.tar", num, width, height)
    source = open_source(WebDatasetData(path=str(folder), resolution=resolution))
    num_batches = num // BATCH_SIZE

    def load() -> None:
        loader = BatchLoader(source, 0, BATCH_SIZE, range(BATCH_SIZE), num_workers=cores, steps=num_batches)
        for step in range(num_batches):
            loader.load(step)
        loader.close()

    def plain() -> None:
        for file in files[: num_batches * BATCH_SIZE]:
            plain_decode(file, resolution)

    seconds = alternate({"plain": plain, "rgbench": load}, rounds, clock=Clock(_cpu()))
    count = num_batches * BATCH_SIZE
    spreads = {name: Spread.of(values) for name, values in seconds.items()}
    return {
        "files": {"num": num, "width": width, "height": height, "bytes_mean": sum(map(len, files)) / num},
        "resolution": resolution,
        "cores": cores,
        "images_per_sec": {name: count / spread.median for name, spread in spreads.items()},
        "seconds": {name: spread.to_json() for name, spread in spreads.items()},
        "share_of_plain_times_cores": spreads["plain"].median / spreads["rgbench"].median / cores,
    }


def _cpu() -> Any:
    import torch

    return torch.device("cpu")
