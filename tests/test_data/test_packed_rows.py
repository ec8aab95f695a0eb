"""Packed neighbours never see each other: each sample's logits are those it has alone, fusion and all."""

import pytest
import torch

from tests.test_data.test_module import data_of
from tests.tiny import tiny_model


def logits_of(model, data):
    """Logits of each sample of an epoch, by key; and how many samples the fullest row held."""
    data.fit_to(model)
    data.setup("fit")
    found, fullest = {}, 0
    for batch in data.train_dataloader():
        with torch.no_grad():
            output = model(batch)
        sample_L = torch.repeat_interleave(torch.arange(batch.num_samples), batch.text_offsets.diff())
        sample_of_answer = {int(a): batch.keys[int(s)] for s, a in zip(sample_L, batch.answer_L, strict=True) if a >= 0}
        for answer, logits_W in zip(output.answer_Y.tolist(), output.logits_YW, strict=True):
            found.setdefault(sample_of_answer[answer], []).append(logits_W)
        fullest = max(fullest, int(torch.bincount(batch.row_of_sample).max()))
    return {key: torch.stack(logits) for key, logits in found.items()}, fullest


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_samples_alone(shard_folder, attention):
    model = tiny_model(attention=attention, interval=1, gate_init=0.9)
    alone, one = logits_of(model, data_of(shard_folder))
    packed, fullest = logits_of(model, data_of(shard_folder, pack_tokens=300, global_batch_size=3))
    assert one == 1 and fullest >= 3
    assert set(packed) == set(alone) and len(alone) == 26
    for key, logits_YW in alone.items():
        torch.testing.assert_close(packed[key], logits_YW, atol=2e-5, rtol=1e-4)


def test_one_process_needs_no_estimate_but_packing_does(shard_folder):
    data = data_of(shard_folder, pack_tokens=300)
    data._planner = data._planner.told(None)
    data.setup("fit")
    with pytest.raises(ValueError, match="call fit_to"):
        data.train_dataloader()
