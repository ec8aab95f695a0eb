"""The wheel as a stranger gets it: what is in it, that it works without the checkout, and that its papers agree."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "lightning_crosslmm", "data", "callbacks", "conf", "train.py")


def call(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy: a build leaves files beside its sources."""
    import shutil

    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        there, skip = folder / "checkout" / name, shutil.ignore_patterns("__pycache__")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, there, ignore=skip)
        else:
            there.parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, there)
    done = call("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), cwd=folder / "checkout")
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_ships_the_library_alone_and_all_of_it(names: list[str]) -> None:
    meta = f"lightning_crosslmm-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lightning_crosslmm", meta}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_crosslmm").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    data = {"lightning_crosslmm/py.typed", "lightning_crosslmm/report/page.html"}
    assert data | {f"{meta}/licenses/LICENSE", f"{meta}/entry_points.txt"} <= set(names)


def test_check_wheel_contents_agrees(wheel: Path) -> None:
    done = call("-m", "check_wheel_contents", "--no-config", str(wheel), cwd=wheel.parent)
    assert done.returncode == 0, done.stdout


def test_it_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import lightning_crosslmm\n"
        f"assert lightning_crosslmm.__file__.startswith({str(tmp_path)!r}), lightning_crosslmm.__file__\n"
        f"assert lightning_crosslmm.__version__ == {PROJECT['version']!r}, lightning_crosslmm.__version__\n"
        "from importlib.metadata import distribution\n"
        "(entry,) = distribution('lightning-crosslmm').entry_points\n"
        "assert (entry.group, entry.name) == ('console_scripts', 'crosslmm')\n"
        "assert all(getattr(lightning_crosslmm, name) for name in lightning_crosslmm.__all__)\n"
        "sys.exit(entry.load()(['ask', 'clip.mp4', 'what?', '--run', 'nowhere']))\n"
    )
    done = call("-I", "-c", code, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr == "error: nowhere: there is no such folder\n"


def test_a_checkout_that_is_not_installed_does_not_make_up_a_version(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "def nothing(name):\n"
        "    raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = nothing\n"
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import lightning_crosslmm; print(lightning_crosslmm.__version__)\n"
    )
    assert call("-c", code, cwd=tmp_path).stdout == "0+uninstalled\n"


def test_changelog_and_citation_know_the_version() -> None:
    released = re.findall(r"^## \[(\d[\w.]*)\] - \d{4}-\d\d-\d\d$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert released[0] == str(citation["version"]) == PROJECT["version"]
    assert citation["license"] == PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
