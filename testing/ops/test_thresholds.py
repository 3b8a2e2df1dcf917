"""Thresholds: measured by a clock that is given, stored, believed only where nobody else can write."""

import json
import os
import stat
import warnings
from contextlib import nullcontext

import pytest
import torch

from arbitor.errors import UserError
from arbitor.ops import thresholds
from arbitor.ops.thresholds import DEFAULTS, forced, measure, read, threshold, write
from testing.guards import guarding

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def guards(request):
    """None where kernels are timed and recorded."""
    with nullcontext() if request.node.get_closest_marker("gpu") else guarding() as guards:
        yield guards


@pytest.fixture
def file(tmp_path, monkeypatch):
    tmp_path.chmod(0o700)
    file = tmp_path / "cache" / "thresholds.json"
    monkeypatch.setenv(thresholds.VARIABLE, str(file))
    monkeypatch.setattr(thresholds, "identity", lambda _: "this GPU")
    thresholds.table.cache_clear()
    yield file
    thresholds.table.cache_clear()


def damage(file, text):
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(text)
    file.chmod(0o600)


# -- what holds ---------------------------------------------------------------------------------------------


def test_without_a_table_the_defaults_hold(file):
    assert threshold("few_tokens", GPU) == DEFAULTS["few_tokens"] == 8
    assert not file.parent.exists()


def test_a_table_holds_for_its_gpu_alone_and_is_read_once(file):
    write(file, "this GPU", {"few_tokens": 128})
    write(file, "another GPU", {"few_tokens": 16})
    assert read(file, "another GPU").values == {**DEFAULTS, "few_tokens": 16}
    assert read(file, "third GPU") == thresholds.Table(DEFAULTS)
    assert threshold("few_tokens", GPU) == 128
    file.unlink()
    assert threshold("few_tokens", GPU) == 128
    assert threshold("few_tokens", CPU) == DEFAULTS["few_tokens"]


def test_a_new_table_replaces_the_old_one_at_once(file):
    write(file, "this GPU", {"few_tokens": 128})
    assert threshold("few_tokens", GPU) == 128
    write(file, "this GPU", {"few_tokens": 32})
    assert threshold("few_tokens", GPU) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_names_that_there_are_not_any_more_are_passed_over(file):
    write(file, "this GPU", {"few_tokens": 128, "former": 3})
    assert thresholds.table(GPU).values == {**DEFAULTS, "few_tokens": 128}


def test_forced_thresholds_hold_inside_only():
    with forced(few_tokens=1):
        with forced(few_tokens=2):
            assert threshold("few_tokens", CPU) == 2
        assert threshold("few_tokens", CPU) == 1
    assert threshold("few_tokens", CPU) == DEFAULTS["few_tokens"]


def test_the_file_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv(thresholds.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert thresholds.path() == tmp_path / "arbitor" / "thresholds.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert thresholds.path() == tmp_path / ".cache" / "arbitor" / "thresholds.json"


def test_a_table_is_of_a_gpu_and_of_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    thresholds.identity.cache_clear()
    key = thresholds.identity(GPU)
    assert key.startswith("H, 9.0, kernels ")
    assert f"torch {torch.__version__}" in key
    monkeypatch.setattr(thresholds, "_kernels", lambda: "others")
    thresholds.identity.cache_clear()
    assert thresholds.identity(GPU) != key
    thresholds.identity.cache_clear()


# -- what is not believed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        "[]",
        "[" * 100_000,
        "{}",
        '{"format": 2, "tables": {}}',
        '{"format": 1, "tables": []}',
        '{"format": 1, "tables": {"this GPU": 7}}',
        '{"format": 1, "tables": {"this GPU": {"values": {"few_tokens": 3}}}}',
        '{"format": 1, "tables": {"this GPU": {"date": "soon", "values": {"few_tokens": 3}}}}',
        '{"format": 1, "tables": {"this GPU": {"date": "2026-01-01", "values": {"few_tokens": -1}}}}',
        '{"format": 1, "tables": {"this GPU": {"date": "2026-01-01", "values": {"few_tokens": 1.5}}}}',
        '{"format": 1, "tables": {"this GPU": {"date": "2026-01-01", "values": {"few_tokens": true}}}}',
        '{"format": 1, "tables": {"this GPU": {"date": "2026-01-01", "values": [1]}}}',
        " " * (thresholds.MAX_FILE_BYTES + 1),
    ],
    ids=range(15),
)
def test_a_damaged_file_is_one_warning_and_the_defaults(file, text):
    damage(file, text)
    with pytest.warns(UserWarning, match=r"are the defaults: .* is damaged \(.*\); delete it") as caught:
        assert threshold("few_tokens", GPU) == DEFAULTS["few_tokens"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert threshold("few_tokens", GPU) == DEFAULTS["few_tokens"]


def test_a_damaged_file_is_replaced(file):
    damage(file, "no JSON")
    write(file, "this GPU", {"few_tokens": 128})
    assert threshold("few_tokens", GPU) == 128


def test_a_pipe_is_not_waited_for(file):
    file.parent.mkdir(mode=0o700)
    os.mkfifo(file, 0o600)
    assert "no file" in read(file, "this GPU").problem


@pytest.mark.parametrize("shared", ["file", "folder"])
def test_what_others_may_write_to_is_not_read(file, shared):
    write(file, "this GPU", {"few_tokens": 128})
    (file if shared == "file" else file.parent).chmod(0o666 if shared == "file" else 0o777)
    with pytest.warns(UserWarning, match="is not used: everybody may write to"):
        assert threshold("few_tokens", GPU) == DEFAULTS["few_tokens"]


def test_nothing_is_written_where_others_may_write(file):
    file.parent.mkdir(mode=0o700)
    file.parent.chmod(0o777)
    with pytest.raises(UserError, match=r"would not be trusted: everybody may write .*ARB_THRESHOLDS"):
        write(file, "this GPU", {"few_tokens": 128})
    assert not file.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*; set ARB_THRESHOLDS"):
        write(tmp_path / "file" / "table.json", "this GPU", {})


def test_a_write_that_fails_leaves_the_former_table(file, monkeypatch):
    write(file, "this GPU", {"few_tokens": 128})
    before = file.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="No space left"):
        write(file, "this GPU", {"few_tokens": 16})
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# -- measuring ----------------------------------------------------------------------------------------------


def contest(sizes, turning):
    """A contest whose first kernel costs its size and whose second one costs `turning`; and its clock."""
    seen = []

    def make(size, device):
        return lambda: size if threshold("few_tokens", device) >= size else turning

    def seconds(work, _device):
        seen.append(work())
        return float(seen[-1])

    return [("few_tokens", sizes, make)], seconds, seen


@pytest.mark.parametrize(("turning", "found"), [(8, 0), (16, 16), (100, 64), (1000, 128)])
def test_the_largest_size_at_which_the_first_kernel_is_faster_is_found(turning, found):
    contests, seconds, seen = contest((16, 32, 64, 128), turning)
    assert measure(CPU, contests, seconds) == {"few_tokens": found}
    assert set(seen) >= {16, turning}, "both kernels were timed"


def test_measuring_changes_no_threshold_that_holds():
    contests, seconds, _ = contest((16, 32), 1000)
    measure(CPU, contests, seconds)
    assert threshold("few_tokens", CPU) == DEFAULTS["few_tokens"]


def test_contests_are_of_thresholds_and_rise():
    assert {name for name, _, _ in thresholds.CONTESTS} == set(DEFAULTS)
    for _, sizes, _ in thresholds.CONTESTS:
        assert list(sizes) == sorted(set(sizes))


def test_both_sides_of_the_real_contests_run_different_kernels_with_equal_results(monkeypatch):
    pytest.importorskip("triton", reason="needs Triton, which the extra `test` installs on Linux")
    from arbitor.ops.expert_linear import triton as expert_linear
    from arbitor.ops.ternary_linear import triton

    monkeypatch.setattr(thresholds, "_linears", small_linears)
    monkeypatch.setattr(thresholds, "_experts", small_experts)
    called = []
    for module, name in (
        *((triton, name) for name in ("few_tokens", "int8_matmul", "_tile")),
        *((expert_linear, name) for name in ("_few_tile", "_many_rows")),
    ):
        monkeypatch.setattr(module, name, noted(called, getattr(module, name)))
    for name, sizes, make in thresholds.CONTESTS:
        results = []
        size = 4 if 4 in sizes else sizes[0]
        for limit in (size, size - 1):
            called.clear()
            work = make(size, CPU)
            with forced(**{name: limit}):
                results.append((work(), list(called)))
        (y, first), (other, second) = results
        assert first != second, name
        assert torch.equal(y, other)


def small_linears(tokens, rows, columns, device):
    """As `thresholds._linears`, of another size and in a dtype that the interpreter has."""
    from arbitor.ops.ternary_linear import triton

    codes, scale, packed, exponent = operands(min(tokens, 4), (4, 40), device)
    return lambda: triton.product(codes, scale, packed, exponent, 40, torch.float32)


def small_experts(rows_each, experts, rows, columns, device):
    """The same of `thresholds._experts`."""
    from arbitor.ops.expert_linear import triton

    codes, scale, packed, exponent = operands(rows_each * experts, (experts, 4, 40), device)
    offsets = torch.arange(1, experts + 1, dtype=torch.int32, device=codes.device) * rows_each
    return lambda: triton.product(codes, scale, offsets, packed, exponent, 40, torch.float32)


def operands(tokens, shape, device):
    from arbitor.ops.trit_codec import trit_pack

    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (tokens, shape[-1]), generator=generator, dtype=torch.int8)
    packed = trit_pack(torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8))
    tensors = codes, torch.ones((tokens, 1)), packed, torch.zeros((*shape[:-1], 1), dtype=torch.int8)
    return [tensor.to("cuda" if torch.cuda.is_available() else device) for tensor in tensors]


def noted(called, function):
    def call(*args, **rest):
        result = function(*args, **rest)
        called.append((function.__name__, result if function.__name__ == "_tile" else None))
        return result

    return call


@pytest.mark.gpu
def test_thresholds_of_a_gpu_are_measured_stored_and_found(file):
    device = torch.device("cuda", torch.cuda.current_device())
    values = measure(device)
    assert values.keys() == DEFAULTS.keys()
    write(file, "this GPU", values)
    assert thresholds.table(device).values == values
    assert json.loads(file.read_text())["tables"]
