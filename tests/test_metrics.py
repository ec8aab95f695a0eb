import pytest
import torch

from lightning_crosslmm.batch import prompts_for
from lightning_crosslmm.decoding import Greedy
from lightning_crosslmm.metrics import AnswerAccuracy, CircularAccuracy, answers_right
from tests.ranks import on_ranks
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


def circled(accuracy, *answers):
    """Count (item, kind, right) answers."""
    items, kinds, right = zip(*answers, strict=True)
    accuracy.count(torch.tensor(right), kinds, tuple({"item": item} if item else {} for item in items))


def test_an_item_is_right_when_it_is_every_time():
    accuracy = AnswerAccuracy(["order", "count", "unused"])
    circled(accuracy, ("a", "order", True), ("b", "order", True), (None, "order", True), ("c", "count", False))
    circled(accuracy, ("a", "order", True), ("b", "order", False), ("d", "order", False))  # in other batches
    seen = {name: round(value.item(), 4) for name, value in accuracy.seen().items()}
    assert seen == {
        "accuracy": round(4 / 7, 4),
        "accuracy/order": round(4 / 6, 4),
        "accuracy/count": 0,
        "circular/order": round(1 / 3, 4),
        "circular/count": 0,
    }
    accuracy.reset()
    circled(accuracy, ("b", "order", True))
    assert accuracy.seen()["circular/order"] == 1


def test_who_always_says_the_same_letter_gets_a_quarter_and_no_item():
    accuracy = AnswerAccuracy(["order"])
    for shift in range(4):
        circled(accuracy, *((item, "order", (shift + number) % 4 == 0) for number, item in enumerate("abcdefgh")))
    assert (accuracy.seen()["accuracy"], accuracy.seen()["circular/order"]) == (0.25, 0)


def test_types_that_nobody_named_and_answers_without_facts_make_no_item():
    accuracy = AnswerAccuracy(["order"])
    circled(accuracy, ("a", "surprise", True), ("b", "", True))
    accuracy.count(torch.tensor([True]), ("order",))
    assert not any(name.startswith("circular") for name in accuracy.seen())


def apart():
    """Two ranks: an item with an answer on each, a type that one rank alone sees, and at first nothing at all."""
    rank = torch.distributed.get_rank()
    accuracy = CircularAccuracy(["order", "count"])
    before = accuracy.compute()
    accuracy.reset()
    if rank == 0:
        answers = [("a", "order", True), ("b", "order", True), ("c", "count", True)]
    else:
        answers = [("a", "order", False), ("b", "order", True)]
    items, kinds, right = zip(*answers, strict=True)
    accuracy.update(torch.tensor(right), kinds, tuple({"item": item} for item in items))
    both = accuracy.compute()
    accuracy.reset()
    if rank == 0:
        accuracy.update(torch.tensor([True]), ("count",), ({"item": "z"},))
    return before, both, accuracy.compute()


def grouped():
    torch.distributed.init_process_group("gloo")
    return apart()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_items_come_together_across_ranks(tmp_path):
    for before, both, alone in on_ranks(2, grouped, folder=tmp_path):
        assert before == {} and both == {"order": 0.5, "count": 1.0} and alone == {"count": 1.0}
