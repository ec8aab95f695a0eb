from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_crosslmm.batch import VISUAL_MARK
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.placement import place
from lightning_crosslmm.pooler import AveragePooler, NoPooler
from tests.tiny import END, TOKENIZER, tiny_batch, token_set

GRID = (1, 2)
A, B, C, D, E, F = TOKENIZER.encode("abcdef")


def sets(batch, pooler=None):
    """Source tokens of the batch, two per frame, and one pooled token per frame."""
    frames_of_visual = batch.visual_offsets.diff().tolist()
    source = token_set(tuple(frames_of_visual), GRID, sample_of_visual=batch.sample_of_visual.tolist())
    return (pooler or AveragePooler(1))(source), source


def laid_out(batch, pooler=None, **settings):
    return place(batch, *sets(batch, pooler), **settings)


def ranges(spans):
    return spans.query_offsets.tolist(), spans.key_start.tolist(), spans.key_end.tolist()


# s0 has an interleaved video of 2 frames and an image, s1 nothing to see, s2 an image first
BATCH = tiny_batch(["a", 2, "b", 1, "c", "=d"], ["e", "=f"], [1, "a", "=b"])


def test_every_field_of_rows_padded_on_the_right():
    layout = laid_out(BATCH)
    # s0: a V V b I c d END (8 slots), s1: e f END (3), s2: I a b END (4)
    assert (layout.num_rows, layout.num_positions, layout.is_packed) == (3, 8, False)
    assert layout.sample_RT.tolist() == [[0] * 8, [1] * 3 + [-1] * 5, [2] * 4 + [-1] * 4]
    assert layout.position_RT.tolist() == [[*range(8)], [0, 1, 2] + [0] * 5, [0, 1, 2, 3] + [0] * 4]
    assert layout.text_ids_M.tolist() == [A, B, C, D, END, E, F, END, A, B, END]
    assert layout.text_position.tolist() == [0, 3, 5, 6, 7, 8, 9, 10, 17, 18, 19]
    assert layout.pooled_position_P.tolist() == [1, 2, 4, 16]
    assert layout.predict_position_Y.tolist() == [5, 6, 8, 9, 17, 18]
    assert layout.target_Y.tolist() == [D, END, F, END, B, END]
    assert layout.answer_Y.tolist() == [0, 0, 1, 1, 2, 2]
    # source tokens: video 0-4, image 4-6, image of s2 6-8
    assert ranges(layout.v2v) == ([0, 2, 3, 4], [0, 4, 6], [4, 6, 8])
    assert layout.t2v_position.tolist() == [3, 5, 6, 7, 17, 18, 19]  # not the a before the first video, nor s1
    assert ranges(layout.t2v) == ([0, 1, 4, 7], [0, 0, 6], [4, 6, 8])
    assert layout.row_spans == ((0, 6), None, (6, 8))


def test_every_field_of_rows_padded_on_the_left():
    layout = laid_out(BATCH, pad_left=True)
    assert layout.sample_RT.tolist() == [[0] * 8, [-1] * 5 + [1] * 3, [-1] * 4 + [2] * 4]
    assert layout.position_RT.tolist() == [[*range(8)], [0] * 5 + [0, 1, 2], [0] * 4 + [0, 1, 2, 3]]
    assert layout.text_position.tolist() == [0, 3, 5, 6, 7, 13, 14, 15, 21, 22, 23]
    assert layout.pooled_position_P.tolist() == [1, 2, 4, 20]
    assert layout.predict_position_Y.tolist() == [5, 6, 13, 14, 21, 22]
    assert layout.t2v_position.tolist() == [3, 5, 6, 7, 21, 22, 23]
    right = laid_out(BATCH)
    assert ranges(layout.v2v) == ranges(right.v2v) and ranges(layout.t2v) == ranges(right.t2v)
    assert torch.equal(layout.text_ids_M, right.text_ids_M) and layout.row_spans == right.row_spans


def test_every_field_of_packed_rows():
    layout = laid_out(replace(BATCH, row_of_sample=torch.tensor([1, 0, 0])))
    assert (layout.num_rows, layout.num_positions, layout.is_packed) == (2, 8, True)
    assert layout.sample_RT.tolist() == [[1, 1, 1, 2, 2, 2, 2, -1], [0] * 8]
    assert layout.position_RT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 0], [*range(8)]]
    assert layout.text_position.tolist() == [8, 11, 13, 14, 15, 0, 1, 2, 4, 5, 6]
    assert layout.pooled_position_P.tolist() == [9, 10, 12, 3]
    assert layout.predict_position_Y.tolist() == [13, 14, 0, 1, 4, 5]
    assert layout.t2v_position.tolist() == [11, 13, 14, 15, 4, 5, 6]


def test_a_batch_without_visuals():
    layout = laid_out(tiny_batch(["e", "=f"], ["a", "=b"]))
    assert layout.v2v is None and layout.t2v is None and layout.row_spans == (None, None)
    assert layout.pooled_position_P.tolist() == [] and layout.t2v_position.tolist() == []
    assert layout.predict_position_Y.tolist() == [0, 1, 3, 4]


def test_text_before_every_visual_sees_none():
    layout = laid_out(tiny_batch(["ab", "=c", 2]))
    assert layout.t2v is None and layout.v2v is not None


def test_several_tokens_per_frame():
    layout = laid_out(tiny_batch(["a", 2, "=b"]), NoPooler())
    assert layout.pooled_position_P.tolist() == [1, 2, 3, 4] and layout.predict_position_Y.tolist() == [4, 5]
    assert ranges(layout.v2v) == ([0, 4], [0], [4])


def test_an_answer_right_after_a_visual_is_predicted_from_its_last_pooled_token():
    assert laid_out(tiny_batch(["a", 3, "=b"])).predict_position_Y.tolist() == [3, 4]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"scope": "all"}, ([0, 4, 5], [0, 8], [8, 10])),
        ({"scope": "frame"}, ([0, 1, 2, 3, 4, 5], [0, 2, 4, 6, 8], [2, 4, 6, 8, 10])),
        ({"scope": "window", "window_frames": 1}, ([0, 1, 2, 3, 4, 5], [0, 0, 2, 4, 8], [4, 6, 8, 8, 10])),
    ],
)
def test_scopes(choice, expected):
    assert ranges(laid_out(tiny_batch(["a", 4, 1, "=b"]), **choice).v2v) == expected


def seen_by(spans, count):
    """What each query reads, as sets of source tokens."""
    found = [set() for _ in range(count)]
    for group in range(0 if spans is None else spans.num_groups):
        for query in range(int(spans.query_offsets[group]), int(spans.query_offsets[group + 1])):
            found[query] = set(range(int(spans.key_start[group]), int(spans.key_end[group])))
    return found


def frames_of(batch):
    """Each frame as (sample, visual, number in it)."""
    return [
        (int(batch.sample_of_visual[v]), v, f)
        for v, count in enumerate(batch.visual_offsets.diff().tolist())
        for f in range(count)
    ]


def visible_from_pooled(batch, reach, tokens_per_frame):
    frames = frames_of(batch)
    table = []
    for _, visual, number in frames:
        near = [i for i, (_, v, f) in enumerate(frames) if v == visual and abs(f - number) <= reach]
        table += [{2 * i + k for i in near for k in range(2)}] * tokens_per_frame
    return table


def visible_from_text(batch):
    """For each text token in order: sources of the visuals marked before it in its own sample."""
    frames, table, visual = frames_of(batch), [], -1
    for sample, (start, end) in enumerate(batch.text_offsets.unfold(0, 2, 1).tolist()):
        for token in batch.ids_L[start:end].tolist():
            if token == VISUAL_MARK:
                visual += 1
                continue
            marked = [i for i, (s, v, _) in enumerate(frames) if s == sample and v <= visual]
            table.append({2 * i + k for i in marked for k in range(2)})
    return table


parts = st.lists(st.one_of(st.integers(1, 4), st.sampled_from(["a", "bc"])), max_size=5)
samples = st.lists(parts.map(lambda p: ["x", *p, "=y"]), min_size=1, max_size=4)


@given(samples, st.data())
@settings(max_examples=60)
def test_everyone_sees_what_a_table_says(asked, data):
    rows = data.draw(st.lists(st.integers(0, 1), min_size=len(asked), max_size=len(asked)))
    rows = [row - min(rows) for row in rows] if len(set(rows)) == 1 else rows
    batch = tiny_batch(*asked, rows=rows)
    scope, reach = data.draw(st.sampled_from([("all", 99), ("frame", 0), ("window", 1), ("window", 2)]))
    pooler = data.draw(st.sampled_from([AveragePooler(1), NoPooler()]))
    choice = {"scope": scope, "window_frames": reach if scope == "window" else None}
    layout = laid_out(batch, pooler, pad_left=data.draw(st.booleans()), **choice)

    per_frame = pooler.tokens_per_frame(GRID)
    table = visible_from_pooled(batch, reach, per_frame)
    assert seen_by(layout.v2v, len(layout.pooled_position_P)) == table

    by_position = dict(zip(layout.text_position.tolist(), visible_from_text(batch), strict=True))
    found = dict(zip(layout.t2v_position.tolist(), seen_by(layout.t2v, len(layout.t2v_position)), strict=True))
    assert found == {position: seen for position, seen in by_position.items() if seen}

    # every slot has a place of its own, in its sample's run of the row, and its predecessor predicts it
    places = [*layout.text_position.tolist(), *layout.pooled_position_P.tolist()]
    assert len(set(places)) == len(places) == int((layout.sample_RT >= 0).sum())
    flat_ids = torch.full((layout.num_rows * layout.num_positions,), -1)
    flat_ids[layout.text_position] = layout.text_ids_M
    assert torch.equal(flat_ids[layout.predict_position_Y + 1], layout.target_Y)
    for sample in range(len(asked)):
        of_sample = layout.position_RT[layout.sample_RT == sample]
        assert of_sample.tolist() == list(range(len(of_sample)))


def test_a_row_longer_than_the_context_is_refused():
    assert laid_out(BATCH, max_positions=8).num_positions == 8
    with pytest.raises(UserError, match=r"sample 's0' has 8 tokens, the LLM's context is 7; use fewer frames"):
        laid_out(BATCH, max_positions=7)
