import array
import dataclasses
import functools
import gc
import json
import struct
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from arbitor.config import preset
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import Int8Embedding, TernaryLinear, VoteOptimizer, named_ternary
from arbitor.ternary.audit import AuditReport, audit, audit_checkpoint
from arbitor.train.checkpoint import save_checkpoint

# Widths of no other test, which pack with padding: a float of a weight's size is then this model's.
ODD = {
    "dim": 83,
    "num_prelude_layers": 2,
    "num_heads": 3,
    "head_dim": 7,
    "rope_dim": 6,
    "value_dim": 11,
    "kv_latent_dim": 29,
    "ffn_dim": 193,
    "ctx": 24,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Threads gain nothing on tensors of this size, and wait long for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Small(nn.Module):
    """One table and one matrix whose width packs with padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = Int8Embedding(288, 170)
        self.mix = TernaryLinear(170, 40)
        self.head = Int8Embedding(288, 40, kind="head")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head.logits(self.mix(self.embed(ids)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(0, 256, (2, 24), generator=generator)
        out = model(ids, ids) if isinstance(model, ARBModel) else model(ids)
        loss = out.loss if isinstance(model, ARBModel) else out.square().mean()
        loss.backward()
        optimizer.step()


def sizes_of_weights(model: nn.Module) -> set[int]:
    """Elements of every matrix and table, of its rows' padding included and not."""
    sizes = set()
    for _, module in named_ternary(model):
        sizes |= {module.numel(), module.stored.numel(), module.stored.numel() * 5}
    return sizes


def live_floats(sizes: set[int]) -> list[str]:
    gc.collect()
    found = []
    for candidate in gc.get_objects():
        is_float = issubclass(type(candidate), torch.Tensor) and candidate.is_floating_point()
        if is_float and candidate.numel() in sizes:
            found.append(f"{candidate.dtype} {tuple(candidate.shape)}")
    return found


@pytest.mark.parametrize("state", ["lean", "compact", "full"])
def test_no_float_of_a_weights_shape_is_alive_after_training(tmp_path, state):
    torch.manual_seed(0)
    model = ARBModel("tiny", **ODD)
    optimizer = VoteOptimizer(model, state=state)
    sizes = sizes_of_weights(model)
    before = [tensor.clone() for tensor in model.state_dict().values()]
    train(model, optimizer, 20)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))
    assert live_floats(sizes) == []

    saved = [*model.state_dict().values(), *optimizer.named_state().values()]
    saved += [t for s in optimizer.state_dict()["state"].values() for t in s.values()]
    assert not [tensor.dtype for tensor in saved if tensor.is_floating_point() or tensor.is_complex()]

    folder = tmp_path / "latest"
    save_checkpoint(folder, model, optimizer, preset("tiny", **ODD), {"step": 20})
    for file in folder.glob("*.safetensors"):
        assert not [name for name, tensor in load_file(file).items() if tensor.is_floating_point()]
    assert live_floats(sizes) == []
    assert audit(model, optimizer).ok
    assert audit_checkpoint(folder).ok


def test_the_scan_for_live_floats_finds_one():
    model = Small()
    sizes = sizes_of_weights(model)
    kept = {"somewhere": [torch.zeros(40, 170)]}
    assert live_floats(sizes) == ["torch.float32 (40, 170)"]
    del kept


@pytest.mark.parametrize(("state", "limit"), [("lean", 1.30), ("compact", 1.85), ("full", 2.35)])
def test_bytes_are_those_of_the_live_tensors(state, limit):
    model = ARBModel("tiny")
    optimizer = VoteOptimizer(model, state=state)
    report = audit(model, optimizer)
    assert report.total_bytes == optimizer.state_bytes()
    assert report.trit_weights == 732_160
    assert report.trained_weights == 732_160 + 2 * 288 * 160
    assert report.bytes_per_weight == report.total_bytes / report.trained_weights
    tables = sum(
        t.nbytes
        for name, t in {**model.state_dict(), **optimizer.named_state()}.items()
        if name.startswith(("embed.", "head."))
    )
    assert report.trunk_bytes_per_weight == (report.total_bytes - tables) / 732_160
    assert report.trunk_bytes_per_weight <= limit


def test_weights_are_counted_without_padding():
    report = audit(Small())
    # 170 trits take two blocks of 32 bytes a row; one exponent a row.
    assert report.trit_weights == 40 * 170
    assert report.trunk_bytes_per_weight == 40 * (64 + 1) / (40 * 170)
    assert report.trained_weights == 40 * 170 + 288 * 170 + 288 * 40


def test_rows_name_role_shape_and_bytes():
    model = Small()
    report = audit(model, VoteOptimizer(model))
    rows = {row.name: (row.role, row.dtype, row.shape, row.bytes) for row in report.rows}
    assert rows["mix.T_packed"] == ("trits", "uint8", (40, 64), 2560)
    assert rows["mix.E"] == ("scale exponents", "int8", (40, 1), 40)
    assert rows["mix.T_accum"] == ("accumulator", "int8", (40, 170), 6800)
    assert rows["mix.E_accum"] == ("scale accumulator", "int8", (40, 1), 40)
    assert rows["mix.M"] == ("momentum", "int8", (40, 170), 6800)
    assert rows["mix.M_exp"] == ("momentum exponents", "int16", (40, 6), 480)
    assert rows["embed.q"] == ("table", "int8", (288, 170), 48960)
    assert rows["embed.E"] == ("table exponents", "int8", (288,), 288)
    assert rows["embed.M"][0] == "momentum"
    assert len(rows) == len(report.rows) == 14
    assert str(report.rows[0]) == "embed.E: int8 [288], 288 bytes, table exponents"


def save(folder, model, optimizer=None, **extra: dict) -> None:
    """Files named as a checkpoint's, with the tensors alone."""
    folder.mkdir()
    save_file(dict(model.state_dict()), folder / "model.safetensors")
    if optimizer is not None:
        save_file(optimizer.named_state(), folder / "optimizer.safetensors")
    for name, tensors in extra.items():
        save_file(tensors, folder / f"{name}.safetensors")


@pytest.mark.parametrize("state", ["lean", "compact", "full"])
@pytest.mark.parametrize("tscale", ["ROW", "T32", "T6"])
def test_a_checkpoint_is_audited_like_the_live_tensors(tmp_path, state, tscale):
    model = ARBModel("tiny", **ODD, tscale=tscale)
    optimizer = VoteOptimizer(model, state=state)
    save_checkpoint(tmp_path / "latest", model, optimizer, preset("tiny", **ODD), {"step": 0})
    assert audit_checkpoint(tmp_path / "latest") == audit(model, optimizer)


def test_an_inference_file_is_counted_with_the_models_widths_or_packed_ones(tmp_path):
    model = Small()
    save(tmp_path / "c", model)
    for path in (tmp_path / "c", tmp_path / "c" / "model.safetensors"):
        with torch.device("meta"):
            architecture = Small()
        assert audit_checkpoint(path, architecture) == audit(model)
        assert audit_checkpoint(path).trit_weights == 40 * 320


def test_the_training_state_alone_is_audited(tmp_path):
    model = Small()
    save(tmp_path / "c", model, VoteOptimizer(model))
    report = audit_checkpoint(tmp_path / "c" / "optimizer.safetensors")
    assert {row.role for row in report.rows} == {
        "accumulator",
        "scale accumulator",
        "momentum",
        "momentum exponents",
    }
    assert report.trained_weights == 0
    assert report.bytes_per_weight == report.total_bytes


def plant_parameter(model, optimizer):
    model.mix.shadow = nn.Parameter(torch.zeros(40, 170))
    return "mix.shadow", "float weight"


def plant_small_parameter(model, optimizer):
    model.mix.gain = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    return "mix.gain", "float weight"


def plant_buffer(model, optimizer):
    model.register_buffer("master", torch.zeros(3, dtype=torch.float16))
    return "master", "float weight"


def plant_complex(model, optimizer):
    model.register_buffer("master", torch.zeros(3, dtype=torch.complex64))
    return "master", "float weight"


def plant_unsaved_buffer(model, optimizer):
    model.mix.register_buffer("cache", torch.zeros(170, 40), persistent=False)
    return "mix.cache", "unsaved float"


def plant_attribute(model, optimizer):
    model.mix.__dict__["hidden"] = {"deep": [(torch.zeros(40 * 170, dtype=torch.bfloat16),)]}
    return "mix.hidden.deep.0.0", "unsaved float"


def plant_state(model, optimizer):
    optimizer.state[model.mix.T_packed]["exp_avg"] = torch.zeros(40, 170)
    return "mix.exp_avg", "float training state"


def plant_foreign_state(model, optimizer):
    optimizer.state[nn.Parameter(torch.zeros(2))]["step"] = torch.tensor(0.0)
    return "optimizer.3.step", "float training state"


def plant_optimizer_attribute(model, optimizer):
    optimizer.masters = [torch.zeros(288, 170)]
    return "optimizer.masters.0", "unsaved float"


class Plain:
    """An object that is no module."""


class Slotted:
    __slots__ = ("__masters", "never_set")

    def __init__(self, masters):
        self.__masters = masters


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    masters: torch.Tensor


class OnItsClass(TernaryLinear):
    pass


class WithExtraState(TernaryLinear):
    def get_extra_state(self):
        return {"masters": np.zeros(3)}


def closure_over(masters):
    return lambda: masters


def plant_object(model, optimizer):
    model.mix.helper = Plain()
    model.mix.helper.masters = torch.zeros(17, 3)
    return "mix.helper.masters", "unsaved float"


def plant_numpy(model, optimizer):
    model.mix.masters = np.zeros((40, 170), dtype=np.float32)
    return "mix.masters", "unsaved float"


def plant_object_array(model, optimizer):
    model.masters = np.array([None, {1: np.zeros(5)}], dtype=object)
    return "masters.1.1", "unsaved float"


def plant_structured_array(model, optimizer):
    model.masters = np.zeros(40, dtype=[("low", "i4"), ("master", "f4")])
    return "masters", "unsaved float"


def plant_python_floats(model, optimizer):
    model.masters = {"rows": [0.5] * 40}
    return "masters.rows", "unsaved float"


def plant_array(model, optimizer):
    model.masters = array.array("f", [0.0] * 9)
    return "masters", "unsaved float"


def plant_flat_buffer(model, optimizer):
    optimizer.flat = [torch.zeros(62_517)]
    return "optimizer.flat.0", "unsaved float"


def plant_set(model, optimizer):
    model.masters = {torch.zeros(7)}
    return "masters.0", "unsaved float"


def plant_key(model, optimizer):
    optimizer.masters = {torch.zeros(7): 1}
    return "optimizer.masters.Tensor (key)", "unsaved float"


def plant_slot(model, optimizer):
    optimizer.helper = Slotted(torch.zeros(7))
    return "optimizer.helper.__masters", "unsaved float"


def plant_dataclass(model, optimizer):
    model.embed.record = (Record(torch.zeros(7)),)
    return "embed.record.0.masters", "unsaved float"


def plant_closure(model, optimizer):
    model.mix.register_forward_hook(functools.partial(closure_over(torch.zeros(7)), 1))
    (key,) = model.mix._forward_hooks
    return f"mix._forward_hooks.{key}.func.masters", "unsaved float"


def plant_default(model, optimizer):
    masters = torch.zeros(7)
    optimizer.helper = lambda masters=masters: masters
    return "optimizer.helper.defaults.0", "unsaved float"


def plant_bound_method(model, optimizer):
    helper = Plain()
    helper.masters = torch.zeros(7)
    optimizer.helper = types.MethodType(len, helper)
    return "optimizer.helper.self.masters", "unsaved float"


def plant_attribute_of_a_weight(model, optimizer):
    model.mix.T_packed.master = torch.zeros(40, 170)
    return "mix.T_packed.master", "unsaved float"


def plant_gradient(model, optimizer):
    leaf = torch.zeros(2, requires_grad=True)
    model.leaf = [leaf]
    expanded = torch.zeros(2, 8)
    (leaf[:, None] * expanded).sum().backward()
    leaf.grad.masters = torch.zeros(7)
    return "leaf.0.grad.masters", "unsaved float"


def plant_deeper_than_any_fixed_depth(model, optimizer):
    value = [torch.zeros(7)]
    for _ in range(50):
        value = [value]
    model.masters = value
    return "masters" + ".0" * 51, "unsaved float"


def plant_on_the_class(model, optimizer):
    model.more = OnItsClass(8, 4)
    OnItsClass.masters = [torch.zeros(7)]
    return "more.masters.0", "unsaved float"


def plant_in_a_capture(model, optimizer):
    model.mix.capture.masters = torch.zeros(7)
    return "mix.capture.masters", "unsaved float"


def plant_extra_state(model, optimizer):
    model.more = WithExtraState(8, 4)
    return "more._extra_state.masters", "float weight"


def plant_numpy_state(model, optimizer):
    optimizer.state[model.mix.T_packed]["exp_avg"] = {"a": np.zeros(2)}
    return "mix.exp_avg.a", "float training state"


@pytest.mark.parametrize(
    "plant",
    [
        plant_object,
        plant_numpy,
        plant_object_array,
        plant_array,
        plant_flat_buffer,
        plant_set,
        plant_key,
        plant_slot,
        plant_structured_array,
        plant_python_floats,
        plant_dataclass,
        plant_closure,
        plant_default,
        plant_bound_method,
        plant_attribute_of_a_weight,
        plant_gradient,
        plant_deeper_than_any_fixed_depth,
        plant_on_the_class,
        plant_in_a_capture,
        plant_extra_state,
        plant_numpy_state,
        plant_parameter,
        plant_small_parameter,
        plant_buffer,
        plant_complex,
        plant_unsaved_buffer,
        plant_attribute,
        plant_state,
        plant_foreign_state,
        plant_optimizer_attribute,
    ],
)
def test_a_planted_float_is_found(plant):
    model = Small()
    optimizer = VoteOptimizer(model)
    assert audit(model, optimizer).ok
    name, role = plant(model, optimizer)
    report = audit(model, optimizer)
    assert not report.ok
    assert [(row.name, row.role) for row in report.violations] == [(name, role)]
    assert name in str(report.violations[0])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("where", ["model", "optimizer", "ema"])
def test_a_planted_float_is_found_in_every_file_of_a_checkpoint(tmp_path, dtype, where):
    model = Small()
    optimizer = VoteOptimizer(model)
    folder = tmp_path / "c"
    save(folder, model, optimizer)
    path = folder / f"{where}.safetensors"
    tensors = load_file(path) if path.exists() else {}
    save_file(tensors | {"mix.float": torch.zeros(40, 170).to(dtype)}, path)
    (row,) = audit_checkpoint(folder).violations
    assert row.name.endswith("mix.float")
    assert row.dtype == str(dtype).removeprefix("torch.")
    assert row.bytes == 40 * 170 * dtype.itemsize
    assert row.role == ("float weight" if where == "model" else "float training state")


@pytest.mark.parametrize("preset_name", ["tiny", "arb-small"])
def test_nothing_that_a_step_and_a_generation_leave_is_a_float(preset_name):
    model = ARBModel(preset_name, enable_memory=preset_name != "tiny")
    optimizer = VoteOptimizer(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    assert audit(model, optimizer).ok
    ids = torch.arange(48).view(2, 24)
    loss = model(ids, ids).loss
    optimizer.note_loss(loss)
    loss.backward()
    assert audit(model, optimizer).ok, "captured gradients are no training state"
    optimizer.step()
    scheduler.step()
    model.generate("def ", max_bytes=4)
    assert audit(model, optimizer).violations == ()


@pytest.mark.parametrize(("elements", "ok"), [(1, True), (4, True), (5, False)])
def test_a_few_floats_are_no_weights(elements, ok):
    model = Small()
    model.metric = torch.zeros(elements)
    assert audit(model).ok == ok


@pytest.mark.parametrize(("tensors", "ok"), [(64, True), (65, False)])
def test_many_tensors_of_few_floats_are_weights(tensors, ok):
    model = Small()
    model.scales = [torch.zeros(4) for _ in range(tensors)]
    assert audit(model).ok == ok


def test_float_networks_are_counted_and_refused():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 8)).sum().backward()
    optimizer.step()
    report = audit(model, optimizer)
    assert not report.ok
    weights = 8 * 4 + 4 + 4 * 2 + 2
    assert report.trained_weights == weights
    # Weight and two moments in fp32, and a float32 step count for each of the four parameters.
    assert report.total_bytes == 3 * 4 * weights + 4 * 4
    assert report.trit_weights == 0
    assert report.trunk_bytes_per_weight == 0


def test_shared_tensors_count_once():
    model = Small()
    model.again = model.mix
    assert audit(model).total_bytes == audit(Small()).total_bytes


def test_containers_that_hold_themselves_do_not_hang_the_audit():
    model = Small()
    loop: list = []
    loop.append(loop)
    model.__dict__["loop"] = loop
    assert audit(model).ok


def header(tensors: dict, size: int | None = None, data: bytes = b"") -> bytes:
    raw = json.dumps(tensors).encode()
    return struct.pack("<Q", len(raw) if size is None else size) + raw + data


I8 = {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0\0\0",
        header({}, size=1 << 62),
        header({}, size=3),
        b"\xff" * 64,
        struct.pack("<Q", 9) + b"not json!",
        header({"a": I8}),
        header({"a": I8}, data=b"xyz"),
        header({"a": I8 | {"shape": [1 << 62, 4]}}, data=b"xy"),
        header({"a": I8 | {"data_offsets": [0, 1 << 60]}}, data=b"xy"),
        header({"a": I8 | {"dtype": "Q9"}}, data=b"xy"),
        header({"a\x1b[2J": I8}, data=b"xy"),
    ],
)
def test_a_damaged_header_is_one_line(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    for given in (path, tmp_path):
        with pytest.raises(UserError) as caught:
            audit_checkpoint(given)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 1 << 40))
        file.truncate((1 << 40) + 8)  # sparse
    with pytest.raises(UserError, match="does not fit"):
        audit_checkpoint(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        audit_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no file"):
        audit_checkpoint(tmp_path / "missing")


def test_an_empty_report_has_no_bytes():
    report = AuditReport(rows=())
    assert (report.ok, report.total_bytes, report.bytes_per_weight) == (True, 0, 0)
