"""Every tensor and array that can be reached from an object: an audit must not be told where to look.

Attributes, slots, class attributes, mappings, sequences, sets, closures, defaults, partial functions and
bound methods are followed, tensors' own attributes and gradients too; Python's own floats in a sequence or
set count as an array. Not followed are weak references, Python modules, classes kept as values, global names,
storages and buffers without a tensor or array, and what autograd, an iterator or a generator holds.
"""

import array
import functools
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (str, bytes, bytearray, int, float, complex, type(None), torch.dtype, torch.device, torch.Size)
_SKIPPED = (type, types.ModuleType, types.BuiltinFunctionType, *_ATOMS)


def reach(roots: Mapping[str, Any], transient: Mapping[type, Set[str]]) -> Iterator[tuple[str, Any]]:
    """Names and values of all tensors, NumPy arrays and `array.array`s that `roots` lead to, nearest first.

    Args:
        roots: where to begin, by the prefix of the names ("" for none).
        transient: attributes, by class, that hold what lives within a step only, and are not followed.

    Yields:
        Each value once, with the shortest dotted name that leads to it.
    """
    seen: dict[int, Any] = {}  # the objects are kept, so that no other one gets the number of one
    queue = deque(roots.items())
    while queue:
        name, value = queue.popleft()
        if isinstance(value, _SKIPPED) or id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, (Tensor, array.array)) or _is_numpy(value):
            yield name, value
        elif isinstance(value, (list, tuple, Set, deque)):
            floats = array.array("d", [part for part in value if isinstance(part, float)])
            if floats:
                yield name, floats
        hidden = {key for kind, keys in transient.items() if isinstance(value, kind) for key in keys}
        queue.extend((_join(name, key), part) for key, part in _parts(value) if key not in hidden)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, by name."""
    if isinstance(value, nn.Module):
        for kind in ("_parameters", "_buffers", "_modules"):
            yield from vars(value)[kind].items()
    if isinstance(value, Tensor):
        yield "grad", value.grad if value.is_leaf else None
    elif isinstance(value, Mapping):
        for key, part in list(value.items()):
            yield str(key) if isinstance(key, _ATOMS) else type(key).__name__, part
            yield f"{type(key).__name__} (key)", key
    elif isinstance(value, array.array) or (_is_numpy(value) and value.dtype != object):
        return
    elif isinstance(value, (Sequence, Set, deque)) or _is_numpy(value):
        flat: Iterable[Any] = value.ravel() if _is_numpy(value) else value
        yield from ((str(number), part) for number, part in enumerate(list(flat)))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from (("defaults", value.__defaults__), ("kwdefaults", value.__kwdefaults__))
        yield from zip(value.__code__.co_freevars, map(_content, value.__closure__ or ()), strict=True)
    yield from _attributes(value)


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of the instance, in slots, and of classes that are not torch's or Python's."""
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            mangled = f"_{kind.__name__.lstrip('_')}{name}" if name.startswith("__") else name
            member = kind.__dict__.get(mangled)
            if isinstance(member, types.MemberDescriptorType):
                try:
                    yield name, member.__get__(value)
                except AttributeError:  # declared, not set
                    continue
        if kind.__module__.partition(".")[0] not in ("torch", "builtins", "collections", "typing", "abc"):
            for name, part in list(vars(kind).items()):
                if not (name.startswith("__") or callable(part) or hasattr(part, "__get__")):
                    yield name, part


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


def _is_numpy(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic))


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
