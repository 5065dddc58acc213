"""Shares of one evaluation's images, made by processes that never talk to each other.

Position p of the prompt set belongs to share (p // block) mod N, whatever the batch size. Blocks are no longer than the
default batch, so that at that batch size the batches of a share are batches of the whole, and so are its bytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rgbench.core.errors import UsageError

BLOCK = 64


@dataclass(frozen=True)
class Shard:
    """One of several shares.

    Attributes:
        index: from 1.
        count: of all shares.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def positions(self, num: int) -> np.ndarray:
        """Those of ``num`` positions that belong to this share.

        Raises:
            UsageError: there are more shares than images.
        """
        if self.count > num:
            raise UsageError(f"--shard {self}: {num} images cannot be shared by {self.count}; use at most {num} shards")
        block = max(1, min(BLOCK, num // self.count))
        everything = np.arange(num)
        return everything[everything // block % self.count == self.index - 1]


WHOLE = Shard(1, 1)


def parse_shard(text: str | None, environment: Mapping[str, str] | None = None) -> Shard:
    """A share from ``3/64``, or from the launcher by ``auto``.

    Args:
        text: as the command line has it; None for everything.
        environment: of the process; torchrun sets RANK and WORLD_SIZE, a Slurm array SLURM_ARRAY_TASK_ID,
            SLURM_ARRAY_TASK_MIN and SLURM_ARRAY_TASK_COUNT.

    Raises:
        UsageError: not of this form, out of range, or ``auto`` outside of a launcher.
    """
    if text is None:
        return WHOLE
    environment = os.environ if environment is None else environment
    if text == "auto":
        if "RANK" in environment and "WORLD_SIZE" in environment:
            text = f"{int(environment['RANK']) + 1}/{environment['WORLD_SIZE']}"
        elif "SLURM_ARRAY_TASK_ID" in environment and "SLURM_ARRAY_TASK_COUNT" in environment:
            first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
            text = f"{int(environment['SLURM_ARRAY_TASK_ID']) - first + 1}/{environment['SLURM_ARRAY_TASK_COUNT']}"
        else:
            raise UsageError("--shard auto: neither torchrun (RANK) nor a Slurm array; give it as --shard 3/64")
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UsageError(f"--shard {text!r}: give K/N with K from 1 to N, such as 3/64, or auto")
    return Shard(int(match[1]), int(match[2]))
