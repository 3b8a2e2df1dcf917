"""The variants: which parts each has, and the width that makes it comparable to the others.

A variant's size is a measure (`benchmarks.counts.Counts`) that has to be equal to another variant's; one
width of the core is solved for.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from arbitor.config import MEMORY_ROWS, ModelConfig
from arbitor.errors import UserError
from benchmarks.counts import counts
from benchmarks.learning.sizes import Size

ANCHOR = "preset"
TOLERANCE = 0.01  # how far a measure may be from its target
WIDTH_STEP = 16  # widths are multiples of it


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row of the comparison.

    Attributes:
        name: as in the results.
        reason: why it has the size that it has, in words.
        changes: fields of `ModelConfig` that differ from the preset's.
        solved: the field whose value is computed, or None.
        measure: which of `Counts` is made equal.
        like: the variant that it is made equal to.
        against: the variants whose difference from this one tells what the part is worth.
    """

    name: str
    reason: str
    changes: Mapping[str, Any]
    solved: str | None = None
    measure: str = "active"
    like: str = ANCHOR
    against: tuple[str, ...] = ("base",)


_NO_PARTS: dict[str, Any] = {
    "motif_trits": 0,
    "graph_edges": 0,
    "memory_rows": 0,
    "output_router": False,
    "num_experts": 0,
    "max_moe_iters": 1,
}


def variants_of(preset: ModelConfig) -> dict[str, Variant]:
    """All variants of a preset that has motifs, experts, several iterations and a graph."""
    trits, edges, experts = preset.motif_trits, preset.graph_edges, preset.num_experts
    memory = {"memory_rows": preset.memory_rows or MEMORY_ROWS}
    all_variants = (
        Variant(
            name=ANCHOR,
            reason="the preset as it is: every core part, no n-gram memory; the others are made like it",
            changes={},
        ),
        Variant(
            name="base",
            reason="attention and feed-forward alone; a dense feed-forward part stands where the experts "
            "were, as wide as the weights that a position used there",
            changes=_NO_PARTS,
            solved="core_ffn_dim",
            against=(),
        ),
        Variant(
            name="vq",
            reason="base and motifs; the core gives up what the bridge's two matrices take",
            changes={**_NO_PARTS, "motif_trits": trits},
            solved="core_ffn_dim",
        ),
        Variant(
            name="graph",
            reason="base, motifs and their graph, which needs motifs; its own worth is the difference to vq",
            changes={**_NO_PARTS, "motif_trits": trits, "graph_edges": edges},
            solved="core_ffn_dim",
            against=("vq", "base"),
        ),
        Variant(
            name="moe",
            reason="base with experts in place of the dense part, of the same weights a position",
            changes={**_NO_PARTS, "num_experts": experts},
            solved="expert_dim",
            against=("base", "dense-total"),
        ),
        Variant(
            name="dense-total",
            reason="base with a dense part as large as all experts of moe together: the same memory, more "
            "work; what moe is to come near to",
            changes=_NO_PARTS,
            solved="core_ffn_dim",
            measure="total",
            like="moe",
        ),
        *(
            Variant(
                name=f"loop-{iters}",
                reason=f"base whose core may be iterated up to {iters} times; the weights stay the same, the "
                "work grows with the iterations that positions take (one iteration is base)",
                changes={**_NO_PARTS, "max_moe_iters": iters},
                solved="core_ffn_dim",
                against=("base", f"layers-work-{iters}", "layers"),
            )
            for iters in (2, 4)
        ),
        Variant(
            name="layers",
            reason="base with two more blocks and a narrower core: deeper at the same weights",
            changes={**_NO_PARTS, **_blocks(preset, 1, 1)},
            solved="core_ffn_dim",
        ),
        Variant(
            name="layers-work-2",
            reason="base with two more blocks, and a wider core for the rest of the work that two iterations "
            "of the core would be: more layers instead of iterations, at the price of more weights",
            changes={**_NO_PARTS, **_blocks(preset, 1, 1)},
            solved="core_ffn_dim",
            measure="work",
            like="loop-2",
        ),
        Variant(
            name="layers-work-4",
            reason="base with six more blocks, and a wider core for the rest of the work that four "
            "iterations would be, were they all taken",
            changes={**_NO_PARTS, **_blocks(preset, 3, 3)},
            solved="core_ffn_dim",
            measure="work",
            like="loop-4",
        ),
        Variant(
            name="memory",
            reason="base and the n-gram memory; its rows are stored, of which a position reads a few, and "
            "the core gives up what those and its two matrices take",
            changes={**_NO_PARTS, **memory},
            solved="core_ffn_dim",
        ),
        Variant(
            name="all",
            reason="the preset and the n-gram memory, the experts narrower by what the memory takes",
            changes=memory,
            solved="expert_dim",
            against=("base", ANCHOR),
        ),
    )
    return {variant.name: variant for variant in all_variants}


def chosen(preset: ModelConfig, names: str | None) -> list[Variant]:
    """The variants of a comma-separated list, in the order of `variants_of`; all for None.

    Raises:
        UserError: one of them does not exist.
    """
    known = variants_of(preset)
    if names is None:
        return list(known.values())
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise UserError(f"unknown variant {name!r}; choose from {', '.join(known)}")
    return [variant for name, variant in known.items() if name in wanted]


def config_of(variant: Variant, size: Size) -> ModelConfig:
    """The variant's model, its width solved for.

    Raises:
        UserError: no width brings the measure within 1 % of its target: the parts alone are too large.
    """
    return _config_of(variant.name, size.model)


@cache
def _config_of(name: str, preset: ModelConfig) -> ModelConfig:
    variants = variants_of(preset)
    variant = variants[name]
    config = dataclasses.replace(preset, **variant.changes)
    field = variant.solved
    if field is None:
        return config
    target = _measured(_config_of(variant.like, preset), variant.measure)

    def at(width: int) -> ModelConfig:
        change: dict[str, Any] = {field: width}
        return dataclasses.replace(config, **change)

    # A measure is a linear function of a width.
    low, high = (_measured(at(width), variant.measure) for width in (WIDTH_STEP, 2 * WIDTH_STEP))
    width = WIDTH_STEP * max(1, 1 + round((target - low) / (high - low)))
    solved = at(width)
    reached = _measured(solved, variant.measure)
    if abs(reached / target - 1) > TOLERANCE:
        raise UserError(
            f"variant {name!r} has {reached:,} {variant.measure} trits at its nearest width "
            f"({field} = {width}), more than 1 % off the {target:,} of {variant.like!r}; use a larger size"
        )
    return solved


def _measured(config: ModelConfig, measure: str) -> int:
    return int(getattr(counts(config), measure))


def _blocks(preset: ModelConfig, prelude: int, coda: int) -> dict[str, int]:
    """That many blocks more."""
    return {
        "num_prelude_layers": preset.num_prelude_layers + prelude,
        "num_coda_layers": preset.num_coda_layers + coda,
    }
