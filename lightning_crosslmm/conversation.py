"""Conversations: questions and answers with marks where visuals stand, and the JSON that our shards keep of them.

A conversation is an optional system message, then questions and answers in turn. ``<video>`` and ``<image>`` in a
question mark the place of a visual; each mark takes the next visual of its kind. What others write is read in
``conversation_formats.py`` (files of conversations) and ``conversation_members.py`` (members of a shard).
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Self

from lightning_crosslmm.errors import UserError

KINDS = ("video", "image")
MARK = re.compile("<(video|image)>")
Facts = Mapping[str, str | float]
"""What the data know of an answer and metrics may ask: ``item`` (one question in several guises), ``depth``."""


@dataclass(frozen=True)
class Message:
    """One turn: ``role`` is ``system``, ``user`` or ``assistant``; ``content`` is its text with marks."""

    role: str
    content: str


@dataclass(frozen=True)
class Visual:
    """One video or image: its kind, and its path below the video folder (in a shard: the name of its member)."""

    kind: str
    path: str


@dataclass(frozen=True)
class Conversation:
    """Questions and answers about visuals.

    Args:
        key: names the sample in a shard.
        messages: an optional system message, then ``user`` and ``assistant`` in turn.
        visuals: in the order of their marks.
        answer_kinds: the question type of each answer, "" where the data names none.
        answer_facts: texts and numbers about each answer; or none at all.
    """

    key: str
    messages: tuple[Message, ...]
    visuals: tuple[Visual, ...]
    answer_kinds: tuple[str, ...]
    answer_facts: tuple[Facts, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        """What the visuals are called in a shard, after ``KEY.``: ``0.mp4``, ``1.jpg``."""
        return tuple(f"{i}{_suffix(visual.path).lower()}" for i, visual in enumerate(self.visuals))

    def to_json(self) -> bytes:
        """Write the canonical JSON that a shard stores as ``KEY.json``: equal conversations give equal bytes."""
        record = {
            "messages": [{"role": message.role, "content": message.content} for message in self.messages],
            "visuals": [{"kind": v.kind, "member": m} for v, m in zip(self.visuals, self.members, strict=True)],
            "answer_kinds": list(self.answer_kinds),
        }
        if any(self.answer_facts):
            record["answer_facts"] = [dict(facts) for facts in self.answer_facts]
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str, key: str) -> Self:
        """Read what ``to_json`` wrote; each visual's path is then the name of its member.

        Args:
            data: content of ``KEY.json``.
            where: names the shard, for messages.
            key: the sample's key.

        Raises:
            UserError: names shard, key and what is not canonical.
        """
        where = f"{where}: sample '{key}'"
        return cls.from_record(parse_json(data, f"{where}: the member 'json'"), where, key)

    @classmethod
    def from_record(cls, record: Any, where: str, key: str) -> Self:
        """Read the same from parsed JSON; ``where`` names the sample, too."""
        fields = {"messages": {"role", "content"}, "visuals": {"kind", "member"}}
        needed = {*fields, "answer_kinds"}
        if not isinstance(record, dict) or set(record) - {"answer_facts"} != needed:
            raise UserError(
                f"{where}: its JSON must have messages, visuals, answer_kinds and at most answer_facts beside them, "
                f"got {record!r:.200}"
            )
        for field, names in fields.items():
            for item in check_list(record[field], f"{where}: '{field}'"):
                if not isinstance(item, dict) or item.keys() != names or {*map(type, item.values())} != {str}:
                    raise UserError(f"{where}: '{field}' must list strings {sorted(names)}, got {item!r:.200}")
        kinds = check_list(record["answer_kinds"], f"{where}: 'answer_kinds'")
        messages = tuple(Message(**item) for item in record["messages"])
        visuals = tuple(Visual(v["kind"], check_path(v["member"], f"{where}: a member")) for v in record["visuals"])
        num_answers = check_turns(messages, where)
        facts = check_facts(record.get("answer_facts", []), num_answers, where)
        conversation = cls(key, messages, visuals, check_kinds(kinds, num_answers, where), facts)
        marks = MARK.findall("\n".join(message.content for message in messages))
        if marks != [visual.kind for visual in visuals]:
            raise UserError(f"{where}: the text marks {marks}, but the visuals are {[v.kind for v in visuals]}")
        if list(conversation.members) != (got := [visual.path for visual in visuals]):
            raise UserError(f"{where}: the visuals' members must be {list(conversation.members)}, got {got}")
        return conversation


def parse_json(data: bytes, where: str) -> Any:
    """Read JSON, or name where it is none; what it holds can be written as UTF-8."""
    try:
        text = data.decode("utf-8-sig")
        parsed = json.loads(text)
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()  # lone surrogates pass as JSON, but are no text
        return parsed
    except (ValueError, RecursionError) as error:
        hint = "; a file with one object per line is named .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{where}: not JSON in UTF-8: {error}{hint}") from error


def check_list(value: Any, what: str) -> list[Any]:
    """Give back a list, or tell that it is none."""
    if not isinstance(value, list):
        raise UserError(f"{what} must be a list, got {type(value).__name__}")
    return value


@lru_cache(maxsize=1024)  # in a shard the same few names in every sample
def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix


def check_path(value: Any, what: str) -> str:
    """Give back a file's path, or tell that it is none."""
    if not isinstance(value, str) or len(_suffix(value)) < 2 or "\0" in value:
        raise UserError(f"{what} must be the path of a file with an extension, as clips/a.mp4, got {value!r:.200}")
    return value


def check_turns(messages: tuple[Message, ...], where: str) -> int:
    """Count the answers of a conversation, or tell what is wrong with its turns."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    roles = [message.role for message in turns]
    answers = [message for message in turns if message.role == "assistant"]
    in_order = roles == [("user", "assistant")[i % 2] for i in range(len(roles))]
    marked = [message.role for message in messages if message.role != "user" and MARK.search(message.content)]
    has_empty = not all(message.content.strip() for message in answers)
    if answers and in_order and len(roles) % 2 == 0 and not has_empty and not marked:
        return len(answers)
    mistakes = (
        (not answers, f"has no answer among its {len(messages)} turn(s); a question and an answer are needed"),
        (roles[:1] == ["assistant"], "starts with an answer; the first turn after a system message must be a question"),
        (not in_order, f"questions and answers must alternate, a system message only stands first; got {roles}"),
        (len(roles) % 2 == 1, "ends with a question; give its answer or take it out"),
        (has_empty, "has an empty answer; write it or take its question out"),
        (marked, f"<video> or <image> stands in the text of {marked}; visuals are marked in questions only"),
    )
    raise UserError(f"{where}: {next(message for wrong, message in mistakes if wrong)}")


def check_kinds(kinds: list[Any], num_answers: int, where: str) -> tuple[str, ...]:
    """Give back the question types, or tell that they are not one text per answer."""
    if len(kinds) != num_answers or not all(isinstance(kind, str) for kind in kinds):
        raise UserError(f"{where}: needs {num_answers} question type(s), a text per answer, got {kinds!r:.200}")
    return tuple(kinds)


def check_facts(facts: Any, num_answers: int, where: str) -> tuple[Facts, ...]:
    """Give back the facts of each answer, or none, or tell that they are neither."""
    values = [
        value
        for fact in check_list(facts, f"{where}: 'answer_facts'")
        for value in (fact.values() if isinstance(fact, dict) else [None])
    ]
    good = all(isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)) for value in values)
    if not good or len(facts) not in (0, num_answers):
        raise UserError(
            f"{where}: 'answer_facts' must hold texts and numbers by name for each of {num_answers} answer(s), "
            f"got {facts!r:.200}"
        )
    return tuple(facts)
