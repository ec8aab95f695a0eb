"""What a pooler may ask for besides its tokens: views into the encoder's blocks, a hook between them, the question.

Encoder and pooler are parts that do not know each other; this is the language they share.

Axis letters:
    F  frames    N  patches of a frame    n  tokens between two blocks (patches that are left, prefix and added ones)
    E  encoder width    K  width of one key head    A  asked layers    B  samples    Q  question tokens    D  LLM width
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SALIENCIES = ("class_token", "received", "probe")
"""How much a patch matters: the class token's attention to it, the attention it receives from all patches, or the
attention that the tower's pooling head gives it."""


@dataclass(frozen=True)
class Asks:
    """What a pooler wants to see of the tower.

    Args:
        saliency: one of `SALIENCIES`, or None.
        keys: the keys of the block that is read, as the mean over heads.
        layers: blocks whose outputs are wanted; negative counts from the last.
    """

    saliency: str | None = None
    keys: bool = False
    layers: tuple[int, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """The same as words an encoder lists in `gives`."""
        words = {f"saliency.{self.saliency}"} if self.saliency else set()
        return frozenset(words | ({"keys"} if self.keys else set()) | ({"layers"} if self.layers else set()))


@dataclass
class Taps:
    """Filled by an encoder while it runs a chunk of frames; a field stays None unless it was asked for.

    Args:
        asks: what to fill in.
        saliency_FN: float32, 0 or more.
        keys_FNK: keys of each patch, mean over heads, in the tower's dtype.
        layers_FNAE: outputs of the asked blocks.
    """

    asks: Asks
    saliency_FN: Tensor | None = None
    keys_FNK: Tensor | None = None
    layers_FNAE: Tensor | None = None

    @classmethod
    def joined(cls, chunks: "list[Taps]") -> "Taps":
        """Put the chunks of a batch together."""
        fields = ("saliency_FN", "keys_FNK", "layers_FNAE")
        parts = {name: [getattr(chunk, name) for chunk in chunks] for name in fields}
        return cls(chunks[0].asks, **{name: torch.cat(p) for name, p in parts.items() if p[0] is not None})


class BlockHook:
    """Something that acts between the blocks of a tower, one object per chunk of frames; it may keep state.

    The tower calls ``begin`` once, then for every block ``key_bias`` before its attention and ``after_attention``
    between attention and MLP. What the last block gives is the tower's output; the last norm follows where there is one.
    """

    def begin(self, tokens_FnE: Tensor, num_prefix: int) -> Tensor:
        """See the embedded tokens, the first `num_prefix` of them class or register tokens; may append some."""
        return tokens_FnE

    def key_bias(self, block: int) -> Tensor | None:
        """Give what is added to the attention logits of a block: (F, n) per key or (F, n, n) per query and key."""
        return None

    def after_attention(self, block: int, tokens_FnE: Tensor, keys_FnK: Tensor, class_FN: Tensor | None) -> Tensor:
        """Change the tokens after a block's attention and its residual.

        Args:
            block: its number.
            tokens_FnE: all tokens, prefix included.
            keys_FnK: the block's keys, mean over heads.
            class_FN: attention of the class token to every token, mean over heads, if `wants_class_row`.
        """
        return tokens_FnE

    wants_class_row: bool = False


@dataclass(frozen=True)
class Questions:
    """The question of every sample: its text before the first answer, marks left out. Never an answer.

    Args:
        features_QD: the LLM's input embeddings of the tokens.
        offsets: (B+1,) int64 on the CPU, tokens of sample b are ``[b], [b+1]``.
        summary_BD: the LLM's last hidden state at the last question token, without gradient; None unless asked for.
    """

    features_QD: Tensor
    offsets: Tensor
    summary_BD: Tensor | None = None
