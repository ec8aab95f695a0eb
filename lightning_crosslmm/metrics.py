"""Metrics: answers right, counted per question type (torchmetrics' only door).

Axis letters:
    Y  predicted tokens    W  vocabulary    Z  answers of the batch
"""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection


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


class AnswerAccuracy(MetricCollection):
    """Accuracy over all answers and per question type, right across ranks.

    Keys are ``accuracy`` and, where the data names types, ``accuracy/TYPE``. The types are fixed when it is made: each
    rank must hold the same metrics, whichever types its own batches bring.

    Args:
        kinds: question types of the data.
    """

    def __init__(self, kinds: Iterable[str]) -> None:
        names = {kind: f"accuracy/{kind}" for kind in sorted(set(kinds)) if kind}
        super().__init__({name: MeanMetric() for name in ("accuracy", *names.values())}, compute_groups=False)
        self._names = names

    def count(self, right_Z: Tensor, kinds: Sequence[str]) -> None:
        """Add answers.

        Args:
            right_Z: bool, from `answers_right`.
            kinds: question type of each.
        """
        if len(right_Z) == 0:
            return
        values_Z = right_Z.float().to(self["accuracy"].device)
        self["accuracy"].update(values_Z)
        for kind, name in self._names.items():
            chosen = [index for index, this in enumerate(kinds) if this == kind]
            if chosen:
                self[name].update(values_Z[chosen])

    def seen(self) -> dict[str, Tensor]:
        """Compute the metrics that have counted anything, here or on another rank."""
        with warnings.catch_warnings():  # a rank that saw no answer of a type must still compute it, to join the sum
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
            totals = {name: metric.compute() for name, metric in self.items()}
        return {name: value for name, value in totals.items() if not torch.isnan(value)}
