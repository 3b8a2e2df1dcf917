"""Is a run of the whole model healthy? Judged from the folder that `arbitor train` leaves.

    arbitor train --preset arb-small --enable-memory --data TEXT --run healthy
    python -m benchmarks.ablation --stability runs/healthy

Shape letters: B windows of a batch, L bytes of a window.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arbitor.config import ModelConfig, RunConfig, load_config
from arbitor.data import Sampler, open_corpus
from arbitor.errors import UserError
from arbitor.model.sequencer import WINDOW
from arbitor.model.vq import motif_metrics
from arbitor.train.metrics import read_metrics
from arbitor.train.runs import CONFIG_FILE, METRICS_FILE, is_finished, read_summary

MAX_SPIKE = 1.5  # a step's loss over the running median
MEDIAN_STEPS = 50  # of the running median, the steps before
MAX_LOAD = 4.0  # of an expert, over the mean
MIN_MOTIF_SHARE = 0.2
STUCK_WITHIN = 0.05  # mean iterations this near to the least or most possible ones have no say any more
MAX_BYTES_PER_WEIGHT = {"full": 2.35, "compact": 1.85, "lean": 1.30}
LAST_SHARE = 10  # figures at the end are means over the last tenth of the readings
TRIGRAM_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Check:
    """One criterion: what was found, what is wanted, and whether it holds."""

    name: str
    found: str
    wanted: str
    met: bool

    def __str__(self) -> str:
        return f"{'ok  ' if self.met else 'FAIL'} {self.name}: {self.found} (wanted: {self.wanted})"


def command(run: Path) -> int:
    """Print the checks of a run; 0 if all hold, 1 if not.

    Raises:
        UserError: the folder is no finished run.
    """
    checks = judge(run)
    print(*checks, sep="\n")
    failed = sum(not check.met for check in checks)
    print(f"{run}: " + (f"{failed} of {len(checks)} checks failed" if failed else "stable"))
    return 1 if failed else 0


def judge(run: Path) -> list[Check]:
    """All checks of a finished run.

    Raises:
        UserError: the folder is no finished run, or its data is not there any more.
    """
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{run} is not the folder of a run; give runs/NAME of a finished `arbitor train`")
    if not is_finished(run):
        raise UserError(
            f"the run in {run} is not finished; go on with: arbitor train --resume --run {run.name}"
        )
    config = load_config(run / CONFIG_FILE)
    steps = [line for line in read_metrics(run / METRICS_FILE) if "loss" in line]
    warmup = round(config.train.warmup * config.train.steps)
    if len(steps) - warmup <= MEDIAN_STEPS:
        raise UserError(
            f"the run in {run} has {len(steps)} steps, {warmup} of them warm-up; more than {MEDIAN_STEPS} "
            "after the warm-up are needed"
        )
    after = [line for line in steps if line["step"] > warmup]
    missing = missing_parts(config.model)
    return [
        Check("parts", f"without {', '.join(missing)}" if missing else "all on", "all on", not missing),
        loss_check([line["loss"] for line in steps], warmup),
        *part_checks(config, after),
        bytes_check(config, read_summary(run)),
    ]


def missing_parts(model: ModelConfig) -> list[str]:
    """Names of the parts that a model lacks."""
    there = {
        "motifs": model.has_motifs,
        "experts": model.num_experts > 0,
        "iterations": model.max_moe_iters > 1,
        "graph": model.graph_edges > 0,
        "memory": model.memory_rows > 0,
        "output router": model.output_router,
    }
    return [name for name, on in there.items() if not on]


def loss_check(losses: Sequence[float | None], warmup: int) -> Check:
    """No loss after the warm-up above 1.5 times the median of the steps before; none that is not finite."""
    worst, at = 0.0, 0
    for step in range(max(warmup, 1), len(losses)):
        loss = losses[step]
        before = [known for known in losses[max(0, step - MEDIAN_STEPS) : step] if known is not None]
        ratio = math.inf if loss is None or not before else loss / statistics.median(before)
        if ratio > worst:
            worst, at = ratio, step + 1
    return Check(
        "loss",
        f"at most {worst:.3f} x the running median, in step {at}",
        f"<= {MAX_SPIKE} after step {warmup}",
        worst <= MAX_SPIKE,
    )


def part_checks(config: RunConfig, steps: Sequence[Mapping[str, Any]]) -> list[Check]:
    """Experts' load, use of motifs and iterations, each if the model has the part."""
    checks = []
    if config.model.num_experts:
        load = max(_readings(steps, "expert_load"))
        checks.append(Check("max load", f"{load:.2f} x mean", f"<= {MAX_LOAD:g} x", load <= MAX_LOAD))
    if config.model.has_motifs:
        perplexity = _at_end(_readings(steps, "motif_perplexity"))
        num_motifs = config.model.codebook_rows or 3**config.model.motif_trits
        trigrams = trigram_perplexity(config)
        wanted = MIN_MOTIF_SHARE * min(num_motifs, trigrams)
        checks.append(
            Check(
                "motif perplexity",
                f"{perplexity:,.0f}",
                f">= {wanted:,.0f}: a fifth of the smaller of {num_motifs:,} motifs and the trigram "
                f"perplexity {trigrams:,.0f} of as many positions",
                perplexity >= wanted,
            )
        )
    if config.model.has_core:
        iterations = _at_end(_readings(steps, "mean_iterations"))
        most = config.model.max_moe_iters
        checks.append(
            Check(
                "mean iterations",
                f"{iterations:.2f}",
                f"between 1 and {most}, at least {STUCK_WITHIN} from both",
                1 + STUCK_WITHIN <= iterations <= most - STUCK_WITHIN,
            )
        )
    return checks


def bytes_check(config: RunConfig, summary: Mapping[str, object]) -> Check:
    """Bytes kept for a weight, byte tables and all other integers included."""
    state = config.train.state
    kept = float(str(summary["bytes_per_weight"]))
    limit = MAX_BYTES_PER_WEIGHT[state]
    return Check("bytes a weight", f"{kept:.3f}", f"<= {limit} with {state} state", kept <= limit)


def trigram_perplexity(config: RunConfig) -> float:
    """Perplexity of the trigrams in a batch of the run's data, mean over some batches.

    Of as many positions as a reading of the motifs' perplexity, since both grow with the sample.
    """
    data = config.data
    corpus = open_corpus(data.data, data.held_out, data.field, min_bytes=config.model.ctx)
    sampler = Sampler(corpus.train, config.train.batch, config.model.ctx, config.train.seed)
    return statistics.fmean(_perplexity(sampler.next()) for _ in range(TRIGRAM_BATCHES))


def _perplexity(ids_BL: np.ndarray) -> float:
    first, second, third = (ids_BL[:, i : ids_BL.shape[1] - WINDOW + 1 + i] for i in range(WINDOW))
    trigrams = torch.from_numpy((first << 16) | (second << 8) | third)
    return float(motif_metrics(trigrams, 1 << 24)["motif_perplexity"])


def _readings(steps: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    found = [line[name] for line in steps if line.get(name) is not None]
    if not found:
        raise UserError(f"metrics.jsonl has no {name!r}; was the run made by another version?")
    return found


def _at_end(readings: Sequence[float]) -> float:
    return statistics.fmean(readings[-max(1, len(readings) // LAST_SHARE) :])
