"""The training objective: cross-entropy on answer tokens.

Axis letters:
    Y  predicted tokens    W  vocabulary
"""

from torch import Tensor
from torch.nn.functional import cross_entropy


def answer_loss(logits_YW: Tensor, target_Y: Tensor) -> Tensor:
    """Average the negative log-likelihood of the answer tokens: ``-mean log p(target)``, in nats and float32.

    Args:
        logits_YW: one row per answer token.
        target_Y: int64 ids.

    Returns:
        A scalar; 0 with a gradient of 0 for a batch that has no answer (a rank with none must still take part).
    """
    if len(target_Y) == 0:
        return logits_YW.float().sum() * 0.0
    return cross_entropy(logits_YW.float(), target_Y)
