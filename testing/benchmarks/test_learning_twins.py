"""Float twins: what they replace, what they keep, and the arithmetic of their layers."""

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.model import ARBModel
from arbitor.ternary import Int8Embedding, TernaryLinear
from benchmarks.learning.twins import BitLinear, DenseLinear, FloatTable, make_twin, rms_norm

MICRO = ModelConfig(
    dim=32,
    num_prelude_layers=1,
    num_coda_layers=1,
    num_heads=2,
    head_dim=8,
    rope_dim=4,
    value_dim=16,
    kv_latent_dim=16,
    ffn_dim=48,
    ctx=16,
)
CPU = torch.device("cpu")


@pytest.mark.parametrize("linear", [DenseLinear, BitLinear])
def test_a_twin_differs_only_in_the_replaced_modules(linear):
    model, twin = ARBModel(config=MICRO), ARBModel(config=MICRO)
    make_twin(twin, linear)
    originals, replaced = dict(model.named_modules()), dict(twin.named_modules())
    assert originals.keys() == replaced.keys()
    for name, module in originals.items():
        if isinstance(module, TernaryLinear):
            assert type(replaced[name]) is linear, name
            assert replaced[name].weight.shape == (module.out_features, module.in_features), name
        elif isinstance(module, Int8Embedding):
            assert type(replaced[name]) is FloatTable, name
            assert replaced[name].weight.shape == module.q.shape, name
        else:
            assert type(replaced[name]) is type(module), name
    assert twin.config == model.config
    assert all(p.dtype == torch.float32 and p.requires_grad for p in twin.parameters())


def test_weights_start_with_the_magnitudes_of_the_trits():
    torch.manual_seed(0)
    model = ARBModel(preset="tiny")
    spread = {
        name: m.decode().std().item() for name, m in model.named_modules() if isinstance(m, TernaryLinear)
    }
    make_twin(model, DenseLinear)
    for name, trit_std in spread.items():
        module = model.get_submodule(name)
        assert module.weight.std().item() == pytest.approx(module.in_features**-0.5, rel=0.02), name
        # The trits' scale is a power of two, so it can be off by half an octave.
        assert 2**-0.6 < trit_std / module.weight.std().item() < 2**0.6, name
    assert model.embed.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.head.weight.std().item() == pytest.approx(model.config.dim**-0.5, rel=0.02)


def test_twin_and_model_take_the_same_path():
    ids = torch.randint(0, 256, (2, MICRO.ctx))
    twin = ARBModel(config=MICRO)
    make_twin(twin, DenseLinear)
    out = twin(ids, targets=ids)
    assert out.logits.shape == (2, MICRO.ctx - 2, MICRO.vocab_size)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())


def test_dense_linear_is_the_norm_and_the_product():
    torch.manual_seed(0)
    layer, x = DenseLinear(24, 10, CPU), torch.randn(5, 24)
    expected = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()) @ layer.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_bitlinear_multiplies_trits_and_int8_codes():
    torch.manual_seed(0)
    layer, x = BitLinear(40, 12, CPU), torch.randn(7, 40)
    mean_size = layer.weight.abs().mean()
    trits = (layer.weight / mean_size).round().clamp(-1, 1)
    assert set(trits.unique().tolist()) == {-1.0, 0.0, 1.0}
    normed = rms_norm(x)
    step = normed.abs().amax(-1, keepdim=True) / 127
    codes = (normed / step).round()
    torch.testing.assert_close(layer(x), (codes @ trits.T) * step * mean_size, rtol=1e-5, atol=1e-6)


def test_bitlinear_gradients_pass_straight_through():
    torch.manual_seed(0)
    layer, x = BitLinear(40, 12, CPU), torch.randn(7, 40, requires_grad=True)
    dy = torch.randn(7, 12)
    layer(x).backward(dy)
    mean_size = layer.weight.detach().abs().mean()
    trits = (layer.weight.detach() / mean_size).round().clamp(-1, 1)
    normed = rms_norm(x.detach())
    step = normed.abs().amax(-1, keepdim=True) / 127
    codes = (normed / step).round()
    # dW as if the weight had been used as it is, with the activations that were really multiplied.
    torch.testing.assert_close(layer.weight.grad, dy.T @ (codes * step), rtol=1e-5, atol=1e-6)
    leaf = x.detach().requires_grad_()
    rms_norm(leaf).backward(dy @ (trits * mean_size))
    torch.testing.assert_close(x.grad, leaf.grad, rtol=1e-5, atol=1e-6)


def test_float_table_looks_up_and_projects():
    table = FloatTable(9, 6, 0.5, CPU)
    ids = torch.tensor([[3, 8], [0, 3]])
    assert torch.equal(table(ids), table.weight[ids])
    x = torch.randn(2, 6)
    torch.testing.assert_close(table.logits(x), rms_norm(x) @ table.weight.T)
