from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.fusion import Fusion
from lightning_crosslmm.llm import load_llm
from lightning_crosslmm.model import ROLES, CrossLMM
from lightning_crosslmm.pooler import AveragePooler, NoPooler
from lightning_crosslmm.projector import MLPProjector
from tests.arms import ARMS, BATCH, CLOSE, arms, logits
from tests.tiny import tiny_batch, tiny_encoder, tiny_model


def test_frame_scope_and_all_differ_only_where_there_is_more_than_one_frame():
    everything, frame = tiny_model(), tiny_model(scope="frame")
    several, single = tiny_batch([3, "?", "=a"]), tiny_batch([1, "?", "=a"])
    assert not torch.allclose(logits(everything, several), logits(frame, several))
    assert torch.equal(logits(everything, single), logits(frame, single))


def test_a_window_wide_enough_is_all():
    torch.testing.assert_close(
        logits(tiny_model(scope="window", window_frames=3), BATCH), logits(tiny_model(), BATCH), **CLOSE
    )


@pytest.mark.parametrize(
    "settings",
    [{"key_source": "encoder"}, {"placement": "before_layer"}, {"frame_time": "sinusoidal"}, {"share_kv": True}],
)
def test_switches_change_the_result(settings):
    assert not torch.allclose(logits(tiny_model(**settings), BATCH), logits(tiny_model(), BATCH))


def test_without_a_time_embedding_the_order_of_frames_is_the_llms_alone():
    model, timed = tiny_model(), tiny_model(frame_time="sinusoidal")
    later = replace(BATCH, frame_time_s_F=BATCH.frame_time_s_F * 2)
    assert torch.equal(logits(model, later), logits(model, BATCH))
    assert not torch.allclose(logits(timed, later), logits(timed, BATCH))


@pytest.mark.parametrize(("key_source", "width"), [("encoder", 16), ("projected", 32)])
def test_what_fusion_reads(key_source, width):
    model = tiny_model(key_source=key_source)
    visuals = model.encode(BATCH)
    assert visuals.source.features_SD.shape == (8 * 16, width)
    assert visuals.pooled.features_SD.shape == (8, 32)
    visuals.source.validate()
    visuals.pooled.validate()


def test_the_stage_of_the_pooler_matters_through_an_mlp():
    before, after = (tiny_model(pooler=AveragePooler(2, stage=f"{when}_projector")) for when in ("before", "after"))
    pooled = before.encode(BATCH).pooled.features_SD
    projected = after.encode(BATCH).pooled.features_SD
    assert pooled.shape == projected.shape and not torch.allclose(pooled, projected)
    tokens = after.encode(BATCH).source
    torch.testing.assert_close(
        projected, tokens.as_grid().unflatten(1, (2, 2)).unflatten(3, (2, 2)).mean((2, 4)).flatten(0, 2)
    )


def test_chunks_of_frames_change_nothing():
    whole = tiny_model()
    chunked = tiny_model(encoder=None)
    chunked.encoder.frames_per_chunk = 3
    torch.testing.assert_close(logits(chunked, BATCH), logits(whole, BATCH), **CLOSE)


def test_no_pooling_puts_every_token_into_the_llm():
    model = tiny_model(pooler=NoPooler())
    assert model.tokens_per_frame == 16
    assert model.prompt(tiny_batch([2, "?", "=a"])).embeds_RTD.shape == (1, 32 + 3, 32)


def test_too_many_frames_are_refused():
    model = tiny_model(pooler=NoPooler())
    with pytest.raises(UserError, match="sample 's0' has 6[0-9]+ tokens, the LLM's context is 512"):
        model(tiny_batch([40, "?", "=a"]))


@arms
def test_parameters_are_counted_by_role(arm):
    model = tiny_model(**ARMS[arm])
    counts = model.num_parameters()
    assert tuple(counts) == ROLES and sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["encoder"] == sum(p.numel() for p in model.encoder.parameters())
    assert counts["projector"] == sum(p.numel() for p in model.projector.parameters())
    assert counts["llm"] == sum(p.numel() for p in tiny_model(v2v=False, t2v=False).llm.parameters())
    is_bare = {"frame_time": "none", "v2v": True, "t2v": True} | ARMS[arm] == {
        "frame_time": "none",
        "v2v": False,
        "t2v": False,
    }
    assert (counts["fusion"] > 0) != is_bare


def test_a_grid_the_encoder_does_not_have_is_refused_when_built():
    with pytest.raises(UserError, match="5x5 tokens per frame, the encoder gives 4x4"):
        tiny_model(pooler=AveragePooler(5))


def test_the_first_stage_trains_as_many_parameters_as_the_paper_says():
    conf = Path(__file__).parents[2] / "conf"
    encoder = yaml.safe_load((conf / "encoder/siglip2_so400m.yaml").read_text())
    llm = yaml.safe_load((conf / "llm/qwen2_5_1_5b.yaml").read_text())["model"]
    assert (encoder.pop("_target_").rsplit(".")[-1], llm.pop("_target_").rsplit(".")[-1]) == (
        "TransformersEncoder",
        "load_llm",
    )
    with torch.device("meta"):
        model = CrossLMM(
            TransformersEncoder(**encoder),
            AveragePooler(1),
            MLPProjector,
            Fusion(True, False, interval=4),
            load_llm(**llm),
        )
    counts = model.num_parameters()
    assert 42e6 < counts["projector"] + counts["fusion"] < 44e6  # Table 3: 43 M
    assert model.encoder.grid == (27, 27) and model.fused_layers == (0, 4, 8, 12, 16, 20, 24)


def test_an_encoder_of_the_users_own_width():
    model = tiny_model(encoder=tiny_encoder(config={"embed_dim": 24}))
    assert model.projector[1].in_features == 24 and torch.isfinite(logits(model, BATCH)).all()


@pytest.mark.parametrize("key_source", ["encoder", "projected"])
@pytest.mark.parametrize("width", [16, 32], ids=["own width", "the LLM's width"])
def test_what_fusion_reads_carries_the_time(key_source, width):
    encoder = tiny_encoder(config={"embed_dim": width})
    model = tiny_model(encoder=encoder, key_source=key_source, frame_time="sinusoidal")
    later = replace(BATCH, frame_time_s_F=BATCH.frame_time_s_F + 0.3)
    now, then = (model.encode(batch) for batch in (BATCH, later))
    assert not torch.allclose(now.source.features_SD, then.source.features_SD)
    assert not torch.allclose(now.pooled.features_SD, then.pooled.features_SD)


class AsksForAClassToken(NoPooler):
    """A pooler that no encoder here can serve."""

    needs = frozenset({"grid", "class token"})


def test_an_ask_that_the_encoder_cannot_meet_names_both():
    with pytest.raises(
        UserError, match=r"pooler AsksForAClassToken needs class token, encoder TimmEncoder gives .*grid"
    ):
        tiny_model(pooler=AsksForAClassToken())
