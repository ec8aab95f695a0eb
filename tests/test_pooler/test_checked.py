from dataclasses import replace

import pytest
import torch

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.pooler import AveragePooler, NoPooler, check_pooled
from lightning_crosslmm.taps import Questions
from lightning_crosslmm.tokens import Opaque, Partition, Weighted
from tests.poolers import Heavy
from tests.tiny import tiny_batch, tiny_model, token_set

GRID, WIDTH = (2, 2), 5
GIVEN = token_set((2, 1), GRID, WIDTH)
MEANS = AveragePooler(1)(GIVEN)


class Mine(AveragePooler):
    """A user's pooler: gives 1 token per frame and says so."""

    def __init__(self):
        super().__init__(1)


def check(pooled, questions=None):
    check_pooled(Mine(), GIVEN, pooled, WIDTH, GRID, questions)


def test_a_pooler_that_keeps_the_contract_passes():
    check(MEANS)
    check(replace(MEANS, source_map=Opaque(3, 12)))
    check(replace(MEANS, source_map=MEANS.source_map.weighted()))


def weights(pooled_E, source_E, weight_E):
    return Weighted(torch.tensor(pooled_E), torch.tensor(source_E), torch.tensor(weight_E), 3, 12)


TABLE = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("features_SD", MEANS.features_SD.long(), "features_SD is torch.int64 .* must be floating"),
        ("features_SD", MEANS.features_SD[:, :4], r"tokens of width 4, connect\(\) said 5"),
        ("features_SD", MEANS.features_SD * torch.nan, "features_SD holds NaN or infinity"),
        ("frame_offsets", torch.tensor([0, 2, 1, 3]), "frame_offsets must lie on the CPU and rise"),
        ("frame_offsets", torch.tensor([0, 2, 2, 3]), r"grid \(1, 1\) but \[2, 0, 1\] tokens per frame"),
        ("irregular", torch.tensor([0, 2, 2, 3]), r"gives \[2, 0, 1\] tokens per frame, tokens_per_frame\(\) said 1"),
        ("visual_offsets", torch.tensor([0, 1, 3]), r"changes visual_offsets from \[0, 2, 3\] to \[0, 1, 3\]"),
        ("sample_of_visual", torch.tensor([0, 0]), "changes sample_of_visual"),
        ("frame_time_s_F", torch.zeros(3), "changes frame_time_s_F"),
        ("coordinate_S3", MEANS.coordinate_S3 / 0, "coordinate_S3 is .* not finite"),
        ("mass_S", torch.tensor([4.0, -1.0, 4.0]), "mass_S holds -1.0"),
        ("mass_S", torch.tensor([4.0, 0.0, 4.0]), "weights of token 1 in source_map sum to 1, its mass is 0"),
        ("mass_S", torch.tensor([4.0, 4.0, 1.0]), "token 2 has mass 1, source_map gives it 4 patches"),
        (
            "source_map",
            Partition(torch.arange(3), 3),
            "source_map starts from 3 tokens, there are 12 patches; chain it",
        ),
        ("source_map", Partition(TABLE + 1, 3), "source_map names a pooled token 3; there are 0 to 2"),
        ("source_map", weights([0, 1, 2], [0, 4, 12], [1.0, 1.0, 1.0]), "names a source token 12; there are 0 to 11"),
        ("source_map", weights([0, 1, 2], [0, 4, 8], [1.0, 0.5, 1.0]), "weights of token 1 in source_map sum to 0.5"),
        ("source_map", Partition(TABLE.clamp(max=1), 3), "weights of token 2 in source_map sum to 0"),
        (
            "source_map",
            Partition(TABLE.flip(0), 3),
            "token 2 of visual 1 holds patch 0 of visual 0; visuals must not mix",
        ),
    ],
)
def test_what_is_wrong_is_named_with_the_class(field, value, message):
    changes = {"frame_offsets": value, "grid": None} if field == "irregular" else {field: value}
    with pytest.raises(UserError, match=f"^pooler Mine: .*{message}"):
        check(replace(MEANS, **changes))


def test_something_else_than_a_set_is_refused():
    with pytest.raises(UserError, match="pooler Mine: gives Tensor; it must give a TokenSet"):
        check(MEANS.features_SD)
    with pytest.raises(UserError, match="pooler Mine: gives tuple"):
        check((MEANS, MEANS.features_SD))  # it was given no question


def test_a_rewritten_question_keeps_its_shape():
    questions = Questions(torch.randn(4, 8), torch.tensor([0, 2, 4]))
    check((MEANS, torch.randn(4, 8)), questions)
    with pytest.raises(UserError, match=r"the question it gives must be finite embeddings of \(4, 8\)"):
        check((MEANS, torch.randn(3, 8)), questions)


@pytest.mark.parametrize("stage", ["before_projector", "after_projector"])
def test_the_model_checks_when_asked(stage):
    batch = tiny_batch(["see", 2, "what?", "=cat"], [1, "?", "=z"])
    broken = Heavy()
    model = tiny_model(pooler=broken)
    model(batch)  # nobody asked
    model.checks_pooler = True
    with pytest.raises(UserError, match="pooler Heavy: token 0 has mass 2, source_map gives it 1 patches"):
        model(batch)
    fine = tiny_model(pooler=AveragePooler(2, stage=stage))
    fine.checks_pooler = True
    fine(batch)
    whole = tiny_model(pooler=NoPooler())
    whole.checks_pooler = True
    whole.train()(tiny_batch(["no picture", "=no"]))
