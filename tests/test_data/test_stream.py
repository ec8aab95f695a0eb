"""Stream: samples by their place, what is drawn for them, and damage that is told from trouble."""

import shutil
from dataclasses import replace

import pytest
import torch

from data.mixture import Mixture
from data.order import SampleRef
from data.stream import ClipDataset, DamagedSampleError, Reading
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_indexing import index_shards
from lightning_crosslmm.storage import StorageError
from lightning_crosslmm.text import load_tokenizer
from lightning_crosslmm.video import FrameSampling
from tests.tars import LLAVA, clip, write_tar

READING = Reading(FrameSampling("uniform", num_frames=3), 16, load_tokenizer("byte"), max_tokens=64)


def dataset_of(folder, **changes):
    return ClipDataset(Mixture.open(folder, "data.train"), replace(READING, **changes))


def damage(folder, copy, shard=1, sample=3, member="0.mp4"):
    """Copy shards and overwrite a few bytes of one sample's member: its key is s09 unless told otherwise."""
    shutil.copytree(folder, copy)
    entry = Mixture.open(copy, "data.train").entry(SampleRef(shard, sample, 0))
    with open(copy / f"shard-{shard:06d}.tar", "r+b") as file:
        file.seek(entry.members[member].offset + 4)
        file.write(b"damage")
    return copy


def test_samples_hold_their_own_frames_and_text(shard_folder):
    dataset = dataset_of(shard_folder)
    assert len(dataset) == 26
    for shard, place, number, counts in [(0, 2, 2, (3,)), (0, 4, 4, (3, 1)), (1, 0, 6, ()), (2, 3, 15, (3,))]:
        sample = dataset[SampleRef(shard, place, 0)]
        assert sample.key == f"s{number:02d}" and sample.frames_per_visual == counts
        assert sample.frames_FCHW.shape == (sum(counts), 3, 16, 16) and sample.frames_FCHW.dtype == torch.uint8
        assert torch.all((sample.frames_FCHW.float() - number * 8).abs() <= 6)
        assert len(sample.answer_kinds) == max(sample.text.answer) + 1 == 1 + number % 2
        assert sample.questions == ("Which sample?", "Sure?")[: 1 + number % 2]
    assert dataset[SampleRef(0, 4, 0)].frame_time_s_F.tolist() == [0.0, 0.5, 0.75, 0.0]


def test_one_turn_is_drawn_anew_in_each_pass(shard_folder):
    dataset = dataset_of(shard_folder, turns="one", seed=1)
    asked = [dataset[SampleRef(0, 3, epoch)].questions for epoch in range(12)]
    assert set(asked) == {("Which sample?",), ("Sure?",)}
    assert asked == [dataset_of(shard_folder, turns="one", seed=1)[SampleRef(0, 3, n)].questions for n in range(12)]
    assert asked != [dataset_of(shard_folder, turns="one", seed=2)[SampleRef(0, 3, n)].questions for n in range(12)]
    mixed = [len(dataset_of(shard_folder, turns="mixed", seed=1)[SampleRef(0, 3, n)].questions) for n in range(24)]
    whole = len(dataset_of(shard_folder)[SampleRef(0, 3, 0)].questions)
    assert set(mixed) == {1, whole} and whole > 1
    surety = dataset[SampleRef(0, 3, asked.index(("Sure?",)))]
    assert surety.answer_kinds == ("surety",) and surety.frames_per_visual == (3,)
    assert dataset[SampleRef(0, 2, 0)].questions == ("Which sample?",)


def test_moments_are_shifted_anew_in_each_pass(shard_folder):
    dataset = dataset_of(shard_folder, shifts_frames=True, sampling=FrameSampling("uniform", num_frames=2))
    times = {tuple(dataset[SampleRef(0, 2, epoch)].frame_time_s_F.tolist()) for epoch in range(12)}
    assert times == {(0.0, 0.5), (0.25, 0.75)}
    state = torch.get_rng_state()
    again = [dataset[SampleRef(0, 2, 5)].frame_time_s_F.tolist() for _ in range(2)]
    assert again[0] == again[1] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "member '0.mp4': its "),
        ({"max_tokens": 8}, "data.max_tokens is 8"),
        ({"timeout_s": 1e-9}, "is not decoded after 1e-09 s; allow more (data.sample_timeout_s)"),
    ],
)
def test_damage_is_told_with_shard_key_and_reason(shard_folder, tmp_path, changes, reason):
    folder = damage(shard_folder, tmp_path / "damaged") if not changes else shard_folder
    with pytest.raises(DamagedSampleError) as caught:
        dataset_of(folder, **changes)[SampleRef(1, 3, 0)]
    told = caught.value.skipped
    assert told.shard == str(folder / "shard-000001.tar") and told.key == "s09"
    assert reason in told.reason and told.shard not in told.reason
    assert "s09" in str(caught.value) and reason in str(caught.value)


def test_a_store_or_an_index_that_fails_is_no_samples_damage(shard_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise StorageError("the store is down")

    folder = tmp_path / "copied"
    shutil.copytree(shard_folder, folder)
    dataset = dataset_of(folder)
    monkeypatch.setattr(Mixture, "read", fail)
    with pytest.raises(StorageError):
        dataset[SampleRef(0, 0, 0)]
    (folder / "shard-000002.index.json").write_text("{}")
    with pytest.raises(UserError) as caught:
        dataset[SampleRef(2, 0, 0)]
    assert not isinstance(caught.value, DamagedSampleError)


def test_shards_of_others_give_samples_once_they_are_indexed(tmp_path):
    members = [("a.json", LLAVA), ("a.mp4", clip()), ("b.txt", b"two clips"), ("b.1.mp4", clip()), ("b.0.mp4", clip(2))]
    write_tar(tmp_path / "others.tar", members)
    index_shards(tmp_path)
    dataset = dataset_of(tmp_path)
    a, b = dataset[SampleRef(0, 0, 0)], dataset[SampleRef(0, 1, 0)]
    assert (a.key, a.questions, a.frames_per_visual) == ("a", ("What?",), (3,))
    assert (b.key, b.questions, b.frames_per_visual) == ("b", ("",), (3, 3))
    assert b.frame_time_s_F.tolist() == [0.0, 0.25, 0.25, 0.25, 0.75, 1.25]  # the clip of 2 frames first
