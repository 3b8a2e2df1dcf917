"""What the rows of spoken words say: recipes that were run on every speaker, and ratios of contestants.

A recipe is what a run was trained with: contestant, rates, sizes, steps and what was heard. A fold is what a
run was measured on: the speaker held out, or a tenth of the recordings.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.learning.table import Row

TRITS, TWIN = "trits-full", "dense-adamw"
SETTINGS = ("equalise", "codec_steps", "steps", "dim", "codec_dim", "codes", "batch")
RECIPE = ("contestant", "lr", "codec_lr", *SETTINGS)
GOALS = {"listen": 0.75, "speak": 0.80}
GOAL_RATIO = 0.97

Rates = tuple[float, float]  # of listening or speaking, and of the codec


@dataclass(frozen=True)
class Result:
    """What a recipe reached on all folds.

    Attributes:
        recipe: value by column of `RECIPE`.
        seeds: by seed, the mean share of words right over all folds; seeds that miss a fold are left out.
    """

    recipe: dict[str, str]
    seeds: dict[int, float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return sum(self.seeds.values()) / len(self.seeds)

    @property
    def settings(self) -> tuple[str, ...]:
        """All of the recipe but the contestant and its rates."""
        return tuple(self.recipe[name] for name in SETTINGS)

    @property
    def rates(self) -> str:
        """In words."""
        return f"lr {float(self.recipe['lr']):g}, codec {float(self.recipe['codec_lr']):g}"

    def __str__(self) -> str:
        each = ", ".join(f"seed {seed}: {100 * share:.2f}" for seed, share in sorted(self.seeds.items()))
        return (
            f"{100 * self.mean:.2f} % right, {number_of_seeds(self)} ({each}): "
            f"{self.recipe['contestant']} {self.rates}, {in_words(self.recipe)}"
        )


def results(task: str, rows: Sequence[Row], folds: Collection[str] | None = None) -> list[Result]:
    """The recipes of a task that some seed has on all folds, best mean first.

    Args:
        task: listen or speak.
        rows: of the table.
        folds: what all of them are; None is every one that a row of the task has.
    """
    rows = [row for row in rows if row["task"] == task]
    wanted = {row["held_out"] for row in rows} if folds is None else set(folds)
    shares: dict[tuple[str, ...], dict[int, dict[str, float]]] = {}
    for row in rows:
        seeds = shares.setdefault(recipe_of(row), {})
        seeds.setdefault(int(row["seed"]), {})[row["held_out"]] = float(row["words_right"])
    found = []
    for recipe, seeds in shares.items():
        means = {
            seed: sum(by_fold[fold] for fold in wanted) / len(wanted)
            for seed, by_fold in seeds.items()
            if wanted and wanted <= by_fold.keys()
        }
        if means:
            found.append(Result(dict(zip(RECIPE, recipe, strict=True)), means))
    return sorted(found, key=lambda result: result.mean, reverse=True)


def recipe_of(row: Row) -> tuple[str, ...]:
    """The columns of `RECIPE`; equal numbers are equal however they are spelt."""
    lr, codec_lr = (format(float(row[name]), "g") for name in ("lr", "codec_lr"))
    return (row["contestant"], lr, codec_lr, *(row[name] for name in SETTINGS))


def summary_of_all(task: str, rows: Sequence[Row]) -> str:
    """Every recipe with all folds, the contestants' best ones, and those of equal settings, as ratios."""
    rows = [row for row in rows if row["task"] == task]
    folds = sorted({row["held_out"] for row in rows})
    found = results(task, rows)
    left_out = len({recipe_of(row) for row in rows}) - len(found)
    lines = [f"{task}, held out: {', '.join(folds) or 'nothing'}", *map(str, found)]
    if left_out:
        lines.append(f"{left_out} more without all of these")
    lines.append(f"goal: at least {100 * GOALS[task]:.0f} %")
    lines.append(f"each at its own best recipe: {compared(found)}")
    settings = dict.fromkeys(result.settings for result in found)
    for setting in settings:
        alike = [result for result in found if result.settings == setting]
        if len({result.recipe["contestant"] for result in alike}) > 1:
            lines.append(f"both with {in_words(alike[0].recipe)}: {compared(alike)}")
    return "\n".join(lines)


def compared(found: Sequence[Result]) -> str:
    """The best trits over the best twin, or why there is no ratio; `found`: of equal folds, best first."""
    best = [next((r for r in found if r.recipe["contestant"] == name), None) for name in (TRITS, TWIN)]
    trits, twin = best
    if trits is None or twin is None:
        missing = " or ".join(n for n, r in zip((TRITS, TWIN), best, strict=True) if r is None)
        return f"no ratio, no recipe of {missing} has all folds"
    told = " over ".join(
        f"{r.recipe['contestant']} {100 * r.mean:.2f} ({r.rates}, {number_of_seeds(r)})"
        for r in (trits, twin)
    )
    return f"{told}: {trits.mean / max(1e-9, twin.mean):.4f}{goal_of_ratio(trits.recipe)}"


def goal_of_ratio(recipe: Row) -> str:
    """The ratio wanted of listening, the only task with one; speaking hears nothing."""
    return f" (goal: at least {GOAL_RATIO})" if recipe["equalise"] else ""


def number_of_seeds(result: Result) -> str:
    """In words."""
    return f"{len(result.seeds)} seed{'s' if len(result.seeds) > 1 else ''}"


def in_words(recipe: Row) -> str:
    """The settings of a recipe."""
    heard = f"equalise {recipe['equalise']}, " if recipe["equalise"] else ""
    return (
        f"{heard}steps {recipe['steps']}, codec steps {recipe['codec_steps']}, dim {recipe['dim']}, "
        f"codec dim {recipe['codec_dim']}, codes {recipe['codes']}, batch {recipe['batch']}"
    )


def rates_of(row: Row) -> Rates:
    """Those that a row was measured with."""
    return float(row["lr"]), float(row["codec_lr"])


def best_rates(rows: Sequence[Row], fold: str) -> Rates:
    """The rates with the most words right on a fold."""
    return rates_of(
        max((row for row in rows if row["held_out"] == fold), key=lambda r: float(r["words_right"]))
    )


def summary_of_run(task: str, own: Mapping[str, Sequence[Row]], folds: Sequence[str]) -> str:
    """The mean share of words right at each contestant's best rates, and the ratio if both have all folds.

    Args:
        task: listen or speak.
        own: by contestant, the rows of one seed that differ in fold and rates alone.
        folds: those of the run; the rates are chosen on the first.
    """
    lines, means = [], {}
    for contestant, rows in own.items():
        if not any(row["held_out"] == folds[0] for row in rows):
            continue
        best = best_rates(rows, folds[0])
        right = {row["held_out"]: float(row["words_right"]) for row in rows if rates_of(row) == best}
        shares = {fold: right[fold] for fold in folds if fold in right}
        mean = sum(shares.values()) / len(shares)
        if len(shares) == len(folds):
            means[contestant] = mean
        each = ", ".join(f"{fold} {100 * share:.1f}" for fold, share in shares.items())
        part = "" if len(shares) == len(folds) else f", {len(shares)} of {len(folds)} folds"
        lr, codec_lr = best
        lines.append(
            f"{task} {contestant} lr {lr:g}, codec {codec_lr:g}: {100 * mean:.2f} % right ({each}){part}"
        )
    lines.append(f"goal: at least {100 * GOALS[task]:.0f} %")
    if TRITS in means and TWIN in means:
        ratio = means[TRITS] / max(1e-9, means[TWIN])
        lines.append(f"trits over float twin: {ratio:.4f} (goal of listening: at least {GOAL_RATIO})")
    elif len(own) > 1 and len(lines) > 2:
        lines.append("no ratio: not every fold has a row of both")
    return "\n".join(lines)
