"""Start the processes of a run: torchrun's agent in this process, one on each machine; exit codes come through."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence

from rgbench.errors import RESUMABLE, RgbenchError, UsageError
from rgbench.process import available_cores

DEFAULT_PORT = 29400  # torchrun's own
SHUTDOWN_SEC = 300  # workers have this long to save before they are killed
EXPLAINED = (1, 2, RESUMABLE, 130)  # exit codes whose reason the main rank has printed


def start_ddp(arguments: Sequence[str], nproc: int | None, nodes: int = 1, head: str | None = None) -> int:
    """Run ``rgbench ARGUMENTS`` in several processes that train together, and wait for them.

    Args:
        arguments: of the command line; every process gets them.
        nproc: processes on this machine; None for one per GPU.
        nodes: machines; the same command is given on each.
        head: ``HOST`` or ``HOST:PORT`` of one of the machines, where they meet.

    Returns:
        The exit code: 0; 1 or 2 for a failure that the main rank has printed; 75 or 130 after a signal, saved.

    Raises:
        UsageError: no number of processes and no GPU, or several machines without a meeting place.
        RgbenchError: a process was killed, or crashed.
    """
    if nodes > 1 and head is None:
        raise UsageError(f"--nodes {nodes}: say where they meet with --head HOST:PORT, the same on every machine")
    nproc = nproc or _num_gpus()
    # Read by torch when it starts, here and in the workers. A busy neighbour is what each worker is to the others.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(available_cores() // nproc, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SEC))
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # of torchrun's agent, which would print a table of exit codes
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # and of a line for each signal sent on
    alone = nodes == 1 and head is None
    host, _, port = (head or "localhost").partition(":")
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=nproc,
        run_id="rgbench",
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{port or (0 if alone else DEFAULT_PORT)}",
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


def _num_gpus() -> int:
    import torch

    num = torch.cuda.device_count()
    if not num:
        raise UsageError("--launch ddp: no CUDA GPU here; say how many processes with --nproc N")
    return num


def _exit_code(codes: Mapping[int, int]) -> int:
    """Of the whole run, from those of the ranks that failed.

    Raises:
        RgbenchError: one was killed, or none has explained itself.
    """
    killed = {rank: code for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM}
    explained = [code for code in codes.values() if code in EXPLAINED]
    if explained and not killed:
        return min(explained, key=EXPLAINED.index)
    rank, code = min((killed or codes).items())
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    raise RgbenchError(
        f"rank {rank} {how}; if memory ran out, use a larger train.gradient_accumulation_steps; the same command goes "
        "on from the last checkpoint"
    )
