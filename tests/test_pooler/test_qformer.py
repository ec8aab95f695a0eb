import math

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import QFormerPooler
from tests.tiny import token_set

GRID, WIDTH, LLM_WIDTH = (2, 3), 5, 8


def built(*args, **settings):
    torch.manual_seed(0)
    pooler = QFormerPooler(*args, **{"width": 6, "depth": 3, "heads": 2, **settings})
    pooler.out_width = pooler.connect(WIDTH, LLM_WIDTH, GRID)
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return pooler.eval()


def linear(x, layer):
    return layer.weight @ x + layer.bias


def norm(x, layer):
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + 1e-12) * layer.weight + layer.bias


def attended(attention, asking, asked):
    heads = attention.heads
    queries, key_values = [linear(q, attention.query) for q in asking], [linear(x, attention.key_value) for x in asked]
    inner = len(queries[0])
    width = inner // heads
    results = []
    for query in queries:
        parts = []
        for cut in (slice(head * width, (head + 1) * width) for head in range(heads)):
            scores = torch.stack([query[cut] @ kv[:inner][cut] / math.sqrt(width) for kv in key_values])
            values = torch.stack([kv[inner:][cut] for kv in key_values])
            parts.append(torch.exp(scores) / torch.exp(scores).sum() @ values)
        results.append(linear(torch.cat(parts), attention.out))
    return results


def asked_of(pooler, frame_ND, cross_every):
    """One frame, query by query, norms after the residual."""
    queries = [norm(q, pooler.norm) for q in pooler.queries_MW]
    for number, layer in enumerate(pooler.layers):
        moved = attended(layer.among, queries, queries)
        queries = [norm(q + m, layer.among_norm) for q, m in zip(queries, moved, strict=True)]
        if number % cross_every == 0:
            moved = attended(layer.cross, queries, list(frame_ND))
            queries = [norm(q + m, layer.cross_norm) for q, m in zip(queries, moved, strict=True)]
        grow, _, shrink = layer.feed_forward
        hidden = [linear(q, grow) for q in queries]
        moved = [linear(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))), shrink) for h in hidden]
        queries = [norm(q + m, layer.feed_forward_norm) for q, m in zip(queries, moved, strict=True)]
    out = torch.stack(queries)
    return out if isinstance(pooler.project, torch.nn.Identity) else pooler.project(out)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("cross_every", [1, 2])
@pytest.mark.parametrize("stage", ["before_projector", "as_projector"])
def test_it_is_berts_layers_query_by_query(dtype, close, cross_every, stage):
    pooler = built(3, cross_every=cross_every, stage=stage).to(dtype)
    tokens = token_set((2, 1), GRID, WIDTH)
    tokens = tokens.with_features(tokens.features_SD.to(dtype))
    pooled = pooler(tokens)
    pooled.validate()
    expected = torch.cat([asked_of(pooler, frame, cross_every) for frame in tokens.features_SD.split(6)])
    torch.testing.assert_close(pooled.features_SD, expected, rtol=0, atol=close)
    assert pooled.features_SD.shape[1] == pooler.out_width == (LLM_WIDTH if stage == "as_projector" else 6)


def test_every_second_layer_looks_at_the_picture():
    assert [layer.cross is not None for layer in built(2, depth=5).layers] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: built(0), "QFormerPooler: pooler.num_tokens is 0"),
        (lambda: built(7).tokens_per_frame(GRID), "pooler.num_tokens is 7, .* 2x3 .* must be 1 to 6"),
        (lambda: built(2, heads=4), "pooler.width is 6 and pooler.heads 4; the heads must divide"),
        (lambda: built(2, cross_every=0), "pooler.cross_every is 0"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()
