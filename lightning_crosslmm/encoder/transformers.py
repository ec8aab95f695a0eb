"""transformers' vision towers: SigLIP, SigLIP2 (fixed resolution) and CLIP (the only door to them).

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from lightning_crosslmm.encoder.base import Encoder, block_number
from lightning_crosslmm.errors import UserError, nearest

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
        weights: a folder or hub name whose vision tower is loaded, in float32; None starts from random weights. Not
            loaded on the meta device.
        config: geometry of the tower (``model_type``, ``hidden_size``, ...). Beside `weights` it is a claim: an entry
            that the checkpoint contradicts is refused.
        image_size: pixels per side.
        mean: per channel, on the 0..1 scale. SigLIP's are 0.5.
        std: per channel, on the 0..1 scale.
        layer: layer whose output is read; negative counts from the last.
        final_norm: apply the tower's last norm to it.
        frames_per_chunk: most frames in one call.
        attention: attention backend of transformers, ``sdpa``, ``eager`` or ``flash_attention_2``.

    Raises:
        UserError: an unknown tower, a checkpoint that is none or contradicts `config`, or a layer it does not have.
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
    ) -> None:
        super().__init__(image_size, mean, std, frames_per_chunk)
        tower = _build_tower({**config, "image_size": image_size}, weights, attention)
        # transformers before 5.20 keeps the parts one level down
        body = getattr(tower, "vision_model", tower)
        block = block_number(layer, len(body.encoder.layers))
        body.encoder.layers = body.encoder.layers[: block + 1]
        body.config.num_hidden_layers = block + 1
        if getattr(body, "head", None) is not None:  # the attention-pooling head reads what we do not use
            body.head, body.use_head = None, False
        self.has_class_token = tower.config.model_type == "clip_vision_model"
        norm = body.post_layernorm
        # SigLIP norms every token on its way out, CLIP only its class token: norm here, in one place for both
        body.post_layernorm = nn.Identity()
        self.final_norm: nn.Module = norm if final_norm else nn.Identity()
        self.tower: Any = tower
        self.width = tower.config.hidden_size
        side = tower.config.image_size // tower.config.patch_size
        self.grid = (side, side)

    def patches(self, pixels_FCHW: Tensor) -> Tensor:
        """Run the remaining layers and drop the class token where there is one."""
        tokens_FNE = self.tower(pixel_values=pixels_FCHW).last_hidden_state
        return self.final_norm(tokens_FNE[:, 1:] if self.has_class_token else tokens_FNE)

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the tower's layers in the backward pass."""
        # transformers renamed it within version 5 and warns at the old name
        enable = (
            getattr(self.tower, "activation_checkpointing_enable", None) or self.tower.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})


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
    if weights is None or torch.get_default_device().type == "meta":
        settings = config_class(**claimed)
        settings._attn_implementation = attention
        return tower_class(settings)
    try:
        found = AutoConfig.from_pretrained(weights)
        found = getattr(found, "vision_config", found)
        # model_type first of all: another tower would load with half its weights random
        for key, value in config.items():
            has = getattr(found, key, None)
            if has != value:
                raise UserError(
                    f"encoder.config.{key} is {value}, but the checkpoint in encoder.weights '{weights}' has {has}"
                )
        return tower_class.from_pretrained(weights, attn_implementation=attention, dtype=torch.float32)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"encoder.weights '{weights}' is no checkpoint folder or hub name of a {kind}: {error}"
        ) from error
