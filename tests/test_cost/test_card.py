"""The card: its keys, its numbers against the model's, the baseline, poolers that depend on the data, the command."""

import json
import math

import pytest

import train
from lightning_crosslmm.cli import main
from lightning_crosslmm.compose import ANY_TARGET, build_model, compose_overrides
from lightning_crosslmm.cost import Sample, cost_card, cost_table
from lightning_crosslmm.cost.meter import PARTS
from lightning_crosslmm.errors import UserError
from lightning_crosslmm.model import ROLES

SAMPLE = Sample(num_frames=4, text_tokens=20, answer_tokens=4)


def card_of(*words, **settings):
    return cost_card(compose_overrides(train.CONF_DIR, words), ANY_TARGET, SAMPLE, **settings)


@pytest.fixture(scope="module")
def card():
    return card_of(gpu="h200")


def test_keys_are_the_contract_and_the_rows_of_the_table(card):
    assert [*card] == ["tokens", "parameters", "flops", "macs", "bytes", "roofline_s", "baseline", "ratio"]
    for each in (card, card["baseline"]):
        assert [*each["parameters"]] == [*ROLES, "total"]
        for phase in ("prefill", "decode", "train_step"):
            assert [*each["flops"][phase]] == [*PARTS, "total"]
            assert each["flops"][phase]["total"] == sum(each["flops"][phase][part] for part in PARTS)
            assert each["macs"][phase]["total"] * 2 == each["flops"][phase]["total"]
    rows = [line.split()[0] for line in cost_table(card)]
    assert {"tokens.llm", "flops.prefill.v2v", "bytes.t2v_cache", "roofline_s.decode.total"} <= set(rows)
    assert json.loads(json.dumps(card)) == card


def test_parameters_are_those_of_the_model_that_runs(card):
    model = build_model(compose_overrides(train.CONF_DIR, []), ANY_TARGET)
    assert {role: count["total"] for role, count in card["parameters"].items() if role != "total"} == (
        model.num_parameters()
    )
    trained = card["parameters"]["total"]["total"] - model.num_parameters()["encoder"]  # which the default freezes
    assert card["parameters"]["total"]["trained"] == trained
    assert card["bytes"]["optimizer"] == 2 * card["bytes"]["gradients"] == 2 * trained * 4


def test_the_baseline_reads_a_quarter_of_the_patches_and_has_no_fusion(card):
    below = card["baseline"]
    assert below["tokens"]["pooled_per_frame"] == math.ceil(math.sqrt(16) / 2) ** 2
    assert below["tokens"]["llm"] == 4 * 4 + 20 + 1  # and the newline
    assert (
        below["flops"]["prefill"]["v2v"] == below["bytes"]["t2v_cache"] == below["parameters"]["fusion"]["total"] == 0
    )
    assert card["ratio"]["flops"]["prefill"]["encoder"] == 1
    assert card["ratio"]["tokens"]["llm"] == (4 + 20) / (16 + 20 + 1)


def test_times_are_the_larger_of_computing_and_moving(card):
    times = card["roofline_s"]
    assert times["prefill"]["llm_linear"] >= card["flops"]["prefill"]["llm_linear"] / 67e12
    assert times["bound"]["decode"]["llm_linear"] == "memory"  # one token reads every weight
    assert times["prefill"]["total"] == pytest.approx(sum(times["prefill"][part] for part in PARTS))


def test_precision_halves_what_is_kept_in_half():
    whole, half = card_of(), card_of("trainer.precision=bf16-true")
    for name in ("weights", "optimizer", "gradients", "kv_cache", "t2v_cache"):
        assert half["bytes"][name] * 2 == whole["bytes"][name], name
    assert half["flops"] == whole["flops"]


def test_a_pooler_that_waits_for_the_data_wants_a_number_unless_the_clip_alone_decides():
    with pytest.raises(UserError, match="PrumergePooler: how many tokens .* give pooled_per_frame=NUMBER"):
        card_of("pooler=prumerge", "encoder.config.global_pool=map")
    card = card_of("pooler=prumerge", "encoder.config.global_pool=map", pooled_per_frame=2.5)
    assert card["tokens"]["pooled_per_frame"] == 2.5
    assert card_of("pooler=slowfast", "pooler.every=2", "pooler.rows=3")["tokens"]["pooled_per_frame"] == (9 + 1) / 2


def test_a_pooler_in_the_encoder_shortens_what_later_blocks_do():
    whole, merged = (
        card_of("pooler=dymu", "pooler.thresholds=0.9", pooled_per_frame=count)["flops"]["prefill"]["encoder"]
        for count in (16, 4)
    )
    assert merged < whole
    with pytest.raises(UserError, match="pooled_per_frame=17.0: must be above 0 and at most 16"):
        card_of("pooler=dymu", "pooler.thresholds=0.9", pooled_per_frame=17.0)


def test_the_command_takes_the_settings_of_a_run_and_words_of_its_own(capsys):
    words = ["cost", "--conf", str(train.CONF_DIR), "data.num_frames=6", "text_tokens=30", "trainer.precision=32-true"]
    assert main([*words, "gpu=h200", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert (card["tokens"]["frames"], card["tokens"]["text"], card["roofline_s"]["gpu"]) == (6, 30, "h200")
    assert main(words) == 0
    assert "tokens.frames                                    6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpu=h20"], "gpu=h20: is not in the table; did you mean 'h200'?; it has a100-40, "),
        (["text_tokens=many"], "text_tokens=many: must be a number"),
        (["text_tokens=3", "answer_tokens=3"], "text_tokens=3, answer_tokens=3: an answer has"),
        (["gpu=t4"], "gpu=t4: its sheet has no bf16; set trainer.precision=16-mixed"),
        (["pooler=avrage"], "pooler=avrage: pooler has no arm 'avrage'"),
    ],
)
def test_mistakes_are_told(words, message, capsys):
    assert main(["cost", "--conf", str(train.CONF_DIR), *words]) == 2
    assert message in capsys.readouterr().err


def test_without_a_checkout_it_says_where_configurations_lie(tmp_path, capsys):
    assert main(["cost", "--conf", str(tmp_path)]) == 2
    assert f"--conf {tmp_path}: has no train.yaml; the configurations lie in the repository" in capsys.readouterr().err
