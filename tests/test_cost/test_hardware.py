"""The table of GPUs."""

import pytest

from lightning_crosslmm.cost.hardware import GPUS, find_gpu, least_time_s


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_numbers_of_its_kind_and_their_source(name):
    gpu = find_gpu(name)
    assert gpu.source
    assert 1e12 < gpu.flops_per_s["fp32"] < gpu.flops_per_s["fp16"] < 1e16
    assert 1e11 < gpu.bandwidth < 1e13
    assert 1e10 < gpu.memory < 1e12


def test_the_slower_of_two_bounds():
    assert least_time_s(989.5e12, 1, "h100", "bf16") == (1.0, "compute")
    assert least_time_s(1, 3350e9, "h100", "bf16") == (1.0, "memory")
