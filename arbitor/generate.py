"""Sampling bytes from a model, one after another through its KV ledger.

Shape letters: S vocabulary.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from arbitor.errors import UserError
from arbitor.model.arb import ARBModel
from arbitor.model.ledger import KVLedger
from arbitor.model.sequencer import WINDOW
from arbitor.model.vocab import END_IDS, NUM_BYTES, PAD, to_bytes


def generate(
    model: ARBModel,
    prompt: bytes | str = b"",
    max_bytes: int = 400,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    stream: Callable[[bytes], object] | None = None,
    prefix: Tensor | None = None,
) -> bytes:
    """Bytes that follow the prompt (without the prompt); they need not be valid UTF-8.

    Args:
        model: any ARBModel.
        prompt: text to go on from; str becomes UTF-8. May be empty, and longer than the context.
        max_bytes: where to end if the model does not end before with EOS or STOP.
        temperature: divides the logits; 0 takes the most probable byte always.
        top_k: draw among the k most probable only; 0 is off.
        top_p: draw among the fewest most probable that together have this probability; 1 is off.
        seed: of the draws; None takes a fresh one. Equal seeds on one machine give equal bytes.
        stream: called with every byte as soon as it is drawn.
        prefix: float [1, P, D], an image or sound that stands ahead of the prompt, from `ARBModel.encode`.

    Raises:
        UserError: an argument outside its range.
    """
    drawn = bytearray()
    for byte in generate_stream(
        model,
        prompt,
        max_bytes,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        prefix=prefix,
    ):
        drawn += byte
        if stream is not None:
            stream(byte)
    return bytes(drawn)


def generate_stream(
    model: ARBModel,
    prompt: bytes | str = b"",
    max_bytes: int = 400,
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    prefix: Tensor | None = None,
) -> Iterator[bytes]:
    """As `generate`, yielding single bytes as they are drawn. Arguments are checked at the call."""
    check_sampling(max_bytes, temperature, top_k, top_p, seed)
    ids = list(to_bytes(prompt))
    # Behind a prefix a text begins as it does in training; elsewhere the prompt may be the middle of one.
    ids = [PAD] * (WINDOW - len(ids) if prefix is None else WINDOW) + ids
    return _draw(model, ids, max_bytes, temperature, top_k, top_p, new_generator(seed), prefix)


def new_generator(seed: int | None) -> torch.Generator:
    """A CPU generator for draws; None takes a fresh seed."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample_id(
    logits_S: Tensor, *, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> int:
    """Draws an id: temperature first, then the k most probable, then the nucleus (Holtzman et al. 2020).

    Args:
        logits_S: float [S], on any device; -inf never comes out. The draw is made on the CPU in fp64, so
            that equal logits and seeds give equal ids whatever the device.
        temperature, top_k, top_p: as in `generate`.
        generator: a CPU generator; advanced by one draw unless the temperature is 0.
    """
    logits_S = logits_S.detach().to("cpu", torch.float64)
    if bool(logits_S.isnan().any()):
        raise UserError("the model's logits are not numbers: its training diverged; use another checkpoint")
    if temperature == 0:
        return int(logits_S.argmax())
    logits_S = (logits_S - logits_S.max()) / temperature
    sorted_S, order_S = logits_S.sort(descending=True, stable=True)
    if top_k > 0:
        sorted_S[top_k:] = -math.inf
    probabilities_S = sorted_S.softmax(dim=0)
    # An id belongs to the nucleus if those before it do not fill it; the first one always does.
    if top_p < 1:
        mass_before_S = probabilities_S.cumsum(dim=0) - probabilities_S
        probabilities_S[mass_before_S >= top_p] = 0
    return int(order_S[torch.multinomial(probabilities_S, 1, generator=generator)])


def _draw(
    model: ARBModel,
    ids: list[int],
    max_bytes: int,
    temperature: float,
    top_k: int,
    top_p: float,
    generator: torch.Generator,
    prefix: Tensor | None,
) -> Iterator[bytes]:
    """Yields bytes; when the context is full, it begins anew: the prefix and the last half of the ids."""
    ctx = model.config.ctx
    # The last id of a training window is a target only, so ctx - 1 ids are the longest context trained on.
    ids = ids[-(ctx - 1) :]
    ledger = KVLedger(model.config, ledger_capacity(model, prefix))
    fresh = ids
    for _ in range(max_bytes):
        if ledger.num_ids + len(fresh) > ctx - 1:
            ledger.clear()
            fresh = ids = ids[-max(ctx // 2, WINDOW) :]
        begins = ledger.num_ids == 0
        output = model(torch.tensor([fresh]), ledger=ledger, prefix=prefix if begins else None)
        next_id = sample_id(
            byte_logits(output.logits[0, -1]),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
        )
        if next_id in END_IDS:
            return
        yield bytes([next_id])
        ids.append(next_id)
        fresh = [next_id]


def ledger_capacity(model: ARBModel, prefix: Tensor | None) -> int:
    """Positions of a whole context behind a prefix [B, P, D]."""
    return model.config.ctx - 2 + (0 if prefix is None else prefix.shape[1])


@torch.no_grad()
def greedy_texts(model: ARBModel, prefix: Tensor, max_bytes: int) -> list[bytes]:
    """The likeliest text behind each of many prefixes, byte by byte, all of them at once.

    Args:
        model: any ARBModel.
        prefix: float [B, P, D], from `ARBModel.encode`.
        max_bytes: where a text ends that the model does not end with EOS or STOP; at most what the context
            holds behind three PAD.

    Returns:
        B texts, each what `generate` with temperature 0 gives behind the same prefix.
    """
    ledger = KVLedger(model.config, ledger_capacity(model, prefix))
    texts = [bytearray() for _ in range(len(prefix))]
    running = set(range(len(texts)))
    fresh_BN = torch.full((len(texts), WINDOW), PAD)
    for _ in range(min(max_bytes, model.config.ctx - WINDOW)):
        output = model(fresh_BN, ledger=ledger, prefix=None if ledger.num_ids else prefix)
        next_B = byte_logits(output.logits[:, -1]).argmax(dim=-1).cpu()
        running = {row for row in running if int(next_B[row]) not in END_IDS}
        if not running:
            break
        for row in running:
            texts[row].append(int(next_B[row]))
        fresh_BN = next_B[:, None]
    return [bytes(text) for text in texts]


def byte_logits(logits_S: Tensor) -> Tensor:
    """Logits [..., S] without the control tokens that neither are bytes nor end the text."""
    allowed_S = torch.zeros_like(logits_S, dtype=torch.bool)
    allowed_S[..., :NUM_BYTES] = True
    allowed_S[..., list(END_IDS)] = True
    return logits_S.masked_fill(~allowed_S, -math.inf)


def check_sampling(max_bytes: int, temperature: float, top_k: int, top_p: float, seed: int | None) -> None:
    """Raise UserError for an argument of `generate` outside its range."""
    if max_bytes < 0:
        raise UserError(f"max_bytes is {max_bytes}; it must be 0 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}; it must be 0 (the most probable) or a number above")
    if top_k < 0:
        raise UserError(f"top_k is {top_k}; it must be 0 (off) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must be above 0 and at most 1 (off)")
    check_seed(seed)


def check_seed(seed: int | None) -> None:
    """Raise UserError for a seed of `new_generator` outside its range."""
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}; it must be from 0 to 2^63 - 1")
