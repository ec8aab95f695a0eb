from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.batch import prompts_for
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import BilinearPooler
from tests.arms import ARMS, BATCH, CLOSE, arms, generated, logits
from tests.tiny import tiny_batch, tiny_model


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


@pytest.mark.parametrize("settings", [{"t2v_cache": "recompute"}, {"kv_latent": 8}, {"layers_per_kv": "all"}])
def test_cached_decoding_of_normed_keys(settings):
    model = tiny_model("qwen3", **settings)
    prompts = prompts_for(BATCH, [1, 2, 3])
    rows, steps_RZW = generated(model, prompts)
    torch.testing.assert_close(steps_RZW.flatten(0, 1), logits(model, with_answers(prompts, rows)), **CLOSE)


@pytest.mark.parametrize("settings", [{}, {"layers_per_kv": "all"}, {"kv_latent": 8}, {"share_kv": True}])
def test_decoding_from_int8_stays_close_to_the_full_forward(settings):
    model = tiny_model(t2v_cache="int8", **settings)
    prompts = prompts_for(BATCH, [0, 1, 2, 3])
    rows, steps_RZW = generated(model, prompts)
    full_RZW = logits(model, with_answers(prompts, rows)).view_as(steps_RZW)
    assert torch.equal(steps_RZW[:, 0], generated(tiny_model(**settings), prompts, count=1)[1][:, 0])  # the prompt's
    error = ((steps_RZW - full_RZW)[:, 1:].square().mean() / full_RZW.square().mean()).sqrt()
    assert 1e-6 < error < 0.01


@pytest.mark.parametrize("settings", [{}, {"t2v_cache": "recompute"}, {"t2v_cache": "int8"}, {"kv_latent": 8}])
def test_an_answer_right_after_a_visual(settings):
    model, batch = tiny_model(**settings), tiny_batch([2, "=cat"], ["a", 1, "=dog"])
    prompts = prompts_for(batch, [0, 1])
    rows, steps_RZW = generated(model, prompts)
    near = {"rtol": 0, "atol": 0.05} if settings.get("t2v_cache") == "int8" else CLOSE
    torch.testing.assert_close(steps_RZW.flatten(0, 1), logits(model, with_answers(prompts, rows)), **near)


@pytest.mark.parametrize(
    ("settings", "per_token"),  # of 2 layers, 2 heads of 8 channels, single precision; source tokens are 32 or 16 wide
    [
        ({}, 2 * 2 * 16 * 4),
        ({"share_kv": True}, 2 * 2 * 16 * 4),
        ({"layers_per_kv": "all"}, 2 * 16 * 4),
        ({"kv_latent": 8}, 2 * 8 * 4),
        ({"kv_latent": 8, "layers_per_kv": 2}, 8 * 4),
        ({"t2v_cache": "int8"}, 2 * 2 * (16 + 2 * 4)),
        ({"t2v_cache": "int8", "kv_latent": 8, "layers_per_kv": "all"}, 8 + 4),
        ({"t2v_cache": "recompute"}, 32 * 4),
        ({"t2v_cache": "recompute", "key_source": "encoder"}, 16 * 4),
        ({"t2v": False}, 0),
    ],
)
def test_bytes_kept_per_source_token(settings, per_token):
    model, kept = tiny_model(**settings), []
    prompts = prompts_for(BATCH, [0, 2, 3])
    stock = model.prompt

    def prompt(*args, **kwargs):
        made = stock(*args, **kwargs)
        kept.append(made.context)
        return made

    model.prompt = prompt
    generated(model, prompts, count=3)
    assert kept[0].cache_bytes() == per_token * 16 * len(prompts.frames_FCHW)
    assert len(kept[0].source_SE) * (settings.get("t2v_cache") != "recompute") == 0 and kept[0].shared == {}


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
