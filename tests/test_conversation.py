import json

import pytest

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.conversation_formats import read_conversations
from lightning_crosslmm.errors import UserError

TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A book."}]
MESSAGES = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A book."}]


def read(tmp_path, entries, name="data.json"):
    path = tmp_path / name
    lines = "\n".join(json.dumps(entry) for entry in entries) if name.endswith("l") else json.dumps(entries)
    path.write_text(lines)
    return read_conversations(path)


def entry(turns=TURNS, **fields):
    return {"id": "a", "video": "a.mp4", "conversations": turns, **fields}


def test_llava_format_gives_roles_visuals_and_kinds(tmp_path):
    turns = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "<image>\nAnd <video>?"},
        {"from": "gpt", "value": "Yes.", "kind": "order"},
        {"from": "human", "value": "Then <video>?"},
        {"from": "gpt", "value": "No."},
    ]
    listed = {"id": 7, "videos": ["b.webm", "c/d.mp4"], "image": "e.png", "conversations": turns}
    (conversation,) = read(tmp_path, [listed])
    assert conversation.key == "7"
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert conversation.visuals == (Visual("image", "e.png"), Visual("video", "b.webm"), Visual("video", "c/d.mp4"))
    assert conversation.members == ("0.png", "1.webm", "2.mp4")
    assert conversation.answer_kinds == ("order", "")


def test_parts_and_marks_give_the_same_conversation(tmp_path):
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "What?"}]
    unnamed = [{"type": "video"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": "A book."}
    (by_part,) = read(tmp_path, [{"id": "a", "messages": [{"role": "user", "content": parts}, answer]}])
    listed = {"id": "a", "videos": ["a.mp4"], "messages": [{"role": "user", "content": unnamed}, answer]}
    (by_list,) = read(tmp_path, [listed])
    (by_mark,) = read(tmp_path, [entry()])
    assert by_part == by_list == by_mark


def test_jsonl_without_ids_gets_keys_by_position(tmp_path):
    conversations = read(tmp_path, [{"messages": MESSAGES}, {"messages": MESSAGES, "kinds": ["what"]}], "data.jsonl")
    assert [conversation.key for conversation in conversations] == ["sample-00000000", "sample-00000001"]
    assert [conversation.answer_kinds for conversation in conversations] == [("",), ("what",)]


def test_ids_become_keys_without_dots_and_slashes(tmp_path):
    names = [".v1/clip.0 x", "視頻-1", "x" * 200]
    keys = [c.key for c in read(tmp_path, [{"id": name, "messages": MESSAGES} for name in names])]
    assert keys[:2] == ["_v1_clip_0_x", "視頻-1"]
    assert keys[2].startswith("x" * 60 + "-") and len(keys[2]) == 73


def test_canonical_json_returns_the_same_conversation(tmp_path):
    (conversation,) = read(tmp_path, [entry(video="dir/a.MP4", kinds=["größe"])])
    data = conversation.to_json()
    again = Conversation.from_json(data, "shard.tar", "a")
    assert again.visuals == (Visual("video", "0.mp4"),)
    assert (again.key, again.messages, again.answer_kinds) == ("a", conversation.messages, ("größe",))
    assert again.to_json() == data


def test_facts_about_answers_are_kept_and_written_only_where_there_are_some():
    said = (Message("user", "?"), Message("assistant", "b"), Message("user", "?"), Message("assistant", "c"))
    plain = Conversation("a", said, (), ("", ""))
    told = Conversation("a", said, (), ("", ""), ({"item": "x", "depth": 0.5}, {}))
    assert b"answer_facts" not in plain.to_json()
    assert Conversation("a", said, (), ("", ""), ({}, {})).to_json() == plain.to_json()
    assert Conversation.from_json(told.to_json(), "shard", "a") == told


def swap(turn, **fields):
    return [{**t, **fields} if i == turn else t for i, t in enumerate(TURNS)]


WRONG = {
    "unknown role": (entry(swap(0, **{"from": "humam"})), ["turn [0]", "'humam'", "did you mean 'human'"]),
    "no alternation": (entry([TURNS[0], *TURNS]), ["alternate", "['user', 'user', 'assistant']"]),
    "answer first": (entry([TURNS[1], TURNS[0]]), ["starts with an answer"]),
    "no answer": (entry(TURNS[:1]), ["has no answer"]),
    "no turns": (entry([]), ["has no answer"]),
    "late system": (entry([*TURNS, {"from": "system", "value": "x"}]), ["system message only stands first"]),
    "open question": (entry([*TURNS, {"from": "human", "value": "x"}]), ["ends with a question"]),
    "empty answer": (entry(swap(1, value=" ")), ["empty answer"]),
    "no mark": (entry(swap(0, value="What?")), ["0 <video> mark(s)", "1 video(s)", '"<video>\\nWhat is shown?"']),
    "wrong mark": (entry(swap(0, value="<image>\nWhat?")), ["0 <video> mark(s)", "in place of <image>"]),
    "spare mark": (entry(video=None), ["1 <video> mark(s)", "0 video(s)", "'videos'"]),
    "spare visual": (entry(video=["a.mp4", "b.mp4"]), ["1 <video> mark(s)", "2 video(s)"]),
    "mark in answer": (entry([*TURNS[:1], {"from": "gpt", "value": "<video>"}]), ["['assistant']", "questions only"]),
    "two fields": (entry(videos=["b.mp4"]), ["both 'video' and 'videos'"]),
    "no path": (entry(video=3), ["'video'", "got 3"]),
    "no extension": (entry(video="clip"), ["extension", "'clip'"]),
    "no turns field": ({"id": "a", "turns": TURNS}, ["'conversations' or 'messages'", "'turns'"]),
    "kinds count": (entry(kinds=["x", "y"]), ["1 question type(s)", "['x', 'y']"]),
    "kinds twice": (entry(swap(1, kind="x"), kinds=["x"]), ["'kinds' and a turn with 'kind'"]),
    "kind of question": (entry(swap(0, kind="x")), ["turns [0]", "answer"]),
    "kind no text": (entry(swap(1, kind=0)), ["got [0]"]),
    "unknown part": (
        {"id": "a", "messages": [{"role": "user", "content": [{"type": "image_url"}]}, MESSAGES[1]]},
        ["turn [0]", "image_url", "{type: text, text}"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_entry_names_file_entry_and_id(tmp_path, case):
    wrong, said = WRONG[case]
    with pytest.raises(UserError) as error:
        read(tmp_path, [{"id": "ok", "messages": MESSAGES}, wrong])
    for part in [f"{tmp_path / 'data.json'}, entry [1] (id 'a')", *said]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '[{"id": 1,}]', "line 1 column 11"),
        ("a.jsonl", '{"messages": []\n', "a.jsonl, line 1"),
        ("a.json", '{"id": 1}\n{"id": 2}', "named .jsonl"),
        ("a.json", '{"id": 1}', "must hold a list"),
        ("a.json", "[]", "holds no conversation"),
        ("a.jsonl", "\n\n", "holds no conversation"),
        ("a.json", "[3]", "must be an object, got int"),
        ("a.json", '["\\ud800"]', "not JSON in UTF-8"),
        ("a.json", "[" * 100_000, "not JSON in UTF-8"),
        ("a.csv", "", "not '.csv'"),
        ("a.json", '[{"id": true, "messages": []}]', "'id' must be text"),
    ],
)
def test_wrong_file_says_what_and_where(tmp_path, name, text, said):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_conversations(path)
    assert str(path) in str(error.value) and said in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json: cannot be read"):
        read_conversations(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("second", "said"), [("a.b", r"id 'a\.b' clashes with 'a\.b'"), ("a/b", "both make the key 'a_b'")]
)
def test_ids_that_clash_are_named(tmp_path, second, said):
    with pytest.raises(UserError, match=said) as error:
        read(tmp_path, [{"id": "a.b", "messages": MESSAGES}, {"id": second, "messages": MESSAGES}])
    assert "entry [1]" in str(error.value) and "entry [0]" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"more": 1}, "at most answer_facts beside them"),
        ({"visuals": []}, r"marks \['video'\]"),
        ({"visuals": [{"kind": "video", "member": "1.mp4"}]}, r"must be \['0\.mp4'\]"),
        ({"visuals": [{"kind": "video", "member": "../0.mp4"}]}, r"must be \['0\.mp4'\]"),
        ({"visuals": [{"kind": "video", "member": "0"}]}, "extension"),
        ({"visuals": [{"kind": "audio", "member": "0.mp4"}]}, "audio"),
        ({"messages": [{"role": "user", "content": 3}]}, "strings"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "no answer"),
        ({"messages": 3}, "must be a list"),
        ({"answer_kinds": []}, "1 question type"),
        ({"answer_facts": [{}, {}]}, r"for each of 1 answer\(s\), got \[\{\}, \{\}\]"),
        ({"answer_facts": {"depth": 1}}, "'answer_facts' must be a list"),
        ({"answer_facts": ["deep"]}, "must hold texts and numbers by name"),
        ({"answer_facts": [{"depth": [1]}]}, "must hold texts and numbers by name"),
        ({"answer_facts": [{"depth": float("nan")}]}, "must hold texts and numbers by name"),
    ],
)
def test_json_of_a_shard_is_checked(change, said):
    good = Conversation(
        "a", (Message("user", "<video>?"), Message("assistant", "b")), (Visual("video", "x.mp4"),), ("",)
    )
    record = {**json.loads(good.to_json()), **change}
    with pytest.raises(UserError, match=said) as error:
        Conversation.from_json(json.dumps(record).encode(), "s/shard-000000.tar", "k")
    assert "s/shard-000000.tar: sample 'k'" in str(error.value)
