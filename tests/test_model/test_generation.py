from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.batch import prompts_for
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import BilinearPooler
from tests.arms import ARMS, BATCH, CLOSE, arms, generated, logits
from tests.tiny import tiny_model


def with_answers(prompts, rows):
    """Put what was generated behind each prompt, as its answer."""
    ids, labels, answers = [], [], []
    for number, row in enumerate(rows):
        prompt = prompts.ids_L[prompts.text_offsets[number] : prompts.text_offsets[number + 1]]
        ids += [prompt, torch.tensor(row)]
        labels += [torch.full_like(prompt, -100), torch.tensor(row)]
        answers += [torch.full_like(prompt, -1), torch.full((len(row),), number)]
    lengths = [len(a) + len(b) for a, b in zip(ids[::2], ids[1::2], strict=True)]
    return replace(
        prompts,
        ids_L=torch.cat(ids),
        labels_L=torch.cat(labels),
        answer_L=torch.cat(answers),
        text_offsets=torch.tensor([0, *lengths]).cumsum(0),
        answer_kinds=("",) * len(rows),
        questions=("",) * len(rows),
    )


@arms
def test_cached_decoding_is_the_full_forward(arm):
    model = tiny_model(**ARMS[arm])
    prompts = prompts_for(BATCH, [0, 1, 2, 3])
    rows, steps_RZW = generated(model, prompts)
    full_YW = logits(model, with_answers(prompts, rows))
    torch.testing.assert_close(steps_RZW.flatten(0, 1), full_YW, **CLOSE)
    assert torch.equal(full_YW.argmax(-1), torch.tensor(rows).flatten())


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cached_decoding_for_every_llm(kind, attention):
    model = tiny_model(kind, attention, pooler=BilinearPooler(2, 1, stage="after_projector"))
    prompts = prompts_for(BATCH, [1, 2, 3])
    rows, steps_RZW = generated(model, prompts)
    torch.testing.assert_close(steps_RZW.flatten(0, 1), logits(model, with_answers(prompts, rows)), **CLOSE)


@arms
def test_samples_together_are_samples_alone(arm):
    model = tiny_model(**ARMS[arm])
    together = prompts_for(BATCH, [1, 2, 3])
    rows, steps_RZW = generated(model, together)
    for number, answer in enumerate([1, 2, 3]):
        alone_rows, alone_steps = generated(model, prompts_for(BATCH, [answer]))
        assert alone_rows[0] == rows[number]
        torch.testing.assert_close(alone_steps[0], steps_RZW[number], **CLOSE)


def test_t2v_keys_are_computed_once_per_answer():
    model = tiny_model()
    calls = []
    for number in model.fused_layers:
        for name, module in model.llm.model.layers[number].fusion.keys_values.items():
            module.register_forward_hook(lambda *_, key=(number, name): calls.append(key))
    rows, _ = generated(model, prompts_for(BATCH, [0]), count=12)
    assert len(rows[0]) == 12
    assert sorted(calls) == [(0, "t2v"), (0, "v2v"), (2, "t2v"), (2, "v2v")]


def test_the_stop_token_is_left_out_and_what_follows_it():
    model = tiny_model()
    prompts = prompts_for(BATCH, [0, 2, 3])
    rows, _ = generated(model, prompts)
    stop_id = rows[0][4]
    stopped, _ = generated(model, prompts, stop_id=stop_id)
    assert stopped == [row[: row.index(stop_id)] if stop_id in row else row for row in rows]


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_mode_as_it_was(training):
    model = tiny_model().train(training)
    generated(model, prompts_for(BATCH, [0]), count=1)
    assert model.training is training and model.llm.training is training


def test_generation_wants_a_row_per_sample():
    with pytest.raises(UserError, match="one sample per row; leave data.pack_tokens to training"):
        generated(tiny_model(), replace(BATCH, row_of_sample=torch.tensor([0, 0, 1])))


def test_a_model_in_half_precision():
    model = tiny_model(frame_time="sinusoidal").bfloat16()
    assert logits(model, BATCH).dtype == torch.bfloat16
    rows, _ = generated(model, prompts_for(BATCH, [0, 2]), count=3)
    assert [len(row) for row in rows] == [3, 3]
