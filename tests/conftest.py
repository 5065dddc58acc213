"""What all tests share: no network, nothing of whoever runs them, a tuned process, the command line."""

from __future__ import annotations

import gc
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.internal.conjecture import providers

from rgbench.core.process import available_cores, tune_process
from tests.fork_server import ForkServer, never_wait_for_the_disk

ROOT = Path(__file__).parent.parent

# What one test of the short tier may take, with the processes that it waits for; the slowest takes a fifth.
CPU_BUDGET_SEC = 120

if "torch" not in sys.modules:
    tune_process(threads=1)  # as many workers as cores share the machine, and sums have one order everywhere

# Deterministic, so that a failure on one machine is a failure on all; time limits are pytest-timeout's. The long tier
# searches with fresh seeds. Hypothesis would also draw constants of the modules that happen to be loaded, so that the
# examples of a test would depend on the tests before it.
PROFILE = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("rgbench", derandomize=True, **PROFILE)
settings.register_profile("search", derandomize=False, print_blob=True, **PROFILE)
settings.load_profile("rgbench")
providers._get_local_constants = lambda: providers._local_constants

# What a terminal, a CI service or a scheduler sets changes what is printed and how many ranks there are; what is set
# for the hub, which weights are found.
FOREIGN = re.compile(
    r"FORCE_COLOR|CLICOLOR_FORCE|PY_COLORS|TTY_\w+|COLUMNS|LINES|TERMINAL_WIDTH|GITHUB_ACTIONS|LANG(UAGE)?|LC_\w+"
    r"|PYTHON(?!PATH|HOME)\w+|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)"
    r"|(MASTER|SLURM|TORCHELASTIC|ACCELERATE|HF|HUGGINGFACE|TRANSFORMERS|WANDB)_\w+"
)


def pytest_configure(config: pytest.Config) -> None:
    """Take away what tests would find of whoever runs them, here and in the processes that they start."""
    for name in [name for name in os.environ if FOREIGN.fullmatch(name)]:
        del os.environ[name]
    sys.dont_write_bytecode = False  # asserts are rewritten once, not in every session
    never_wait_for_the_disk()
    caches = tempfile.mkdtemp(prefix="rgbench-tests-")
    config.add_cleanup(lambda: shutil.rmtree(caches, ignore_errors=True))
    os.environ.update(LC_ALL="C.UTF-8", NO_COLOR="1", TERM="dumb", XDG_CACHE_HOME=caches, HF_HOME=f"{caches}/hub")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")  # pytest-socket blocks this process alone
    if config.getoption("markexpr") != "gpu":  # exact figures of a CPU; `make test-gpu` asks for the GPU by its mark
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell's background jobs have it, and their children
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n auto``: each has torch in memory, with the data of its tests."""
    return min(4, available_cores())


def pytest_collection_finish() -> None:
    """Keep thousands of collected tests out of every later garbage collection, whose pauses fall into timed code."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let go of them: at exit, libraries would call what was kept a leak."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Each test, with the fixtures made for it, draws the same numbers whichever tests ran before."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test of the short tier that takes long: CPU time, which a busy machine does not stretch much."""
    begun = sum(os.times()[:4])
    yield
    spent = sum(os.times()[:4]) - begun
    if spent > CPU_BUDGET_SEC and not any(item.iter_markers("long")) and not any(item.iter_markers("gpu")):
        pytest.fail(f"{spent:.0f} s of CPU, at most {CPU_BUDGET_SEC}: make it faster, or mark it long", pytrace=False)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """``python`` and ``rgbench`` that start at once; a server for each worker, started when first asked for."""
    server = ForkServer(tmp_path_factory.mktemp("programs"), os.environ | {"PYTHONPATH": str(ROOT)})
    yield server
    server.close()


def needs(*commands: str) -> pytest.MarkDecorator:
    """Skip tests where none of the commands is installed; under ``RGBENCH_SKIP_NOTHING``, as in CI, they fail there."""
    missing = not any(map(shutil.which, commands)) and "RGBENCH_SKIP_NOTHING" not in os.environ
    return pytest.mark.skipif(missing, reason=f"no {commands[0]} here; on Debian: scripts/install_debian.sh")


@dataclass(frozen=True)
class Finished:
    """What a command left: exit code and output."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Finished]


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs ``rgbench`` in ``tmp_path``, in this process, which has its imports already."""
    from typer.testing import CliRunner

    from rgbench.cli.main import app

    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> Finished:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)], prog_name="rgbench")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Finished(result.exit_code, result.stdout, result.stderr)

    return run
