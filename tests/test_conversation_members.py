import json

import pytest

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.conversation_members import conversation_of
from lightning_crosslmm.errors import UserError

LLAVA = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A book."}]
ABOUT_A_VIDEO = (Message("user", "<video>\nWhat?"), Message("assistant", "A book."))


def read(record, *visuals, key="clip", **texts):
    blobs = dict.fromkeys(visuals, b"") | {name: text.encode() for name, text in texts.items()}
    return conversation_of(key, blobs if record is None else {**blobs, "json": json.dumps(record).encode()}, "a.tar")


def asked(text):
    return [{"from": "human", "value": text}, {"from": "gpt", "value": "A book."}]


def test_our_own_layout_is_read_as_written():
    visuals = (Visual("video", "x.mp4"), Visual("image", "y.jpg"))
    ours = Conversation("clip", (Message("user", "<video><image>"), Message("assistant", "b")), visuals, ("what",))
    blobs = {"json": ours.to_json(), "0.mp4": b"", "1.jpg": b""}
    assert conversation_of("clip", blobs, "a.tar") == Conversation.from_json(ours.to_json(), "a.tar", "clip")


@pytest.mark.parametrize(
    "record",
    [
        LLAVA,
        {"conversations": LLAVA},
        {"id": "x.y", "video": "clips/deep/a.mp4", "conversations": LLAVA, "source": "web"},
        {"video": "clip.mp4", "conversations": asked("<image>\nWhat?")},
        {"messages": [{"role": "user", "content": "<video>\nWhat?"}, {"role": "assistant", "content": "A book."}]},
        [
            {"role": "user", "content": [{"type": "video", "video": "a/b"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "A book."}]},
        ],
    ],
    ids=["turns", "entry", "entry with paths", "image marks", "messages", "parts"],
)
def test_entries_beside_a_video(record):
    conversation = read(record, "mp4", key="deep/clip")
    assert (conversation.key, conversation.messages) == ("deep/clip", ABOUT_A_VIDEO)
    assert (conversation.visuals, conversation.answer_kinds) == ((Visual("video", "mp4"),), ("",))


def test_question_types_come_along():
    assert read({"conversations": LLAVA, "kinds": ["what"]}, "mp4").answer_kinds == ("what",)


def test_marks_take_members_kind_by_kind_and_ten_after_nine():
    members = [f"{i}.jpg" for i in (10, 9, 1)]
    conversation = read(asked("<image><video><image><image>"), *members, "front.mp4")
    assert [visual.path for visual in conversation.visuals] == ["1.jpg", "front.mp4", "9.jpg", "10.jpg"]
    assert [visual.kind for visual in conversation.visuals] == ["image", "video", "image", "image"]


@pytest.mark.parametrize("names", [["b.jpg", "a.jpg"], ["in/clip.b.jpg", "in/clip.a.JPG"]])
def test_files_that_an_entry_names_keep_its_order(names):
    conversation = read({"images": names, "conversations": asked("<image><image>")}, "a.jpg", "b.jpg")
    assert [visual.path for visual in conversation.visuals] == ["b.jpg", "a.jpg"]


@pytest.mark.parametrize(
    ("record", "texts"), [(None, {"txt": "\ufeffA cat.\n"}), ({"url": "x", "caption": "A dog."}, {"txt": "A cat."})]
)
def test_a_caption_answers_the_visual_alone(record, texts):
    conversation = read(record, "jpg", **texts)
    assert conversation.messages == (Message("user", "<image>\n"), Message("assistant", "A cat."))
    assert conversation.visuals == (Visual("image", "jpg"),)


def test_a_caption_may_stand_in_the_json():
    assert read({"caption": " A dog. ", "width": 3}, "mp4").messages[1].content == "A dog."


@pytest.mark.parametrize(
    ("record", "visuals", "said"),
    [
        (None, ["mp4"], "neither 'json' nor 'txt', and the visuals ['mp4']"),
        ({"url": "x", "width": 3}, ["mp4"], "a 'json' with the fields ['url', 'width']"),
        (3, ["mp4"], "a 'json' with 3"),
        ([], ["mp4"], "a 'json' with []"),
        (LLAVA, [], "1 <video> mark(s) in the text, but 0 video(s)"),
        ({"video": "a.mp4", "conversations": LLAVA}, [], "1 <video> mark(s) in the text, but 0 video(s)"),
        (LLAVA, ["jpg"], "1 <video> mark(s)"),
        (asked("What?"), ["mp4"], "0 <video> mark(s) in the text, but 1 video(s)"),
        ({"conversations": 3}, ["mp4"], "'conversations' must be a list"),
        ({"conversations": [3]}, ["mp4"], "turn [0]"),
        ({"messages": [{"role": "user", "content": [{"type": ["x"]}]}]}, [], "turn [0]"),
        ({"caption": "A dog."}, [], "no visual that it is about"),
        ({"caption": " "}, ["jpg"], "empty answer"),
        ({"visuals": [], "messages": [], "answer_kinds": []}, ["0.mp4"], "has no answer"),
    ],
)
def test_what_is_not_understood_names_shard_and_key(record, visuals, said):
    with pytest.raises(UserError) as error:
        read(record, *visuals)
    assert str(error.value).startswith("a.tar: sample 'clip'") and said in str(error.value)


def test_texts_that_are_none_are_named():
    for member in ("json", "txt"):
        with pytest.raises(UserError, match=f"a.tar: sample 'k'.*'{member}'"):
            conversation_of("k", {member: b"\xff\xfe", "mp4": b""}, "a.tar")
    ours = Conversation("k", (Message("user", "?"), Message("assistant", "b")), (), ("",)).to_json()
    with pytest.raises(UserError, match=r"names the visuals \[\], but the members are \['0\.mp4'\]"):
        conversation_of("k", {"json": ours, "0.mp4": b""}, "a.tar")
