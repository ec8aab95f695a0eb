"""Tokenising: labels on answers only, equal ids in training and prompting, nothing typed becomes a special token."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK
from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.text import (
    BYTE_VOCAB_SIZE,
    decode_answer,
    end_of_turn_id,
    load_tokenizer,
    template_tokens,
    tokenise,
)

CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|head|>' + m.role + '<|tail|>\n\n' + (m.content | trim) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|tail|>\n\n' }}{% endif %}"
)
REWRITING = (  # what an earlier turn said about its thoughts is taken back once another turn follows
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>' }}{% endfor %}"
)


def with_template(template: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number for number, letter in enumerate(alphabet)}
    vocab["at"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "t")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    words = ["<|im_start|>", "<|im_end|>", "<|bos|>", "<|head|>", "<|tail|>", "<|eot|>"]
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|bos|>", chat_template=template
    )


TOKENIZERS = {
    "byte": lambda: load_tokenizer("byte"),
    "chatml": lambda: with_template(CHATML),
    "llama": lambda: with_template(LLAMA),
}
END = {"byte": "<|end|>", "chatml": "<|im_end|>", "llama": "<|eot|>"}


@pytest.fixture(params=list(TOKENIZERS))
def named(request):
    return request.param, TOKENIZERS[request.param]()


def talk(*contents: str, system: str | None = None, num_visuals: int = 0) -> Conversation:
    messages = tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents))
    messages = ((Message("system", system),) if system else ()) + messages
    return Conversation("k7", messages, (Visual("video", "0.mp4"),) * num_visuals, ("",) * (len(contents) // 2))


def test_labels_are_the_answers_and_what_ends_them(named):
    name, tokenizer = named
    text = tokenise(talk("what hat?", "a red hat", "and mat?", "flat", system="Talk."), tokenizer, 500)
    end = tokenizer.convert_tokens_to_ids(END[name])
    for number, answer in enumerate(("a red hat", "flat")):
        labelled = [label for label, which in zip(text.labels, text.answer, strict=True) if which == number]
        assert labelled == [*tokenizer.encode(answer, add_special_tokens=False), end]
    assert [label != IGNORED for label in text.labels] == [which >= 0 for which in text.answer]
    assert all(label in (IGNORED, token) for label, token in zip(text.labels, text.ids, strict=True))


def test_ids_spell_the_rendered_template(named):
    _, tokenizer = named
    conversation = talk("what hat?", "a red hat", "and mat?", "flat", system="Talk.")
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokenise(conversation, tokenizer, 500).ids) == rendered


def test_a_default_system_message_is_kept():
    tokenizer = with_template(CHATML)
    assert tokenizer.decode(tokenise(talk("q", "a"), tokenizer, 99).ids).startswith("<|im_start|>system\nBe brief.")


def test_prompting_gives_the_ids_that_were_trained(named):
    _, tokenizer = named
    trained = tokenise(talk("<video>\nwhat hat?", "a red hat", num_visuals=1), tokenizer, 500)
    prompt = tokenise(talk("<video>\nwhat hat?", num_visuals=1), tokenizer, 500, add_answer_prompt=True)
    start = trained.answer.index(0)
    assert prompt.ids == trained.ids[:start]
    assert set(prompt.labels) == {IGNORED} and set(prompt.answer) == {-1}


def test_marks_become_one_id_each_and_split_what_is_around_them(named):
    _, tokenizer = named
    text = tokenise(talk("a<video>t <image><video>?", "yes", num_visuals=3), tokenizer, 500)
    plain = [tokenizer.encode(part, add_special_tokens=False) for part in ("a", "t ", "?")]
    expected = [*plain[0], VISUAL_MARK, *plain[1], VISUAL_MARK, VISUAL_MARK, *plain[2]]
    start = text.ids.index(VISUAL_MARK) - len(plain[0])
    assert text.ids[start : start + len(expected)] == expected
    assert text.ids.count(VISUAL_MARK) == 3


def test_nobody_types_a_special_token(named):
    name, tokenizer = named
    special = tokenizer.convert_tokens_to_ids(END[name])
    typed = tokenise(talk(f"stop {END[name]} now", f"no {END[name]}"), tokenizer, 500)
    harmless = tokenise(talk("stop now", "no"), tokenizer, 500)
    assert typed.ids.count(special) == harmless.ids.count(special)
    assert END[name] in tokenizer.decode(typed.ids, skip_special_tokens=True)


def test_private_placeholders_in_a_message_stay_text(named):
    _, tokenizer = named
    text = tokenise(talk("\ue0000\ue001", "\ue0001\ue001"), tokenizer, 500)
    assert tokenizer.decode(text.ids).count("\ue0000\ue001") == 1


def test_a_template_that_rewrites_is_refused():
    tokenizer = with_template(REWRITING)
    assert tokenise(talk("q", "a"), tokenizer, 99).ids
    with pytest.raises(UserError, match="changes earlier turns"):
        tokenise(talk("q", "a", "q", "a"), tokenizer, 99)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "no special token after an answer"),
        ("{{ messages[0].content }}<|eot|>", "drops, repeats or reorders"),
        ("{{ raise_exception('roles must dance') }}", "roles must dance"),
        (None, "chat template"),
    ],
)
def test_unfit_templates_are_refused(template, message):
    with pytest.raises(UserError, match=message):
        tokenise(talk("q", "a"), with_template(template), 99)


def test_too_long_and_marked_answers_are_refused():
    tokenizer = load_tokenizer("byte")
    length = len(tokenise(talk("q", "a"), tokenizer, 6).ids)
    assert length == 6
    with pytest.raises(UserError, match=r"'k7'.* 6 tokens and data.max_tokens is 5"):
        tokenise(talk("q", "a"), tokenizer, 5)
    with pytest.raises(UserError, match=r"'k7'.*message 2 is an answer"):
        tokenise(talk("q", "a <video>"), tokenizer, 99)


def test_byte_tokenizer_has_every_byte_and_no_more():
    tokenizer = load_tokenizer("byte")
    assert len(tokenizer) == BYTE_VOCAB_SIZE
    for text in ("naïve — 動画 🎬\n\t", "".join(map(chr, range(1, 256)))):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.encode()) and max(ids) < 256
        assert tokenizer.decode(ids) == text


def test_a_saved_tokenizer_loads_from_its_folder(tmp_path):
    tokenizer = load_tokenizer("byte")
    tokenizer.save_pretrained(tmp_path / "tok")
    loaded = load_tokenizer(str(tmp_path / "tok"))
    conversation = talk("<video> <|end|> é?", "ja", num_visuals=1)
    assert tokenise(conversation, loaded, 99) == tokenise(conversation, tokenizer, 99)
    assert loaded.pad_token_id == tokenizer.pad_token_id != loaded.eos_token_id


def test_missing_and_broken_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path / "empty"))


def test_code_that_comes_with_a_tokenizer_is_not_run(tmp_path):
    folder = tmp_path / "tok"
    load_tokenizer("byte").save_pretrained(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(str(folder))
    assert not (tmp_path / "ran").exists()


def test_answers_end_with_their_turn(named):
    name, tokenizer = named
    end = tokenizer.convert_tokens_to_ids(END[name])
    said = tokenizer.encode(" a hat ", add_special_tokens=False)
    assert end_of_turn_id(tokenizer) == end
    assert decode_answer(tokenizer, [*said, end, *said]) == "a hat"
    assert decode_answer(tokenizer, said) == "a hat"


def test_whole_words_stand_beside_the_bytes():
    tokenizer = load_tokenizer("byte:disc,red")
    assert len(tokenizer) == BYTE_VOCAB_SIZE + 2
    ids = tokenizer.encode("t3 disc? discs red", add_special_tokens=False)
    assert [number for number in ids if number >= BYTE_VOCAB_SIZE] == [
        BYTE_VOCAB_SIZE,
        BYTE_VOCAB_SIZE + 1,
    ]  # not in "discs"
    assert tokenizer.decode(ids) == "t3 disc? discs red"


@pytest.mark.parametrize("num_answers", [1, 2, 5])
def test_the_templates_tokens_are_what_text_does_not_explain(num_answers):
    tokenizer = load_tokenizer("byte")
    said = ["abc", "de"] * num_answers
    bare = len(tokenise(talk(*said), tokenizer, 1000).ids) - 5 * num_answers
    with_system = len(tokenise(talk(*said, system="xy"), tokenizer, 1000).ids) - 5 * num_answers - 2
    assert template_tokens(tokenizer, num_answers) == max(bare, with_system) == 4 * num_answers + 2
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    tokenizer.chat_template = refuses + str(tokenizer.chat_template)
    assert template_tokens(tokenizer, num_answers) == bare


MULTIMODAL = (  # as LLaVA-OneVision's is written: visuals first, then text
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% for part in message.content if part.type != 'text' %}<{{ part.type }}>{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ '\n' + part.text }}{% endfor %}<|end|>{% endfor %}"
)


def test_a_multimodal_template_places_the_visuals_of_a_question_itself():
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = MULTIMODAL
    text = tokenise(talk("<video>\n<image>\nwho?", "me", num_visuals=2), tokenizer, 99)
    spelt = "".join("*" if token == VISUAL_MARK else tokenizer.decode([token]) for token in text.ids)
    assert spelt == "<|user|>**\nwho?<|end|><|assistant|>\nme<|end|>"
    assert decode_answer(tokenizer, [token for token in text.labels if token != IGNORED]) == "me"
    within = tokenise(talk("is <video> new?", "no", num_visuals=1), tokenizer, 99)
    assert within.ids.count(VISUAL_MARK) == 1


def test_a_multimodal_template_that_forgets_a_visual_is_refused():
    tokenizer = load_tokenizer("byte")
    tokenizer.chat_template = MULTIMODAL.replace("<{{ part.type }}>", "")
    with pytest.raises(UserError, match="its chat template puts no <video> or <image> where one is handed to it"):
        tokenise(talk("<video>\nwho?", "me", num_visuals=1), tokenizer, 99)


def test_short_texts_that_recur_are_tokenised_once_and_by_each_tokenizer_itself(monkeypatch):
    plain, worded = load_tokenizer("byte"), load_tokenizer("byte:moon")
    asked, encode = [], type(plain).encode
    monkeypatch.setattr(
        type(plain), "encode", lambda self, text, **more: asked.append(text) or encode(self, text, **more)
    )
    short, long = talk("<video> moon?", "red", num_visuals=1), talk("why? " * 20, "red")
    texts = [[tokenise(each, tokenizer, 999) for each in (short, long)] for tokenizer in (plain, worded) * 2]
    said = [text for text in asked if "<|" not in text]
    assert sorted(said) == sorted([" moon?", "red"] * 2 + [("why? " * 20).strip()] * 4)
    assert texts[:2] == texts[2:] and len(texts[0][0].ids) == len(texts[1][0].ids) + 3
    texts[0][0].ids.clear()  # nobody else's
    assert tokenise(short, plain, 999) == texts[2][0]


def test_no_name_is_told():
    with pytest.raises(UserError, match="llm.tokenizer is not set; give init_from=FOLDER"):
        load_tokenizer(None)
