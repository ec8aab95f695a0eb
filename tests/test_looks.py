from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.batch import prompts_for
from lightning_crosslmm.looks import attention_maps
from tests.tiny import tiny_batch, tiny_model

BATCH = tiny_batch(["look", 3, "and", 1, "what?", "=cat"], ["nothing?", "=ok"], [2, "?", "=z"])
PROMPTS = prompts_for(BATCH, [0, 1, 2])


def test_the_last_text_tokens_weights_sum_to_one():
    first, without, last = attention_maps(tiny_model(), PROMPTS)
    assert first["t2v"].shape == (4, 4, 4) and without["t2v"].shape == (0, 4, 4) and last["t2v"].shape == (2, 4, 4)
    for maps in (first, last):
        assert maps["t2v"].sum().item() == pytest.approx(1, abs=1e-5)
        assert maps["t2v"].dtype == torch.float32 and (maps["t2v"] > 0).all()


@pytest.mark.parametrize(
    ("settings", "sums"),
    [
        ({}, [[1], [1], [1]]),  # one group of queries per visual
        ({"scope": "frame"}, [[1, 1, 1], [1], [1, 1]]),
    ],
)
def test_pooled_tokens_weights_sum_to_one_per_visual_or_frame(settings, sums):
    first, without, last = attention_maps(tiny_model(**settings), PROMPTS)
    assert without["v2v"].shape == (0, 4, 4)
    per_frame = [*first["v2v"].sum((1, 2)).split([3, 1]), last["v2v"].sum((1, 2))]
    for found_F, expected in zip(per_frame, sums, strict=True):
        found = found_F if len(expected) > 1 else found_F.sum()[None]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_keys_that_do_not_differ_are_seen_alike():
    model = tiny_model(scope="frame")
    for number in model.fused_layers:
        for keys_values in model.llm.model.layers[number].fusion.keys_values.values():
            keys_values.k_proj.weight.data.zero_()
    first, _, last = attention_maps(model, PROMPTS)
    torch.testing.assert_close(first["v2v"], torch.full((4, 4, 4), 1 / 16))
    torch.testing.assert_close(first["t2v"], torch.full((4, 4, 4), 1 / 64))
    torch.testing.assert_close(last["t2v"], torch.full((2, 4, 4), 1 / 32))


def test_a_map_belongs_to_its_own_sample():
    model = tiny_model()
    together = attention_maps(model, PROMPTS)
    for number, maps in enumerate(together):
        (alone,) = attention_maps(model, prompts_for(BATCH, [number]))
        for name, expected in alone.items():
            torch.testing.assert_close(maps[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("v2v", "t2v", "names"), [(True, False, {"v2v"}), (False, True, {"t2v"}), (False, False, set())]
)
def test_only_the_branches_there_are(v2v, t2v, names):
    assert [set(maps) for maps in attention_maps(tiny_model(v2v=v2v, t2v=t2v), PROMPTS)] == [names] * 3


def test_prompts_without_visuals_show_nothing():
    assert attention_maps(tiny_model(), prompts_for(BATCH, [1])) == [{}]


@pytest.mark.parametrize("training", [True, False])
def test_looking_changes_neither_mode_nor_result(training):
    model = tiny_model().train(training)
    before = model(replace(BATCH)).logits_YW
    attention_maps(model, PROMPTS)
    assert model.training is training
    assert torch.equal(model(BATCH).logits_YW, before)
