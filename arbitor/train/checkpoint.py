"""Checkpoints: folders of safetensors, JSON and TOML; no code runs from them.

    model.safetensors      weights under their module names; alone enough for inference
    optimizer.safetensors  `<module>.T_accum`, `.E_accum`, `.M`, `.M_exp`; plain values in its header
    state.json             step, data position and whatever else training goes on from; checksums of the files
    config.toml            the run's settings

Equal state gives equal bytes: no file holds a time, a path or a name of a run.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arbitor.config import ModelConfig, RunConfig, dump_toml, load_config
from arbitor.errors import UserError
from arbitor.model import ARBModel
from arbitor.ternary import VoteOptimizer
from arbitor.train import swap
from arbitor.train.device import resolve_device
from arbitor.train.runs import find_checkpoint
from arbitor.train.tensorfile import (
    FORMAT,
    DamagedError,
    NewerError,
    digest,
    dump_document,
    may_hold_tensors,
    parse_document,
    read_tensors,
    read_text,
    write_tensors,
)

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CONFIG_FILE = "config.toml"


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        folder: where it was read from.
        model_config: architecture that the weights are of.
        weights: integer tensors by name, on the CPU.
        optimizer_state: as `VoteOptimizer.named_state` gave it; None in a checkpoint without an optimizer.
        hyperparameters: as `VoteOptimizer.hyperparameters` gave them; None without an optimizer.
        config: settings of the run.
        state: what the trainer put into `state.json`.
    """

    folder: Path
    model_config: ModelConfig
    weights: dict[str, Tensor]
    optimizer_state: dict[str, Tensor] | None
    hyperparameters: dict[str, Any] | None
    config: RunConfig
    state: dict[str, Any]

    def build_model(self, device: torch.device | str) -> ARBModel:
        """The model on `device`."""
        return build_model(self.folder / MODEL_FILE, self.model_config, self.weights, device)

    def restore_optimizer(self, optimizer: VoteOptimizer) -> None:
        """Put the saved training state into an optimizer that was made with the same settings.

        Raises:
            UserError: there is none, or it does not fit.
        """
        if self.optimizer_state is None or self.hyperparameters is None:
            raise UserError(
                f"{self.folder} holds no {OPTIMIZER_FILE}: it can be used, but training cannot go on"
            )
        try:
            optimizer.load_hyperparameters(self.hyperparameters)
            optimizer.load_named_state(self.optimizer_state)
        except UserError as error:
            raise UserError(f"{self.folder / OPTIMIZER_FILE}: {error}") from error


def save_checkpoint(
    folder: Path,
    model: ARBModel,
    optimizer: VoteOptimizer | None,
    config: RunConfig,
    state: Mapping[str, Any],
    *,
    keep_previous: bool = False,
) -> None:
    """Write a checkpoint that is whole or absent; what stood at `folder` stays until the new one is in place.

    Args:
        folder: target; its parent exists.
        model: its weights.
        optimizer: its training state; None leaves the file out.
        config: settings of the run.
        state: plain JSON values.
        keep_previous: keep the replaced checkpoint beside it, for a resume that finds this one damaged.

    Raises:
        OSError: the disk did not take it.
    """

    def fill(temporary: Path) -> None:
        files = {
            MODEL_FILE: write_tensors(
                temporary / MODEL_FILE, "model", model.state_dict(), config=dataclasses.asdict(model.config)
            )
        }
        if optimizer is not None:
            files[OPTIMIZER_FILE] = write_tensors(
                temporary / OPTIMIZER_FILE,
                "optimizer",
                optimizer.named_state(),
                hyperparameters=optimizer.hyperparameters(),
            )
        toml = dump_toml(config)
        files[CONFIG_FILE] = digest(toml.encode())
        (temporary / CONFIG_FILE).write_text(toml, encoding="utf-8")
        document = dump_document({**state, "format": FORMAT, "files": files})
        (temporary / STATE_FILE).write_text(document, encoding="utf-8")

    swap.write_folder(folder, fill, keep_previous=keep_previous)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read and verify all of a checkpoint.

    Raises:
        DamagedError: a file is missing or altered, or files of different checkpoints are mixed.
        NewerError: it was written by a later arbitor.
        UserError: it holds settings that cannot be used.
    """
    folder = swap.locate(folder)
    if not folder.is_dir():
        raise DamagedError(f"there is no checkpoint at {folder}")
    state = parse_document(folder / STATE_FILE, read_text(folder / STATE_FILE))
    files = state["files"]
    weights, header = read_tensors(folder / MODEL_FILE, "model")
    checksums = {
        MODEL_FILE: header["checksum"],
        CONFIG_FILE: digest(read_text(folder / CONFIG_FILE).encode()),
    }
    optimizer_state = hyperparameters = None
    if OPTIMIZER_FILE in files:
        optimizer_state, optimizer_header = read_tensors(folder / OPTIMIZER_FILE, "optimizer")
        hyperparameters = optimizer_header["hyperparameters"]
        checksums[OPTIMIZER_FILE] = optimizer_header["checksum"]
    for name, checksum in checksums.items():
        if files.get(name) != checksum:
            raise DamagedError(f"{folder / name} is not the file that {STATE_FILE} was saved with")
    return Checkpoint(
        folder=folder,
        model_config=_model_config(folder / MODEL_FILE, header),
        weights=weights,
        optimizer_state=optimizer_state,
        hyperparameters=hyperparameters,
        config=load_config(folder / CONFIG_FILE),
        state=state,
    )


def load(path: str | Path, device: str = "auto") -> ARBModel:
    """The model of a checkpoint, ready for inference.

    Args:
        path: a checkpoint folder, its `model.safetensors`, or a run (its `best` is taken).
        device: auto, cpu or cuda.

    Raises:
        UserError: nothing there, damaged (naming file and tensor), or not a model of arbitor.
    """
    path = Path(path)
    if path.is_file() and not may_hold_tensors(path):
        raise UserError(
            f"{path} is no checkpoint of arbitor: give a run, a checkpoint's folder, or its {MODEL_FILE}"
        )
    file = path if path.is_file() else find_checkpoint(path) / MODEL_FILE
    weights, header = read_tensors(file, "model")
    return build_model(file, _model_config(file, header), weights, resolve_device(device).device).eval()


def build_model(
    path: Path, config: ModelConfig, weights: Mapping[str, Tensor], device: torch.device | str
) -> ARBModel:
    """A model around `weights`; nothing is allocated before names, shapes and dtypes are known to fit.

    Args:
        path: names the weights in errors.
        config: the architecture.
        weights: integer tensors by name.
        device: where to put it.

    Raises:
        UserError: the weights are not those of `config`, or hold illegal values.
    """
    if config.num_prelude_layers + config.num_coda_layers > len(weights):
        raise UserError(f"{path} holds {len(weights)} tensors, too few for the number of layers it names")
    model = ARBModel(config=config, device="meta")
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ weights.keys()):
        fault = "is missing" if name in expected else "belongs to no part of it"
        raise UserError(f"{path} does not hold the model it describes: tensor {name!r} {fault}")
    for name, tensor in expected.items():
        given = weights[name]
        if given.shape != tensor.shape or given.dtype != tensor.dtype:
            forms = f"{_form(given)}, not {_form(tensor)}"
            raise UserError(f"{path} does not hold the model it describes: tensor {name!r} is {forms}")
    # A memory that stays on the host may be larger than what the device holds.
    on_host = "memory.table." if config.memory_host else None
    placed = {
        name: tensor if on_host and name.startswith(on_host) else tensor.to(device)
        for name, tensor in weights.items()
    }
    try:
        model.load_state_dict(placed, assign=True)
    except RuntimeError as error:
        _, *faults = str(error).splitlines()  # the first line says only that there are some
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise DamagedError(f"{path}: {faults[0].strip()}{more}") from error
    return model


def _model_config(path: Path, header: Mapping[str, Any]) -> ModelConfig:
    settings = header.get("config")
    if not isinstance(settings, dict):
        raise UserError(f"{path} does not say which model it holds")
    unknown = sorted(settings.keys() - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        raise NewerError(f"{path} holds a model with the unknown setting {unknown[0]!r}: update arbitor")
    try:
        return ModelConfig(**settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
