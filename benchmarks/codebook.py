"""Look-up in learned codebooks of trits: recall against an exhaustive search, and time a query.

    python -m benchmarks.codebook [--device cuda] [--queries 256]

writes benchmarks/results/codebook-<device>.csv, one row a codebook. The exhaustive search shares nothing with
the look-up: distances in fp64 from differences, over all rows as they are. Recall is the share of queries
whose row is as near as the nearest, to 1e-12 of the squared distance.

Shape letters: M queries, R rows, C width.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.model.norm import rms_norm
from arbitor.model.vq import CODEBOOK_DIM
from arbitor.ternary import TernaryVQCodebook
from arbitor.train.device import Device, resolve_device
from benchmarks.common import device_name
from benchmarks.learning.table import Table

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "rows",
    "parts",
    "width",
    "weights_bytes",
    "queries",
    "recall",
    "us_per_query",
    "us_per_query_alone",
    "device",
    "torch",
    "date",
)
CODEBOOKS = ((4096, 1), (65_536, 1), (1024**2, 1), (65_536, 2), (1024**2, 2))
NUMBERS_AT_ONCE = 1 << 20
REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every codebook; exit code 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codebook", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--queries", type=int, default=256, help="size of the sample (default: 256)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    options = parser.parse_args(arguments)
    try:
        device = resolve_device(options.device)
        if options.queries < 1:
            raise UserError(f"--queries must be at least 1, got {options.queries}")
    except UserError as error:
        print(f"benchmarks.codebook: error: {error}", file=sys.stderr)
        return 2
    table = Table(options.results / f"codebook-{device.device.type}.csv", COLUMNS, ("rows", "parts"))
    for rows, parts in CODEBOOKS:
        row = measure(rows, parts, options.queries, device)
        table.put(row)
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    print(f"written to {table.path}")
    return 0


@torch.no_grad()
def measure(rows: int, parts: int, queries: int, device: Device) -> dict[str, str]:
    """One line of the table, for a codebook of random rows and queries of RMS 1."""
    torch.manual_seed(0)
    book = TernaryVQCodebook(rows, CODEBOOK_DIM, parts=parts, device=device.device)
    x_MC = rms_norm(torch.randn(queries, CODEBOOK_DIM, device=device.device))
    distance_M = (x_MC.double() - book.rows(book(x_MC).ids)).square().sum(dim=-1)
    recall = (distance_M <= nearest_distance(book, x_MC) * (1 + 1e-12)).double().mean()
    return {
        "rows": str(rows),
        "parts": str(parts),
        "width": str(CODEBOOK_DIM),
        "weights_bytes": str(sum(tensor.nbytes for tensor in book.parameters())),
        "queries": str(queries),
        "recall": f"{float(recall):.4f}",
        "us_per_query": f"{_seconds(book, x_MC, device) / queries * 1e6:.1f}",
        "us_per_query_alone": f"{_seconds(book, x_MC[:1], device) * 1e6:.1f}",
        "device": device_name(device.device),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def nearest_distance(book: TernaryVQCodebook, x_MC: Tensor) -> Tensor:
    """Squared distance to the nearest of all rows, fp64 [M]."""
    best_M = torch.full((len(x_MC),), torch.inf, dtype=torch.float64, device=x_MC.device)
    step = max(1, NUMBERS_AT_ONCE // x_MC.numel())
    for first in range(0, book.num_rows, step):
        ids_R = torch.arange(first, min(first + step, book.num_rows), device=x_MC.device)
        difference_MRC = x_MC.double()[:, None] - book.rows(ids_R)
        best_M = torch.minimum(best_M, difference_MRC.square_().sum(dim=-1).amin(dim=-1))
    return best_M


def _seconds(book: TernaryVQCodebook, x_MC: Tensor, device: Device) -> float:
    """Fastest of some forwards after a first one."""
    times = []
    for _ in range(1 + REPEATS):
        device.synchronize()
        started = time.perf_counter()
        book(x_MC)
        device.synchronize()
        times.append(time.perf_counter() - started)
    return min(times[1:])


if __name__ == "__main__":
    sys.exit(main())
