"""Interprets the inline assembly of kernels, so that it can be tested where there is no GPU.

Knows straight-line PTX on 32-bit registers, as much of it as the kernels use; see NVIDIA's PTX ISA for what
the instructions do.
"""

import re

import numpy as np
import torch

WORD = 0xFFFFFFFF


def run(assembly, outputs, inputs):
    """Results, uint32 arrays, of assembly with `outputs` results and some uint32 arrays of one shape."""
    registers = {f"${outputs + i}": np.asarray(x).astype(np.uint64) & WORD for i, x in enumerate(inputs)}
    shape = registers[f"${outputs}"].shape
    text = assembly.strip().removeprefix("{").removesuffix("}")
    for statement in filter(None, map(str.strip, text.split(";"))):
        name, _, rest = statement.partition(" ")
        if name == ".reg":
            continue
        target, *operands = [part.strip() for part in rest.split(",")]
        values = [_value(operand, registers, shape) for operand in operands]
        registers[target] = _execute(name, values) & WORD
    return [registers[f"${i}"].astype(np.uint32) for i in range(outputs)]


def _value(operand, registers, shape):
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", operand):
        return np.full(shape, int(operand, 0) & WORD, dtype=np.uint64)
    return registers[operand]


def _execute(name, values):
    operation, *modifiers = name.split(".")
    kind = modifiers[-1]
    if kind == "bf16x2":
        return _fused(*values)
    if kind.endswith("x2"):
        return _halves(operation, modifiers, values)
    if operation == "prmt":
        return _permuted(*values)
    if operation == "dp4a":
        return _dot(modifiers, *values)
    a, b, c = (*values, None, None)[:3]
    plain = {
        "mov": lambda: a,
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "mad": lambda: a * b + c,
        "and": lambda: a & b,
        "or": lambda: a | b,
        "xor": lambda: a ^ b,
        "not": lambda: ~a,
        "shl": lambda: a << b,
        "shr": lambda: a >> b,
        "popc": lambda: sum((a >> bit) & 1 for bit in range(32)),
    }
    if operation in ("mul", "mad"):
        assert modifiers[0] == "lo"
    if operation == "shr":
        assert kind == "u32"
    return plain[operation]().astype(np.uint64)


def _halves(operation, modifiers, values):
    signed = modifiers[-1] == "s16x2"
    result = np.zeros_like(values[0])
    for shift in (0, 16):
        a, b = (((value >> shift) & 0xFFFF).astype(np.int64) for value in values)
        if signed:
            a, b = ((x ^ 0x8000) - 0x8000 for x in (a, b))
        c = {"add": np.add, "min": np.minimum, "max": np.maximum}[operation](a, b)
        if "relu" in modifiers:
            c = np.maximum(c, 0)
        result |= (c & 0xFFFF).astype(np.uint64) << shift
    return result


def _fused(a, b, c):
    """a b + c of bf16 halves; exact in fp64 for what kernels compute with it, and rounded once by torch."""
    result = np.zeros_like(a)
    for shift in (0, 16):
        x, y, z = (
            (((value >> shift) & 0xFFFF) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
            for value in (a, b, c)
        )
        rounded = torch.from_numpy(x * y + z).to(torch.bfloat16).view(torch.int16).numpy()
        result |= (rounded.astype(np.int64) & 0xFFFF).astype(np.uint64) << shift
    return result


def _permuted(a, b, selector):
    both = a | b << 32
    result = np.zeros_like(a)
    for place in range(4):
        chosen = (selector >> 4 * place) & 15
        byte = (both >> 8 * (chosen & 7)) & 255
        byte = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte).astype(np.uint64)
        result |= byte << 8 * place
    return result


def _dot(modifiers, a, b, c):
    total = c.astype(np.int64)
    for byte in range(4):
        x, y = (((value >> 8 * byte) & 255).astype(np.int64) for value in (a, b))
        if modifiers[0] == "s32":
            x = (x ^ 128) - 128
        if modifiers[1] == "s32":
            y = (y ^ 128) - 128
        total = total + x * y
    return (total & WORD).astype(np.uint64)
