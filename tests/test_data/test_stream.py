"""Stream: from shards to samples and batches, with the same content for every number of workers."""

import shutil

import pytest
import torch

from data.collate import collate
from data.order import EpochOrder, GlobalBatches, SampleRef
from data.stream import BatchLoader, ClipDataset
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shards import open_shards
from lightning_crosslmm.text import load_tokenizer
from lightning_crosslmm.video import FrameSampling


def dataset_of(folder, max_tokens=64):
    return ClipDataset(
        open_shards(folder), FrameSampling("uniform", num_frames=3), 16, load_tokenizer("byte"), max_tokens
    )


def loader_of(folder, num_workers, epochs, **options):
    sizes = open_shards(folder).num_samples
    plans = (GlobalBatches(EpochOrder(1, epoch, "f", sizes, 2, True), 4, 0, 1) for epoch in range(epochs))
    return BatchLoader(dataset_of(folder, **options), collate, lambda: next(plans), 6, num_workers)


def test_samples_hold_their_own_frames_and_text(shard_folder):
    dataset = dataset_of(shard_folder)
    assert len(dataset) == 26
    for shard, place, number, counts in [(0, 2, 2, (3,)), (0, 4, 4, (3, 1)), (1, 0, 6, ()), (2, 3, 15, (3,))]:
        sample = dataset[SampleRef(shard, place)]
        assert sample.key == f"s{number:02d}" and sample.frames_per_visual == counts
        assert sample.frames_FCHW.shape == (sum(counts), 3, 16, 16) and sample.frames_FCHW.dtype == torch.uint8
        assert torch.all((sample.frames_FCHW.float() - number * 8).abs() <= 6)
        assert len(sample.answer_kinds) == max(sample.text.answer) + 1 == 1 + number % 2
        assert sample.questions == ("Which sample?", "Sure?")[: 1 + number % 2]
    assert dataset[SampleRef(0, 4)].frame_time_s_F.tolist() == [0.0, 0.5, 0.75, 0.0]


def test_workers_change_nothing_and_stay_for_the_next_epoch(shard_folder):
    here, there = (loader_of(shard_folder, workers, epochs=2) for workers in (0, 2))
    workers_of_epoch = []
    for _ in range(2):
        batches = list(zip(here, there, strict=True))
        assert len(batches) == 6 == len(there)
        for one, other in batches:
            assert one.keys == other.keys and one.answer_kinds == other.answer_kinds
            for name, value in vars(one).items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, getattr(other, name)), name
        workers_of_epoch.append({worker.pid for worker in there._loader._iterator._workers})
    assert workers_of_epoch[0] == workers_of_epoch[1] and len(workers_of_epoch[0]) == 2
    there.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_clip_is_one_message_with_shard_and_sample(shard_folder, tmp_path, num_workers):
    folder = tmp_path / "damaged"
    shutil.copytree(shard_folder, folder)
    entry = open_shards(folder).index(1).entries[3]
    with open(folder / "shard-000001.tar", "r+b") as file:
        file.seek(entry.members["0.mp4"].offset + 100)
        file.write(b"damage")
    with pytest.raises(UserError) as caught:
        list(loader_of(folder, num_workers, epochs=1))
    assert "shard-000001.tar: sample 's09', member '0.mp4'" in str(caught.value)
    assert "Traceback" not in str(caught.value) and "worker" not in str(caught.value)


def test_the_plan_is_asked_for_with_the_first_batch(shard_folder):
    loader = BatchLoader(dataset_of(shard_folder), collate, lambda: pytest.fail("too early"), 6)
    iter(loader)


def test_text_past_the_limit_names_the_setting(shard_folder):
    with pytest.raises(UserError, match="data.max_tokens is 8"):
        list(loader_of(shard_folder, 0, epochs=1, max_tokens=8))
