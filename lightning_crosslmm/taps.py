"""What a pooler may ask for besides its tokens: views into the encoder's blocks, a hook between them, the question.

Encoder and pooler are parts that do not know each other; this is the language they share.

Axis letters:
    F  frames    V  visuals    N  patches of a frame    n  tokens between two blocks: patches left, prefix, added ones
    E  encoder width    K  width of one key head    A  asked layers    B  samples    Q  question tokens    D  LLM width
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest

SALIENCIES = ("class_token", "received", "probe")
"""How much a patch matters: the class token's attention to it, the attention it receives from all patches, or the
attention that the tower's pooling head gives it."""


@dataclass(frozen=True)
class Asks:
    """What a pooler wants to see of the tower.

    Args:
        saliency: one of `SALIENCIES`, or None.
        keys: the keys of the block that is read, as the mean over heads.
        layers: blocks whose outputs are wanted. A whole number counts blocks, a negative one from the last of the full
            tower; a fraction is a share of the depth that is run, 1.0 the block that is read.

    Raises:
        UserError: a saliency that there is not.
    """

    saliency: str | None = None
    keys: bool = False
    layers: tuple[int | float, ...] = ()

    def __post_init__(self) -> None:
        """Check the word."""
        if self.saliency is not None and self.saliency not in SALIENCIES:
            raise UserError(
                f"pooler.saliency is '{self.saliency}'; right are {', '.join(SALIENCIES)}"
                f"{nearest(str(self.saliency), SALIENCIES)}"
            )

    @property
    def needs(self) -> frozenset[str]:
        """The same as words an encoder lists in `gives`."""
        words = {f"saliency.{self.saliency}"} if self.saliency else set()
        return frozenset(words | ({"keys"} if self.keys else set()) | ({"layers"} if self.layers else set()))

    @property
    def fields(self) -> tuple[str, ...]:
        """The same as fields of `Taps`."""
        asked = {"saliency_FN": self.saliency, "keys_FNK": self.keys, "layers_FNAE": self.layers}
        return tuple(name for name, is_asked in asked.items() if is_asked)


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


@dataclass(frozen=True)
class Tower:
    """What a pooler that acts in the encoder learns of it, when the model is built.

    Args:
        num_blocks: blocks that run, up to the one that is read.
        num_prefix: class and register tokens in front of the patches.
        has_class_token: whether the first of them is a class token.
        identity: plain values that tell this tower from others (its name, weights, size, ...).
    """

    num_blocks: int
    num_prefix: int
    has_class_token: bool
    identity: dict[str, Any]


class BlockHook:
    """Something that acts between the blocks of a tower, one object per chunk of frames; it may keep state.

    The tower calls ``begin`` once, then for every block ``key_bias`` before its attention and ``after_attention``
    between attention and MLP. What the last block gives is the tower's output; the last norm follows where there is
    one.

    Under gradient checkpointing a block runs a second time, in the backward pass and with later blocks already done. So
    state goes by the number of the block: ``after_attention(b)`` reads what belongs to b, writes what belongs to b + 1,
    and makes each decision once and keeps it.
    """

    wants_class_row: bool = False

    num_isolated: int = 0
    """Tokens that ``begin`` put at the end: they read all tokens, and no other token reads them, so that the tower's
    own tokens stay what they were to the last bit. ``key_bias`` and ``after_attention`` do not see them."""

    def begin(self, tokens_FnE: Tensor, num_prefix: int) -> Tensor:
        """See the embedded tokens, the first `num_prefix` of them class or register tokens; may add isolated ones."""
        return tokens_FnE

    def key_bias(self, block: int) -> Tensor | None:
        """Give what is added to the attention logits of a block, (F, n) per key; -inf hides a key, None is nothing."""
        return None

    def after_attention(self, block: int, tokens_FnE: Tensor, keys_FnK: Tensor, class_Fn: Tensor | None) -> Tensor:
        """Change the tokens after a block's attention and its residual.

        Args:
            block: its number.
            tokens_FnE: all tokens, prefix included.
            keys_FnK: the block's keys, mean over heads; no gradient passes.
            class_Fn: attention of the first token to every token, mean over heads, if `wants_class_row`; float32.
        """
        return tokens_FnE


@dataclass(frozen=True)
class Questions:
    """The question of every sample: its text before the first answer, marks left out. Never an answer.

    Args:
        features_QD: the LLM's input embeddings of the tokens.
        offsets: (B+1,) int64 on the CPU, tokens of sample b are ``[b], [b+1]``.
        summary_BD: the LLM's last hidden state at the last question token, without gradient; None unless asked for.
        is_asked_V: (V,) bool on the CPU, whether a visual is marked before its sample's first answer. One marked later
            must not reach the question: when the first answer is generated, it is not there yet. None: all are.
    """

    features_QD: Tensor
    offsets: Tensor
    summary_BD: Tensor | None = None
    is_asked_V: Tensor | None = None
