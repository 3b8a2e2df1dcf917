"""The verbs of the command line that use a trained model: generate, chat, eval, audit."""

import codecs
import functools
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from arbitor.data.contents import is_jsonl, open_contents, unused_field
from arbitor.data.sources import Skipped, find_sources
from arbitor.data.store import Store
from arbitor.data.stream import ByteStream
from arbitor.errors import UserError
from arbitor.evaluate import bits_per_byte
from arbitor.flags import naming_flags
from arbitor.generate import generate_stream
from arbitor.model import ARBModel
from arbitor.ternary.audit import audit_checkpoint
from arbitor.train.checkpoint import CONFIG_FILE, STATE_FILE, load, load_checkpoint
from arbitor.train.device import deterministic
from arbitor.train.display import Display, printable
from arbitor.train.learnt import lacks, tells_before
from arbitor.train.runs import find_checkpoint, name_of, refuse_unlearnt

if TYPE_CHECKING:
    from arbitor.finetune.adapter import SavedAdapter


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a command means by a model.

    Attributes:
        base: the checkpoint's folder.
        adapter: the adapter to put onto it, if any.
        learnt: what they have learnt, of `arbitor.config.LEARNT`; None if that is not known.
    """

    base: Path
    adapter: "SavedAdapter | None"
    learnt: tuple[str, ...] | None

    def __str__(self) -> str:
        """In words, what the model is read from."""
        return (
            str(self.base) if self.adapter is None else f"{self.base} with the adapter {self.adapter.folder}"
        )

    def open(self, device: str) -> ARBModel:
        """The model, ready for inference, on `device` (auto, cpu or cuda).

        Raises:
            UserError: damaged, or an adapter of another base.
        """
        from arbitor.finetune.adapter import apply_adapter

        model = load(self.base, device)
        if self.adapter is not None:
            apply_adapter(model, self.adapter)
        return model


def find_model(
    checkpoint: str | None, adapter: str | None, wanted: Sequence[str], *, newest_finetune: bool = False
) -> Found:
    """The model that a command means.

    Args:
        checkpoint: as `find_checkpoint` takes it, or a finetune of adapters; None is the base of `adapter`,
            or else the newest run that has learnt what is wanted.
        adapter: an adapter to put onto it, as `find_adapter` takes it.
        wanted: what it must have learnt one of, as `find_checkpoint` takes it.
        newest_finetune: without either, take the newest finetune on conversations if it is newer than that
            run.

    Raises:
        UserError: nothing there, it has learnt something else, or the adapter is one of another base.
    """
    from arbitor.finetune.adapter import find_adapter, read_adapter, refuse_other_base
    from arbitor.finetune.session import learnt_by_adapter, learnt_by_checkpoint, newest_adapter

    if checkpoint is None and adapter is None and newest_finetune:
        folder = newest_adapter(wanted)
    else:
        given = adapter if adapter is not None else checkpoint
        folder = None if given is None else find_adapter(given)
        if adapter is not None and folder is None:
            raise UserError(
                f"no adapter {adapter!r}: give a finetune's name, or a folder with adapter_config.json"
            )
        if adapter is None and folder is not None:
            checkpoint = None
    if folder is None:
        base = find_checkpoint(checkpoint, wanted if checkpoint is None else ())
        learnt = learnt_by_checkpoint(base)
        refuse_unlearnt(base, learnt, wanted, tells_before(base))
        return Found(base=base, adapter=None, learnt=learnt)
    saved = read_adapter(folder)
    if checkpoint is None and not Path(saved.base).exists():
        where = repr(saved.base) if saved.base else "no path"
        raise UserError(
            f"{folder} names {where} as its base, which is not there; give the base: "
            f"CHECKPOINT --adapter {adapter or folder}"
        )
    base = find_checkpoint(saved.base if checkpoint is None else checkpoint)
    learnt = learnt_by_adapter(folder, base)
    if lacks(learnt, wanted):  # of a base that is not its own, what both have learnt says nothing
        refuse_other_base(load(base, "cpu"), saved)
    refuse_unlearnt(folder, learnt, wanted, tells_before(base))
    return Found(base=base, adapter=saved, learnt=learnt)


def chat_with(
    checkpoint: str | None,
    *,
    adapter: str | None,
    system: bytes,
    device: str,
    max_bytes: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
) -> int:
    """Talk with a model in the terminal, or answer the lines of a pipe."""
    from arbitor.chat import Chat, converse

    found = find_model(checkpoint, adapter, ("text", "chat"), newest_finetune=True)
    model = found.open(device)
    chat = Chat(
        model,
        system=system,
        max_bytes=max_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    if found.learnt is not None and "chat" not in found.learnt:
        print(
            f"arbitor: note: {found} was not finetuned on conversations and will merely continue text; teach "
            f"it to answer with: arbitor finetune {shlex.quote(name_of(found.base))}",
            file=sys.stderr,
        )
    print(f"{found} on {model.device}", file=sys.stderr)
    if sys.stdout is None:
        raise UserError("stdout is closed; there is nowhere to write answers to")
    with deterministic(0, model.device):
        return converse(chat)


def generate_text(
    checkpoint: str | None,
    prompt: bytes,
    max_bytes: int,
    *,
    image: str | None = None,
    adapter: str | None = None,
    device: str,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
) -> int:
    """Write the prompt and what the model makes of it to stdout, each byte as it is drawn."""
    found = find_model(checkpoint, adapter, ("text",) if image is None else ("image",))
    model = found.open(device)
    prefix = None if image is None else image_prefix(model, str(found), image)
    with naming_flags(("max_bytes", "temperature", "top_k", "top_p", "seed")):
        drawn = generate_stream(
            model,
            prompt,
            max_bytes,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            prefix=prefix,
        )
    print(f"{found} on {model.device}", file=sys.stderr)
    if sys.stdout is None:
        raise UserError("stdout is closed; there is nowhere to write the text to")
    write = _terminal_writer() if sys.stdout.isatty() else _write_raw
    write(prompt)
    with deterministic(0, model.device):
        for byte in drawn:
            write(byte)
    write(b"\n")
    return 0


def image_prefix(model: ARBModel, source: str, image: str) -> Tensor:
    """What stands ahead of the text for the image of a file: float [1, P, D].

    Raises:
        UserError: the model takes no images, or the file holds none.
    """
    from arbitor.data.images import Geometry, read_image

    config = model.config
    if not config.image_size:
        raise UserError(
            f"--image: {source} takes no images; `arbitor train --enable-vision` makes a model that does"
        )
    pixels = read_image(image, Geometry(size=config.image_size, channels=config.image_channels))
    with torch.no_grad():
        return model.encode("image", torch.from_numpy(pixels)[None])


def evaluate_data(checkpoint: str | None, data: Sequence[str], field: str | None, device: str) -> int:
    """Print the bits per byte of a checkpoint on up to 1 MB of `data`; `field` is --field's, if given."""
    sources = find_sources(data, Skipped())
    if field is not None and not any(is_jsonl(source.path) for source in sources):
        print(f"arbitor: note: {unused_field(field)}", file=sys.stderr)
    stream = ByteStream(open_contents(sources, field or "text", Store()))
    found = find_model(checkpoint, None, ("text",))
    model = found.open(device)
    data_1mb = np.array(stream.as_array(1_000_000))
    with deterministic(0, model.device), Display(Console(stderr=True, highlight=False)) as display:
        shown = functools.partial(display.progress, "measuring: window")
        result = bits_per_byte(model, data_1mb, model.config.ctx, progress=shown)
    if not math.isfinite(result.bits_per_byte):
        raise UserError(f"{found}: the model's logits are not finite, its training diverged")
    whole = len(stream)
    part = "all" if result.num_bytes == whole else f"the first {result.num_bytes:,}"
    print(f"{result.bits_per_byte:.4f} bits per byte")
    print(f"{found}: {part} of {whole:,} bytes of {' '.join(data)}, context {model.config.ctx} bytes")
    return 0


def audit_tensors(checkpoint: str | None) -> int:
    """Print every tensor of a checkpoint; 1 if a float weight or float training state is among them."""
    from arbitor.finetune.adapter import audit_adapter, find_adapter, read_adapter

    folder = None if checkpoint is None else find_adapter(checkpoint)
    is_adapter = folder is not None
    if folder is not None:
        report = audit_adapter(folder)
        read_adapter(folder)
    else:
        folder = find_checkpoint(checkpoint)
        report = audit_checkpoint(folder)
        if report.ok:
            load_checkpoint(folder)  # what is damaged proves nothing
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # of a pipe nothing is known, and names shall not be folded
    table = Table(title=str(folder), title_justify="left")
    for name in ("tensor", "role", "dtype", "shape"):
        table.add_column(name, overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for row in report.rows:
        shape = " x ".join(map(str, row.shape))
        table.add_row(row.name, row.role, row.dtype, shape, f"{row.bytes:,}")
    console.print(table)
    if is_adapter:
        floats = sum(row.weights for row in report.rows)
        console.print(
            f"a float adapter of {floats:,} weights, {report.total_bytes:,} bytes with AdamW's moments: "
            "floats beside a frozen base, which holds none of them; `arbitor audit` of the base proves that"
        )
        return 0 if report.ok else 1
    console.print(
        f"{report.trit_weights:,} ternary weights and {report.trained_weights - report.trit_weights:,} int8 "
        f"ones in tables and vectors; {report.bytes_per_weight:.3f} bytes a weight kept in all, "
        f"{report.trunk_bytes_per_weight:.3f} a ternary weight"
    )
    for violation in report.violations:
        console.print(f"float: {violation}", style="bold red", markup=False)
    if foreign := _not_audited(folder):
        console.print(f"not looked at: {', '.join(foreign)}", markup=False)
    if report.ok:
        console.print("no float weight, no float training state")
    return 0 if report.ok else 1


def _not_audited(path: Path) -> list[str]:
    """Names of what lies in a checkpoint's folder and is neither a safetensors file nor known text."""
    if not path.is_dir():
        return []
    text = (CONFIG_FILE, STATE_FILE)
    return sorted(e.name for e in path.iterdir() if e.suffix != ".safetensors" and e.name not in text)


def _write_raw(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _terminal_writer() -> Callable[[bytes], None]:
    """Writes bytes as text; a character is shown when its last byte has come."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(data: bytes) -> None:
        sys.stdout.write(printable(decoder.decode(data)))
        sys.stdout.flush()

    return write
