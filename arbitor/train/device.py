"""Where a run computes, and the settings under which it computes the same each time."""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils import deterministic as torch_deterministic

from arbitor.errors import UserError
from arbitor.ops.backend import (
    VARIABLE,
    has_bf16_products,
    has_triton,
    requested_backend,
    rounded_gradients,
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True, slots=True)
class Device:
    """A device and why it was chosen.

    Attributes:
        device: for torch.
        name: the GPU's name, or `cpu`.
        reason: one line for people.
    """

    device: torch.device
    name: str
    reason: str

    @property
    def is_cuda(self) -> bool:
        """Whether it is a CUDA GPU."""
        return self.device.type == "cuda"

    def memory(self) -> int:
        """Bytes: on a GPU the peak that torch allocated, on the CPU what the process holds now."""
        return torch.cuda.max_memory_allocated(self.device) if self.is_cuda else process_memory()

    def total_memory(self) -> int:
        """Bytes that there are: of the GPU, or of the machine."""
        if self.is_cuda:
            return torch.cuda.get_device_properties(self.device).total_memory
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def synchronize(self) -> None:
        """Wait for what was queued."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)


def resolve_device(name: str) -> Device:
    """The device that `auto`, `cpu` or `cuda` means on this machine.

    Raises:
        UserError: `cuda` without a usable GPU, an unknown name, a back end that there is not, or compiled
            kernels where others could write.
    """
    requested_backend()
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"unknown device {name!r}; choose auto, cpu or cuda")
    device = _found(name)
    backend(device.device)  # or else it says why not
    return device


def _found(name: str) -> Device:
    if name == "cpu":
        return Device(torch.device("cpu"), "cpu", "asked for")
    why_not = _why_no_cuda()
    if why_not is None:
        _begin_with_kernels()  # beside what making a CUDA context takes
        gpu = torch.device("cuda", torch.cuda.current_device())
        return Device(
            gpu, torch.cuda.get_device_name(gpu), "asked for" if name == "cuda" else "a GPU is present"
        )
    if name == "cuda":
        raise UserError(f"--device cuda: {why_not}; use --device cpu, or install a torch build for your GPU")
    return Device(torch.device("cpu"), "cpu", why_not)


def backend(device: torch.device) -> str:
    """The implementation of the ternary operations that runs on `device`, and why.

    Raises:
        UserError: `ARB_TERNARY_BACKEND` asks for one that there is not.
    """
    requested = requested_backend()
    if requested == "torch":
        return f"torch: the reference operations, asked for by {VARIABLE}"
    on_gpu = device.type == "cuda"
    if requested == "triton":
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise UserError(f"{VARIABLE} is 'triton', which needs a CUDA GPU; use auto or torch")
        return f"triton: kernels around torch's matrix products, asked for by {VARIABLE}"
    if not on_gpu:
        return "torch: the reference operations, as there is no GPU"
    if not has_triton():
        return "torch: the reference operations, since Triton is not installed"
    return "triton: kernels around torch's matrix products"


def _begin_with_kernels() -> None:
    """Refuse compiled kernels of others now, and not when the first one is launched."""
    if uses_kernels():
        from arbitor.ops.triton import cache_folder, hash_compiler, refuse_shared_cache

        refuse_shared_cache(cache_folder())
        hash_compiler()


def uses_kernels() -> bool:
    """Whether Triton's kernels run where there is a GPU."""
    return requested_backend() != "torch" and has_triton()


def _why_no_cuda() -> str | None:
    """None if a CUDA GPU can be used, else the reason."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) was built without CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    return None


def process_memory() -> int:
    """Resident bytes of this process (where the system does not tell the present value, the peak)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory(Device(torch.device("cpu"), "cpu", ""))


def peak_memory(device: Device) -> int:
    """Bytes at the peak: what torch allocated on a GPU, what the process held on the CPU."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gradient_products(device: torch.device) -> str:
    """The dtype of products of gradients in training there: fp32 on a CPU without instructions for bf16."""
    return "bf16" if device.type == "cuda" or has_bf16_products() else "fp32"


@contextlib.contextmanager
def deterministic(seed: int, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms and a seeded global generator inside; the former settings afterwards.

    On a CPU with instructions for it, products of gradients are of bf16, as on a GPU. Whole runs are then
    equal bit for bit on one device type, `gradient_products`, version and thread count.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
    # `use_deterministic_algorithms` sets the same flag, and imports torch's compiler, which takes a second.
    former_mode = torch.get_deterministic_debug_mode()
    filled = torch_deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_deterministic_debug_mode("error")
    # Nothing here reads memory that it did not write, and filling each new tensor costs a pass over it.
    torch_deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        with (
            rounded_gradients(has_bf16_products()),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_deterministic_debug_mode(former_mode)
        torch_deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def keep_freed_memory() -> bool:
    """Let this process keep the memory of freed tensors for the next ones.

    glibc gives blocks of megabytes back to the system again and again, which then has to find and clear each
    page of the next tensor: of `tiny` 10,000 pages a step.

    Returns:
        Whether it will; where the C library is another, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = (_M_MMAP_THRESHOLD, 32 << 20), (_M_TRIM_THRESHOLD, (1 << 31) - 1)
    return all(mallopt(option, value) == 1 for option, value in settings)


def resumed_threads(before: int) -> int:
    """CPU threads of a run that goes on: as many as before, unless `OMP_NUM_THREADS` says otherwise."""
    return torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else before


@contextlib.contextmanager
def thread_count(count: int) -> Iterator[None]:
    """Compute on `count` CPU threads inside; sums depend on it in their last bits."""
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)
