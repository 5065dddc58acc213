"""The launch options, what they make of exit codes, and the Slurm script; processes are started in tests/resume."""

from __future__ import annotations

import shlex
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from rgbench.core.errors import RgbenchError, UsageError
from rgbench.core.launch import Ranks, _buckets, _exit_code, _meeting_place, start_ddp
from tests.conftest import Cli


@pytest.mark.parametrize(
    ("codes", "code"),
    [({0: 75, 1: 75}, 75), ({1: 130}, 130), ({0: 2, 3: -15}, 2), ({0: 75, 1: 1}, 1)],
)
def test_exit_codes_come_through(codes: dict[int, int], code: int) -> None:
    assert _exit_code(codes) == code


@pytest.mark.parametrize(
    ("codes", "said"),
    [
        ({1: -signal.SIGKILL, 0: 1}, "rank 1 was ended by SIGKILL; if memory ran out"),
        ({0: -signal.SIGSEGV}, "rank 0 was ended by SIGSEGV"),
        ({2: 17}, "rank 2 ended with exit code 17"),
    ],
)
def test_a_process_that_was_killed_is_named(codes: dict[int, int], said: str) -> None:
    with pytest.raises(RgbenchError, match=said):
        _exit_code(codes)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nproc", "2"], "--nproc: needs --launch"),
        (["--launch", "ddp", "--nproc", "2", "--nodes", "2"], "--nodes 2: say where they meet with --head HOST:PORT"),
        (["--launch", "slurm"], "say how many GPUs a machine has with --nproc"),
        (["--launch", "ddp", "--nproc", "2", "train.lr=-1"], "train.lr"),
        (["--launch", "mpi"], "'mpi' is not one of"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(cli: Cli, words: list[str], said: str) -> None:
    done = cli("train", "lcd", *words)
    assert done.returncode == 2 and said in done.stderr


def test_no_gpu_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UsageError, match="no CUDA GPU here; say how many processes with --nproc N"):
        start_ddp(["train", "lcd"], None)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (None, ("localhost", 29400)),
        ("node-1", ("node-1", 29400)),
        ("10.0.0.1:5000", ("10.0.0.1", 5000)),
        ("[fe80::1]:5000", ("[fe80::1]", 5000)),
    ],
)
def test_where_machines_meet(head: str | None, expected: tuple[str, int]) -> None:
    assert _meeting_place(head) == expected


@pytest.mark.parametrize("head", ["node:x", "node:99999", "node:0", ":29400", "node:1:2", "fe80::1", "a b", "node\n"])
def test_where_nobody_meets(head: str) -> None:
    with pytest.raises(UsageError, match="--head .*: give HOST or HOST:PORT"):
        start_ddp(["train", "lcd"], 2, head=head)


WHOLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("RANK", value) for value in (None, "x", "-1", "2")),
        *(("LOCAL_RANK", value) for value in ("-1", "x", "7")),
        *(("WORLD_SIZE", value) for value in ("0", "two", "")),
        *(("MASTER_PORT", value) for value in (None, "0", "70000", "abc")),
        *(("MASTER_ADDR", value) for value in (None, "")),
    ],
)
def test_half_of_a_launchers_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    """As a notebook or a job script leaves it; torch would wait for ranks, or end in a traceback."""
    for key, given in WHOLE.items():
        monkeypatch.setenv(key, given)
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"the environment has .*{name}.*start with --launch ddp, or unset RANK"):
        Ranks.join()


def test_the_slurm_script(cli: Cli, tmp_path: Path) -> None:
    made = cli("train", "lcd", "--out", "my runs/x", "--launch", "slurm", "--nproc", "8", "--nodes", "4")
    assert made.returncode == 0
    script = tmp_path / "job.slurm"
    script.write_text(made.stdout)
    subprocess.run(["bash", "-n", str(script)], check=True)
    directives = [line for line in made.stdout.splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --nodes=4", "#SBATCH --gpus-per-node=8", "#SBATCH --job-name=lcd"} <= set(directives)
    line = next(line for line in made.stdout.splitlines() if line.startswith("srun"))
    words = shlex.split(line)
    assert words[2:4] == ["rgbench", "train"] and words[words.index("--out") + 1] == "my runs/x"
    assert words[-8:] == ["--launch", "ddp", "--nproc", "8", "--nodes", "4", "--head", "$head:29400"]
    assert 'if [ "$code" -eq 75 ]' in made.stdout


def test_one_process_gives_back_what_it_is_given() -> None:
    ranks, rows = Ranks(), torch.rand(3, 2)
    assert ranks.is_main and ranks.part_of(6) == range(6) and ranks.largest(3, 0) == [3, 0]
    assert ranks.gather_rows(rows) is rows and ranks.gather_lists(["a"]) == ["a"]
    assert list(Ranks(1, 3).part_of(6)) == [2, 3]
    with pytest.raises(UsageError, match="mine"):
        ranks.together(refuse)


def refuse() -> None:
    raise UsageError("mine")


def test_gradients_go_in_buckets_of_one_type() -> None:
    small = [torch.zeros(10) for _ in range(3)]
    large = [torch.zeros(9 << 20), torch.zeros(9 << 20)]
    mixed = [*small, torch.zeros(4, dtype=torch.float64), *small, *large]
    buckets = _buckets(mixed)
    assert [len(bucket) for bucket in buckets] == [3, 1, 4, 1]
    assert [id(tensor) for bucket in buckets for tensor in bucket] == list(map(id, mixed))
