"""Cross-attention from packed queries to ranges of packed keys: one function, several backends.

Query group g (consecutive queries) attends to keys ``[key_start[g], key_end[g])`` and to nothing else. Ranges may
overlap, so an interleaved conversation and a sliding window of frames need no mask, and neighbours in a packed row
cannot see each other.

Axis letters:
    Q  queries, all groups together    S  keys, all visuals together      G  groups
    H  query heads    A  key and value heads (A divides H)    K  channels per head
    g  groups of one bucket    q  most queries of a group in it    n  keys of each group in it
"""

import functools
import importlib.util
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.fusion.fastest import FASTEST

log = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "varlen", "xformers", "reference")


@dataclass(frozen=True)
class Spans:
    """Which keys each group of queries reads. No group is empty, and none reads an empty range.

    Args:
        query_offsets: (G+1,) int64 on the CPU, queries of group g are ``[g], [g+1]``.
        key_start: (G,) int64 on the CPU.
        key_end: (G,) int64 on the CPU, after `key_start`.
    """

    query_offsets: Tensor
    key_start: Tensor
    key_end: Tensor
    _plans: dict[torch.device, "_Plan"] = field(default_factory=dict, repr=False, compare=False)
    _repeated: dict[int, "Spans"] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_groups(self) -> int:
        """G."""
        return len(self.key_start)

    @property
    def num_pairs(self) -> int:
        """Query-key pairs that are scored: what attention FLOPs are counted from."""
        return int((self.query_offsets.diff() * (self.key_end - self.key_start)).sum())

    def repeated(self, times: int) -> "Spans":
        """Let `times` queries in a row stand for each one; made once and shared by all layers."""
        if times not in self._repeated:
            self._repeated[times] = Spans(self.query_offsets * times, self.key_start, self.key_end)
        return self._repeated[times]

    def plan(self, device: torch.device) -> "_Plan":
        """Index tensors for one device, made once and shared by all layers."""
        if device not in self._plans:
            self._plans[device] = _make_plan(self, device)
        return self._plans[device]


@dataclass(frozen=True)
class _Bucket:
    """Groups that read the same number of keys, so that one dense call without a mask serves them."""

    query_gq: Tensor  # packed query of each slot; short groups repeat their first query
    keep_gq: Tensor | None  # True where a slot is real; None where all are
    num_keys: int
    first_key: int
    step: int | None  # distance between the starts of neighbouring ranges, where it is constant
    key_gn: Tensor | None  # packed key of each slot, where it is not


@dataclass(frozen=True)
class _Plan:
    buckets: tuple[_Bucket, ...]
    cumulative_queries: Tensor  # int32
    cumulative_keys: Tensor  # int32
    key_index: Tensor | None  # gathers overlapping or gapped ranges one after the other; None where they lie so already
    most_queries: int
    most_keys: int
    query_lengths: list[int]
    key_lengths: list[int]


def _make_plan(spans: Spans, device: torch.device) -> _Plan:
    queries_G, keys_G = spans.query_offsets.diff(), spans.key_end - spans.key_start
    if (queries_G < 1).any() or (keys_G < 1).any():
        raise ValueError(f"empty group: queries {queries_G.tolist()}, keys {keys_G.tolist()}")
    buckets = [_make_bucket(spans, (keys_G == n).nonzero().flatten(), n, device) for n in keys_G.unique().tolist()]
    in_a_row = bool((spans.key_start[1:] == spans.key_end[:-1]).all()) and int(spans.key_start[0]) == 0
    ranges = list(zip(spans.key_start.tolist(), spans.key_end.tolist(), strict=True))
    index = None if in_a_row else torch.cat([torch.arange(start, end) for start, end in ranges]).to(device)
    zero = torch.zeros(1, dtype=torch.int64)
    return _Plan(
        buckets=tuple(buckets),
        cumulative_queries=spans.query_offsets.to(device, torch.int32),
        cumulative_keys=torch.cat([zero, keys_G.cumsum(0)]).to(device, torch.int32),
        key_index=index,
        most_queries=int(queries_G.max()),
        most_keys=int(keys_G.max()),
        query_lengths=queries_G.tolist(),
        key_lengths=keys_G.tolist(),
    )


def _make_bucket(spans: Spans, group_g: Tensor, num_keys: int, device: torch.device) -> _Bucket:
    first_g, count_g = spans.query_offsets[group_g], spans.query_offsets.diff()[group_g]
    slot_q = torch.arange(int(count_g.max()))
    keep_gq = slot_q < count_g[:, None]
    query_gq = torch.where(keep_gq, first_g[:, None] + slot_q, first_g[:, None])
    start_g = spans.key_start[group_g]
    steps = start_g.diff().unique()
    step = num_keys if len(group_g) == 1 else int(steps[0]) if len(steps) == 1 and steps[0] > 0 else None
    key_gn = None if step is not None else (start_g[:, None] + torch.arange(num_keys)).to(device)
    keep = None if bool(keep_gq.all()) else keep_gq.to(device)
    return _Bucket(query_gq.to(device), keep, num_keys, int(start_g[0]), step, key_gn)


def cross_attention(
    query_QHK: Tensor, key_SAK: Tensor, value_SAK: Tensor, spans: Spans, backend: str = "auto"
) -> Tensor:
    """Attend from each query to its group's range of keys: ``softmax(q k^T / sqrt(K)) v``.

    Source: CrossLMM, arXiv:2505.17020v1, Eqs. (6) and (9), the attention term.

    Args:
        query_QHK: packed queries, any float dtype.
        key_SAK: packed keys, same dtype and device.
        value_SAK: packed values, same shape as the keys.
        spans: which keys each group of queries reads; together the groups cover all Q queries.
        backend: ``sdpa`` (any device), ``varlen`` or ``xformers`` (CUDA, half precision), ``reference`` (plain,
            float32) or ``auto``.

    Returns:
        (Q, H, K), dtype of the queries.

    Raises:
        UserError: an unknown backend, or one that cannot run here; says which can.
    """
    if backend == "auto":
        backend = choose_backend(query_QHK.device.type, query_QHK.dtype, query_QHK.shape[-1])
    if backend not in _FUNCTIONS:
        raise UserError(f"fusion.backend is '{backend}'; right are {', '.join(BACKENDS)}{nearest(backend, BACKENDS)}")
    return _FUNCTIONS[backend](query_QHK, key_SAK, value_SAK, spans)


@functools.cache
def choose_backend(device_type: str, dtype: torch.dtype, head_width: int) -> str:
    """Choose what `auto` means for a device and dtype, and log it once.

    What `benchmarks/attention.py` found fastest on this device, where it was asked (`FASTEST`). Else, on the CPU, sdpa
    is the only one that runs. On CUDA the variable-length kernel reads ragged groups without padding; it takes half
    precision and heads of at most 256 channels that are a multiple of 8, anything else goes to sdpa.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    fits = device_type == "cuda" and half and head_width % 8 == 0 and head_width <= 256
    runs = {
        "sdpa",
        *(["varlen"] if fits and _has_varlen() else []),
        *(["xformers"] if fits and _has_xformers() else []),
    }
    measured = FASTEST.get((device_name(device_type), str(dtype).removeprefix("torch."), head_width))
    chosen = measured if measured in runs else "varlen" if "varlen" in runs else "sdpa"
    log.info("cross-attention backend: %s (%s, %s, %d channels per head)", chosen, device_type, dtype, head_width)
    return chosen


def device_name(device_type: str) -> str:
    """Name a kind of device as `FASTEST` does: ``cpu``, or what the GPU is called."""
    return torch.cuda.get_device_name() if device_type == "cuda" and torch.cuda.is_available() else device_type


def attention_weights(query_QHK: Tensor, key_SAK: Tensor, spans: Spans) -> list[Tensor]:
    """Give the weights themselves, averaged over heads, for pictures: one (queries, keys) float32 tensor per group."""
    return [weights_HQn.mean(dim=0) for weights_HQn, _ in _plain_weights(query_QHK, key_SAK, spans)]


def _plain_weights(query_QHK: Tensor, key_SAK: Tensor, spans: Spans) -> list[tuple[Tensor, slice]]:
    repeat = query_QHK.shape[1] // key_SAK.shape[1]
    found = []
    for group in range(spans.num_groups):
        queries = slice(int(spans.query_offsets[group]), int(spans.query_offsets[group + 1]))
        keys = slice(int(spans.key_start[group]), int(spans.key_end[group]))
        query_HQK = query_QHK[queries].transpose(0, 1).float()
        key_HnK = key_SAK[keys].repeat_interleave(repeat, dim=1).transpose(0, 1).float()
        scores_HQn = query_HQK @ key_HnK.transpose(1, 2) / query_QHK.shape[-1] ** 0.5
        found.append((scores_HQn.softmax(dim=-1), keys))
    return found


def _reference(query_QHK: Tensor, key_SAK: Tensor, value_SAK: Tensor, spans: Spans) -> Tensor:
    repeat = query_QHK.shape[1] // key_SAK.shape[1]
    out = [
        weights_HQn @ value_SAK[keys].repeat_interleave(repeat, dim=1).transpose(0, 1).float()
        for weights_HQn, keys in _plain_weights(query_QHK, key_SAK, spans)
    ]
    return torch.cat(out, dim=1).transpose(0, 1).to(query_QHK.dtype)


def _sdpa(query_QHK: Tensor, key_SAK: Tensor, value_SAK: Tensor, spans: Spans) -> Tensor:
    is_grouped = query_QHK.shape[1] != key_SAK.shape[1]
    buckets = spans.plan(query_QHK.device).buckets
    parts, places = [], []
    for bucket in buckets:
        out_gHqK = scaled_dot_product_attention(
            query_QHK[bucket.query_gq].transpose(1, 2),
            _ranges(key_SAK, bucket),
            _ranges(value_SAK, bucket),
            enable_gqa=is_grouped,
        )
        out_gqHK = out_gHqK.transpose(1, 2)
        keep = bucket.keep_gq
        parts.append(out_gqHK.flatten(0, 1) if keep is None else out_gqHK[keep])
        places.append(bucket.query_gq.flatten() if keep is None else bucket.query_gq[keep])
    if len(buckets) == 1:  # one bucket holds all groups in their order
        return parts[0]
    return torch.empty_like(query_QHK).index_copy(0, torch.cat(places), torch.cat(parts))


def _ranges(tensor_SAK: Tensor, bucket: _Bucket) -> Tensor:
    # evenly spaced ranges are a strided view, even where they overlap: nothing is copied
    if bucket.step is not None:
        groups = len(bucket.query_gq)
        end = bucket.first_key + bucket.step * (groups - 1) + bucket.num_keys
        return tensor_SAK[bucket.first_key : end].unfold(0, bucket.num_keys, bucket.step).permute(0, 1, 3, 2)
    return tensor_SAK[bucket.key_gn].transpose(1, 2)


def _varlen(query_QHK: Tensor, key_SAK: Tensor, value_SAK: Tensor, spans: Spans) -> Tensor:
    if query_QHK.device.type != "cuda" or not _has_varlen():
        raise UserError("fusion.backend=varlen needs CUDA and torch.nn.attention.varlen; use fusion.backend=sdpa")
    from torch.nn.attention.varlen import varlen_attn

    plan = spans.plan(query_QHK.device)
    key, value = (tensor if plan.key_index is None else tensor[plan.key_index] for tensor in (key_SAK, value_SAK))
    repeat = query_QHK.shape[1] // key.shape[1]
    if repeat > 1:  # the kernel's own grouping is younger than torch 2.11
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
    bounds = (plan.cumulative_queries, plan.cumulative_keys, plan.most_queries, plan.most_keys)
    attended_QHK: Any = varlen_attn(query_QHK.contiguous(), key.contiguous(), value.contiguous(), *bounds)
    return attended_QHK


def _xformers(query_QHK: Tensor, key_SAK: Tensor, value_SAK: Tensor, spans: Spans) -> Tensor:
    if query_QHK.device.type != "cuda" or not _has_xformers():
        raise UserError("fusion.backend=xformers needs CUDA and the xformers package (0.0.35); use fusion.backend=sdpa")
    from xformers.ops import fmha

    plan = spans.plan(query_QHK.device)
    key, value = (tensor if plan.key_index is None else tensor[plan.key_index] for tensor in (key_SAK, value_SAK))
    kv_heads, width = key.shape[1:]
    repeat = query_QHK.shape[1] // kv_heads
    bias = fmha.attn_bias.BlockDiagonalMask.from_seqlens(plan.query_lengths, plan.key_lengths)
    query_1QARK = query_QHK.view(1, -1, kv_heads, repeat, width)
    key_1nARK, value_1nARK = (t[None, :, :, None].expand(1, -1, kv_heads, repeat, width) for t in (key, value))
    out_1QARK = fmha.memory_efficient_attention(query_1QARK, key_1nARK, value_1nARK, attn_bias=bias)
    return out_1QARK.reshape(query_QHK.shape)


_FUNCTIONS = {"sdpa": _sdpa, "varlen": _varlen, "xformers": _xformers, "reference": _reference}


@functools.cache
def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


@functools.cache
def _has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None
