"""Adapters on disk, in the file format of the PEFT library, and on a model again.

    adapter_config.json         PEFT's LoraConfig: r, lora_alpha, target_modules, base_model_name_or_path
    adapter_model.safetensors   base_model.model.<linear>.lora_A.weight [R, I] and .lora_B.weight [O, R]

The safetensors header also holds checksums of the tensors and the fingerprint of the base, which are verified
where they are present; files that PEFT wrote have none.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from arbitor.errors import UserError
from arbitor.finetune.lora import Adapter, adapter_parameters, attach, fingerprint
from arbitor.ternary import audit
from arbitor.ternary.audit import AuditReport
from arbitor.train.runs import ADAPTER_FILE, CHECKPOINTS, is_name, run_path
from arbitor.train.swap import locate
from arbitor.train.tensorfile import DamagedError, read_tensors, read_text, write_tensors

WEIGHTS_FILE = "adapter_model.safetensors"
KIND = "adapter"
PREFIX = "base_model.model."
# Settings of PEFT that change what an adapter computes, with the values that are understood.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (False,),
    "use_rslora": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "lora_bias": (False,),
    # Others than these start by taking something off the base's weights, which an adapter then belongs to.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None,),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedAdapter:
    """An adapter in memory.

    Attributes:
        folder: where it was read from.
        adapter: its shape.
        base: path of the base's checkpoint as it was when the adapter was saved; may be empty.
        base_fingerprint: of the base that it belongs to; None in a file of PEFT.
        weights: fp32 tensors on the CPU, named as by `adapter_parameters`.
    """

    folder: Path
    adapter: Adapter
    base: str
    base_fingerprint: str | None
    weights: dict[str, Tensor]


def write_adapter(
    folder: Path, adapter: Adapter, weights: Mapping[str, Tensor], base: str, base_fingerprint: str
) -> dict[str, str]:
    """Write both files into an existing folder; equal adapters give equal bytes.

    Args:
        folder: where to.
        adapter: its shape.
        weights: as `adapter_parameters` gives them.
        base: path of the base's checkpoint.
        base_fingerprint: of the base.

    Returns:
        The checksum of the weights' header by file name.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": list(adapter.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / ADAPTER_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = {PREFIX + name: tensor for name, tensor in weights.items()}
    return {WEIGHTS_FILE: write_tensors(folder / WEIGHTS_FILE, KIND, named, base=base_fingerprint)}


def read_adapter(folder: Path) -> SavedAdapter:
    """Read and check an adapter, ours or one of PEFT.

    Raises:
        DamagedError: a file is missing, cut short or altered.
        UserError: it is no plain LoRA adapter.
    """
    config = _config(folder / ADAPTER_FILE)
    tensors, base_fingerprint = _tensors(folder / WEIGHTS_FILE)
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX)
        if not short.endswith((".lora_A.weight", ".lora_B.weight")) or tensor.dim() != 2:
            raise UserError(f"{folder / WEIGHTS_FILE}: tensor {name!r} is no part of a plain LoRA adapter")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"{folder / WEIGHTS_FILE}: tensor {name!r} holds something else than numbers")
        weights[short] = tensor.to(torch.float32)
    modules = tuple(dict.fromkeys(name.rsplit(".", 2)[0] for name in weights))
    for module in modules:
        for part in ("lora_A", "lora_B"):
            if f"{module}.{part}.weight" not in weights:
                raise UserError(f"{folder / WEIGHTS_FILE}: {module!r} has no {part}")
    listed = config.get("target_modules")
    if isinstance(listed, list) and sorted(map(str, listed)) == sorted(modules):
        modules = tuple(listed)  # in the model's order, where the file sorts by name
    base = config.get("base_model_name_or_path")
    return SavedAdapter(
        folder=folder,
        adapter=Adapter(
            rank=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"], modules=modules
        ),
        base=base if isinstance(base, str) else "",
        base_fingerprint=base_fingerprint,
        weights=weights,
    )


def apply_adapter(model: nn.Module, saved: SavedAdapter) -> None:
    """Put a saved adapter beside a model's linears; the model stays ready for inference.

    Raises:
        UserError: it is an adapter of another base, by fingerprint, names or shapes.
    """
    refuse_other_base(model, saved)
    for module in saved.adapter.modules:
        a, b = (saved.weights[f"{module}.{part}.weight"] for part in ("lora_A", "lora_B"))
        if a.shape[0] != saved.adapter.rank or b.shape[1] != saved.adapter.rank:
            raise UserError(f"{saved.folder}: {module!r} is not of the rank {saved.adapter.rank}")
        try:
            linear = model.get_submodule(module)
        except AttributeError:
            raise UserError(f"{saved.folder}: the model has no {module!r} to put an adapter beside") from None
        sizes = (getattr(linear, "out_features", None), getattr(linear, "in_features", None))
        if sizes != (b.shape[0], a.shape[1]):
            raise UserError(
                f"{saved.folder}: {module!r} is made for a linear of {a.shape[1]} inputs and {b.shape[0]} "
                f"outputs, the model's has {sizes[1]} and {sizes[0]}"
            )
    with torch.random.fork_rng(devices=[]):
        attach(model, saved.adapter)
    load_weights(model, saved.weights)


def refuse_other_base(model: nn.Module, saved: SavedAdapter) -> None:
    """Raise UserError if an adapter was trained beside other weights than a model's, as far as it says so."""
    if saved.base_fingerprint is not None and saved.base_fingerprint != fingerprint(model):
        made_for = f" ({saved.base})" if saved.base else ""
        raise UserError(
            f"{saved.folder} is an adapter for another base{made_for}: the model's weights are not those "
            "that it was trained beside"
        )


@torch.no_grad()
def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the adapters that a model has; names and shapes must be theirs."""
    parameters = adapter_parameters(model)
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def find_adapter(given: str | Path) -> Path | None:
    """The adapter's folder that a name of a finetune, its folder, an adapter's folder or file means.

    Of a finetune, `best` is taken, else `latest`, else `final`. None if it is none of these.
    """
    name, path = str(given), Path(given)
    candidates = [path]
    if path.name in (WEIGHTS_FILE, ADAPTER_FILE) and path.is_file():
        candidates = [path.parent]
    elif is_name(name):
        candidates.insert(0, run_path(name))
    for candidate in candidates:
        for folder in (candidate, *(locate(candidate / checkpoint) for checkpoint in CHECKPOINTS)):
            if (folder / ADAPTER_FILE).is_file():
                return folder
    return None


def audit_adapter(folder: Path) -> AuditReport:
    """What an adapter's folder holds; see `arbitor.ternary.audit.audit_adapter`."""
    return audit.audit_adapter(folder, WEIGHTS_FILE)


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"{path} is damaged: its JSON cannot be read") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path} is not the configuration of a LoRA adapter")
    for name, allowed in _PLAIN.items():
        if name in config and config[name] not in allowed:
            raise UserError(
                f"{path}: {name} is {config[name]!r}, which is not supported; it must be {allowed[0]!r}"
            )
    config.setdefault("lora_dropout", 0.0)
    for name, kinds in (("r", (int,)), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        if not isinstance(config.get(name), kinds) or isinstance(config[name], bool):
            raise UserError(f"{path}: {name} must be a number, got {config.get(name)!r}")
    return config


def _tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """All tensors, and the fingerprint of the base if there is one."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            ours = "arbitor" in (file.metadata() or {})
            if not ours:
                return {name: file.get_tensor(name).clone() for name in sorted(file.keys())}, None
    except FileNotFoundError as error:
        raise DamagedError(f"cannot read {path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} is damaged or cut short: {' '.join(str(error).split())}") from error
    tensors, header = read_tensors(path, KIND)
    base = header.get("base")
    return tensors, base if isinstance(base, str) else None
