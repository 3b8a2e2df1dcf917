import functools

import pytest
import torch
from torch import nn

from arbitor.errors import UserError
from arbitor.ops.activations import CODE_SCALE
from arbitor.ternary import Int8Embedding, TernaryEmbeddingTable, TernaryLinear, VoteOptimizer
from arbitor.ternary.capture import RowCapture

TYPES = ["T4", "T6", "T8", "T16", "T32", "T64", "T96", "ROW"]


def linear(columns=33, rows=7, seed=0, **options):
    """A TernaryLinear with exponents that differ, narrow enough for exact fp32 sums."""
    torch.manual_seed(seed)
    layer = TernaryLinear(columns, rows, **options)
    layer.set_trits(layer.trits(), torch.randint(-5, -2, layer.E.shape).to(torch.int8))
    return layer


def head(rows=11, dim=20):
    torch.manual_seed(0)
    table = Int8Embedding(rows, dim, kind="head")
    table.E.copy_(torch.randint(-5, -2, (rows,)))
    return table


def table_weight(table):
    """Dense float64 weights from the definition q * 2^(E - 6)."""
    return table.q.to(torch.float64) * torch.exp2(table.E.to(torch.float64) - 6)[:, None]


def rms_norm(x):
    return x / x.square().mean(-1, keepdim=True).add(1e-6).sqrt()


def inputs(*shape, seed=1, dtype=torch.float32, grad=True):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_(grad)


@pytest.mark.parametrize("tscale", TYPES)
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_gradcheck_of_a_linear(tscale, input_norm):
    layer = linear(tscale=tscale, input_norm=input_norm)
    x = inputs(3, 33, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: layer(x, quantize=False), x)


def test_gradcheck_of_a_head():
    table = head()
    assert torch.autograd.gradcheck(
        lambda x: table.logits(x, quantize=False), inputs(4, 20, dtype=torch.float64)
    )


@pytest.mark.parametrize("tscale", TYPES)
@pytest.mark.parametrize("input_norm", [True, False], ids=["norm", "no-norm"])
def test_float_gradients_equal_those_of_a_dense_model(tscale, input_norm):
    layer = linear(tscale=tscale, input_norm=input_norm)
    VoteOptimizer(layer)
    x = inputs(2, 5, 33, dtype=torch.float64)
    layer(x, quantize=False).tanh().sum().backward()

    x_dense = x.detach().clone().requires_grad_()
    weight = layer.decode(torch.float64).requires_grad_()
    ((rms_norm(x_dense) if input_norm else x_dense) @ weight.T).tanh().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(layer.capture.gradient(), weight.grad, rtol=1e-11, atol=1e-12)


def test_float_gradients_of_a_head_equal_those_of_a_dense_model():
    table = head()
    VoteOptimizer(table)
    x = inputs(2, 5, 20, dtype=torch.float64)
    table.logits(x, quantize=False).tanh().sum().backward()

    x_dense = x.detach().clone().requires_grad_()
    weight = table_weight(table).requires_grad_()
    (rms_norm(x_dense) @ weight.T).tanh().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(table.capture.gradient(), weight.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("tscale", ["T4", "T32", "ROW"])
def test_quantised_output_equals_integer_arithmetic_bit_for_bit(tscale):
    layer = linear(321, 17, tscale=tscale)
    x = inputs(6, 321, grad=False)
    absmax = x.abs().amax(-1, keepdim=True)
    codes = (x * (CODE_SCALE / absmax)).round().to(torch.int64)
    group = layer.tscale.group(321)
    shift = (layer.E.to(torch.int64) + 5).repeat_interleave(group, -1)[:, :321]
    sums = codes @ (layer.trits().to(torch.int64) << shift).T
    assert sums.abs().max() < 1 << 24
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / 321
    scale = absmax * (mean_square + 1e-6).rsqrt() / CODE_SCALE
    assert torch.equal(layer(x), sums.to(torch.float32) / 32 * scale)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_output_does_not_depend_on_batch_size_or_shape(size):
    layer, table = linear(161, 40, tscale="T32"), head(288, 161)
    x = inputs(7, 3, 161, grad=False)
    y, logits = layer(x), table.logits(x)
    assert (y.shape, logits.shape) == ((7, 3, 40), (7, 3, 288))
    assert torch.equal(torch.cat([layer(part) for part in x.split(size)]), y)
    assert torch.equal(torch.cat([table.logits(part) for part in x.split(size)]), logits)
    assert torch.equal(layer(x[2, 1]), y[2, 1])
    assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))
    assert layer(x[:0]).shape == (0, 3, 40)


def test_rounding_passes_the_gradient_straight_through():
    # dX of the quantised layer is that of the float layer: the same dY W through the same norm.
    layer, table = linear(161, 40), head(30, 161)
    for apply in (layer, table.logits):
        x = inputs(5, 161)
        dy = inputs(*apply(x).shape, seed=3, grad=False)
        (rounded,) = torch.autograd.grad(apply(x), x, dy)
        (smooth,) = torch.autograd.grad(apply(x, quantize=False), x, dy)
        torch.testing.assert_close(rounded, smooth, rtol=1e-5, atol=1e-6)


def test_the_captured_gradient_is_that_of_the_quantised_activations():
    layer = linear(161, 40)
    VoteOptimizer(layer)
    x, dy = inputs(5, 161, grad=False), inputs(5, 40, seed=3, grad=False)
    layer(x).backward(dy)
    absmax = x.abs().amax(-1, keepdim=True)
    quantised = (x * (CODE_SCALE / absmax)).round() * absmax / CODE_SCALE
    xq = (quantised * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(torch.float64)
    torch.testing.assert_close(
        layer.capture.gradient().to(torch.float64), dy.to(torch.float64).T @ xq, rtol=1e-5, atol=1e-5
    )


def test_an_embedding_gives_fp32_rows_and_captures_their_gradient():
    for table in (Int8Embedding(9, 6), TernaryEmbeddingTable(9, 6, tscale="T4")):
        VoteOptimizer(table)
        weight = table_weight(table) if isinstance(table, Int8Embedding) else table.decode(torch.float64)
        ids = torch.tensor([[1, 4, 1], [8, 1, 0]])
        rows = table(ids)
        assert rows.dtype == torch.float32
        assert torch.equal(rows.detach().to(torch.float64), weight[ids])
        dy = inputs(2, 3, 6, grad=False)
        rows.backward(dy)
        expected = torch.zeros(9, 6).index_add_(0, ids.flatten(), dy.flatten(0, 1))
        torch.testing.assert_close(table.capture.gradient(), expected)
        assert table.capture.gradient()[[2, 3, 5, 6, 7]].eq(0).all()


TABLES = [Int8Embedding, TernaryEmbeddingTable, functools.partial(TernaryEmbeddingTable, sparse=True)]


@pytest.mark.parametrize("make_table", TABLES, ids=["int8", "ternary", "sparse"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bad", [-1, 9])
def test_an_id_outside_the_table_is_an_error(bad, dtype, make_table):
    with pytest.raises(UserError, match=rf"the table has rows 0\.\.\.8, got the id {bad}"):
        make_table(9, 6)(torch.tensor([[3, bad]], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_ids_that_are_no_integers_are_an_error(dtype):
    with pytest.raises(UserError, match=f"ids of a table must be integers, got {dtype}"):
        Int8Embedding(9, 6)(torch.ones(3, dtype=dtype))


@pytest.mark.parametrize("make_table", TABLES, ids=["int8", "ternary", "sparse"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32], ids=str)
def test_ids_of_any_integer_type_look_up_the_same_rows(dtype, make_table):
    torch.manual_seed(0)
    table = make_table(9, 6)
    VoteOptimizer(table)
    ids = torch.tensor([[1, 0, 8], [1, 1, 4]])
    rows = table(ids)
    rows.square().sum().backward()
    capture = table.capture
    expected = [capture.touched()] if isinstance(capture, RowCapture) else [capture.gradient().clone()]
    capture.clear()
    again = table(ids.to(dtype))
    assert torch.equal(again, rows)
    again.square().sum().backward()
    actual = [capture.touched()] if isinstance(capture, RowCapture) else [capture.gradient()]
    for a, b in zip(actual, expected, strict=True):
        assert all(map(torch.equal, a, b)) if isinstance(a, tuple) else torch.equal(a, b)


def test_an_empty_look_up_is_allowed():
    assert Int8Embedding(9, 6)(torch.empty(0, 2, dtype=torch.int64)).shape == (0, 2, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_output_has_the_dtype_of_the_input(dtype):
    layer, table = linear(), head()
    x, z = inputs(3, 33, dtype=dtype), inputs(3, 20, dtype=dtype)
    for y, source in ((layer(x), x), (table.logits(z), z)):
        assert y.dtype == dtype
        y.sum().backward()
        assert source.grad.dtype == dtype


def test_autocast_sets_the_output_dtype_and_nothing_else():
    layer, table = linear(), head()
    VoteOptimizer(nn.ModuleList([layer, table]))
    x, z = inputs(3, 33), inputs(3, 20)
    plain, plain_logits = layer(x), table.logits(z)
    with torch.autocast("cpu", torch.bfloat16):
        y, logits = layer(x), table.logits(z)
    assert torch.equal(y, plain.to(torch.bfloat16))
    assert torch.equal(logits, plain_logits.to(torch.bfloat16))
    (y.sum() + logits.sum()).backward()
    assert x.grad.dtype == torch.float32
    assert layer.capture.gradient().dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"expected a last dimension of 33, got \(2, 32\)"):
        linear()(torch.zeros(2, 32))


def test_an_unknown_kind_of_table_is_named():
    with pytest.raises(UserError, match="unknown kind of table 'tail'; choose embedding or head"):
        Int8Embedding(3, 4, kind="tail")


def test_without_an_optimizer_nothing_asks_for_a_gradient():
    layer, table = linear(), Int8Embedding(9, 33)
    assert not table(torch.tensor([1])).requires_grad
    assert not layer(torch.zeros(2, 33)).requires_grad
    x = inputs(2, 33)
    layer(x).sum().backward()
    assert x.grad is not None


def test_with_an_optimizer_the_output_asks_for_a_gradient_unless_gradients_are_off():
    layer, table = linear(), Int8Embedding(9, 33)
    VoteOptimizer(nn.ModuleList([layer, table]))
    assert table(torch.tensor([1])).requires_grad
    assert layer(torch.zeros(2, 33)).requires_grad
    with torch.no_grad():
        assert not layer(torch.zeros(2, 33)).requires_grad
    with torch.inference_mode():
        assert not table(torch.tensor([1])).requires_grad


def test_double_backward_is_refused():
    layer = linear()
    x = inputs(2, 33)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("shape", [(3, 33), (2, 3, 33)], ids=str)
def test_an_output_may_be_changed_in_place(shape):
    layer = linear()
    VoteOptimizer(layer)
    x = inputs(*shape)
    expected = torch.autograd.grad(layer(x).relu().sum(), x)
    assert torch.equal(torch.autograd.grad(layer(x).relu_().sum(), x)[0], expected[0])
