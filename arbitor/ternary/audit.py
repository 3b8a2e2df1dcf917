"""Audit: every tensor that training keeps, its bytes, and whether a float is among them.

Persistent is what a checkpoint holds: the model's parameters and saved buffers, and the optimizer's state.
A live model is also searched for floats that are not saved but may stand for weights: every tensor or array
of more than a few floats that a module or the optimizer leads to, whatever its shape, name and container, and
small ones where they are many; `arbitor/ternary/reach.py` says what is not followed. Only captured gradients
are let be, which live from a backward to its step.
"""

import math
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.ternary.capture import MatrixCapture, RowCapture
from arbitor.ternary.reach import reach
from arbitor.ternary.tensor import named_ternary

FEW_FLOATS = 4  # that a tensor may keep: a loss, a metric, but no weights
SMALL_FLOATS = 256  # in all tensors of so few
MAX_HEADER_BYTES = 16 << 20
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

_BLOCK_TRITS, _BLOCK_BYTES = 160, 32
_SAFETENSORS_INTEGERS = {
    "BOOL": ("bool", 1),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
}
_SAFETENSORS_FLOATS = {
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
}
_TRANSIENT = {MatrixCapture: {"_pairs", "_dense"}, RowCapture: {"_uses"}}
_MATRIX_ROLES = {
    "T_packed": "trits",
    "E": "scale exponents",
    "T_accum": "accumulator",
    "E_accum": "scale accumulator",
    "M": "momentum",
    "M_exp": "momentum exponents",
}
_TABLE_ROLES = {"q": "table", "E": "table exponents", "M": "momentum", "M_exp": "momentum exponents"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRow:
    """One tensor.

    Attributes:
        name: `<module>.<key>`.
        dtype: as torch names it, without `torch.`.
        shape: its dimensions.
        bytes: what it takes.
        role: trits, scale exponents, table, table exponents, accumulator, scale accumulator, momentum or
            momentum exponents; `float adapter` and `adapter training state` of a finetune beside a frozen
            base; anything else is `integer`, `float weight`, `float training state` or `unsaved float`.
        weights: logical weights that it stores, padding not counted; 0 for everything but weights.
        trunk: whether it belongs to a ternary matrix.
        persistent: whether it is saved.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    role: str
    weights: int = 0
    trunk: bool = False
    persistent: bool = True

    @property
    def is_float(self) -> bool:
        """Whether it breaks the promise that weights and training state are integers.

        An adapter is no weight of the model: it is made by a finetune, in modules and files of its own.
        """
        return self.role in ("float weight", "float training state", "unsaved float")

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} {list(self.shape)}, {self.bytes:,} bytes, {self.role}"


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What is kept.

    Attributes:
        rows: every persistent tensor, by name, and every other tensor or array of more than a few floats.
    """

    rows: tuple[AuditRow, ...]

    @property
    def violations(self) -> tuple[AuditRow, ...]:
        """The float tensors among the rows."""
        return tuple(row for row in self.rows if row.is_float)

    @property
    def ok(self) -> bool:
        """True if no weight and no training state is a float."""
        return not self.violations

    @property
    def trit_weights(self) -> int:
        """Logical weights in ternary matrices."""
        return sum(row.weights for row in self.rows if row.trunk)

    @property
    def trained_weights(self) -> int:
        """Logical weights of every kind: trits, tables, floats."""
        return sum(row.weights for row in self.rows)

    @property
    def total_bytes(self) -> int:
        """All persistent bytes."""
        return sum(row.bytes for row in self.rows if row.persistent)

    @property
    def bytes_per_weight(self) -> float:
        """All persistent bytes over all trained logical weights; 0 without weights."""
        return self.total_bytes / max(1, self.trained_weights)

    @property
    def trunk_bytes_per_weight(self) -> float:
        """The same over ternary matrices and their training state only; 0 without any."""
        trunk = sum(row.bytes for row in self.rows if row.trunk and row.persistent)
        return trunk / max(1, self.trit_weights)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A persistent tensor before its role is known; `is_state` for the optimizer's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    is_float: bool
    is_state: bool


def audit(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> AuditReport:
    """What `model` and `optimizer` keep between steps.

    Args:
        model: any module; layers that are not ternary count as what they are.
        optimizer: its training state; any torch optimizer.

    Returns:
        The report; `report.ok` is False if a persistent tensor is a float, or if a tensor or array of more
        than `FEW_FLOATS` floats is kept anywhere else, or more than `SMALL_FLOATS` in smaller ones.
    """
    saved = dict(_saved_tensors(model))
    state = dict(_optimizer_tensors(model, optimizer))
    entries = [_entry(name, tensor, False) for name, tensor in saved.items()]
    entries += [_entry(name, tensor, True) for name, tensor in state.items()]
    rows = _rows(
        entries, {name: module.numel() for name, module in named_ternary(model)}, _adapter_prefixes(model)
    )
    known = {id(tensor) for tensor in (*saved.values(), *state.values())}
    roots = {"": model} if optimizer is None else {"": model, "optimizer": optimizer}
    hidden: list[AuditRow] = []
    small: list[AuditRow] = []
    for name, tensor in reach(roots, _TRANSIENT):
        entry = _entry(name, tensor, False)
        if id(tensor) not in known and entry.is_float:
            (hidden if math.prod(entry.shape) > FEW_FLOATS else small).append(_unsaved(entry))
    if sum(math.prod(row.shape) for row in small) > SMALL_FLOATS:
        hidden += small
    return AuditReport(rows=(*rows, *hidden))


def _unsaved(entry: _Entry) -> AuditRow:
    return AuditRow(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        bytes=entry.bytes,
        role="unsaved float",
        persistent=False,
    )


def audit_checkpoint(path: str | os.PathLike[str], model: nn.Module | None = None) -> AuditReport:
    """What a checkpoint holds, from the headers of its safetensors files; no tensor is read.

    A matrix's logical width comes from its accumulators; in a file without training state from `model`, or
    else from its packed width, which is exact for multiples of 160.

    Args:
        path: a checkpoint folder, all of whose safetensors files count, or one such file.
        model: the architecture, for logical widths; it may lie on the meta device.

    Raises:
        UserError: nothing is there, or a header is damaged or over 16 MiB.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if path / MODEL_FILE not in files:
            raise UserError(f"{path} holds no {MODEL_FILE}; give a checkpoint folder or a .safetensors file")
        entries = [entry for file in files for entry in _read_header(file, file.name != MODEL_FILE)]
    else:
        entries = _read_header(path, path.name == OPTIMIZER_FILE)
    known = {} if model is None else {name: module.numel() for name, module in named_ternary(model)}
    return AuditReport(rows=_rows(entries, known))


def audit_adapter(path: str | os.PathLike[str], weights: str, state: str = OPTIMIZER_FILE) -> AuditReport:
    """What the folder of an adapter holds, from the headers of its safetensors files.

    Args:
        path: the folder.
        weights: name of the file with the adapter's weights.
        state: name of the file with the optimizer's state; it may be missing.

    Raises:
        UserError: a file is missing or its header damaged.
    """
    path = Path(path)
    entries = _read_header(path / weights, False)
    if (path / state).is_file():
        entries += _read_header(path / state, True)
    return AuditReport(rows=_rows(entries, {}, ("",)))


def _rows(
    entries: Iterable[_Entry], known_weights: Mapping[str, int], adapters: tuple[str, ...] = ()
) -> tuple[AuditRow, ...]:
    """Rows with roles, sorted by name.

    Args:
        entries: the persistent tensors.
        known_weights: logical weights of modules by name.
        adapters: what the names of tensors of adapters begin with.
    """
    entries = sorted(entries, key=lambda entry: entry.name)
    shapes = {entry.name: entry.shape for entry in entries}
    rows = []
    for entry in entries:
        module, _, key = entry.name.rpartition(".")
        in_matrix = any(_join(module, k) in shapes for k in ("T_packed", "T_accum"))
        roles = _MATRIX_ROLES if in_matrix else _TABLE_ROLES
        role, weights = roles.get(key, "integer"), 0
        if entry.is_float:
            if adapters and entry.name.startswith(adapters):
                role = "adapter training state" if entry.is_state else "float adapter"
            else:
                role = "float training state" if entry.is_state else "float weight"
            weights = 0 if entry.is_state else math.prod(entry.shape)
        elif role in ("trits", "table") and not entry.is_state:
            accumulator = shapes.get(_join(module, "T_accum"))
            weights = known_weights.get(module) or _weights_of(role, entry.shape, accumulator)
        rows.append(
            AuditRow(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                bytes=entry.bytes,
                role=role,
                weights=weights,
                trunk=in_matrix and (entry.is_state or not entry.is_float),
            )
        )
    return tuple(rows)


def _adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """`<module>.lora_A.`, `<module>.lora_B.` of the modules that say they are adapters of a frozen base."""
    return tuple(
        _join(name, f"{part}.")
        for name, module in model.named_modules()
        if getattr(module, "float_adapter", False)
        for part in ("lora_A", "lora_B")
    )


def _weights_of(role: str, shape: tuple[int, ...], accumulator: tuple[int, ...] | None) -> int:
    if role == "table":
        return math.prod(shape)
    if accumulator is not None:
        return math.prod(accumulator)
    return math.prod(shape) * _BLOCK_TRITS // _BLOCK_BYTES


def _join(module: str, key: str) -> str:
    return f"{module}.{key}" if module else key


def _entry(name: str, value: Any, is_state: bool) -> _Entry:
    """A tensor, a NumPy array or an `array.array`."""
    if isinstance(value, Tensor):
        dtype, shape = str(value.dtype).removeprefix("torch."), tuple(value.shape)
        size, is_float = value.element_size(), value.is_floating_point() or value.is_complex()
    elif isinstance(value, array):
        dtype, shape, size, is_float = value.typecode, (len(value),), value.itemsize, value.typecode in "fd"
    else:
        dtype, shape = str(value.dtype), tuple(value.shape)
        kinds = {part.kind for part, *_ in (value.dtype.fields or {}).values()} or {value.dtype.kind}
        size, is_float = value.dtype.itemsize, bool(kinds & {"f", "c"})
    return _Entry(name, dtype, shape, math.prod(shape) * size, is_float, is_state)


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What `state_dict()` holds, extra state included, a tensor that two modules share counted once."""
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        parts = [(name, value)] if isinstance(value, Tensor) else reach({name: value}, {})
        for part, tensor in parts:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield part, tensor


def _optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, Any]]:
    """State tensors, named after the ternary module that they belong to, else after their parameter."""
    if optimizer is None:
        return
    owners = {id(m.stored): name for name, m in named_ternary(model)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, (parameter, state) in enumerate(optimizer.state.items()):
        owner = owners.get(id(parameter), names.get(id(parameter), f"optimizer.{number}"))
        yield from reach({owner: state}, {})


def _read_header(path: Path, is_state: bool) -> list[_Entry]:
    """The tensors that a safetensors file lists; those of a foreign file with its name."""
    from safetensors import SafetensorError, safe_open

    _check_header_size(path)
    prefix = f"{path.name}:" if is_state and path.name != OPTIMIZER_FILE else ""
    entries = []
    try:
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118, it is no mapping
                part = file.get_slice(name)
                code, shape = part.get_dtype(), tuple(part.get_shape())
                if not name.isprintable():
                    raise UserError(f"{path} is damaged: it names a tensor {name!r}")
                dtype, size = (_SAFETENSORS_INTEGERS | _SAFETENSORS_FLOATS).get(code, (code.lower(), 0))
                is_float = code not in _SAFETENSORS_INTEGERS
                entries.append(
                    _Entry(prefix + name, dtype, shape, math.prod(shape) * size, is_float, is_state)
                )
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from error
    return entries


def _check_header_size(path: Path) -> None:
    """Raise UserError unless the header fits into the file and into 16 MiB, ahead of any allocation."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}; give a checkpoint folder or a .safetensors file")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from error
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise UserError(f"{path} is damaged or cut short: its header does not fit into its {size} bytes")
