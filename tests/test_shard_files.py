import logging

import pytest

from lightning_crosslmm.conversation import Conversation, Message, Visual
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.shard_build import build_index
from lightning_crosslmm.shard_files import find_index, read_index, read_sample
from lightning_crosslmm.shard_index import index_path
from tests.tars import write_tar

JSON = Conversation(
    "k", (Message("user", "<video>?"), Message("assistant", "yes")), (Visual("video", "v.mp4"),), ("what",)
).to_json()
CLIP = bytes(range(256)) * 3


@pytest.fixture
def shard(tmp_path):
    members = [(f"k{i}.{ext}", data) for i in range(3) for ext, data in (("0.mp4", CLIP), ("json", JSON))]
    return write_tar(tmp_path / "others.tar", members)


def test_tar_without_index_is_read_with_a_warning(shard, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(find_index(shard).entries) == 3
    assert f"{shard} has no index" in caplog.text
    assert not index_path(shard).exists()


def test_index_of_another_tar_names_both(shard):
    build_index(shard).save(shard)
    with open(shard, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(UserError) as error:
        read_index(shard)
    assert str(shard) in str(error.value) and str(index_path(shard)) in str(error.value)


def test_changed_bytes_name_shard_key_and_member(shard):
    entry = build_index(shard).entries[1]
    data = bytearray(shard.read_bytes())
    data[entry.members["0.mp4"].offset + 5] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"others\.tar: sample 'k1', member '0\.mp4'"):
        read_sample(shard, entry)
    shard.write_bytes(data[: entry.members["json"].offset])
    with pytest.raises(UserError, match="sample 'k1'"):
        read_sample(shard, entry)
    shard.unlink()
    with pytest.raises(UserError, match=r"others\.tar: sample 'k1' cannot be read"):
        read_sample(shard, entry)
