"""transformers' vision towers: SigLIP, SigLIP2 (fixed resolution) and CLIP (the only door to them).

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from lightning_crosslmm.encoder.base import Encoder, block_number
from lightning_crosslmm.encoder.feature_cache import FeatureCache
from lightning_crosslmm.encoder.hooked import hooked
from lightning_crosslmm.encoder.saliency import fill_attention, fold_probe, probe_saliency, recorded
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pretrained_folder import check_loaded, find_weights, read_config
from lightning_crosslmm.taps import BlockHook, Taps

_TOWERS: dict[str, tuple[Any, Any]] = {
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
}


class TransformersEncoder(Encoder):
    """Read source tokens from a layer of a SigLIP, SigLIP2 or CLIP vision tower.

    Source: CrossLMM, arXiv:2505.17020v1, section 4.1: SigLIP2 at 384 px, 27x27 = 729 tokens per frame.
    Differs: the layer is not given there; `layer` = -2 (26 of 27) and no final norm is what LLaVA-NeXT's code, on which
        the authors say theirs is built, does with SigLIP, and it fits the FLOPs of their Fig. 4.

    Args:
        weights: a folder or hub name whose vision tower is loaded, in float32; None starts from random weights. On the
            meta device nothing is loaded or fetched; its geometry is read where a copy is at hand.
        config: geometry of the tower (``model_type``, ``hidden_size``, ...). Beside `weights` it is a claim: an entry
            that the checkpoint contradicts is refused.
        image_size: pixels per side.
        mean: per channel, on the 0..1 scale. SigLIP's are 0.5.
        std: per channel, on the 0..1 scale.
        layer: layer whose output is read; negative counts from the last.
        final_norm: apply the tower's last norm to it.
        frames_per_chunk: most frames in one call.
        attention: attention backend of transformers, ``sdpa``, ``eager`` or ``flash_attention_2``.
        same_frame_tolerance: see `Encoder`.
        feature_cache: see `Encoder`.

    Raises:
        UserError: an unknown tower; a checkpoint that is none, is not whole, is pickled or contradicts `config`; or a
            layer it does not have.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        image_size: int,
        weights: str | None = None,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        layer: int = -2,
        final_norm: bool = False,
        frames_per_chunk: int = 32,
        attention: str = "sdpa",
        same_frame_tolerance: float | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        super().__init__(image_size, mean, std, frames_per_chunk, same_frame_tolerance, feature_cache)
        tower = _build_tower({**config, "image_size": image_size}, weights, attention)
        # transformers before 5.20 keeps the parts one level down
        body = getattr(tower, "vision_model", tower)
        self.num_blocks = len(body.encoder.layers)
        self.read_block = block = block_number(layer, self.num_blocks)
        self.has_class_token = tower.config.model_type == "clip_vision_model"
        self._look_for_taps(body)
        body.encoder.layers = body.encoder.layers[: block + 1]
        body.config.num_hidden_layers = block + 1
        if getattr(body, "head", None) is not None:  # the attention-pooling head reads what we do not use
            body.head, body.use_head = None, False
        norm = body.post_layernorm
        # SigLIP norms every token on its way out, CLIP only its class token: norm here, in one place for both
        body.post_layernorm = nn.Identity()
        self.final_norm: nn.Module = norm if final_norm else nn.Identity()
        self.tower: Any = tower
        self.width = tower.config.hidden_size
        side = tower.config.image_size // tower.config.patch_size
        self.grid = (side, side)
        self.num_prefix = int(self.has_class_token)
        self.identity = dict(
            weights=weights and Path(weights).name, config=dict(config), image_size=image_size, block=block
        )
        if attention in ("sdpa", "eager"):  # the others take no bias on the logits
            self.gives = self.gives | {"blocks"}
            for each in body.encoder.layers:
                each.__class__ = _hooked_layer(each.__class__)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's layers up to the one that is read."""
        return tuple(getattr(self.tower, "vision_model", self.tower).encoder.layers)

    def patches(self, pixels_FCHW: Tensor) -> Tensor:
        """Run the remaining layers and drop the class token where there is one."""
        tokens_FNE = self.tower(pixel_values=pixels_FCHW).last_hidden_state
        return self.final_norm(tokens_FNE[:, 1:] if self.has_class_token else tokens_FNE)

    def _look_for_taps(self, body: Any) -> None:
        words = {"layers", "keys", "saliency.received"}
        if self.has_class_token:
            words.add("saliency.class_token")
        head = getattr(body, "head", None)
        if head is not None:
            words.add("saliency.probe")
            heads, width = head.attention.num_heads, head.attention.embed_dim
            weight_EE, bias_E = head.attention.in_proj_weight[:width], head.attention.in_proj_bias[:width]
            query_HK = nn.functional.linear(head.probe, weight_EE, bias_E).view(heads, -1)
            key_weight_HKE = head.attention.in_proj_weight[width : 2 * width].unflatten(0, (heads, -1))
            self._found_probe = [fold_probe(query_HK, key_weight_HKE, body.post_layernorm.weight)]
            self._norm_eps = body.post_layernorm.eps
        self.gives = self.gives | words

    def tapped_patches(self, pixels_FCHW: Tensor, taps: Taps) -> Tensor:
        """Run the tower and note the queries and keys of the block that is read, and outputs of others."""
        asks, blocks = taps.asks, self.asked_blocks(taps.asks)
        layers = getattr(self.tower, "vision_model", self.tower).encoder.layers
        attention, prefix = layers[-1].self_attn, int(self.has_class_token)
        watched: dict[Any, nn.Module] = {block: layers[block] for block in blocks}
        if asks.keys or asks.saliency in ("class_token", "received"):
            watched |= {"query": attention.q_proj, "key": attention.k_proj}
        with recorded(watched) as seen:
            read_FNE = self.tower(pixel_values=pixels_FCHW).last_hidden_state[:, prefix:]
        if "key" in seen:
            query_FHnK, key_FHnK = (
                seen[name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for name in ("query", "key")
            )
            fill_attention(taps, query_FHnK, key_FHnK, attention.scale, prefix)
        if blocks:
            taps.layers_FNAE = torch.stack([seen[block][:, prefix:] for block in blocks], dim=2)
        if asks.saliency == "probe":
            taps.saliency_FN = probe_saliency(read_FNE, self.probe_HE, self._norm_eps)
        return self.final_norm(read_FNE)

    def hooked_patches(self, pixels_FCHW: Tensor, hook: BlockHook) -> Tensor:
        """Run the tower's layers one by one with the hook."""
        body = getattr(self.tower, "vision_model", self.tower)
        tokens_FnE = body.embeddings(pixels_FCHW)
        if self.has_class_token:  # CLIP's, which also norms before the first layer, under a name that it misspells
            tokens_FnE = body.pre_layrnorm(tokens_FnE)
        tokens_FnE = hook.begin(tokens_FnE, self.num_prefix)
        for number, layer in enumerate(body.encoder.layers):
            tokens_FnE = layer(tokens_FnE, hook=hook, number=number)
        return self.final_norm(tokens_FnE[:, self.num_prefix :])

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the tower's layers in the backward pass."""
        # transformers renamed it within version 5 and warns at the old name
        enable = (
            getattr(self.tower, "activation_checkpointing_enable", None) or self.tower.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})


class _Anatomy:
    """Layers of SigLIP and CLIP, as `hooked` sees them."""

    def heads(self, block: Any, tokens_FnE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, project and cut into heads."""
        attention, normed_FnE = block.self_attn, block.layer_norm1(tokens_FnE)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (
            project(normed_FnE).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for project in projections
        )
        return query, key, value

    def mixed(self, block: Any, attended_FHnK: Tensor) -> Tensor:
        """Put heads together and project."""
        return block.self_attn.out_proj(attended_FHnK.transpose(1, 2).flatten(2))

    def fed(self, block: Any, tokens_FnE: Tensor) -> Tensor:
        """Norm and MLP."""
        return block.mlp(block.layer_norm2(tokens_FnE))

    def attention(self, block: Any) -> tuple[float | None, float]:
        """Scale and dropout."""
        return block.self_attn.scale, block.self_attn.dropout


@functools.cache
def _hooked_layer(stock: type[nn.Module]) -> type[nn.Module]:
    return hooked(stock, _Anatomy())


def _build_tower(config: Mapping[str, Any], weights: str | None, attention: str) -> Any:
    kind = config.get("model_type", "")
    if kind not in _TOWERS:
        raise UserError(
            f"encoder.config.model_type is '{kind}'; right are {', '.join(_TOWERS)}{nearest(str(kind), _TOWERS)}"
        )
    config_class, tower_class = _TOWERS[kind]
    claimed = {key: value for key, value in config.items() if key != "model_type"}
    unknown = sorted(set(claimed) - set(config_class().to_dict()))
    if unknown:
        raise UserError(f"encoder.config has no entry '{unknown[0]}'{nearest(unknown[0], config_class().to_dict())}")
    on_meta = torch.get_default_device().type == "meta"
    try:
        found = None if weights is None else _geometry(weights, on_meta)
        if found is None:
            settings = config_class(**claimed)
            settings._attn_implementation = attention
            return tower_class(settings)
        # model_type first of all: another tower would load with half its weights random
        for key, value in config.items():
            has = getattr(found, key, None)
            if has != value:
                raise UserError(
                    f"encoder.config.{key} is {value}, but the checkpoint in encoder.weights '{weights}' has {has}"
                )
        if on_meta:
            found._attn_implementation = attention
            return tower_class(found)
        return _load(tower_class, str(weights), attention)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"encoder.weights '{weights}' is no checkpoint folder or hub name of a {kind}: {error}"
        ) from error


def _load(tower_class: Any, weights: str, attention: str) -> Any:
    tower, info = tower_class.from_pretrained(
        weights,
        attn_implementation=attention,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are told below, by name
        output_loading_info=True,
    )
    # the attention-pooling head goes, and some folders never had one
    check_loaded(info, "encoder.weights", weights, unused=("head.", "vision_model.head."))
    return tower


def _geometry(weights: str, on_meta: bool) -> Any:
    if Path(weights).is_dir() and not on_meta:
        read_config(Path(weights), "encoder.weights")
        find_weights(Path(weights), "encoder.weights")
    try:
        found = AutoConfig.from_pretrained(weights, local_files_only=on_meta)
    except OSError:
        if on_meta:
            return None
        raise
    return getattr(found, "vision_config", found)
