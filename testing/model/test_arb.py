import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arbitor.config import MEMORY_ROWS, ModelConfig, preset
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import TernaryLinear, VoteOptimizer, named_ternary
from arbitor.ternary.audit import audit


def test_logits_are_fp32_of_all_positions(make_model, make_ids):
    output = make_model()(make_ids(2, 11))
    assert output.logits.shape == (2, 9, 288)
    assert output.logits.dtype == torch.float32
    assert output.loss is None
    assert torch.isfinite(output.logits).all()


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("t", [0, 1, 2, 3, 10, 22, 23])
def test_causal(make_model, make_ids, window, t):
    """Position t is first seen by row t - 2: no row before it moves by a single bit, and that row moves."""
    model = make_model(attention_window=window)
    ids = make_ids(2, 24)
    changed = ids.clone()
    changed[:, t] = (changed[:, t] + 1 + torch.arange(2) * 100) % 288
    before, after = model(ids).logits, model(changed).logits
    first = max(0, t - 2)
    assert torch.equal(before[:, :first], after[:, :first])
    assert (before[:, first] != after[:, first]).any(dim=-1).all()


def test_window_limits_what_is_seen(make_model, make_ids):
    """Three layers with a window of 3 positions reach back 3 * 2 positions and the trigram 2 more bytes."""
    model = make_model(attention_window=3)
    ids = make_ids(1, 24)
    changed = ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 288
    moved = (model(ids).logits != model(changed).logits).any(dim=-1)[0].nonzero().flatten().tolist()
    # Byte 4 enters rows 2, 3 and 4.
    assert moved[0] == 2
    assert moved[-1] <= 4 + 3 * 2


def test_loss_is_the_mean_over_positions_three_and_later(make_model, make_ids):
    model = make_model()
    ids, targets = make_ids(2, 9), make_ids(2, 9, seed=1)
    output = model(ids, targets)
    log_p = output.logits.double().log_softmax(-1)
    terms = [-float(log_p[b, i, targets[b, i + 3]]) for b in range(2) for i in range(6)]
    assert output.loss.dtype == torch.float32
    # fp32 log-softmax over 288 logits and a mean of 12.
    assert float(output.loss) == pytest.approx(math.fsum(terms) / 12, rel=300 * 2**-24)


def test_rows_of_a_batch_do_not_see_each_other(make_model, make_ids):
    model = make_model()
    ids = make_ids(3, 16)
    whole = model(ids).logits
    for row in range(3):
        assert torch.equal(model(ids[row : row + 1]).logits[0], whole[row])


def test_names_of_the_parameters_are_those_of_the_checkpoints(make_model):
    attention = [f"attention.{name}" for name in ("query", "kv_down", "kv_up", "out")]
    parts = [*attention, "ffn.up", "ffn.down"]
    blocks = [f"{stack}.{part}" for stack in ("prelude.0", "prelude.1", "coda.0") for part in parts]
    assert [name for name, _ in named_ternary(make_model())] == ["embed", "sequencer.mix", *blocks, "head"]


def test_no_float_is_kept(make_model):
    model = make_model()
    assert all(not tensor.is_floating_point() for tensor in model.state_dict().values())
    assert list(model.buffers()) == [] or all(not buffer.is_floating_point() for buffer in model.buffers())


def test_equal_seeds_make_equal_models(make_model):
    first, second, other = make_model().state_dict(), make_model().state_dict(), make_model(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_learns_a_repeated_text(make_model):
    model = make_model()
    optimizer = VoteOptimizer(model, lr=0.05)
    text = b"the quick brown fox jumps over "
    ids = torch.tensor([list((text * 3)[k : k + 32]) for k in range(8)])
    losses = []
    for _ in range(30):
        output = model(ids, ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < 0.25 * losses[0]


def test_layers_can_be_replaced_by_float_twins(make_model, make_ids):
    class FloatTable(nn.Module):
        def __init__(self, table):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(table.num_embeddings, table.dim) / 8)

        def forward(self, ids):
            return F.embedding(ids, self.weight)

        def logits(self, x):
            return x @ self.weight.T

    model = make_model()
    for name, module in list(named_ternary(model)):
        parent, _, attribute = name.rpartition(".")
        if isinstance(module, TernaryLinear):
            twin = nn.Linear(module.in_features, module.out_features, bias=False)
        else:
            twin = FloatTable(module)
        setattr(model.get_submodule(parent), attribute, twin)
    ids = make_ids(2, 12)
    model(ids, ids).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert len(gradients) == 21
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_other_integer_types_are_taken(make_model, make_ids):
    model = make_model()
    ids = make_ids(1, 8) % 256
    assert torch.equal(model(ids).logits, model(ids.to(torch.uint8)).logits)
    assert torch.equal(model(ids).logits, model(ids.to(torch.int32)).logits)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int64), "length 2.*at least 3.*pad"),
        (torch.tensor([[1, 2, 3, 288]]), "contain 288; allowed are 0 to 287"),
        (torch.tensor([[1, -1, 3, 2]]), "contain -1"),
        (torch.zeros(5, dtype=torch.int64), r"shape \(batch, length\), got torch.int64 \(5,\)"),
        (torch.zeros(1, 5), "integer tensor"),
        (torch.zeros(1, 5, dtype=torch.bool), "integer tensor"),
        (torch.zeros(0, 5, dtype=torch.int64), "holds nothing"),
        ([[1, 2, 3]], "got list"),
    ],
)
def test_bad_ids_are_named(make_model, ids, message):
    with pytest.raises(UserError, match=message):
        make_model()(ids)


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64), "at least 4"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), r"\(1, 4\).*\(1, 5\)"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.full((1, 5), 300), "targets contain 300"),
    ],
)
def test_bad_targets_are_named(make_model, ids, targets, message):
    with pytest.raises(UserError, match=message):
        make_model()(ids, targets)


def test_preset_and_overrides():
    model = ARBModel("tiny", ctx=64, num_prelude_layers=1)
    assert (model.config.dim, model.config.ctx, len(model.prelude)) == (160, 64, 1)
    assert ARBModel(config=ModelConfig(dim=40), ctx=9).config.ctx == 9


def test_without_arguments_it_is_arb_1b():
    model = ARBModel(device="meta")
    assert model.config == preset("arb-1b").model
    parts = (model.vq, model.core, model.core.moe, model.core.graph, model.router)
    assert all(part is not None for part in parts)
    assert model.memory is None


def test_the_memory_is_one_word():
    assert ARBModel("arb-small", device="meta", enable_memory=True).config.memory_rows == MEMORY_ROWS
    assert ARBModel("tiny", enable_memory=True, memory_rows=5).config.memory_rows == 5
    without = ARBModel("tiny", enable_memory=False, memory_rows=5)
    assert without.memory is None
    assert without.config == preset("tiny").model
    assert ARBModel("tiny", memory_rows=5).memory is not None


def test_parts_are_left_out_by_their_settings():
    model = ARBModel(
        "arb-small", device="meta", num_experts=0, graph_edges=0, motif_trits=0, output_router=False
    )
    assert all(part is None for part in (model.vq, model.core, model.memory, model.router))
    straight = ARBModel(config=model.config, device="meta", num_prelude_layers=4, num_coda_layers=0)
    assert straight.state_dict().keys() == ARBModel("small", device="meta").state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "tiny", "config": ModelConfig()}, "either.*not both"),
        ({"preset": "tinny"}, "tiny"),
        ({"preset": "tiny", "ctxx": 3}, "no field 'ctxx'.*ctx"),
        ({"preset": "tiny", "ctx": 3}, "ctx"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        ARBModel(**arguments)


def test_a_live_model_with_all_parts_passes_the_audit(make_ids):
    torch.manual_seed(0)
    model = ARBModel("arb-small", dim=32, ffn_dim=64, expert_dim=64, kv_latent_dim=32, graph_edges=64)
    optimizer = VoteOptimizer(model)
    ids = make_ids(2, 12)
    model(ids, targets=ids).loss.backward()
    optimizer.step()
    report = audit(model, optimizer)
    assert report.ok, report.violations
