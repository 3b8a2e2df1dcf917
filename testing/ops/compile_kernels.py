"""Compiles the kernels for a GPU that need not be there, by running their tests with launches left out.

    python -m testing.ops.compile_kernels

Under Triton's interpreter a kernel is Python; what its compiler refuses shows here only. Prints one line of
JSON for each kernel: how often it was compiled, and what went wrong. Tests fail meanwhile, since nothing is
computed.
"""

import contextlib
import io
import json
import os
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from arbitor.ops import backend

CAPABILITY = 90  # of Hopper GPUs
SHARED_MEMORY = 232_448
TESTS = ("testing/ops", "--ignore=testing/ops/test_compile.py")  # which would call this one again

compiled: dict[str, int] = defaultdict(int)
refused: dict[str, str] = {}


class Target:
    """As much of a driver as compiling needs."""

    utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": SHARED_MEMORY})

    def get_current_target(self) -> GPUTarget:
        """The GPU that is compiled for."""
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        """There is one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """There is one."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are that the kernels are called with."""
        return torch.device("cpu")


def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands for `JITFunction.run`."""
    name = f"{self.fn.__module__}.{self.fn.__name__}"
    if not name.startswith("arbitor."):  # of the tests' own
        return
    try:
        launch(self, *args, grid=grid, warmup=True, **options)
        compiled[name] += 1
    except Exception as error:  # whatever the compiler says is what the caller wants to know
        refused[name] = f"{type(error).__name__}: {error}"


class FirstAndLast:
    """Of all parametrisations of a test the first and the last: kernels do not depend on much."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep those, of the tests of kernels."""
        tests: dict[str, list[pytest.Item]] = defaultdict(list)
        for item in items:
            if "kernel" in item.nodeid and not item.get_closest_marker("gpu"):
                tests[item.nodeid.partition("[")[0]].append(item)
        items[:] = [test for all_of in tests.values() for test in dict.fromkeys((all_of[0], all_of[-1]))]


if __name__ == "__main__":
    driver.set_active(Target())
    launch = jit.JITFunction.run
    jit.JITFunction.run = compile_only
    backend.uses_triton = lambda _: backend.requested_backend() == "triton"
    os.environ[backend.VARIABLE] = "triton"
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["-q", "--tb=no", "-p", "no:cacheprovider", *TESTS], plugins=[FirstAndLast()])
    for kernel in sorted({*compiled, *refused}):
        print(json.dumps({"kernel": kernel, "compiled": compiled[kernel], "refused": refused.get(kernel)}))
    sys.exit(1 if refused else 0)
