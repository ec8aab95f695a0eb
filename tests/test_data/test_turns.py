"""One turn: a question asked alone, with the visuals that were shown before it."""

import pytest

from data.turns import one_turn
from lightning_crosslmm.conversation import Conversation, Message, Visual

VISUALS = (Visual("video", "0.mp4"), Visual("image", "1.png"), Visual("video", "2.mp4"))
SAID = (
    Message("user", "<video>\nWhat? And <image>?"),
    Message("assistant", "a cat"),
    Message("user", "Sure?"),
    Message("assistant", "yes"),
    Message("user", "And now <video>?"),
    Message("assistant", "a dog"),
)


@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)])
@pytest.mark.parametrize(
    ("number", "question", "answer", "num_visuals"),
    [
        (0, "<video>\nWhat? And <image>?", "a cat", 2),
        (1, "<video>\n<image>\nSure?", "yes", 2),
        (2, "<video>\n<image>\nAnd now <video>?", "a dog", 3),
    ],
)
def test_earlier_marks_stay_and_later_visuals_go(system, number, question, answer, num_visuals):
    facts = ({"item": "a"}, {"item": "b"}, {"item": "c"})
    whole = Conversation("s", (*system, *SAID), VISUALS, ("what", "sure", "now"), facts)
    asked = one_turn(whole, number)
    assert asked.messages == (*system, Message("user", question), Message("assistant", answer))
    assert asked.visuals == VISUALS[:num_visuals] and asked.key == "s"
    assert (asked.answer_kinds, asked.answer_facts) == ((whole.answer_kinds[number],), (facts[number],))
    assert Conversation.from_json(asked.to_json(), "shard", "s") == asked
