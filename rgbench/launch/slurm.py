"""A Slurm job script that trains on several machines, saves before its time is up, and queues itself again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rgbench.errors import RESUMABLE
from rgbench.launch.start import DEFAULT_PORT

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


def slurm_script(arguments: Sequence[str], name: str, nproc: int, nodes: int) -> str:
    """The text of a job script.

    Args:
        arguments: of ``rgbench``, without those of the launch.
        name: of the job.
        nproc: processes, and GPUs, per machine.
        nodes: machines.
    """
    command = shlex.join(["rgbench", *arguments])
    made_by = f"{command} --launch slurm --nproc {nproc} --nodes {nodes}".replace("\n", " ")
    values = {"command": command, "name": name, "nproc": nproc, "nodes": nodes, "port": DEFAULT_PORT}
    return SCRIPT.format(made_by=made_by, resumable=RESUMABLE, **values)
