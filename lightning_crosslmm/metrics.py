"""Metrics: answers right, counted per question type, and circular scoring (torchmetrics' only door).

Axis letters:
    Y  predicted tokens    W  vocabulary    Z  answers of the batch
    G  answers that were counted    R  their three numbers: type, item, right or not
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

_CIRCULAR = "circular"


def answers_right(logits_YW: Tensor, target_Y: Tensor, answer_Y: Tensor, num_answers: int) -> Tensor:
    """Say which answers the model gets entirely right: every token of the answer, its end included, is the likeliest.

    Greedy decoding reproduces an answer exactly when this holds: as long as every token so far was right, the model has
    the right answer's beginning before it. So this is exact-match accuracy of greedy answers, at the price of one
    forward pass.

    Args:
        logits_YW: one row per answer token.
        target_Y: int64 ids.
        answer_Y: int64 on the CPU, which answer each token belongs to.
        num_answers: Z.

    Returns:
        (Z,) bool on the CPU.
    """
    wrong_Y = (logits_YW.argmax(dim=-1) != target_Y).cpu()
    return torch.zeros(num_answers).index_add(0, answer_Y, wrong_Y.float()) == 0


class CircularAccuracy(Metric):
    """Share of items that are answered right every time they are asked, per question type, right across ranks.

    ``accuracy(type) = mean over items of prod over the item's answers of right``

    An item is a multiple-choice question that is asked once for each cyclic permutation of its options; who always says
    the same letter gets 0. Its answers may come in any batches and on any ranks.

    **Source**: circular evaluation (MMBench, Liu et al., arXiv:2307.06281), as VideoNIAH scores VNBench
    (arXiv:2406.09367).
    **Differs**: an item of which answers are missing (a damaged sample, ``trainer.limit_val_batches``) is judged by
    those that came. No mean over types is taken.

    Args:
        kinds: question types of the data.
    """

    counted_GR: Tensor

    def __init__(self, kinds: Iterable[str]) -> None:
        super().__init__(dist_sync_fn=_gather_rows)
        self._kinds = sorted(set(kinds) - {""})
        self.add_state("counted_GR", torch.zeros(0, 3, dtype=torch.int64), dist_reduce_fx="cat")

    def update(self, right_Z: Tensor, kinds: Sequence[str], facts: Sequence[Mapping[str, str | float]]) -> None:
        """Add answers; those whose facts name no ``item``, or whose type the data does not name, are left out."""
        rows = [
            [self._kinds.index(kind), _number_of(str(fact["item"])), int(is_right)]
            for is_right, kind, fact in zip(right_Z.tolist(), kinds, facts, strict=True)
            if "item" in fact and kind in self._kinds
        ]
        added_GR = torch.tensor(rows, dtype=torch.int64, device=self.counted_GR.device).view(-1, 3)
        self.counted_GR = torch.cat([self.counted_GR, added_GR])

    def compute(self) -> dict[str, Tensor]:
        """Give the share for each type of which an item was counted."""
        counted_GR = self.counted_GR.reshape(-1, 3)  # torchmetrics puts an axis before what ranks gathered
        items, item_G = torch.unique(counted_GR[:, :2], dim=0, return_inverse=True)
        wrong = torch.zeros(len(items), device=items.device).index_add(0, item_G, 1.0 - counted_GR[:, 2].float())
        shares = {kind: (wrong[items[:, 0] == number] == 0).float() for number, kind in enumerate(self._kinds)}
        return {kind: is_right.mean() for kind, is_right in shares.items() if len(is_right)}


class AnswerAccuracy(MetricCollection):
    """Accuracy over all answers and per question type, right across ranks.

    Keys are ``accuracy``, where the data names types, ``accuracy/TYPE``, and where it names items that are asked
    several times, ``circular/TYPE``. The types are fixed when it is made: each rank must hold the same metrics,
    whichever types its own batches bring.

    Args:
        kinds: question types of the data.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        names = {kind: f"accuracy/{kind}" for kind in sorted(set(kinds)) if kind}
        means: dict[str, Metric | MetricCollection] = {name: MeanMetric() for name in ("accuracy", *names.values())}
        super().__init__(means | {_CIRCULAR: CircularAccuracy(names)}, compute_groups=False)
        self._names = names

    def count(self, right_Z: Tensor, kinds: Sequence[str], facts: Sequence[Mapping[str, str | float]] = ()) -> None:
        """Add answers.

        Args:
            right_Z: bool, from `answers_right`.
            kinds: question type of each.
            facts: what the data tell of each, or nothing at all.
        """
        if len(right_Z) == 0:
            return
        values_Z = right_Z.float().to(self["accuracy"].device)
        self["accuracy"].update(values_Z)
        for kind, name in self._names.items():
            chosen = [index for index, this in enumerate(kinds) if this == kind]
            if chosen:
                self[name].update(values_Z[chosen])
        if facts:
            self[_CIRCULAR].update(right_Z, kinds, facts)

    def seen(self) -> dict[str, Tensor]:
        """Compute the metrics that have counted anything, here or on another rank."""
        with warnings.catch_warnings():  # a rank that saw no answer of a type must still compute it, to join the sum
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            totals = {name: metric.compute() for name, metric in self.items()}
        circular = {f"{_CIRCULAR}/{kind}": value for kind, value in totals.pop(_CIRCULAR).items()}
        return {name: value for name, value in totals.items() if not torch.isnan(value)} | circular


def _gather_rows(rows_GR: Tensor, group: Any = None) -> list[Tensor]:
    """Gather from all ranks; torchmetrics itself takes equally many of each, or cannot do with a rank that has none."""
    return [torch.cat(gather_all_tensors(rows_GR, group))]


def _number_of(item: str) -> int:
    return int.from_bytes(hashlib.sha256(item.encode()).digest()[:8], signed=True)
