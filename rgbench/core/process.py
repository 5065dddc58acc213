"""This process: threads, allocator, device, standard streams, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rgbench.core.errors import RESUMABLE, RgbenchError, UsageError

# Looks of GNU OpenMP's threads at a barrier before they sleep.
BUSY_SPINS = 1_000  # as long as a short operation, so that a busy neighbour gets the core
IDLE_SPINS = 30_000_000  # about a second, so that threads with a core of their own never sleep within a step
NUM_LOOKS, LOOK_SEC = 5, 0.004  # at the number of running threads
# How cuDNN and cuBLAS report that they got no memory; torch's own allocator has an exception class.
MEMORY_WORDS = ("out of memory", "ALLOC_FAILED", "CUDNN_STATUS_NOT_SUPPORTED", "unable to find an engine")
# From glibc's malloc.h. mallopt takes C ints.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


def tune_process(threads: int | None = None) -> int:
    """Set threads, OpenMP's waiting and glibc's allocator for fast CPU training beside other processes.

    OpenMP's threads wait at barriers by looking again and again. On a machine with a core for each thread they keep
    looking: sleeping would cost a wake-up at every operation. On a busy machine, or where a GPU computes and threads
    read its data, they look briefly, then sleep: otherwise they take the core from whatever they wait for. The choice
    is made once, at the start. glibc keeps large freed blocks instead of returning them to the kernel every step.
    Variables that the environment sets stay. OpenMP reads its variables once, so this must run before torch is
    imported.

    Args:
        threads: their number; by default the environment's ``OMP_NUM_THREADS``, else the cores of this process.

    Returns:
        The number of threads.

    Raises:
        RuntimeError: torch is imported already.
    """
    if "torch" in sys.modules:
        raise RuntimeError("tune_process() must run before torch is imported")
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    count = os.environ.setdefault("OMP_NUM_THREADS", str(available_cores()))
    os.environ.setdefault("MKL_NUM_THREADS", count)
    number = int(count) if count.isdigit() else available_cores()
    if "OMP_WAIT_POLICY" not in os.environ:  # GNU's OpenMP obeys a policy only without a count
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        if "GOMP_SPINCOUNT" not in os.environ:
            os.environ["GOMP_SPINCOUNT"] = str(spin_count(number, *load_and_cores()))
    keep_freed_memory()
    return number


def tune() -> None:
    """Tune this process, unless torch runs already (as in a notebook): then it is too late."""
    if "torch" not in sys.modules:
        tune_process()


def spin_count(threads: int, load: float, cores: float) -> int:
    """How often a thread looks at a barrier before it sleeps: long only where each thread has a core of its own.

    Args:
        threads: of this process.
        load: number of threads of other processes that run.
        cores: that this process may use.
    """
    return IDLE_SPINS if threads + load <= cores else BUSY_SPINS


def load_and_cores() -> tuple[float, float]:
    """Number of other running threads on this machine now, and of cores for this process; (inf, 0) where unknown.

    Not the load average: it still counts the command before this one, and misses one that starts beside it. The number
    is the median of a few looks. Cores are those of the affinity and of the control group's quota. A machine with an
    NVIDIA GPU counts as unknown.
    """
    if os.path.exists("/dev/nvidiactl"):
        return math.inf, 0
    try:
        running = []
        for _ in range(NUM_LOOKS):
            with open("/proc/loadavg", encoding="ascii") as file:  # 0.20 0.18 0.12 RUNNING/ALL PID
                running.append(int(file.read().split()[3].partition("/")[0]) - 1)
            time.sleep(LOOK_SEC)
    except (OSError, ValueError, IndexError):
        return math.inf, 0
    return sorted(running)[NUM_LOOKS // 2], min(available_cores(), _quota())


def _quota() -> float:
    """Cores that the control group lets this process use; infinite without a limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # "max" is no number
        return math.inf


def keep_freed_memory() -> bool:
    """Tell glibc never to map large blocks one by one and never to trim the heap.

    Returns:
        Whether it took effect; False off glibc, where nothing is done.
    """
    if "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}) or not os.confstr("CS_GNU_LIBC_VERSION"):
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be taken without swapping, in bytes: Linux's estimate, elsewhere half of all memory."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def launched() -> bool:
    """Whether torchrun (or ``accelerate launch``) started this process as one of a run's ranks."""
    return "LOCAL_RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_main_rank() -> bool:
    """Whether this process prints and writes for the run: it is alone, or the first of its ranks."""
    return not launched() or os.environ.get("RANK", "0") == "0"


def end_with_parent() -> bool:
    """Have the kernel send SIGTERM to this process when its parent ends.

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


def take_own_gpu() -> None:
    """Select the GPU of this process's ``LOCAL_RANK`` where torchrun started several.

    Shards of an evaluation may outnumber the GPUs and then share them in turn.
    """
    import torch

    if launched():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def lacks_memory(error: RuntimeError) -> bool:
    """Whether an error says that a GPU ran out of memory, by torch's class or by cuDNN's and cuBLAS' messages."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in MEMORY_WORDS)


@contextmanager
def memory_explained(where: str, advice: str) -> Iterator[None]:
    """Turn a GPU's lack of memory into advice.

    Args:
        where: begins the message.
        advice: ends it.

    Raises:
        RgbenchError: in place of torch's own.
    """
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        reason = str(error).partition(".")[0]
        raise RgbenchError(f"{where}: the GPU's memory does not suffice ({reason}); {advice}") from error


@contextmanager
def whole_float32() -> Iterator[None]:
    """Compute in float32 by default, on a GPU in whole float32, and restore the settings on leaving.

    By default torch rounds the operands of convolutions to TF32 (10 bits of mantissa), so that features, and the
    distances and rewards made of them, would differ between a GPU and a CPU by more than rounding, and so would a
    training of ``train.dtype: float32``. The setting of each operation, which this uses, holds over the older
    ``allow_tf32`` and the settings of whole back ends. A notebook may have set another default type, in which networks
    would be made.
    """
    import torch

    dtype = torch.get_default_dtype()
    backends: Any = torch.backends
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        torch.set_default_dtype(torch.float32)
        yield
    finally:
        torch.set_default_dtype(dtype)
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


class _Stream(io.FileIO):
    """Standard output or error: once its reader or terminal is gone, what is written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            gone = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self.fileno()).st_mode)
            if error.errno != errno.EPIPE and not gone:
                raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return memoryview(data).nbytes


def keep_streams() -> None:
    """Outlive whoever reads standard output and error: a closed pipe or terminal ends no work.

    A stream that was closed from the start leads nowhere; else the next file that is opened would take its number, and
    what libraries print would go into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for number, name in ((1, "stdout"), (2, "stderr")):
        old: Any = getattr(sys, name)
        raw = _Stream(number, "w", closefd=False)
        unbuffered = getattr(old, "write_through", False)  # as by python -u
        setattr(
            sys,
            name,
            io.TextIOWrapper(
                raw if unbuffered else io.BufferedWriter(raw),  # type: ignore[type-var, arg-type]
                encoding=getattr(old, "encoding", "utf-8"),
                errors=getattr(old, "errors", "backslashreplace"),
                line_buffering=number == 2 or raw.isatty(),
                write_through=unbuffered,
            ),
        )


def end_on_signals() -> None:
    """End with 75 on SIGTERM and SIGHUP and with 130 on Ctrl-C, without a traceback, outside of a StopRequest.

    In an import the process ends at once: nothing is under way, and libraries may print an exception there or swallow
    it. Elsewhere an exception lets temporary files be removed. A signal that is ignored stays so.
    """
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    code = _exit_code(number)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            with contextlib.suppress(OSError):
                os.write(2, b"Stopped.\n")
            os._exit(code)
        frame = frame.f_back
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(code)


def _exit_code(number: int | None) -> int:
    return 130 if number == signal.SIGINT else RESUMABLE


class StopRequest:
    """Records the first SIGTERM, SIGHUP or SIGINT; the loop asks for it between two steps.

    A second Ctrl-C interrupts at once; a repeated SIGTERM, as schedulers send it, does not. SIGHUP stays ignored under
    nohup. Outside of the main thread, which alone receives signals, nothing is installed.

    Args:
        deaf_after: ignore the signals on leaving, for a rank that torchrun stops while it ends already.

    Attributes:
        signal: number of the signal received, or None.
    """

    def __init__(self, deaf_after: bool = False) -> None:
        self.signal: int | None = None
        self.deaf_after = deaf_after
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
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
        """75 (resumable) for SIGTERM and SIGHUP, 130 for Ctrl-C."""
        return _exit_code(self.signal)
