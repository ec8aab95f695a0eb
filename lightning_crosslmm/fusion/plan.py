"""The fusion arm: which branches, in which layers, reading what."""

from collections.abc import Mapping

from torch import Tensor, nn

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.fusion.attention import BACKENDS
from lightning_crosslmm.fusion.block import Branch, FusionBlock
from lightning_crosslmm.fusion.cache import CACHES
from lightning_crosslmm.fusion.keys import KeysValues
from lightning_crosslmm.fusion.sources import FusionSources
from lightning_crosslmm.host import HostLayer

_CHOICES = {
    "scope": ("all", "frame", "window"),
    "key_source": ("projected", "encoder"),
    "placement": ("after_attention", "before_layer"),
    "weights": ("fresh", "host"),
    "frame_time": ("none", "sinusoidal", "learned"),
    "t2v_cache": CACHES,
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
        share_kv: the two branches of a layer share key and value projections.
        layers_per_kv: so many fused layers in a row share their keys and values, or ``all`` of them; with `kv_latent`
            they share the latent, and each makes its own keys and values from it.
        kv_latent: channels of the latent that keys and values are made from; null makes them from source tokens.
        t2v_cache: what answering keeps: ``keys_values`` (or their latent), the same in ``int8``, or the source tokens
            alone, from which each new token's reading is worked out (``recompute``).
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
        layers_per_kv: int | str = 1,
        kv_latent: int | None = None,
        t2v_cache: str = "keys_values",
        frame_time: str = "none",
        backend: str = "auto",
    ) -> None:
        self.v2v, self.t2v = v2v, t2v
        self.interval, self.first_layer = interval, first_layer
        self.scope, self.window_frames = scope, window_frames
        self.key_source, self.placement = key_source, placement
        self.gate, self.gate_init, self.weights = gate, gate_init, weights
        self.share_kv, self.layers_per_kv, self.kv_latent = share_kv, layers_per_kv, kv_latent
        self.t2v_cache, self.frame_time, self.backend = t2v_cache, frame_time, backend
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
        self._check_keys()

    def _check_keys(self) -> None:
        if self.weights == "host" and self.key_source == "encoder":
            raise UserError(
                "fusion.weights=host copies projections of the LLM's width; set "
                "fusion.key_source=projected or fusion.weights=fresh"
            )
        if self.share_kv and not (self.v2v and self.t2v):
            raise UserError(
                "fusion.share_kv=true needs both branches; set fusion.v2v=true and "
                "fusion.t2v=true, or fusion.share_kv=false"
            )
        count, latent = self.layers_per_kv, self.kv_latent
        if count != "all" and (not isinstance(count, int) or count < 1):
            raise UserError(f"fusion.layers_per_kv is {count}; right are a number of fused layers, 1 or more, or all")
        if latent is not None and latent < 1:
            raise UserError(f"fusion.kv_latent is {latent}; right are a number of channels, 1 or more, or null")
        if latent is not None and self.weights == "host":
            raise UserError(
                f"fusion.weights=host copies projections of the LLM's width, fusion.kv_latent={latent} makes them "
                "narrower; set fusion.kv_latent=null or fusion.weights=fresh"
            )
        if self.t2v_cache != "keys_values" and not self.t2v:
            raise UserError(
                f"fusion.t2v_cache={self.t2v_cache} is about what text reads; set fusion.t2v=true or "
                "fusion.t2v_cache=keys_values"
            )
        if self.t2v_cache == "recompute" and count != 1:
            raise UserError(
                f"fusion.t2v_cache=recompute keeps source tokens instead of keys, fusion.layers_per_kv={count} keys of "
                "several layers; set fusion.layers_per_kv=1 or fusion.t2v_cache=keys_values"
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

    def groups(self, num_layers: int) -> dict[int, int | None]:
        """Give for each fused layer the first one of those that it shares keys with, or None if it shares with none.

        Raises:
            UserError: `layers_per_kv` is more than there are.
        """
        layers = self.layers(num_layers)
        if self.layers_per_kv == 1:
            return dict.fromkeys(layers)
        size = len(layers) if self.layers_per_kv == "all" else int(self.layers_per_kv)
        if layers and size > len(layers):
            raise UserError(
                f"fusion.layers_per_kv is {size}, but fusion.interval={self.interval} and "
                f"fusion.first_layer={self.first_layer} fuse {len(layers)} of the LLM's {num_layers} layers; "
                f"right are 1 to {len(layers)}, or all"
            )
        return {layer: layers[place - place % size] for place, layer in enumerate(layers)}

    def sources(self, hosts: Mapping[int, HostLayer], source_width: int, eps: float) -> FusionSources:
        """Build what stands before the LLM, with weights as `weights` says.

        Args:
            hosts: the first layer of each group in `groups`.
            source_width: E.
            eps: of the LLM's norms.
        """
        branches = [name for name in ("v2v", "t2v") if getattr(self, name)]
        names = ["shared"] if self.share_kv else branches
        made = FusionSources(hosts, names, source_width, self.kv_latent, eps)
        if self.weights == "host":
            for number, host in hosts.items():
                copy_host(made.groups[str(number)], host.weights)
        return made

    def block(self, host: HostLayer, layer: int, source_width: int, group: int | None = None) -> FusionBlock:
        """Build the block for one layer of a group, with weights as `weights` says."""
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
            group=group,
            kv_latent=self.kv_latent,
        )
        if self.weights == "host":
            copy_host(block, host.weights)
        return block


def copy_host(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy the host layer's norm and projections into branches and keys; gates stay as they are."""
    for part in module.modules():
        if isinstance(part, Branch | KeysValues):
            part.load_state_dict(
                {name: weights[name] for name in part.state_dict() if not name.startswith("gate.")}, strict=False
            )
