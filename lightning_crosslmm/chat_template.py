"""A tokenizer's chat template: what it puts before, between and after messages, as ids.

Templates of multimodal checkpoints take a message in parts and say themselves where its visuals stand; those of LLMs
take text, in which marks stand wherever they were written.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase as Tokenizer

from lightning_crosslmm.batch import VISUAL_MARK
from lightning_crosslmm.errors import UserError

MARK = re.compile("<video>|<image>")

_MARK_FIRST = re.compile(r"(?:\s*<(?:video|image)>)*\s*")
_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")


class Turn(Protocol):
    """One message: who speaks (``system``, ``user`` or ``assistant``) and what."""

    @property
    def role(self) -> str:
        """Who speaks."""

    @property
    def content(self) -> str:
        """What is said."""


class Turns(Protocol):
    """What is read of a conversation."""

    @property
    def key(self) -> str:
        """Name of the sample."""

    @property
    def messages(self) -> Sequence[Turn]:
        """Its messages in order."""


def split_turns(tokenizer: Tokenizer, conversation: Turns) -> tuple[tuple[str, ...], list[str]]:
    """Give roles and contents; marks that a question begins with are handed to a template that takes parts.

    The role says so: ``user <video> <image>``.
    """
    roles, contents = [], []
    for message in conversation.messages:
        content, handed = message.content.strip(), ""
        if message.role == "user" and _takes_parts(tokenizer, tokenizer.chat_template):
            handed = _MARK_FIRST.match(content)[0]  # type: ignore[index]  # it matches nothing, too
            content = content[len(handed) :]
        roles.append(" ".join([message.role, *MARK.findall(handed)]))
        contents.append(content)
    return tuple(roles), contents


@lru_cache(maxsize=256)
def template_ids(tokenizer: Tokenizer, template: str, roles: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Tokenise what the template puts before, between and after messages of these roles: one more than messages.

    ``template`` is the tokenizer's own; it stands here so that a changed one is not answered from the cache.
    """
    in_parts, counts = _takes_parts(tokenizer, template), range(_first_complete(roles), len(roles) + 1)
    rendered = [_render(tokenizer, roles[:count], in_parts) for count in counts]
    for shorter, longer in zip(rendered, rendered[1:], strict=False):
        if not longer.startswith(shorter):
            raise UserError(
                f"tokenizer '{tokenizer.name_or_path}': its chat template changes earlier turns when one is added "
                f"({shorter!r} became {longer!r}), so a prompt would differ from what was trained; "
                "use a template that only appends"
            )
    pieces = _PLACEHOLDER.split(rendered[-1])  # template, number, template, number, ..., template
    if pieces[1::2] != [str(number) for number in range(len(roles))]:
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}': its chat template drops, repeats or reorders messages of roles "
            f"{', '.join(roles)}"
        )
    ids = tuple(_piece_ids(tokenizer, piece) for piece in pieces[::2])
    if sum(each.count(VISUAL_MARK) for each in ids) != sum(role.count(" ") for role in roles):
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}': its chat template puts no <video> or <image> where one is handed "
            "to it"
        )
    return ids


def _piece_ids(tokenizer: Tokenizer, piece: str) -> tuple[int, ...]:
    parts = [tokenizer.encode(part, add_special_tokens=False) if part else [] for part in MARK.split(piece)]
    return tuple([*parts[0], *(number for part in parts[1:] for number in (VISUAL_MARK, *part))])


@lru_cache(maxsize=16)
def _takes_parts(tokenizer: Tokenizer, template: str) -> bool:
    """Tell whether the template wants a message in parts, visuals and text, as those of multimodal checkpoints do."""
    return not _PLACEHOLDER.search(_render(tokenizer, ("user",)))


def _first_complete(roles: tuple[str, ...]) -> int:
    # Many templates refuse messages without a user, so a system message is never rendered alone.
    return next((place for place, role in enumerate(roles, 1) if role.split()[0] == "user"), len(roles))


def _render(tokenizer: Tokenizer, roles: tuple[str, ...], in_parts: bool = False) -> str:
    messages: list[dict[str, Any]] = []
    for number, (role, *marks) in enumerate(role.split() for role in roles):
        text = f"\ue000{number}\ue001"
        parts = [*({"type": mark.strip("<>")} for mark in marks), {"type": "text", "text": text}]
        messages.append({"role": role, "content": parts if in_parts else text})
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is its author's code: it may raise anything
        raise UserError(
            f"tokenizer '{tokenizer.name_or_path}': its chat template cannot render roles {', '.join(roles)}: {error}"
        ) from error
