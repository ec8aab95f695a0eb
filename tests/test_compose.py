from collections import OrderedDict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lightning_crosslmm.compose import (
    ANY_TARGET,
    PART_TARGETS,
    check_command_line,
    compose_overrides,
    instantiate,
    load_run,
    save_resolved,
)
from lightning_crosslmm.errors import UserError

FILES = {
    "train.yaml": """
defaults:
  - pooler: average
  - trainer: cpu
  - _self_
  - experiment: null
seed: 0
run_dir: runs/${now:%Y}
optim: {weight_decay: 0.1, betas: [0.9, 0.99], lr: {pooler: 1e-3, llm: null}}
hydra: {output_subdir: null, run: {dir: "${run_dir}"}}
""",
    "pooler/average.yaml": "_target_: collections.OrderedDict\nwindow: 9",
    "pooler/max.yaml": "_target_: collections.OrderedDict\nwindow: 3\nceil: false",
    "trainer/cpu.yaml": "devices: 1\nroot: ${run_dir}",
    "trainer/gpu.yaml": "defaults: [cpu, _self_]\ndevices: 8",
    "experiment/small.yaml": "# @package _global_\ndefaults: [{override /pooler: max}]\noptim: {weight_decay: 0}",
    "data/probe.yaml": "shards: ???",
}


DECAY, WINDOW = (f"did you mean '{key}'?" for key in ("optim.weight_decay", "pooler.window"))


@pytest.fixture
def conf_dir(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "conf"


def test_arms_values_and_experiments_compose(conf_dir: Path) -> None:
    assert compose_overrides(conf_dir, []).pooler.window == 9
    assert compose_overrides(conf_dir, ["pooler=max", "pooler.window=5"]).pooler.window == 5
    assert compose_overrides(conf_dir, ["pooler.window=5", "pooler=max"]).pooler.ceil is False
    small = compose_overrides(conf_dir, ["experiment=small", "trainer=gpu", "~optim.lr.pooler", "+optim.extra=1"])
    assert (small.pooler.window, small.optim.weight_decay, small.trainer.devices) == (3, 0, 8)
    assert "pooler" not in small.optim.lr and small.optim.extra == 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pooler=averge", "pooler=averge: pooler has no arm 'averge'; did you mean 'average'?; it has average, max"),
        ("experiment=smal", "experiment=smal: experiment has no arm 'smal'; did you mean 'small'?; it has small"),
        ("poolr=max", "poolr=max: there is no setting 'poolr'; did you mean 'pooler'?"),
        ("optim.weight_decy=0", "optim.weight_decy=0: there is no setting 'optim.weight_decy'; " + DECAY),
        ("weight_decay=0", "weight_decay=0: there is no setting 'weight_decay'; did you mean 'optim.weight_decay'?"),
        ("seeed=3", "seeed=3: there is no setting 'seeed'; did you mean 'seed'?"),
        ("~seeed", "~seeed: there is no setting 'seeed'; did you mean 'seed'?"),
        ("pooler.window.x=3", "pooler.window.x=3: there is no setting 'pooler.window.x'; " + WINDOW),
        ("qqqqqqq=3", "qqqqqqq=3: there is no setting 'qqqqqqq'"),
        ("pooler", "pooler: is no setting; write key=value, and quote values that hold any of ()[]{}:= or spaces"),
        ("+poler=max", "+poler=max: nothing reads 'poler'; did you mean 'pooler'?"),
        ("pooler=null", "pooler=null: Config group override must be a string or a list. Got NoneType"),
    ],
)  # fmt: skip
def test_a_wrong_word_gets_one_message(conf_dir: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_overrides(conf_dir, ["trainer=gpu", override])
    assert str(caught.value).removeprefix("trainer=gpu ") == message


def test_the_arm_chosen_decides_which_keys_there_are(conf_dir: Path) -> None:
    assert compose_overrides(conf_dir, ["pooler=max", "pooler.ceil=true"]).pooler.ceil
    with pytest.raises(UserError, match=r"pooler.ceil=true: there is no setting 'pooler.ceil'"):
        compose_overrides(conf_dir, ["pooler=average", "pooler.ceil=true"])


@pytest.mark.parametrize("words", [["pooler=max", "pooler=average"], ["seed=1", "seed=2"]])
def test_a_setting_given_twice_is_refused(conf_dir: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="is given twice"):
        compose_overrides(conf_dir, words)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim=[1", "quote values"),
        ("hydra.run.dirr=2", "dirr"),
        ("hydra.sweep.dir=[1]", "Cannot convert 'list' to string"),
    ],
)
def test_hydras_own_complaints_stay_on_one_line(conf_dir: Path, override: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_overrides(conf_dir, [override])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_train_yaml_and_a_broken_one_are_named(tmp_path: Path, conf_dir: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: has no train.yaml"):
        compose_overrides(tmp_path / "nowhere", [])
    (conf_dir / "pooler" / "average.yaml").write_text("window: [9\n")
    with pytest.raises(UserError, match=r"average.yaml"):
        compose_overrides(conf_dir, [])


def test_command_line_checks_every_job_of_a_sweep(conf_dir: Path) -> None:
    jobs = check_command_line(conf_dir, ["-m", "pooler=average,max", "seed=range(3)", "optim.betas=[0.9,0.95]"])
    assert [(job.pooler.window, job.seed) for job in jobs] == [(window, seed) for window in (9, 3) for seed in range(3)]
    with pytest.raises(UserError, match="pooler=mx: pooler has no arm 'mx'; did you mean 'max'"):
        check_command_line(conf_dir, ["--multirun", "pooler=average,mx"])
    with pytest.raises(UserError, match="seed=1,2: several values; add -m"):
        check_command_line(conf_dir, ["seed=1,2"])
    with pytest.raises(UserError, match="run_dir=x: the jobs of a sweep"):
        check_command_line(conf_dir, ["-m", "seed=1,2", "run_dir=x"])


def test_command_line_tells_what_must_be_given(conf_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^data.shards: must be given; write data.shards=...$"):
        check_command_line(conf_dir, ["+data=probe"])
    check_command_line(conf_dir, ["+data=probe", "+data.shards=x"])


def test_other_flags_of_hydra_are_left_to_it(conf_dir: Path) -> None:
    assert check_command_line(conf_dir, ["--cfg", "job"]) == []


def test_instantiate_builds_plain_arguments_inside_out() -> None:
    node = {
        "_target_": "collections.OrderedDict",
        "inner": {"_target_": "fractions.Fraction", "numerator": 3},
        "of": ["${seed}"],
    }
    config = OmegaConf.create({"seed": 7, "part": node})
    built = instantiate(config.part, ANY_TARGET, given=[config])
    assert type(built) is OrderedDict and built["inner"] == 3 and type(built["of"]) is list and built["of"] == [7]
    assert built["given"][0] is not None
    assert instantiate(OmegaConf.create({"a": node["inner"], "b": None}), ANY_TARGET) == {"a": 3, "b": None}


def test_instantiate_names_the_path_of_what_is_wrong(conf_dir: Path) -> None:
    config = OmegaConf.create(
        {
            "deep": {"list": [{"_target_": "fractions.Fraction", "numerater": 3}]},
            "evil": {"_target_": "collections.OrderedDict", "_recursive_": False, "x": {"_target_": "os.system"}},
            "fails": {"_target_": "fractions.Fraction", "numerator": "many"},
            "missing": {"_target_": "fractions.Fraction", "numerator": "???"},
            "dangling": {"_target_": "fractions.Fraction", "numerator": "${nowhere}"},
        }
    )
    for key, allow, words in (
        (
            "deep",
            ANY_TARGET,
            r"^deep.list.0.numerater: fractions.Fraction takes no 'numerater'; did you mean 'numerator'",
        ),
        ("evil", ("collections",), r"^evil.x._target_: os.system is not run"),
        ("fails", ANY_TARGET, r"^fails: fractions.Fraction cannot be built: Invalid literal for Fraction: 'many'"),
        ("missing", ANY_TARGET, r"^missing.numerator: "),
        ("dangling", ANY_TARGET, r"^dangling.numerator: .*nowhere"),
    ):
        with pytest.raises(UserError, match=words):
            instantiate(config[key], allow)


def refuse(width: int) -> None:
    raise UserError(f"width={width}: must be even")


def test_a_part_that_refuses_speaks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fractions.refuse", refuse, raising=False)
    with pytest.raises(UserError, match=r"^width=3: must be even$"):
        instantiate(OmegaConf.create({"_target_": "fractions.refuse", "width": 3}), ANY_TARGET)


def test_a_run_folder_names_parts_of_models_only() -> None:
    for target in (
        "lightning_crosslmm.compose.instantiate",
        "torch.nn.Linear",
        "lightning_crosslmm.shards.ShardWriter",
    ):
        with pytest.raises(UserError, match="is not run"):
            instantiate(OmegaConf.create({"_target_": target}), PART_TARGETS)


def test_a_run_is_saved_resolved_and_loaded_again(tmp_path: Path, conf_dir: Path) -> None:
    config = compose_overrides(conf_dir, ["run_dir=here"])
    save_resolved(config, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert loaded.trainer.root == "here" and loaded == OmegaConf.create(OmegaConf.to_container(config, resolve=True))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "has no config.yaml"),
        ("- a\n", "must be a mapping"),
        ("a: [", "cannot be read"),
        ("a: ${oc.env:HOME}\n", "holds an interpolation"),
        ("a: !!python/object/apply:os.system [exit]\n", "cannot be read"),
    ],
)
def test_a_config_no_run_wrote_is_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=words):
        load_run(tmp_path)
    with pytest.raises(UserError, match="there is no such folder"):
        load_run(tmp_path / "nowhere")
