"""What holds for every pooler that acts in the encoder, with every fusion arm."""

import pytest
import torch

from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.looks import attention_maps
from lightning_crosslmm.pooler import DymuPooler, FolderPooler, TomePooler, VistogPooler
from lightning_crosslmm.tokens import Partition
from tests.slow_merging import FRAMES, in_tower
from tests.tiny import tiny_batch, tiny_encoder, tiny_model

CASES = {
    "tome": lambda: TomePooler(3),
    "tome, merged order, no proportions": lambda: TomePooler(3, proportional=False, order="merged"),
    "dymu": lambda: DymuPooler(0.4),
    "dymu, nothing": lambda: DymuPooler(1.0),
    "folder": lambda: FolderPooler(3, "in_encoder"),
    "vistog": lambda: VistogPooler(3, noise=False),
    "vistog, soft": lambda: VistogPooler(3, "soft", noise=False),
}
ARMS = {
    "crosslmm": {},
    "frame": {"scope": "frame"},
    "encoder": {"key_source": "encoder", "frame_time": "sinusoidal"},
    "none": {"v2v": False, "t2v": False},
}
CLOSE = {"rtol": 0, "atol": 2e-5}
every_case = pytest.mark.parametrize("name", list(CASES))
every_arm = pytest.mark.parametrize("arm", list(ARMS))
BATCH = tiny_batch(["look", 3, "and", 1, "what?", "=cat", "and?", 2, "=dog"], ["nothing", "=ok"], [2, "?", "=z"])


def model_of(name, arm="crosslmm", **settings):
    return tiny_model(pooler=CASES[name](), **ARMS[arm], **settings)


def pooler_of(name):
    torch.manual_seed(0)
    return CASES[name]().eval()


@every_case
def test_the_contract_holds(name):
    model = model_of(name)
    model.checks_pooler = True
    pooled = model.encode(BATCH).pooled
    assert pooled.num_frames == 8 and pooled.sample_of_visual.tolist() == [0, 0, 0, 2]
    promised = model.pooler.tokens_per_frame((4, 4))
    assert promised is None or pooled.frame_offsets.diff().tolist() == [promised] * 8


@every_case
@pytest.mark.parametrize("chunk", [1, 2])
def test_a_frame_gets_the_same_alone_and_in_any_company(name, chunk):
    encoder, pooler = tiny_encoder().eval(), pooler_of(name)
    together, _ = in_tower(pooler, encoder, FRAMES)
    cut, _ = in_tower(pooler, encoder, FRAMES, chunk=chunk)
    order = [2, 0, 1]
    turned, _ = in_tower(pooler, encoder, FRAMES[order])
    torch.testing.assert_close(cut.features_SD, together.features_SD, **CLOSE)
    assert cut.frame_offsets.tolist() == together.frame_offsets.tolist()
    torch.testing.assert_close(cut.coordinate_S3, together.coordinate_S3, **CLOSE)
    parts = [together.features_SD.tensor_split(together.frame_offsets[1:-1])[frame] for frame in order]
    torch.testing.assert_close(turned.features_SD, torch.cat(parts), **CLOSE)


@every_case
def test_masses_and_centroids_are_those_of_the_map(name):
    encoder = tiny_encoder().eval()
    pooled, _ = in_tower(pooler_of(name), encoder, FRAMES)
    assert torch.allclose(pooled.mass_S.sum(), torch.tensor(48.0))
    if isinstance(pooled.source_map, Partition):
        table_S = pooled.source_map.pooled_of_source_S
        assert (table_S >= 0).all()
        assert pooled.mass_S.tolist() == torch.bincount(table_S, minlength=pooled.num_tokens).tolist()
        places_S3 = torch.tensor([[frame, y, x] for frame in range(3) for y in range(4) for x in range(4)]).float()
        sums_S3 = torch.zeros(pooled.num_tokens, 3).index_add(0, table_S, places_S3)
        full_S = pooled.mass_S > 0
        torch.testing.assert_close(
            pooled.coordinate_S3[full_S], sums_S3[full_S] / pooled.mass_S[full_S, None], rtol=1e-6, atol=1e-6
        )


@every_case
@every_arm
def test_gradients_are_finite_and_reach_every_parameter(name, arm):
    model = model_of(name, arm).train()
    model(BATCH).logits_YW.square().mean().backward()
    for of, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), of


@every_case
def test_checkpointing_gives_the_same_gradients(name):
    def gradients(checkpointed):
        model = model_of(name).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(BATCH).logits_YW.square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@every_case
@every_arm
def test_a_sample_is_answered_the_same_alone(name, arm):
    model = model_of(name, arm)
    together = tiny_batch(["look", 3, "what?"], [1, "?", "=x", "more", 2])
    alone = tiny_batch(["look", 3, "what?"])
    with torch.no_grad():
        answers = model.generate(together, Greedy(4), stop_id=9999, pad_id=0)
        assert model.generate(alone, Greedy(4), stop_id=9999, pad_id=0) == answers[:1]


@every_case
def test_a_batch_without_visuals_trains_every_parameter_with_nothing(name):
    model = model_of(name).train()
    model(tiny_batch(["nothing", "=ok"])).logits_YW.sum().backward()
    for of, parameter in model.named_parameters():
        assert parameter.grad is not None, of
        if of.startswith(("encoder", "pooler")):
            assert not parameter.grad.any(), of


@every_case
def test_where_the_model_looked_is_told_in_patches(name):
    model = model_of(name)
    first, second = attention_maps(model, tiny_batch(["look", 3, "what?"], [1, "and", 2, "?"]))
    for found, frames in ((first, 3), (second, 3)):
        assert found["t2v"].shape == (frames, 4, 4)
        torch.testing.assert_close(found["t2v"].sum(), torch.tensor(1.0))


def test_bfloat16_weights():
    for name in CASES:
        model = model_of(name).bfloat16()
        assert model(BATCH).logits_YW.isfinite().all(), name


def test_merged_tokens_share_their_heat():
    model = tiny_model(pooler=TomePooler(5))
    prompts = tiny_batch([1, "what?"])
    (found,) = attention_maps(model, prompts)
    table_N = model.encode(prompts).source.source_map.pooled_of_source_S
    for token in range(int(table_N.max()) + 1):
        inside = found["t2v"].flatten()[table_N == token]
        assert (inside == inside[0]).all()
