"""How large the comparison is: the preset whose parts are taken apart, steps and data."""

from arbitor.config import PRESETS, ModelConfig
from benchmarks.learning.sizes import Size

SIZES = {
    size.name: size
    for size in (
        # Shows on a CPU that every variant runs; its figures mean nothing.
        Size(
            name="tiny",
            model=ModelConfig(
                dim=160,
                num_prelude_layers=1,
                num_coda_layers=1,
                ffn_dim=320,
                ctx=64,
                motif_trits=6,
                num_experts=4,
                expert_dim=640,
                graph_edges=1 << 12,
                output_router=True,
                memory_rows=0,
            ),
            steps=30,
            batch=4,
            corpus="library",
            held_out_bytes=4_000,
        ),
        # 31 MB, each byte of the text at most about once.
        Size(
            name="arb-small",
            model=PRESETS["arb-small"].model,
            steps=1900,
            batch=64,
            corpus="packages",
            held_out_bytes=1_000_000,
        ),
    )
}
