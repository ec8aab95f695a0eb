"""Fusion inside stock decoder layers, and a context that reaches them: all that leans on transformers' internals.

The models are neither forked nor wrapped. A fused layer, the model around it and its causal head get a subclass made on
the spot, so that parameter names, recorded outputs, checkpointing and ``generate`` stay what they were. What drifts
between versions of transformers is dealt with here and nowhere else.

Axis letters:
    R T  rows and positions of the LLM batch    D  LLM width
"""

import functools
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_crosslmm.host import HostLayer


class Context(Protocol):
    """What a block reads; the LLM only carries it."""

    def at(self, past_length: int, num_positions: int) -> "Context":
        """Say who asks in this call of the LLM."""
        ...


def host_layer(llm: PreTrainedModel, number: int) -> HostLayer:
    """Describe the self-attention of one decoder layer."""
    layer, config = llm.model.layers[number], llm.config
    attention = layer.self_attn
    parts = {"norm": layer.input_layernorm}
    parts |= {
        name: getattr(attention, name)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        if hasattr(attention, name)
    }
    weights = {f"{name}.{key}": tensor for name, part in parts.items() for key, tensor in part.state_dict().items()}
    return HostLayer(
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=attention.head_dim,
        qkv_bias=attention.q_proj.bias is not None,
        out_bias=attention.o_proj.bias is not None,
        head_norm=hasattr(attention, "q_norm"),
        norm_eps=config.rms_norm_eps,
        init_std=config.initializer_range,
        weights=weights,
    )


def insert_block(llm: PreTrainedModel, number: int, block: nn.Module, *, before_layer: bool) -> None:
    """Move a fusion block into a decoder layer; the layer's own parameters keep their names.

    Args:
        llm: a causal model from `load_llm`.
        number: of the layer.
        block: called as ``block(hidden_RTD, context)``.
        before_layer: run the block before the layer instead of between its self-attention and its MLP.
    """
    head: Any = llm
    layer = head.model.layers[number]
    layer.fusion = block
    layer.__class__ = _fused_layer_class(layer.__class__, before_layer)
    carry_contexts(llm)


def carry_contexts(llm: PreTrainedModel) -> None:
    """Let an LLM take ``fusion=`` and ``unmerging=`` and carry them to its layers."""
    head: Any = llm
    if not getattr(head, "takes_contexts", False):
        head.__class__ = _head_class(head.__class__)
        head.model.__class__ = _body_class(head.model.__class__)


@functools.cache
def _fused_layer_class(stock: type[nn.Module], before_layer: bool) -> type[nn.Module]:
    """Subclass a stock decoder layer; the forward restates the residual structure that the supported layouts share."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, fusion: Context | None = None, **kwargs: Any) -> Tensor:
        if before_layer:
            if fusion is not None:
                hidden_states = self.fusion(hidden_states, fusion)
            return stock_forward(self, hidden_states, *args, **kwargs)
        attended_RTD, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        hidden_states = hidden_states + attended_RTD
        if fusion is not None:
            hidden_states = self.fusion(hidden_states, fusion)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    # the stock forward is itself wrapped for checkpointing; ours is the outermost wrapper, which is the one that
    # checkpoints
    stock_forward = stock.forward
    return type(f"Fused{stock.__name__}", (stock,), {"forward": forward})


@functools.cache
def _body_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    def forward(self: Any, *args: Any, fusion: Context | None = None, unmerging: Any = None, **kwargs: Any) -> Any:
        if fusion is None and unmerging is None:
            return stock.forward(self, *args, **kwargs)
        past = kwargs.get("past_key_values")
        given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        call = (0 if past is None else past.get_seq_length(), given.shape[1])
        if fusion is not None:
            kwargs["fusion"] = fusion.at(*call)
        if unmerging is not None:
            # at position 0 nothing is turned; each copy is turned to its own place in the attention
            kwargs["position_ids"] = torch.zeros(given.shape[:2], dtype=torch.int64, device=given.device)
            like = torch.empty(0, dtype=self.embed_tokens.weight.dtype, device=given.device)
            kwargs["unmerging"] = unmerging.at(*call).turned(functools.partial(_rotation, self.rotary_emb, like))
        return stock.forward(self, *args, **kwargs)

    return type(stock.__name__, (stock,), {"forward": forward, "__module__": stock.__module__})


def _rotation(rotary: Any, like: Tensor, place_RT: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = rotary(like, place_RT)
    scale = rotary.attention_scaling  # at position 0 it has been applied already
    return (cos, sin) if scale == 1.0 else (cos / scale, sin / scale)


@functools.cache
def _head_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    # generate refuses keywords that forward does not name, and asks for the logits of one position only where they can
    # be asked for; everything else passes through unchanged
    @functools.wraps(stock.forward)
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        fusion: Context | None = None,
        unmerging: Any = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        return stock.forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            fusion=fusion,
            unmerging=unmerging,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    del forward.__wrapped__  # its signature is what generate inspects
    body = {"forward": forward, "takes_contexts": True, "__module__": stock.__module__}
    return type(stock.__name__, (stock,), body)


def enable_checkpointing(llm: PreTrainedModel) -> None:
    """Recompute the decoder layers, fusion included, in the backward pass."""
    # transformers renamed it within version 5 and warns at the old name
    enable = getattr(llm, "activation_checkpointing_enable", None) or llm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@torch.no_grad()
def summarise(llm: PreTrainedModel, embeds_QD: Tensor, offsets: Tensor) -> Tensor:
    """Read texts with the LLM alone and give its last hidden state at the last token of each: (B, D).

    Args:
        llm: a causal model.
        embeds_QD: input embeddings of all texts one after the other.
        offsets: (B+1,) int64 on the CPU; an empty text gives zeros.
    """
    count_B = offsets.diff()
    inside_BT = (torch.arange(max(1, int(count_B.max()))) < count_B[:, None]).to(embeds_QD.device)
    embeds_BTD = embeds_QD.new_zeros(*inside_BT.shape, embeds_QD.shape[-1])
    embeds_BTD = embeds_BTD.masked_scatter(inside_BT[..., None], embeds_QD)
    hidden_BTD = llm.model(inputs_embeds=embeds_BTD, attention_mask=inside_BT.long(), use_cache=False).last_hidden_state
    last_B = (count_B - 1).clamp(min=0).to(embeds_QD.device)
    summary_BD = hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
    return summary_BD * (count_B > 0).to(summary_BD)[:, None]


def packed_mask(sample_RT: Tensor, implementation: str, dtype: torch.dtype) -> Tensor:
    """Build the (R, 1, T, T) mask of packed rows: causal, and within one sample.

    Args:
        sample_RT: int64, the sample at each position, -1 where a row is padding.
        implementation: the LLM's attention backend; ``eager`` adds its mask to the scores, the others take True for
            visible.
        dtype: of the scores.
    """
    same_RTT = sample_RT[:, :, None] == sample_RT[:, None, :]
    causal_TT = torch.ones(sample_RT.shape[1], sample_RT.shape[1], dtype=torch.bool, device=sample_RT.device).tril()
    visible_R1TT = (same_RTT & causal_TT)[:, None]
    if implementation != "eager":
        return visible_R1TT
    return torch.where(visible_R1TT, 0.0, torch.finfo(dtype).min).to(dtype)
