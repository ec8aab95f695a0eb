"""What towers of any library share when they fill in taps: how much a patch matters, and what modules gave on the way.

All of it is computed in float32 without gradient, and never as one matrix of patches x patches for all frames.

Axis letters:
    F  frames    N  patches of a frame    n  patches and prefix tokens (class token first)    H  heads
    K  width of a head    E  encoder width    c  queries of a chunk    A  asked layers
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_crosslmm.taps import Taps

LARGEST = 2**24  # attention weights at a time: 64 MiB in float32


@contextmanager
def recorded(modules: Mapping[Any, nn.Module]) -> Iterator[dict[Any, Tensor]]:
    """Note what modules give while the block runs, under the names they have in `modules`.

    The hooks are gone before the backward pass, so that checkpointing recomputes without them.
    """
    seen: dict[Any, Tensor] = {}

    def note(name: Any) -> Any:
        return lambda module, given, out: seen.__setitem__(name, out[0] if isinstance(out, tuple) else out)

    handles = [module.register_forward_hook(note(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def class_token_saliency(query_FHnK: Tensor, key_FHnK: Tensor, scale: float, num_prefix: int) -> Tensor:
    """Attention of the class token to every patch, ``mean_h softmax(q_class K^T scale)``: (F, N), O(N K) per head."""
    with torch.no_grad(), torch.autocast(key_FHnK.device.type, enabled=False):
        query_FH1K = query_FHnK[:, :, :1].float() * scale
        weight_FH1n = (query_FH1K @ key_FHnK.float().transpose(-2, -1)).softmax(dim=-1)
        return weight_FH1n[:, :, 0, num_prefix:].mean(dim=1)


def received_saliency(query_FHnK: Tensor, key_FHnK: Tensor, scale: float, num_prefix: int) -> Tensor:
    """Attention that a patch receives from all patches, ``mean_h mean_i softmax(q_i K^T scale)``: (F, N).

    Prefix tokens take part as keys, where the patches' attention goes, but not as queries. The mean over queries is
    summed up a chunk of them at a time.
    """
    with torch.no_grad(), torch.autocast(key_FHnK.device.type, enabled=False):
        key_FHKn = key_FHnK.float().transpose(-2, -1)
        num_frames, heads, _, total = key_FHKn.shape
        queries = query_FHnK[:, :, num_prefix:]
        sum_Fn = key_FHKn.new_zeros(num_frames, total)
        for query_FHcK in queries.split(max(1, LARGEST // max(1, num_frames * heads * total)), dim=2):
            sum_Fn += (query_FHcK.float() * scale @ key_FHKn).softmax(dim=-1).sum(dim=(1, 2))
        return sum_Fn[:, num_prefix:] / (heads * queries.shape[2])


def fold_probe(query_HK: Tensor, key_weight_HKE: Tensor, norm_weight_E: Tensor | None) -> Tensor:
    """Fold an attention-pooling head's query, its key projection and the norm before it into one vector per head.

    ``q . (W (g * x + b) + c) / sqrt(K) = ((W^T q / sqrt(K)) * g) . x + a number``, and softmax does not see the number.

    Args:
        query_HK: the projected probe.
        key_weight_HKE: the key projection's weight.
        norm_weight_E: g, the weight of the layer norm before the head; None without one.

    Returns:
        (H, E) float32.
    """
    probe_HE = torch.einsum("hk,hke->he", query_HK.detach().float(), key_weight_HKE.detach().float())
    probe_HE = probe_HE * query_HK.shape[-1] ** -0.5
    return probe_HE if norm_weight_E is None else probe_HE * norm_weight_E.detach().float()


def probe_saliency(tokens_FNE: Tensor, probe_HE: Tensor | None, norm_eps: float | None) -> Tensor:
    """Attention of an attention-pooling head's probe to every patch, mean over heads: (F, N).

    Args:
        tokens_FNE: a block's output.
        probe_HE: from `fold_probe`, kept since `Encoder.prepare`.
        norm_eps: of the layer norm before the head; None without one.
    """
    assert probe_HE is not None, "prepared for it"
    with torch.no_grad(), torch.autocast(tokens_FNE.device.type, enabled=False):
        tokens_FNE = tokens_FNE.float()
        if norm_eps is not None:
            tokens_FNE = nn.functional.layer_norm(tokens_FNE, tokens_FNE.shape[-1:], eps=norm_eps)
        return (tokens_FNE @ probe_HE.float().T).softmax(dim=1).mean(dim=2)


def fill_attention(taps: Taps, query_FHnK: Tensor, key_FHnK: Tensor, scale: float, num_prefix: int) -> None:
    """Fill in what follows from the queries and keys of the block that is read."""
    saliencies = {"class_token": class_token_saliency, "received": received_saliency}
    if measure := saliencies.get(taps.asks.saliency or ""):
        taps.saliency_FN = measure(query_FHnK.detach(), key_FHnK.detach(), scale, num_prefix)
    if taps.asks.keys:
        taps.keys_FNK = key_FHnK.detach()[:, :, num_prefix:].mean(dim=1)
