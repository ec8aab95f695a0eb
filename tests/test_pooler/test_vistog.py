"""VisToG: patches stay untouched, grouping is the formula, noise resumes."""

import math

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import VistogPooler
from lightning_crosslmm.tokens import Partition, Weighted
from tests.slow_merging import CLASS, FRAMES, REGISTERS, Token, heads, in_tower, towers
from tests.tiny import tiny_batch, tiny_encoder, tiny_model

BATCH = tiny_batch(["see", 3, "and", 1, "what?", "=cat"])


def slow_groups(encoder, pooler, frame_CHW):
    """Run patches and groups as one sequence with a mask, and group with loops."""
    tower, prefix = encoder.tower, encoder.num_prefix
    embedded = tower._pos_embed(tower.patch_embed(encoder.normalise(frame_CHW[None])))[0]
    own, groups = len(embedded), len(pooler.group_GE)
    x_nE = torch.cat([embedded, pooler.group_GE])
    for block in tower.blocks:
        query, key, value = heads(block, [Token(x_E) for x_E in x_nE])
        logits = query @ key.transpose(1, 2) / math.sqrt(key.shape[-1])
        logits[:, :own, own:] = -math.inf
        x_nE = x_nE + block.attn.proj((logits.softmax(-1) @ value).transpose(0, 1).flatten(1))
        x_nE = x_nE + block.mlp(block.norm2(x_nE))
    x_nE = tower.norm(x_nE)
    patches, tokens = x_nE[prefix:own], x_nE[own:]
    normed = pooler.patch_norm(patches)
    scores = pooler.query(pooler.group_norm(tokens)) @ pooler.key(normed).T / math.sqrt(x_nE.shape[-1])
    shares = (scores / pooler.temperature).softmax(dim=0)
    found = []
    for group in range(groups):
        total, weight = torch.zeros_like(x_nE[0]), 0.0
        for patch in range(len(patches)):
            share = shares[group, patch]
            if pooler.assignment == "hard":
                share = float(int(shares[:, patch].argmax()) == group)
            total, weight = total + share * pooler.value(normed)[patch], weight + share
        found.append(tokens[group] + pooler.out(total / (weight + pooler.epsilon)))
    return torch.stack(found), patches


@towers
@pytest.mark.parametrize("assignment", ["hard", "soft"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-6)])  # logits are float32
def test_it_is_the_formula(tower, assignment, dtype, tolerance):
    torch.manual_seed(0)
    encoder, pooler = tiny_encoder(**tower).to(dtype).eval(), VistogPooler(3, assignment, temperature=0.5, epsilon=0.7)
    pooler.connect(encoder.width, 32, encoder.grid)
    torch.nn.init.normal_(pooler.group_GE)
    pooler.to(dtype).eval()
    with torch.no_grad():
        pooled, source = in_tower(pooler, encoder, FRAMES)
        slow = [slow_groups(encoder, pooler, frame_CHW) for frame_CHW in FRAMES]
    torch.testing.assert_close(pooled.features_SD, torch.cat([groups for groups, _ in slow]), rtol=0, atol=tolerance)
    torch.testing.assert_close(source.features_SD, torch.cat([patches for _, patches in slow]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("tower", [{}, CLASS, REGISTERS])
def test_patches_are_the_plain_towers_to_the_last_bit(tower):
    encoder = tiny_encoder(**tower).eval()
    _, source = in_tower(VistogPooler(5), encoder, FRAMES)
    assert torch.equal(source.features_SD, encoder(FRAMES).flatten(0, 1))
    assert source.grid == (4, 4)


def test_hard_groups_are_a_partition_with_centroids_and_soft_ones_share():
    torch.manual_seed(0)
    encoder = tiny_encoder().eval()
    hard, source = in_tower(VistogPooler(8).eval(), encoder, FRAMES)
    hard.validate()
    assert isinstance(hard.source_map, Partition) and (hard.source_map.pooled_of_source_S >= 0).all()
    for group in range(hard.num_tokens):
        inside = hard.source_map.pooled_of_source_S == group
        assert hard.mass_S[group] == inside.sum()
        place_3 = source.coordinate_S3[inside].mean(dim=0) if inside.any() else torch.tensor([group // 8, 1.5, 1.5])
        torch.testing.assert_close(hard.coordinate_S3[group], place_3)
    assert (hard.mass_S == 0).any()  # some group found nothing, and its token is there all the same
    soft, _ = in_tower(VistogPooler(8, "soft").eval(), encoder, FRAMES)
    soft.validate()
    assert isinstance(soft.source_map, Weighted)
    torch.testing.assert_close(soft.mass_S.view(3, 8).sum(dim=1), torch.full((3,), 16.0))
    everywhere = soft.source_map.apply(torch.ones(source.num_tokens, 1))
    torch.testing.assert_close(everywhere, torch.ones(soft.num_tokens, 1))


def test_the_gradient_passes_through_the_hard_choice_and_reaches_the_tower_and_the_groups():
    model = tiny_model(pooler=VistogPooler(3)).train()
    model(BATCH).logits_YW.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    for part in ("group_GE", "query.weight", "key.weight", "value.weight", "out.weight"):
        assert model.pooler.get_parameter(part).grad.any(), part


def draws_of(pooler, count):
    return [pooler._gumbel(torch.zeros(2, 3, 4)) for _ in range(count)]


def test_noise_is_drawn_in_training_alone_and_never_twice_the_same():
    model = tiny_model(pooler=VistogPooler(3)).train()
    one, other = (model.encode(BATCH).pooled.features_SD for _ in range(2))
    assert not torch.equal(one, other)
    model.eval()
    assert torch.equal(model.encode(BATCH).pooled.features_SD, model.encode(BATCH).pooled.features_SD)
    still = tiny_model(pooler=VistogPooler(3, noise=False)).train()
    assert torch.equal(still.encode(BATCH).pooled.features_SD, still.encode(BATCH).pooled.features_SD)


def test_a_resumed_run_draws_what_the_whole_one_would_have():
    whole = VistogPooler(3, seed=5)
    before = draws_of(whole, 2)
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    after = draws_of(whole, 2)
    resumed = VistogPooler(3, seed=5)
    assert all(map(torch.equal, before, draws_of(resumed, 2)))
    torch.randn(7)  # what else is random does not matter
    draws_of(resumed, 3)
    resumed.load_state_dict(state)
    assert all(map(torch.equal, after, draws_of(resumed, 2)))
    assert not torch.equal(before[0], draws_of(VistogPooler(3, seed=6), 1)[0])


def test_noise_is_gumbels():
    noise = VistogPooler(3)._gumbel(torch.zeros(200_000))
    assert abs(noise.mean() - 0.5772) < 0.01 and abs(noise.var() - math.pi**2 / 6) < 0.03


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tokens": 0}, "pooler.num_tokens is 0, the encoder gives 4x4 patches per frame; it must be 1 to 16"),
        ({"num_tokens": 17}, "pooler.num_tokens is 17"),
        ({"num_tokens": 2, "assignment": "hart"}, "pooler.assignment is 'hart'; right are hard, soft; did .*'hard'"),
        ({"num_tokens": 2, "temperature": 0.0}, "pooler.temperature 0.0 must be above 0"),
        ({"num_tokens": 2, "epsilon": -1.0}, "pooler.epsilon -1.0 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        tiny_model(pooler=VistogPooler(**settings))


def test_without_epsilon_an_empty_group_is_finite():
    pooler = VistogPooler(16, epsilon=0.0)
    assert in_tower(pooler, tiny_encoder().eval(), FRAMES)[0].features_SD.isfinite().all()
