"""The process is tuned before torch starts, and says so when it is too late."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rgbench.core.errors import UsageError
from rgbench.core.process import (
    BUSY_SPINS,
    IDLE_SPINS,
    StopRequest,
    available_cores,
    keep_freed_memory,
    load_and_cores,
    pick_device,
    spin_count,
    take_own_gpu,
    tune_process,
    whole_float32,
)
from tests.conftest import ROOT


def fresh(code: str, **environment: str) -> str:
    """Output of code in a process that has neither torch nor OpenMP settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


SHOW = """
import os, sys
from rgbench.core.process import BUSY_SPINS, IDLE_SPINS, tune_process
count = tune_process({})
assert "torch" not in sys.modules
spins = os.environ.get("GOMP_SPINCOUNT")
print(count, os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"],
      "chosen" if spins in (str(BUSY_SPINS), str(IDLE_SPINS)) else spins)
"""
TORCH = "import torch; print(torch.get_num_threads())"


def test_threads_follow_the_affinity() -> None:
    cores = available_cores()
    assert fresh(SHOW.format("") + TORCH) == f"{cores} {cores} PASSIVE chosen\n{cores}"


def test_threads_follow_the_argument_and_the_environment() -> None:
    assert fresh(SHOW.format("1") + TORCH) == "1 1 PASSIVE chosen\n1"
    assert fresh(SHOW.format(""), OMP_NUM_THREADS="1", OMP_WAIT_POLICY="ACTIVE") == "1 1 ACTIVE None"
    assert fresh(SHOW.format("1"), GOMP_SPINCOUNT="7") == "1 1 PASSIVE 7"


def test_an_affinity_mask_is_respected() -> None:
    pin = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert fresh(pin + SHOW.format("")) == "1 1 PASSIVE chosen"


@pytest.mark.parametrize(
    ("threads", "load", "cores", "spins"),
    [
        (2, 0, 2, IDLE_SPINS),
        (2, 1, 2, BUSY_SPINS),  # a neighbour wants one of the two cores
        (2, 1, 4, IDLE_SPINS),
        (4, 0, 2.0, BUSY_SPINS),  # a container's quota
        (1, 9, 8, BUSY_SPINS),
        (2, math.inf, 0, BUSY_SPINS),  # unknown
    ],
)
def test_threads_wait_long_only_on_cores_of_their_own(threads: int, load: float, cores: float, spins: int) -> None:
    assert spin_count(threads, load, cores) == spins


@pytest.mark.skipif(not os.path.exists("/proc/loadavg"), reason="no /proc/loadavg here")
def test_a_busy_process_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "print(1, flush=True)\nwhile True: pass"], stdout=-1) as neighbour:
        try:
            assert neighbour.stdout is not None and neighbour.stdout.readline()
            load, cores = load_and_cores()
        finally:
            neighbour.kill()
    assert load >= 1 and cores <= available_cores()


def test_too_late_is_an_error() -> None:
    assert "torch" in sys.modules
    with pytest.raises(RuntimeError, match="before torch is imported"):
        tune_process()


HEAP = """
import ctypes
from rgbench.core.process import keep_freed_memory
assert keep_freed_memory() == {tuned}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
blocks = [libc.malloc(64 << 20) for _ in range(4)]
maps = [line.split()[0].split("-") for line in open("/proc/self/maps") if "[heap]" in line]
low, high = (int(end, 16) for end in maps[0])
print(sum(low <= block < high for block in blocks))
"""


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="glibc's allocator alone is tuned")
def test_large_blocks_come_from_the_heap() -> None:
    """glibc would map each of them by itself otherwise, and give it back to the kernel on every free."""
    assert keep_freed_memory()
    assert fresh(HEAP.format(tuned=True)) == "4"


def test_devices() -> None:
    there = torch.cuda.is_available()
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") == ("cuda" if there else "cpu")
    with pytest.raises(UsageError, match="unknown device 'tpu'; known: auto, cpu, cuda"):
        pick_device("tpu")
    if not there:
        with pytest.raises(UsageError, match="--device cuda: .*use --device cpu"):
            pick_device("cuda")


TF32 = """
import os, torch
from rgbench.core.process import whole_float32
backends = torch.backends
operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)

def precisions():
    return [operation.fp32_precision for operation in operations]

def check(how, expected):
    exec(how)
    before = precisions()
    assert " ".join(before) == expected, (how, before)
    try:
        with whole_float32():
            assert precisions() == ["ieee"] * 3, (how, precisions())
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert precisions() == before, (how, precisions())

for how, expected in {cases}:
    child = os.fork()  # each with settings of its own
    if not child:
        check(how, expected)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, how
"""
# Each way of setting TF32, and the precision of products, convolutions and recurrences that torch then reports.
TF32_CASES = [
    ("pass", "none tf32 tf32"),
    ("backends.cudnn.allow_tf32 = False", "none none none"),
    ("backends.cuda.matmul.allow_tf32 = True", "tf32 tf32 tf32"),
    ("torch.set_float32_matmul_precision('high')", "tf32 tf32 tf32"),
    ("backends.fp32_precision = 'tf32'", "tf32 tf32 tf32"),
    ("backends.fp32_precision = 'ieee'", "ieee ieee ieee"),
    ("backends.cuda.matmul.fp32_precision = 'tf32'", "tf32 tf32 tf32"),
    ("backends.cudnn.conv.fp32_precision = 'ieee'", "none ieee tf32"),
]


def test_float32_is_whole_inside_and_as_it_was_after() -> None:
    fresh(TF32.format(cases=TF32_CASES))


def test_the_default_type_is_float32_inside_and_as_it_was_after() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with whole_float32():
            assert torch.zeros(1).dtype == torch.float32
        assert torch.zeros(1).dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_a_request_to_stop(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored
    try:
        with StopRequest() as stop:
            assert stop.signal is None
            signal.raise_signal(number)
            signal.raise_signal(number)
            assert (stop.signal, stop.exit_code) == (number, 75)
    finally:
        signal.signal(number, before)


def test_nohup_stays_in_force() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert stop.signal is None and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(("rank", "chosen"), [("0", 0), ("3", 3), ("5", 1)])
def test_each_of_several_processes_takes_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, rank: str, chosen: int
) -> None:
    import torch

    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    take_own_gpu()
    assert taken == [], "one process alone"
    monkeypatch.setenv("LOCAL_RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "8")
    take_own_gpu()
    assert taken == [chosen]


SPOKEN = """
import os, sys
from rgbench.core.process import keep_streams
keep_streams()
for number in range(2000):
    print("line", number)
    print("line", number, file=sys.stderr)
sys.stdout.flush()
os.write(2, b"of a library")
descriptor = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
assert descriptor > 2, descriptor
os.write(descriptor, b"done")
"""


@pytest.mark.parametrize(
    "how", ["{} | head -n 1", "{} 2>&1 >/dev/null | head -n 1", "{} >&-", "{} 2>&-", "{} >&- 2>&-"]
)
def test_work_goes_on_without_its_reader(tmp_path: Path, how: str) -> None:
    """A reader that leaves, or a stream that is closed from the start: no error, and no file in its place."""
    (tmp_path / "speak.py").write_text(SPOKEN)
    command = how.format(f"{sys.executable} {tmp_path / 'speak.py'} {tmp_path / 'file'}")
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert "head" not in how or done.stdout == "line 0\n"


def test_a_full_disk_behind_a_stream_is_told() -> None:
    code = "from rgbench.core.process import keep_streams; keep_streams(); print('x' * 100_000, flush=True)"
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" > /dev/full'],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0 and "No space left" in done.stderr


HEAVY = """
import time
print("importing", flush=True)
try:
    time.sleep(60)
except BaseException as error:
    raise ImportError("swallowed") from error
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_libraries_are_imported_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """Even where the library catches whatever is raised in its import."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(HEAVY)
    started = subprocess.Popen(
        [sys.executable, "-m", "rgbench", "train", "lcd"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )
    try:
        assert started.stdout is not None and started.stdout.readline() == "importing\n"
        started.send_signal(number)
        _, complained = started.communicate(timeout=20)
    finally:
        started.kill()
    assert (started.returncode, complained) == (130 if number == signal.SIGINT else 75, "Stopped.\n")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_elsewhere_lets_temporary_files_be_removed(number: signal.Signals, code: int) -> None:
    line = "import os, sys\nfrom rgbench.core.process import end_on_signals\nend_on_signals()\n"
    line += f"try: os.kill(os.getpid(), {number:d}); import time; time.sleep(9)\n"
    line += "except KeyboardInterrupt: sys.exit(130)\nfinally: print('removed')"
    done = subprocess.run(
        [sys.executable, "-c", line],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "removed\n", "")


def test_a_signal_that_is_ignored_stays_so() -> None:
    code = "import os, signal\nfrom rgbench.core.process import end_on_signals\n"
    code += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\nend_on_signals()\nos.kill(os.getpid(), signal.SIGHUP)"
    assert fresh(code) == ""
