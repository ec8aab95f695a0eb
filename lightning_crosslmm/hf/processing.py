"""Texts, videos and images as the tensors that an exported model reads.

Axis letters:
    B  texts    L  tokens of the longest    F  frames    V  visuals
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from lightning_crosslmm.batch import VISUAL_MARK
from lightning_crosslmm.conversation import Message
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.hf.configuration import CrossLMMConfig
from lightning_crosslmm.hf.inputs import NS_PER_S
from lightning_crosslmm.text import Text, tokenise
from lightning_crosslmm.video import Clip, FrameSampling, clip_of, read_clip, read_image

MARKS = {"image": "<image>", "video": "<video>"}
_MARK = re.compile("(<image>|<video>)")


@dataclass(frozen=True)
class _Spoken:
    key: str
    messages: Sequence[Message]


class CrossLMMProcessor(ProcessorMixin):
    """Decode visuals as the run did, and tokenise texts as the run did.

    Args:
        tokenizer: of the LLM; gets ``<image>`` and ``<video>`` as tokens where it has none.
        image_size: pixels per side of a frame.
        sampling: arguments of `FrameSampling`, which moments of a video are looked at.
        max_tokens: longest text of a conversation.
        chat_template: None takes the tokenizer's.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        image_size: int = 0,
        sampling: Mapping[str, Any] | None = None,
        max_tokens: int = 0,
        chat_template: str | None = None,
    ) -> None:
        self.image_size, self.sampling, self.max_tokens = image_size, dict(sampling or {}), max_tokens
        if tokenizer is not None:
            lacking = [mark for mark in MARKS.values() if mark not in tokenizer.get_vocab()]
            tokenizer.add_tokens(lacking, special_tokens=True)
            self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids(list(MARKS.values()))
        super().__init__(tokenizer, chat_template=chat_template or getattr(tokenizer, "chat_template", None))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        fps_hz: float | None = None,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        padding: bool = True,
    ) -> BatchFeature:
        """Make the model's inputs of texts with ``<image>`` and ``<video>`` in them.

        A text that `apply_chat_template` rendered gives the very ids of training as long as its tokenizer merges
        nothing across the borders of messages; ``apply_chat_template(..., tokenize=True)`` always does.

        Args:
            images: one, or a list in the order of their marks in all texts: files, PIL images, or uint8 RGB arrays.
            text: one or several.
            videos: one, or a list in the order of their marks: files, or frames as a list or uint8 RGB array.
            fps_hz: frames per second of videos that are given as frames.
            padding_side: ``left`` or ``right``.
            return_tensors: ``pt``.
            padding: True; a batch of unequal texts is nothing else.

        Returns:
            ``input_ids``, ``attention_mask``, and with visuals ``pixel_values``, ``num_frames``, ``frame_time_ns``; see
            `Inputs`.

        Raises:
            UserError: no text, another number of visuals than of marks, a file that cannot be read, or frames without
                a rate.
        """
        if text is None or return_tensors not in (None, "pt") or not padding:
            raise UserError('the processor wants text, and gives padded tensors: return_tensors="pt", padding=True')
        found = [self._ids(each) for each in ([text] if isinstance(text, str) else text)]
        return self._features(found, _listed(images), _listed(videos), fps_hz, padding_side)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str | None = "pt",
        continue_final_message: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """Render conversations, or make the model's inputs of them.

        Args:
            conversation: messages, or a list of such lists; ``{"role": ..., "content": ...}`` with a text, or with
                parts ``{"type": "text", "text": ...}``, ``{"type": "video", "path": ...}`` and ``{"type": "image",
                "path": ...}`` (or the visual itself under ``video`` and ``image``).
            add_generation_prompt: end with the words that open an answer.
            tokenize: give inputs and not text.
            return_dict: True.
            return_tensors: ``pt``.
            continue_final_message: False.
            processor_kwargs: ``fps_hz``, ``padding_side`` and ``padding`` of `__call__`.
            **settings: the same, given directly.

        Returns:
            A text, or as many as conversations; with `tokenize` as `__call__`, and ``answer_index`` with answers.

        Raises:
            UserError: a part that is none of these; see `tokenise` and `__call__`, too.
        """
        settings = {"fps_hz": None, "padding_side": "left", "padding": True, **settings, **(processor_kwargs or {})}
        if (
            not (return_dict and settings.pop("padding"))
            or return_tensors not in (None, "pt")
            or continue_final_message
        ):
            raise UserError(
                'apply_chat_template gives padded tensors: return_dict=True, return_tensors="pt"; a message is whole'
            )
        known = ("fps_hz", "padding_side")
        if unknown := sorted(settings.keys() - set(known)):
            raise UserError(f"apply_chat_template takes no {unknown[0]}{nearest(unknown[0], known)}")
        is_one = isinstance(conversation[0], Mapping)
        visuals: dict[str, list[Any]] = {"image": [], "video": []}
        turns = [_turns(each, visuals) for each in ([conversation] if is_one else conversation)]
        if not tokenize:
            messages = [[{"role": turn.role, "content": turn.content} for turn in each] for each in turns]
            texts = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=self.chat_template
            )
            return texts[0] if is_one else texts
        found = []
        for number, each in enumerate(turns):
            spoken = _Spoken(f"conversation {number}", each)
            text = tokenise(spoken, self.tokenizer, self.max_tokens, add_answer_prompt=add_generation_prompt)
            found.append(self._marked(text, each))
        return self._features(found, visuals["image"], visuals["video"], **settings)

    @property
    def model_input_names(self) -> list[str]:
        """Names of what the model reads."""
        return ["input_ids", "attention_mask", "pixel_values", "num_frames", "frame_time_ns", "answer_index"]

    def _ids(self, text: str) -> Text:
        mark_ids = {MARKS["image"]: self.image_token_id, MARKS["video"]: self.video_token_id}
        ids: list[int] = []
        for piece in filter(None, _MARK.split(text)):
            ids += [mark_ids[piece]] if piece in mark_ids else self.tokenizer.encode(piece, add_special_tokens=False)
        return Text(ids, [], [-1] * len(ids))

    def _marked(self, text: Text, turns: Sequence[Message]) -> Text:
        """Say of each mark of a tokenised conversation whether it is an image's or a video's."""
        kinds = iter([mark for turn in turns for mark in _MARK.findall(turn.content)])
        id_of = {MARKS["image"]: self.image_token_id, MARKS["video"]: self.video_token_id}
        return Text([id_of[next(kinds)] if each == VISUAL_MARK else each for each in text.ids], [], text.answer)

    def _features(
        self, texts: Sequence[Text], images: list[Any], videos: list[Any], fps_hz: float | None, padding_side: str
    ) -> BatchFeature:
        marks = [each for text in texts for each in text.ids if each in (self.image_token_id, self.video_token_id)]
        wanted = {"images": marks.count(self.image_token_id), "videos": marks.count(self.video_token_id)}
        for name, given in (("images", images), ("videos", videos)):
            if len(given) != wanted[name]:
                raise UserError(
                    f"{name}: the texts hold {wanted[name]} marks {MARKS[name[:-1]]}, given are {len(given)}"
                )
        queues = {self.image_token_id: iter(images), self.video_token_id: iter(videos)}
        clips = [self._look(next(queues[mark]), mark == self.video_token_id, fps_hz) for mark in marks]
        longest = max(len(text.ids) for text in texts)
        pad_id = self.tokenizer.pad_token_id or 0

        def rows(lists: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            gaps = [[fill] * (longest - len(each)) for each in lists]
            is_left = padding_side == "left"
            return torch.tensor(
                [[*gap, *own] if is_left else [*own, *gap] for own, gap in zip(lists, gaps, strict=True)]
            )

        data = {"input_ids": rows([text.ids for text in texts], pad_id)}
        data["attention_mask"] = rows([[1] * len(text.ids) for text in texts], 0)
        if any(number >= 0 for text in texts for number in text.answer):
            data["answer_index"] = rows([text.answer for text in texts], -1)
        if clips:
            data["pixel_values"] = torch.cat([clip.frames_FCHW for clip in clips])
            data["num_frames"] = torch.tensor([len(clip.frames_FCHW) for clip in clips])
            time_s_F = torch.cat([clip.frame_time_s_F for clip in clips])
            data["frame_time_ns"] = (time_s_F.double() * NS_PER_S).round().long()
        return BatchFeature(data)

    def _look(self, visual: Any, is_video: bool, fps_hz: float | None) -> Clip:
        if isinstance(visual, str | Path):
            if is_video:
                return read_clip(Path(visual), str(visual), FrameSampling(**self.sampling), self.image_size)
            return read_image(Path(visual), str(visual), self.image_size)
        if is_video and fps_hz is None:
            raise UserError("videos: frames without times; give a file, or fps_hz=... for how fast they follow")
        return clip_of(visual if is_video else [visual], self.image_size, fps_hz if is_video else None)


def _turns(messages: Sequence[Mapping[str, Any]], visuals: dict[str, list[Any]]) -> tuple[Message, ...]:
    """Write the parts of each message as one text with marks, and take the visuals out in order."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        words = []
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                words.append(part["text"])
                continue
            visual = part.get("path", part.get(str(kind)))
            if kind not in MARKS or visual is None:
                raise UserError(
                    f"a message holds {dict(part)}; parts are text, image and video, the latter with a path"
                )
            visuals[kind].append(visual)
            words.append(MARKS[kind] + "\n")
        turns.append(Message(message["role"], "".join(words).strip()))  # as tokenise drops white space around it
    return tuple(turns)


def _listed(visuals: Any) -> list[Any]:
    """Make a list of one visual or several; a video given as frames stands in a list of its own."""
    if visuals is None:
        return []
    return list(visuals) if isinstance(visuals, list | tuple) else [visuals]


AutoProcessor.register(CrossLMMConfig, CrossLMMProcessor)
