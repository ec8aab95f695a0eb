"""timm's vision towers (the only door to timm).

Axis letters:
    F  frames    C H W  channels, pixel rows, pixel columns    N  patches per frame    E  encoder width
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_crosslmm.encoder.base import Encoder, block_number
from lightning_crosslmm.encoder.feature_cache import FeatureCache
from lightning_crosslmm.encoder.hooked import hooked
from lightning_crosslmm.encoder.saliency import fill_attention, fold_probe, probe_saliency, recorded
from lightning_crosslmm.encoder.stem import ConvStem
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.pretrained_folder import find_weights, read_config, read_names
from lightning_crosslmm.taps import BlockHook, Taps

_SETTING = "encoder.pretrained"


class TimmEncoder(Encoder):
    """Read source tokens from a block of a timm model.

    Args:
        name: timm's model name, such as ``vit_so400m_patch14_siglip_384``.
        image_size: pixels per side; timm resizes position embeddings where it can.
        pretrained: load the weights timm names for the model (from its hub or the local cache); or a local folder that
            has them, as timm's ``save_for_hf`` writes it. Not loaded on the meta device.
        layer: block whose output is read; negative counts from the last. -2 is the LLaVA convention.
        final_norm: apply the tower's last norm to it.
        frames_per_chunk: most frames in one call.
        stem: ``patch`` as the model has it, or ``conv`` (see `ConvStem`; from scratch only).
        config: further arguments of the timm model (``embed_dim``, ``depth``, ...).
        same_frame_tolerance: see `Encoder`.
        feature_cache: see `Encoder`.

    Raises:
        UserError: an unknown name or argument, a model without patch tokens, a block it does not have, or a folder that
            holds no whole weights of this model.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        pretrained: bool | str = False,
        layer: int = -1,
        final_norm: bool = True,
        frames_per_chunk: int = 64,
        stem: str = "patch",
        config: Mapping[str, Any] | None = None,
        same_frame_tolerance: float | None = None,
        feature_cache: FeatureCache | None = None,
    ) -> None:
        tower: Any = _build_tower(name, image_size, pretrained, stem, config or {})
        data = tower.pretrained_cfg
        super().__init__(image_size, data["mean"], data["std"], frames_per_chunk, same_frame_tolerance, feature_cache)
        self.num_blocks = len(tower.blocks)
        self.read_block = block = block_number(layer, self.num_blocks)
        self._look_for_taps(tower)
        tower.prune_intermediate_layers([block], prune_norm=not final_norm, prune_head=True)
        self.tower: Any = tower
        self.final_norm = final_norm
        self.width = tower.embed_dim
        self.grid = tuple(tower.patch_embed.grid_size)
        self.num_prefix = tower.num_prefix_tokens
        self.has_class_token = getattr(tower, "cls_token", None) is not None
        self.identity = dict(
            name=name, pretrained=pretrained, image_size=image_size, block=block, stem=stem, config=dict(config or {})
        )
        if all(_is_plain(block) for block in tower.blocks):
            self.gives = self.gives | {"blocks"}
            for each in tower.blocks:
                each.__class__ = _HookedBlock

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's blocks up to the one that is read."""
        return tuple(self.tower.blocks)

    def patches(self, pixels_FCHW: Tensor) -> Tensor:
        """Run the remaining blocks and drop class and register tokens."""
        (patches_FNE,) = self.tower.forward_intermediates(
            pixels_FCHW,
            indices=[len(self.tower.blocks) - 1],
            norm=self.final_norm,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return patches_FNE

    def _look_for_taps(self, tower: Any) -> None:
        # other attentions turn queries and keys (rotary embeddings) after the norms that we read them from
        words = {"layers"}
        if type(getattr(tower.blocks[self.read_block], "attn", None)) is Attention:
            words |= {"keys", "saliency.received"}
            words |= {"saliency.class_token"} if tower.cls_token is not None else set()
        head = getattr(tower, "attn_pool", None)
        if isinstance(head, AttentionPoolLatent) and _folds(head, tower.norm):
            words.add("saliency.probe")
            query_HK = head.q_norm(head.q(head.latent).view(head.num_heads, -1))
            key_weight_HKE = head.kv.weight.chunk(2)[0].unflatten(0, (head.num_heads, -1))
            self._found_probe = [fold_probe(query_HK, key_weight_HKE, getattr(tower.norm, "weight", None))]
            self._norm_eps = getattr(tower.norm, "eps", None)
        self.gives = self.gives | words

    def tapped_patches(self, pixels_FCHW: Tensor, taps: Taps) -> Tensor:
        """Run the tower and note the queries and keys of the block that is read, and outputs of others."""
        asks, blocks = taps.asks, self.asked_blocks(taps.asks)
        attention: Any = getattr(self.tower.blocks[-1], "attn", None)
        watched: dict[str, nn.Module] = {}
        if asks.keys or asks.saliency in ("class_token", "received"):
            # identities where the tower norms nothing: they are called all the same
            watched = {"query": attention.q_norm, "key": attention.k_norm}
        numbers = sorted({*blocks, self.read_block})
        with recorded(watched) as seen:
            outputs = self.tower.forward_intermediates(
                pixels_FCHW, indices=numbers, output_fmt="NLC", intermediates_only=True
            )
        found = dict(zip(numbers, outputs, strict=True))
        if watched:
            fill_attention(taps, seen["query"], seen["key"], attention.scale, self.tower.num_prefix_tokens)
        if blocks:
            taps.layers_FNAE = torch.stack([found[block] for block in blocks], dim=2)
        read_FNE = found[self.read_block]
        if asks.saliency == "probe":
            taps.saliency_FN = probe_saliency(read_FNE, self.probe_HE, self._norm_eps)
        return self.tower.norm(read_FNE) if self.final_norm else read_FNE

    def hooked_patches(self, pixels_FCHW: Tensor, hook: BlockHook) -> Tensor:
        """Run the tower's blocks one by one with the hook."""
        tower = self.tower
        tokens_FnE = tower.norm_pre(tower.patch_drop(tower._pos_embed(tower.patch_embed(pixels_FCHW))))
        tokens_FnE = hook.begin(tokens_FnE, self.num_prefix)
        for number, block in enumerate(tower.blocks):
            if tower.grad_checkpointing:
                tokens_FnE = checkpoint(block, tokens_FnE, use_reentrant=False, hook=hook, number=number)
            else:
                tokens_FnE = block(tokens_FnE, hook=hook, number=number)
        return (tower.norm(tokens_FnE) if self.final_norm else tokens_FnE)[:, self.num_prefix :]

    def gradient_checkpointing_enable(self) -> None:
        """Recompute the tower's blocks in the backward pass."""
        self.tower.set_grad_checkpointing(True)


def _build_tower(name: str, image_size: int, pretrained: bool | str, stem: str, config: Mapping[str, Any]) -> nn.Module:
    if stem not in ("patch", "conv"):
        raise UserError(f"encoder.stem is '{stem}'; right are patch, conv{nearest(stem, ('patch', 'conv'))}")
    if not timm.is_model(name):
        raise UserError(f"encoder.name is '{name}', which timm does not know{nearest(name, timm.list_models())}")
    settings: dict[str, Any] = {"embed_layer": ConvStem} if stem == "conv" else {}
    if (file := _file_in(pretrained, name)) is not None:
        settings["pretrained_cfg_overlay"] = {"file": str(file)}
    on_meta = torch.get_default_device().type == "meta"
    try:
        tower = timm.create_model(
            name,
            pretrained=bool(pretrained) and not on_meta,
            num_classes=0,
            img_size=image_size,
            **settings,
            **config,
        )
    except (TypeError, AssertionError, RuntimeError, OSError) as error:  # the last two: weights that do not fit
        raise UserError(
            f"timm could not build encoder.name '{name}' with image_size {image_size} and "
            f"encoder.config {dict(config)}: {error}"
        ) from error
    if file is not None:
        _check_names(tower, file)
    if not hasattr(tower, "blocks") or not hasattr(tower, "patch_embed"):
        raise UserError(
            f"encoder.name '{name}' gives no patch tokens; choose a vision transformer, such as a vit_* or an eva02_*"
        )
    return tower


def _file_in(pretrained: bool | str, name: str) -> Path | None:
    """Find the weights of a local folder and look them over; None where timm finds them by itself."""
    if isinstance(pretrained, bool):
        return None
    folder = Path(pretrained)
    theirs = read_config(folder, _SETTING).get("architecture", "unknown")
    if theirs != name:
        raise UserError(f"{_SETTING}={folder}: holds a {theirs}, and encoder.name is {name}; give the one or the other")
    return find_weights(folder, _SETTING)


def _check_names(tower: nn.Module, file: Path) -> None:
    # timm lets weights be missing where a model has no classifier
    if missing := sorted(set(tower.state_dict()) - read_names(file, _SETTING)):
        raise UserError(
            f"{_SETTING}={file.parent}: lacks {len(missing)} weights, such as {missing[0]}; it was not saved whole, or "
            "encoder.config asks for parts that it has not"
        )


def _folds(head: Any, norm: nn.Module) -> bool:
    # what stands between probe and tokens is linear, so that one vector per head says it all
    is_linear = head.latent_len == 1 and head.pos_embed is None and isinstance(head.k_norm, nn.Identity)
    return is_linear and isinstance(norm, nn.LayerNorm | nn.Identity)


class _Anatomy:
    """timm's plain block, as `hooked` sees it."""

    def heads(self, block: Any, tokens_FnE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm, project and cut into heads."""
        attention = block.attn
        qkv_FnE = attention.qkv(block.norm1(tokens_FnE))
        query, key, value = qkv_FnE.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return attention.q_norm(query), attention.k_norm(key), value

    def mixed(self, block: Any, attended_FHnK: Tensor) -> Tensor:
        """Put heads together and project."""
        attention = block.attn
        mixed_FnE = attention.proj(attention.norm(attended_FHnK.transpose(1, 2).flatten(2)))
        return block.drop_path1(block.ls1(attention.proj_drop(mixed_FnE)))

    def fed(self, block: Any, tokens_FnE: Tensor) -> Tensor:
        """Norm and MLP."""
        return block.drop_path2(block.ls2(block.mlp(block.norm2(tokens_FnE))))

    def attention(self, block: Any) -> tuple[float | None, float]:
        """Scale and dropout."""
        return None, block.attn.attn_drop.p


def _is_plain(block: nn.Module) -> bool:
    return type(block) is Block and type(block.attn) is Attention and getattr(block.attn, "gate", None) is None


_HookedBlock = hooked(Block, _Anatomy())
