"""The two ways in which a step changes something: AdamW on float adapters, and votes on the trits.

Each has the state that goes into a checkpoint, and puts it back to the bit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from arbitor.config import MIXED, RunConfig, in_order, override
from arbitor.errors import UserError
from arbitor.finetune.adapter import (
    KIND,
    WEIGHTS_FILE,
    load_weights,
    read_adapter,
    write_adapter,
)
from arbitor.finetune.config import FULL_LR_SHARE, LORA_LR, FinetuneConfig
from arbitor.finetune.lora import Adapter, adapter_parameters, attach, choose_modules, set_training
from arbitor.model import ARBModel
from arbitor.model.arb import ARBOutput
from arbitor.ternary import VoteOptimizer
from arbitor.ternary.optimizer import STATES
from arbitor.train import swap
from arbitor.train.checkpoint import MODEL_FILE, Checkpoint, load_checkpoint, save_checkpoint
from arbitor.train.runs import ADAPTER_FILE
from arbitor.train.tensorfile import (
    FORMAT,
    DamagedError,
    digest,
    dump_document,
    parse_document,
    read_tensors,
    read_text,
    write_tensors,
)

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
OPTIMIZER_KIND = "adapter-optimizer"
MAX_NORM = 1.0
ADAM_BETAS = (0.9, 0.99)


class Method(Protocol):
    """What the loop needs of a way to learn.

    Attributes:
        peak_lr: the highest learning rate.
        counts_parts: whether the losses of the model's parts are learnt as well.
    """

    peak_lr: float
    counts_parts: bool

    def forward(
        self, model: ARBModel, ids_BL: Tensor, prefix_BPD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits [B, L - 2, S], and the weighted losses of the model's parts if they count."""

    def step(self, loss: Tensor, lr: float) -> bool:
        """Backward and one update; False if the step was dropped because something was not finite."""

    def flip_rate(self) -> float | None:
        """Share of all trits that flipped in the last step; None where none can."""

    def set_training(self, training: bool) -> None:
        """Switch between learning and measuring."""

    def save(self, folder: Path, state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
        """Write a checkpoint that is whole or absent."""

    def restore(self, folder: Path) -> dict[str, Any]:
        """Go on from a checkpoint; returns the state that it was saved with."""


class AdapterMethod:
    """AdamW on float adapters; the base is frozen.

    Args:
        model: the base; it gets fresh adapters, drawn from torch's global generator.
        config: settings of the finetune.
        apart: parts of the model that the loss does not reach; they get no adapters unless they are named.
    """

    counts_parts = False

    def __init__(self, model: ARBModel, config: FinetuneConfig, apart: Sequence[str] = ()) -> None:
        self.model = model
        self.config = config
        self.adapter = adapter_of(model, config, apart)
        attach(model, self.adapter)
        self.parameters = adapter_parameters(model)
        self.peak_lr = LORA_LR if config.lr is None else config.lr
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=self.peak_lr, betas=ADAM_BETAS, weight_decay=0.0
        )

    @property
    def num_weights(self) -> int:
        """Floats that learn."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def forward(
        self, model: ARBModel, ids_BL: Tensor, prefix_BPD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits; the losses of the frozen parts do not count."""
        return model(ids_BL, prefix=prefix_BPD).logits, None

    def step(self, loss: Tensor, lr: float) -> bool:
        """One step of AdamW on gradients clipped to norm 1; see `Method`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), MAX_NORM)
        finite = bool(torch.isfinite(norm) & torch.isfinite(loss))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def flip_rate(self) -> None:
        """None: the base is frozen."""

    def set_training(self, training: bool) -> None:
        """Dropout on or off."""
        set_training(self.model, training)

    def save(self, folder: Path, state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
        """Adapter files as PEFT has them, AdamW's moments and the state; see `Method`."""
        moments: dict[str, Tensor] = {}
        num_updates = 0
        for name, parameter in self.parameters.items():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                if key == "step":
                    num_updates = int(tensor)
                else:
                    moments[f"{name}.{key}"] = tensor

        def fill(temporary: Path) -> None:
            files = write_adapter(
                temporary, self.adapter, self.parameters, self.config.base, self.config.base_fingerprint
            )
            files[OPTIMIZER_FILE] = write_tensors(
                temporary / OPTIMIZER_FILE, OPTIMIZER_KIND, moments, num_updates=num_updates
            )
            files[ADAPTER_FILE] = digest((temporary / ADAPTER_FILE).read_bytes())
            document = dump_document({**state, "format": FORMAT, "files": files})
            (temporary / STATE_FILE).write_text(document, encoding="utf-8")

        swap.write_folder(folder, fill, keep_previous=keep_previous)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Adapters, moments and state of a checkpoint.

        Raises:
            DamagedError: a file is missing or altered.
            UserError: it is the adapter of another model.
        """
        state = verified_state(folder)
        saved = read_adapter(folder)
        moments, header = read_tensors(folder / OPTIMIZER_FILE, OPTIMIZER_KIND)
        if saved.adapter != self.adapter or saved.base_fingerprint != self.config.base_fingerprint:
            raise UserError(f"{folder} is an adapter of another shape or base than this finetune's")
        load_weights(self.model, saved.weights)
        self.optimizer.state.clear()
        for name, parameter in self.parameters.items():
            if f"{name}.exp_avg" in moments:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(header["num_updates"])),
                    **{
                        key: moments[f"{name}.{key}"].to(parameter.device)
                        for key in ("exp_avg", "exp_avg_sq")
                    },
                }
        return state


class VoteMethod:
    """Votes on the trits, as in training; the state is that of a training run.

    Args:
        model: what to go on training.
        config: settings of the finetune.
        base: the checkpoint that the model is from; its accumulators are taken over if they are of the same
            kind of state, else they start at zero.
    """

    counts_parts = True

    def __init__(self, model: ARBModel, config: FinetuneConfig, base: Checkpoint) -> None:
        self.model = model
        kind = STATES[config.state]
        self.peak_lr = FULL_LR_SHARE * kind.lr if config.lr is None else config.lr
        self.optimizer = VoteOptimizer(model, self.peak_lr, "spectral", config.state, config.seed)
        self.continued = _take_over(self.optimizer, base)
        self.run_config: RunConfig = override(
            base.config,
            steps=config.steps,
            batch=config.batch,
            accum=1,
            lr=self.peak_lr,
            accum_threshold=self.optimizer.accum_threshold,
            state=config.state,
            rule="spectral",
            seed=config.seed,
            warmup=config.warmup,
            device=config.device,
            data=config.data,
            held_out=config.held_out,
            audio_task=config.audio_task,
            video_task="flow" if config.video else "",
            learnt_before=in_order({*base.config.learnt, *config.learns}),
            **{f"{name}_weight": 0.0 for name in MIXED},
        )

    def forward(
        self, model: ARBModel, ids_BL: Tensor, prefix_BPD: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits, and the losses of the model's parts, which train with the rest."""
        if not (model.config.has_motifs or model.config.has_core or model.config.output_router):
            return model(ids_BL, prefix=prefix_BPD).logits, None
        output: ARBOutput = model(ids_BL, targets=ids_BL, prefix=prefix_BPD)
        assert output.loss is not None
        return output.logits, output.loss - output.losses["text"]

    def step(self, loss: Tensor, lr: float) -> bool:
        """One step of votes; see `Method`."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.note_loss(loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.optimizer.last_step_applied

    def flip_rate(self) -> float:
        """Share of all trits that flipped in the last step."""
        return self.optimizer.flip_rate()

    def set_training(self, training: bool) -> None:
        """The model's own switch."""
        self.model.train(training)

    def save(self, folder: Path, state: Mapping[str, Any], *, keep_previous: bool = False) -> None:
        """A checkpoint as `arbitor train` writes it; see `Method`."""
        save_checkpoint(
            folder, self.model, self.optimizer, self.run_config, state, keep_previous=keep_previous
        )

    def restore(self, folder: Path) -> dict[str, Any]:
        """Weights, training state and state of a checkpoint."""
        checkpoint = load_checkpoint(folder)
        if checkpoint.model_config != self.model.config:
            raise UserError(f"{folder} is a checkpoint of another model than this finetune's")
        self.model.load_state_dict(checkpoint.weights)
        checkpoint.restore_optimizer(self.optimizer)
        return checkpoint.state


def adapter_of(model: ARBModel, config: FinetuneConfig, apart: Sequence[str] = ()) -> Adapter:
    """The shape of the adapter that the settings ask for.

    Args:
        model: the base.
        config: the settings.
        apart: see `choose_modules`.

    Raises:
        UserError: a value or target that cannot be used.
    """
    alpha = 2.0 * config.rank if config.alpha is None else config.alpha
    modules = choose_modules(model, config.targets, apart)
    return Adapter(rank=config.rank, alpha=alpha, dropout=config.dropout, modules=modules)


def _take_over(optimizer: VoteOptimizer, base: Checkpoint) -> bool:
    """Take the accumulators and momentum of the base's training over, if they are of the same kind."""
    given = base.hyperparameters
    if base.optimizer_state is None or given is None:
        return False
    own = optimizer.hyperparameters()
    if any(given[key] != own[key] for key in ("rule", "state", "accum_threshold")):
        return False
    optimizer.load_named_state(base.optimizer_state)
    return True


def verified_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a finetune's checkpoint, all of whose files were found whole and to belong together.

    Raises:
        DamagedError: a file is missing or altered, or files of different checkpoints are mixed.
    """
    if (folder / MODEL_FILE).exists():
        return load_checkpoint(folder).state
    state = parse_document(folder / STATE_FILE, read_text(folder / STATE_FILE))
    found = {
        name: read_tensors(folder / name, kind)[1]["checksum"]
        for name, kind in ((WEIGHTS_FILE, KIND), (OPTIMIZER_FILE, OPTIMIZER_KIND))
    }
    found[ADAPTER_FILE] = digest(read_text(folder / ADAPTER_FILE).encode())
    for name, checksum in found.items():
        if state["files"].get(name) != checksum:
            raise DamagedError(f"{folder / name} is not the file that {STATE_FILE} was saved with")
    return state
