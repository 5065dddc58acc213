"""Forks are to their callers what processes are: words, streams, folder, paths, exit codes, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SHOW = """
import os, sys
import brought
print(sys.argv[1:], os.getcwd(), os.environ["MINE"], brought.__file__, sys.stdin.read(), "torch" in sys.modules)
print("complaint", file=sys.stderr)
"""


@pytest.fixture
def python(fork_server) -> str:
    return str(fork_server.folder / "python")


def test_a_fork_has_what_its_caller_has(python, tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "brought.py").touch()
    environment = {"MINE": "é", "PYTHONPATH": "plugins", "PATH": os.environ["PATH"]}
    command = [python, "-c", SHOW, "a b", "--c"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, input="read", capture_output=True, text=True)
    brought = tmp_path / "plugins" / "brought.py"
    assert done.stdout == f"['a b', '--c'] {tmp_path} é {brought} read True\n"
    assert (done.returncode, done.stderr) == (0, "complaint\n")


ENDS = {
    "pass": 0,
    "raise SystemExit": 0,
    "raise SystemExit(3)": 3,
    "raise SystemExit('no')": 1,
    "1 / 0": 1,
    "import os; os._exit(4)": 4,
    "import os; os.kill(os.getpid(), 15)": -15,
    "import os; os.kill(os.getpid(), 9)": -9,
}


@pytest.mark.parametrize("code", ENDS)
def test_it_ends_as_a_process_ends(python, code):
    done = subprocess.run([python, "-"], input=code, capture_output=True, text=True)
    assert done.returncode == ENDS[code], done.stderr
    assert done.stderr.splitlines()[-1:] == {"1 / 0": ["ZeroDivisionError: division by zero"],
                                             "raise SystemExit('no')": ["no"]}.get(code, [])  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it(python, number, tmp_path):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(1000)"
    with subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE) as asked:
        pid = int(asked.stdout.readline())
        assert pid != asked.pid
        asked.send_signal(number)
    assert asked.returncode == -number
    while Path(f"/proc/{pid}").exists():  # pytest-timeout ends what never comes true
        time.sleep(0.02)


def test_what_it_cannot_be_is_a_real_process(python):
    done = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("pip ")


def test_rgbench_is_there(fork_server):
    done = subprocess.run([fork_server.folder / "rgbench", "show", "lrmm"], capture_output=True, text=True)
    assert done.returncode == 2 and "no recipe 'lrmm'" in done.stderr
