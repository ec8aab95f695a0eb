from pathlib import Path

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.report.runs import DONE, FAILED, UNFINISHED, read_run, read_runs
from tests.sweeps import cost_of, named, write_run


def test_a_run_is_what_its_files_say(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / named("tome", "v2v", 2),
        pooler="tome",
        fusion="v2v",
        seed=2,
        metrics={"val/accuracy": 0.5, "val/loss": float("nan")},
        curve=[(10, 0.1), (20, 0.5)],
        cost=cost_of(30, 4e9),
        provenance={"uncommitted_changes": True},
    )
    run = read_run(folder, "a name")
    assert (run.name, run.status, run.message, run.seed) == ("a name", DONE, "", 2)
    assert run.words == {"pooler": "tome", "fusion": "v2v", "seed": "2"}
    assert run.settings["pooler._target_"] == "lightning_crosslmm.pooler.ToMe"
    assert (run.settings["fusion.v2v"], run.settings["fusion.t2v"]) == ("true", "false")
    assert run.settings["trainer.default_root_dir"] == "RUN_DIR" and "run_dir" not in run.settings
    assert run.numbers["val/accuracy"] == 0.5 and "val/loss" not in run.numbers
    assert run.numbers["cost/flops/prefill/total"] == 4e9 and run.numbers["cost/tokens/llm"] == 30
    assert run.curves == {"val/accuracy": [(9, 0.1), (19, 0.5)]}
    assert (run.data, run.commit) == ("train:aaaaaaaa val:bbbbbbbb", "c0ffee01+")
    assert run.command == "python train.py -m pooler=average,tome fusion=none,crosslmm"


def test_how_runs_end(tmp_path: Path) -> None:
    good = {"val/accuracy": 0.5}
    write_run(tmp_path / "a done", metrics=good)
    write_run(tmp_path / "b failed", metrics=good, failed="out of memory")
    write_run(tmp_path / "c error", metrics=good, provenance={"error": "ValueError: bad"})
    write_run(tmp_path / "d stopped", metrics=good, provenance={"error": "Stopped: SIGTERM"})
    write_run(tmp_path / "e killed", curve=[(20, 0.1)])
    early = tmp_path / "f,pooler=sms" / "pooler=sms,seed=4"
    early.mkdir(parents=True)
    (early / "failed.json").write_text('{"message": "no class token"}')
    assert [(run.name[0], run.status, run.message) for run in read_runs(tmp_path)] == [
        ("a", DONE, ""),
        ("b", FAILED, "out of memory"),
        ("c", FAILED, "ValueError: bad"),
        ("d", UNFINISHED, "Stopped: SIGTERM"),
        ("e", UNFINISHED, "at step 20; no end is recorded: it runs still, or was killed"),
        ("f", FAILED, "no class token"),
    ]
    assert (read_runs(tmp_path)[-1].seed, read_runs(tmp_path)[-1].words["pooler"]) == (4, "sms")


def test_words_come_from_the_command_where_the_folder_has_none(tmp_path: Path) -> None:
    command = ["train.py", "pooler=max", "run_dir=runs/x", "hydra.job.chdir=true", "+a.b=[1, 2]", "--cfg"]
    single = write_run(tmp_path / "first", provenance={"command": command})
    assert read_run(single, "").words == {"pooler": "max", "+a.b": "[1, 2]"}
    swept = write_run(tmp_path / "0", provenance={"command": ["train.py", "-m", "pooler=max,tome"]})
    assert read_run(swept, "").words == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data.kinds=[a,b],seed=1", {"data.kinds": "[a,b]", "seed": "1"}),
        ("pooler=tome,x=a-b,0123abcd", {"pooler": "tome", "x": "a-b"}),  # a name that the sweep had to change
        ("pooler=tome,x=[a,b],trainer.max_st,0123abcd", {"pooler": "tome", "x": "[a,b],trainer.max_st"}),  # and cut
        ("default", {}),
        ("no word,a=1", {}),
    ],
)
def test_words_of_a_folder(tmp_path: Path, name: str, words: dict[str, str]) -> None:
    assert read_run(write_run(tmp_path / name), "").words == words


def test_folders_within_a_run_are_part_of_it(tmp_path: Path) -> None:
    write_run(tmp_path / "deep" / "a", metrics={})
    write_run(tmp_path / "deep" / "a" / "exported", metrics={})
    assert [run.name for run in read_runs(tmp_path)] == ["deep/a"]


def test_measurements_of_other_modes_count_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", metrics={"val/accuracy": 0.5})
    (folder / "metrics_test.json").write_text('{"test/accuracy": 0.25, "val/accuracy": 0.1}')
    assert read_run(folder, "").numbers == {"test/accuracy": 0.25, "val/accuracy": 0.5}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: there is no such folder"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no run; a run's folder has a config.yaml"):
        read_runs(tmp_path)
    folder = write_run(tmp_path / "a", metrics={})
    (folder / "metrics.json").write_text("[1]")
    with pytest.raises(UserError, match=r"a/metrics\.json: must be an object with names, found list"):
        read_runs(tmp_path)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"a/metrics\.json: cannot be read"):
        read_runs(tmp_path)
