"""Poolers: how many source tokens become few pooled tokens.

On the grid of a frame: ``average``, ``max``, ``bilinear``, ``pixel_shuffle`` (windows into channels), ``c_abstractor``
(convolutions). Picking without looking: ``strided``, ``uniform``, ``random``. Learned queries: ``perceiver``,
``qformer``. Over time: ``slowfast``, ``temporal_merge``. By saliency: ``prumerge``, ``prumerge_plus``, ``visionzip``,
``sms``. Queries that read several blocks in their window: ``tokenpacker``, ``quecc`` (knows the question).
``llava_mini`` also lets the question read every patch. ``llava_onevision`` is that model's own. Merging: ``tome``,
``dymu`` between the encoder's blocks, ``folder`` there or after it; ``vistog`` groups around tokens that ran beside
the patches. ``none`` keeps every token. A pooler of your own is a class with this contract in
any module of yours: ``python train.py pooler=none pooler._target_=my_module.MyPooler``.
"""

from lightning_crosslmm.pooler.abstractor import CAbstractorPooler
from lightning_crosslmm.pooler.base import Pooler, Stage, check_grid
from lightning_crosslmm.pooler.checked import check_pooled
from lightning_crosslmm.pooler.dymu import DymuPooler
from lightning_crosslmm.pooler.folder import FolderPooler
from lightning_crosslmm.pooler.grid import AveragePooler, BilinearPooler, MaxPooler
from lightning_crosslmm.pooler.identity import NoPooler
from lightning_crosslmm.pooler.llava_mini import LlavaMiniPooler
from lightning_crosslmm.pooler.llava_onevision import LlavaOnevisionPooler
from lightning_crosslmm.pooler.perceiver import PerceiverPooler
from lightning_crosslmm.pooler.pick import RandomPooler, StridedPooler, UniformPooler
from lightning_crosslmm.pooler.prumerge import PrumergePlusPooler, PrumergePooler
from lightning_crosslmm.pooler.qformer import QFormerPooler
from lightning_crosslmm.pooler.shuffle import PixelShufflePooler
from lightning_crosslmm.pooler.sms import SmsPooler
from lightning_crosslmm.pooler.temporal import SlowFastPooler, TemporalMergePooler
from lightning_crosslmm.pooler.tome import TomePooler
from lightning_crosslmm.pooler.visionzip import VisionzipPooler
from lightning_crosslmm.pooler.vistog import VistogPooler
from lightning_crosslmm.pooler.window_attention import QueccPooler, TokenpackerPooler

__all__ = [
    "AveragePooler",
    "BilinearPooler",
    "CAbstractorPooler",
    "DymuPooler",
    "FolderPooler",
    "LlavaMiniPooler",
    "LlavaOnevisionPooler",
    "MaxPooler",
    "NoPooler",
    "PerceiverPooler",
    "PixelShufflePooler",
    "Pooler",
    "PrumergePlusPooler",
    "PrumergePooler",
    "QFormerPooler",
    "QueccPooler",
    "RandomPooler",
    "SlowFastPooler",
    "SmsPooler",
    "Stage",
    "StridedPooler",
    "TemporalMergePooler",
    "TokenpackerPooler",
    "TomePooler",
    "UniformPooler",
    "VisionzipPooler",
    "VistogPooler",
    "check_grid",
    "check_pooled",
]
