"""What the rows of spoken words say: recipes that count, their means over seeds, and the ratios given."""

from benchmarks.common import RESULTS
from benchmarks.learning.table import Table
from benchmarks.speech.__main__ import COLUMNS, KEY
from benchmarks.speech.summary import RECIPE, results, summary_of_all, summary_of_run

SIZES = {"dim": "160", "codec_dim": "160", "codes": "4", "batch": "32", "codec_steps": "3000"}
FOLDS = ("speaker:a", "speaker:b")


def runs(contestant, lr, *shares, seed=0, equalise="on", steps=3000, task="listen", folds=FOLDS):
    """A row for each share of words right, on one fold after another."""
    recipe = {"contestant": contestant, "lr": str(lr), "codec_lr": str(lr), "equalise": equalise}
    return [
        {**recipe, **SIZES, "steps": str(steps), "task": task, "seed": str(seed)}
        | {"held_out": fold, "words_right": str(share)}
        for fold, share in zip(folds, shares, strict=False)
    ]


ROWS = [
    *runs("trits-full", 0.02, 0.8, 0.6),
    *runs("trits-full", 0.02, 0.8, 0.7, seed=1),
    *runs("trits-full", 0.05, 0.6, 0.6),
    *runs("trits-full", 0.1, 0.99),  # one speaker only
    *runs("trits-full", 0.02, 0.99, seed=2),  # the same of a seed
    *runs("dense-adamw", 0.002, 0.7, 0.7),
    *runs("dense-adamw", 0.002, 0.8, 0.8, equalise="off"),
    *runs("dense-adamw", 0.002, 0.99, equalise="off", steps=1500),
]


def test_recipes_with_all_speakers_are_ranked_by_their_mean_over_seeds():
    found = results("listen", ROWS)
    assert [(r.recipe["contestant"], r.recipe["lr"], r.recipe["equalise"]) for r in found] == [
        ("dense-adamw", "0.002", "off"),
        ("trits-full", "0.02", "on"),
        ("dense-adamw", "0.002", "on"),
        ("trits-full", "0.05", "on"),
    ]
    assert found[1].seeds == {0: (0.8 + 0.6) / 2, 1: (0.8 + 0.7) / 2}
    assert found[1].mean == (0.7 + 0.75) / 2


def test_more_speakers_may_be_asked_for_than_the_rows_have():
    assert results("listen", ROWS, {*FOLDS, "speaker:c"}) == []
    assert len(results("listen", ROWS, FOLDS[:1])) == 6
    assert results("listen", []) == []


def test_ratios_are_of_the_best_recipes_and_of_equal_settings():
    lines = summary_of_all("listen", ROWS).splitlines()
    assert lines[2].startswith("72.50 % right, 2 seeds (seed 0: 70.00, seed 1: 75.00): trits-full lr 0.02")
    assert "2 more without all of these" in lines
    own, alike = lines[-2:]
    assert own.startswith(
        "each at its own best recipe: trits-full 72.50 (lr 0.02, codec 0.02, 2 seeds) over "
    )
    assert f"dense-adamw 80.00 (lr 0.002, codec 0.002, 1 seed): {0.725 / 0.8:.4f}" in own
    assert alike.startswith("both with equalise on, steps 3000")
    assert f": {0.725 / 0.7:.4f} (goal: at least 0.97)" in alike


def test_there_is_no_ratio_of_unequal_speakers():
    rows = [*runs("trits-full", 0.02, 0.9), *runs("dense-adamw", 0.002, 0.8, 0.8)]
    told = summary_of_all("listen", rows)
    assert "each at its own best recipe: no ratio, no recipe of trits-full has all folds" in told
    assert "both with" not in told
    own = {name: [row for row in rows if row["contestant"] == name] for name in ("trits-full", "dense-adamw")}
    told = summary_of_run("listen", own, FOLDS)
    assert "90.00 % right (speaker:a 90.0), 1 of 2 folds" in told
    assert "no ratio" in told
    assert "trits over float twin: 1.1250" in summary_of_run("listen", own, FOLDS[:1])


def test_rates_are_chosen_on_the_first_speaker_of_a_run():
    trits = [*runs("trits-full", 0.02, 0.7, 0.5), *runs("trits-full", 0.05, 0.6, 0.9)]
    own = {"trits-full": trits, "dense-adamw": runs("dense-adamw", 0.002, 0.8, 0.4)}
    assert "trits over float twin: 1.0000" in summary_of_run("listen", own, FOLDS)
    assert f"trits over float twin: {0.9 / 0.4:.4f}" in summary_of_run("listen", own, FOLDS[1:])


def test_speaking_has_one_fold_and_no_goal_of_a_ratio():
    one = {"task": "speak", "equalise": "", "folds": ("0.1",)}
    rows = [*runs("trits-full", 0.05, 0.9, **one), *runs("dense-adamw", 0.002, 0.9, **one), *ROWS]
    lines = summary_of_all("speak", rows).splitlines()
    assert lines[0] == "speak, held out: 0.1"
    assert lines[-2].endswith("(lr 0.002, codec 0.002, 1 seed): 1.0000")
    assert "equalise" not in summary_of_all("speak", rows)


def test_what_the_kept_rows_say_is_what_is_claimed():
    rows = Table(RESULTS / "speech-h100.csv", COLUMNS, KEY).rows()
    found = {
        tuple(r.recipe[name] for name in ("contestant", "lr", "codec_lr", "equalise", "steps")): r
        for r in results("listen", rows)
        if (r.recipe["dim"], r.recipe["codec_dim"]) == ("160", "160")
    }
    trits = found["trits-full", "0.02", "0.02", "on", "3000"]
    assert [round(100 * trits.seeds[seed], 1) for seed in (0, 1)] == [77.8, 75.6]
    assert round(100 * found["dense-adamw", "0.002", "0.002", "off", "3000"].seeds[0], 1) == 78.8
    assert len(next(iter(found.values())).recipe) == len(RECIPE)
