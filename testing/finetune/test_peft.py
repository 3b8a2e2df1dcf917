"""Adapters beside the PEFT library itself: it loads ours, we load what it saved, both give the same."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import arbitor
from arbitor.cli import main
from arbitor.errors import UserError
from arbitor.finetune.adapter import apply_adapter, read_adapter, write_adapter
from arbitor.finetune.lora import Adapter, adapter_parameters, attach, choose_modules
from arbitor.ternary import TernaryLinear

peft = pytest.importorskip("peft", reason="needs the library peft, which no part of arbitor brings along")


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        # It says of layers of other libraries that it does not know them.
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        yield


class Net(nn.Module):
    """Two linears of a kind, one inside a list."""

    def __init__(self, make):
        super().__init__()
        self.enter = make(24, 40)
        self.blocks = nn.ModuleList([nn.ModuleDict({"up": make(40, 24)})])

    def forward(self, x):
        return self.blocks[0]["up"](torch.relu(self.enter(x)))


def twins():
    """A net of ternary linears without anything around the product, and one of torch's with equal weights."""
    torch.manual_seed(0)
    ours = Net(lambda i, o: Exact(i, o, input_norm=False))
    theirs = Net(lambda i, o: nn.Linear(i, o, bias=False))
    with torch.no_grad():
        for name in ("enter", "blocks.0.up"):
            linear = theirs.get_submodule(name)
            linear.weight.copy_(ours.get_submodule(name)(torch.eye(linear.in_features)).T)
    return ours, theirs


class Exact(TernaryLinear):
    """A linear whose activations stay float, as torch's do."""

    def forward(self, x, quantize=True, squared=False):
        return super().forward(x, False, squared)


def filled(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_(std=0.3)
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}


def test_a_torch_model_under_peft_loads_our_file_and_gives_the_same(tmp_path):
    ours, theirs = twins()
    x = torch.randn(5, 24)
    torch.testing.assert_close(ours(x), theirs(x))
    adapter = Adapter(rank=3, alpha=7.0, modules=("enter", "blocks.0.up"))
    attach(ours, adapter)
    weights = filled(ours)
    write_adapter(tmp_path, adapter, weights, "the/base", "0" * 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns of keys that are missing or too many
        model = peft.PeftModel.from_pretrained(theirs, str(tmp_path))
    config = model.peft_config["default"]
    assert (config.peft_type, config.r, config.lora_alpha, config.bias) == ("LORA", 3, 7.0, "none")
    assert config.target_modules == {"enter", "blocks.0.up"}
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == {f"base_model.model.{name}" for name in weights}
    assert all(torch.equal(loaded[f"base_model.model.{name}"], tensor) for name, tensor in weights.items())
    with torch.no_grad():
        torch.testing.assert_close(model(x), ours(x))
        assert not torch.allclose(model.get_base_model()(x), twins()[1](x), atol=0.1)  # it does something
        # Merged into the weights, as a user of PEFT may go on.
        torch.testing.assert_close(model.merge_and_unload()(x), ours(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["enter", "up"], ["up"], r".*\.up"], ids=["names", "one", "pattern"])
def test_what_peft_saved_of_a_torch_model_gives_the_same_here(targets, tmp_path):
    ours, theirs = twins()
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(theirs, config)
    model.save_pretrained(str(tmp_path))
    saved = read_adapter(tmp_path)
    assert saved.base_fingerprint is None
    assert (saved.adapter.rank, saved.adapter.alpha) == (4, 6)
    expected = {"enter", "blocks.0.up"} if "enter" in targets else {"blocks.0.up"}
    assert set(saved.adapter.modules) == expected
    apply_adapter(ours, saved)
    x = torch.randn(5, 24)
    with torch.no_grad():
        torch.testing.assert_close(model(x), ours(x))


def test_what_peft_trained_beside_our_model_is_loaded_by_generate(workplace, capsysbinary):
    from arbitor.finetune.peft import peft_layers

    base = arbitor.load("runs/base", "cpu")
    names = choose_modules(base, ["attention", "head"])
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=list(names))
    config._register_custom_module(peft_layers())
    model = peft.get_peft_model(base, config)
    ids = torch.arange(40).view(2, 20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(ids, targets=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained("theirs")
    ours = arbitor.load("runs/base", "cpu")
    saved = read_adapter(Path("theirs"))
    assert any(bool(tensor.any()) for name, tensor in saved.weights.items() if "lora_B" in name)
    apply_adapter(ours, saved)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits)
    assert main(["generate", "runs/base", "--adapter", "theirs", "--bytes", "3", "--device", "cpu"]) == 0


def test_the_fields_that_we_write_are_fields_of_peft(tmp_path):
    ours, _ = twins()
    adapter = Adapter(rank=3, alpha=7.0, dropout=0.25, modules=("enter",))
    attach(ours, adapter)
    write_adapter(tmp_path, adapter, filled(ours), "the/base", "0" * 32)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    config = peft.PeftConfig.from_pretrained(str(tmp_path)).to_dict()
    assert written.keys() <= config.keys()
    for name, value in written.items():
        read = sorted(config[name]) if isinstance(config[name], set) else config[name]
        assert read == value, name
    model = peft.get_peft_model(twins()[1], peft.LoraConfig(r=3, target_modules=["enter"]))
    model.save_pretrained(str(tmp_path / "theirs"))
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours_on_disk = load_file(tmp_path / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in ours_on_disk.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"rank_pattern": {"enter": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"enter": 2}}, "alpha_pattern"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_what_computes_otherwise_is_refused(settings, word, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["enter", "up"], **settings)
    peft.get_peft_model(twins()[1], config).save_pretrained(str(tmp_path))
    with pytest.raises(UserError, match=f"{word} is .*which is not supported") as caught:
        read_adapter(tmp_path)
    assert "\n" not in str(caught.value)
