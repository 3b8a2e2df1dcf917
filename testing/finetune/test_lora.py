"""Adapters on a model: what they compute, which linears get one, and that the base stays as it is."""

import pytest
import torch
import torch.nn.functional as F

from arbitor.errors import UserError
from arbitor.finetune.instructions import Message, answer_losses, collate, frame
from arbitor.finetune.lora import (
    Adapter,
    LoraLinear,
    adapter_parameters,
    attach,
    base_tensors,
    choose_modules,
    fingerprint,
    named_adapters,
)
from arbitor.ternary import TernaryLinear, VoteOptimizer, named_ternary
from arbitor.ternary.audit import audit
from arbitor.ternary.counters import named_counters
from testing.finetune.conftest import PARTS


def adapted(model, rank=3, **settings):
    torch.manual_seed(1)
    attach(model, Adapter(rank=rank, alpha=2.0 * rank, modules=choose_modules(model), **settings))
    return model


def filled(model):
    """The model with adapters that change something."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def batch():
    talk = [
        Message("user", b"how"),
        Message("assistant", b"so"),
        Message("user", b"?"),
        Message("assistant", b"!"),
    ]
    return collate([frame(talk), frame(talk[:2])])


@pytest.mark.parametrize("kind", ["ternary", "head"])
def test_an_adapter_adds_its_update_to_what_the_base_gives(make_model, kind):
    model = make_model()
    base = model.prelude[0].ffn.up if kind == "ternary" else model.head
    torch.manual_seed(0)
    lora = LoraLinear(base, rank=3, alpha=5.0)
    torch.nn.init.normal_(lora.lora_B.weight)
    x = torch.randn(2, 4, base.in_features)
    expected = base(x) + 5.0 / 3 * (x @ lora.lora_A.weight.T @ lora.lora_B.weight.T)
    torch.testing.assert_close(lora(x), expected, rtol=1e-5, atol=1e-5)
    assert lora(x).shape == (2, 4, base.out_features)


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["plain", "all parts"])
def test_a_fresh_adapter_changes_nothing_and_a_filled_one_does(make_model, parts):
    ids, _ = batch()
    with torch.no_grad():
        before = make_model(**parts)(ids).logits
        model = adapted(make_model(**parts))
        assert torch.equal(model(ids).logits, before)
        assert not torch.equal(filled(model)(ids).logits, before)


@pytest.mark.parametrize("parts", [{}, PARTS], ids=["plain", "all parts"])
def test_a_step_changes_adapters_only_and_captures_nothing(make_model, parts):
    model = adapted(make_model(**parts))
    tensors = {name: tensor.clone() for name, tensor in base_tensors(model).items()}
    before = fingerprint(model)
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.1)
    ids, is_answer = batch()
    for _ in range(2):
        answer_losses(model(ids).logits, ids, is_answer).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = base_tensors(model)
    assert after.keys() == tensors.keys() == make_model(**parts).state_dict().keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert fingerprint(model) == before
    assert all(module.capture is None for _, module in named_ternary(model))
    assert not any(counters.noting for _, counters in named_counters(model))
    still = [name for name, module in named_adapters(model) if not bool(module.lora_B.weight.any())]
    # A graph without edges, which is what a fresh one has, sends no messages that could be adapted.
    assert still == (["core.graph.query", "core.graph.out"] if parts else [])


def test_every_adapter_gets_the_gradient_of_its_own_product(make_model):
    model = adapted(make_model())
    ids, is_answer = batch()
    seen = {}
    for name, module in named_adapters(model):
        module.register_forward_hook(lambda _, given, y, name=name: seen.update({name: (given[0], y)}))
    logits = model(ids).logits
    gradients = torch.autograd.grad(
        answer_losses(logits, ids, is_answer).sum(),
        [*(y for _, y in seen.values()), *(m.lora_B.weight for _, m in named_adapters(model))],
    )
    outputs, weights = gradients[: len(seen)], gradients[len(seen) :]
    for (name, module), dy, db in zip(named_adapters(model), outputs, weights, strict=True):
        through_a = F.linear(seen[name][0], module.lora_A.weight).flatten(0, -2)
        expected = module.scaling * dy.flatten(0, -2).T @ through_a
        torch.testing.assert_close(db, expected, rtol=1e-4, atol=1e-5)


def test_the_fingerprint_sees_one_bit(make_model):
    model = make_model()
    before = fingerprint(model)
    assert before == fingerprint(make_model())
    with torch.no_grad():
        model.head.q[3, 5] ^= 1
    assert fingerprint(model) != before


def test_which_linears_get_an_adapter(make_model):
    model = make_model(**PARTS)
    chosen = choose_modules(model)
    assert {"sequencer.mix", "prelude.0.ffn.down", "core.moe.shared.up", "core.graph.out", "head"} <= set(
        chosen
    )
    for part in ("router", "vq", "core.halting", "core.moe.router", "core.moe.up"):
        assert not any(name == part or name.startswith(f"{part}.") for name in chosen)
    assert choose_modules(model, ["ffn.up"]) == ("prelude.0.ffn.up",)
    assert choose_modules(model, ["router"]) == ("core.moe.router.affinity", "router.linear")
    assert choose_modules(model, ["head", "prelude.0.ffn"]) == (
        *("prelude.0.ffn.up", "prelude.0.ffn.down", "head"),
    )
    for wrong in ("fn", "ffn.u", "embed", ""):
        with pytest.raises(UserError, match=f"--targets '{wrong}' is in no linear's name"):
            choose_modules(model, [wrong])


def test_what_cannot_have_an_adapter(make_model):
    adapter = Adapter(rank=2, alpha=4.0, modules=("head",))
    model = make_model()
    with pytest.raises(UserError, match=r"no linear 'prelude\.7'"):
        attach(model, Adapter(rank=2, alpha=4.0, modules=("prelude.7",)))
    attach(model, adapter)
    with pytest.raises(UserError, match="an adapter already"):
        attach(model, adapter)
    model = make_model()
    optimizer = VoteOptimizer(model)
    with pytest.raises(UserError, match="detach it"):
        attach(model, adapter)
    optimizer.detach()
    attach(model, adapter)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rank": 0}, "--rank"),
        ({"alpha": 0.0}, "--alpha"),
        ({"alpha": float("nan")}, "--alpha"),
        ({"dropout": 1.0}, "--dropout"),
        ({"dropout": -0.1}, "--dropout"),
    ],
)
def test_bad_shapes(settings, word):
    with pytest.raises(UserError, match=word):
        Adapter(**{"rank": 2, "alpha": 4.0, "modules": ("head",), **settings})


def test_dropout_is_on_in_training_only(make_model):
    from arbitor.finetune.lora import set_training

    model = filled(adapted(make_model(), dropout=0.5))
    ids, _ = batch()
    with torch.no_grad():
        quiet = model(ids).logits
        assert torch.equal(model(ids).logits, quiet)
        set_training(model, True)
        assert not model.training
        assert not torch.equal(model(ids).logits, quiet)
        set_training(model, False)
        assert torch.equal(model(ids).logits, quiet)


def test_the_audit_names_adapters_and_passes_on_the_base(make_model):
    model = adapted(make_model())
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    ids, is_answer = batch()
    answer_losses(model(ids).logits, ids, is_answer).mean().backward()
    optimizer.step()
    optimizer.zero_grad()  # gradients are not kept from one step to the next
    report = audit(model, optimizer)
    assert report.ok
    adapters = {row.name: row for row in report.rows if row.role == "float adapter"}
    assert adapters.keys() == parameters.keys()
    assert sum(row.weights for row in adapters.values()) == sum(p.numel() for p in parameters.values())
    assert sum(row.role == "adapter training state" for row in report.rows) == 3 * len(parameters)
    assert {
        row.dtype for row in report.rows if row.role not in {"float adapter", "adapter training state"}
    } <= {
        *("int8", "uint8", "int16", "int32", "int64"),
    }


def test_the_audit_allows_floats_in_adapters_only(make_model):
    model = adapted(make_model())
    model.prelude[0].ffn.up.register_parameter("extra", torch.nn.Parameter(torch.zeros(4, 4)))
    report = audit(model)
    assert [row.name for row in report.violations] == ["prelude.0.ffn.up.extra"]
    model = make_model()
    model.sequencer.lora_A = torch.nn.Linear(4, 4, bias=False)
    assert [row.name for row in audit(model).violations] == ["sequencer.lora_A.weight"]


def test_linears_of_the_base_are_called_as_before(make_model):
    model = adapted(make_model())
    assert all(isinstance(m.base_layer, TernaryLinear) or name == "head" for name, m in named_adapters(model))
