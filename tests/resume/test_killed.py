"""kill -9 at random instants of whole training runs, saves and start-up included."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.parity import tiny

# A child trains from start-up on and is killed; the next one goes on with what is there. One import serves them all.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from rgbench.core import checkpoint
from rgbench.core.run import RunDirectory
from tests.resume.loops import assert_same, everything, make_loop, run_to_end
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
options = {"steps": 6 * kills, "save_every": 2, "log_every": 1}
random.seed(0)

def begin(path):
    loop = make_loop("lrm", folder / "teacher", path, **options)
    loop.restore()
    return loop

def child():
    loop = begin(folder / "killed")
    def told(*arguments):
        os.write(writer, b"%d\\n" % loop.step)
        return commit(*arguments)
    commit, loop._commit = loop._commit, told
    run_to_end(loop)

done = landed = 0
for kill in range(kills):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        child()
        os._exit(0)
    os.close(writer)
    time.sleep(random.uniform(0.0, 1.5))
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    landed += os.WIFSIGNALED(status)
    begun = [int(line) for line in os.fdopen(reader, "rb").read().split()]
    newest = checkpoint.latest(folder / "killed" / "checkpoints")
    step = checkpoint.step_of(newest) if newest else 0
    assert step >= max([*(number - 2 for number in begun), done]), (kill, begun, step)
    done = step
killed = run_to_end(begin(folder / "killed"))
assert_same(everything(killed), everything(run_to_end(begin(folder / "straight"))))
rows = [[{k: v for k, v in row.items() if k != "images_per_sec"} for row in RunDirectory(folder / name).read_log()]
        for name in ("killed", "straight")]
assert rows[0] == rows[1]
print("landed", landed)
"""


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_fifty_kills(tmp_path: Path) -> None:
    tiny.save_pipeline(tmp_path / "teacher")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), "50"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 25, "the kills landed in running processes"
