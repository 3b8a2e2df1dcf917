"""Every kernel passes Triton's compiler for a GPU, also where there is none."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")


@pytest.mark.long
def test_every_kernel_compiles(repository, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "testing.ops.compile_kernels"],
        cwd=repository,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if line["refused"]] == []
    assert done.returncode == 0, done.stderr
    sources = (repository / "arbitor" / "ops").glob("*/triton.py")
    kernels = {
        f"arbitor.ops.{path.parent.name}.triton.{name}"
        for path in sources
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(kernels) > 5
    assert {line["kernel"] for line in lines if line["compiled"]} == kernels
