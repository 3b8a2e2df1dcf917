"""How large the comparison is: model, tokens and data of each `--size`."""

from dataclasses import dataclass

from arbitor.config import PRESETS, ModelConfig


@dataclass(frozen=True)
class Size:
    """A scale at which all contestants are trained alike.

    Attributes:
        name: value of `--size`.
        model: architecture.
        steps: optimizer steps.
        batch: windows a step.
        corpus: "library" (Python's own sources), "packages" (those and all installed ones), or "given"
            (needs `--data`).
        held_out_bytes: bytes that the final figure is measured on.
        track_every: steps between evaluations of which the best counts; 0 evaluates at the end only.
        jobs: worker processes unless `--jobs` says otherwise.
    """

    name: str
    model: ModelConfig
    steps: int
    batch: int
    corpus: str
    held_out_bytes: int
    track_every: int = 0
    jobs: int = 1  # replayed steps keep a GPU busy, and beside others' they have crashed (docs/kernels.md)

    @property
    def bytes_seen(self) -> int:
        """Bytes that one run is trained on."""
        return self.steps * self.batch * self.model.ctx


_GPU_MODEL = ModelConfig(
    dim=480,
    num_prelude_layers=3,
    num_heads=6,
    head_dim=48,
    rope_dim=32,
    value_dim=80,
    kv_latent_dim=160,
    ffn_dim=1920,
    ctx=256,
)

SIZES = {
    size.name: size
    for size in (
        # 0.3 M trunk weights on 0.12 MB: tens of seconds a run on one core, so that a sweep takes minutes.
        # It shows that everything learns, and the order of the contestants at a very early stage, no more.
        Size(
            name="cpu",
            model=ModelConfig(dim=160, num_prelude_layers=1, ffn_dim=320, ctx=128),
            steps=120,
            batch=8,
            corpus="library",
            held_out_bytes=50_000,
            jobs=2,
        ),
        # 8.2 M trunk weights on 16.4 MB.
        Size(
            name="gpu",
            model=_GPU_MODEL,
            steps=1000,
            batch=64,
            corpus="packages",
            held_out_bytes=1_000_000,
        ),
        # The preset `small` on a text of about 1 MB, which it can learn by heart: the best point counts.
        Size(
            name="shakespeare",
            model=PRESETS["small"].model,
            steps=600,
            batch=64,
            corpus="given",
            held_out_bytes=1_000_000,
            track_every=50,
        ),
    )
}
