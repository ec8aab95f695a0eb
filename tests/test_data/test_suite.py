"""The suite's shards: what is written is what was drawn, and options come round."""

import json
from dataclasses import replace

import numpy as np
import pytest

import train
from data.suite import LETTERS, Suite, conversations, with_noise, write_task
from data.suite_scene import Board
from data.suite_things import Needle, Select
from data.suite_time import Count, Motion
from lightning_crosslmm.compose import compose_overrides
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import open_shards, read_sample
from lightning_crosslmm.text import load_tokenizer
from lightning_crosslmm.video import FrameSampling, read_clip

SUITE = Suite(
    clips={"train": 3, "val": 2, "test": 1},
    frames={"train": [4], "val": [4, 6], "test": [6]},
    image_size=32,
    noise=0.1,
    form="word",
    seed=0,
    clips_per_shard=2,
)
TASK = Needle(2, 1)


def told(form, circular, task=TASK):
    drawn = task.draw(np.random.default_rng(1), 5, 32)
    return drawn, conversations(np.random.default_rng(2), drawn, "clip", "needle@5", form, circular)


def turns(conversation):
    asked = [message.content.removeprefix("<video>\n") for message in conversation.messages[::2]]
    return list(zip(asked, (message.content for message in conversation.messages[1::2]), strict=True))


def tars(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.glob("*.tar")))


def test_a_clip_that_is_read_back_is_the_one_that_was_drawn(tmp_path):
    write_task(tmp_path / "val", "needle", TASK, SUITE, "val", 6)
    shards = open_shards(tmp_path / "val")
    assert shards.num_samples == (2,) and shards.answer_kinds == ("needle@6",)
    entry = shards.index(0).entries[1]
    assert (entry.key, entry.num_frames, entry.duration_s) == ("needle-6-val-000001", 6, 1.5)
    members = read_sample(shards.paths[0], entry)
    clip = read_clip(members["0.mp4"], "clip", FrameSampling("rate", rate_hz=4.0, max_frames=64))
    assert clip.frame_time_s_F.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    facts = json.loads(members["json"])["answer_facts"]
    assert len({fact["depth"] for fact in facts}) == 2 and {fact["depth"] for fact in facts} <= {
        0,
        0.2,
        0.4,
        0.6,
        0.8,
        1,
    }
    # scenes change from frame to frame, so that a frame in another's place would show
    assert all((one != other).any() for one, other in zip(clip.frames_FCHW, clip.frames_FCHW[1:], strict=False))


def test_same_seed_same_bytes_and_splits_lengths_tasks_and_seeds_are_streams_of_their_own(tmp_path):
    written = {}
    for name, task, suite, split, frames in (
        ("needle", TASK, SUITE, "train", 4),
        ("needle", TASK, SUITE, "train", 4),
        ("needle", TASK, SUITE, "val", 4),
        ("other", TASK, SUITE, "train", 4),
        ("needle", TASK, replace(SUITE, seed=1), "train", 4),
        ("needle", TASK, replace(SUITE, noise=0.2), "train", 4),
    ):
        folder = tmp_path / str(len(written)) / str(len(list(tmp_path.iterdir())))
        write_task(folder, name, task, suite, split, frames)
        written.setdefault((name, suite.seed, suite.noise, split), []).append(tars(folder))
    first, again = written["needle", 0, 0.1, "train"]
    assert first == again
    assert len({content for contents in written.values() for content in contents}) == 5


def test_no_clip_of_one_split_is_in_another(tmp_path):
    many = replace(SUITE, clips=dict.fromkeys(SUITE.clips, 20), clips_per_shard=20)
    seen = []
    for split in many.clips:
        write_task(tmp_path / split, "needle", TASK, many, split, 4)
        seen += [entry.members["0.mp4"].sha256 for entry in open_shards(tmp_path / split).index(0).entries]
    assert len(seen) == len(set(seen)) == 60


def test_words_are_asked_for_once_each():
    drawn, (conversation,) = told("word", circular=True)
    assert sorted(turns(conversation)) == sorted((item.question, item.answer) for item in drawn.items)
    assert conversation.key == "clip" and conversation.answer_kinds == ("needle@5",) * 2
    depth = {item.question: item.frame / 4 for item in drawn.items}
    asked = [question for question, _ in turns(conversation)]
    assert conversation.answer_facts == tuple({"depth": depth[question]} for question in asked)


@pytest.mark.parametrize("task", [TASK, Count(3, 2, 2), Motion(1, 0.1)])
def test_options_go_round_and_each_letter_is_right_once(task):
    drawn, asked = told("choice", True, task)
    num_options = min(4, len(drawn.items[0].choices))
    assert [conversation.key for conversation in asked] == [f"clip-{shift}" for shift in range(num_options)]
    answer_of = {item.question: item.answer for item in drawn.items}
    for same in zip(*map(turns, asked), strict=True):
        rows = [question.replace("?", "?|").split("|") for question, _ in same]
        (stem,) = {stem for stem, _ in rows}
        options = [dict(zip(*[iter(row.split())] * 2, strict=True)) for _, row in rows]
        assert [options[shift][letter] for shift, (_, letter) in enumerate(same)] == [answer_of[stem]] * num_options
        assert sorted(letter for _, letter in same) == list(LETTERS[:num_options])
        lists = [list(option.values()) for option in options]
        assert all(row[1:] + row[:1] == following for row, following in zip(lists, lists[1:], strict=False))
        assert len(set(lists[0])) == num_options and list(options[0]) == list(LETTERS[:num_options])
    items = [[fact["item"] for fact in conversation.answer_facts] for conversation in asked]
    assert all(each == items[0] for each in items) and len(set(items[0])) == len(drawn.items)


def test_training_asks_in_one_permutation_and_the_right_letter_is_any():
    random, letters = np.random.default_rng(0), []
    for _ in range(100):
        (conversation,) = conversations(random, Select(8).draw(random, 1, 32), "c", "select@1", "choice", False)
        letters += [answer for _, answer in turns(conversation)]
        assert not any("item" in facts for facts in conversation.answer_facts)
    counts = [letters.count(letter) / len(letters) for letter in LETTERS]
    assert max(counts) < 0.25 + 4 * (0.25 * 0.75 / 800) ** 0.5


def test_every_word_of_an_answer_is_one_token_of_the_small_llm():
    tokenizer = load_tokenizer(compose_overrides(train.CONF_DIR, ["data=suite"]).llm.tokenizer)
    tasks = (TASK, Count(9, 1, 1), Motion(1, 0.1))
    items = [item for task in tasks for item in task.draw(np.random.default_rng(0), 9, 32).items]
    words = {word for item in items for word in item.choices}
    assert len(words) >= 8 + 9 + 4
    assert all(len(tokenizer.encode(word)) == 1 for word in (*words, *LETTERS))


def test_noise_is_what_is_asked_for():
    random = np.random.default_rng(0)
    grey_FHWC = np.full((4, 64, 64, 3), 0.5, dtype=np.float32)
    noisy = with_noise(random, grey_FHWC, 0.1)
    assert noisy.dtype == np.uint8 and (noisy / 255).std() == pytest.approx(0.1, abs=0.005)
    assert np.unique(with_noise(random, grey_FHWC, 0.0)).tolist() == [127]


def test_what_leaves_at_one_edge_comes_in_at_the_other():
    board = Board(np.random.default_rng(0), 1, 32)
    board.stamp(0, np.ones((4, 4), dtype=bool), None, -2, 30)
    rows, columns = np.nonzero(np.isclose(board.frames_FHWC[0], 150 / 255).all(axis=-1))
    assert sorted(set(rows)) == sorted(set(columns)) == [0, 1, 30, 31]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": {"train": 1, "val": 1}}, "data.suite.clips: must be 1 or more for each split"),
        ({"clips": {"train": 0, "val": 1, "test": 1}}, "data.suite.clips: must be 1 or more"),
        ({"frames": {"train": [8], "val": [], "test": [8]}}, "data.suite.frames: must be different numbers of frames"),
        ({"frames": {"train": [8, 8], "val": [8], "test": [8]}}, "data.suite.frames: must be different numbers"),
        ({"image_size": 33}, "data.suite.image_size: must be even, 32 or more, got 33"),
        ({"noise": 1.5}, "data.suite.noise: must be between 0 and 1, got 1.5"),
        ({"form": "word "}, "data.suite.form: must be one of word, choice; did you mean 'word'.*, got 'word '"),
        ({"seed": -1}, "data.suite.seed: must be 0 or more, got -1"),
        ({"clips_per_shard": 0}, "data.suite.clips_per_shard: must be 1 or more, got 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        replace(SUITE, **changes)


def test_clips_that_are_too_short_for_a_task():
    SUITE.check("needle", Needle(4, 3))
    with pytest.raises(UserError, match="data.suite.frames: has clips of 4 .* 'count' .* needs 5 or more"):
        SUITE.check("count", Count(5, 1, 1))
