"""One turn of a conversation as a conversation of its own."""

from lightning_crosslmm.conversation import MARK, Conversation, Message


def one_turn(conversation: Conversation, number: int) -> Conversation:
    """Keep one question and its answer, so that a model learns to answer it asked alone.

    A system message stays. Visuals marked in earlier questions stay, their marks before this question and each on a
    line of its own; those marked later go.

    Args:
        conversation: with its answers.
        number: of the turn, from 0.
    """
    system = conversation.messages[: conversation.messages[0].role == "system"]
    turns = conversation.messages[len(system) :]
    earlier = "".join(f"{mark.group()}\n" for turn in turns[: 2 * number : 2] for mark in MARK.finditer(turn.content))
    question = Message("user", earlier + turns[2 * number].content)
    num_visuals = len(MARK.findall(question.content))
    return Conversation(
        conversation.key,
        (*system, question, turns[2 * number + 1]),
        conversation.visuals[:num_visuals],
        conversation.answer_kinds[number : number + 1],
        conversation.answer_facts[number : number + 1],
    )
