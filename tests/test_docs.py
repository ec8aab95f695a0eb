"""What the pages say, done: commands compose and parse, README.md's walks are walked, and what pages name exists."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from lightning_crosslmm import cli
from lightning_crosslmm.compose import check_command_line, compose_overrides
from lightning_crosslmm.video import encode_video
from tests.tars import LLAVA, clip, write_tar

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")) if path.is_file()
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = (
    "data.global_batch_size=2",
    "data.num_workers=0",
    "data.sampling.num_frames=2",
    "decoding.max_new_tokens=2",
    "trainer.max_steps=1",
    "trainer.val_check_interval=1",
    "trainer.log_every_n_steps=1",
)


def blocks(text: str, kind: str) -> list[str]:
    """Contents of the fenced blocks of one kind; "" is a block without one."""
    return [
        body for found, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if found == kind
    ]


def section(title: str) -> str:
    """The part of README.md below a heading."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL).group(1)


def commands(text: str, *program: str) -> list[list[str]]:
    """Arguments of each command of the shell blocks that starts with these words."""
    lines = "".join(blocks(text, "bash") + blocks(text, "text")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[len(program) :] for line in words if tuple(line[: len(program)]) == program]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_shell_blocks_are_shell(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


TRAINING = [(page.name, words) for page in PAGES for words in commands(page.read_text("utf-8"), "python", "train.py")]


@pytest.mark.parametrize(
    ("page", "words"), TRAINING, ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_every_train_command_composes(page: str, words: list[str]) -> None:
    assert check_command_line(train.CONF_DIR, words) or not words


def test_readme_has_train_commands_and_crosslmm_commands_that_parse() -> None:
    assert len([page for page, _ in TRAINING if page == "README.md"]) >= 10
    asked = commands(README, "crosslmm")
    assert {words[0] for words in asked} >= {"pack", "index", "verify", "ask"}
    for words in asked:
        cli._parser().parse_args(words)  # exits where it cannot


def test_make_knows_the_targets_that_pages_name() -> None:
    named = {
        target
        for page in PAGES
        for target in re.findall(r"`make (\w+)`|^make (\w+)", page.read_text("utf-8"), re.MULTILINE)
    }
    targets = {first or second for first, second in named}
    assert {"quickstart", "test"} <= targets
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    offered = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True).stdout
    assert targets <= set(re.findall(r"^make (\w+)", offered, re.MULTILINE))


def test_make_test_is_the_command_readme_gives() -> None:
    lines = subprocess.run(
        ["make", "--no-print-directory", "-n", "test", "PYTHON=python"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    assert lines.strip().startswith("python -m pytest") and f"`{lines.strip()}`" in README


def test_the_file_tree_is_on_disk() -> None:
    tree = next(block for block in blocks(section("Where things are"), "") if "train.py" in block)
    folder = ROOT
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split()
        if not line.startswith(" "):
            folder = ROOT
        for name in names:
            assert (folder / name).is_dir() if name.endswith("/") else (folder / name).is_file(), name
        if not line.startswith(" ") and names[0].endswith("/"):
            folder = ROOT / names[0]
    named = set(re.findall(r"^(\w+)/", tree, re.MULTILINE))
    on_disk = {
        path.name for path in ROOT.iterdir() if path.is_dir() and list(path.glob("*.py")) + list(path.glob("*/*.yaml"))
    }
    written = {line.strip().strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}  # runs/, sweeps/
    assert named == {name for name in on_disk - written if not name.startswith(("build", "."))}


def test_the_table_of_arms_is_conf() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section("Swap a part"), re.MULTILINE))
    told = {group: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", arms))) for group, arms in rows.items()}
    groups = {
        folder.name: {arm.stem for arm in folder.glob("*.yaml")}
        for folder in train.CONF_DIR.iterdir()
        if folder.is_dir()
    }
    assert told == {group: arms for group, arms in groups.items() if arms != {"default"}}


def test_the_picture_is_the_same_everywhere() -> None:
    import lightning_crosslmm

    texts = (README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    pictures = [next(block for block in blocks(text, "") if "shard -->" in block) for text in texts]
    pictures += re.findall(r"::\n\n(.*?)\n\n", lightning_crosslmm.__doc__, re.DOTALL)
    assert len(pictures) == 3
    assert len({re.sub("-+", "-", " ".join(picture.split())) for picture in pictures}) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text):
        assert (page.parent / link).exists(), link
    folders = "lightning_crosslmm|data|callbacks|conf|tests|benchmarks|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.]+\.(?:py|yaml|md))`", text):
        assert (ROOT / name).exists() or page.name == "CHANGELOG.md", name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_figures_stand_below_the_command_that_gives_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    # `crosslmm report` names its commands once, at the end
    parts = [text] if "Command that made this report" in text else re.split(r"^#+ ", text, flags=re.MULTILINE)
    for part in parts:
        for match in re.finditer(r"(?:^\|.*\|\n)+", part, re.MULTILINE):
            cells = [cell.strip() for line in match.group().splitlines()[2:] for cell in line.strip("|").split("|")[1:]]
            figures = [
                cell for cell in cells if re.fullmatch(r"[*<>~+-]*\d[\d.,]*( ?(±|\+-) ?[\d.,]+)?( ?[\w%/]+)?\**", cell)
            ]
            if 2 * len(figures) > len(cells):
                assert re.search(r"(python|make|crosslmm) [\w./-]+", part), f"no command gives\n{match.group()}"


def test_no_page_tells_of_this_machine() -> None:
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(work|tmp|root|home|opt|mnt)/", text), path
        assert "TODO" not in text and "_TEXT" not in text, path


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="not a git checkout")
def test_git_ignores_no_code() -> None:
    tracked = [
        path.relative_to(ROOT).as_posix()
        for folder in ("data", "conf", "callbacks", "lightning_crosslmm", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".typed")
    ]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=ROOT,
        input="\n".join(tracked),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory .* exists")
def test_a_pooler_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    title = "Your own pooler"
    (source,) = blocks(section(title), "python")
    (words,) = commands(section(title), "python", "train.py")
    (tmp_path / "my_pooler.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    probe = (
        "data.probe.clips={train: 4, val: 2, test: 2}",
        "data.probe.num_frames=2",
        "data.probe.questions_per_clip=2",
        "data.encoder_fit=null",
    )
    folders = (f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}")
    train.run(compose_overrides(train.CONF_DIR, [*words, *TINY, *probe, *folders]))
    promised = re.findall(r"^\| (`.*?`) \|", section("Two commands"), re.MULTILINE)
    names = [name for cell in promised for name in re.findall(r"`([^`]+)`", cell)]
    assert len(names) >= 7
    for name in names:
        assert (tmp_path / "run" / name).exists(), name
    sys.modules.pop("my_pooler", None)


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory .* exists")
def test_data_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = section("Your own data")
    monkeypatch.chdir(tmp_path)
    (conversations,) = blocks(text, "json")
    Path("conversations.json").write_text(conversations)
    Path("videos").mkdir()
    frames_FHWC = np.random.default_rng(0).integers(0, 255, (8, 32, 32, 3), dtype=np.uint8)
    Path("videos/clip_1.mp4").write_bytes(encode_video(frames_FHWC, 4.0))
    pack, ask = (next(words for words in commands(text, "crosslmm") if words[0] == name) for name in ("pack", "ask"))
    words = commands(text, "python", "train.py")[0]
    assert cli.main(pack) == 0
    tiny = [word for word in TINY if not word.startswith("data.global_batch_size")]
    train.run(compose_overrides(train.CONF_DIR, [*words, *tiny]))
    capsys.readouterr()
    assert cli.main(ask) == 0
    assert capsys.readouterr().out.endswith("\n")


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:Checkpoint directory .* exists")
def test_shards_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = section("Shards of others")
    monkeypatch.chdir(tmp_path)
    Path("others").mkdir()
    members = [("a.json", LLAVA), ("a.mp4", clip()), ("b.txt", b"A dog."), ("b.mp4", clip(8))]
    write_tar(Path("others/x.tar"), members)
    for words in commands(text, "crosslmm"):
        assert cli.main(words) == 0, words
    (words,) = commands(text, "python", "train.py")
    tiny = [word for word in TINY if not word.startswith("data.global_batch_size")]
    train.run(compose_overrides(train.CONF_DIR, [*words, *tiny]))
    assert (tmp_path / "runs" / "others" / "metrics.json").exists()
