"""What a configuration costs: operations, bytes and least times, counted on the meta device; and whether it fits."""

from lightning_crosslmm.cost.card import cost_card, count, plain_onevision
from lightning_crosslmm.cost.command import cost
from lightning_crosslmm.cost.fit import refuse_what_cannot_fit
from lightning_crosslmm.cost.hardware import GPUS, find_gpu
from lightning_crosslmm.cost.meter import Meter, tensor_bytes
from lightning_crosslmm.cost.sample import Sample
from lightning_crosslmm.cost.table import cost_page, cost_table

__all__ = [
    "GPUS",
    "Meter",
    "Sample",
    "cost",
    "cost_card",
    "cost_page",
    "cost_table",
    "count",
    "find_gpu",
    "plain_onevision",
    "refuse_what_cannot_fit",
    "tensor_bytes",
]
