"""Flags of the model's parts: the settings they mean, what they say about them, and what they refuse."""

import dataclasses

import pytest

from arbitor.config import MEMORY_ROWS, ModelConfig, preset
from arbitor.errors import UserError
from arbitor.flags import PartFlags, base_model, flag_of, naming_flags, put_usual

WHOLE = preset("arb-small").model
BARE = preset("tiny").model


def applied(flags, base=WHOLE):
    """The configuration that comes of it, as far as it differs from the base."""
    config = dataclasses.replace(base, **flags.settings(base))
    fields = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(config, name) for name in fields if getattr(config, name) != getattr(base, name)}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (PartFlags(), {}),
        (PartFlags(without=["moe"]), {"num_experts": 0}),
        (PartFlags(without=["vq"]), {"motif_trits": 0, "graph_edges": 0}),
        (PartFlags(without=["graph"]), {"graph_edges": 0}),
        (PartFlags(without=["moe", "vq", "graph"]), {"num_experts": 0, "motif_trits": 0, "graph_edges": 0}),
        (PartFlags(max_moe_iters=1), {"max_moe_iters": 1}),
        (PartFlags(memory=True), {"memory_rows": MEMORY_ROWS}),
        (PartFlags(memory_rows=7), {"memory_rows": 7}),
        (PartFlags(memory=True, memory_rows=7), {"memory_rows": 7}),
    ],
)
def test_flags_are_settings(flags, expected):
    assert applied(flags) == expected


def test_a_learned_codebook_is_left_out_as_well():
    learned = dataclasses.replace(WHOLE, motif_trits=0, codebook_rows=100)
    assert applied(PartFlags(without=["vq"]), learned) == {"codebook_rows": 0, "graph_edges": 0}


def test_a_memory_that_is_there_keeps_its_size():
    sized = dataclasses.replace(BARE, memory_rows=99)
    assert applied(PartFlags(memory=True), sized) == {}
    assert applied(PartFlags(memory=True, memory_rows=98), sized) == {"memory_rows": 98}
    assert applied(PartFlags(memory_rows=0), sized) == {"memory_rows": 0}


def test_a_memory_of_no_rows_is_no_memory():
    with pytest.raises(UserError, match="--enable-memory asks for a memory and --memory-rows 0 for none"):
        PartFlags(memory=True, memory_rows=0).settings(BARE)


@pytest.mark.parametrize("field", ["max_moe_iters", "memory_rows"])
def test_values_are_those_that_the_configuration_allows(field):
    with pytest.raises(UserError, match=f"^{flag_of(field)} must be between"):
        PartFlags(**{field: -1}).notes(WHOLE)


def test_errors_about_a_flag_name_it_and_others_stay():
    for message, named in (
        ("ctx must be between 4 and 9, got 3", "--ctx must be between 4 and 9, got 3"),
        ("eval_steps must be more", "--eval-steps must be more"),
        ("save must be true", "--no-save must be true"),
        ("max_bytes is -1", "--bytes is -1"),
        ("ctxx is wrong", "ctxx is wrong"),
        ("my.toml: ctx is wrong", "my.toml: ctx is wrong"),
    ):
        with pytest.raises(UserError) as error, naming_flags(["ctx", "eval_steps", "save", "max_bytes"]):
            raise UserError(message)
        assert str(error.value) == named


def test_a_command_names_its_own_flags():
    own = {"audio_samples": "--ctx"}
    assert flag_of("audio_samples", flags=own) == "--ctx"
    assert flag_of("save", flags=own) == "--no-save"
    assert flag_of("audio_samples") == "--audio-samples"
    with pytest.raises(UserError, match=r"^--ctx must be more"), naming_flags(own, own):
        raise UserError("audio_samples must be more")


def test_what_is_usual_gives_way_to_flags_and_file():
    usual = {"image_size": 8, "image_patch": 4, "image_channels": 1}
    for given, written, expected in (
        ({}, {}, usual),
        ({"image_size": 16}, {}, {**usual, "image_size": 16}),
        ({}, {"image_size": 32, "image_patch": 8}, {"image_channels": 1}),
        ({"image_channels": 3}, {"image_patch": 8}, {"image_size": 8, "image_channels": 3}),
        ({}, {"image_size": 0, "image_patch": 16}, usual),  # that of a run without images
    ):
        settings = dict(given)
        put_usual(settings, usual, written, "image_size")
        assert settings == expected


def test_notes_say_what_is_not_expected():
    vq = PartFlags(without=["vq"])
    assert vq.notes(WHOLE) == ["--disable-vq leaves the graph out as well: it links motifs"]
    assert PartFlags(without=["vq"], verb="no").notes(WHOLE)[0].startswith("--no-vq ")
    assert PartFlags(without=["vq", "graph"]).notes(WHOLE) == []
    assert vq.notes(dataclasses.replace(WHOLE, graph_edges=0)) == []
    iterations = PartFlags(max_moe_iters=2)
    assert iterations.notes(WHOLE) == []
    assert "--max-moe-iters 2 has no effect" in iterations.notes(BARE)[0]
    assert PartFlags(max_moe_iters=2, without=["moe"]).notes(WHOLE) == [], "the graph iterates"
    assert len(PartFlags(max_moe_iters=2, without=["moe", "graph"]).notes(WHOLE)) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (PartFlags(without=["moe"]), "--disable-moe contradicts the run's num_experts = 8 in run.toml"),
        (PartFlags(without=["graph", "vq"]), "--disable-vq contradicts the run's motif_trits = 9"),
        (PartFlags(memory=True), "--enable-memory contradicts the run's memory_rows = 0"),
        (PartFlags(memory_rows=5), "--memory-rows 5 contradicts the run's memory_rows = 0"),
        (PartFlags(max_moe_iters=1), "--max-moe-iters 1 contradicts the run's max_moe_iters = 4"),
    ],
)
def test_a_resumed_run_keeps_its_parts(flags, words):
    with pytest.raises(UserError, match=words):
        flags.refuse_contradiction(WHOLE, "run.toml")


def test_flags_that_a_resumed_run_was_made_with_may_be_repeated():
    config = dataclasses.replace(BARE, memory_rows=99)
    flags = PartFlags(without=["moe", "vq", "graph"], memory=True, max_moe_iters=4)
    flags.refuse_contradiction(config, "run.toml")


def test_what_flags_are_laid_over(tmp_path):
    file = tmp_path / "my.toml"
    file.write_text("[model]\nmemory_rows = 5\n")
    assert base_model(None, None) == BARE
    assert base_model("arb-small", None) == WHOLE
    assert base_model("arb-small", str(file)) == dataclasses.replace(WHOLE, memory_rows=5)
    file.write_text("preset = 'small'\n[model]\nmemory_rows = 5\n")
    assert base_model(None, str(file)) == dataclasses.replace(preset("small").model, memory_rows=5)
    assert isinstance(base_model(None, None), ModelConfig)
