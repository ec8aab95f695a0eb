"""Train and measure video LMMs: few pooled visual tokens in the prompt, all source tokens within reach.

::

    data/                             lightning_crosslmm/
    shard --> clip --> frames         frames --> encoder --> source tokens --> pooler --> projector --> pooled tokens
      tar + index  decode  timestamps                             |                                          |
    conversation --> ids, labels                                  | (kept, never dropped)                    v
      ^                                                           |          text ids --------> placed --> LLM layers
      |  one record of integers                                   +-------> fusion (V2V, T2V) at every k-th layer |
    callbacks/ <-- Lightning hooks                                                                                v
    conf/   one YAML per choice at every arrow                                      loss, metrics, decoding (answer)
    train.py   compose --> build --> fit | validate | test | predict

Each folder here is a socket, and a group of the same name under ``conf/``; CONTRIBUTING.md is the map of the rest.
Importing the package imports none of its parts: a name below brings its module along when it is first asked for, and
transformers' Auto classes learn of exported models when they are imported themselves.
"""

from typing import TYPE_CHECKING, Any

from lightning_crosslmm.hf.announce import announce

if TYPE_CHECKING:
    from lightning_crosslmm.answer import Answerer as Answerer
    from lightning_crosslmm.batch import VideoBatch as VideoBatch
    from lightning_crosslmm.errors import UserError as UserError
    from lightning_crosslmm.fusion import Fusion as Fusion
    from lightning_crosslmm.model import CrossLMM as CrossLMM
    from lightning_crosslmm.module import CrossLMMModule as CrossLMMModule
    from lightning_crosslmm.pooler import Pooler as Pooler
    from lightning_crosslmm.tokens import TokenSet as TokenSet

    __version__: str

_HOMES = {
    "Answerer": "answer",
    "CrossLMM": "model",
    "CrossLMMModule": "module",
    "Fusion": "fusion",
    "Pooler": "pooler",
    "TokenSet": "tokens",
    "UserError": "errors",
    "VideoBatch": "batch",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("lightning-crosslmm")
    except PackageNotFoundError:  # a checkout that was not installed; pyproject.toml alone knows its version
        return "0+uninstalled"


announce()
