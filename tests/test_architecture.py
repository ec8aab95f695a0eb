"""CONTRIBUTING.md against the code: its tables, read here, must agree with every import, and files keep its sizes."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "lightning_crosslmm"
FILES = sorted(path for folder in (LIBRARY, ROOT / "data", ROOT / "callbacks") for path in folder.rglob("*.py"))
FILES.append(ROOT / "train.py")
OURS = {"lightning_crosslmm", "data", "callbacks", "train"}
DISTRIBUTIONS = {"hydra": "hydra-core", "yaml": "pyyaml"}  # where the name of an import is not the name to install


def short(path: Path) -> str:
    """Name a file as CONTRIBUTING does: `fusion/block.py`, `data/order.py`, `lightning_crosslmm/cli.py`."""
    inside = path.relative_to(ROOT)
    return inside.relative_to("lightning_crosslmm").as_posix() if path.is_relative_to(LIBRARY) else inside.as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it, with the names taken from each module."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def table(header: str) -> list[tuple[str, str]]:
    """Rows of a table of CONTRIBUTING.md."""
    lines = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        first, second = line.strip("|").split("|")
        rows.append((first.strip(), second.strip()))
    raise AssertionError("a table ends before the page does")


class Place(NamedTuple):
    """Where a module stands: its layer, and the part it belongs to."""

    layer: int
    part: str


def quoted(cell: str) -> list[str]:
    return [name.removeprefix("lightning_crosslmm/") for name in re.findall(r"`([\w/.]+)`", cell)]


@cache
def places() -> dict[str, Place]:
    """Every file or folder the layer table names; files joined by + are one part."""
    found = {}
    for layer, cell in table("layer"):
        joined = re.sub(r"`(\s*\+\s*)`", "+", re.sub(r"\([^)]*\)", "", cell))
        for group in re.findall(r"`([\w/.+]+)`", joined):
            for name in group.split("+"):
                found[name.removeprefix("lightning_crosslmm/")] = Place(int(layer), group)
    return found


def place_of(name: str) -> Place | None:
    """Look up a file, by itself or by its folder."""
    return places().get(name) or places().get(name.split("/")[0] + "/")


def file_of(module: str) -> Path | None:
    """Find the file of one of our modules, or of the module that holds the name."""
    while module:
        path = ROOT / module.replace(".", "/")
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if (path / "__init__.py").is_file():
            return path / "__init__.py"
        module = module.rpartition(".")[0]
    return None


def ours(path: Path) -> set[Path]:
    return {file for name in imported(path) if name.split(".")[0] in OURS and (file := file_of(name)) is not None}


def test_every_module_has_its_place_on_the_map_and_the_map_names_no_other() -> None:
    front = {"__init__.py", "data/__init__.py", "callbacks/__init__.py"}
    assert [short(path) for path in FILES if short(path) not in front and place_of(short(path)) is None] == []
    known = {short(path) for path in FILES} | {short(path).split("/")[0] + "/" for path in FILES}
    assert [name for name in places() if name not in known] == []


@pytest.mark.parametrize("path", FILES, ids=short)
def test_imports_point_down(path: Path) -> None:
    if short(path) == "__init__.py":
        pytest.skip("the front door names things of all layers, and imports none (see below)")
    here = place_of(short(path)) or Place(0, "")
    for other in ours(path):
        assert other != LIBRARY / "__init__.py", "the library's own modules do not come in by its front door"
        if short(other) == "errors.py":
            continue
        there = place_of(short(other))
        assert there is not None
        assert there.layer < here.layer or there == here, f"{short(path)} may not use {short(other)}"


def test_the_library_knows_nothing_of_the_checkout() -> None:
    for path in FILES:
        if path.is_relative_to(LIBRARY):
            assert {name.split(".")[0] for name in imported(path)} & (OURS - {"lightning_crosslmm"}) == set(), path


def third_party(path: Path) -> set[str]:
    names = imported(path)
    return {name for name in names if name.split(".")[0] not in OURS | {"torch"} | set(sys.stdlib_module_names)}


def test_each_third_party_library_has_its_doors() -> None:
    doors = {library: quoted(cell) for row, cell in table("library") for library in quoted(row)}
    for path in FILES:
        guarded = third_party(path) | {name for name in imported(path) if name.startswith("torch.nn.attention.varlen")}
        for name in guarded:
            library = next((known for known in doors if f"{name}.".startswith(f"{known}.")), None)
            assert library is not None, f"{short(path)} imports {name}, which has no door in CONTRIBUTING.md"
            is_door = any(
                short(path) == door or short(path).startswith(door.rstrip("/") + "/") for door in doors[library]
            )
            assert is_door, f"{short(path)} imports {library}; its doors are {', '.join(doors[library])}"


def test_every_door_is_used() -> None:
    doors = {library: quoted(cell) for row, cell in table("library") for library in quoted(row)}
    for library, places_of_it in doors.items():
        for door in places_of_it:
            files = [path for path in FILES if short(path) == door or short(path).startswith(door.rstrip("/") + "/")]
            assert any(f"{name}.".startswith(f"{library}.") for path in files for name in imported(path)), (
                library,
                door,
            )


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [
        *project["dependencies"],
        *project["optional-dependencies"]["xformers"],
        *project["optional-dependencies"]["lora"],
    ]
    declared = {re.match(r"[\w-]+", line).group().lower() for line in lines}
    libraries = {name.split(".")[0] for path in FILES for name in third_party(path)}
    assert {DISTRIBUTIONS.get(library, library) for library in libraries} - declared == set()


@pytest.mark.parametrize("path", FILES, ids=short)
def test_files_and_functions_stay_within_their_ceilings(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", FILES, ids=short)
def test_what_is_public_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "a module begins with what it is"
    for owner in (tree(path), *(node for node in tree(path).body if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            is_public = isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
            if is_public:
                assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("path", FILES, ids=short)
def test_users_are_told_by_errors_not_by_prints_and_asserts(path: Path) -> None:
    for node in ast.walk(tree(path)):
        is_print = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not is_print, f"line {node.lineno}"
        if isinstance(node, ast.Assert):  # for our own bugs: it says what we rely on
            assert isinstance(node.msg, ast.Constant), f"line {node.lineno}: an assert says what it relies on"


SIDE_EFFECTS = """
import importlib, logging, os, random, sys
import numpy, torch, {heavy}
def state():
    ours = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in {ours}]
    loggers = [logging.getLogger(), *map(logging.getLogger, ours)]
    handlers = {{logger.name: [*map(repr, logger.handlers), logger.level] for logger in loggers}}
    return {{
        **{{f"environment {{name}}": value for name, value in os.environ.items()}},
        **{{f"logger {{name}}": found for name, found in handlers.items() if found != [0]}},
        "python's random state": random.getstate(),
        "numpy's random state": numpy.random.get_state()[1].tolist(),
        "torch's random state": torch.get_rng_state().tolist(),
        "torch's threads": torch.get_num_threads(),
        "torch's default dtype": torch.get_default_dtype(),
        "module path": list(sys.path),
        "folder": os.getcwd(),
    }}
before = state()
for name in {modules}:
    importlib.import_module(name)
    now = state()
    changed = [key for key in {{**before, **now}} if before.get(key) != now.get(key)]
    if changed:
        sys.exit(f"importing {{name}} changed {{changed}}")
"""


def modules() -> list[str]:
    dotted = (path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in FILES)
    return [name.removesuffix(".__init__") for name in dotted]


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_importing_any_module_changes_nothing_outside_it() -> None:
    # others' imports do change things (Lightning adds a handler), so those come first
    heavy = "hydra, lightning.pytorch.loggers, matplotlib.figure, timm, torchmetrics, transformers, webdataset"
    done = run(SIDE_EFFECTS.format(heavy=heavy, modules=modules(), ours=OURS))
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = run(
        "import sys, lightning_crosslmm\n"
        "light = {'lightning_crosslmm'} | sys.stdlib_module_names\n"
        "assert 'importlib.metadata' not in sys.modules\n"
        "lightning_crosslmm.UserError, lightning_crosslmm.__version__\n"
        "new = {name.split('.')[0] for name in sys.modules} & {'torch', 'lightning', 'transformers', 'hydra'}\n"
        "assert not new, new"
    )
    assert done.returncode == 0, done.stderr


def test_the_front_door_leads_to_everything_it_names() -> None:
    import lightning_crosslmm

    for name in lightning_crosslmm.__all__:
        assert getattr(lightning_crosslmm, name) is not None
    assert set(lightning_crosslmm.__all__) <= set(dir(lightning_crosslmm))
    with pytest.raises(AttributeError, match="has no attribute 'CrossLM'"):
        lightning_crosslmm.CrossLM  # noqa: B018
