"""Sizes up to which one kernel is taken and beyond which another: defaults, or measured on this GPU.

The kernels on the two sides of a threshold give equal bits, so that a table changes how long a step takes and
nothing else; a threshold for which that does not hold would have to be kept with a run. A table is measured
when somebody asks for it (`arbitor doctor --measure`, `arbitor smoke --warmup`), and read once a process.

Tables lie in one JSON file, one for each GPU, version of the kernels, of Triton and of torch: ARB_THRESHOLDS
names the file, else it is `arbitor/thresholds.json` in `$XDG_CACHE_HOME` or `~/.cache`.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arbitor.cache import cache_folder
from arbitor.errors import UserError
from arbitor.ops.precompile import compiled_ahead
from arbitor.ops.trust import make_private, why_untrusted

VARIABLE = "ARB_THRESHOLDS"
FORMAT = 1
MAX_FILE_BYTES = 1 << 20

DEFAULTS: Mapping[str, int] = {
    # Tokens up to which a linear with one exponent a row multiplies packed trits, in place of decoded ones.
    "few_tokens": 8,  # of an H100
    # Rows of an expert, on average, up to which its linear does; counted, not measured.
    "few_expert_rows": 16,
}

_CALLS = 16  # in a recorded graph, each on a matrix of its own, so that weights come from memory
_ROUNDS = 7

_forced: dict[str, int] = {}


@dataclass(frozen=True, slots=True)
class Table:
    """The thresholds that hold for a device, and where they come from.

    Attributes:
        values: by the names of `DEFAULTS`.
        source: the file, and when it was measured; empty for defaults.
        problem: why a file that is there was not used; empty if it was, or there is none.
    """

    values: Mapping[str, int]
    source: str = ""
    problem: str = ""


def threshold(name: str, device: torch.device) -> int:
    """The largest size for which the first of two kernels is taken.

    Args:
        name: one of `DEFAULTS`.
        device: where the kernel runs; anything but a GPU has the defaults.
    """
    if name in _forced:
        return _forced[name]
    return table(device).values[name] if device.type == "cuda" else DEFAULTS[name]


@functools.cache
def table(device: torch.device) -> Table:
    """The table of a GPU, read once a process; with a warning where a file cannot be used."""
    found = read(path(), identity(device))
    if found.problem:
        warnings.warn(f"thresholds between kernels are the defaults: {found.problem}", stacklevel=2)
    return found


def path() -> Path:
    """The file of the tables."""
    if given := os.environ.get(VARIABLE):
        return Path(given).expanduser()
    return cache_folder() / "thresholds.json"


@functools.cache
def identity(device: torch.device) -> str:
    """What a table holds for: the GPU and everything that makes kernels faster or slower."""
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{name}, {major}.{minor}, kernels {_kernels()}, triton {_triton()}, torch {torch.__version__}"


def read(file: Path, key: str) -> Table:
    """The table for `key`; the defaults where there is none, or where the file cannot be trusted or read."""
    try:
        if not file.exists():
            return Table(DEFAULTS)
        if not file.is_file():
            raise ValueError("it is no file")
        if reason := why_untrusted(file):
            return Table(DEFAULTS, problem=f"{file} is not used: {reason}")
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("it is too large")
        entry = _tables(json.loads(file.read_text(encoding="utf-8"))).get(key)
        if entry is None:
            return Table(DEFAULTS)
        return Table({**DEFAULTS, **_checked(entry)}, source=f"{file}, measured {entry['date']}")
    except OSError as error:
        return Table(DEFAULTS, problem=f"{file} cannot be read ({error.strerror})")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        return Table(DEFAULTS, problem=f"{file} is damaged ({str(error).splitlines()[0]}); delete it")


def write(file: Path, key: str, values: Mapping[str, int]) -> None:
    """Put a table beside those of other GPUs and versions; whoever reads meanwhile reads the former file.

    Raises:
        UserError: the file cannot be written, or others could write to where it lies.
    """
    try:
        make_private(file.parent)
        if reason := why_untrusted(file):
            raise UserError(
                f"{file} would not be trusted: {reason}; set {VARIABLE} to a file of your own in a folder "
                "that only you may write to"
            )
        try:
            tables = _tables(json.loads(file.read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            tables = {}  # what is damaged is of no use to anybody
        tables[key] = {"date": datetime.date.today().isoformat(), "values": dict(values)}
        descriptor, partial = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with open(descriptor, "w", encoding="utf-8") as stream:
                json.dump({"format": FORMAT, "tables": tables}, stream, indent=1, sort_keys=True)
            os.replace(partial, file)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise UserError(
            f"cannot write {file}: {error.strerror}; set {VARIABLE} to a file in a folder of your own"
        ) from error
    table.cache_clear()


@contextlib.contextmanager
def forced(**values: int) -> Iterator[None]:
    """Inside, these thresholds hold, whatever the table says."""
    before = dict(_forced)
    _forced.update(values)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def few_tokens(tokens: int, device: torch.device) -> Callable[[], None]:
    """Work for `few_tokens`: products of so many tokens and 4096 x 4096 matrices."""
    return _linears(tokens, 4096, 4096, device)


def few_expert_rows(rows: int, device: torch.device) -> Callable[[], None]:
    """Work for `few_expert_rows`: products of so many rows with each of 8 experts of 2048 x 2048."""
    return _experts(rows, 8, 2048, 2048, device)


# Name, sizes to try in ascending order, and what makes work of a size. Work is timed with the threshold at
# the size and below it, so it must call what the threshold decides on.
Contest = tuple[str, Sequence[int], Callable[[int, torch.device], Callable[[], None]]]
CONTESTS: Sequence[Contest] = (
    ("few_tokens", (1, 4, 8, 16, 32, 64, 128, 256, 512), few_tokens),
    ("few_expert_rows", (16, 32, 64, 128, 256), few_expert_rows),  # fewer are few in any case
)


def measure(
    device: torch.device,
    contests: Sequence[Contest] = CONTESTS,
    seconds: Callable[[Callable[[], None], torch.device], float] | None = None,
) -> dict[str, int]:
    """Thresholds of a GPU by the clock, in seconds: the largest size up to which the first kernel is faster.

    Args:
        device: a GPU.
        contests: what to measure.
        seconds: times one call of some work; None replays it in a CUDA graph.

    Returns:
        A threshold for each contest: 0 if the second kernel is the faster one even for the smallest size.
    """
    if seconds is None:
        _compile(contests, device)
        seconds = _seconds
    values = {}
    for name, sizes, make in contests:
        value = 0
        for size in sizes:
            work = make(size, device)
            with forced(**{name: size}):
                first = seconds(work, device)
            with forced(**{name: size - 1}):
                second = seconds(work, device)
            if first > second:
                break
            value = size
        values[name] = value
    return values


def _compile(contests: Sequence[Contest], device: torch.device) -> None:
    """Compile at once what the contests launch."""
    with compiled_ahead(device):
        for name, sizes, make in contests:
            for size in sizes:
                work = make(size, device)
                for value in (size, size - 1):
                    with forced(**{name: value}):
                        work()


def _linears(tokens: int, rows: int, columns: int, device: torch.device) -> Callable[[], None]:
    """Products with one matrix after the other, so many that they do not all stay in the GPU's cache."""
    from arbitor.ops.ternary_linear import triton
    from arbitor.ops.trit_codec import trit_pack

    codes, scale = _tokens(tokens, columns, device)
    exponent = torch.zeros((rows, 1), dtype=torch.int8, device=device)
    first = trit_pack(torch.randint(-1, 2, (rows, columns), dtype=torch.int8, device=device))
    matrices = [first.clone() for _ in range(_CALLS)]

    def work() -> None:
        for packed in matrices:
            triton.product(codes, scale, packed, exponent, columns, torch.bfloat16)

    return work


def _experts(
    rows_each: int, experts: int, rows: int, columns: int, device: torch.device
) -> Callable[[], None]:
    """The same with the matrices of experts that all have as many rows."""
    from arbitor.ops.expert_linear import triton
    from arbitor.ops.trit_codec import trit_pack

    codes, scale = _tokens(rows_each * experts, columns, device)
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=device) * rows_each
    exponent = torch.zeros((experts, rows, 1), dtype=torch.int8, device=device)
    first = trit_pack(torch.randint(-1, 2, (experts, rows, columns), dtype=torch.int8, device=device))
    matrices = [first.clone() for _ in range(_CALLS)]

    def work() -> None:
        for packed in matrices:
            triton.product(codes, scale, offsets, packed, exponent, columns, torch.bfloat16)

    return work


def _tokens(count: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of tokens, and their scale."""
    codes = torch.randint(-127, 128, (count, columns), dtype=torch.int8, device=device)
    return codes, torch.ones((count, 1), device=device)


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The quickest of some replays."""
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        work()  # compiles
        torch.cuda.synchronize(device)
        with torch.cuda.graph(graph, stream=stream):
            work()
        taken = []
        for _ in range(_ROUNDS):
            began = time.perf_counter()
            graph.replay()
            torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - began)
    return min(taken)


def _tables(document: Any) -> dict[str, Any]:
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}, not {FORMAT}")
    return _mapping(document["tables"])


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("it is no table")
    return value


def _checked(entry: Mapping[str, Any]) -> dict[str, int]:
    """The values of an entry that there are thresholds for; ValueError if one is no size."""
    datetime.date.fromisoformat(entry["date"])
    values = {name: value for name, value in _mapping(entry["values"]).items() if name in DEFAULTS}
    for name, value in values.items():
        if type(value) is not int or not 0 <= value < 1 << 31:
            raise ValueError(f"its {name} is {value!r}, which is no size")
    return values


def _kernels() -> str:
    """Changes with every change of an operation."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def _triton() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "missing"
