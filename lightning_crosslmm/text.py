"""The tokenizer's only door: conversations become ids and labels, ids become answers.

A conversation goes through the tokenizer's own chat template, with a private placeholder instead of every message. What
stands between the placeholders is the template's and may hold special tokens; what a message says is tokenised by
itself, so nobody types a special token, and a prompt has the very ids that were trained.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from lightning_crosslmm.batch import IGNORED, VISUAL_MARK
from lightning_crosslmm.chat_template import MARK, Turns, split_turns, template_ids
from lightning_crosslmm.errors import UserError

BYTE_VOCAB_SIZE = 261
"""Size of the byte tokenizer's vocabulary: 256 bytes and five special tokens."""

_RECURS = 64
"""Longest text, in characters, whose ids are kept for the next time: what many clips are asked is short."""

_BYTE_SPECIALS = ("<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_BYTE_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Text:
    """A tokenised conversation; the three lists are equally long.

    Args:
        ids: token ids, ``VISUAL_MARK`` where a visual stands.
        labels: the id itself in answers and the token that ends them, ``IGNORED`` elsewhere.
        answer: which answer of the conversation a label belongs to, counted from 0; -1 elsewhere.
    """

    ids: list[int]
    labels: list[int]
    answer: list[int]


def load_tokenizer(name: str | None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        name: ``byte`` for the one built here, ``byte:red,blue`` for the same with whole words beside the bytes, a local
            folder, or the hub's ``organisation/name``. None is nothing yet: what ``init_from`` would have named.

    Returns:
        The tokenizer; no code that comes with it is run.

    Raises:
        UserError: nothing of that name can be loaded.
    """
    if name is None:
        raise UserError("llm.tokenizer is not set; give init_from=FOLDER, which has one, or llm.tokenizer=FOLDER")
    if name.partition(":")[0] == "byte":
        return _byte_tokenizer(tuple(filter(None, name.partition(":")[2].split(","))))
    is_folder = Path(name).is_dir()
    if not is_folder and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise UserError(
            f"tokenizer '{name}': no such folder; give 'byte', a local folder or a hub name like 'org/name'"
        )
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=is_folder)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer '{name}' cannot be loaded: {error}") from error


def tokenise(conversation: Turns, tokenizer: Tokenizer, max_tokens: int, add_answer_prompt: bool = False) -> Text:
    """Turn a conversation into ids, and label what the model is to say.

    Labels lie on the answers and on the token that ends each, so that generation stops; the template's own words carry
    none. White space around a message is dropped, as Llama's template does and Qwen's does not.

    Args:
        conversation: its messages hold ``<video>`` or ``<image>`` where a visual stands.
        tokenizer: carries a chat template.
        max_tokens: longest text allowed, in tokens, each mark counting as one.
        add_answer_prompt: end with the words that open an answer, as generation needs it.

    Returns:
        The text.

    Raises:
        UserError: the text is too long, an answer holds a mark, or the chat template is absent, refuses the order of
            roles, changes earlier turns or never ends an answer.
    """
    roles, contents = split_turns(tokenizer, conversation)
    between = template_ids(tokenizer, tokenizer.chat_template, roles + ("assistant",) * add_answer_prompt)
    ids, labels, answer = list(between[0]), [IGNORED] * len(between[0]), [-1] * len(between[0])
    num_answers = 0
    for number, message in enumerate(conversation.messages):
        said, after = _content_ids(tokenizer, contents[number]), between[number + 1]
        num_labels = 0
        if message.role == "assistant":
            if VISUAL_MARK in said:
                raise UserError(
                    f"sample '{conversation.key}': message {number + 1} is an answer and holds <video> or <image>"
                )
            num_labels = len(said) + _turn_end(tokenizer, after) + 1
        num_silent = len(said) + len(after) - num_labels
        ids += [*said, *after]
        labels += [*said, *after][:num_labels] + [IGNORED] * num_silent
        answer += [num_answers] * num_labels + [-1] * num_silent
        num_answers += message.role == "assistant"
    if len(ids) > max_tokens:
        raise UserError(
            f"sample '{conversation.key}': its text has {len(ids)} tokens and data.max_tokens is {max_tokens}; "
            "raise the setting or shorten the conversation"
        )
    return Text(ids, labels, answer)


def template_tokens(tokenizer: Tokenizer, num_answers: int) -> int:
    """Count the tokens that the chat template puts around a conversation, with a system message or without.

    Args:
        tokenizer: carries a chat template.
        num_answers: of the conversation, each with its question, at least 1.

    Returns:
        The larger of the two counts; templates that refuse a system message are asked without.
    """
    counts, turns = [], ("user", "assistant") * num_answers
    for system in (), ("system",):
        with suppress(UserError) if system else nullcontext():
            counts.append(sum(map(len, template_ids(tokenizer, tokenizer.chat_template, (*system, *turns)))))
    return max(counts)


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Say which token ends an answer in this tokenizer's chat template; generation stops at it.

    Raises:
        UserError: the template puts no special token after an answer.
    """
    after = template_ids(tokenizer, tokenizer.chat_template, ("user", "assistant"))[-1]
    return after[_turn_end(tokenizer, after)]


def decode_answer(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Turn generated ids into the answer's text: up to the end of the turn, without special tokens."""
    stops = {end_of_turn_id(tokenizer), tokenizer.eos_token_id}
    length = next((place for place, token in enumerate(ids) if token in stops), len(ids))
    return str(tokenizer.decode(list(ids[:length]), skip_special_tokens=True)).strip()


class TextStreamer:
    """Say an answer's text as its tokens come, whole characters only, and a line break at its end.

    Args:
        tokenizer: of the ids.
        say: receives pieces of text.
    """

    def __init__(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        self._tokenizer, self._say = tokenizer, say
        self._ids: list[int] = []
        self._said = 0

    def put(self, ids: Tensor) -> None:
        """Take the next ids; the prompt comes first, and is empty where it went in as embeddings."""
        self._ids += ids.flatten().tolist()
        text = decode_answer(self._tokenizer, self._ids)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            self._say(text[self._said :])
            self._said = len(text)

    def end(self) -> None:
        """Say what is left, and break the line."""
        self._say(decode_answer(self._tokenizer, self._ids)[self._said :] + "\n")


def _byte_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _BYTE_SPECIALS])
    # as a vocabulary learned from text would have them; an unknown word is still its bytes
    backend.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<|pad|>", eos_token="<|end|>", chat_template=_BYTE_TEMPLATE
    )


def _content_ids(tokenizer: Tokenizer, content: str) -> list[int]:
    """Tokenise what a message says: marks become VISUAL_MARK, special tokens' names are plain text."""
    ids: list[int] = []
    for number, part in enumerate(MARK.split(content)):
        ids += [VISUAL_MARK] if number else []
        ids += (_kept_ids if len(part) <= _RECURS else _ids)(tokenizer, part) if part else ()
    return ids


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))


_kept_ids = lru_cache(maxsize=4096)(_ids)


@lru_cache(maxsize=256)
def _turn_end(tokenizer: Tokenizer, after: tuple[int, ...]) -> int:
    """Place of the first special token among those the template puts after an answer."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    for place, token in enumerate(after):
        if token in special:
            return place
    raise UserError(
        f"tokenizer '{tokenizer.name_or_path}': its chat template puts no special token after an answer, so "
        "generation would never stop; end each answer with one, such as eos"
    )
