"""Kernels are compiled ahead, each once; and no batch or context needs one that a warm-up did not compile."""

import json
import os
import subprocess
import sys

import pytest

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
print(report.kernels, report.new, report.threads)
try:
    with compiled_ahead(torch.device("cpu"), threads=2):
        codec._decode_kernel[(1,)](packed, exponent, weights, 4, 160, 32, 160, 1, BYTES=1000)
except triton.CompilationError:
    print("refused")
assert before == (jit.JITFunction.run, torch.empty, torch.empty_like, knobs.compilation.listener)
"""


HASH = """
import os
os.environ["TRITON_INTERPRET"] = "0"
from triton.runtime.cache import triton_key
from arbitor.ops.triton import hash_compiler
thread = hash_compiler()
assert hash_compiler() is thread
thread.join()
print(triton_key.cache_info().currsize)
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
    assert run(["-c", AHEAD], repository, tmp_path) == ["2 2 2", "refused"]
    assert run(["-c", AHEAD], repository, tmp_path) == ["2 0 2", "refused"]


def test_the_compiler_is_hashed_once_and_beside_other_work(repository, tmp_path):
    assert run(["-c", HASH], repository, tmp_path) == ["1"]


def test_fifty_batches_and_contexts_need_no_kernel_that_a_warm_up_did_not(repository, tmp_path):
    lines = [json.loads(line) for line in run(["-m", "testing.ops.launches"], repository, tmp_path)]
    assert len(lines) == 4
    for line in lines:
        assert line["warm"] > 15
        assert line["later"] == 0, line
        assert line["own_keys_differ"] == 0, line
