"""What source tokens are read through: keys and values, or a latent narrower than both that they are made from.

Everything here starts from tokens of unit RMS (`unit_rms`), which all layers and branches have in common: they are made
once per batch, and what remains of each norm, its weight, is multiplied into the projection behind it.

Axis letters:
    S  source tokens    E  their width, or the latent's    Q  queries    H  query heads    A  key and value heads
    R  query heads per key head (H = A R)    K  channels per head
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_crosslmm.fusion.attention import Spans, cross_attention
from lightning_crosslmm.host import HostLayer

Held = tuple[Tensor, ...]
"""Either keys and values, (S, A, K) each, or one tensor (S, E) that a layer makes its own from."""


def unit_rms(source_SE: Tensor, eps: float) -> Tensor:
    """Scale each token to unit RMS: what every norm of source tokens begins with."""
    return functional.rms_norm(source_SE, source_SE.shape[-1:], eps=eps)


def draw(module: nn.Module, std: float) -> None:
    """Draw fresh projections as the LLM draws its own."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class KeysValues(nn.Module):
    """Keys and values of the source tokens: ``W_k norm(s), W_v norm(s)``.

    Source: CrossLMM, arXiv:2505.17020v1, Eqs. (6), (9).
    Differs: the norm is ours (not given); grouped heads and biases are the host layer's, which fits the 43 M parameters
        of Table 3.

    Args:
        host: shape of the host layer's attention.
        width: E.
        has_norm: False where the tokens come from a `Latent`, which has normed them.
    """

    num_held = 2

    def __init__(self, host: HostLayer, width: int, has_norm: bool = True) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=host.norm_eps) if has_norm else None
        inner = host.num_kv_heads * host.head_width
        self.k_proj = nn.Linear(width, inner, bias=host.qkv_bias)
        self.v_proj = nn.Linear(width, inner, bias=host.qkv_bias)
        self.k_norm = nn.RMSNorm(host.head_width, eps=host.norm_eps) if host.head_norm else nn.Identity()
        self.heads = (host.num_kv_heads, host.head_width)

    def forward(self, unit_SE: Tensor) -> Held:
        """Give (S, A, K) keys and values of tokens of unit RMS, or of a latent."""
        key_SAK, value_SAK = (
            functional.linear(unit_SE, self._weight(part), part.bias).unflatten(-1, self.heads)
            for part in (self.k_proj, self.v_proj)
        )
        return self.k_norm(key_SAK), value_SAK

    @property
    def is_linear(self) -> bool:
        """Whether keys are a linear map of what comes in, so that `attend` can do without them (not Qwen3's)."""
        return isinstance(self.k_norm, nn.Identity)

    def attend(self, query_QHK: Tensor, unit_SE: Tensor, spans: Spans) -> Tensor:
        """Attend without making keys and values: ``W_v softmax((W_k^T q)^T x / sqrt(K)) x``.

        The same numbers as `cross_attention` on what `forward` gives, up to rounding, for S E (H + H) multiply-adds per
        query instead of 2 S E A K for any number of queries: cheaper for the one query per row of a decoded token. A
        key's bias adds the same to all scores of a query and drops out.

        Source: absorbed projections, DeepSeek-V2, arXiv:2405.04434, section 2.1.2.
        Differs: no rotary part, because queries and keys here have no positions.

        Args:
            query_QHK: packed queries.
            unit_SE: what `forward` takes.
            spans: which tokens each group of queries reads.

        Returns:
            (Q, H, K).
        """
        (num_heads, channels), width = query_QHK.shape[1:], unit_SE.shape[-1]
        key_AKE, value_AKE = (self._weight(part).unflatten(0, self.heads) for part in (self.k_proj, self.v_proj))
        query_QARK = query_QHK.unflatten(1, (self.heads[0], -1))
        query_QARE = torch.einsum("qark,ake->qare", query_QARK, key_AKE) * (width / channels) ** 0.5
        tokens_S1E = unit_SE[:, None].to(query_QARE.dtype)
        # all heads of a query read the same tokens, so they stand as queries of one head
        read_X1E = cross_attention(
            query_QARE.flatten(0, 2)[:, None], tokens_S1E, tokens_S1E, spans.repeated(num_heads), "sdpa"
        )
        out_QARK = torch.einsum("qare,ake->qark", read_X1E.view_as(query_QARE), value_AKE)
        if self.v_proj.bias is not None:
            out_QARK = out_QARK + self.v_proj.bias.view(self.heads[0], 1, -1)
        return out_QARK.flatten(1, 2).to(query_QHK.dtype)

    def _weight(self, part: nn.Linear) -> Tensor:
        return part.weight if self.norm is None else part.weight * self.norm.weight


class Latent(nn.Module):
    """A narrow summary of each source token, from which layers make their keys and values: ``norm(W_c norm(s))``.

    Source: the joint compression of keys and values of DeepSeek-V2, arXiv:2405.04434, Eqs. (9)-(11), with its norm.
    Differs: of source tokens and not of hidden states, so that layers can share one; no rotary part. The outer norm's
        weight starts at ``sqrt(E / r)``, where keys and values begin with the variance they have without a latent.

    Args:
        host: of the layer, for the norms' epsilon.
        width: E of the source tokens.
        latent_width: r.
    """

    num_held = 1

    def __init__(self, host: HostLayer, width: int, latent_width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=host.norm_eps)
        self.down_proj = nn.Linear(width, latent_width, bias=False)
        self.latent_norm = nn.RMSNorm(latent_width, eps=host.norm_eps)
        nn.init.constant_(self.latent_norm.weight, (width / latent_width) ** 0.5)

    def forward(self, unit_SE: Tensor) -> Held:
        """Give the (S, r) latent of tokens of unit RMS."""
        return (self.latent_norm(functional.linear(unit_SE, self.down_proj.weight * self.norm.weight)),)
