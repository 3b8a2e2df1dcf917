"""Mixed sequences: a prefix of another medium ahead of the bytes, through every combination of the parts."""

import copy

import pytest
import torch

from arbitor.errors import UserError
from arbitor.generate import greedy_texts
from arbitor.model import ARBModel, KVLedger
from arbitor.ternary import VoteOptimizer, named_ternary
from testing.model.test_parts import ALL, each_combination, settings_of, text, trained

IMAGE = {"image_size": 6, "image_patch": 2, "image_channels": 1}
P = 9


def sees(name, **overrides):
    return trained(name, **IMAGE, **overrides)


def images(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 1, 6, 6), dtype=torch.uint8, generator=generator)


def states(model):
    """Collects the residual stream [B, Q, D] that the last block gives, prefix included."""
    seen = []
    last = (*model.prelude, *model.coda)[-1] if model.core is None or model.coda else model.core
    last.register_forward_hook(lambda _, __, h: seen.append(h if torch.is_tensor(h) else h.state))
    return seen


@each_combination
def test_causal_behind_a_prefix(name):
    """Byte t is first seen by row t - 2, not by the prefix; place p is seen from p on, and by every row."""
    model = copy.deepcopy(sees(name))
    seen = states(model)
    ids, prefix = text(1), model.encode("image", images(1)).detach()
    # As large a batch as the changed one: how a product is split over threads may depend on its size.
    same, prefixes = ids.repeat(24, 1), prefix.repeat(24, 1, 1)
    changed = same.clone()
    changed.diagonal().add_(1)
    before = model(same, prefix=prefixes).logits
    after = model(changed, prefix=prefixes).logits
    whole, moved = seen
    for t in range(24):
        first = max(0, t - 2)
        assert torch.equal(whole[t, : P + first], moved[t, : P + first]), f"byte {t} was seen too early"
        assert torch.equal(before[t, :first], after[t, :first])
        assert not torch.equal(before[t, first], after[t, first]), f"byte {t} was not seen"
    other = prefixes.clone()
    other[range(P), range(P)] *= -1
    after = model(same, prefix=other).logits
    for p in range(P):
        assert torch.equal(whole[p, :p], seen[2][p, :p]), f"place {p} was seen too early"
        assert not torch.equal(whole[p, p], seen[2][p, p])
        # Motifs and int8 codes may round a small change away in some rows, but not in all of them.
        assert not torch.equal(before[p], after[p]), f"no byte sees place {p}"


@each_combination
def test_decoding_behind_a_prefix_equals_the_forward(name, without_rounding):
    """Without activation rounding, in fp64: what is left is one rounding of each logit to fp32."""
    model = sees(name)
    ids = text()
    prefix = model.encode("image", images()).detach()
    ledger = KVLedger(model.config, model.config.ctx - 2 + P)
    in_one_piece = model(ids, ledger=ledger, prefix=prefix).logits
    assert torch.equal(in_one_piece, model(ids, prefix=prefix).logits), "in one piece, bit for bit"
    assert ledger.num_positions == P + 22
    model = without_rounding(copy.deepcopy(model))
    prefix = prefix.double()
    full = model(ids, prefix=prefix).logits
    ledger.clear()
    assert ledger.num_positions == 0
    rows = [
        model(part, ledger=ledger, prefix=prefix if ledger.num_ids == 0 else None).logits
        for part in ids.split([3, 1, 1, 1, 7, 2, 9], dim=1)
    ]
    # fp64 errors are below 1e-12 and can turn one rounding to fp32 around.
    torch.testing.assert_close(torch.cat(rows, dim=1), full, rtol=2**-23, atol=1e-12)


@each_combination
def test_the_loss_behind_a_prefix_reaches_every_weight(name):
    torch.manual_seed(0)
    model = ARBModel(config=settings_of(name, **IMAGE))
    optimizer = VoteOptimizer(model, lr=0.1)
    ids = text(4)
    prefix = model.encode("image", images(4))
    model(ids, ids, prefix=prefix).loss.backward()
    assert {key for key, module in named_ternary(model) if module.capture.empty} == set()
    optimizer.step()
    assert optimizer.last_step_applied
    assert all(not tensor.is_floating_point() for tensor in model.state_dict().values())


# -- what only needs one model ------------------------------------------------------------------------------


def test_a_text_alone_is_what_it_is_without_a_sidecar():
    """Sidecars draw last, so that the other weights are those of the model without one."""
    ids = text()
    torch.manual_seed(3)
    without = ARBModel(config=settings_of(ALL))
    torch.manual_seed(3)
    with_image = ARBModel(config=settings_of(ALL, **IMAGE))
    assert torch.equal(without(ids, ids).loss, with_image(ids, ids).loss)
    prefix = with_image.encode("image", images())
    assert not torch.equal(without(ids).logits, with_image(ids, prefix=prefix).logits)


def test_only_masked_in_targets_count():
    model = sees(ALL)
    ids = text()
    prefix = model.encode("image", images())
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 5:9] = mask[1, 7] = True
    output = model(ids, ids, prefix=prefix, target_mask=mask)
    logits = output.logits
    rows = [(0, t) for t in range(5, 9)] + [(1, 7)]
    nats = [-logits[b, t - 3].log_softmax(-1)[ids[b, t]] for b, t in rows]
    torch.testing.assert_close(output.losses["text"], torch.stack(nats).mean())
    router = [-output.modalities[b, t - 3].log_softmax(-1)[0] for b, t in rows]
    torch.testing.assert_close(output.losses["router"], torch.stack(router).mean())
    right = [float(output.modalities[b, t - 3].argmax() == 0) for b, t in rows]
    assert float(model.part_metrics()["router_accuracy"]) == pytest.approx(sum(right) / 5)
    unmasked = model(ids, ids, prefix=prefix)
    everything = model(ids, ids, prefix=prefix, target_mask=torch.ones_like(mask))
    assert torch.equal(unmasked.loss, everything.loss)


def test_what_is_masked_out_gives_no_gradient():
    model = copy.deepcopy(sees("none"))
    VoteOptimizer(model)
    ids, prefix = text(), model.encode("image", images()).detach().requires_grad_()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[1, 4] = True
    model(ids, ids, prefix=prefix, target_mask=mask).loss.backward()
    assert not prefix.grad[0].any()
    assert prefix.grad[1].any()


def test_bytes_have_a_memory_and_places_of_the_prefix_have_none():
    model = copy.deepcopy(sees("bytes"))
    seen = []
    model.memory.register_forward_hook(lambda _, args, __: seen.append(args))
    ids = text()
    model(ids, prefix=model.encode("image", images()))
    h, grams = seen[0]
    assert h.shape[1] == 22
    assert torch.equal(grams, ids)


@pytest.mark.parametrize("name", ["none", ALL])
def test_generation_behind_a_prefix(name):
    """One image after another, and many at once, through contexts that are full and begin anew."""
    model = sees(name)
    prefix = model.encode("image", images(3))
    at_once = greedy_texts(model, prefix, 100)
    for row, found in enumerate(at_once):
        assert found == model.generate(max_bytes=21, temperature=0, prefix=prefix[row : row + 1])
        assert len(found) <= 21
    longer = model.generate(max_bytes=60, temperature=1.0, seed=3, prefix=prefix[:1])
    assert longer == model.generate(max_bytes=60, temperature=1.0, seed=3, prefix=prefix[:1])
    assert longer != model.generate(max_bytes=60, temperature=1.0, seed=3)


def test_a_prompt_behind_a_prefix_is_a_text_from_its_beginning():
    model = sees(ALL)
    prefix = model.encode("image", images(1))
    ids = torch.tensor([[256, 256, 256, *b"the cat"]])
    likeliest = model(ids, prefix=prefix).logits[0, -1, :256].argmax()
    assert model.generate(b"the cat", 1, temperature=0, prefix=prefix) == bytes([likeliest])


def test_what_cannot_be_a_prefix_is_named():
    model = sees("none")
    ids = text()
    prefix = model.encode("image", images())
    for wrong in (prefix[:1], prefix[..., :5], prefix[:, :0], prefix[0], prefix.long()):
        with pytest.raises(UserError, match=r"prefix must be a float tensor of shape \(2, positions, 24\)"):
            model(ids, prefix=wrong)
    ledger = KVLedger(model.config, 40)
    model(ids[:, :5], ledger=ledger, prefix=prefix)
    with pytest.raises(UserError, match="ahead of the first ids"):
        model(ids[:, 5:6], ledger=ledger, prefix=prefix)
    assert ledger.num_ids == 5
    with pytest.raises(UserError, match="do not fit"):
        model(ids, ledger=KVLedger(model.config), prefix=prefix)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    with pytest.raises(UserError, match="counts no target"):
        model(ids, ids, target_mask=mask)
    with pytest.raises(UserError, match="must be bool"):
        model(ids, ids, target_mask=mask.long())
    with pytest.raises(UserError, match="no targets were given"):
        model(ids, target_mask=mask)


def test_media_without_a_sidecar_are_refused():
    with pytest.raises(UserError, match=r"no sidecar for 'image' \(it has none\)"):
        trained("none").encode("image", images())
    with pytest.raises(UserError, match=r"no sidecar for 'smell' \(it has image\)"):
        sees("none").encode("smell", images())
    for wrong in (images().float(), images()[:, :, :4], images()[0], images().repeat(1, 3, 1, 1)):
        with pytest.raises(UserError, match="uint8 of shape"):
            sees("none").encode("image", wrong)
