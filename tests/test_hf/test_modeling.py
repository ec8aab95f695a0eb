"""The model behind transformers' interface: logits per token of the text, loss, and `generate` on mixed batches."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from lightning_crosslmm.batch import IGNORED
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.hf.configuration import CrossLMMConfig
from lightning_crosslmm.hf.inputs import Inputs
from lightning_crosslmm.hf.modeling import CrossLMMForConditionalGeneration
from lightning_crosslmm.objective import answer_loss
from lightning_crosslmm.standalone import parts_of
from tests.runs import small_config

IMAGE, VIDEO, STOP, PAD = 901, 902, 260, 0
WORDS = ((1, VIDEO, 2, 3), (4, 5, 6, 7, 8, 9), (IMAGE, VIDEO, 3), (7,))


@pytest.fixture(scope="module")
def model() -> CrossLMMForConditionalGeneration:
    return built()


def built(*words: str, **settings: Any) -> CrossLMMForConditionalGeneration:
    torch.manual_seed(0)
    config = CrossLMMConfig(parts_of(small_config(*words)), image_token_id=IMAGE, video_token_id=VIDEO, **settings)
    made = CrossLMMForConditionalGeneration(config).eval()
    made.generation_config = GenerationConfig(max_new_tokens=6, eos_token_id=STOP, pad_token_id=PAD)
    return made


def inputs(*rows: int, side: str = "left", **more: Tensor) -> dict[str, Tensor]:
    """Some of the texts, padded, with frames that are the same in whatever company."""
    texts = [WORDS[row] for row in rows]
    longest = max(map(len, texts))
    gaps = [[11] * (longest - len(text)) for text in texts]
    ids = [[*gap, *text] if side == "left" else [*text, *gap] for gap, text in zip(gaps, texts, strict=True)]
    real = [[0] * len(gap) + [1] * len(text) for gap, text in zip(gaps, texts, strict=True)]
    real = real if side == "left" else [row[::-1] for row in real]
    of_row = {0: [3], 2: [1, 2]}
    counts = [(row, number, count) for row in rows for number, count in enumerate(of_row.get(row, []))]
    frames = [
        torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(10 * row + number))
        for row, number, count in counts
    ]
    found = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real), **more}
    if frames:
        found["pixel_values"] = torch.cat(frames).to(torch.uint8)
        found["num_frames"] = torch.tensor([count for *_, count in counts])
        found["frame_time_ns"] = torch.cat([torch.arange(count) * 500_000_000 for *_, count in counts])
    return found


@pytest.mark.parametrize("side", ["left", "right"])
def test_company_and_padding_change_no_logits(model: CrossLMMForConditionalGeneration, side: str) -> None:
    given = inputs(0, 1, 2, 3, side=side)
    with torch.no_grad():
        together = model(**given).logits
        for row in range(4):
            alone = model(**inputs(row)).logits[0]
            found = together[row][given["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)  # measured: 1e-5 on logits up to 10
    assert (together[~given["attention_mask"].bool()] == 0).all()


def test_labels_give_the_loss_of_training(model: CrossLMMForConditionalGeneration) -> None:
    given = inputs(0, 1)
    labels = torch.full_like(given["input_ids"], IGNORED)
    labels[:, -2:] = given["input_ids"][:, -2:]
    with torch.no_grad():
        out = model(**given, labels=labels)
        trained = model.model(Inputs(**given, labels=labels).batch((IMAGE, VIDEO), 32))
    torch.testing.assert_close(out.loss, answer_loss(trained.logits_YW, trained.target_Y))
    assert torch.equal(out.logits[:, -3:-1].flatten(0, 1), trained.logits_YW)
    with torch.no_grad():
        torch.testing.assert_close(model(**given, logits_to_keep=1).logits, out.logits[:, -1:], rtol=0, atol=1e-5)
        assert model(**given, labels=labels, logits_to_keep=1).loss == out.loss


def test_a_batch_is_answered_as_each_text_alone(model: CrossLMMForConditionalGeneration) -> None:
    given = inputs(0, 1, 2, 3)
    ids = model.generate(**given)
    length = given["input_ids"].shape[1]
    assert torch.equal(ids[:, :length], given["input_ids"])
    for row in range(4):
        alone = inputs(row)
        new = model.generate(**alone)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(ids[row, length : length + len(new)], new)


def test_an_answer_ends_with_its_token_and_padding(model: CrossLMMForConditionalGeneration) -> None:
    given = inputs(0, 1)
    plain = model.generate(**given)[:, given["input_ids"].shape[1] :]
    stop = int(plain[0, 2])
    first = plain[0].tolist().index(stop)
    cut = model.generate(**given, eos_token_id=stop, pad_token_id=99)[0, given["input_ids"].shape[1] :].tolist()
    assert cut[: first + 1] == plain[0, : first + 1].tolist() and set(cut[first + 1 :]) <= {99}


class Said:
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, ids: Tensor) -> None:
        self.ids += ids.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


def test_settings_of_generation_are_heard(model: CrossLMMForConditionalGeneration) -> None:
    given, said = inputs(0), Said()
    ids = model.generate(**given, max_new_tokens=3, streamer=said)[0, 4:].tolist()
    assert len(ids) == 3 and said.ids == [*ids, -1]
    config = GenerationConfig(max_new_tokens=2, eos_token_id=STOP, do_sample=True, temperature=50.0)
    drawn = {tuple(model.generate(**given, generation_config=config)[0, 4:].tolist()) for _ in range(5)}
    assert len(drawn) > 1 and {len(each) for each in drawn} == {2}
    assert model.generation_config.max_new_tokens == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "generate takes no num_beams=2"),
        ({"pixels": 1}, "generate takes no pixels=1"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]; answers end with one token"),
        ({"max_new_tokens": None}, "max_new_tokens is not set"),
        ({"max_new_tokens": 9999}, "leaves room for"),
    ],
)
def test_settings_that_are_not_to_be_had_are_refused(
    model: CrossLMMForConditionalGeneration, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(**inputs(0), **settings)


def test_it_behaves_as_models_of_transformers_do(model: CrossLMMForConditionalGeneration) -> None:
    assert model.can_generate() and model.get_output_embeddings() is model.model.llm.lm_head
    assert model.all_tied_weights_keys == {"model.llm.lm_head.weight": "model.llm.model.embed_tokens.weight"}
    eager = built(attn_implementation="eager")
    assert eager.model.llm.config._attn_implementation == "eager"
    eager.gradient_checkpointing_enable()
    eager.train()
    given = inputs(0, 1)
    eager(**given, labels=given["input_ids"].masked_fill(given["input_ids"] > 900, IGNORED)).loss.backward()
    assert any(parameter.grad is not None for parameter in eager.model.llm.parameters())
