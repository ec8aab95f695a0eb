"""What a sample of a shard says, whoever wrote it: its members, named from their first dot on, become a conversation.

Understood are
    our own layout: ``json`` with messages, visuals and answer_kinds, and ``0.mp4``, ``1.jpg``, ...;
    ``json`` with an entry of LLaVA's or the messages format, or with the bare list of its turns, beside its visuals;
    ``txt``, or ``json`` with a ``caption``, beside visuals: the caption answers the visuals alone, as LLaVA aligns.

In shards of others ``mp4``, ``0.mp4`` and ``front.jpg`` are all names of visuals. Marks take them kind by kind: in the
order of the files that the entry names, where those are the members, and else by name, in which 10 follows 9.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from lightning_crosslmm.conversation import (
    KINDS,
    Conversation,
    Message,
    Visual,
    check_turns,
    parse_json,
)
from lightning_crosslmm.conversation_formats import read_entry
from lightning_crosslmm.errors import UserError

TEXTS = ("json", "txt")
VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "avi", "mov", "gif")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_FIELDS = ("video", "videos", "image", "images")


def visual_kind(member: str) -> str:
    """Tell a video from an image by the name of its member."""
    return "image" if member.rpartition(".")[2] in IMAGE_EXTENSIONS else "video"


def conversation_of(key: str, members: Mapping[str, bytes], where: str) -> Conversation:
    """Read the conversation of a sample; each visual's path is the name of its member.

    Args:
        key: the sample's name.
        members: what it holds by name, ``json`` or ``0.mp4``. Of visuals only the names are looked at.
        where: names the shard, for messages.

    Raises:
        UserError: names shard and key where its text is none of the above, or is not about the visuals beside it.
    """
    at = f"{where}: sample '{key}'"
    visuals = sorted((member for member in members if member not in TEXTS), key=_by_number)
    record = parse_json(members["json"], f"{at}: the member 'json'") if "json" in members else None
    if isinstance(record, dict) and "visuals" in record:
        conversation = Conversation.from_record(record, at, key)
    elif (entry := _entry(record)) is not None:
        read = read_entry(_with_members(entry, key, visuals), key, at)
        bare = tuple(Visual(visual.kind, visual.path.removeprefix(f"{key}.")) for visual in read.visuals)
        conversation = replace(read, visuals=bare)
    elif (caption := _caption(members.get("txt"), record, at)) is not None:
        conversation = _captioned(key, caption, visuals, at)
    else:
        what = f"a 'json' with {_told(record)}" if "json" in members else "neither 'json' nor 'txt'"
        raise UserError(
            f"{at}: has {what}, and the visuals {visuals}; its text must be a conversation in 'json' ('messages' or "
            "LLaVA's 'conversations') or a caption in 'txt' (a key ends at the first dot of a member's name)"
        )
    named = sorted((visual.path for visual in conversation.visuals), key=_by_number)
    if named != visuals:
        raise UserError(f"{at}: its text names the visuals {named}, but the members are {visuals}")
    return conversation


@lru_cache(maxsize=1024)  # in a shard the same few names in every sample
def _by_number(member: str) -> list[tuple[str, int, str]]:
    pieces = ((text, digits.lstrip("0")) for text, digits in re.findall("([^0-9]*)([0-9]*)", member))
    return [(text, len(digits), digits) for text, digits in pieces]


def _told(record: Any) -> str:
    return f"the fields {sorted(record)[:12]}" if isinstance(record, dict) else f"{record!r:.100}"


def _entry(record: Any) -> dict[str, Any] | None:
    if isinstance(record, list) and record and isinstance(record[0], dict):
        return {"conversations" if "from" in record[0] else "messages": record}
    return record if isinstance(record, dict) and {"conversations", "messages"} & set(record) else None


def _caption(text: bytes | None, record: Any, where: str) -> str | None:
    if text is None:
        caption = record.get("caption") if isinstance(record, dict) else None
        return caption.strip() if isinstance(caption, str) else None
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: the member 'txt' is not UTF-8 ({error})") from error


def _captioned(key: str, caption: str, members: list[str], where: str) -> Conversation:
    if not members:
        raise UserError(f"{where}: has a caption, but no visual that it is about")
    visuals = tuple(Visual(visual_kind(member), member) for member in members)
    question = "".join(f"<{visual.kind}>\n" for visual in visuals)
    messages = (Message("user", question), Message("assistant", caption))
    check_turns(messages, where)
    return Conversation(key, messages, visuals, ("",))


def _with_members(entry: dict[str, Any], key: str, members: list[str]) -> dict[str, Any]:
    """Put the full names of members in the place of the files that an entry names."""
    field = "conversations" if "conversations" in entry else "messages"
    paths = [entry.get(name) for name in _FIELDS]
    turns = _without_paths(entry[field], paths)
    flat = [path for value in paths for path in (value if isinstance(value, list) else [value])]
    prefix = f"{PurePosixPath(key).name}."
    named = [PurePosixPath(path).name.removeprefix(prefix).lower() for path in flat if isinstance(path, str)]
    ordered = named if sorted(named) == sorted(members) else members
    of_kind = {kind: [f"{key}.{member}" for member in ordered if visual_kind(member) == kind] for kind in KINDS}
    text = json.dumps(turns)
    if of_kind["video"] and not of_kind["image"] and "<video>" not in text:
        turns = json.loads(text.replace("<image>", "<video>"))  # many data sets mark a video as an image
    rest = {name: value for name, value in entry.items() if name not in _FIELDS}
    return rest | {field: turns, "videos": of_kind["video"], "images": of_kind["image"]}


def _without_paths(value: Any, paths: list[Any]) -> Any:
    """Take the paths out of the parts of turns, into a list: a part then takes the next visual of its kind."""
    if isinstance(value, list):
        return [_without_paths(item, paths) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") in KINDS:
        paths += [value[name] for name in (*KINDS, "path") if name in value]
        return {"type": value["type"]}
    return {name: _without_paths(item, paths) for name, item in value.items()}
