"""What a decoder layer tells fusion about itself: the contract between `llm/` and `fusion/`."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HostLayer:
    """Shape, and on request weights, of the self-attention of the layer that a fusion block moves into.

    Args:
        width: hidden width of the LLM.
        num_heads: query heads.
        num_kv_heads: key and value heads; divides `num_heads`.
        head_width: channels per head.
        qkv_bias: whether query, key and value projections have a bias (Qwen2 does).
        out_bias: whether the output projection has one.
        head_norm: whether queries and keys are normalised per head (Qwen3 does).
        norm_eps: epsilon of the layer's RMSNorm.
        init_std: standard deviation that the LLM draws its own fresh matrices with.
        weights: the layer's own tensors by the names ``norm.weight``, ``q_proj.weight``, ``q_proj.bias``,
            ``q_norm.weight``, ...
    """

    width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    qkv_bias: bool
    out_bias: bool
    head_norm: bool
    norm_eps: float
    init_std: float
    weights: Mapping[str, Tensor]
