"""Kernels are compiled ahead, each once; and no batch or context needs one that a warm-up did not compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arbitor.ops import compilers

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

AHEAD = """
import os, threading
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
from triton import knobs
from triton.runtime import driver, jit
from testing.ops.compile_kernels import Target
from arbitor.ops.precompile import compiled_ahead
from arbitor.ops.random_bits import triton as random_bits
from arbitor.ops.trit_codec import triton as codec
driver.set_active(Target())
before = jit.JITFunction.run, torch.empty, torch.empty_like, knobs.compilation.listener
packed, exponent = torch.full((4, 32), 128, dtype=torch.uint8), torch.zeros((4, 1), dtype=torch.int8)
step, tensors = torch.zeros((), dtype=torch.int32), torch.arange(3, dtype=torch.int32)
with compiled_ahead(torch.device("cpu"), threads=2) as report:
    for rows in (1, 4):
        weights = codec.decode(packed[:rows], exponent[:rows], 160, 160, torch.float32)
    keys = random_bits.step_keys(7, step, tensors)
assert not weights.any() and not keys.any()
assert before == (jit.JITFunction.run, torch.empty, torch.empty_like, knobs.compilation.listener)
assert report.seconds > 0 and threading.active_count() == 1
print(report.kernels, report.new, report.threads, report.processes)
try:
    with compiled_ahead(torch.device("cpu"), threads=2):
        codec._decode_kernel[(1,)](packed, exponent, weights, 4, 160, 32, 160, 1, BYTES=1000)
except triton.CompilationError:
    print("refused")
assert before == (jit.JITFunction.run, torch.empty, torch.empty_like, knobs.compilation.listener)
"""

# What the scripts below begin with.
FORKED = """
import contextlib, os, signal, subprocess, sys, threading, time
from pathlib import Path
os.environ["TRITON_INTERPRET"] = "0"
import torch, triton
from triton.runtime import driver
from testing.ops.compile_kernels import Target
from arbitor.ops.compilers import Compilers
from arbitor.ops.precompile import compiled_ahead
from arbitor.ops.int8_matmul import triton as int8_matmul
from arbitor.ops.state_update import triton as state_update
from arbitor.ops.trit_codec import triton as codec
processes = Compilers(2)
driver.set_active(Target())
packed, exponent = torch.full((4, 32), 128, dtype=torch.uint8), torch.zeros((4, 1), dtype=torch.int8)

def work():
    codec.decode(packed, exponent, 160, 160, torch.float32)
    codec.decode_rows(packed, exponent, 160)
    weight = torch.zeros((256, 128), dtype=torch.int8)
    for tokens in (16, 2048):  # one kernel takes descriptors of memory
        codes = torch.zeros((tokens, 128), dtype=torch.int8)
        int8_matmul.int8_matmul(codes, weight, codes[:, :1].float(), weight[:, 0].float(), torch.bfloat16)
    state_update.update(  # whose rule is assembly that comes as a constant
        packed[None], torch.zeros((1, 4, 160), dtype=torch.int8), torch.zeros((1, 4, 160)),
        torch.zeros((1, 2), dtype=torch.int32), torch.ones((1, 1, 1), dtype=torch.bool), torch.ones(()),
        128, 80, 64, False,
    )

def group(leader=processes._leader):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            state, _, pgid = stat.read_text().rpartition(")")[2].split()[:3]
            if int(pgid) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found

def is_empty():
    deadline = time.monotonic() + 20
    while group() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group()
"""

PROCESSES = """
with compiled_ahead(torch.device("cpu"), processes=processes) as report:
    work()
print(report.kernels, report.new, report.by_processes, report.processes, len(group()))
kernels = codec._decode_rows_kernel, int8_matmul._persistent_kernel
print(sorted(kernel.compile.__name__ for kernel in kernels))  # as it was
processes.end()
assert is_empty() and processes.ended
processes.end()
"""

REFUSED = """
try:
    with compiled_ahead(torch.device("cpu"), processes=processes):
        work()
        weights = torch.zeros((4, 160))
        codec._decode_kernel[(1,)](packed, exponent, weights, 4, 160, 32, 160, 1, BYTES=1000)
except triton.CompilationError as error:
    print("1000" in str(error) or "power of 2" in str(error))
assert is_empty() and threading.active_count() == 1
"""

KILLED = """
with compiled_ahead(torch.device("cpu"), processes=processes) as report:
    while len(group()) < 3:
        time.sleep(0.01)
    for pid in group():
        if WHICH == "all" or pid != processes._leader:
            os.kill(pid, signal.SIGKILL)
    work()
print(report.kernels, report.new, report.by_processes)
processes.end()
assert is_empty()
"""

INTERRUPTED = """
began = time.monotonic()
try:
    with compiled_ahead(torch.device("cpu"), processes=processes) as report:
        work()
        while len(group()) < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
assert is_empty() and threading.active_count() == 1
assert time.monotonic() - began < 30
"""

GONE = """
if sys.argv[1] == "child":
    processes.start(Target().get_current_target())
    while len(group()) < 3:
        time.sleep(0.01)
    print(processes._leader, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
processes.end()
assert is_empty()
child = subprocess.run([sys.executable, "-c", CODE, "child"], capture_output=True, text=True)
assert child.returncode == -signal.SIGKILL, child.stderr
leader = int(child.stdout)
group.__defaults__ = (leader,)
assert is_empty()
"""

KEYS = """
import importlib, os, sys
os.environ["TRITON_INTERPRET"] = "0"
from pathlib import Path
from triton.runtime.jit import JITFunction
import arbitor.ops
kernels = {}
for source in sorted(Path(arbitor.ops.__file__).parent.glob("*/triton.py")):
    module = importlib.import_module(f"arbitor.ops.{source.parent.name}.triton")
    for name, value in vars(module).items():
        if isinstance(value, JITFunction):
            kernels[f"{value.fn.__module__}.{name}"] = value
order = sorted(kernels, reverse=sys.argv[1] == "backwards")
keys = {name: kernels[name].cache_key for name in order}
for name in sorted(keys):
    print(name, keys[name])
"""

HASH = """
import os
os.environ["TRITON_INTERPRET"] = "0"
from triton.runtime.cache import triton_key
from arbitor.ops.triton import hash_compiler
from triton.runtime import cache
thread = hash_compiler()
assert hash_compiler() is thread
assert cache.triton_key() == triton_key()
info = triton_key.cache_info()
print(info.misses, not thread.is_alive())
"""


def run(command, repository, cache):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=repository,
        env={**os.environ, "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_each_kernel_is_compiled_once_and_found_in_the_cache_later(repository, tmp_path):
    assert run(["-c", AHEAD], repository, tmp_path) == ["2 2 2 0", "refused"]
    assert run(["-c", AHEAD], repository, tmp_path) == ["2 0 2 0", "refused"]


def test_the_key_of_a_kernel_does_not_depend_on_those_before_it(repository, tmp_path):
    forwards, backwards = (run(["-c", KEYS, way], repository, tmp_path) for way in ("forwards", "backwards"))
    assert len(forwards) > 60
    assert forwards == backwards


def test_processes_find_the_keys_under_which_this_one_looks(repository, tmp_path):
    # `new` counts what any of them compiled: another key would be compiled here once more.
    names = "['compile', 'compile']"
    assert run(["-c", FORKED + PROCESSES], repository, tmp_path) == ["5 5 5 2 3", names]
    assert run(["-c", FORKED + PROCESSES], repository, tmp_path) == ["5 0 5 2 3", names]


def test_what_processes_cannot_compile_is_said_by_triton_and_ends_them(repository, tmp_path):
    assert run(["-c", FORKED + REFUSED], repository, tmp_path) == ["True"]


@pytest.mark.long
@pytest.mark.parametrize("which", ["all", "workers"])
def test_without_its_processes_this_one_compiles(repository, tmp_path, which):
    script = f"{FORKED}WHICH = {which!r}\n{KILLED}"
    assert run(["-c", script], repository, tmp_path) == ["5 5 0"]


def test_an_interrupt_ends_the_processes(repository, tmp_path):
    assert run(["-c", FORKED + INTERRUPTED], repository, tmp_path) == ["interrupted"]


def test_processes_do_not_outlive_the_one_that_forked_them(repository, tmp_path):
    script = FORKED + GONE
    run(["-c", f"CODE = {f'CODE = None{chr(10)}{script}'!r}\n{script}", "parent"], repository, tmp_path)


@pytest.mark.parametrize("changed", [None, "no GPU", "CUDA", "no CUDA", "interpreter", "torch", "macOS"])
def test_processes_are_forked_where_they_are_of_use_and_may_be(monkeypatch, tmp_path, changed):
    gpu = tmp_path / "nvidiactl"
    gpu.touch()
    monkeypatch.setattr(compilers, "GPU_FILES", (str(gpu),))
    monkeypatch.setattr(compilers, "_current", None)
    monkeypatch.setattr(compilers, "Compilers", lambda count: count)
    monkeypatch.setattr(torch.version, "cuda", None if changed == "no CUDA" else "13.0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: changed == "CUDA")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if changed == "interpreter" else "0")
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch" if changed == "torch" else "auto")
    if changed == "no GPU":
        gpu.unlink()
    if changed == "macOS":
        monkeypatch.setattr(sys, "platform", "darwin")
    compilers.fork_compilers()
    assert compilers._current == (None if changed else min(16, compilers.cores()))


def test_where_no_more_processes_are_allowed_nothing_is_forked(monkeypatch):
    def refused():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(compilers, "_may_fork", lambda: True)
    monkeypatch.setattr(compilers, "_current", None)
    monkeypatch.setattr(compilers.os, "fork", refused)
    compilers.fork_compilers()
    assert compilers.current() is None


def test_a_process_that_compiles_asks_no_gpu():
    with pytest.raises(RuntimeError, match=r"was to use CUDA .*get_current_device"):
        compilers._NoGPU().get_current_device()


def test_the_compiler_is_hashed_once_and_beside_other_work(repository, tmp_path):
    assert run(["-c", HASH], repository, tmp_path) == ["1 True"]


@pytest.mark.long
def test_fifty_batches_and_contexts_need_no_kernel_that_a_warm_up_did_not(repository, tmp_path):
    lines = [json.loads(line) for line in run(["-m", "testing.ops.launches"], repository, tmp_path)]
    assert len(lines) == 7
    for line in lines:
        assert line["warm"] > 15
        assert line["later"] == 0, line
        assert line["own_keys_differ"] == 0, line


def test_a_launcher_that_may_be_loaded_is_not_replaced(monkeypatch, tmp_path):
    from triton.runtime.cache import FileCacheManager

    from arbitor.ops import triton as shared

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(FileCacheManager, "put", FileCacheManager.put)
    shared._write_launchers_once()
    manager = FileCacheManager("key")
    name = "__triton_launcher.so"
    path = Path(manager.put(b"built", name))
    number = path.stat().st_ino
    assert manager.put(b"built", name) == str(path) == manager.get_file(name)
    assert path.stat().st_ino == number
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(b"\0" * 5)
    assert Path(manager.put(b"built", name)).read_bytes() == b"built"
    plain = Path(manager.put(b"built", "other.so"))
    assert path.stat().st_mode == plain.stat().st_mode
    plain.unlink()
    path.unlink()
    path.parent.rmdir()
    assert Path(manager.put(b"built", name)).read_bytes() == b"built"
    monkeypatch.setattr(os, "link", refuse)
    path.unlink()
    assert Path(manager.put(b"built", name)).read_bytes() == b"built"
    assert list(path.parent.iterdir()) == [path]
    other = Path(manager.put("text", "kernel.json"))
    assert (other.read_text(), manager.put("newer", "kernel.json"), other.read_text()) == (
        "text", str(other), "newer",
    )  # fmt: skip
