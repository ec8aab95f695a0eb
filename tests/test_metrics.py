import pytest
import torch

from lightning_crosslmm.batch import prompts_for
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.metrics import AnswerAccuracy, answers_right
from tests.tiny import END, TOKENIZER, tiny_batch, tiny_model


def test_an_answer_is_right_when_all_its_tokens_are():
    logits_YW = torch.eye(4)[[1, 2, 3, 0, 1]]
    target_Y = torch.tensor([1, 2, 3, 1, 1])
    found = answers_right(logits_YW, target_Y, torch.tensor([0, 0, 1, 2, 2]), 3)
    assert found.tolist() == [True, True, False]


def test_no_answers():
    assert (
        answers_right(
            torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), 0
        ).tolist()
        == []
    )


@pytest.mark.parametrize("seed", range(4))
def test_right_is_what_greedy_decoding_reproduces(seed):
    model = tiny_model(seed=seed)
    asked = [["look", 3, "what?"], ["and?", 1, "so"], ["nothing?"]]
    prompts = prompts_for(tiny_batch(*[[*question, "=x"] for question in asked]), [0, 1, 2])
    greedy = model.generate(prompts, Greedy(6), stop_id=END, pad_id=0)

    def batch_with(answers):
        batch = tiny_batch(
            *[[*question, "=" + "x" * (len(row) - 1)] for question, row in zip(asked, answers, strict=True)]
        )
        labels_L, ids_L = batch.labels_L.clone(), batch.ids_L.clone()
        labels_L[batch.answer_L >= 0] = ids_L[batch.answer_L >= 0] = torch.tensor(
            [token for row in answers for token in row]
        )
        object.__setattr__(batch, "ids_L", ids_L)
        object.__setattr__(batch, "labels_L", labels_L)
        return batch

    def right(answers):
        output = model(batch_with(answers))
        return answers_right(output.logits_YW, output.target_Y, output.answer_Y, 3).tolist()

    # its own words are right to the last; a changed word, first, middle or last, is wrong in that answer alone
    assert right(greedy) == [True, True, True]
    for place in (0, 3, 5):
        wrong = [list(row) for row in greedy]
        wrong[1][place] = (wrong[1][place] + 1) % 256
        assert right(wrong) == [True, False, True]
    assert len(TOKENIZER) > max(token for row in greedy for token in row)


def test_accuracy_in_all_and_per_type():
    accuracy = AnswerAccuracy(["count", "order", "", "count"])
    accuracy.count(torch.tensor([True, False, True]), ("count", "count", ""))
    accuracy.count(torch.tensor([False]), ("",))
    accuracy.count(torch.zeros(0, dtype=torch.bool), ())
    assert {name: value.item() for name, value in accuracy.seen().items()} == {"accuracy": 0.5, "accuracy/count": 0.5}
    accuracy.count(torch.tensor([True]), ("order",))
    assert accuracy.seen()["accuracy/order"].item() == 1


def test_types_the_data_does_not_name_count_in_all():
    accuracy = AnswerAccuracy([])
    accuracy.count(torch.tensor([True, False]), ("surprise", ""))
    assert {name: value.item() for name, value in accuracy.seen().items()} == {"accuracy": 0.5}


def test_a_reset_forgets():
    accuracy = AnswerAccuracy(["count"])
    accuracy.count(torch.tensor([True]), ("count",))
    accuracy.reset()
    assert accuracy.seen() == {}
