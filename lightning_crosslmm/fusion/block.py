"""The fusion block: V2V and T2V, side by side, gated, inside one decoder layer.

Axis letters:
    R T  rows and positions of the LLM batch    D  LLM width    S  source tokens    E  width of the source tokens
    Q  queries of a branch    H  query heads    A  key and value heads    K  channels per head
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion.attention import attention_weights, cross_attention
from lightning_crosslmm.fusion.context import FusionContext, Queries
from lightning_crosslmm.fusion.keys import Held, KeysValues, Latent, draw
from lightning_crosslmm.host import HostLayer


class Gate(nn.Module):
    """Scale an update by a learned factor in (-1, 1): ``tanh(a) * x``.

    Source: CrossLMM, arXiv:2505.17020v1, Eqs. (7), (10): gamma in [-1, 1]; Fig. 3 labels it tanh gating.
    Differs: neither form nor start is given. A scalar per branch and layer that starts at 0 is the convention of
        Flamingo and Mllama and leaves a pretrained LLM undisturbed; a model trained from scratch wants it open, because
        at 0 the gate and what it guards wait for each other's gradient.

    Args:
        kind: ``scalar``, ``channel`` (one factor per channel of the LLM) or ``none`` (always 1).
        init: the factor itself at the start, -1 < init < 1 (a = atanh(init)).
        width: D.

    Raises:
        UserError: an unknown kind, or an init outside (-1, 1).
    """

    def __init__(self, kind: str, init: float, width: int) -> None:
        super().__init__()
        if kind not in ("scalar", "channel", "none"):
            raise UserError(f"fusion.gate is '{kind}'; right are scalar, channel, none")
        if not -1 < init < 1:
            raise UserError(
                f"fusion.gate_init is {init}; it is the gate's factor itself and must lie between "
                "-1 and 1, ends excluded"
            )
        shape = {"scalar": (1,), "channel": (width,), "none": None}[kind]
        start = None if shape is None else torch.full(shape, math.atanh(init))
        self.raw = None if start is None else nn.Parameter(start)

    def forward(self, update_QD: Tensor) -> Tensor:
        """Scale an update."""
        return update_QD if self.raw is None else self.raw.tanh().to(update_QD.dtype) * update_QD


class Branch(nn.Module):
    """The query side of one branch: ``gate * W_o Attn(W_q norm(h), K, V)``.

    Source: CrossLMM, arXiv:2505.17020v1, Eqs. (5)-(7) for V2V, (8)-(10) for T2V.
    Differs: Eq. (4) writes a post-norm; a pretrained pre-norm LLM would break, so the query is normed and the residual
        is not. An output projection is added: heads need re-mixing, and the parameter count asks for it. No rotary
            positions: queries and
        keys live on different axes, and the paper names none.

    Args:
        host: shape of the host layer's attention.
        gate: kind of the gate.
        gate_init: the gate's factor at the start.
    """

    def __init__(self, host: HostLayer, gate: str, gate_init: float) -> None:
        super().__init__()
        inner = host.num_heads * host.head_width
        self.norm = nn.RMSNorm(host.width, eps=host.norm_eps)
        self.q_proj = nn.Linear(host.width, inner, bias=host.qkv_bias)
        self.q_norm = nn.RMSNorm(host.head_width, eps=host.norm_eps) if host.head_norm else nn.Identity()
        self.o_proj = nn.Linear(inner, host.width, bias=host.out_bias)
        self.gate = Gate(gate, gate_init, host.width)
        self.heads = (host.num_heads, host.head_width)

    def query(self, hidden_QD: Tensor) -> Tensor:
        """Give (Q, H, K) queries."""
        return self.q_norm(self.q_proj(self.norm(hidden_QD)).unflatten(-1, self.heads))

    def update(self, attended_QHK: Tensor) -> Tensor:
        """Mix the heads and scale by the gate: (Q, D)."""
        return self.gate(self.o_proj(attended_QHK.flatten(-2)))


class FusionBlock(nn.Module):
    """Let pooled and text tokens re-read the source tokens.

    ``h[pooled] += V2V(h[pooled], source);  h[text] += T2V(h[text], source)``, both from the same h.

    Source: CrossLMM, arXiv:2505.17020v1, section 3.3 and Fig. 2.
    Differs: the block owns no feed-forward network; a new one in each of 7 layers would be 290 M parameters where Table
        3 has 43 M, so the one drawn in Fig. 2 is the host layer's. V2V and T2V have their own matrices, because stage 1
        trains one without the other; `share_kv` lets them share keys and values. Layers may share them, too, or make
        them from a latent; see `Fusion`.

    Args:
        host: the layer it moves into.
        layer: number of that layer.
        source_width: width of the source tokens it reads.
        group: first of the layers that share what is read, or None for a layer by itself.
        kv_latent: r, or None for keys and values straight from source tokens.
        v2v: whether pooled tokens re-read.
        t2v: whether text tokens re-read.
        gate: kind of the gates.
        gate_init: the gates' factor at the start.
        share_kv: one set of key and value projections for both branches.
        backend: of `cross_attention`.
    """

    def __init__(
        self,
        host: HostLayer,
        layer: int,
        source_width: int,
        *,
        v2v: bool,
        t2v: bool,
        gate: str,
        gate_init: float,
        share_kv: bool,
        backend: str,
        group: int | None = None,
        kv_latent: int | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.backend, self.share_kv = layer, backend, share_kv
        self.group = layer if group is None else group
        self.v2v = Branch(host, gate, gate_init) if v2v else None
        self.t2v = Branch(host, gate, gate_init) if t2v else None
        names = ["shared"] if share_kv else [name for name, on in (("v2v", v2v), ("t2v", t2v)) if on]
        own_latents = names if group is None and kv_latent is not None else []
        own_keys = names if group is None or kv_latent is not None else []
        self.latents = nn.ModuleDict({name: Latent(host, source_width, kv_latent or 0) for name in own_latents})
        self.keys_values = nn.ModuleDict(
            {name: KeysValues(host, kv_latent or source_width, has_norm=kv_latent is None) for name in own_keys}
        )
        draw(self, host.init_std)

    def forward(self, hidden_RTD: Tensor, context: FusionContext) -> Tensor:
        """Add both updates to the hidden states of the positions that ask.

        Args:
            hidden_RTD: hidden states of the host layer.
            context: source tokens and who reads which of them.

        Returns:
            (R, T, D), same dtype.
        """
        flat_PD = hidden_RTD.flatten(0, 1)
        updates: list[Tensor] = []
        places: list[Tensor] = []
        made: dict[str, Held] = {}
        for name, branch, queries in (("v2v", self.v2v, context.v2v), ("t2v", self.t2v, context.t2v)):
            is_kept = (
                name == "t2v" and context.keeps_keys
            )  # though the prompt's text may see nothing: what follows will
            if branch is None or (queries is None and not is_kept):
                continue
            make = functools.partial(self._make, name, context, made)
            held = context.keep(self.group, make) if is_kept else make()
            if queries is None:
                continue
            query_QHK = branch.query(flat_PD[queries.position_Q])
            attended_QHK = self._attend(name, query_QHK, held, queries, context, made)
            updates.append(_scaled(branch.update(attended_QHK), queries))
            places.append(queries.position_Q)
            if not self.share_kv:  # nobody reads these again, and of a long clip they are large
                made.clear()
                del held
        if not updates:
            return hidden_RTD
        update_QD = torch.cat(updates).to(hidden_RTD.dtype)
        return flat_PD.index_add(0, torch.cat(places), update_QD).view_as(hidden_RTD)

    def _make(self, name: str, context: FusionContext, made: dict[str, Held]) -> Held:
        """What a branch reads, made once where both read the same."""
        which = "shared" if self.share_kv else name
        if which not in made:
            if self.group in context.shared:
                made[which] = context.shared[self.group][which]
            elif which in self.latents:
                made[which] = self.latents[which](context.source_SE)
            elif context.is_following and self.keys_values[which].is_linear:
                made[which] = (context.source_SE,)  # too few queries to be worth making keys and values
            else:
                made[which] = self.keys_values[which](context.source_SE)
        return made[which]

    def _attend(
        self,
        name: str,
        query_QHK: Tensor,
        held: Held,
        queries: Queries,
        context: FusionContext,
        made: dict[str, Held],
    ) -> Tensor:
        which = "shared" if self.share_kv else name
        if len(held) == 1:
            keys_values: Any = self.keys_values[which]
            if context.is_following and keys_values.is_linear:
                return keys_values.attend(query_QHK, held[0], queries.spans)
            if f"{which} of latent" not in made:
                made[f"{which} of latent"] = keys_values(held[0])
            held = made[f"{which} of latent"]
        key_SAK, value_SAK = held
        if context.looks is not None:
            context.looks.append((self.layer, name, attention_weights(query_QHK, key_SAK, queries.spans)))
        return cross_attention(query_QHK, key_SAK, value_SAK, queries.spans, self.backend)


def _scaled(update_QD: Tensor, queries: Queries) -> Tensor:
    return update_QD if queries.weight == 1.0 else update_QD * queries.weight
