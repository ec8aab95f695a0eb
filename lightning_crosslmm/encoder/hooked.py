"""A tower's block with a hook between its attention and its MLP, whatever library the tower is from.

Blocks are not wrapped: they get a subclass made on the spot, and the hook comes with the call, so that parameter names,
sharding and checkpointing of blocks stay what they were. Without a hook the stock forward runs.

Axis letters:
    F  frames    m  tokens of the call    n  the tower's own among them    I  isolated ones    E  encoder width
    H  heads    K  width of a head
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_crosslmm.taps import BlockHook


class Anatomy(Protocol):
    """How the blocks of one library are made; each function takes the block first."""

    def heads(self, block: Any, tokens_FnE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Norm the tokens and give queries, keys and values, (F, H, n, K) each."""
        ...

    def mixed(self, block: Any, attended_FHnK: Tensor) -> Tensor:
        """Give what the attention adds to the tokens."""
        ...

    def fed(self, block: Any, tokens_FnE: Tensor) -> Tensor:
        """Give what norm and MLP add to the tokens."""
        ...

    def attention(self, block: Any) -> tuple[float | None, float]:
        """Give the scale of the logits, None for one over the root of K, and the dropout in training."""
        ...


def hooked(stock: type[nn.Module], anatomy: Anatomy) -> type[nn.Module]:
    """Subclass a stock block: ``block(tokens, hook=hook, number=number)`` runs it with a hook."""

    def forward(
        self: Any, tokens_FmE: Tensor, *args: Any, hook: BlockHook | None = None, number: int = 0, **kwargs: Any
    ) -> Tensor:
        if hook is None:
            return stock_forward(self, tokens_FmE, *args, **kwargs)
        return _run(self, anatomy, tokens_FmE, hook, number)

    stock_forward = stock.forward
    return type(f"Hooked{stock.__name__}", (stock,), {"forward": forward, "__module__": stock.__module__})


def _run(block: Any, anatomy: Anatomy, tokens_FmE: Tensor, hook: BlockHook, number: int) -> Tensor:
    own_FnE, isolated_FIE = tokens_FmE.tensor_split([tokens_FmE.shape[1] - hook.num_isolated], dim=1)
    scale, dropout = anatomy.attention(block)
    dropout = dropout if block.training else 0.0
    query_FHnK, key_FHnK, value_FHnK = anatomy.heads(block, own_FnE)
    bias_Fn = hook.key_bias(number)
    mask_F11n = None if bias_Fn is None else bias_Fn[:, None, None].to(query_FHnK.dtype)
    attended_FHnK = scaled_dot_product_attention(
        query_FHnK, key_FHnK, value_FHnK, attn_mask=mask_F11n, dropout_p=dropout, scale=scale
    )
    own_FnE = own_FnE + anatomy.mixed(block, attended_FHnK)
    class_Fn = _class_row(query_FHnK, key_FHnK, bias_Fn, scale) if hook.wants_class_row else None
    own_FnE = hook.after_attention(number, own_FnE, key_FHnK.detach().float().mean(dim=1), class_Fn)
    own_FnE = own_FnE + anatomy.fed(block, own_FnE)
    if not hook.num_isolated:
        return own_FnE
    # in calls of their own: a product of another shape may round the tower's own tokens differently
    query_FHIK, *more = anatomy.heads(block, isolated_FIE)
    keys, values = torch.cat([key_FHnK, more[0]], dim=2), torch.cat([value_FHnK, more[1]], dim=2)
    attended_FHIK = scaled_dot_product_attention(query_FHIK, keys, values, dropout_p=dropout, scale=scale)
    isolated_FIE = isolated_FIE + anatomy.mixed(block, attended_FHIK)
    return torch.cat([own_FnE, isolated_FIE + anatomy.fed(block, isolated_FIE)], dim=1)


@torch.no_grad()
def _class_row(query_FHnK: Tensor, key_FHnK: Tensor, bias_Fn: Tensor | None, scale: float | None) -> Tensor:
    """Attention of the first token to every token, mean over heads: (F, n), in O(n K) per head."""
    with torch.autocast(key_FHnK.device.type, enabled=False):
        scale = key_FHnK.shape[-1] ** -0.5 if scale is None else scale
        logits_FHn = torch.einsum("fhk,fhnk->fhn", query_FHnK[:, :, 0].float() * scale, key_FHnK.float())
        if bias_Fn is not None:
            logits_FHn = logits_FHn + bias_Fn.float()[:, None]
        return logits_FHn.softmax(dim=-1).mean(dim=1)
