"""The whole model with every combination of its parts: causal, decoded as it is trained, unchanged by use."""

import copy
import functools
import itertools

import pytest
import torch

from arbitor.config import ModelConfig
from arbitor.errors import UserError
from arbitor.model import ARBModel, KVLedger
from arbitor.ternary import VoteOptimizer, named_ternary

BASE = {
    "dim": 24,
    "num_prelude_layers": 2,
    "num_heads": 2,
    "head_dim": 6,
    "rope_dim": 4,
    "value_dim": 10,
    "kv_latent_dim": 16,
    "ffn_dim": 32,
    "ctx": 24,
    "expert_dim": 16,
    "graph_neighbours": 3,
    "graph_heads": 2,
    "memory_heads": 2,
    "memory_dim": 10,
}
VQ = {"": {}, "fsq": {"motif_trits": 3}, "learned": {"codebook_rows": 9}}
MOE = {"": {}, "moe": {"num_experts": 5}}
GRAPH = {"": {}, "graph": {"graph_edges": 40}}
MEMORY = {
    "": {},
    "bytes": {"memory_rows": 13},
    "motifs": {"memory_rows": 13, "memory_over": "motifs"},
}
ROUTER = {"": {}, "router": {"output_router": True}}
CODA = {"": {}, "coda": {"num_coda_layers": 1}}
ALL = "fsq+moe+graph+motifs+router+coda"


def combinations():
    """Names of all combinations that a configuration allows; a learned codebook with router and coda only."""
    names = []
    for chosen in itertools.product(VQ, MOE, GRAPH, MEMORY, ROUTER, CODA):
        if chosen[0] == "learned" and not (chosen[-1] and chosen[-2]):
            continue
        try:
            settings_of("+".join(chosen))
        except UserError:
            continue
        names.append("+".join(filter(None, chosen)) or "none")
    return names


def settings_of(name, **overrides):
    parts = {k: v for table in (VQ, MOE, GRAPH, MEMORY, ROUTER, CODA) for k, v in table.items()}
    fields = dict(BASE)
    for part in name.replace("none", "").split("+"):
        fields |= parts[part]
    return ModelConfig(**{**fields, **overrides})


each_combination = pytest.mark.parametrize("name", combinations())
TEXT = b"the cat sat on the mat, the dog on the log; a cat, a dog. "


def text(batch=2, length=24, seed=0):
    """Windows of a text, in which n-grams and motifs come back."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(TEXT), (batch,), generator=generator).tolist()
    return torch.tensor([list((TEXT * 3)[start : start + length]) for start in starts])


@functools.cache
def trained(name, **overrides):
    """A model after two steps, so that edges, biases and counters hold something; no optimizer is attached.

    Tests share it, so whoever changes it takes a copy.
    """
    torch.manual_seed(0)
    model = ARBModel(config=settings_of(name, **overrides))
    optimizer = VoteOptimizer(model, lr=0.1)
    for step in range(2):
        ids = text(seed=step)
        model(ids, ids).loss.backward()
        optimizer.step()
    optimizer.detach()
    return model.eval()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def differing(before, after):
    assert before.keys() == after.keys()
    return [name for name in before if not torch.equal(before[name], after[name])]


def test_all_combinations_are_there():
    # Without motifs 2 x 2 x 2 x 2; with trits 2 x 2 x 3 x 2 x 2; with a learned codebook 2 x 2 x 3.
    assert len(combinations()) == 16 + 48 + 12
    assert len(set(combinations())) == len(combinations())


@each_combination
def test_causal(name):
    """Byte t is first seen by row t - 2: no row before it moves by a single bit, and that row moves.

    One text alone is compared with many in a batch, so this also shows that texts do not see each other.
    """
    model = trained(name)
    ids = text(1)
    changed = ids.repeat(24, 1)
    changed.diagonal().add_(1)
    before, after = model(ids).logits[0], model(changed).logits
    for t in range(24):
        first = max(0, t - 2)
        assert torch.equal(before[:first], after[t, :first]), f"byte {t} was seen too early"
        assert not torch.equal(before[first], after[t, first]), f"byte {t} was not seen"


@each_combination
def test_decoding_equals_the_forward(name, without_rounding):
    """Without activation rounding, in fp64: what is left is one rounding of each logit to fp32."""
    model = trained(name)
    ids = text()
    ledger = KVLedger(model.config)
    assert torch.equal(model(ids, ledger=ledger).logits, model(ids).logits), "in one piece, bit for bit"
    model = without_rounding(copy.deepcopy(model))
    full = model(ids).logits
    ledger.clear()
    rows = [model(part, ledger=ledger).logits for part in ids.split([3, 1, 1, 1, 7, 2, 9], dim=1)]
    # fp64 errors are below 1e-12 and can turn one rounding to fp32 around.
    torch.testing.assert_close(torch.cat(rows, dim=1), full, rtol=2**-23, atol=1e-12)


@each_combination
def test_use_changes_nothing(name):
    model = copy.deepcopy(trained(name))
    VoteOptimizer(model)
    before = snapshot(model)
    ids = text()
    model.eval()
    first, second = model(ids, ids), model(ids, ids)
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.loss, second.loss)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, first.logits), "training computes what evaluation does"
    model(ids, ids).loss.backward()
    assert differing(before, snapshot(model)) == [], "state changes in step() only"


@each_combination
def test_the_loss_is_the_weighted_sum_and_reaches_every_weight(name):
    torch.manual_seed(0)
    model = ARBModel(config=settings_of(name))
    optimizer = VoteOptimizer(model, lr=0.1)
    ids = text(4)
    output = model(ids, ids)
    parts = set(name.split("+"))
    expected = {"text"}
    expected |= {"ponder"} if parts & {"moe", "graph"} else set()
    expected |= {"commitment"} if "learned" in parts else set()
    expected |= {"diversity"} if "fsq" in parts else set()
    expected |= {"router"} if "router" in parts else set()
    assert set(output.losses) == expected
    weights = {"text": 1.0, "ponder": 0.001, "commitment": 1.0, "diversity": 0.3, "router": 0.01}
    total = sum(weights[key] * value.item() for key, value in output.losses.items())
    assert output.loss.item() == pytest.approx(total, rel=1e-6)
    if expected == {"text"}:
        assert torch.equal(output.loss, output.losses["text"])
    assert torch.isfinite(output.loss)
    output.loss.backward()
    missed = {key for key, module in named_ternary(model) if module.capture.empty}
    assert missed == set()
    optimizer.step()
    assert optimizer.last_step_applied
    assert all(not tensor.is_floating_point() for tensor in model.state_dict().values())


@each_combination
def test_metrics_are_those_of_the_parts(name):
    model = trained(name)
    parts = set(name.split("+"))
    expected = set()
    expected |= {"mean_iterations"} if parts & {"moe", "graph"} else set()
    expected |= {"expert_load"} if "moe" in parts else set()
    expected |= {"graph_edges", "graph_reach"} if "graph" in parts else set()
    expected |= {"motif_perplexity", "motif_dead_share"} if parts & {"fsq", "learned"} else set()
    ids = text()
    model(ids)
    assert set(model.part_metrics()) == expected
    model(ids, ids)
    assert set(model.part_metrics()) == expected | ({"router_accuracy"} if "router" in parts else set())
    for value in model.part_metrics().values():
        assert value.dim() == 0
        assert not value.requires_grad
        assert torch.isfinite(value)


# -- what only needs one model ------------------------------------------------------------------------------


def test_one_iteration_has_no_ponder_cost():
    model = trained(ALL, max_moe_iters=1)
    ids = text()
    assert "ponder" not in model(ids, ids).losses
    assert float(model.part_metrics()["mean_iterations"]) == 1


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_memory_comes_after_the_first_block(layers):
    model = trained("moe+bytes+coda", num_prelude_layers=layers)
    order, seen = [], {}
    watched = {"memory": model.memory, "core": model.core, "coda": model.coda[0]}
    watched |= {f"prelude {index}": block for index, block in enumerate(model.prelude)}
    for key, module in watched.items():

        def watch(_: object, args: tuple, output: object, key: str = key) -> None:
            order.append(key)
            seen[key] = args[0], output

        module.register_forward_hook(watch)
    model(text())
    first, *others = [f"prelude {index}" for index in range(layers)] or [None]
    assert order == [*filter(None, [first]), "memory", *others, "core", "coda"]
    h, memory = seen["memory"]
    assert torch.equal(seen[order[order.index("memory") + 1]][0], h + memory)


def test_the_ledger_keeps_the_last_two_motifs():
    model = trained("fsq+motifs")
    ledger = KVLedger(model.config)
    ids = text()
    model(ids[:, :3], ledger=ledger)
    first = ledger.motif_tail
    assert first.shape == (2, 2)
    assert (first[:, 0] == model.memory.start).all()
    model(ids[:, 3:4], ledger=ledger)
    assert torch.equal(ledger.motif_tail[:, 0], first[:, 1])
    ledger.clear()
    assert ledger.motif_tail is None


def test_the_router_learns_that_all_is_text():
    torch.manual_seed(0)
    model = ARBModel(config=settings_of("router"))
    optimizer = VoteOptimizer(model, lr=0.05)
    losses = []
    for step in range(40):
        ids = text(4, seed=step)
        output = model(ids, ids)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.losses["router"].detach()))
    assert output.modalities.shape == (4, 22, 3)
    assert losses[-1] < 0.3 * losses[0]
    assert float(model.part_metrics()["router_accuracy"]) == 1


def test_all_parts_learn_together():
    torch.manual_seed(0)
    model = ARBModel(config=settings_of(ALL))
    optimizer = VoteOptimizer(model, lr=0.05)
    ids = text(8)
    losses = []
    for _ in range(40):
        output = model(ids, ids)
        optimizer.note_loss(output.loss)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.losses["text"].detach()))
    assert optimizer.dropped_steps == 0
    assert losses[-1] < 0.5 * losses[0]
    assert 1 <= float(model.part_metrics()["mean_iterations"]) <= 4
    assert int(model.part_metrics()["graph_edges"]) > 0
    assert model.core.moe.router.balance.bias.any()


def test_generation_goes_through_all_parts():
    model = trained(ALL)
    first = model.generate(b"the cat", 40, seed=1)
    assert len(first) > 0
    assert model.generate(b"the cat", 40, seed=1) == first
