"""The probe suite's clips and questions, encoded as H.264 and packed into shards like any other data.

Two forms of a question: ``word`` asks for the word itself, ``choice`` for the letter of one of up to four options
("moon? A red B cyan C pink D blue" -> "B"). What is measured in the latter form is asked once for every cyclic
permutation of the options, each time in a sample of its own; `metrics.CircularAccuracy` puts them together again.

Axis letters:
    F  frames    H W C  pixel rows, pixel columns, channels
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.suite_scene import Drawn, Item, Task
from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import encode_video

FPS_HZ = 4.0
FORMS = ("word", "choice")
LETTERS = "ABCD"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Suite:
    """What all tasks have in common.

    Args:
        clips: how many clips each split has, of each task and number of frames; 1 or more.
        frames: numbers of frames of each split's clips; those of val and test that train has not are held-out lengths.
        image_size: pixels per side, even, 32 or more.
        noise: standard deviation of the pixel noise, 0 to 1.
        form: ``word`` or ``choice``.
        seed: of everything that is drawn, 0 or more.
        clips_per_shard: clips per shard, 1 or more.

    Raises:
        UserError: a setting outside its range.
    """

    clips: Mapping[str, int]
    frames: Mapping[str, Sequence[int]]
    image_size: int
    noise: float
    form: str
    seed: int
    clips_per_shard: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        lengths = {split: list(self.frames.get(split, ())) for split in SPLITS}
        for setting, value, is_right, right in (
            ("clips", dict(self.clips), all(_is_count(self.clips.get(s)) for s in SPLITS), "1 or more for each split"),
            (
                "frames",
                dict(self.frames),
                all(each and len(set(each)) == len(each) and all(map(_is_count, each)) for each in lengths.values()),
                "different numbers of frames, one at least, for each split",
            ),
            ("image_size", self.image_size, self.image_size >= 32 and self.image_size % 2 == 0, "even, 32 or more"),
            ("noise", self.noise, 0 <= self.noise <= 1, "between 0 and 1"),
            ("form", self.form, self.form in FORMS, f"one of {', '.join(FORMS)}{nearest(str(self.form), FORMS)}"),
            ("seed", self.seed, self.seed >= 0, "0 or more"),
            ("clips_per_shard", self.clips_per_shard, _is_count(self.clips_per_shard), "1 or more"),
        ):
            if not is_right:
                raise UserError(f"data.suite.{setting}: must be {right}, got {value!r}")

    def check(self, name: str, task: Task) -> None:
        """Hold the numbers of frames against what a task needs.

        Raises:
            UserError: names the number, the task and the least that it needs.
        """
        short = min(count for split in SPLITS for count in self.frames[split])
        if short < task.least_frames:
            raise UserError(
                f"data.suite.frames: has clips of {short} frame(s), and the task '{name}' with these settings "
                f"(data.difficulty.{name}) needs {task.least_frames} or more"
            )


def write_task(folder: Path, name: str, task: Task, suite: Suite, split: str, num_frames: int) -> None:
    """Render the clips of one task, split and length into shards; each split and length has its own random stream.

    The question type of every answer is ``NAME@FRAMES``.

    Args:
        folder: where the shards go.
        name: of the task.
        task: draws the clips.
        suite: what all tasks have in common.
        split: train, val or test.
        num_frames: of each clip, one second for every four of them.
    """
    with ShardWriter(folder, samples_per_shard=suite.clips_per_shard) as writer:
        for number in range(suite.clips[split]):
            random = np.random.default_rng(_stream(suite.seed, name, split, num_frames, number))
            drawn = task.draw(random, num_frames, suite.image_size)
            key = f"{name}-{num_frames}-{split}-{number:06d}"
            told = conversations(random, drawn, key, f"{name}@{num_frames}", suite.form, circular=split != "train")
            video = encode_video(with_noise(random, drawn.frames_FHWC, suite.noise), FPS_HZ)
            info = SampleInfo(num_frames / FPS_HZ, num_frames, ((0.0,),))
            for conversation in told:
                writer.write(conversation, {"0.mp4": video}, info)


def with_noise(random: np.random.Generator, frames_FHWC: np.ndarray, noise: float) -> np.ndarray:
    """Add pixel noise and turn 0..1 into uint8."""
    noisy_FHWC = frames_FHWC + random.normal(0, noise, frames_FHWC.shape).astype(np.float32)
    return (noisy_FHWC.clip(0, 1) * 255).astype(np.uint8)


def conversations(
    random: np.random.Generator, drawn: Drawn, key: str, kind: str, form: str, circular: bool
) -> list[Conversation]:
    """Ask all items of a clip, one turn each, in random order.

    Every answer's facts tell the ``depth`` of the frame that holds it, 0 for the first and 1 for the last, where there
    is such a frame, and the ``item``, where it is asked in several permutations.

    Args:
        random: source of chance.
        drawn: the clip.
        key: names the sample; of several, each has its permutation's number behind it.
        kind: question type.
        form: ``word`` or ``choice``.
        circular: in the form ``choice``, give a conversation for each cyclic permutation of the options, else one.
    """
    items = [drawn.items[number] for number in random.permutation(len(drawn.items))]
    if form == "word":
        turns = [(item.question, item.answer) for item in items]
        return [_conversation(key, kind, turns, [_depth(item, drawn) for item in items])]
    shuffled = [_options(random, item) for item in items]
    told = []
    for shift in range(len(shuffled[0]) if circular else 1):
        rotated = [options[shift:] + options[:shift] for options in shuffled]
        turns = [_lettered(item, options) for item, options in zip(items, rotated, strict=True)]
        facts: list[dict[str, str | float]] = [_depth(item, drawn) for item in items]
        if circular:
            facts = [fact | {"item": f"{key} {number}"} for number, fact in enumerate(facts)]
        told.append(_conversation(f"{key}-{shift}" if circular else key, kind, turns, facts))
    return told


def _conversation(
    key: str, kind: str, turns: Sequence[tuple[str, str]], facts: Sequence[Mapping[str, str | float]]
) -> Conversation:
    messages = []
    for question, answer in turns:
        mark = "" if messages else "<video>\n"
        messages += [Message("user", mark + question), Message("assistant", answer)]
    visuals = (Visual("video", f"{key}.mp4"),)
    return Conversation(key, tuple(messages), visuals, (kind,) * len(turns), tuple(facts))


def _options(random: np.random.Generator, item: Item) -> list[str]:
    others = [choice for choice in item.choices if choice != item.answer]
    wrong = random.permutation(others)[: len(LETTERS) - 1].tolist()
    return random.permutation([item.answer, *wrong]).tolist()


def _lettered(item: Item, options: Sequence[str]) -> tuple[str, str]:
    lines = [f"{letter} {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return " ".join((item.question, *lines)), LETTERS[options.index(item.answer)]


def _depth(item: Item, drawn: Drawn) -> dict[str, str | float]:
    return {} if item.frame is None else {"depth": round(item.frame / max(1, len(drawn.frames_FHWC) - 1), 4)}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _stream(*name: object) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, name)).encode()).digest()[:8])
