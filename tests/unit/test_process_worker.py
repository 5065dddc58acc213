"""Workers that fail in every way, and what is left of them: a message that says why, and no process."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.process import BUSY_SPINS, IDLE_SPINS
from rgbench.rewards.remote import ProcessReward
from tests.conftest import ROOT
from tests.process_workers import SIMPLE, doing, scorer

IMAGES, PROMPTS = torch.rand(2, 3, 4, 4), ["a", "b"]


@pytest.fixture(autouse=True)
def logs(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("rgbench.rewards.remote.GRACE_SEC", 0.2)  # for workers that do not end when asked to
    return tmp_path / "cache" / "rgbench" / "workers"


@pytest.fixture(autouse=True)
def own_children() -> None:
    BEFORE.clear()
    BEFORE.update(children())


def is_there(pid: int) -> bool:
    """Whether a process exists, a zombie included."""
    return Path(f"/proc/{pid}").exists()


def wait_until(condition) -> None:
    """However slow the machine is: pytest-timeout ends what never comes true."""
    while not condition():
        time.sleep(0.02)


def fails(reward: ProcessReward, message: str) -> None:
    """Scoring fails as it should, no process is left, and the reward says so from then on."""
    pid = reward.worker.pid
    with pytest.raises(RgbenchError, match=message) as caught:
        reward(IMAGES, PROMPTS)
    assert type(caught.value) is RgbenchError and not is_there(pid)
    with pytest.raises(RgbenchError, match="the worker has ended already"):
        reward(IMAGES, PROMPTS)


PRINTED = r":\n  scoring 2\n(.*\n)*all that it printed: .*-mine\.log"
ENDS = [
    ("os._exit(3)", "mine: the worker ended with exit code 3 while scoring" + PRINTED),
    (
        "raise ValueError('no such style')",
        r"ended with exit code 1 while scoring:\n(.*\n)*  ValueError: no such style\n",
    ),
    ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by SIGKILL while scoring" + PRINTED),
    ("return [1.0]", r"ValueError: the scorer gave 1 scores for 2 images\n"),
    ("return [1.0] * 3", r"ValueError: the scorer gave 3 scores for 2 images\n"),
    ("return 'ab'", r"could not convert string to float: 'a'\n"),
]


@pytest.mark.parametrize(("line", "message"), ENDS, ids=[line for line, _ in ENDS])
def test_a_worker_that_ends_is_explained(tmp_path, line, message):
    fails(doing(tmp_path, line), message)


def test_prints_get_nowhere_near_the_answers(tmp_path, logs):
    line = "print('x' * 100_000); os.write(1, b'raw'); subprocess.run(['echo', 'child']); sys.stdin.read(); input"
    reward = doing(tmp_path, line)
    for _ in range(2):
        assert reward(IMAGES, PROMPTS).tolist() == [1.0, 1.0]
    reward.close()
    (log,) = logs.iterdir()
    assert log.read_text().count("x" * 100_000) == 2 and log.read_text().count("rawchild") == 2


def test_kill_9_from_outside_in_the_middle_of_a_batch(tmp_path):
    reward = doing(tmp_path, "time.sleep(10_000)")
    pid, log = reward.worker.pid, reward.worker.log

    def kill() -> None:
        wait_until(lambda: "scoring 2" in log.read_text())
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    fails(reward, "was killed by SIGKILL while scoring")
    killer.join()


def impatient(folder: Path, line: str, seconds: float) -> ProcessReward:
    """A reward that waits for scores, but not for the worker's start on a busy machine, only so long."""
    reward = doing(folder, line)
    reward.worker.timeout = seconds
    return reward


def test_no_progress_is_given_up_and_slow_progress_is_not(tmp_path):
    fails(impatient(tmp_path, "time.sleep(10_000)", 0.5), r"made no progress for 0\.5 seconds and was ended")
    fails(impatient(tmp_path, "os.kill(os.getpid(), signal.SIGSTOP)", 0.5), r"made no progress for 0\.5 seconds")
    slow = impatient(tmp_path, "return ((time.sleep(0.3), 2.0)[1] for _ in prompts)", 3.0)
    assert slow(torch.rand(11, 3, 4, 4), ["a"] * 11).tolist() == [2.0] * 11, "3.3 seconds in all"
    slow.close()


def test_a_worker_that_does_not_read_is_given_up_too(tmp_path):
    """More than a pipe holds."""
    reward = impatient(tmp_path, "pass", 0.5)
    os.kill(reward.worker.pid, signal.SIGSTOP)
    with pytest.raises(RgbenchError, match="no progress"):
        reward(torch.rand(2, 3, 600, 600), PROMPTS)
    assert not is_there(reward.worker.pid)


def test_an_environment_that_hangs_at_the_start(tmp_path):
    with pytest.raises(UsageError, match=r"no progress for 0\.5 seconds"):
        ProcessReward.load(sys.executable, scorer(tmp_path, "import time\ntime.sleep(10_000)\n"), timeout=0.5)
    assert not children()


CONTRACT = SIMPLE % "pass"
STARTS = [
    ("import absent_package\n", "cannot be imported there: No module named 'absent_package'"),
    (
        'INSTALL = "pip install absent==1"\ndef load(device):\n    import absent\n',
        "install it with: .* pip install absent==1",
    ),
    ("def load(device):\n    raise FileNotFoundError('w.pt: get it with: hf download x')\n", "hf download x"),
    (
        "def load():\n    pass\n",
        r"reward\.options: mine does not take them: got an unexpected keyword argument 'device'",
    ),
    ("load = print\nos._exit(5)\n", "name 'os' is not defined"),
    ("import os\nos._exit(5)\n", "the worker ended with exit code 5 before it could score; it printed nothing"),
    ("def load(device:\n", "SyntaxError"),
    (CONTRACT.replace('"weights_sha256": "none", ', ""), "contract lacks 'weights_sha256'"),
    (CONTRACT.replace("uint8", "int4"), "takes: 'int4'; known: uint8, float32"),
    (CONTRACT.replace('"none"', "float('nan')"), "Out of range float values are not JSON"),
]


@pytest.mark.parametrize(("text", "message"), STARTS)
def test_a_worker_that_cannot_start_is_explained(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        ProcessReward.load(sys.executable, scorer(tmp_path, text))
    assert not children()


def children() -> set[int]:
    """Processes that this one has started, zombies included, but for those of earlier tests."""
    found = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            if int(status.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(status.parent.name))
    return found - BEFORE


BEFORE: set[int] = set()


NO_PYTHON = [
    ("/nowhere/python", r"reward\.python /nowhere/python: cannot be started \(No such file or directory\)"),
    (str(ROOT), r"cannot be started \(Permission denied\); give the Python of the worker's environment"),
    ("true", "ended with exit code 0 before it could score"),
    ("/bin/sleep", "ended with exit code 1 before it could score:\n.*invalid"),
]


@pytest.mark.parametrize(("python", "message"), NO_PYTHON)
def test_what_is_no_interpreter_is_explained(tmp_path, python, message):
    with pytest.raises(UsageError, match=message):
        ProcessReward.load(python, scorer(tmp_path, SIMPLE % "pass"), timeout=20)
    assert not children()


def test_what_speaks_otherwise_is_explained(tmp_path):
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho this is no worker of ours; exec sleep 60\n")
    other.chmod(0o755)
    with pytest.raises(UsageError, match=f"{other} does not answer as a worker does"):
        ProcessReward.load(str(other), scorer(tmp_path, CONTRACT))
    other.write_text("#!/bin/sh\nprintf '\\000\\000\\000\\002\\000\\000\\000\\000[]'; exec sleep 60\n")
    with pytest.raises(UsageError, match="does not answer as a worker does"):
        ProcessReward.load(str(other), scorer(tmp_path, CONTRACT))
    assert not children()


def test_an_environment_without_numpy(tmp_path):
    """A real other environment, with nothing in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "other"], check=True)
    with pytest.raises(UsageError, match="No module named 'numpy'"):
        ProcessReward.load(str(tmp_path / "other/bin/python"), scorer(tmp_path, SIMPLE % "pass"))


def test_what_would_mislead_the_worker_is_not_passed_on(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PYTHONPATH", "ACCELERATE_X"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", str(IDLE_SPINS))  # long waits at barriers would take the run's cores
    reward = doing(tmp_path, "print(sorted(os.environ), *map(os.environ.get, ('GOMP_SPINCOUNT', 'HF_HUB_OFFLINE')))")
    reward(IMAGES, PROMPTS)
    said = reward.worker.log.read_text()
    assert "RANK" not in said and "MASTER" not in said and "PYTHON" not in said and "ACCEL" not in said
    assert "'PATH'" in said and f"] {BUSY_SPINS} 1\n" in said
    reward.close()


PARENT = """
import signal, sys
from rgbench.rewards.remote import Worker
worker = Worker(sys.executable, "mine", "reward", 60.0)
start = {"worker": "mine", "file": sys.argv[1], "folder": None, "path": None}
start.update(device="cpu", options={}, look=False)
assert worker.start(start)["type"] == "ready"
print(worker.pid, worker.log, flush=True)
try:
    worker.score((1, 2, 2, 3), ["a"], bytes(12))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def in_a_batch(code: str, file: str) -> tuple[subprocess.Popen, int]:
    """A process whose worker has begun to score, and the worker's id."""
    parent = subprocess.Popen(
        [sys.executable, "-c", code, file],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pid, log = parent.stdout.readline().split(maxsplit=1)
    wait_until(lambda: "scoring" in Path(log.strip()).read_text())
    return parent, int(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_process_that_started_it(tmp_path, number):
    """In the middle of a batch: Ctrl-C at a terminal (the whole group), the scheduler's TERM, kill -9."""
    parent, worker = in_a_batch(PARENT, scorer(tmp_path, SIMPLE % "time.sleep(10_000)"))
    assert is_there(worker)
    os.killpg(parent.pid, number)
    said, _ = parent.communicate()
    assert parent.returncode == (0 if number == signal.SIGINT else -number)
    assert said == ("interrupted\n" if number == signal.SIGINT else "")
    wait_until(lambda: not is_there(worker))


def test_the_first_ctrl_c_lets_the_batch_be_finished(tmp_path):
    """rgbench notes it and stops after the step; the worker, in a session of its own, hears nothing of it."""
    noting = PARENT.replace(
        "worker = Worker", "signal.signal(signal.SIGINT, lambda *_: print('noted', flush=True))\nworker = Worker"
    )
    goes_on = tmp_path / "go on"
    waiting = f"while not os.path.exists({str(goes_on)!r}): time.sleep(0.02)"
    parent, _ = in_a_batch(noting + "else:\n    print('scored')\n", scorer(tmp_path, SIMPLE % waiting))
    assert parent.stdout is not None
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.stdout.readline() == "noted\n"
    goes_on.touch()
    said, _ = parent.communicate()
    assert said == "scored\n" and parent.returncode == 0


def test_a_reward_that_is_let_go_leaves_no_process(tmp_path):
    reward = doing(tmp_path, "pass")
    pid = reward.worker.pid
    assert reward(IMAGES, PROMPTS).tolist() == [1.0, 1.0]
    del reward
    assert not is_there(pid)


LIAR = """#!{python}
import json, os, struct, sys, time
def send(header, payload=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    os.write(1, struct.pack(">II", len(text), len(payload)) + text + payload)
def get():
    length, size = struct.unpack(">II", sys.stdin.buffer.read(8))
    return json.loads(sys.stdin.buffer.read(length)), sys.stdin.buffer.read(size)
contract = {{"takes": "uint8", "weights_sha256": "none", "antialias": None}}
ready = {{"type": "ready", "protocol": 1, "name": "mine", "python": "3", "code_sha256": "0", "versions": {{}}}}
ready["contract"] = contract
get()
"""
ASKED = "send(ready); get()\n"
DRIP = "os.write(1, bytes([0, 0, 1, 0, 0, 0, 0, 0]))\nwhile True: os.write(1, b' '); time.sleep(0.1)"
LIES = [
    ("while True: send({'type': 'ready'}) or time.sleep(0.01)", "does not answer as a worker does"),
    ("send({'type': 'failed'}); time.sleep(60)", "does not answer as a worker does"),
    ("send({**ready, 'contract': {'takes': 'int4'}}); time.sleep(60)", "does not answer as a worker does"),
    ("send({**ready, 'protocol': 7}); time.sleep(60)", "speaks protocol 7, not 1"),
    ("send({'type': ['ready']}); time.sleep(60)", "does not answer as a worker does"),
    ("send(b'[' * 100_000); time.sleep(60)", "does not answer as a worker does"),
    (ASKED + "while True: send({'type': 'scored', 'done': 1})", "does not answer as a worker does"),
    (ASKED + "[send({'type': 'scored', 'done': i}) for i in range(1, 9)]; time.sleep(60)", "answered with 'scored'"),
    (ASKED + DRIP, r"no progress for 1 seconds"),
    ("send(ready); send({'type': 'scores'}, bytes(16)); time.sleep(60)", "answered before it was asked"),
    (ASKED + "send({'type': 'scores'}, bytes(8)); time.sleep(60)", "answered with 'scores'"),
]


@pytest.mark.parametrize(("lie", "message"), LIES)
def test_nonsense_and_endless_answers_are_explained_in_time(tmp_path, lie, message):
    file = tmp_path / "python"
    file.write_text(LIAR.format(python=sys.executable) + lie + "\n")
    file.chmod(0o755)
    with pytest.raises(RgbenchError, match=message):
        reward = ProcessReward.load(str(file), scorer(tmp_path, CONTRACT), timeout=60)
        wait_until(lambda: "before" not in message or readable(reward))
        reward.worker.timeout = 1.0
        reward(IMAGES, PROMPTS)
    assert not children()


def readable(reward: ProcessReward) -> bool:
    return bool(select.select([reward.worker._from], [], [], 0)[0])


def test_what_a_worker_started_ends_with_it(tmp_path):
    reward = doing(tmp_path, "print(subprocess.Popen(['sleep', '1000']).pid, flush=True); os._exit(3)")
    fails(reward, "ended with exit code 3")
    child = int(reward.worker.log.read_text().split()[2])
    wait_until(lambda: not is_there(child))


def test_what_a_worker_prints_is_kept_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("rgbench.rewards.remote.MAX_LOG_BYTES", 10_000)
    reward = doing(tmp_path, "print('x' * 20_000)")
    for _ in range(5):
        reward(IMAGES, PROMPTS)
    assert reward.worker.log.stat().st_size <= 30_000
    reward.close()
