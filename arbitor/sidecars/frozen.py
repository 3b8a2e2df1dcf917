"""Weights of a pretrained module as integers that a model owns and never trains.

Matrices are int8 codes times a power of two for each row, vectors int16 codes times one power of two. The
weights belong to the model: a checkpoint holds them, and needs no other file.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from arbitor.errors import UserError

INT8_MAX = 127
INT16_MAX = 32767


class _Integers(nn.Module):
    """Integer buffers under the names of parameters, with "-" for "."."""


class FrozenWeights(nn.Module):
    """The parameters of another module, rounded.

    Args:
        parameters: names and parameters of the module, which may lie on the meta device; only their shapes
            count.
        device: where to make the integers. All are 0 until `round_from` or a checkpoint brings them.

    Attributes:
        codes, exponents: the integers.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], device: torch.device | None = None) -> None:
        super().__init__()
        self.codes, self.exponents = _Integers(), _Integers()
        for name, parameter in parameters:
            rows = _num_rows(name, parameter.shape)
            dtype = torch.int8 if rows else torch.int16
            code = torch.zeros(parameter.shape, dtype=dtype, device=device)
            exponent = torch.zeros(max(rows, 1), dtype=torch.int8, device=device)
            self.codes.register_buffer(name.replace(".", "-"), code)
            self.exponents.register_buffer(name.replace(".", "-"), exponent)

    @torch.no_grad()
    def round_from(self, parameters: Iterable[tuple[str, Tensor]], source: str) -> None:
        """Round a module's parameters to integers, and own them.

        Args:
            parameters: float, of the names and shapes that these weights were made for.
            source: where they come from, for the message.

        Raises:
            UserError: numbers that are not finite; nothing is changed then.
        """
        given = dict(parameters)
        for name, parameter in given.items():
            if not bool(torch.isfinite(parameter).all()):
                raise UserError(f"{source}: {name} holds numbers that are not finite")
        for name, parameter in given.items():
            key = name.replace(".", "-")
            code, exponent = rounded(parameter.float(), _num_rows(name, parameter.shape))
            getattr(self.codes, key).copy_(code)
            getattr(self.exponents, key).copy_(exponent)

    def weights(self, part: str = "") -> dict[str, Tensor]:
        """The parameters as fp32, by name.

        Args:
            part: a submodule, whose parameters alone are given, by their names in it; empty for all.
        """
        prefix = f"{part}." if part else ""
        exponents = dict(self.exponents.named_buffers())
        decoded = {}
        for key, code in self.codes.named_buffers():
            name = key.replace("-", ".")
            if name.startswith(prefix):
                exponent = exponents[key]
                values = torch.ldexp(code.float().view(len(exponent), -1), exponent[:, None].int())
                decoded[name.removeprefix(prefix)] = values.view(code.shape)
        return decoded


def _num_rows(name: str, shape: torch.Size) -> int:
    """Rows of a matrix, each with an exponent of its own; 0 for what counts as a vector.

    Args:
        name: of the parameter; kernels of convolutions are matrices with a row for each output channel.
        shape: its shape.
    """
    if len(shape) < 2:
        return 0
    if name.endswith("position_embeddings"):
        return int(shape[1])
    return int(shape[0]) if name.endswith("weight") else 0


def rounded(values: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Float values as integer codes and exponents: value = code * 2^exponent, the codes as large as fits.

    Args:
        values: fp32 of any shape.
        rows: how many rows, of int8 codes and each with its exponent; 0 for int16 codes with one exponent.

    Returns:
        Codes of the values' shape, and int8 exponents [max(rows, 1)].
    """
    limit = INT8_MAX if rows else INT16_MAX
    flat = values.reshape(max(rows, 1), -1)
    absmax = flat.abs().amax(dim=1)
    # absmax / limit = m * 2^e with m < 1, so that absmax * 2^-e is at most the limit.
    exponent = torch.frexp(absmax / limit).exponent.clamp(-126, 126)
    exponent = torch.where(absmax > 0, exponent, 0)
    code = torch.ldexp(flat, -exponent[:, None]).round_().clamp_(-limit, limit)
    dtype = torch.int8 if rows else torch.int16
    return code.to(dtype).view(values.shape), exponent.to(torch.int8)
