"""Poolers: how many source tokens become few pooled tokens.

``average`` means over windows, ``bilinear`` interpolation, ``none`` keeps every token. A pooler of your own is a class
with this contract in any module of yours: ``python train.py pooler=none pooler._target_=my_module.MyPooler``.
"""

from lightning_crosslmm.pooler.base import Pooler, Stage, check_grid
from lightning_crosslmm.pooler.grid import AveragePooler, BilinearPooler
from lightning_crosslmm.pooler.identity import NoPooler

__all__ = ["AveragePooler", "BilinearPooler", "NoPooler", "Pooler", "Stage", "check_grid"]
