"""Operators on the meta device, remembered: layers repeat, and working out a shape in Python is slow."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Memo:
    """Call operators, those on the meta device once per combination of shapes and arguments."""

    def __init__(self) -> None:
        self._known: dict[Any, Any] = {}

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator.

        Args:
            func: an overload of torch's operators.
            args: of it.
            kwargs: of it.

        Returns:
            What it gives; a fresh tensor each time, unless the operator returns a view or its own argument.
        """
        if func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if not _is_all_meta((args, kwargs)):
            return func(*args, **kwargs)
        if key not in self._known:
            result = func(*args, **kwargs)
            self._known[key] = _form(result)
            return result
        return _made(self._known[key])


def _is_all_meta(node: Any) -> bool:
    tensors = [each for each in tree_leaves(node) if isinstance(each, Tensor)]
    return bool(tensors) and all(each.is_meta for each in tensors)


def _key(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.shape, node.stride(), node.dtype, node.device.type
    if isinstance(node, tuple | list):
        return tuple(_key(each) for each in node)
    return type(node), node


def _form(result: Any) -> Any:
    if isinstance(result, Tensor):
        return tuple(result.shape), result.stride(), result.dtype
    if isinstance(result, tuple | list):
        return [_form(each) for each in result]
    return None if result is None else (result,)


def _made(form: Any) -> Any:
    if isinstance(form, list):
        return tuple(_made(each) for each in form)
    if form is None or len(form) == 1:
        return form and form[0]
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
