"""The process that rgbench runs in: threads, allocator, device. Tuned before torch is imported.

SIGTERM and Ctrl-C as a request to save and stop.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rgbench.core.errors import UsageError

# How often a thread of GNU's OpenMP looks at a barrier before it sleeps. Measured by docs/measure/process_tuning.py.
SPIN_COUNT = 1000
# From glibc's malloc.h. mallopt takes C ints.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# As cuDNN and cuBLAS say that the memory that they take themselves is not there; torch's own has a class of its own.
MEMORY_WORDS = ("out of memory", "ALLOC_FAILED", "CUDNN_STATUS_NOT_SUPPORTED", "unable to find an engine")
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def tune_process(threads: int | None = None) -> int:
    """Make CPU training fast, and bearable beside other processes.

    OpenMP's threads spin at barriers only as long as a short operation takes, then sleep:
    spinning on, they take the core from whatever they wait for when another process is
    busy; never spinning, they pay for a wake-up at every operation. As many threads run as
    this process may use cores, and glibc keeps large freed blocks instead of returning
    them to the kernel every step. What each gives: docs/performance.md. What the
    environment already sets is left alone. OpenMP reads its variables once, so this must
    run before torch is imported.

    Args:
        threads: how many; by default the environment's ``OMP_NUM_THREADS``, else the CPU affinity.

    Returns:
        The number of threads.

    Raises:
        RuntimeError: torch is imported already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("tune_process() must run before torch is imported")
    if "OMP_WAIT_POLICY" not in os.environ:  # which GNU's OpenMP obeys only without a count of its own
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    count = os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    os.environ.setdefault("MKL_NUM_THREADS", count)
    keep_freed_memory()
    return int(count) if count.isdigit() else available_cores()


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be taken without swapping, in bytes, as Linux estimates it; elsewhere the free pages."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def keep_freed_memory() -> bool:
    """Tell glibc never to map large blocks one by one and never to trim the heap.

    Returns:
        Whether it took effect; False off glibc, where nothing is done.
    """
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}) or not os.confstr("CS_GNU_LIBC_VERSION"):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))


def launched() -> bool:
    """Whether torchrun (or ``accelerate launch``) started this process as one of a run's ranks."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_rank() -> bool:
    """Whether this process speaks for the run: it is alone, or the first of its ranks."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def end_with_parent() -> bool:
    """Have the kernel send SIGTERM when the process that started this one ends, by whatever means.

    Returns:
        Whether it took effect; False off Linux, where nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0) == 0


def pick_device(name: str = "auto") -> str:
    """``cpu`` or ``cuda``, for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        UsageError: another name, or ``cuda`` where there is none.
    """
    import torch

    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device '{name}'; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU"
        raise UsageError(f"--device cuda: {why}; use --device cpu, or see: rgbench doctor")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def lacks_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory did not suffice: cuDNN and cuBLAS, which take some themselves, say so in other words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in MEMORY_WORDS)


def take_own_gpu() -> None:
    """Compute on the GPU of this process's ``LOCAL_RANK`` where torchrun started several; one alone keeps the first.

    Processes that share nothing, as the shards of an evaluation, may outnumber the GPUs: they then share them in turn.
    """
    import torch

    if launched():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


@contextmanager
def whole_float32() -> Iterator[None]:
    """Compute float32 on a GPU in float32, and restore the setting on leaving.

    By default torch rounds the operands of convolutions to TF32 (10 bits of mantissa), so that features, and the
    distances and rewards made of them, would differ between a GPU and a CPU by more than rounding. The setting of each
    operation, which this uses, holds over the older ``allow_tf32`` and the settings of whole back ends.
    """
    import torch

    backends: Any = torch.backends
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


class StopRequest:
    """Notes the first SIGTERM or SIGINT; the loop asks between two steps.

    A second Ctrl-C interrupts at once; a repeated SIGTERM, as schedulers send it, does not. Outside of the main thread
    nothing is installed, since only that thread receives signals.

    Args:
        deaf_after: ignore both signals on leaving, for a process that others started and stop: it is ending already.

    Attributes:
        signal: number of the signal received, or None.
    """

    def __init__(self, deaf_after: bool = False) -> None:
        self.signal: int | None = None
        self.deaf_after = deaf_after
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.deaf_after else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
        elif number == signal.SIGINT:
            raise KeyboardInterrupt

    @property
    def exit_code(self) -> int:
        """75 (resumable) for SIGTERM, 130 for Ctrl-C."""
        return 130 if self.signal == signal.SIGINT else 75
