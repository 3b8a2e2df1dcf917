"""Checkpoints: equal bytes for equal state; damage is noticed and named; nothing unchecked is trusted."""

import ast
import errno
import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import arbitor
from arbitor.errors import UserError
from arbitor.ops.trit_codec import legal_bytes
from arbitor.train import checkpoint as checkpoint_module
from arbitor.train import swap
from arbitor.train.checkpoint import load, load_checkpoint, save_checkpoint
from arbitor.train.tensorfile import DamagedError, NewerError, dump_document, read_tensors, write_tensors

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "config.toml")


@pytest.fixture
def saved(make_trainer, tmp_path):
    trainer = make_trainer(3)
    trainer.save(tmp_path / "latest")
    return tmp_path / "latest"


def test_a_checkpoint_holds_exactly_the_named_files(saved):
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)
    state = json.loads((saved / "state.json").read_text())
    assert (state["format"], state["step"], state["seed"]) == (1, 3, 0)
    assert state["sampler"]["drawn"] == 12


def test_its_files_may_be_read_by_those_who_may_read_others(make_trainer, tmp_path):
    before = os.umask(0o027)
    try:
        make_trainer().save(tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "run").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes


def test_loading_gives_back_every_tensor_and_setting(make_trainer, tmp_path):
    trainer = make_trainer(3)
    trainer.save(tmp_path / "latest")
    loaded = load_checkpoint(tmp_path / "latest")
    weights = trainer.model.state_dict()
    assert loaded.weights.keys() == weights.keys()
    assert all(torch.equal(loaded.weights[name], weights[name]) for name in weights)
    state = trainer.optimizer.named_state()
    assert loaded.optimizer_state.keys() == state.keys()
    assert all(torch.equal(loaded.optimizer_state[name], state[name]) for name in state)
    assert loaded.config == trainer.config
    assert loaded.model_config == trainer.config.model
    assert loaded.hyperparameters == trainer.optimizer.hyperparameters()


def test_equal_state_gives_equal_bytes(make_trainer, tmp_path):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        make_trainer(3).save(tmp_path / place / "latest")
    for name in FILES:
        one, two = (tmp_path / place / "latest" / name for place in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name


def test_the_weights_alone_are_enough_for_inference(saved, tmp_path, make_trainer):
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(saved / "model.safetensors", alone)
    expected = make_trainer(3).model
    ids = torch.arange(16)[None]
    for path in (alone, alone / "model.safetensors", saved):
        model = arbitor.load(path, device="cpu")
        assert torch.equal(model(ids).logits, expected(ids).logits)
        assert not model.training


def test_loading_draws_no_random_number(saved):
    before = torch.get_rng_state()
    load(saved, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_noticed_and_the_file_named(saved, name):
    path = saved / name
    original = path.read_bytes()
    places = range(0, len(original), max(1, len(original) // 60))
    for place in places:
        for bit in (place % 8, (place + 3) % 8):
            damaged = bytearray(original)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(DamagedError) as error:
                load_checkpoint(saved)
            assert "\n" not in str(error.value)
            # The optimizer's file is named by the file that it does not fit, or by itself.
            assert name in str(error.value), f"bit {bit} of byte {place}: {error.value}"
    path.write_bytes(original)
    load_checkpoint(saved)


@pytest.mark.parametrize("name", FILES[:3])
def test_a_flipped_bit_in_a_checked_word_passes_for_nothing_else(saved, name):
    """Not for a later format, another kind of file, or a file of somebody else."""
    path = saved / name
    original = path.read_bytes()
    flips = 0
    for word in (b"format", b"kind", b"arbitor", b"checksum", b"__metadata__", b"config"):
        begin = original.find(word)
        if begin < 0:
            continue
        for place in range(begin, begin + len(word) + 6):  # the word and the value behind it
            for bit in range(7):
                damaged = bytearray(original)
                damaged[place] ^= 1 << bit
                path.write_bytes(damaged)
                with pytest.raises(DamagedError):
                    load_checkpoint(saved)
                flips += 1
    assert flips > 100


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 1, 7, 8, 0.5, -1])
def test_a_truncated_file_is_noticed(saved, name, keep):
    path = saved / name
    original = path.read_bytes()
    length = int(len(original) * keep) if isinstance(keep, float) else keep
    path.write_bytes(original[:length])
    with pytest.raises(UserError, match=name):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", FILES)
def test_an_appended_byte_and_a_missing_file_are_noticed(saved, name):
    path = saved / name
    original = path.read_bytes()
    for byte in (b"\0", b" ", b"\n"):
        path.write_bytes(original + byte)
        with pytest.raises(UserError, match=name):
            load_checkpoint(saved)
    path.unlink()
    with pytest.raises(DamagedError, match=name):
        load_checkpoint(saved)


def test_damage_names_the_tensor(saved):
    path = saved / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"model\.safetensors is damaged: the checksum of tensor '.+'"):
        load(path, device="cpu")


def test_files_of_two_checkpoints_do_not_mix(make_trainer, tmp_path):
    make_trainer(2).save(tmp_path / "two")
    make_trainer(3).save(tmp_path / "three")
    for name in FILES[:2]:
        shutil.copytree(tmp_path / "three", tmp_path / "mixed")
        shutil.copy(tmp_path / "two" / name, tmp_path / "mixed")
        with pytest.raises(DamagedError, match=f"{name} is not the file"):
            load_checkpoint(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")


def test_a_checkpoint_of_another_model_is_refused(make_trainer, tmp_path):
    make_trainer(1).save(tmp_path / "latest")
    other = load_checkpoint(tmp_path / "latest")
    with pytest.raises(UserError, match="of another model: ffn_dim is 64 there, 96 in this run"):
        make_trainer(checkpoint=other, ffn_dim=96)


def test_a_checkpoint_of_other_state_or_data_is_refused(make_trainer, tmp_path):
    make_trainer(1).save(tmp_path / "latest")
    saved = load_checkpoint(tmp_path / "latest")
    with pytest.raises(UserError, match="state 'full', this one 'lean'"):
        make_trainer(checkpoint=saved, state="lean")
    (tmp_path / "data.txt").write_text("something else, " * 1000)
    with pytest.raises(UserError, match="the training data is not what it was"):
        make_trainer(checkpoint=saved)


def test_weights_that_do_not_fit_their_description_are_refused(saved, tmp_path):
    weights, header = read_tensors(saved / "model.safetensors", "model")
    illegal_byte = int((~legal_bytes(torch.device("cpu"))).nonzero()[0])
    cases = {
        "is missing": {name: t for name, t in weights.items() if name != "head.q"},
        "belongs to no part": {**weights, "extra": torch.zeros(3, dtype=torch.int8)},
        r"'head\.q' is int8 \[3\]": {**weights, "head.q": torch.zeros(3, dtype=torch.int8)},
        r"'head\.q' is float32": {**weights, "head.q": weights["head.q"].float()},
        "which is no packed trits": {
            name: torch.full_like(t, illegal_byte) if name.endswith("T_packed") else t
            for name, t in weights.items()
        },
    }
    for message, tensors in cases.items():
        path = tmp_path / "model.safetensors"
        write_tensors(path, "model", tensors, config=header["config"])
        with pytest.raises(UserError, match=message):
            load(path, device="cpu")


def test_a_description_cannot_ask_for_more_memory_than_the_file_has(saved, tmp_path):
    weights, header = read_tensors(saved / "model.safetensors", "model")
    path = tmp_path / "model.safetensors"
    for change in ({"dim": 1 << 20, "ffn_dim": 1 << 20}, {"num_prelude_layers": 10_000}, {"surprise": 1}):
        write_tensors(path, "model", weights, config={**header["config"], **change})
        with pytest.raises(UserError):
            load(path, device="cpu")


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 17 << 20, 1 << 40])
def test_headers_are_bounded_before_they_are_read(saved, length):
    path = saved / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    with pytest.raises(DamagedError, match="its header does not fit"):
        load(path, device="cpu")


def test_files_of_others_are_refused(saved, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(DamagedError, match="was not written by arbitor"):
        load(path, device="cpu")
    save_file({"weight": torch.zeros(3)}, path, metadata={"arbitor": "[" * 100_000})
    with pytest.raises(DamagedError, match="JSON cannot be read"):
        load(path, device="cpu")
    save_file({"weight": torch.zeros(3)}, path, metadata={"arbitor": dump_document({"format": 99})})
    with pytest.raises(NewerError, match="has format 99, this arbitor reads up to 1: update arbitor"):
        load(path, device="cpu")
    with pytest.raises(UserError, match="is of the kind 'optimizer'"):
        load(saved / "optimizer.safetensors", device="cpu")


def test_a_file_of_text_is_no_checkpoint(saved, tmp_path):
    path = tmp_path / "my.txt"
    for text in (b"", b"short", b"a line of text and another one\n" * 9):
        path.write_bytes(text)
        with pytest.raises(UserError, match=r"my\.txt is no checkpoint of arbitor: give a run, a") as error:
            load(path, device="cpu")
        assert not isinstance(error.value, DamagedError)
    shutil.copy(saved / "model.safetensors", path)
    load(path, device="cpu")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match="damaged or cut short"):
        load(path, device="cpu")


def test_links_and_other_special_files_are_not_followed(saved, tmp_path):
    for name in FILES:
        path = saved / name
        elsewhere = tmp_path / f"moved-{name}"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        with pytest.raises(DamagedError, match=f"{name} is no plain file"):
            load_checkpoint(saved)
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DamagedError, match=f"{name} is no plain file"):
            load_checkpoint(saved)
        path.unlink()
        elsewhere.rename(path)


def test_a_disk_that_takes_no_more_keeps_the_checkpoint_before(make_trainer, tmp_path, monkeypatch):
    trainer = make_trainer(1)
    trainer.save(tmp_path / "latest")
    trainer.take_step()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_tensors", full)
    with pytest.raises(UserError, match=r"cannot save .*latest: No space left on device"):
        trainer.save(tmp_path / "latest")
    assert load_checkpoint(tmp_path / "latest").state["step"] == 1
    assert not list(tmp_path.glob(".latest*"))


def test_a_write_error_inside_a_tensor_file_is_an_os_error(make_trainer, tmp_path):
    trainer = make_trainer(1)
    with pytest.raises(OSError, match="No such file") as caught:
        write_tensors(tmp_path / "nowhere" / "model.safetensors", "model", trainer.model.state_dict())
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, "No such file or directory")


def test_a_kill_between_any_two_calls_of_a_save_leaves_a_checkpoint(make_trainer, tmp_path, kill_at_call):
    trainer = make_trainer(1)
    trainer.save(tmp_path / "latest", keep_previous=True)
    trainer.take_step()
    for at in range(100):
        with kill_at_call(at) as outcome:
            trainer.save(tmp_path / "latest", keep_previous=True)
        step = load_checkpoint(tmp_path / "latest").state["step"]
        if not outcome.killed:
            break
        assert step in (1, 2), f"killed at call {at}"
    assert step == 2
    assert at > 10
    swap.recover(tmp_path / "latest", keep_previous=True)
    assert {path.name for path in tmp_path.glob(".latest*")} <= {".latest.previous"}


def test_saving_without_an_optimizer(make_trainer, tmp_path, make_config):
    model = make_trainer(1).model
    save_checkpoint(tmp_path / "bare", model, None, make_config(), {"step": 1})
    loaded = load_checkpoint(tmp_path / "bare")
    assert loaded.optimizer_state is None
    with pytest.raises(UserError, match=r"holds no optimizer\.safetensors"):
        loaded.restore_optimizer(make_trainer(1).optimizer)


def test_no_code_runs_from_data():
    """No module of the package unpickles, evaluates or executes anything it reads."""
    package = Path(arbitor.__file__).parent
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "yaml"}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {name.split(".")[0] for name in names} & forbidden_modules, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__", "torch.load"), (path, called)
