"""Attention over tokens that are not there: every merged token stands for all the patches in it, each at its place.

transformers calls an attention function that is registered under a name; ours takes the map along as a keyword and
leaves calls without one to the stock function. Queries and keys reach it turned to position 0, which is not turned at
all, so that it can turn each copy to its own place, and so that a cache keeps one key per merged token.

Axis letters:
    R T  rows and positions of the LLM batch    X  all of these positions    B  samples    V  virtual tokens of a sample
    G  tokens after the prompt    Q L  queries and keys of a call    H A  heads of queries, of keys and values
    K  width of a head
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.llm.layers import carry_contexts

MODES = ("none", "expanded", "unique")
_NAME = "sdpa_over_virtual_tokens"
Rotation = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Unmerging:
    """The virtual tokens of a batch.

    Args:
        token_BV: int64, flat position (row * T + column) of the token that stands for each virtual one; R * T after a
            sample's last.
        length_B: int64 on the CPU, virtual tokens of each sample.
        row_B: int64 on the CPU, the row of each sample.
        shape: (R, T).
        is_exact: tokens after the prompt read every virtual token; else each token of the prompt once, weighed by how
            many it stands for.
    """

    token_BV: Tensor
    length_B: Tensor
    row_B: Tensor
    shape: tuple[int, int]
    is_exact: bool

    def at(self, past_length: int, num_positions: int) -> "Prompted | Following":
        """Say who asks in this call of the LLM: the prompt, or `num_positions` new tokens per row after it."""
        num_rows, prompt_length = self.shape
        flat = self.token_BV.flatten()
        count_X = torch.zeros(num_rows * prompt_length + 1, device=flat.device)
        count_X = count_X.index_add(0, flat, torch.ones_like(flat, dtype=torch.float32))[:-1]  # bincount would wait
        if past_length == 0:
            return Prompted(self.token_BV, count_X, self.shape)
        order = self.row_B.argsort()
        order, length_R1 = order.to(flat.device), self.length_B[order, None].to(flat.device)
        token_RV = self.token_BV[order]
        place_V = torch.arange(token_RV.shape[1], device=flat.device)
        new_G = torch.arange(past_length - prompt_length + num_positions, device=flat.device)
        if self.is_exact:
            keys_RL = torch.cat([token_RV % prompt_length, (prompt_length + new_G).expand(num_rows, -1)], dim=1)
            place_RL = torch.cat([place_V.expand(num_rows, -1), length_R1 + new_G], dim=1)
            weight_RL = (place_V < length_R1).float()
        else:
            keys_RL, weight_RL = None, count_X.view(self.shape)
            sum_X = torch.zeros(num_rows * prompt_length + 1, device=flat.device)
            sum_X = sum_X.index_add(0, token_RV.flatten(), place_V.float().expand_as(token_RV).flatten())[:-1]
            mean_RT = sum_X.view(self.shape) / weight_RL.clamp(min=1)
            place_RL = torch.cat([mean_RT, length_R1 + new_G], dim=1)
        weight_RQL = torch.nn.functional.pad(weight_RL, (0, len(new_G)), value=1.0)[:, None].repeat(1, num_positions, 1)
        query_Q = new_G[-num_positions:]
        weight_RQL[:, :, -len(new_G) :] *= new_G <= query_Q[:, None]
        return Following(keys_RL, place_RL, length_R1 + query_Q, weight_RQL.log()[:, None])


@dataclass(frozen=True)
class Prompted:
    """The prompt's call: every virtual token asks, and copies of one token get the mean of their answers.

    Args:
        token_BV: as in `Unmerging`.
        count_X: virtual tokens of each flat position.
        shape: (R, T).
        turn: cosines and sines (1, V, K) of the virtual places.
    """

    token_BV: Tensor
    count_X: Tensor
    shape: tuple[int, int]
    turn: Rotation | None = None

    def turned(self, rotate: Callable[[Tensor], Rotation]) -> "Prompted":
        """Take the angles of all places; every sample starts at 0."""
        return replace(self, turn=rotate(torch.arange(self.token_BV.shape[1], device=self.token_BV.device)[None]))

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
        """Expand, attend, average back: (R, T, H, K) from (R, H, T, K)."""
        assert self.turn is not None, "the model's body turned it"
        copies_BV = self.token_BV.clamp(max=len(self.count_X) - 1)  # after a sample's end nobody looks
        heads = (query, key, value)
        query, key, value = (each.transpose(1, 2).flatten(0, 1)[copies_BV].transpose(1, 2) for each in heads)
        query, key = _turn(query, self.turn), _turn(key, self.turn)
        # causal in the order of virtual tokens, and samples are rows of their own: no mask
        out_BVHK, _ = sdpa_attention_forward(module, query, key, value, None, **settings, is_causal=True)
        share_BV = torch.nn.functional.pad(1.0 / self.count_X.clamp(min=1), (0, 1))[self.token_BV]
        part_BVHK = (out_BVHK * share_BV[..., None, None]).float()
        out_XHK = out_BVHK.new_zeros(len(self.count_X) + 1, *out_BVHK.shape[2:], dtype=torch.float32)
        out_XHK = out_XHK.index_add(0, self.token_BV.flatten(), part_BVHK.flatten(0, 1))
        return out_XHK[:-1].unflatten(0, self.shape).to(out_BVHK.dtype)


@dataclass(frozen=True)
class Following:
    """A call of tokens after the prompt.

    Args:
        key_RL: int64, which cached token each key is a copy of; None where every one is read once.
        place_RL: of the keys.
        place_RQ: of the queries.
        bias_R1QL: on the logits; -inf hides a key.
        turns: cosines and sines of queries and of keys.
    """

    key_RL: Tensor | None
    place_RL: Tensor
    place_RQ: Tensor
    bias_R1QL: Tensor
    turns: tuple[Rotation, Rotation] | None = None

    def turned(self, rotate: Callable[[Tensor], Rotation]) -> "Following":
        """Take the angles of queries and keys."""
        return replace(self, turns=(rotate(self.place_RQ), rotate(self.place_RL)))

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
        """Give (R, Q, H, K); the keys are those of the cache."""
        assert self.turns is not None, "the model's body turned it"
        if self.key_RL is not None:
            copies_RALK = self.key_RL[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
            key, value = key.gather(2, copies_RALK), value.gather(2, copies_RALK)
        query, key = _turn(query, self.turns[0]), _turn(key, self.turns[1])
        bias_R1QL = self.bias_R1QL.to(query.dtype)
        return sdpa_attention_forward(module, query, key, value, bias_R1QL, **settings, is_causal=False)[0]


def unmerge_attention(llm: PreTrainedModel) -> None:
    """Let an LLM's attention look at virtual tokens wherever it is called with ``unmerging=``.

    Raises:
        UserError: its attention backend is another than sdpa, or looks through sliding windows.
    """
    config: Any = llm.config
    if config._attn_implementation != "sdpa":
        raise UserError(
            "virtual_unmerging needs llm.model.attention=sdpa, which it is built on; it is "
            f"{config._attn_implementation}"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise UserError(
            f"virtual_unmerging needs an LLM with full attention in every layer; this one has {sorted(kinds)[0]}"
        )
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    llm.set_attn_implementation(_NAME)
    carry_contexts(llm)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    unmerging: Prompted | Following | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    if unmerging is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return out, None
    own: dict[str, Any] = {name: settings[name] for name in ("dropout", "scaling") if name in settings}
    return unmerging.attend(module, query, key, value, own).contiguous(), None


def _turn(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate (B, H, V, K) by the angles of (B, V, K), as the supported layouts pair their channels."""
    cos, sin = (each[:, None] for each in rotation)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin
