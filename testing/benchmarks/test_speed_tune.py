"""The timing of configurations: what is compared, what is written, and that one's failure is not the end."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")

from arbitor.ops.trit_codec import ILLEGAL, trit_unpack
from arbitor.train.device import resolve_device
from benchmarks.learning.table import Table
from benchmarks.speed import tune

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs Triton's interpreter, which a GPU machine does not set"
)


def candidate(configuration, right, work=lambda: (lambda: torch.ones(9).sum(), 1)):
    return tune.Candidate("sum", "9", configuration, right, work, "bandwidth", 36.0)


def refused():
    raise RuntimeError("no such instruction\nand more")


def test_a_candidate_that_fails_is_written_down_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    given = [
        candidate("refused", refused),
        candidate("wrong", lambda: False),
        candidate("too large", lambda: True, refused),
        candidate("good", lambda: True),
    ]
    monkeypatch.setattr(tune, "KERNELS", {"sum": lambda device: iter(given)})
    monkeypatch.setattr(tune, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(tune, "matmul_peak", lambda device: 1e12)
    table = Table(tmp_path / "tune.csv", tune.COLUMNS, tune.KEY)
    tune.measure(resolve_device("cpu"), ["sum"], table)
    rows = {row["configuration"]: row for row in table.rows()}
    assert {name: row["problem"] for name, row in rows.items()} == {
        "refused": "RuntimeError: no such instruction",
        "wrong": "differs from the reference",
        "too large": "RuntimeError: no such instruction",
        "good": "",
    }
    assert float(rows["good"]["share"]) == pytest.approx(
        36 / float(rows["good"]["microseconds"]) * 1e6 / 1e12, rel=1e-2
    )
    assert not rows["wrong"]["microseconds"]
    assert "quickest for sum, 9: good" in capsys.readouterr().out


@interpreted
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_the_first_configuration_of_every_kernel_is_right(kernel):
    firsts = {}
    for one in tune.KERNELS[kernel](torch.device("cpu")):
        firsts.setdefault(one.kernel, one)
    for name, one in firsts.items():
        # The interpreter has no bf16: decoding gives fp32, by a branch that is tested with the kernels.
        assert one.right(), name


def test_random_bytes_are_those_of_packed_trits():
    packed = tune._random_bytes(torch.device("cpu"), 40, 320)
    assert (trit_unpack(packed, 1600) != ILLEGAL).all()
    assert len(packed.unique()) == 243


@interpreted
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_work_can_be_done_on_what_is_timed(kernel, monkeypatch):
    """On sizes that the interpreter can bear; what is counted in a call is what is called."""
    monkeypatch.setattr(tune, "LARGE", (16, 160))
    monkeypatch.setattr(tune, "SMALL", (16, 160))
    monkeypatch.setattr(tune, "CACHE_BYTES", 1024)
    monkeypatch.setattr(tune, "MANY", (8, 160, 16))
    monkeypatch.setattr(tune, "SOME", (8, 160, 16))
    monkeypatch.setattr(tune, "UPDATE", (1, 16, 160))
    firsts = {}
    for one in tune.KERNELS[kernel](torch.device("cpu")):
        firsts.setdefault(one.kernel, one)
    for one in firsts.values():
        work, calls = one.work()
        work()
        assert calls == (2 if one.kernel == "few tokens" else 1)
        assert one.amount > 0


def test_a_cpu_is_refused(capsys):
    assert tune.main(["--device", "cpu"]) == 2
    assert "run on a GPU" in capsys.readouterr().err
