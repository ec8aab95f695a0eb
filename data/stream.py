"""From a place in the shards to a decoded, tokenised sample.

Axis letters:
    F  frames of all visuals of a sample    C H W  channels, pixel rows and columns
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.mixture import Mixture
from data.order import SampleRef, drawn
from data.turns import one_turn
from lightning_crosslmm.batch import Skipped, picture
from lightning_crosslmm.conversation import MARK, Facts, Visual
from lightning_crosslmm.conversation_members import conversation_of
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import SampleEntry
from lightning_crosslmm.storage import StorageError
from lightning_crosslmm.text import Text, Tokenizer, tokenise
from lightning_crosslmm.video import Clip, FrameSampling, read_clip, read_image


@dataclass(frozen=True)
class Sample:
    """One conversation, ready to be collated.

    Args:
        key: the sample's name.
        frames_FCHW: uint8, frames of all its visuals one after the other; F may be 0.
        frame_time_s_F: float32, seconds from the start of the frame's video.
        frames_per_visual: how many frames each visual has.
        text: ids, labels and answer numbers.
        answer_kinds: the question type of each answer.
        questions: what each answer answers, without marks.
        answer_facts: what the data tell of each answer.
        pictures: as `VideoBatch.picture_V4` has them, a tuple for each visual.
    """

    key: str
    frames_FCHW: Tensor
    frame_time_s_F: Tensor
    frames_per_visual: tuple[int, ...]
    text: Text
    answer_kinds: tuple[str, ...]
    questions: tuple[str, ...]
    answer_facts: tuple[Facts, ...] = ()
    pictures: tuple[tuple[int, int, int, int], ...] = ()


class DamagedSampleError(UserError):
    """A sample that cannot be read, decoded or tokenised, while its shard and store are in order.

    Args:
        skipped: what is reported where such samples are left out.
        message: names shard and sample.
    """

    def __init__(self, skipped: Skipped, message: str) -> None:
        super().__init__(message)
        self.skipped = skipped


@dataclass(frozen=True)
class Reading:
    """How samples are read, for training or for measuring.

    Args:
        sampling: which moments of a video become frames.
        image_size: height and width of a frame in pixels.
        tokenizer: carries a chat template.
        max_tokens: longest text allowed.
        timeout_s: longest time to decode a clip; None waits for ever.
        turns: ``all`` of a conversation, ``one`` drawn from it, or ``mixed``: either, half of the times each.
        shifts_frames: draw the offset of the moments, if `sampling` asks for that.
        seed: of what is drawn for a sample; its pass and its place in the data do the rest.
    """

    sampling: FrameSampling
    image_size: int
    tokenizer: Tokenizer
    max_tokens: int
    timeout_s: float | None = None
    turns: str = "all"
    shifts_frames: bool = False
    seed: int = 0


class ClipDataset(Dataset[Sample]):
    """Samples by their place in the shards, in any order, each read by its offsets.

    Args:
        data: opened shards.
        reading: what becomes of them.
    """

    def __init__(self, data: Mixture, reading: Reading) -> None:
        self._data, self._reading = data, reading

    def __len__(self) -> int:
        """Samples in all shards."""
        return self._data.num_samples

    def __getitem__(self, ref: SampleRef) -> Sample:
        """Read, decode and tokenise one sample; what is drawn for it depends on nothing but the seed and its name.

        Raises:
            DamagedSampleError: names shard and sample where a member's bytes, a visual or the text are damaged.
            UserError: an index or a store fails, which is no sample's fault.
        """
        entry = self._data.entry(ref)
        where = self._name(ref, entry)
        try:
            return self._read(ref, entry, where)
        except StorageError:
            raise
        except UserError as error:
            reason = str(error).removeprefix(where).lstrip(",: ")
            raise DamagedSampleError(Skipped(str(self._data.path(ref)), entry.key, reason), str(error)) from error

    def name(self, ref: SampleRef) -> str:
        """Name a sample in messages: its shard and key."""
        return self._name(ref, self._data.entry(ref))

    def _name(self, ref: SampleRef, entry: SampleEntry) -> str:
        return f"{self._data.path(ref)}: sample '{entry.key}'"

    def _read(self, ref: SampleRef, entry: SampleEntry, where: str) -> Sample:
        reading = self._reading
        members = self._data.read(ref, entry)
        conversation = conversation_of(entry.key, members, str(self._data.path(ref)))
        alone = reading.turns == "one" or (reading.turns == "mixed" and drawn(reading.seed, ref, "alone") < 0.5)
        if alone:
            turn = int(drawn(reading.seed, ref, "turn") * len(conversation.answer_kinds))
            conversation = one_turn(conversation, turn)
        text = tokenise(conversation, reading.tokenizer, reading.max_tokens)  # first: it costs least
        clips = [
            self._read_visual(ref, number, visual, members[visual.path], f"{where}, member '{visual.path}'")
            for number, visual in enumerate(conversation.visuals)
        ]
        parts = clips if len(clips) == 1 else [_no_frames(reading.image_size), *clips]
        return Sample(
            key=entry.key,
            frames_FCHW=_joined([clip.frames_FCHW for clip in parts]),
            frame_time_s_F=_joined([clip.frame_time_s_F for clip in parts]),
            frames_per_visual=tuple(len(clip.frames_FCHW) for clip in clips),
            text=text,
            answer_kinds=conversation.answer_kinds,
            questions=tuple(
                MARK.sub("", message.content).strip() for message in conversation.messages if message.role == "user"
            ),
            answer_facts=conversation.answer_facts or ({},) * len(conversation.answer_kinds),
            pictures=tuple(picture(visual.kind, reading.image_size) for visual in conversation.visuals),
        )

    def _read_visual(self, ref: SampleRef, number: int, visual: Visual, blob: bytes, where: str) -> Clip:
        reading = self._reading
        if visual.kind == "image":
            return read_image(blob, where, reading.image_size)
        offset = drawn(reading.seed, ref, f"offset {number}") if reading.shifts_frames else None
        return read_clip(blob, where, reading.sampling, reading.image_size, offset=offset, timeout_s=reading.timeout_s)


def _no_frames(image_size: int) -> Clip:
    return Clip(torch.empty(0, 3, image_size, image_size, dtype=torch.uint8), torch.empty(0))


def _joined(parts: list[Tensor]) -> Tensor:
    """Put tensors one after the other; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
