"""What a ``_target_`` of a config names, and whether the arguments beside it fit, before anything is built."""

import importlib
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from lightning_crosslmm.errors import UserError, nearest

KEYWORDS = frozenset({"_target_", "_partial_", "_convert_", "_recursive_", "_args_"})


def check_node(node: Mapping[str, Any], where: str, allow: Sequence[str], objects: Mapping[str, Any]) -> None:
    """Check one node that has a ``_target_``: may it be built, does it exist, do its arguments fit.

    Args:
        node: plain values, interpolations resolved.
        where: path of the node in the config, ``trainer`` or ``callbacks.curves``.
        allow: packages whose classes and functions may be called, or single ones; ``""`` allows all.
        objects: arguments that come from elsewhere, already built.

    Raises:
        UserError: names the path, the class, and the argument that does not fit, with the nearest valid one.
    """
    target = node["_target_"]
    if not isinstance(target, str):
        raise UserError(f"{where}._target_: {target!r} must be a dotted path such as 'package.module.Class'")
    if not _allowed(target, allow):
        raise UserError(_refusal(where, target, allow))
    found = _locate(target, where)
    # A dotted path may lead through an allowed module to what that module imported.
    if not _allowed(f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}", allow):
        raise UserError(_refusal(where, target, allow))
    if not callable(found):
        raise UserError(f"{where}._target_: {target} is no class or function but {type(found).__name__}")
    _check_arguments(found, {**objects, **node}, where, target)


def _allowed(target: str, allow: Sequence[str]) -> bool:
    return any(not prefix or f"{target}.".startswith(prefix.rstrip(".") + ".") for prefix in allow)


def _refusal(where: str, target: str, allow: Sequence[str]) -> str:
    return (
        f"{where}._target_: {target} is not run, because this config may only name classes and functions of "
        f"{', '.join(allow) or 'no package'}; allow its package explicitly if you trust it"
    )


def _locate(target: str, where: str) -> Any:
    parts = target.split(".")
    found: Any = None
    depth = 0
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        try:
            found = importlib.import_module(name)
        except (ModuleNotFoundError, ValueError) as error:  # ValueError: an empty part, as in 'a..b'
            if isinstance(error, ModuleNotFoundError) and not f"{name}.".startswith(f"{error.name}."):
                raise UserError(f"{where}._target_: importing {name} failed, {error}") from error
            depth -= 1
            break
    if found is None:
        raise UserError(f"{where}._target_: {target}: no module {parts[0]!r} can be imported")
    for part in parts[depth:]:
        if not hasattr(found, part):
            owner = getattr(found, "__name__", str(found))
            raise UserError(f"{where}._target_: {target}: {owner} has no {part!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    return found


def _check_arguments(found: Callable[..., Any], node: Mapping[str, Any], where: str, target: str) -> None:
    try:
        parameters = inspect.signature(found).parameters
    except ValueError:  # written in C, nothing to compare with
        return
    given = {name: value for name, value in node.items() if name not in KEYWORDS}
    named = {name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in given.keys() - named:
            raise UserError(
                f"{where}.{name}: {target} takes no '{name}'{nearest(name, named)}; it takes {', '.join(sorted(named))}"
            )
    if not node.get("_partial_") and "_args_" not in node:
        missing = [
            name for name in parameters if name in named - given.keys() and parameters[name].default is inspect._empty
        ]
        if missing:
            raise UserError(f"{where}: {target} needs {' and '.join(missing)}; write {where}.{missing[0]}=...")
    hints = _hints(found)
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            raise UserError(f"{where}.{name}={value!r}: {target} takes {_readable(hints[name])} here")


def _hints(found: Callable[..., Any]) -> dict[str, Any]:
    try:
        return get_type_hints(found.__init__ if inspect.isclass(found) else found)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can read
        return {}


def _readable(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint).replace("typing.", "")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand where ``hint`` is asked for; hints about other things fit everything."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in choices)
    if origin is Literal:
        return value in choices
    if hint is None or hint is types.NoneType:
        return value is None
    if isinstance(value, dict) and "_target_" in value:
        return True  # an object, or a hint that is not about plain values
    if hint is bool or hint is str:
        return isinstance(value, hint)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in (list, tuple) or origin in (list, tuple):
        return isinstance(value, list)
    if hint is dict or origin is dict:
        return isinstance(value, dict)
    return True  # an object, or a hint that is not about plain values
