"""The launch of a run: its ranks, the processes that torchrun starts, and the Slurm job script."""

from __future__ import annotations

import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rgbench.core.errors import RESUMABLE, RgbenchError, UsageError
from rgbench.core.process import available_cores, launched

BUCKET_BYTES = 64 << 20  # gradients summed in one message
TIMEOUT = timedelta(hours=1)  # longer than any save, sample grid or index of tars that the others wait for
DEFAULT_PORT = 29400  # torchrun's own
SHUTDOWN_SEC = 300  # workers have this long to save before they are killed
EXPLAINED = (1, 2, RESUMABLE, 130)  # exit codes whose reason the main rank prints
_FAILURES = (RgbenchError, OSError)  # may happen on one rank alone; shared with all
SCRIPT = """\
#!/bin/bash
# Made by: {made_by}
# Submit with: sbatch [--partition ...] [--account ...] [--time ...] THIS_FILE
# The run's folder must lie where every machine sees it.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={nproc}
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@420

set -u
# Slurm sends SIGTERM seven minutes before the end, or on preemption: the run saves and exits with {resumable}.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=0 {command} --launch ddp --nproc {nproc} --nodes {nodes} --head "$head:{port}"
code=$?
if [ "$code" -eq {resumable} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""
T = TypeVar("T")


class Ranks:
    """The processes that train together, each on a contiguous slice of the global batch.

    A single process never touches a process group: every method returns what it was given. Gradients are averaged in a
    layout that no restart changes, so that a resumed run sums in the order of the uninterrupted one (DDP re-orders its
    buckets after the first step).

    Args:
        rank: of this process, from 0.
        size: number of ranks.
        device: of this rank.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device

    @classmethod
    def join(cls, device: str = "cpu") -> Ranks:
        """Join the processes that were launched with this one; alone where none were.

        Args:
            device: ``cpu`` (gloo) or ``cuda`` (nccl, a GPU for each local rank).

        Raises:
            UsageError: fewer GPUs than local ranks, or half of what torchrun sets in the environment.
        """
        if not launched():
            return cls(device=device)
        _check_environment()
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device == "cuda" and local >= here:
            raise UsageError(f"local rank {local} has no GPU: {here} on this node; launch with --nproc {here}")
        from accelerate import PartialState  # heavy, and a single process does without

        state = PartialState(cpu=device == "cpu", timeout=TIMEOUT)
        return cls(state.process_index, state.num_processes, str(state.device) if device == "cuda" else "cpu")

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def leave(self) -> None:
        """Leave the process group; the others may do so later."""
        if self.size > 1:
            from accelerate import PartialState

            PartialState().destroy_process_group()

    def mesh(self) -> DeviceMesh | None:
        """The ranks as networks are sharded over them; None of a single process."""
        if self.size == 1:
            return None
        return init_device_mesh(torch.device(self.device).type, (self.size,))

    def part_of(self, total: int) -> range:
        """This rank's positions of ``total``, which the number of ranks divides."""
        each = total // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def largest(self, *values: int) -> list[int]:
        """The largest over all ranks, value by value."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
        return largest.tolist()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all ranks (B/R, …) in rank order, (B, …)."""
        if self.size == 1:
            return rows
        from accelerate.utils import gather

        return gather(rows)

    def gather_lists(self, values: Sequence[T]) -> list[T]:
        """Lists of all ranks, joined in rank order."""
        if self.size == 1:
            return list(values)
        from accelerate.utils import gather_object

        return gather_object(list(values))

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over the ranks, in place; all ranks then hold the same bits."""
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            torch.distributed.all_reduce(flat)
            flat /= self.size
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def together(self, work: Callable[[], T]) -> T:
        """Run work that may fail on one rank alone; if it does, all ranks stop, and the main rank reports why.

        Raises:
            RgbenchError: on the main rank, of this or another rank; the others leave with its exit code.
            OSError: the main rank's own.
        """
        if self.size == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except _FAILURES as caught:
            error = caught
        if not self.largest(error is not None)[0]:
            return result
        failures = self.gather_lists([(self.rank, str(error), getattr(error, "exit_code", 1))] if error else [])
        if self.is_main and error is not None:
            raise error
        rank, message, code = failures[0]
        kind = UsageError if code == UsageError.exit_code else RgbenchError
        self.stop_all(kind(f"rank {rank}: {message}"))

    def on_main(self, work: Callable[[], Any]) -> None:
        """Run work on the main rank while the others wait; a failure there stops all."""
        self.together(lambda: work() if self.is_main else None)

    def stop_all(self, error: RgbenchError) -> NoReturn:
        """Raise an error that every rank has: on the main rank itself, on the others as its exit code."""
        if self.is_main:
            raise error
        raise SystemExit(error.exit_code)

    def check_equal(self, tensors: Sequence[Tensor], what: str) -> None:
        """Compare a checksum of tensors that must be the same bits on all ranks.

        Raises:
            RgbenchError: they have drifted apart, as with faulty memory or different hardware.
        """
        if self.size == 1 or not tensors:
            return
        bits = torch.stack([tensor.detach().double().sum() for tensor in tensors])
        all_bits = self.gather_rows(bits[None])
        if not torch.equal(all_bits, all_bits[:1].expand_as(all_bits)):
            self.stop_all(RgbenchError(f"{what} differs between ranks: their hardware or libraries are not the same"))


def _check_environment() -> None:
    """Check what a launcher sets, of which a shell or a notebook may have a part from elsewhere.

    Raises:
        UsageError: names the first variable that is missing, no number, or out of range.
    """
    remedy = "start with --launch ddp, or unset RANK, LOCAL_RANK and WORLD_SIZE"
    given = os.environ
    size = int(given["WORLD_SIZE"]) if re.fullmatch("[0-9]{1,6}", given["WORLD_SIZE"]) else 0
    ends = {"WORLD_SIZE": (1, 10**6), "RANK": (0, size - 1), "LOCAL_RANK": (0, size - 1), "MASTER_PORT": (1, 65535)}
    for name, (low, high) in ends.items():
        value = given.get(name, "")
        if not re.fullmatch("[0-9]{1,6}", value) or not low <= int(value) <= high:
            raise UsageError(f"the environment has {name}={value:.40}, not a number from {low} to {high}; {remedy}")
    if not given.get("MASTER_ADDR"):
        raise UsageError(f"the environment has WORLD_SIZE but no MASTER_ADDR; {remedy}")


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group neighbours of one dtype into buckets of about :data:`BUCKET_BYTES`."""
    buckets: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        num_bytes = tensor.numel() * tensor.element_size()
        if not buckets or buckets[-1][0].dtype != tensor.dtype or size + num_bytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += num_bytes
    return buckets


def start_ddp(arguments: Sequence[str], nproc: int | None, nodes: int = 1, head: str | None = None) -> int:
    """Run ``rgbench ARGUMENTS`` in several processes that train together, and wait for them.

    Args:
        arguments: of the command line, for every process.
        nproc: processes on this machine; None for one per GPU.
        nodes: machines; run the same command on each.
        head: ``HOST`` or ``HOST:PORT`` of one of the machines, where they meet.

    Returns:
        The exit code: 0; 1 or 2 for a failure that the main rank printed; 75 or 130 after a signal, saved.

    Raises:
        UsageError: no number of processes and no GPU, or several machines without a meeting place, or one that is none.
        RgbenchError: a process was killed, or crashed.
    """
    if nodes > 1 and head is None:
        raise UsageError(f"--nodes {nodes}: say where they meet with --head HOST:PORT, the same on every machine")
    nproc = nproc or _num_gpus()
    # torch reads these when it starts, here and in the workers; each worker gets its share of the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cores() // nproc, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SEC))
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # torchrun's agent would print a table of exit codes
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # and a line for each signal
    alone = nodes == 1 and head is None
    host, port = _meeting_place(head)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        run_id="rgbench",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{0 if alone else port}",
        local_addr="localhost" if alone else None,
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "rgbench", *arguments)
    except SignalException as caught:
        return 130 if caught.sigval == signal.SIGINT else RESUMABLE
    except ChildFailedError as caught:
        return _exit_code({rank: failure.exitcode for rank, failure in caught.failures.items()})
    return 0


def _meeting_place(head: str | None) -> tuple[str, int]:
    """Host and port of ``HOST``, ``HOST:PORT`` or ``[IPV6]:PORT``; this machine for None.

    Raises:
        UsageError: not of this form.
    """
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?", head or "localhost")
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 1 << 16:
        raise UsageError(f"--head {head!r:.80}: give HOST or HOST:PORT with a port from 1 to 65535")
    return match[1], port


def _num_gpus() -> int:
    num = torch.cuda.device_count()
    if not num:
        raise UsageError("--launch ddp: no CUDA GPU here; say how many processes with --nproc N")
    return num


def _exit_code(codes: Mapping[int, int]) -> int:
    """The run's exit code from those of the ranks that failed.

    Raises:
        RgbenchError: a rank was killed, or none printed a reason.
    """
    killed = {rank: code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    explained = [code for code in codes.values() if code in EXPLAINED]
    if explained and not killed:
        return min(explained, key=EXPLAINED.index)
    rank, code = min((killed or codes).items())
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise RgbenchError(
        f"rank {rank} {how}; if memory ran out, use a larger train.gradient_accumulation_steps. The same command "
        "continues from the last checkpoint"
    )


def slurm_script(arguments: Sequence[str], name: str, nproc: int, nodes: int) -> str:
    """Write a Slurm job script that trains on several machines, saves before its time is up, and requeues itself.

    Args:
        arguments: of ``rgbench``, without the launch options.
        name: of the job.
        nproc: processes, and GPUs, per machine.
        nodes: machines.
    """
    command = shlex.join(["rgbench", *arguments])
    made_by = f"{command} --launch slurm --nproc {nproc} --nodes {nodes}".replace("\n", " ")
    values = {"command": command, "name": name, "nproc": nproc, "nodes": nodes, "port": DEFAULT_PORT}
    return SCRIPT.format(made_by=made_by, resumable=RESUMABLE, **values)
