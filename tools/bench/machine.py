"""What the machine can do: matrix products and copies per second, measured; and what machine it is."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from rgbench.core.process import available_cores
from rgbench.train.log import RSS_UNIT_BYTES
from tools.bench.clock import Clock
from tools.bench.counting import Product

SQUARE = {"cpu": 1536, "cuda": 8192}  # rates are flat from here on
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far beyond any cache
PRODUCT_SEC = 0.02
LARGEST_OPERAND = 1 << 26  # elements; a product's batch and rows are cut to this
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIBRARIES = ("diffusers", "transformers", "open_clip_torch", "numpy")


class Machine:
    """Measures one device.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: of the matrix products, as ``train.dtype`` says it.
        square: side of the large square product; by default one that the device is busy with.
        copy_bytes: size of the block that is copied; by default one beyond the caches.
        product_sec: time given to each small product.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: str,
        square: int | None = None,
        copy_bytes: int | None = None,
        product_sec: float = PRODUCT_SEC,
    ) -> None:
        self.device, self.dtype, self.clock = device, DTYPES[dtype], Clock(device)
        self.square = square or SQUARE[device.type]
        self.product_sec = product_sec
        self.copy_bytes = copy_bytes or COPY_BYTES[device.type]

    def large_rate(self) -> float:
        """FLOP per second of one large square product, once, after a warm-up; holds nothing between two calls."""
        a, b, out = self._operands(Product(1, self.square, self.square, self.square))
        torch.bmm(a, b, out=out)
        return 2 * self.square**3 / self.clock.seconds(lambda: torch.bmm(a, b, out=out))

    def product_rate(self, shape: Product) -> float:
        """FLOP per second at one shape, over some milliseconds after a warm-up; one too large for memory is cut."""
        cut = cut_to_memory(shape)
        a, b, out = self._operands(cut)
        torch.bmm(a, b, out=out)
        once = self.clock.seconds(lambda: torch.bmm(a, b, out=out))
        times = max(1, int(self.product_sec / once))
        seconds = self.clock.seconds(lambda: [torch.bmm(a, b, out=out) for _ in range(times)])
        return times * cut.flops / seconds

    def copy_rate(self) -> float:
        """Bytes per second read and written together by a copy within the device's memory, once."""
        source = torch.zeros(self.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.ones_like(source)
        return 2 * self.copy_bytes / self.clock.seconds(lambda: target.copy_(source))

    def _operands(self, shape: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = ((shape.m, shape.k), (shape.k, shape.n), (shape.m, shape.n))
        a, b, out = (torch.zeros(shape.batch, *size, device=self.device, dtype=self.dtype) for size in sizes)
        return a.uniform_(-1, 1), b.uniform_(-1, 1), out


def cut_to_memory(shape: Product) -> Product:
    """The shape with fewer products, then fewer rows, until neither side that has them is beyond the limit."""
    batch, m, widest = shape.batch, shape.m, max(shape.k, shape.n)
    while batch > 1 and batch * m * widest > LARGEST_OPERAND:
        batch //= 2
    while m > 1 and batch * m * widest > LARGEST_OPERAND:
        m //= 2
    return Product(batch, m, shape.k, shape.n)


def peak_memory(device: torch.device, work: Callable[[], Any]) -> dict[str, Any]:
    """Bytes at the peak of ``work``: CUDA's largest allocation during it; on a CPU the process's peak RSS so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return {"bytes": torch.cuda.max_memory_allocated(device), "what": "torch.cuda.max_memory_allocated"}
    work()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT_BYTES
    return {"bytes": rss, "what": "peak RSS of the process, both steps in it"}


def describe(device: torch.device) -> dict[str, Any]:
    """Device, threads, allocator settings and versions, for a result file."""
    is_cuda = device.type == "cuda"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
        "device_type": device.type,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if is_cuda else _memory_bytes(),
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": versions | {name: version(name) for name in LIBRARIES},
        "cuda": torch.version.cuda if is_cuda else None,
    }


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
