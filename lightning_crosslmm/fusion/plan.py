"""The fusion arm: which branches, in which layers, reading what."""

from collections.abc import Mapping

from torch import Tensor

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.fusion.attention import BACKENDS
from lightning_crosslmm.fusion.block import Branch, FusionBlock, KeysValues
from lightning_crosslmm.host import HostLayer

_CHOICES = {
    "scope": ("all", "frame", "window"),
    "key_source": ("projected", "encoder"),
    "placement": ("after_attention", "before_layer"),
    "weights": ("fresh", "host"),
    "frame_time": ("none", "sinusoidal", "learned"),
    "backend": BACKENDS,
}


class Fusion:
    """What an arm of ``conf/fusion`` says, checked; builds the blocks that move into the LLM.

    Source: CrossLMM, arXiv:2505.17020v1, sections 3.3, 4.3. The paper contradicts itself or is silent in several
        places; each is a switch:

    * `interval`: every 4th layer is its best (Table 2b). `first_layer`: which ones is not given; Figs. 1 and 2 draw a
      block before the first.
    * `scope`: K and V in Eq. (6) have the shape of all frames' tokens, so ``all`` is the literal reading.
    * `key_source`: the text says projected tokens, Figs. 1 and 2 draw the encoder's; 43 M trainable parameters fit
      ``projected``.
    * `placement`: section 3.1, Fig. 3 and Eqs. (4)-(7) put it after self-attention, Fig. 2 in a layer before.
    * `gate`, `gate_init`: see `Gate`. `share_kv`: the same letters are used for both branches; Table 2c needs them
      apart.

    Args:
        v2v: pooled tokens re-read source tokens.
        t2v: text tokens re-read source tokens.
        interval: a block in every `interval`-th layer, 1 or more.
        first_layer: number of the first fused layer, from 0.
        scope: what a pooled token sees: ``all`` frames of its visual, its own ``frame``, or a ``window`` of frames
            around it.
        window_frames: for ``window``: frames to either side, 1 or more; null otherwise.
        key_source: keys and values from ``projected`` source tokens or from the ``encoder``'s.
        placement: ``after_attention`` inside the layer (before its MLP), or ``before_layer``.
        gate: ``scalar``, ``channel`` or ``none``.
        gate_init: the gate's factor at the start, between -1 and 1.
        weights: ``fresh``, or a copy of the ``host`` layer's self-attention.
        share_kv: both branches share key and value projections.
        frame_time: ``sinusoidal`` adds an embedding of each frame's time in seconds to what the LLM and fusion read of
            it, in every arm, ``none`` too. Without it, keys carry no frame identity beyond content.
        backend: cross-attention backend.

    Raises:
        UserError: an unknown choice, an interval or window below 1, or settings that exclude each other.
    """

    def __init__(
        self,
        v2v: bool,
        t2v: bool,
        interval: int = 4,
        first_layer: int = 0,
        scope: str = "all",
        window_frames: int | None = None,
        key_source: str = "projected",
        placement: str = "after_attention",
        gate: str = "scalar",
        gate_init: float = 0.0,
        weights: str = "fresh",
        share_kv: bool = False,
        frame_time: str = "none",
        backend: str = "auto",
    ) -> None:
        self.v2v, self.t2v = v2v, t2v
        self.interval, self.first_layer = interval, first_layer
        self.scope, self.window_frames = scope, window_frames
        self.key_source, self.placement = key_source, placement
        self.gate, self.gate_init, self.weights = gate, gate_init, weights
        self.share_kv, self.frame_time, self.backend = share_kv, frame_time, backend
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(
                    f"fusion.{name} is '{value}'; right are {', '.join(choices)}{nearest(str(value), choices)}"
                )
        if interval < 1 or first_layer < 0:
            raise UserError(f"fusion.interval {interval} must be 1 or more, fusion.first_layer {first_layer} 0 or more")
        if (scope == "window") != (window_frames is not None) or (window_frames is not None and window_frames < 1):
            raise UserError(
                f"fusion.scope is '{scope}' and fusion.window_frames {window_frames}: a window "
                "needs 1 frame or more, other scopes null"
            )
        if weights == "host" and key_source == "encoder":
            raise UserError(
                "fusion.weights=host copies projections of the LLM's width; set "
                "fusion.key_source=projected or fusion.weights=fresh"
            )
        if share_kv and not (v2v and t2v):
            raise UserError(
                "fusion.share_kv=true needs both branches; set fusion.v2v=true and "
                "fusion.t2v=true, or fusion.share_kv=false"
            )

    @property
    def is_none(self) -> bool:
        """Whether the LLM stays as it was."""
        return not (self.v2v or self.t2v)

    def layers(self, num_layers: int) -> list[int]:
        """Numbers of the fused layers of an LLM of `num_layers`.

        Raises:
            UserError: `first_layer` lies past the last.
        """
        if self.is_none:
            return []
        if self.first_layer >= num_layers:
            raise UserError(f"fusion.first_layer is {self.first_layer}, but the LLM has layers 0 to {num_layers - 1}")
        return list(range(self.first_layer, num_layers, self.interval))

    def block(self, host: HostLayer, layer: int, source_width: int) -> FusionBlock:
        """Build the block for one layer, with weights as `weights` says."""
        block = FusionBlock(
            host,
            layer,
            source_width,
            v2v=self.v2v,
            t2v=self.t2v,
            gate=self.gate,
            gate_init=self.gate_init,
            share_kv=self.share_kv,
            backend=self.backend,
        )
        if self.weights == "host":
            copy_host(block, host.weights)
        return block


def copy_host(block: FusionBlock, weights: Mapping[str, Tensor]) -> None:
    """Copy the host layer's norm and projections into a block; gates stay as they are."""
    for part in block.modules():
        if isinstance(part, Branch | KeysValues):
            part.load_state_dict(
                {name: weights[name] for name in part.state_dict() if not name.startswith("gate.")}, strict=False
            )
