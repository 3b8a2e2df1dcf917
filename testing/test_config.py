import contextlib
import dataclasses
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arbitor import config as cfg
from arbitor.config import (
    PRESETS,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    dump_toml,
    load_config,
    override,
    preset,
    read_toml,
)
from arbitor.errors import UserError

# A hypothesis test shares one tmp_path; every example overwrites the same file, which is what is wanted.
same_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def trunk_weights(m: ModelConfig) -> int:
    """Weights in ternary matrices of the trunk, from the architecture's definition."""
    attention = (
        m.dim * m.num_heads * (m.head_dim + m.rope_dim)
        + m.dim * (m.kv_latent_dim + m.rope_dim)
        + m.kv_latent_dim * m.num_heads * (m.head_dim + m.value_dim)
        + m.num_heads * m.value_dim * m.dim
    )
    layers = m.num_prelude_layers + m.num_coda_layers
    return 3 * m.dim * m.dim + layers * (attention + 2 * m.dim * m.ffn_dim)


def part_weights(m: ModelConfig) -> dict[str, int]:
    """The same of the parts: mixture of experts with what iterates it; VQ bridge and graph; output router."""
    experts = (m.num_experts + 1) * 2 * m.dim * m.expert_dim + m.num_experts * m.dim
    halting = m.dim if m.max_moe_iters > 1 else 0
    motifs = 2 * m.dim * m.motif_trits
    graph = 2 * m.dim * m.graph_heads * m.motif_trits
    return {"moe": experts + halting, "motifs": motifs + graph, "router": 3 * m.dim}


def test_preset_sizes_follow_the_design():
    assert trunk_weights(preset("tiny").model) == pytest.approx(0.7e6, rel=0.1)
    assert trunk_weights(preset("small").model) == pytest.approx(10e6, rel=0.1)
    assert trunk_weights(preset("base").model) == pytest.approx(124.0e6, rel=0.02)
    model = preset("arb-1b").model
    parts = part_weights(model)
    core = trunk_weights(model) + parts["router"]
    assert core == pytest.approx(124.0e6, rel=0.01)
    assert core + parts["moe"] == pytest.approx(1246e6, rel=0.02)
    assert core + parts["moe"] + parts["motifs"] == pytest.approx(1268e6, rel=0.02)
    model = preset("arb-small").model
    assert trunk_weights(model) + sum(part_weights(model).values()) == pytest.approx(30e6, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_the_audit_counts_the_weights_of_the_definition(name):
    from arbitor.model import ARBModel
    from arbitor.ternary.audit import audit

    model = preset(name).model
    counted = audit(ARBModel(name, device="meta")).trit_weights
    parts = part_weights(model).values() if model.num_experts else ()
    assert counted == trunk_weights(model) + sum(parts)


def test_presets_with_parts_have_all_of_the_core():
    for name in ("arb-small", "arb-1b"):
        model = preset(name).model
        assert model.motif_trits == 9
        assert model.num_active_experts == 2
        assert model.max_moe_iters == 4
        assert model.graph_edges > 0
        assert model.output_router
        assert model.memory_rows == 0, "opt-in"
    assert preset("arb-1b").model.num_experts == 32
    assert preset("arb-1b").train.state == "lean"
    assert preset("arb-small").model.num_experts == 8
    assert preset("arb-small").train.state == "full"
    for name in ("tiny", "small", "base"):
        model = preset(name).model
        assert not any((model.has_motifs, model.has_core, model.memory_rows, model.output_router))


@pytest.mark.parametrize(("split", "straight"), [("arb-1b", "base"), ("arb-small", "small")])
def test_presets_with_parts_split_the_trunk_of_those_without(split, straight):
    split, straight = preset(split).model, preset(straight).model
    assert split.num_prelude_layers == split.num_coda_layers
    assert split.num_prelude_layers + split.num_coda_layers == straight.num_prelude_layers
    for field in ("dim", "num_heads", "head_dim", "rope_dim", "value_dim", "kv_latent_dim", "ffn_dim", "ctx"):
        assert getattr(split, field) == getattr(straight, field)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_widths_pack_without_padding(name):
    model = preset(name).model
    widths = [model.dim, model.ffn_dim, model.kv_latent_dim, model.num_heads * model.value_dim]
    for width in (*widths, model.expert_dim, model.memory_dim):
        assert width % 160 == 0


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_optional_settings_unset(name):
    # Unset settings are absent from TOML, so a preset that set one could not be told from one that did not.
    config = preset(name)
    assert config.preset == name
    assert (config.train.lr, config.train.accum_threshold, config.data.held_out) == (None, None, None)


def test_override_reaches_every_section_and_leaves_the_preset_alone():
    config = preset("tiny", dim=320, steps=7, data=["a.txt"], lr=1)
    assert (config.model.dim, config.train.steps, config.data.data, config.train.lr) == (
        320,
        7,
        ("a.txt",),
        1.0,
    )
    assert PRESETS["tiny"].model.dim == 160
    assert override(config) is config


def test_every_setting_is_documented_in_its_class():
    for cls in (*cfg.SECTIONS.values(), RunConfig):
        for f in dataclasses.fields(cls):
            assert f"\n        {f.name}: " in (cls.__doc__ or ""), f"{cls.__name__}.{f.name}"


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: preset("tinny"), ["'tinny'", "did you mean 'tiny'", "small", "base"]),
        (lambda: preset("tiny", stpes=1), ["'stpes'", "did you mean 'steps'"]),
        (lambda: TrainConfig(state="ful"), ["state", "lean, compact, full", "did you mean 'full'"]),
        (lambda: TrainConfig(rule="adam"), ["rule", "spectral"]),
        (lambda: TrainConfig(steps=0), ["steps", "between 1", "got 0"]),
        (lambda: TrainConfig(steps=True), ["steps", "an integer", "True"]),
        (lambda: TrainConfig(steps=1.5), ["steps", "an integer", "1.5 (float)"]),
        (lambda: TrainConfig(lr=0.0), ["lr", "above 0"]),
        (lambda: TrainConfig(lr=float("nan")), ["lr", "finite"]),
        (lambda: TrainConfig(warmup=1.5), ["warmup", "between 0 and 1"]),
        (lambda: TrainConfig(seed=-1), ["seed", "-1"]),
        (lambda: TrainConfig(seed=10**5000), ["seed", "bits"]),
        (lambda: TrainConfig(accum_threshold=128), ["accum_threshold", "127"]),
        (lambda: TrainConfig(save="yes"), ["save", "true or false"]),
        (lambda: TrainConfig(device="gpu"), ["device", "auto, cpu, cuda"]),
        (lambda: ModelConfig(ctx=3), ["ctx", "between 4"]),
        (lambda: ModelConfig(dim=0), ["dim", "between 1"]),
        (lambda: ModelConfig(rope_dim=3), ["rope_dim", "even"]),
        (lambda: ModelConfig(num_prelude_layers=0), ["at least one layer"]),
        (lambda: ModelConfig(rope_theta=0.5), ["rope_theta"]),
        (lambda: ModelConfig(tscale="T5"), ["tscale", "T4", "ROW"]),
        (lambda: ModelConfig(motif_trits=16), ["motif_trits", "between 0 and 15"]),
        (lambda: ModelConfig(codebook_rows=4097), ["codebook_rows is 4097", "4096 or 4225"]),
        (lambda: ModelConfig(motif_trits=3, codebook_rows=9), ["motif_trits is 3", "codebook_rows 9"]),
        (lambda: ModelConfig(num_experts=2, num_active_experts=3), ["num_active_experts", "1 and 2"]),
        (lambda: ModelConfig(max_moe_iters=0), ["max_moe_iters", "between 1"]),
        (lambda: ModelConfig(halt_threshold=0.0), ["halt_threshold", "above 0"]),
        (lambda: ModelConfig(ponder_weight=-0.1), ["ponder_weight", "between 0"]),
        (lambda: ModelConfig(graph_edges=10), ["graph_edges", "set motif_trits"]),
        (lambda: ModelConfig(num_experts=4, core_ffn_dim=8), ["core_ffn_dim", "one of them to 0"]),
        (lambda: ModelConfig(memory_rows=10, memory_over="motifs"), ["memory_over", "motif_trits"]),
        (lambda: ModelConfig(memory_over="words"), ["memory_over", "bytes, motifs"]),
        (lambda: DataConfig(data=3), ["data", "list of strings"]),
        (lambda: DataConfig(data=["", "x"]), ["empty path"]),
        (lambda: DataConfig(held_out=""), ["held_out", "fraction"]),
        (lambda: DataConfig(field=""), ["field"]),
        (lambda: DataConfig(data=("\udcff",)), ["data", "Unicode"]),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(call, parts):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
run_configs = st.builds(
    override,
    st.sampled_from(list(PRESETS.values())),
    dim=st.integers(1, 1 << 20),
    ctx=st.integers(4, 1 << 24),
    rope_theta=st.floats(1.0, 1e12, exclude_min=True),
    tscale=st.sampled_from(cfg.TSCALES),
    steps=st.integers(1, 1 << 31),
    lr=st.none() | st.floats(0.0, 100.0, exclude_min=True),
    warmup=st.floats(0.0, 1.0),
    scale_lr=st.floats(0.0, 1.0),
    seed=st.integers(0, (1 << 63) - 1),
    accum_threshold=st.none() | st.integers(2, 127),
    save=st.booleans(),
    data=st.lists(texts, max_size=3),
    held_out=st.none() | texts,
    field=texts,
)


@same_folder
@given(config=run_configs)
def test_toml_round_trip_is_exact(tmp_path, config):
    path = tmp_path / "config.toml"
    path.write_text(dump_toml(config), encoding="utf-8")
    assert load_config(path) == config
    assert load_config(path, base=PRESETS[config.preset]) == config
    assert dump_toml(load_config(path)) == dump_toml(config)


@pytest.mark.parametrize(
    ("settings", "learns", "learnt"),
    [
        ({}, "text", "text"),
        ({"image_size": 16}, "image", "image"),
        ({"audio_task": "speak", "learnt_before": ["codec", "text"]}, "speak", "text codec speak"),
        ({"audio_task": "codec", "learnt_before": ["listen", "text", "flow"]}, "codec", "text codec flow"),
        ({"video_task": "codec", "learnt_before": ["flow"]}, "autoencoder", "autoencoder"),
        ({"video_task": "flow", "learnt_before": ["autoencoder"]}, "flow", "autoencoder flow"),
        ({"code_weight": 1, "audio_weight": 1}, "text codec speak", "text codec speak"),
        (
            {"audio_weight": 1, "train_codec": False, "learnt_before": ["codec", "listen"]},
            "speak",
            "codec listen speak",
        ),
        ({"image_weight": 1, "video_weight": 1}, "image autoencoder flow", "image autoencoder flow"),
    ],
)
def test_what_a_run_has_learnt_follows_from_its_settings(settings, learns, learnt):
    config = preset("tiny", **settings)
    assert config.learns == tuple(learns.split())
    assert config.learnt == tuple(learnt.split())


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_partial_file_is_laid_over_its_preset_or_the_base(tmp_path):
    path = write(tmp_path, "[train]\nsteps = 9\nlr = 1\n[data]\nheld_out = 0.25\ndata = 'x.txt'\n")
    assert load_config(path) == preset("tiny", steps=9, lr=1.0, held_out="0.25", data=("x.txt",))
    assert load_config(path, base=preset("small")).model == preset("small").model
    assert load_config(write(tmp_path, 'preset = "base"')) == preset("base")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[train]\nstpes = 3", ["'stpes' in [train]", "did you mean 'steps'"]),
        ("[tarin]\nsteps = 3", ["'tarin'", "did you mean 'train'"]),
        ("steps = 3", ["'steps'", "belongs in [train]"]),
        ("[model]\nsteps = 3", ["'steps' in [model]", "belongs in [train]"]),
        ("train = 3", ["train must be a table"]),
        ("preset = 3", ["preset must be a string"]),
        ("version = 3", ["version must be a string"]),
        ('preset = "hugh"', ["unknown preset 'hugh'"]),
        ("[train]\nsteps = 'x'", ["steps must be an integer", "'x' (str)"]),
        ("[train]\nlr = inf", ["lr must be finite"]),
        ("[train\nsteps = 3", ["not valid TOML", "line 1"]),
        ("[train]\nsteps = 3\nsteps = 4", ["not valid TOML"]),
        (b"\xff\xfe", ["not valid TOML"]),
        ("x = " + "[" * 100_000, ["not"]),
        ("[train]\nsteps = " + "9" * 5000, ["not valid TOML"]),
        ("#" * (1 << 20) + "\n", ["over 1 MiB"]),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, text, parts):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_file_may_not_contradict_the_preset_it_is_laid_over(tmp_path):
    path = write(tmp_path, 'preset = "base"')
    with pytest.raises(UserError, match=r"'base' contradicts the preset 'tiny'"):
        load_config(path, base=preset("tiny"))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, reason in ((tmp_path / "no.toml", "No such file"), (tmp_path, "directory"), ("a\0b", "null")):
        with pytest.raises(UserError, match=reason):
            read_toml(path)


names = st.sampled_from([*cfg._SECTION_OF, *cfg.SECTIONS, "preset", "version"]) | st.text(
    string.ascii_letters + "_-", min_size=1, max_size=12
)
scalars = st.one_of(
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.integers(0, 300).map(str),
    st.floats().map(repr),
    st.booleans().map(lambda b: str(b).lower()),
    st.sampled_from(
        ['"full"', '"tiny"', '"ROW"', "[]", '["a"]', "[1, [2]]", "{}", "1979-05-27", "07:32:00", "''"]
    ),
    st.text(max_size=8),
)
fuzz_lines = st.one_of(
    st.tuples(names, scalars).map(" = ".join),
    names.map("[{}]".format),
    names.map("[[{}]]".format),
    st.text(max_size=20),
)


@settings(same_folder, max_examples=400)
@given(lines=st.lists(fuzz_lines, max_size=8))
def test_random_toml_is_a_config_or_a_user_error(tmp_path, lines):
    path = tmp_path / "config.toml"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UserError):
        assert isinstance(load_config(path), RunConfig)


@settings(same_folder, max_examples=200)
@given(raw=st.binary(max_size=60))
def test_random_bytes_are_a_config_or_a_user_error(tmp_path, raw):
    path = write(tmp_path, raw)
    with contextlib.suppress(UserError):
        assert isinstance(load_config(path), RunConfig)


def test_reading_a_config_imports_no_torch():
    code = "import sys, arbitor.config; arbitor.config.preset('tiny'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
