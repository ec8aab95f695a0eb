import logging
from typing import Literal

import pytest

from lightning_crosslmm.errors import UserError
from lightning_crosslmm.targets import check_node

ALL = ("",)


class Part:
    def __init__(
        self,
        width: int,
        rate_hz: float = 1.0,
        mode: Literal["uniform", "rate"] = "uniform",
        betas: tuple[float, float] = (0.9, 0.99),
        limit: int | None = None,
        gated: bool = True,
    ) -> None:
        self.width = width


def build_part(width: int, **others: int) -> Part:
    return Part(width)


NOT_CALLABLE = 3


def check(node: dict, allow: tuple[str, ...] = ALL) -> None:
    node.setdefault("_target_", f"{__name__}.Part")
    check_node(node, "parts.one", allow, {})


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 8},
        {"width": 8, "rate_hz": 2, "mode": "rate", "betas": [0.9, 0.95], "limit": None, "gated": False},
        {"_partial_": True, "limit": 3},
        {"width": {"_target_": "builtins.int"}},
        {"_target_": f"{__name__}.build_part", "width": 1, "anything": "goes"},
        {"_target_": "collections.OrderedDict", "a": 1},
    ],
)
def test_what_fits_passes(arguments: dict) -> None:
    check(arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"widht": 8}, ["parts.one.widht", "Part takes no 'widht'; did you mean 'width'?", "betas, gated"]),
        ({}, ["parts.one", "needs width", "parts.one.width=..."]),
        ({"width": "big"}, ["parts.one.width='big'", "takes int"]),
        ({"width": True}, ["parts.one.width=True", "takes int"]),
        ({"width": None}, ["parts.one.width=None", "takes int"]),
        ({"width": 8, "rate_hz": "2"}, ["parts.one.rate_hz='2'", "takes float"]),
        ({"width": 8, "mode": "unifrom"}, ["parts.one.mode='unifrom'", "Literal['uniform', 'rate']"]),
        ({"width": 8, "betas": 0.9}, ["parts.one.betas=0.9", "tuple[float, float]"]),
        ({"width": 8, "limit": 1.5}, ["parts.one.limit=1.5", "int | None"]),
        ({"width": 8, "gated": 1}, ["parts.one.gated=1", "takes bool"]),
        ({"_target_": "json.dump_s"}, ["json has no 'dump_s'; did you mean 'dumps'?"]),
        ({"_target_": "jsn.dumps"}, ["no module 'jsn'"]),
        ({"_target_": "a..b"}, ["no module 'a'"]),
        ({"_target_": f"{__name__}.NOT_CALLABLE"}, ["is no class or function but int"]),
        ({"_target_": 3}, ["parts.one._target_", "dotted path"]),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check(arguments)
    for word in words:
        assert word in str(caught.value)


def test_import_that_fails_inside_a_module_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import a_library_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="importing needs_more failed.*a_library_nobody_has"):
        check({"_target_": "needs_more.Part"})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "lightning_crosslmm_evil.run",
        "lightning_crosslmm.shards.ShardWriter",
    ],
)
def test_targets_elsewhere_are_refused_without_importing_them(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(UserError, match=r"parts.one._target_.*is not run.*lightning_crosslmm.optim"):
        check({"_target_": target}, ("lightning_crosslmm.optim", "lightning_crosslmm.pooler."))


def test_a_path_through_an_allowed_module_does_not_lead_out_of_it() -> None:
    target = "logging.config.io.open"
    assert logging.__name__ == "logging"
    with pytest.raises(UserError, match=r"logging.config.io.open is not run"):
        check({"_target_": target, "file": "x"}, ("logging",))
    check({"_target_": "logging.config.fileConfig", "fname": "x"}, ("logging",))
