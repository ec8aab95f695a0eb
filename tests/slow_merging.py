"""Merging inside a tower, straight from the formulas: one frame at a time, lists and loops, no masks and no padding."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lightning_crosslmm.tokens import TokenSet


@dataclass
class Token:
    """What a frame's sequence holds: features, how many patches, which of them; none in prefix tokens."""

    x_E: Tensor
    patches: list[int] = field(default_factory=list)

    @property
    def mass(self) -> int:
        return max(1, len(self.patches))


Take = Callable[[list[float], int], list[int]]  # scores of the edges, tokens that are left -> edges that are taken


def best(count: int) -> Take:
    """Take so many edges, at most half of the tokens."""
    return lambda scores, left: sorted(range(len(scores)), key=lambda e: -scores[e])[: min(count, left // 2)]


def above(threshold: float) -> Take:
    """Take the edges above a threshold, at most half of the tokens."""
    return lambda scores, left: [edge for edge in best(left)(scores, left) if scores[edge] > threshold]


def merge(
    tokens: list[Token],
    keys: list[Tensor],
    take: Take,
    prefix: int,
    by_similarity: bool,
    penalty: list[float] | None = None,
) -> tuple[list[Token], list[Tensor], list[float] | None]:
    """Let even places move into their most similar odd place."""
    places = range(prefix, len(tokens))
    a_side, b_side = [p for p in places if p % 2 == 0], [p for p in places if p % 2 == 1]
    scores, partners = [], []
    for a in a_side if b_side else []:
        cosines = [float(torch.nn.functional.cosine_similarity(keys[a], keys[b], dim=0)) for b in b_side]
        partners.append(b_side[max(range(len(b_side)), key=lambda i: cosines[i])])
        scores.append(max(cosines) - (0.0 if penalty is None else penalty[a]))
    taken = take(scores, len(places))
    if not taken:
        return tokens, keys, penalty
    stay = [edge for edge in range(len(a_side)) if edge not in taken]
    stay = sorted(stay, key=lambda e: -scores[e]) if by_similarity else stay
    result = [(tokens[p], keys[p], penalty and penalty[p]) for p in [*range(prefix), *(a_side[edge] for edge in stay)]]
    for b in b_side:
        group = [b, *(a_side[edge] for edge in taken if partners[edge] == b)]
        total = sum(tokens[p].mass for p in group)
        x_E = sum(tokens[p].mass * tokens[p].x_E for p in group) / total
        key = sum(tokens[p].mass * keys[p] for p in group) / total
        mean = penalty and sum(penalty[p] for p in group) / len(group)
        result.append((Token(x_E, [patch for p in group for patch in tokens[p].patches]), key, mean))
    merged, keys_, penalties = zip(*result, strict=True)
    return list(merged), list(keys_), None if penalty is None else list(penalties)


def heads(block, tokens: list[Token]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values (H, n, K) of timm's plain block."""
    x_nE = torch.stack([token.x_E for token in tokens])
    qkv = block.attn.qkv(block.norm1(x_nE)).view(len(tokens), 3, block.attn.num_heads, -1)
    return tuple(qkv[:, i].transpose(0, 1) for i in range(3))


def through_tower(encoder, frame_CHW: Tensor, after_attention, proportional: bool) -> list[Token]:
    """Run one frame; ``after_attention(block, tokens, keys, class row)`` gives the tokens that go on."""
    tower = encoder.tower
    pixels = encoder.normalise(frame_CHW[None])
    embedded = tower.norm_pre(tower._pos_embed(tower.patch_embed(pixels)))[0]
    prefix = encoder.num_prefix
    tokens = [Token(x_E, [] if p < prefix else [p - prefix]) for p, x_E in enumerate(embedded)]
    for number, block in enumerate(tower.blocks):
        query, key, value = heads(block, tokens)
        logits = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
        if proportional:
            logits = logits + torch.tensor([math.log(token.mass) for token in tokens], dtype=logits.dtype)
        weights = logits.softmax(dim=-1)
        update = block.attn.proj((weights @ value).transpose(0, 1).flatten(1))
        tokens = [Token(token.x_E + update[p], token.patches) for p, token in enumerate(tokens)]
        tokens = after_attention(number, tokens, list(key.mean(dim=0)), weights.mean(dim=0)[0].tolist())
        tokens = [Token(token.x_E + block.mlp(block.norm2(token.x_E)), token.patches) for token in tokens]
    return [Token(tower.norm(token.x_E), token.patches) for token in tokens[prefix:]]


def assert_agree(pooled, slow: list[list[Token]], tolerance: float) -> None:
    """Compare a set in merged order with the slow tokens of each frame."""
    assert pooled.frame_offsets.diff().tolist() == [len(frame) for frame in slow]
    tokens = [token for frame in slow for token in frame]
    assert pooled.mass_S.tolist() == [token.mass for token in tokens]
    patches = sum(token.mass for token in slow[0])
    table, before = [-1] * (patches * len(slow)), 0
    for frame, found in enumerate(slow):
        for number, token in enumerate(found):
            for patch in token.patches:
                table[frame * patches + patch] = before + number
        before += len(found)
    assert pooled.source_map.pooled_of_source_S.tolist() == table
    torch.testing.assert_close(pooled.features_SD, torch.stack([token.x_E for token in tokens]), rtol=0, atol=tolerance)


def in_tower(pooler, encoder, frames_FCHW: Tensor, frames_of_visual=None, chunk: int = 99):
    """Let a pooler act in a tower, as the model does: (pooled, source)."""
    pooler.enter(encoder.facts())
    if not list(pooler.parameters()):
        pooler.connect(encoder.width, 32, encoder.grid)
    chunks = frames_FCHW.split(chunk)
    hooks = [pooler.hook() for _ in chunks]
    outputs = [encoder(chunk, hook=hook) for chunk, hook in zip(chunks, hooks, strict=True)]
    count, (rows, columns) = len(frames_FCHW), encoder.grid
    counts = [count] if frames_of_visual is None else frames_of_visual
    patches = TokenSet.from_grid(
        outputs[0].new_empty(count, rows * columns, 0),
        encoder.grid,
        torch.tensor([0, *counts]).cumsum(0),
        torch.arange(len(counts)),
        torch.zeros(count),
    )
    return pooler.collect(hooks, outputs, patches)


FRAMES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASS = {"config": {"class_token": True, "global_pool": "token"}}
REGISTERS = {"config": {"class_token": True, "reg_tokens": 2, "global_pool": "token"}}
towers = pytest.mark.parametrize("tower", [{}, CLASS, REGISTERS], ids=["patches", "class", "class and registers"])
