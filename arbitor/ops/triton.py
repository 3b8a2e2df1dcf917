"""Functions that several Triton kernels share; imported by the operations' `triton.py` only.

Kernels that must equal the reference bit for bit are launched with `enable_fp_fusion=False`: a fused
multiply-add would round once where the reference rounds twice.
"""

import contextlib
import functools
import importlib
import os
import threading
import uuid
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arbitor.errors import UserError
from arbitor.ops.trust import make_private, why_untrusted

CODE_SCALE = tl.constexpr(126.99)
# Programs that a grid may have along its second and third dimension.
MOST_PROGRAMS = 65535


@triton.jit
def shift_right(x, count: tl.constexpr):
    """Logical shift of int32."""
    return (x.to(tl.uint32, bitcast=True) >> count).to(tl.int32, bitcast=True)


@triton.jit
def random_word(index, key_a, key_b):
    """32 random bits of element `index` (int32) of the stream of two int32 keys; see ops/random_bits."""
    x = index + key_a
    x = (x ^ shift_right(x, 16)) * 0x7FEB352D
    # x ^ key_b and then x ^ (x >> 15), as one operation on three numbers: the key's part is that of all.
    x = x ^ shift_right(x, 15) ^ (key_b ^ shift_right(key_b, 15))
    x = x * -2073254261  # 0x846CA68B
    return x ^ shift_right(x, 16)


@triton.jit
def round_even(x):
    """fp32 rounded to the nearest integer, halves to even, without a library call."""
    magic = tl.where(x < 0, -8388608.0, 8388608.0)  # 2^23: above it every fp32 is an integer
    return tl.where(tl.abs(x) < 8388608.0, (x + magic) - magic, x)


@triton.jit
def exp2_int(exponent):
    """2^exponent as fp32 for int32 exponents in [-126, 127]."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, PTX: tl.constexpr):
    """fp32 within int32 rounded to the nearest integer, halves to even, as int32."""
    if PTX:
        return tl.inline_asm_elementwise(
            "cvt.rni.s32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    return round_even(x).to(tl.int32)


@triton.jit
def fixed_point(value, factor, PTX: tl.constexpr):
    """value * factor as int32, held to +-2^30; see `stochastic_floor` in ops/state_update."""
    return rounded(tl.minimum(tl.maximum(value * factor, -1073741824.0), 1073741824.0), PTX)


@triton.jit
def digit(byte, plane: tl.constexpr):
    """Base-3 digit number `plane` of a packed byte (int32)."""
    return (((byte * 3**plane) & 255) * 3) >> 8


@triton.jit
def part_of_rows(TURNED: tl.constexpr):
    """Places of a program across and down a grid of `grid_of_rows`."""
    if TURNED:
        return tl.program_id(1), tl.program_id(0)
    return tl.program_id(0), tl.program_id(1)


@triton.jit
def is_legal(byte):
    """Whether packing produces a byte (int32). q = ceil(256 v / 243) is 243 q = 256 v + r with r < 243."""
    return ((byte * 243) & 255) < 243


def has_ptx() -> bool:
    """Whether assembly for NVIDIA's GPUs can be run: not in the interpreter, nor on AMD's."""
    return os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None


def has_halves(device: torch.device) -> bool:
    """Whether assembly may also use instructions on pairs of 16 bits, which came with Hopper."""
    return has_ptx() and (device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0))


def shared_memory(device: torch.device) -> int:
    """Bytes that a program may have of a GPU's shared memory."""
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks some of them
    return int(properties.shared_memory_per_block_optin)


def grid_of_rows(across: int, down: int, matrices: int = 1) -> tuple[tuple[int, int, int], bool]:
    """Grid of parts of matrices, neighbours in a row first, and whether it is turned for being too tall."""
    turned = down > MOST_PROGRAMS
    return ((down, across, matrices) if turned else (across, down, matrices)), turned


def cache_folder() -> Path:
    """Where Triton keeps what it compiled, from where it is loaded and executed."""
    return Path(triton.knobs.cache.dir)


def refuse_shared_cache(folder: Path) -> None:
    """Make the cache's folder for this user alone, if there is none.

    Raises:
        UserError: it cannot be made, or others could have put code there that would run as this user.
    """
    try:
        make_private(folder)
    except OSError as error:
        raise UserError(
            f"cannot make {folder}, for compiled kernels: {error.strerror}; set TRITON_CACHE_DIR to a folder "
            "that you may write to"
        ) from error
    if reason := why_untrusted(folder):
        raise UserError(
            f"compiled kernels in {folder} would run as you, but {reason}; set TRITON_CACHE_DIR to a folder "
            "that only you may write to, or take that right from others (chmod go-w) and delete what is in it"
        )


def _make_keys_unique() -> None:
    """Let a kernel have the same key in Triton's cache whichever kernels were launched before it.

    The key holds the constants of the functions that a kernel calls only if those have a key already, from
    another kernel: processes that launch in another order would compile anew what lies in the cache.
    """
    try:
        from triton.runtime.jit import DependenciesFinder

        add = DependenciesFinder._update_hash
    except (ImportError, AttributeError):  # of a version that does it in another way
        return

    def add_with_key(finder: Any, function: Any) -> None:
        function.cache_key  # noqa: B018, which is made now
        add(finder, function)

    DependenciesFinder._update_hash = add_with_key


def _write_launchers_once() -> None:
    """Let no process replace a launcher in Triton's cache that another may be loading.

    Python knows a library it has loaded by the number of its file, read just ahead of loading. If the file is
    replaced in between, its number becomes free for the next launcher, in whose place the first one is found.
    Later versions of Triton have one launcher for all kernels, of another name.
    """
    try:
        from triton.runtime.cache import FileCacheManager

        put = FileCacheManager.put
    except (ImportError, AttributeError):
        return

    @functools.wraps(put)
    def put_once(manager: Any, data: Any, filename: str, *rest: Any, **options: Any) -> str:
        if not filename.startswith("__triton_launcher"):
            return put(manager, data, filename, *rest, **options)
        written = Path(put(manager, data, f"{filename}.{uuid.uuid4()}", *rest, **options))
        path = written.with_name(filename)
        try:
            os.link(written, path)
        except FileExistsError:  # another process was first, or what is there is damaged
            if path.read_bytes() != data:
                os.replace(written, path)
        except OSError:  # a file system without links
            os.replace(written, path)
        written.unlink(missing_ok=True)
        return str(path)

    FileCacheManager.put = put_once


@functools.cache
def hash_compiler() -> threading.Thread | None:
    """Begin what Triton does ahead of a process's first kernel, a hash of its 400 MB of compiler (0.3 s).

    Meanwhile the process makes its model. A kernel that comes sooner waits for it, where Triton would begin
    anew. None where this version of Triton keeps the hash elsewhere.
    """
    try:
        from triton.runtime import cache

        hashed = cache.triton_key
    except (ImportError, AttributeError):
        return None

    def begin() -> None:
        with contextlib.suppress(Exception):  # an experiment, which a first launch looks into
            importlib.import_module("triton.experimental.gluon")
        hashed()

    thread = threading.Thread(target=begin, daemon=True)

    def wait() -> str:
        thread.join()
        return hashed()

    cache.triton_key = wait
    thread.start()
    return thread


def dense_rows(x: Tensor) -> Tensor:
    """x [n, O, I] with every matrix dense in memory; copied where it is not (slices of rows are)."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


if os.environ.get("TRITON_INTERPRET") != "1":  # ahead of the first kernel, all of which import this file
    _make_keys_unique()
    _write_launchers_once()
    refuse_shared_cache(cache_folder())
