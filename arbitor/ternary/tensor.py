"""TernaryScaleTensor: a weight matrix as packed trits and scale exponents."""

import enum
import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.ops.state_update import MAX_SCALE_EXPONENT, MIN_SCALE_EXPONENT
from arbitor.ops.trit_codec import (
    legal_bytes,
    packed_width,
    ternary_decode,
    trit_pack,
    trit_unpack,
)
from arbitor.ternary.capture import Capture

if TYPE_CHECKING:
    from arbitor.ternary.optimizer import VoteOptimizer

INIT_CLAMP = 1.49  # trits; keeps round(u) in -1..1
INIT_WEIGHTS_AT_ONCE = 1 << 22
INIT_TRIT_STD = 0.786  # of round(u) for u ~ N(0, 1) clamped
RESIDUAL_UNITS = 128  # units of `T_residual` in a trit


def draw_trits(shape: tuple[int, ...] | torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """T = round(u) and what rounding left over, for u ~ N(0, 1) clamped to +-1.49.

    u is looked up from 16 random bits of torch's generator, as the middle of one of 65,536 equally likely
    intervals: on a CPU, drawing normal numbers would take five times as long.

    Returns:
        T and round((u - T) * 128), int8 of `shape`.
    """
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=device).random_(-(1 << 63), None)
    index = words.view(torch.int16)[:count].to(torch.int32) + (1 << 15)
    trits, residuals = (table.index_select(0, index).view(shape) for table in _normal_tables(device))
    return trits, residuals


@cache
def _normal_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Trit and residual of each interval, int8 [65536]."""
    probability = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    u = torch.special.ndtri(probability).clamp_(-INIT_CLAMP, INIT_CLAMP)
    residual = (u - u.round()).mul_(RESIDUAL_UNITS).round_()
    return u.round().to(device, torch.int8), residual.to(device, torch.int8)


class TScaleType(enum.Enum):
    """How many neighbouring weights along `in` share one scale exponent; ROW is the whole row."""

    T4 = 4
    T6 = 6
    T8 = 8
    T16 = 16
    T32 = 32
    T64 = 64
    T96 = 96
    ROW = 0

    @classmethod
    def of(cls, value: "TScaleType | str") -> "TScaleType":
        """Accept the member or its name."""
        if isinstance(value, cls):
            return value
        try:
            return cls[str(value)]
        except KeyError:
            raise UserError(
                f"unknown scale type {value!r}; choose one of {', '.join(cls.__members__)}"
            ) from None

    def group(self, in_features: int) -> int:
        """Elements that share an exponent in a row of `in_features`."""
        return self.value or in_features


class IntegerModule(nn.Module):
    """A module whose weights are integer parameters and whose gradient an optimizer may capture.

    Attributes:
        capture: where backward leaves the gradient; None without an optimizer.
    """

    capture: Capture | None = None

    @property
    def optimizer(self) -> "VoteOptimizer | None":
        """The optimizer that is attached."""
        reference = None if self.capture is None else self.capture.optimizer
        return None if reference is None else reference()

    @property
    def stored(self) -> nn.Parameter:
        """The integer parameter that training changes; optimizer state is kept under it."""
        raise NotImplementedError

    def numel(self) -> int:
        """Logical weights, padding not counted."""
        raise NotImplementedError

    def check(self, name: str = "") -> None:
        """Raise UserError naming the tensor if a stored value is not legal.

        Args:
            name: of the module, for the message.
        """
        for key, parameter in self.named_parameters(recurse=False):
            if parameter.device.type != "meta":
                self._check_values(key, parameter, f"{name}.{key}" if name else key)

    def _check_values(self, key: str, values: Tensor, where: str) -> None:
        """Raise UserError if `values` are not legal as the parameter `key`; `where` names them."""
        raise NotImplementedError

    def _check_given(self, key: str, given: Tensor, where: str) -> None:
        """Raise UserError if `given` cannot become the parameter `key`: dtype, shape, values."""
        own: Tensor = getattr(self, key)
        if given.dtype != own.dtype:
            # Copying would round floats to integers without a word.
            raise UserError(f"{where} is {given.dtype}, expected {own.dtype}")
        if given.shape != own.shape:
            raise UserError(f"{where} has the shape {tuple(given.shape)}, expected {tuple(own.shape)}")
        if given.device.type != "meta":
            on_own_device = given if own.device.type == "meta" else given.to(own.device)
            self._check_values(key, on_own_device, where)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Everything given is checked before anything is copied; with `assign=True` the optimizer follows."""
        metadata, error_msgs = args[0], args[-1]
        optimizer, before = self.optimizer, self.stored
        try:
            for key, _ in self.named_parameters(recurse=False):
                given = state_dict.get(prefix + key)
                if isinstance(given, Tensor):
                    self._check_given(key, given, prefix + key)
            if optimizer is not None and metadata.get("assign_to_params_buffers", False):
                optimizer.refuse_tied(self)
        except UserError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if optimizer is not None and self.stored is not before:
            optimizer.follow(self, before)

    def _replicate_for_data_parallel(self) -> Any:
        """Refused while an optimizer is attached: replicas would not leave their gradients to it."""
        if self.capture is not None:
            raise UserError(
                "DataParallel cannot train integer layers, since its copies of them lose their gradients; "
                "use one device"
            )
        return super()._replicate_for_data_parallel()


class TernaryScaleTensor(IntegerModule):
    """Matrix W[out, in] = T[out, in] * 2^E[out, in // group], T in {-1, 0, +1} packed five to a byte.

    Attributes:
        T_packed: uint8 parameter [*leading, out, 32 * ceil(in / 160)].
        E: int8 parameter [*leading, out, ceil(in / group)], legal -62...31.
        T_residual: what rounding left over when the trits were drawn, int8 [*leading, out, in] in 1/128 trit,
            not saved; the start of an optimizer's accumulators. None once taken or after loading.
    """

    T_packed: nn.Parameter
    E: nn.Parameter
    T_residual: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tscale: TScaleType | str = TScaleType.ROW,
        leading_shape: tuple[int, ...] = (),
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise UserError(f"a ternary matrix needs positive sizes, not {out_features} x {in_features}")
        self.in_features = in_features
        self.out_features = out_features
        self.leading_shape = tuple(leading_shape)
        self.tscale = TScaleType.of(tscale)
        self.group = self.tscale.group(in_features)
        rows = (*self.leading_shape, out_features)
        packed = torch.empty((*rows, packed_width(in_features)), dtype=torch.uint8, device=device)
        exponent = torch.empty((*rows, -(-in_features // self.group)), dtype=torch.int8, device=device)
        self.T_packed = nn.Parameter(packed, requires_grad=False)
        self.E = nn.Parameter(exponent, requires_grad=False)
        self.register_buffer("T_residual", None, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw u ~ N(0, 1), T = round(u), and set E so that W has a standard deviation near in^-1/2.

        Some rows at a time go straight into packed form, so that beside what is kept only little is alive.
        """
        device = self.T_packed.device
        if device.type == "meta":
            return
        packed = self.T_packed.data.flatten(0, -2)
        residual = torch.empty((len(packed), self.in_features), dtype=torch.int8, device=device)
        rows = max(1, INIT_WEIGHTS_AT_ONCE // self.in_features)
        for first in range(0, len(packed), rows):
            part = residual[first : first + rows]
            trits, part[:] = draw_trits(part.shape, device)
            packed[first : first + rows] = trit_pack(trits)
        self.T_residual = residual.view(*self.leading_shape, self.out_features, self.in_features)
        self.E.fill_(round(math.log2(self.in_features**-0.5 / INIT_TRIT_STD)))

    @property
    def stored(self) -> nn.Parameter:
        """T_packed."""
        return self.T_packed

    def numel(self) -> int:
        """Logical weights, padding not counted."""
        return math.prod(self.leading_shape) * self.out_features * self.in_features

    def trits(self) -> Tensor:
        """int8 [*leading, out, in], checked."""
        self.check()
        return trit_unpack(self.T_packed, self.in_features)

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights as fp64, fp32 or bf16 (int8: the trits), [*leading, out, in], checked first.

        Raises:
            UserError: a byte or an exponent that is not legal.
        """
        self.check()
        return ternary_decode(self.T_packed, self.E, self.in_features, self.group, dtype)

    def update_E(self) -> int:
        """Apply the whole steps that wait in the attached optimizer's scale accumulator.

        Returns:
            How many exponents moved; 0 without an optimizer.
        """
        return 0 if self.optimizer is None else self.optimizer.apply_scale_steps(self)

    def set_trits(self, trits: Tensor, exponent: Tensor) -> None:
        """Replace trits (int8 [*leading, out, in]) and exponents (int8, shape of E).

        Raises:
            UserError: a dtype, shape or value that is not allowed; nothing has changed.
        """
        if trits.dtype != torch.int8 or not bool(((trits >= -1) & (trits <= 1)).all()):
            raise UserError("trits must be int8 with values -1, 0 and +1")
        shape = (*self.leading_shape, self.out_features, self.in_features)
        if trits.shape != shape:
            raise UserError(f"trits have the shape {tuple(trits.shape)}, expected {shape}")
        self._check_given("E", exponent, "E")
        with torch.no_grad():
            self.T_packed.copy_(trit_pack(trits))
            self.E.copy_(exponent)
        self.T_residual = None

    def _check_values(self, key: str, values: Tensor, where: str) -> None:
        """Illegal bytes, padding trits and exponents."""
        if key == "E":
            check_exponents(values, where)
        elif key == "T_packed":
            legal = legal_bytes(values.device)[values.to(torch.int32)]
            if not bool(legal.all()):
                bad = int(values[~legal][0])
                raise UserError(f"{where} holds byte {bad}, which is no packed trits: the data is damaged")
            padded = trit_unpack(values, values.shape[-1] * 5)[..., self.in_features :]
            if bool(padded.any()):
                raise UserError(f"{where} has trits in its padding: the data is damaged")

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        error_msgs: list[str] = args[-1]
        errors = len(error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "T_packed" in state_dict and len(error_msgs) == errors:
            self.T_residual = None

    def extra_repr(self) -> str:
        """Sizes and scale type."""
        return f"in={self.in_features}, out={self.out_features}, tscale={self.tscale.name}"


def check_exponents(exponents: Tensor, where: str) -> None:
    """Raise UserError, naming them as `where`, if one of these scale exponents (int8) is out of range."""
    if bool(((exponents < MIN_SCALE_EXPONENT) | (exponents > MAX_SCALE_EXPONENT)).any()):
        raise UserError(
            f"{where} holds an exponent outside {MIN_SCALE_EXPONENT}...{MAX_SCALE_EXPONENT}: "
            "the data is damaged"
        )


def named_ternary(model: nn.Module) -> Iterator[tuple[str, IntegerModule]]:
    """Names and modules of everything in `model` whose weights are integers, in order of registration."""
    for name, module in model.named_modules():
        if isinstance(module, IntegerModule):
            yield name, module
