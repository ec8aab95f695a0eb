from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.batch import VISUAL_MARK
from tests.arms import ARMS, BATCH, CLOSE, SAMPLES, arms, logits
from tests.tiny import tiny_batch, tiny_model


def text_states(model, batch):
    """Hidden states of every position, by row."""
    with torch.no_grad():
        prompt = model.prompt(batch)
        return model.run(prompt), prompt.layout


def only(number):
    """One sample of BATCH, with the same frames."""
    visuals = (BATCH.sample_of_visual == number).nonzero().flatten().tolist()
    alone = tiny_batch(SAMPLES[number])
    taken = [BATCH.frames_FCHW[BATCH.visual_offsets[v] : BATCH.visual_offsets[v + 1]] for v in visuals]
    return replace(alone, frames_FCHW=torch.cat([alone.frames_FCHW[:0], *taken]))


def repainted(batch, visual):
    frames_FCHW = batch.frames_FCHW.clone()
    frames_FCHW[batch.visual_offsets[visual] : batch.visual_offsets[visual + 1]] ^= 255
    return replace(batch, frames_FCHW=frames_FCHW)


@arms
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 0], [1, 0, 1]], ids=["rows", "one row", "two rows"])
def test_training_on_samples_together_is_training_on_samples_alone(arm, rows):
    model = tiny_model(**ARMS[arm])
    found = logits(model, replace(BATCH, row_of_sample=torch.tensor(rows)))
    order = [0, 1, 2]
    alone = [logits(model, only(number)) for number in order]
    torch.testing.assert_close(found, torch.cat(alone), **CLOSE)


@arms
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 0, 0]], ids=["rows", "packed"])
@pytest.mark.parametrize("visual", range(4))
def test_a_visual_reaches_what_follows_it_in_its_sample_and_nothing_else(arm, rows, visual):
    model = tiny_model(**ARMS[arm])
    batch = replace(BATCH, row_of_sample=torch.tensor(rows))
    before_RTD, layout = text_states(model, batch)
    after_RTD, _ = text_states(model, repainted(batch, visual))
    # padding behind a row reads it, and nobody reads padding
    moved_RT = ((before_RTD - after_RTD).abs().amax(-1) > 1e-5) & (layout.sample_RT >= 0)

    first_frame = int(batch.visual_offsets[visual])
    first_position = int(layout.pooled_position_P[first_frame])  # one pooled token per frame
    sample = int(batch.sample_of_visual[visual])
    flat_position = torch.arange(moved_RT.numel()).view_as(moved_RT)
    may_move_RT = (layout.sample_RT == sample) & (flat_position >= first_position)
    assert not (moved_RT & ~may_move_RT).any()
    assert moved_RT[may_move_RT].all()


@arms
def test_nothing_leaks_from_the_answer_to_what_stands_before_it(arm):
    model = tiny_model(**ARMS[arm])
    place = int((BATCH.answer_L == 1).nonzero()[0])  # of the second answer of the first sample
    ids_L = BATCH.ids_L.clone()
    ids_L[place] = 65 if ids_L[place] != 65 else 66
    before_RTD, layout = text_states(model, BATCH)
    after_RTD, _ = text_states(model, replace(BATCH, ids_L=ids_L))
    changed_RT = (before_RTD != after_RTD).any(-1)
    slot = int(layout.text_position[(BATCH.ids_L != VISUAL_MARK)[:place].sum()])
    assert changed_RT.flatten().nonzero().flatten()[0] == slot
    pooled = layout.pooled_position_P[layout.pooled_position_P < slot]
    assert len(pooled) == 6 and not changed_RT.flatten()[pooled].any()
    assert changed_RT.flatten()[slot : int((layout.sample_RT[0] == 0).sum())].all()
    assert not changed_RT[1:].any()
