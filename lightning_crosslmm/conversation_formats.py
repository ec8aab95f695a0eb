"""What users bring: files of conversations in LLaVA's format or the messages format.

Keys name samples in a tar, where WebDataset splits a name at its first dot. An id becomes a key by one rule: every
character that is no letter, digit, ``_`` or ``-`` turns into ``_``; more than 80 bytes are cut to 60, then come ``-``
and 12 hex digits of the id's sha256. An entry without an id gets ``sample-`` and its position in the file.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from lightning_crosslmm.conversation import (
    KINDS,
    MARK,
    Conversation,
    Message,
    Visual,
    check_kinds,
    check_list,
    check_path,
    check_turns,
    parse_json,
)
from lightning_crosslmm.errors import UserError, nearest

_FORMATS = {  # the field that holds the turns -> its fields for role and text, and our words for its roles
    "conversations": ("from", "value", {"human": "user", "gpt": "assistant", "system": "system"}),
    "messages": ("role", "content", {"user": "user", "assistant": "assistant", "system": "system"}),
}
_Slot = tuple[str, str | None]  # kind of a mark, and its path where the mark's own part names one


def read_conversations(json_path: str | Path) -> list[Conversation]:
    """Read all conversations of a file in LLaVA's format or the messages format.

    Args:
        json_path: ``.json`` (a list of entries) or ``.jsonl`` (an entry per line). An entry holds its turns in
            ``conversations`` ({from: human|gpt|system, value}) or ``messages`` ({role: user|assistant|system, content},
            where content may be a list of parts), its visuals in ``video``, ``videos``, ``image``, ``images`` (one path
            or a list) or in parts, and question types in ``kinds`` (one per answer) or as ``kind`` of an answer's turn.

    Returns:
        The conversations in the order of the file.

    Raises:
        UserError: names the file, the entry, what was found and the mend.
    """
    conversations: list[Conversation] = []
    first_of_key: dict[str, tuple[str, Any]] = {}
    for position, (where, entry) in enumerate(_entries(Path(json_path))):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: an entry must be an object, got {type(entry).__name__}")
        name = entry.get("id")
        key = _key(name, position, where)
        conversation = read_entry(entry, key, where if name is None else f"{where} (id {name!r})")
        other, other_name = first_of_key.setdefault(conversation.key, (where, name))
        if other != where:
            why = (
                ""
                if name == other_name
                else f": both make the key '{conversation.key}' (letters, digits, _, - are kept)"
            )
            raise UserError(f"{where}: its id {name!r} clashes with {other_name!r} at {other}{why}; rename one")
        conversations.append(conversation)
    return conversations


def _entries(path: Path) -> list[tuple[str, Any]]:
    if path.suffix not in (".json", ".jsonl"):
        raise UserError(f"{path}: conversations come as .json (a list) or .jsonl (one per line), not '{path.suffix}'")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file of conversations") from error
    if path.suffix == ".jsonl":
        lines = {f"{path}, line {n}": line for n, line in enumerate(text.split(b"\n"), start=1) if line.strip()}
        entries = [(where, parse_json(line, where)) for where, line in lines.items()]
    else:
        whole = parse_json(text, str(path))
        if not isinstance(whole, list):
            raise UserError(f"{path}: a .json file must hold a list of conversations, got {type(whole).__name__}")
        entries = [(f"{path}, entry [{i}]", entry) for i, entry in enumerate(whole)]
    if not entries:
        raise UserError(f"{path}: holds no conversation; at least one is needed")
    return entries


def _key(name: Any, position: int, where: str) -> str:
    if name is None:
        return f"sample-{position:08d}"
    if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
        raise UserError(f"{where}: 'id' must be text or a whole number, got {name!r:.100}; or leave it out")
    key = re.sub(r"[^\w-]", "_", str(name))
    if len(key.encode()) > 80:
        key = key.encode()[:60].decode(errors="ignore") + "-" + hashlib.sha256(str(name).encode()).hexdigest()[:12]
    return key


def read_entry(entry: dict[str, Any], key: str, where: str) -> Conversation:
    """Read one entry of such a file, as ``read_conversations`` tells it.

    Args:
        entry: parsed JSON.
        key: what the conversation is called.
        where: names the file and the entry.

    Raises:
        UserError: says where, what was found and the mend.
    """
    found = [name for name in _FORMATS if name in entry]
    if len(found) != 1:
        raise UserError(f"{where}: must have either 'conversations' or 'messages', got the fields {sorted(entry)}")
    role_field, text_field, words = _FORMATS[found[0]]
    turns = check_list(entry[found[0]], f"{where}: '{found[0]}'")
    messages: list[Message] = []
    slots: list[_Slot] = []
    for i, turn in enumerate(turns):
        at = f"{where}, turn [{i}]"
        if not isinstance(turn, dict) or not {role_field, text_field} <= set(turn):
            raise UserError(f"{at}: must be an object with '{role_field}' and '{text_field}', got {turn!r:.100}")
        role = turn[role_field]
        if not isinstance(role, str) or role not in words:
            raise UserError(f"{at}: '{role_field}' {role!r} is none of {list(words)}{nearest(str(role), words)}")
        text, marked = _content(turn[text_field], at)
        messages.append(Message(words[role], text))
        slots += marked
    num_answers = check_turns(tuple(messages), where)
    kinds = check_kinds(_answer_kinds(entry, turns, messages, where), num_answers, where)
    visuals = _visuals(slots, {kind: _listed(entry, kind, where) for kind in KINDS}, where)
    return Conversation(key, tuple(messages), visuals, kinds)


def _content(content: Any, where: str) -> tuple[str, list[_Slot]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text, slots = "", list[_Slot]()
    for part in check_list(parts, f"{where}: its text, where it is no string,"):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
            slots += [(mark, None) for mark in MARK.findall(part["text"])]
        elif kind in KINDS:
            path = part.get(kind, part.get("path"))
            text += f"<{kind}>\n"  # as LLaVA's files write it: either format gives the same prompt
            slots.append((kind, None if path is None else check_path(path, f"{where}: the part's {kind}")))
        else:
            known = "{type: text, text}, {type: video, video: path} or {type: image, image: path}"
            raise UserError(f"{where}: a part must be {known}, got {part!r:.200}")
    return text, slots


def _listed(entry: dict[str, Any], kind: str, where: str) -> list[str]:
    given = {name: entry[name] for name in (kind, f"{kind}s") if entry.get(name) is not None}
    if len(given) == 2:
        raise UserError(f"{where}: has both '{kind}' and '{kind}s'; keep one of them, with all its {kind}s")
    values = [value for field in given.values() for value in (field if isinstance(field, list) else [field])]
    return [check_path(value, f"{where}: '{next(iter(given))}'") for value in values]


def _visuals(slots: list[_Slot], listed: dict[str, list[str]], where: str) -> tuple[Visual, ...]:
    marks = {kind: slots.count((kind, None)) for kind in KINDS}
    for kind in (kind for kind in KINDS if marks[kind] != len(listed[kind])):
        num_marks, num_given = marks[kind], len(listed[kind])
        if num_marks > num_given:
            mend = f"name one file per mark in '{kind}s', or take the spare mark out of the text"
        elif kind == "video" and marks["image"] > len(listed["image"]):
            mend = "a video's mark is <video>: write it in place of <image>"
        elif num_marks == 0:
            mend = f'put the mark where the {kind} stands, as in "<{kind}>\\nWhat is shown?" in the first question'
        else:
            mend = f"put one mark per {kind} into the questions, or take the spare file out"
        raise UserError(f"{where}: {num_marks} <{kind}> mark(s) in the text, but {num_given} {kind}(s) named; {mend}")
    left = {kind: iter(paths) for kind, paths in listed.items()}
    return tuple(Visual(kind, next(left[kind]) if path is None else path) for kind, path in slots)


def _answer_kinds(entry: dict[str, Any], turns: list[Any], messages: list[Message], where: str) -> list[Any]:
    per_turn = [turn.get("kind") for turn in turns]
    if entry.get("kinds") is not None:
        if any(kind is not None for kind in per_turn):
            raise UserError(f"{where}: has 'kinds' and a turn with 'kind'; keep one of the two ways")
        return check_list(entry["kinds"], f"{where}: 'kinds'")
    of_answers = {i: "" if k is None else k for i, k in enumerate(per_turn) if messages[i].role == "assistant"}
    if spare := [i for i, kind in enumerate(per_turn) if kind is not None and i not in of_answers]:
        raise UserError(f"{where}: the turns {spare} have a 'kind' but are no answers; put it on the answer")
    return list(of_answers.values())
