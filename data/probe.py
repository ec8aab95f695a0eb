"""The probe set: rendered clips with questions, encoded as H.264 and packed into shards like any other data.

Axis letters:
    F  frames    H W C  pixel rows, pixel columns, channels    O  things per frame (one per quadrant)
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.probe_scene import COLOURS, PLACES, SHAPES, Scenes, render
from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError, nearest
from lightning_crosslmm.shards import SampleInfo, ShardWriter
from lightning_crosslmm.video import encode_video

FPS_HZ = 4.0
KINDS = ("colour_of_shape", "colour_at_place", "place_of_shape")


def ask(scenes: Scenes, kind: str, frame: int, thing: int) -> tuple[str, str]:
    """Put one question about one thing, and answer it. Frames count from 0.

    ``colour_of_shape``: "t3 disc?" -> "red";  ``colour_at_place``: "t3 tl?" -> "red";
    ``place_of_shape``: "t3 disc at?" -> "tl".
    """
    shape, colour = SHAPES[scenes.shape_FO[frame, thing]], list(COLOURS)[scenes.colour_FO[frame, thing]]
    if kind == "colour_of_shape":
        return f"t{frame} {shape}?", colour
    if kind == "colour_at_place":
        return f"t{frame} {PLACES[thing]}?", colour
    return f"t{frame} {shape} at?", PLACES[thing]


def conversation(
    random: np.random.Generator, scenes: Scenes, key: str, kinds: Sequence[str], num_questions: int
) -> Conversation:
    """Ask several things about a clip, one turn each; no thing is asked about twice."""
    num_frames, per_frame = scenes.shape_FO.shape
    chosen = random.permutation(num_frames * per_frame)[:num_questions]
    kind_of = random.integers(0, len(kinds), len(chosen))
    messages, asked = [], []
    for index, number in zip(chosen, kind_of, strict=True):
        question, answer = ask(scenes, kinds[number], *divmod(int(index), per_frame))
        mark = "" if messages else "<video>\n"
        messages += [Message("user", mark + question), Message("assistant", answer)]
        asked.append(kinds[number])
    return Conversation(key, tuple(messages), (Visual("video", f"{key}.mp4"),), tuple(asked))


def write_probe(
    folder: Path,
    split: str,
    *,
    clips: dict[str, int],
    num_frames: int,
    image_size: int,
    noise: float,
    kinds: Sequence[str],
    questions_per_clip: int,
    seed: int,
    clips_per_shard: int,
) -> None:
    """Render one split of the probe set into shards.

    Splits draw from different random streams, so no clip of one is in another.

    Args:
        folder: where the shards go.
        split: train, val or test.
        clips: how many clips each split has.
        num_frames: frames per clip, one second for every four of them; each is a new scene.
        image_size: pixels per side, even, 16 or more.
        noise: standard deviation of the pixel noise, 0 to 1.
        kinds: question types: colour_of_shape, colour_at_place, place_of_shape.
        questions_per_clip: turns of each conversation, at most four per frame.
        seed: of everything that is drawn.
        clips_per_shard: samples per shard.

    Raises:
        UserError: a setting outside its range.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"data.probe.kinds names '{kind}'; right are {', '.join(KINDS)}{nearest(kind, KINDS)}")
    if not kinds or not 1 <= questions_per_clip <= 4 * num_frames:
        raise UserError(
            f"data.probe.kinds {list(kinds)} must name a kind, "
            f"data.probe.questions_per_clip {questions_per_clip} be 1 to {4 * num_frames} "
            f"(four things in each of data.probe.num_frames {num_frames})"
        )
    if image_size < 16 or image_size % 2 or not 0 <= noise <= 1:
        raise UserError(
            f"data.probe.image_size {image_size} must be even and 16 or more, data.probe.noise {noise} between 0 and 1"
        )
    with ShardWriter(folder, samples_per_shard=clips_per_shard) as writer:
        for number in range(clips[split]):
            random = np.random.default_rng(_stream(seed, split, number))
            scenes = render(random, num_frames, image_size, noise)
            sample = conversation(random, scenes, f"{split}-{number:06d}", kinds, questions_per_clip)
            video = encode_video(scenes.frames_FHWC, FPS_HZ)
            info = SampleInfo(num_frames / FPS_HZ, num_frames, ((0.0,),))
            writer.write(sample, {"0.mp4": video}, info)


def _stream(seed: int, split: str, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{split}/{number}".encode()).digest()[:8])
