"""Memory in which the mistakes of a kernel show.

Inside `guarding`, what torch's functions allocate lies between bands of known bytes, and what has not been
written holds those bytes too: NaN, a packed byte of no trits, integers that are no codes. `check` finds bands
that changed; a tensor without bands must not be written by a kernel at all.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack, to_dlpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BAND = 2048  # bytes on either side, at least
ALIGNMENT = 512  # of a tensor, as CUDA's allocator gives it
# Functions that allocate what is still to be written, and those that allocate what torch has filled.
UNWRITTEN = ((torch, "empty empty_like empty_strided"), (Tensor, "new_empty new_empty_strided"))
FILLED = (
    (torch, "zeros zeros_like ones ones_like full full_like stack cat"),
    (Tensor, "new_zeros new_ones new_full clone contiguous to"),
)

_empty, _clone = torch.empty, Tensor.clone
_active: list["Guards"] = []


def filling(dtype: torch.dtype) -> int:
    """The byte of bands and of unwritten memory: of NaN, of no trits, of an integer below every code."""
    return 0xFF if dtype.is_floating_point else 0x01 if dtype == torch.uint8 else 0x80


class Guards:
    """The bands around all tensors that were made while it was in force."""

    def __init__(self) -> None:
        self._bands: list[tuple[Tensor, int, int, int, str]] = []
        self._own: set[int] = set()

    def around(self, tensor: Tensor, *, written: bool = True, by: str = "the test") -> Tensor:
        """A tensor as this one in all but its place, which is between bands; `written`: with its contents."""
        if type(tensor) is not Tensor or tensor.device.type == "meta" or not tensor.numel():
            return tensor  # of a trace, or nothing
        if tensor.layout != torch.strided or tensor.grad_fn is not None:
            raise NotImplementedError(f"no bands for {tensor.layout} or for results of autograd")
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size, byte = tensor.element_size(), filling(tensor.dtype)
        buffer = _empty(2 * BAND + ALIGNMENT + span * size, dtype=torch.uint8, device=tensor.device)
        buffer.fill_(byte)
        first = BAND + -(buffer.data_ptr() + BAND) % ALIGNMENT
        end = first + span * size
        # With a storage of its own, as a tensor has that is no part of another.
        flat = from_dlpack(to_dlpack(buffer[first:end].view(tensor.dtype)))
        if written:
            flat.copy_(tensor.detach().as_strided((span,), (1,)))
        self._bands.append((buffer, byte, first, end, f"{described(tensor)} of {by}"))
        self._own.add(flat.data_ptr())
        inner = _empty(0, dtype=tensor.dtype, device=tensor.device)
        inner.set_(flat.untyped_storage(), 0, tensor.shape, tensor.stride())
        return inner.requires_grad_(tensor.requires_grad)

    def check(self) -> None:
        """Refuse what a kernel has written outside of tensors."""
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        for buffer, byte, first, end, name in self._bands:
            for where, band in (("in front of", buffer[:first]), ("behind", buffer[end:])):
                changed = (band != byte).nonzero()
                assert not len(changed), f"a kernel wrote {len(changed)} bytes {where} {name}"

    def allocating(self, make: Callable[..., Tensor], written: bool) -> Callable[..., Tensor]:
        """`make`, with bands around what it gives."""

        @functools.wraps(make)
        def made(*given: Any, **options: Any) -> Tensor:
            if options.get("out") is not None or options.get("pin_memory"):
                raise NotImplementedError(f"no bands for {make.__name__} with out or pin_memory")
            tensor = make(*given, **options)
            if tensor.grad_fn is not None or (given and tensor is given[0]):
                return tensor  # of autograd, which no kernel writes; or nothing was allocated
            caller = sys._getframe(1)
            by = f"{caller.f_code.co_filename}:{caller.f_lineno}"
            return self.around(tensor, written=written, by=by)

        return made

    def launching(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """`run` of a kernel, which may write nothing that has no bands."""

        @functools.wraps(run)
        def ran(kernel: Any, *given: Any, **options: Any) -> Any:
            others = [(t, _clone(t)) for t in tensors((*given, *options.values())) if not self.has(t)]
            result = run(kernel, *given, **options)
            for tensor, before in others:
                same = torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (tensor, before)))
                assert same, f"{kernel.__name__} writes {described(tensor)} that has no guard bands"
            return result

        return ran

    def has(self, tensor: Tensor) -> bool:
        """Whether bands are around a tensor, or around what it is a part of."""
        return tensor.numel() == 0 or tensor.untyped_storage().data_ptr() in self._own


def described(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def tensors(given: Iterable[Any]) -> Iterator[Tensor]:
    """Those among a kernel's arguments, also in descriptors."""
    for argument in given:
        argument = getattr(argument, "base", argument)
        if isinstance(argument, Tensor):
            yield argument.detach()


@contextmanager
def guarding() -> Iterator[Guards]:
    """Bands around all that is allocated inside, checked at the end."""
    guards = Guards()
    with pytest.MonkeyPatch.context() as patch:
        for written, functions in ((False, UNWRITTEN), (True, FILLED)):
            for owner, names in functions:
                for name in names.split():
                    patch.setattr(owner, name, guards.allocating(getattr(owner, name), written))
        for kernels in kinds_of_kernels():
            patch.setattr(kernels, "run", guards.launching(kernels.run))
        _active.append(guards)
        try:
            yield guards
        finally:
            _active.remove(guards)
    guards.check()


def kinds_of_kernels() -> tuple[type, ...]:
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:  # where there is no Triton, no kernels are launched
        return ()
    return InterpretedFunction, JITFunction


def moved(*given: Tensor) -> list[Tensor]:
    """Copies on the device under test, between bands."""
    return [_active[-1].around(tensor.to(DEVICE)) for tensor in given]
