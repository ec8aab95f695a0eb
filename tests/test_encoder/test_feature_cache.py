import logging
import pickle
import time

import pytest
import torch

from lightning_crosslmm.encoder import FeatureCache
from lightning_crosslmm.errors import UserError

A, B, C = (letter * 32 for letter in "abc")


def features(seed=0, num_frames=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        "patches_FNE": torch.randn(num_frames, 4, 8, generator=generator).bfloat16(),
        "saliency_FN": torch.randn(num_frames, 4, generator=generator),
        "index_F": torch.tensor([0, 1, 0]),
    }


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def refuse():
    raise AssertionError("it is there already")


def path_of(folder, digest):
    return folder / f"features-{digest}.safetensors"


def test_what_was_written_is_read_to_the_bit_by_another(tmp_path):
    FeatureCache(str(tmp_path / "new" / "folder")).write(A, features)
    found = FeatureCache(str(tmp_path / "new" / "folder")).read(A)
    assert same(found, features()) and found["patches_FNE"].dtype == torch.bfloat16
    assert FeatureCache(str(tmp_path / "new" / "folder")).read(B) is None


def test_nothing_is_made_twice(tmp_path):
    cache = FeatureCache(str(tmp_path))
    cache.write(A, features)
    cache.write(A, refuse)
    assert same(cache.read(A), features())


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def swapped(path):
    other = FeatureCache(str(path.parent))
    other.write(B, lambda: features(seed=1))
    path_of(path.parent, B).rename(path)


def emptied(path):
    path.write_bytes(b"")


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


class Trap:
    def __reduce__(self):
        return pytest.fail, ("it was unpickled",)


def pickled(path):
    path.write_bytes(pickle.dumps({"patches_FNE": Trap()}))


@pytest.mark.parametrize("damage", [halved, flipped, swapped, emptied, zeroed, pickled])
def test_a_torn_or_foreign_file_is_a_miss_and_goes(tmp_path, damage):
    cache = FeatureCache(str(tmp_path))
    cache.write(A, features)
    damage(path_of(tmp_path, A))
    assert cache.read(A) is None and not path_of(tmp_path, A).exists()
    cache.write(A, features)
    assert same(cache.read(A), features())


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    FeatureCache(str(tmp_path / "one")).write(A, features)
    size = path_of(tmp_path / "one", A).stat().st_size
    (tmp_path / "notes.txt").write_text("mine")
    cache = FeatureCache(str(tmp_path), max_bytes=2 * size)
    cache.write(A, features)
    time.sleep(0.02)
    cache.write(B, features)
    time.sleep(0.02)
    assert cache.read(A) is not None
    time.sleep(0.02)
    cache.write(C, features)
    there = {path.name for path in tmp_path.glob("features-*")}
    assert there == {path_of(tmp_path, A).name, path_of(tmp_path, C).name}
    assert (tmp_path / "notes.txt").read_text() == "mine"
    FeatureCache(str(tmp_path / "small"), max_bytes=size - 1).write(A, features)
    assert not path_of(tmp_path / "small", A).exists()


def test_a_folder_that_cannot_be_used_is_told_once_and_done_without(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = FeatureCache(str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING):
        assert cache.read(A) is None
        cache.write(A, refuse)
        assert cache.read(A) is None
    (said,) = caplog.messages
    assert "encoder.feature_cache.folder" in said and str(tmp_path / "file" / "folder") in said


def test_a_disk_that_is_full_ends_writing_and_nothing_else(tmp_path, caplog, monkeypatch):
    cache = FeatureCache(str(tmp_path))
    cache.write(A, features)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_crosslmm.bounded_folder._fill", full)
    cache.write(B, features)
    cache.write(C, features)
    assert len(caplog.messages) == 1 and "No space left" in caplog.messages[0]
    assert same(cache.read(A), features())


def test_no_room_at_all_is_refused():
    with pytest.raises(UserError, match=r"encoder.feature_cache.max_bytes is 0; it must be 1 byte or more"):
        FeatureCache("folder", max_bytes=0)
