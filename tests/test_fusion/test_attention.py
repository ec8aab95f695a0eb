import logging

import pytest
import torch
from torch.nn.functional import softmax

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Spans, choose_backend, cross_attention
from lightning_crosslmm.fusion.attention import attention_weights

HAS_CUDA = torch.cuda.is_available()
on_cuda = pytest.mark.skipif(not HAS_CUDA, reason="this backend runs on CUDA only, and there is none here")

# (queries, first key, last key + 1) of each group, over 24 keys
GROUPS = {
    "one": [(5, 0, 24)],
    "one from the middle": [(3, 7, 9)],
    "in a row": [(2, 0, 8), (2, 8, 16), (2, 16, 24)],
    "ragged": [(1, 0, 3), (4, 3, 10), (2, 10, 24)],
    "ragged queries": [(1, 0, 8), (4, 8, 16), (2, 16, 24)],
    "overlapping, evenly spaced": [(2, 0, 12), (1, 4, 16), (3, 8, 20)],
    "growing": [(3, 0, 4), (1, 0, 12), (2, 0, 24)],
    "gaps": [(2, 1, 5), (2, 9, 13), (2, 20, 24)],
    "shared by all": [(2, 4, 20), (3, 4, 20)],
    "backwards": [(2, 16, 24), (3, 8, 16), (1, 0, 8)],
    "mixed sizes out of order": [(2, 0, 6), (1, 20, 24), (3, 6, 12), (2, 2, 6), (1, 14, 20)],
}
groups = pytest.mark.parametrize("name", list(GROUPS))


def spans_of(name):
    queries, start, end = zip(*GROUPS[name], strict=True)
    return Spans(torch.tensor([0, *queries]).cumsum(0), torch.tensor(start), torch.tensor(end))


def tensors(name, heads, kv_heads, dtype, device="cpu", width=8):
    torch.manual_seed(0)
    num_queries = sum(queries for queries, _, _ in GROUPS[name])
    shapes = [(num_queries, heads, width), (24, kv_heads, width), (24, kv_heads, width)]
    # the same numbers whatever the dtype
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in shapes]


def by_hand(query_QHK, key_SAK, value_SAK, spans):
    """One query and one head at a time, in the tensors' own dtype."""
    rows = []
    repeat = query_QHK.shape[1] // key_SAK.shape[1]
    for group in range(spans.num_groups):
        keys = slice(int(spans.key_start[group]), int(spans.key_end[group]))
        for query in range(int(spans.query_offsets[group]), int(spans.query_offsets[group + 1])):
            for head in range(query_QHK.shape[1]):
                scores_n = key_SAK[keys, head // repeat] @ query_QHK[query, head] / query_QHK.shape[-1] ** 0.5
                rows.append(softmax(scores_n, dim=0) @ value_SAK[keys, head // repeat])
    return torch.stack(rows).view(query_QHK.shape)


def outcome(function, name, heads, kv_heads, dtype, device="cpu", width=8):
    """The result and the three gradients, in double precision on the CPU."""
    inputs = tensors(name, heads, kv_heads, dtype, device, width)
    out_QHK = function(*inputs, spans_of(name))
    push_QHK = torch.randn(out_QHK.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out_QHK.backward(push_QHK.to(out_QHK))
    return [tensor.detach().cpu().double() for tensor in (out_QHK, *(each.grad for each in inputs))]


def backend(which):
    return lambda *inputs: cross_attention(*inputs, backend=which)


def worst(found, expected):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))


@groups
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
def test_sdpa_is_attention_by_hand(name, heads, kv_heads):
    exact = outcome(by_hand, name, heads, kv_heads, torch.float64)
    assert worst(outcome(backend("sdpa"), name, heads, kv_heads, torch.float64), exact) < 1e-13


@groups
@pytest.mark.parametrize("which", ["sdpa", "reference"])
def test_single_precision_loses_its_own_rounding_and_no_more(name, which):
    exact = outcome(by_hand, name, 4, 2, torch.float64)
    # measured: 7e-7 at most, over all of GROUPS, for values and gradients of order 1
    assert worst(outcome(backend(which), name, 4, 2, torch.float32), exact) < 3e-6


@on_cuda
@pytest.mark.gpu
@groups
@pytest.mark.parametrize("which", ["varlen", "xformers", "sdpa"])
def test_half_precision_backends_on_cuda(name, which):
    if which == "xformers":
        pytest.importorskip("xformers", reason="xformers is not installed")
    expected = outcome(backend("reference"), name, 4, 2, torch.bfloat16, "cuda", width=64)
    found = outcome(backend(which), name, 4, 2, torch.bfloat16, "cuda", width=64)
    # bfloat16 keeps 8 bits: 2^-8 of the largest value, with room for sums of 24 products
    assert worst(found, expected) < 0.05


@pytest.mark.skipif(HAS_CUDA, reason="they run here")
@pytest.mark.parametrize("which", ["varlen", "xformers"])
def test_backends_that_cannot_run_here_say_so(which):
    with pytest.raises(UserError, match=f"fusion.backend={which} needs CUDA .*; use fusion.backend=sdpa"):
        cross_attention(*tensors("one", 2, 2, torch.float32), spans_of("one"), backend=which)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UserError, match="fusion.backend is 'spda'; right are auto, sdpa, .* did you mean 'sdpa'"):
        cross_attention(*tensors("one", 2, 2, torch.float32), spans_of("one"), backend="spda")


def test_auto_is_chosen_by_device_and_logged_once(caplog):
    choose_backend.cache_clear()
    with caplog.at_level(logging.INFO, "lightning_crosslmm.fusion.attention"):
        assert [choose_backend("cpu", torch.bfloat16, 64) for _ in range(3)] == ["sdpa"] * 3
        assert choose_backend("cuda", torch.float32, 64) == "sdpa"
        assert choose_backend("cuda", torch.bfloat16, 64) == "varlen"
        assert choose_backend("cuda", torch.bfloat16, 12) == "sdpa"
        assert choose_backend("cuda", torch.bfloat16, 512) == "sdpa"
    assert len(caplog.records) == 5
    assert "sdpa (cpu, torch.bfloat16, 64 channels per head)" in caplog.text


def test_a_query_sees_its_range_and_nothing_else():
    query, key, value = tensors("ragged", 2, 2, torch.float64)
    spans = spans_of("ragged")
    before = cross_attention(query, key, value, spans)
    changed = value.detach().clone()
    changed[3:10] += 1
    moved_Q = (cross_attention(query, key, changed, spans) - before).abs().sum((1, 2)) > 1e-9
    assert moved_Q.tolist() == [False, True, True, True, True, False, False]


@groups
def test_pairs_are_counted(name):
    assert spans_of(name).num_pairs == sum(queries * (end - start) for queries, start, end in GROUPS[name])


@pytest.mark.parametrize("empty", [([0, 2, 2], [0, 1], [1, 2]), ([0, 1, 2], [0, 3], [1, 3])])
def test_an_empty_group_is_our_own_mistake(empty):
    spans = Spans(*(torch.tensor(column) for column in empty))
    with pytest.raises(ValueError, match="empty group"):
        spans.plan(torch.device("cpu"))


def test_a_plan_is_made_once():
    spans = spans_of("ragged")
    assert spans.plan(torch.device("cpu")) is spans.plan(torch.device("cpu"))


@groups
def test_weights_for_pictures(name):
    query, key, value = tensors(name, 4, 2, torch.float32)
    spans = spans_of(name)
    weights = attention_weights(query, key, spans)
    assert [tuple(w.shape) for w in weights] == [(queries, end - start) for queries, start, end in GROUPS[name]]
    for weights_qn in weights:
        torch.testing.assert_close(weights_qn.sum(1), torch.ones(len(weights_qn)), rtol=0, atol=1e-6)
    # with values that do not differ between heads, the mean over heads of the output is what the weights say
    same_SAK = value[:, :1].expand(-1, 2, -1)
    expected = [w @ value[start:end, 0] for w, (_, start, end) in zip(weights, GROUPS[name], strict=True)]
    out_QHK = cross_attention(query, key, same_SAK, spans)
    torch.testing.assert_close(out_QHK.mean(1), torch.cat(expected), rtol=0, atol=2e-6)
