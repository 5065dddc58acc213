"""Reward-guided forms of the other distillations: their steps, with the rewards of RG-LCD and LRM.

Each distillation replaces ``prepare`` and ``distil`` of LCD, each reward ``step``, so that a class of both is complete.
"""

from __future__ import annotations

from rgbench.train.lrm import LRM
from rgbench.train.mlcm import MLCM
from rgbench.train.rg_lcd import RGLCD
from rgbench.train.tcd import TCD


class RGTCD(TCD, RGLCD):
    """TCD and a reward on the decoded prediction at 0."""


class LRMTCD(TCD, LRM):
    """TCD, and the reward through the latent proxy."""


class RGMLCM(MLCM, RGLCD):
    """MLCM and a reward on the decoded prediction at 0."""


class LRMMLCM(MLCM, LRM):
    """MLCM, and the reward through the latent proxy."""
