"""Compiled passes: the bits of torch's operations, and how the library is found, kept and refused."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from arbitor.ops import native
from arbitor.ops.activations import cpu as activations
from arbitor.ops.int8_matmul import cpu as int8_matmul
from arbitor.ops.int8_matmul import reference
from arbitor.ops.momentum import cpu as momentum
from arbitor.ops.native import check
from arbitor.ops.random_bits import random_bits
from arbitor.ops.state_update import cpu as state_update
from arbitor.ops.ternary_linear import cpu as ternary_linear
from arbitor.ops.trit_codec import reference as trit_codec
from arbitor.ternary import TernaryLinear, VoteOptimizer

SHAPES = [(1, 1), (1, 160), (3, 7), (5, 33), (0, 16), (130, 640), (257, 31)]


@pytest.fixture(scope="module", autouse=True)
def library():
    found = native.found()
    if found.library is None:
        pytest.skip(f"no compiled passes here: {found.problem}")
    return found.library


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`found` in a process that has not looked yet, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return native._found.__wrapped__


def both(library, work):
    with native.trying(None):
        expected = work()
    with native.trying(library):
        results = work()
    return results, expected


def assert_equal(results, expected):
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def floats(shape, seed=0):
    """Normal numbers of tokens that differ a lot in size, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn((shape[0], 1), generator=generator).mul(9).exp()
    return x.masked_fill_(torch.rand(shape, generator=generator) < 0.1, 0)


@pytest.mark.parametrize("name", check.examples())
def test_the_examples_of_the_check_agree(library, name):
    results, expected = both(library, check.examples()[name])
    assert len(results) == len(expected) > 0
    assert_equal(results, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("squared", [False, True], ids=["as it is", "squared"])
def test_codes_and_gradients(library, shape, norm, squared):
    x, gradient = floats(shape), floats(shape, 1)
    if shape[1] > 1:
        assert_equal(*both(library, lambda: activations.quantize(x, norm, squared)))
    rstd = floats((shape[0], 1), 2).abs()
    for dxn in (gradient, gradient.bfloat16()):
        assert_equal(*both(library, lambda: (activations.input_gradient(dxn, x, rstd, norm, squared),)))  # noqa: B023
    assert_equal(*both(library, lambda: (activations.round_scaled(gradient, rstd),)))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3e38, -0.0, 1e-45])
def test_numbers_that_are_none_or_at_the_limit(library, odd):
    x = floats((9, 48))
    x[2, 5] = odd
    x[4] = odd
    for squared in (False, True):
        (codes, *scales), (wanted_codes, *wanted) = both(
            library,
            lambda: activations.quantize(x, True, squared),  # noqa: B023
        )
        assert_equal(scales, wanted)
        finite = wanted[0][:, 0].isfinite()  # codes times a scale that is none are none
        assert torch.equal(codes[finite], wanted_codes[finite])
        gradient = floats((9, 48), 3)
        gradient[0, 3] = odd
        work = lambda: (activations.input_gradient(gradient, x, wanted[1], True, squared),)  # noqa: B023, E731
        assert_equal(*both(library, work))
    assert_equal(*both(library, lambda: (activations.round_scaled(x, torch.ones(9, 1)),)))


def test_inputs_that_are_not_contiguous(library):
    x, gradient = floats((64, 40)).t(), floats((64, 40), 1).t()
    rstd = floats((40, 3), 2).abs()[:, 1:2]
    assert_equal(*both(library, lambda: activations.quantize(x, True)))
    assert_equal(*both(library, lambda: (activations.input_gradient(gradient, x, rstd, True, True),)))
    assert_equal(*both(library, lambda: (activations.round_scaled(gradient, rstd),)))


@pytest.mark.parametrize(("rows", "columns"), [(1, 160), (7, 5), (33, 161), (4, 320), (20, 159)])
def test_decoding_and_products(library, rows, columns):
    generator = torch.Generator().manual_seed(rows)
    trits = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
    exponent = torch.randint(-62, 32, (rows, 1), generator=generator).to(torch.int8)
    packed = trit_codec.pack(trits)
    (decoded, scale), expected = both(library, lambda: ternary_linear.decode(packed, exponent, columns))
    assert torch.equal(decoded, trits)
    assert_equal((decoded, scale), expected)
    codes = torch.randint(-127, 128, (19, columns), generator=generator).to(torch.int8)
    per_token = floats((19, 1)).abs()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        work = lambda: (int8_matmul.int8_matmul(codes, trits, per_token, scale, dtype),)  # noqa: B023, E731
        assert_equal(*both(library, work))


@pytest.mark.parametrize("columns", [1, 3, 4, 7, 160, 251, 252, 255, 256, 257, 1031])
@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
def test_the_compiled_product_of_trits(library, columns, extreme):
    generator = torch.Generator().manual_seed(columns)
    for tokens, rows in [(1, 1), (3, 24), (4, 25), (65, 23), (130, 49), (0, 5), (5, 0)]:
        codes = torch.randint(-127, 128, (tokens, columns), generator=generator).to(torch.int8)
        trits = torch.randint(-1, 2, (rows, columns), generator=generator).to(torch.int8)
        if extreme:  # sums as large as they can be, of either sign
            codes, trits = codes.sign().mul_(127), trits.fill_(1)
            codes[: tokens // 2], trits[rows // 2 :] = 127, -1
        scale, row_scale = floats((tokens, 1), 2).abs(), floats((rows, 1), 3).flatten()
        row_scale[: rows // 3] = torch.nan
        with native.trying(library):
            y = int8_matmul.multiplied(codes, trits, scale, row_scale)
        if y is None:
            pytest.skip("this machine has no AVX2")
        assert_equal((y,), (reference.int8_matmul(codes, trits, scale, row_scale, torch.float32),))


@pytest.mark.parametrize("value", [-128, -127, -2, 2, 3, 4, 64, 127])
def test_what_is_no_trit_is_multiplied_all_the_same(library, value):
    codes, weight = torch.ones((9, 33), dtype=torch.int8), torch.ones((26, 33), dtype=torch.int8)
    weight[25, 32] = value
    scale, row_scale = torch.ones(9, 1), torch.ones(26)
    with native.trying(library):
        assert int8_matmul.multiplied(codes, weight, scale, row_scale) is None
        y = int8_matmul.int8_matmul(codes, weight, scale, row_scale, torch.float32)
    assert (y[:, :25] == 33).all()
    assert (y[:, 25] == 32 + value).all()


@pytest.mark.parametrize("library_pays", [False, True])
def test_both_products_of_integers_give_the_same(library, library_pays, monkeypatch):
    monkeypatch.setattr(int8_matmul, "library_pays", lambda: library_pays)
    with native.trying(library):
        results = check.examples()["int8_matmul"]()
    with native.trying(None):
        assert_equal(results, check.examples()["int8_matmul"]())


def test_a_row_with_an_illegal_byte_is_not_a_number(library):
    packed = trit_codec.pack(torch.ones((3, 320), dtype=torch.int8))
    packed[1, 40] = 1
    exponent = torch.zeros((3, 1), dtype=torch.int8)
    (trits, scale), (_, wanted) = both(library, lambda: ternary_linear.decode(packed, exponent, 320))
    assert_equal((scale,), (wanted,))
    assert scale.isnan().tolist() == [False, True, False]
    assert (trits[::2] == 1).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [32, 16])
@pytest.mark.parametrize("seed", range(3))
def test_momentum(library, bits, group, seed):
    generator = torch.Generator().manual_seed(seed)
    n = 75
    gradient = floats((n, 160), seed)
    gradient[3:5] = 0
    exponent = torch.randint(-800, 801, (n, 160 // group), generator=generator).to(torch.int16)
    if bits == 8:
        codes = torch.randint(-127, 128, (n, 160), generator=generator).to(torch.int8)
    else:
        nibbles = torch.randint(1, 16, (2, n, 80), generator=generator).to(torch.uint8)
        codes = nibbles[0] | nibbles[1] << 4
    drawn = torch.randint(-(1 << 31), 1 << 31, (n, 160), generator=generator).to(torch.int32)

    def work():
        changed = [tensor.clone() for tensor in (gradient, codes, exponent)]
        momentum.fold(*changed, drawn, bits, 0.8, 0.5)
        return changed

    assert_equal(*both(library, work))


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("span", "threshold", "rail"), [(128, 80, 64), (128, 64, 127), (96, 48, 32)])
@pytest.mark.parametrize("step", [0.5, 40.0, 1e30, torch.tensor(7.25)])
def test_votes_and_flips(library, reset, span, threshold, rail, step):
    generator = torch.Generator().manual_seed(threshold)
    n = 143
    packed = trit_codec.pack(torch.randint(-1, 2, (n, 160), generator=generator).to(torch.int8))
    accumulator = torch.randint(-127, 128, (n, 160), generator=generator).to(torch.int8)
    direction = torch.randn((n, 160), generator=generator)
    drawn = torch.randint(-(1 << 31), 1 << 31, (n, 160), generator=generator).to(torch.int32)

    def work():
        changed = [packed.clone(), accumulator.clone()]
        flips = state_update.update(*changed, direction, drawn, step, span, threshold, rail, reset)
        return [*changed, flips]

    results, expected = both(library, work)
    assert_equal(results, expected)
    assert expected[-1].sum() > 0


def test_an_illegal_byte_is_left_to_torch(library):
    packed = torch.full((4, 32), 128, dtype=torch.uint8)
    packed[2, 9] = 1
    drawn = torch.zeros((4, 160), dtype=torch.int32)

    def work():
        changed = [packed.clone(), torch.zeros((4, 160), dtype=torch.int8)]
        flips = state_update.update(*changed, torch.ones((4, 160)), drawn, 200.0, 128, 80, 64, False)
        return [*changed, flips]

    assert_equal(*both(library, work))


@pytest.mark.parametrize("count", [0, 1, 160, 1000])
def test_random_bits(library, count):
    keys = torch.tensor([[0, 0], [-1, 5], [2**31 - 1, -(2**31)]], dtype=torch.int32)
    assert_equal(*both(library, lambda: (random_bits(keys, count), random_bits(keys[0], count))))


def test_the_number_of_threads_changes_nothing(library):
    x, gradient = floats((1003, 160)), floats((1003, 160), 1)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            codes, scale, rstd = activations.quantize(x, True, True)
            results.append([codes, scale, rstd, activations.input_gradient(gradient, x, rstd, True, True)])
    finally:
        torch.set_num_threads(before)
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])


def test_training_is_the_same_with_torch_alone(library):
    def trained():
        torch.manual_seed(0)
        model = torch.nn.Sequential(TernaryLinear(160, 320), TernaryLinear(320, 160))
        optimizer = VoteOptimizer(model, state="full", seed=3)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn((64, 160), generator=generator)
            model(x).sub(x.flip(-1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        states = [value for state in optimizer.state.values() for value in state.values()]
        return [*model.buffers(), *model.parameters(), *filter(torch.is_tensor, states)]

    results, expected = both(library, trained)
    assert len(expected) > 4
    assert_equal(results, expected)


# -- what is left to torch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_the_default_dtype_changes_nothing(dtype):
    code = (
        "import torch; from arbitor.ops import native; from arbitor.ternary import TernaryLinear;"
        f"torch.manual_seed(0); layer = TernaryLinear(160, 320); x = torch.randn(64, 160);"
        f"torch.set_default_dtype(torch.{dtype}); y = layer(x); assert native.found().library is not None;"
        "native._tried.set(native.Found(None)); assert torch.equal(y, layer(x)) and y.dtype == torch.float32"
    )
    _in_a_process(code)


def test_only_plain_tensors_on_a_cpu(library):
    x = torch.ones(4, 32)
    with native.trying(library):
        assert native.passes((x, torch.float32)) is library
        assert native.passes((torch.nn.Parameter(x), torch.float32)) is library
        for other, dtype in (
            (x, torch.bfloat16),
            (x.to("meta"), torch.float32),
            (x.t(), torch.float32),
            (torch._neg_view(x), torch.float32),
            (torch._efficientzerotensor(4), torch.float32),
            (x.as_subclass(type("Own", (torch.Tensor,), {})), torch.float32),
        ):
            assert native.passes((x, torch.float32), (other, dtype)) is None
        with FlopCounterMode(display=False):  # as everything that looks at operations
            assert native.passes((x, torch.float32)) is None


@pytest.mark.parametrize("bytes_pay", [False, True])
def test_a_model_on_another_device_is_an_error_as_with_torch(library, monkeypatch, bytes_pay):
    monkeypatch.setattr(int8_matmul, "pays", lambda *_: bytes_pay)
    layer = TernaryLinear(160, 320).to("meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        layer(torch.ones(64, 160))


def test_what_does_not_fit_is_left_to_torch(library):
    x = floats((6, 48))
    with native.trying(library):
        assert activations.input_gradient(x.half(), x, torch.ones(6, 1), True).dtype == torch.float32
        with pytest.raises(RuntimeError):
            activations.round_scaled(x, torch.ones(5, 1))
    keys = torch.zeros((2, 3), dtype=torch.int32)
    assert_equal(*both(library, lambda: (random_bits(keys, 5), random_bits(keys[:, :2].long(), 5))))
    packed = trit_codec.pack(torch.ones((3, 200), dtype=torch.int8))
    exponent = torch.zeros((3, 1), dtype=torch.int8)
    for columns in (160, 200, 1000):
        assert_equal(*both(library, lambda: ternary_linear.decode(packed, exponent, columns)))  # noqa: B023
    packed[:, -1] = 1  # of padding
    assert_equal(*both(library, lambda: ternary_linear.decode(packed, exponent, 170)))


# -- the library ---------------------------------------------------------------------------------------------


def test_a_second_process_finds_what_the_first_compiled(fresh, tmp_path):
    first = fresh()
    kept = list((tmp_path / "arbitor" / "native").iterdir())
    assert first.library is not None
    assert [path.suffix for path in kept] == [".so"]
    made = kept[0].stat().st_mtime_ns
    assert fresh().library is not None
    assert kept[0].stat().st_mtime_ns == made


@pytest.mark.parametrize("size", [0, 100, 5_000, 20_000])
def test_a_damaged_library_is_made_anew(fresh, tmp_path, size):
    fresh()
    (path,) = (tmp_path / "arbitor" / "native").iterdir()
    sound = path.read_bytes()
    path.unlink()  # the process has mapped it
    path.write_bytes(sound[:size])
    path.chmod(0o700)
    assert fresh().library is not None
    assert path.read_bytes() == sound


def test_a_folder_that_others_may_write_to_is_not_believed(fresh, tmp_path):
    folder = tmp_path / "arbitor" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert fresh().library is not None
    assert list(folder.iterdir()) == []


def test_what_is_kept_is_the_users_alone_whatever_the_umask(fresh, tmp_path):
    before = os.umask(0)
    try:
        assert fresh().library is not None
    finally:
        os.umask(before)
    folder = tmp_path / "arbitor" / "native"
    places = [folder.parent, folder, *folder.iterdir()]
    assert [stat.S_IMODE(place.stat().st_mode) for place in places] == [0o700] * 3


def test_without_a_home(fresh, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda _: (_ for _ in ()).throw(RuntimeError("no home")))
    assert fresh().library is not None


def test_a_full_disk(fresh, monkeypatch, tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert fresh().library is not None
    assert list((tmp_path / "arbitor" / "native").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written(fresh, tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert fresh().library is not None
    finally:
        tmp_path.chmod(0o700)


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    found = fresh()
    assert found.library is None
    assert "no C compiler was found" in found.problem


def _compiler(folder: Path, body: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def only(monkeypatch):
    """There is no compiler but that of $CC."""
    monkeypatch.setattr(native, "COMPILERS", ())


def _real() -> str:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))))


FAULTS = {
    "an error": ("echo 'passes.c:1: error: no such thing' >&2; exit 1", "passes.c:1: error: no such thing"),
    "nothing is made": ("exit 0", "cannot open shared object"),
    "no functions": ('exec {real} -fvisibility=hidden "$@"', "undefined symbol"),
    "other results": ('exec {real} -Drintf=floorf "$@"', "differs from torch in fold, quantize"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_compiler_that_is_of_no_use(fresh, only, monkeypatch, tmp_path, fault):
    body, message = FAULTS[fault]
    monkeypatch.setenv("CC", _compiler(tmp_path, body.format(real=_real())))
    found = fresh()
    assert found.library is None
    assert message in found.problem
    assert "\n" not in found.problem


@pytest.mark.parametrize("name", ["{fails}", "no-such-compiler", "cc 'quote"])
def test_the_next_compiler_is_tried(fresh, monkeypatch, tmp_path, name):
    monkeypatch.setenv("CC", name.format(fails=_compiler(tmp_path, "exit 1")))
    found = fresh()
    assert found.library is not None
    assert found.compiler == _real()


def test_a_compiler_with_arguments_that_says_odd_things(fresh, only, monkeypatch, tmp_path):
    body = f'printf \'w\\344rning\' >&2; [ "$1" = -DA ] || exit 1; exec {_real()} "$@"'
    monkeypatch.setenv("CC", f"{_compiler(tmp_path, body)} -DA")
    found = fresh()
    assert found.problem == ""
    assert found.compiler.endswith("/compiler -DA")


def _in_a_process(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], env=dict(os.environ, **environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_runtime_that_was_loaded_before_does_not_matter(library):
    code = (
        "import sklearn.datasets; from arbitor.ops import native; print(native.found().problem);"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if '/torch/lib/libgomp' in line}))"
    )
    assert _in_a_process(code).split("\n")[0] == ""


def test_threads_that_begin_at_once(library, tmp_path):
    code = (
        "import threading, torch; from arbitor.ops import native; from arbitor.ternary import TernaryLinear;"
        "work = lambda: TernaryLinear(160, 320)(torch.ones(64, 160));"
        "threads = [threading.Thread(target=work) for _ in range(4)];"
        "[t.start() for t in threads]; [t.join() for t in threads];"
        "assert native.passes() is native.found().library is not None"
    )
    _in_a_process(code, XDG_CACHE_HOME=str(tmp_path))


def test_torch_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "torch")
    assert native.passes() is None
    monkeypatch.setenv("ARB_TERNARY_BACKEND", "auto")
    assert native.passes() is not None


def test_processes_that_begin_at_once(tmp_path):
    code = "from arbitor.ops import native; assert native.found().library is not None, native.found().problem"
    environment = dict(os.environ, XDG_CACHE_HOME=str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "arbitor" / "native").iterdir())) == 1
