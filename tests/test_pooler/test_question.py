"""Poolers that know the question know nothing else of the text, and know it alike in training and in answering."""

from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.batch import VISUAL_MARK, asked_visuals, prompts_for
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.encoder import TransformersEncoder
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import (
    LlavaMiniPooler,
    PrumergePlusPooler,
    PrumergePooler,
    QueccPooler,
    SmsPooler,
    VisionzipPooler,
)
from lightning_crosslmm.visuals import questions_of
from tests.arms import CLOSE, generated, logits
from tests.test_model.test_generation import with_answers
from tests.tiny import tiny_batch, tiny_encoder, tiny_model

SAMPLES = (
    ["look", 3, "and", 1, "what?", "=cat", "and?", 2, "=dog"],
    ["nothing to see", "=ok"],
    [2, "where?", "=left", "now?", "=up"],
)
BATCH = tiny_batch(*SAMPLES)
MAKE = {
    "quecc": lambda: QueccPooler(2, heads=4),
    "llava_mini": lambda: LlavaMiniPooler(2, heads=4, fusion_layers=2, fusion_heads=4),
}
every_reader = pytest.mark.parametrize("name", list(MAKE))


def model_with(name, **settings):
    torch.manual_seed(0)
    model = tiny_model(pooler=MAKE[name](), **settings)
    with torch.no_grad():
        for parameter in model.pooler.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def visuals_of(model, batch):
    with torch.no_grad():
        return model.encode(batch, questions_of(batch, model.llm, model.pooler.needs))


def changed(batch, places):
    """Say something else in some places of the text, marks apart."""
    ids_L = batch.ids_L.clone()
    ids_L[places] = (ids_L[places] + 1) % 256
    return replace(batch, ids_L=ids_L, labels_L=torch.where(batch.labels_L >= 0, ids_L, batch.labels_L))


def first_answers(batch):
    """(B,) where the first answer of each sample begins."""
    starts = zip(batch.text_offsets[:-1].tolist(), batch.text_offsets[1:].tolist(), strict=True)
    return [start + int((batch.answer_L[start:end] >= 0).nonzero()[0]) for start, end in starts]


@every_reader
def test_no_answer_and_no_later_turn_is_seen(name):
    model, later_L = model_with(name), torch.zeros_like(BATCH.ids_L, dtype=torch.bool)
    for first, end in zip(first_answers(BATCH), BATCH.text_offsets[1:].tolist(), strict=True):
        later_L[first:end] = True
    other = changed(BATCH, later_L & (BATCH.ids_L != VISUAL_MARK))
    assert not torch.equal(other.ids_L, BATCH.ids_L)
    seen, again = visuals_of(model, BATCH), visuals_of(model, other)
    assert torch.equal(seen.pooled.features_SD, again.pooled.features_SD)
    if name == "llava_mini":
        assert torch.equal(seen.question_QD, again.question_QD)


@every_reader
def test_the_question_is_seen(name):
    model, first = model_with(name), first_answers(BATCH)[2]
    seen, again = visuals_of(model, BATCH), visuals_of(model, changed(BATCH, [first - 1]))
    rows_of = {"quecc": lambda v: v.pooled.features_SD, "llava_mini": lambda v: v.question_QD}[name]
    moved = (rows_of(seen) != rows_of(again)).any(dim=1).nonzero().flatten()
    count = {"quecc": 8, "llava_mini": 1}[name]  # two frames of four tokens; the last token of "where?"
    assert moved.tolist() == list(range(len(rows_of(seen)) - count, len(rows_of(seen))))


@every_reader
@pytest.mark.parametrize("arm", [{}, {"v2v": False, "t2v": False}], ids=["crosslmm", "none"])
def test_answering_sees_what_training_saw(name, arm):
    """All turns: each answer's prompt gives the logits that the whole conversation gave there."""
    model = model_with(name, **arm)
    prompts = prompts_for(BATCH, range(5))
    _, steps_RZW = generated(model, prompts, count=6)
    output = model(BATCH)
    first_Y = torch.cat([torch.tensor([True]), output.answer_Y.diff() != 0])
    torch.testing.assert_close(steps_RZW[:, 0], output.logits_YW[first_Y].detach(), **CLOSE)
    first_turns = prompts_for(BATCH, [0, 2, 3])
    rows, steps_RZW = generated(model, first_turns, count=6)
    torch.testing.assert_close(steps_RZW.flatten(0, 1), logits(model, with_answers(first_turns, rows)), **CLOSE)


@every_reader
def test_packed_neighbours_change_nothing(name):
    model = model_with(name)
    torch.testing.assert_close(logits(model, tiny_batch(*SAMPLES, rows=[0, 0, 1])), logits(model, BATCH), **CLOSE)


def test_visuals_of_later_turns_are_told_apart():
    assert asked_visuals(BATCH).tolist() == [True, True, False, True]
    assert asked_visuals(prompts_for(BATCH, [1, 0])).tolist() == [True, True, False, True, True]


def test_a_visual_of_a_later_turn_does_not_reach_the_first_question():
    model = model_with("llava_mini")
    frames_FCHW = BATCH.frames_FCHW.clone()
    frames_FCHW[4:6] = 255 - frames_FCHW[4:6]
    seen, again = visuals_of(model, BATCH), visuals_of(model, replace(BATCH, frames_FCHW=frames_FCHW))
    assert torch.equal(seen.question_QD, again.question_QD)
    assert not torch.equal(seen.pooled.features_SD, again.pooled.features_SD)


@every_reader
def test_batches_without_a_question_or_a_picture(name):
    model = model_with(name)
    silent = tiny_batch([2, "=so"], ["?", 1, "=a"])  # the first has no word before its answer
    assert logits(model, silent).isfinite().all()
    text = tiny_batch(["plain?", "=so"])
    answered = logits(model, text)
    model.train()
    torch.testing.assert_close(logits(model, text), answered, **CLOSE)  # a blank frame says nothing
    assert model.eval().generate(prompts_for(text, [0]), Greedy(3), stop_id=-1, pad_id=0)


def test_summaries_read_no_fused_layer():
    """The question is read by the LLM alone, so that V2V and T2V are not asked for visuals that are not there yet."""
    plain, fused = model_with("quecc", v2v=False, t2v=False), model_with("quecc")
    fused.llm.load_state_dict(plain.llm.state_dict(), strict=False)
    expected, found = (questions_of(BATCH, model.llm, model.pooler.needs).summary_BD for model in (plain, fused))
    torch.testing.assert_close(found, expected, **CLOSE)
    assert not found.requires_grad


SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 4}


@pytest.mark.parametrize("kind", [PrumergePooler, PrumergePlusPooler, VisionzipPooler, SmsPooler])
def test_a_class_token_that_is_not_there_is_refused_with_its_substitute(kind):
    siglip = TransformersEncoder({"model_type": "siglip_vision_model", **SHAPE}, 16)
    message = f"pooler {kind.__name__} needs saliency.class_token, encoder TransformersEncoder gives .*"
    with pytest.raises(UserError, match=message + "set pooler.saliency=(probe|received)"):
        tiny_model(pooler=kind(), encoder=siglip)
    for saliency in ("received", "probe"):
        siglip = TransformersEncoder({"model_type": "siglip_vision_model", **SHAPE}, 16)
        assert logits(tiny_model(pooler=kind(saliency), encoder=siglip), BATCH).isfinite().all()
    clip = TransformersEncoder({"model_type": "clip_vision_model", **SHAPE}, 16)
    assert logits(tiny_model(pooler=kind(), encoder=clip), BATCH).isfinite().all()


def test_a_layer_that_is_not_run_is_refused_when_the_model_is_built():
    with pytest.raises(UserError, match="pooler.layers has -1, block 2 of 3, but encoder.layer reads block 1"):
        tiny_model(pooler=QueccPooler(2, heads=4, layers=(-1,)), encoder=tiny_encoder(layer=-2))
