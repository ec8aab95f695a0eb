"""The sizes of sharded training are checked before any process starts."""

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.strategy import ShardedStrategy
from tests import trials


def test_another_number_of_processes_is_refused() -> None:
    said = r"data_parallel_size is 3, .* make 2 x 1 = 2 processes; give 2 or auto"
    with pytest.raises(UserError, match=said):
        trials.trainer("fsdp", 2, strategy=ShardedStrategy(3))


def test_auto_takes_all_processes_and_splits_no_layer() -> None:
    strategy = trials.trainer("fsdp", 2, strategy=ShardedStrategy(), num_nodes=2).strategy
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 1)
