"""Sizes of the variants: computed, equal where they must be, and counted like a forward uses them."""

import dataclasses

import pytest

from arbitor.config import PRESETS
from arbitor.errors import UserError
from benchmarks.ablation.sizes import SIZES
from benchmarks.ablation.variants import ANCHOR, TOLERANCE, chosen, config_of, variants_of
from benchmarks.counts import counts

SIZE = SIZES["arb-small"]
NAMES = list(variants_of(SIZE.model))


@pytest.mark.parametrize("size", SIZES.values(), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_each_variant_is_as_large_as_what_it_is_compared_with(size, name):
    variants = variants_of(size.model)
    variant = variants[name]
    own = counts(config_of(variant, size))
    like = counts(config_of(variants[variant.like], size))
    measured, target = getattr(own, variant.measure), getattr(like, variant.measure)
    assert abs(measured / target - 1) <= TOLERANCE


def test_all_but_the_larger_peers_have_the_active_weights_of_the_preset():
    variants = variants_of(SIZE.model)
    active = {name: counts(config_of(v, SIZE)).active for name, v in variants.items()}
    larger = [name for name, count in active.items() if abs(count / active[ANCHOR] - 1) > TOLERANCE]
    assert larger == ["dense-total", "layers-work-2", "layers-work-4"]


def test_counts_are_those_of_the_formulas():
    model = PRESETS["arb-small"].model
    attention = 480 * (6 * (48 + 32) + 160 + 32) + 160 * 6 * (48 + 80) + 6 * 80 * 480
    blocks = 4 * (attention + 2 * 480 * 1920)
    expert = 2 * 480 * 2240
    shared = 2 * 480 * 9 + 3 * 480  # the bridge and the output router
    core = 8 * 480 + 2 * 480 * 72 + 480  # the experts' router, the graph's attention, the halting unit
    trigram = counts(model).total - (blocks + 9 * expert + shared + core)
    assert trigram == 3 * 480 * 480  # the sequencer
    assert counts(model).active == blocks + trigram + shared + core + 3 * expert
    assert counts(model).work == blocks + trigram + shared + 4 * (core + 3 * expert)
    memory = counts(dataclasses.replace(model, memory_rows=1 << 10))
    matrices = 2 * (8 * 160) * 480
    assert memory.total - counts(model).total == 8 * 1024 * 160 + matrices
    assert memory.active - counts(model).active == 8 * 160 + matrices


def test_parts_are_there_one_by_one():
    configs = {name: config_of(v, SIZE) for name, v in variants_of(SIZE.model).items()}
    parts = {
        name: (
            c.motif_trits > 0,
            c.num_experts > 0,
            c.max_moe_iters,
            c.graph_edges > 0,
            c.memory_rows > 0,
        )
        for name, c in configs.items()
    }
    assert parts["base"] == (False, False, 1, False, False)
    assert parts["vq"] == (True, False, 1, False, False)
    assert parts["moe"] == (False, True, 1, False, False)
    assert parts["loop-2"] == (False, False, 2, False, False)
    assert parts["loop-4"] == (False, False, 4, False, False)
    assert parts["graph"] == (True, False, 1, True, False)
    assert parts["memory"] == (False, False, 1, False, True)
    assert parts["all"] == (True, True, 4, True, True)
    assert configs[ANCHOR] == SIZE.model


def test_every_peer_exists_and_every_size_has_a_reason():
    variants = variants_of(SIZE.model)
    for variant in variants.values():
        assert set(variant.against) <= set(variants)
        assert len(variant.reason.split()) > 5


def test_a_size_that_parts_do_not_fit_into_is_refused():
    small = dataclasses.replace(SIZE, model=dataclasses.replace(SIZE.model, expert_dim=32))
    with pytest.raises(UserError, match=r"'memory' has .* more than 1 % off"):
        config_of(variants_of(small.model)["memory"], small)


def test_chosen_keeps_the_order_and_names_what_is_not_there():
    assert [v.name for v in chosen(SIZE.model, "all, base")] == ["base", "all"]
    with pytest.raises(UserError, match="unknown variant 'moo'; choose from preset, base"):
        chosen(SIZE.model, "moo")
