"""Decoding of four packed bytes at once, in instructions of NVIDIA's GPUs.

A byte q is the fraction q / 256 in base 3, so floor(q 3^k / 256) is the number that its first k digits make:
the upper byte of a product that fits into 16 bits for all k up to 5. A register of 32 bits takes two such
products, and a digit is such a number less three times the one before, which for four of them in the bytes of
a register never borrows.
"""

import struct

PLANES = 5
# The upper byte of a float of 16 bits between 1280 and 1536, whose lower byte is what is above 1280.
FLOAT = 0x65
# Added to 243 q, it carries into the upper byte where q is no byte that packing produces.
MARK = 13


def leading(count: int, mark: int = 0) -> str:
    """$0: the numbers that the first `count` digits of the bytes in $1 make; `mark` is added to 3^count q."""
    return _block([*_split("$1", FLOAT), *_leading("$0", count, mark)])


def digit(plane: int) -> str:
    """$0: digit number `plane` of the bytes in $1."""
    if plane == 0:
        return leading(1)
    return _block(
        [
            *_split("$1", FLOAT),
            *_leading("n0", plane + 1),
            *_leading("n1", plane),
            "mad.lo.s32 $0, n1, -3, n0;",
        ]
    )


def trits() -> str:
    """$0 to $4: the trits of the bytes in $6, times the bytes in $7 to $11, which are 1 to 64.

    $5: not 0 in the bytes where $6 is one that packing never produces.
    """
    lines = _split("$6")
    for plane in range(PLANES):
        times = f"${7 + plane}"
        lines += [
            *_numbers(f"n{plane}", plane + 1),
            # (trit + 1) m + 128 - m, with the first bit turned, is trit m; no byte borrows or carries.
            f"mad.lo.s32 a, n{plane - 1}, -3, n{plane};" if plane else "mov.b32 a, n0;",
            f"and.b32 b, {times}, 0xFF;",
            f"sub.u32 x, 0x80808080, {times};",
            "mad.lo.u32 a, a, b, x;",
            f"xor.b32 ${plane}, a, 0x80808080;",
        ]
    return _block([*lines, *_numbers("a", PLANES, MARK * 0x10001), "xor.b32 $5, a, n4;"])


def weights() -> str:
    """$0 to $9: bf16 weights, two a register and two registers a plane, of the bytes in $10.

    $11 to $20 are the scales in the same order, powers of two; a byte that packing never produces gives NaN.
    """
    lines = ["mov.b32 less, 0xC301C301;", "mov.b32 zero, 0x80008000;"]
    for pair, selector in enumerate((0x4140, 0x4342)):
        lines += [
            f"prmt.b32 q, $10, 0, {selector:#x};",
            # All ones, as NaN has, in the halves of bytes whose 243 q leaves a rest above 242.
            "mul.lo.u32 a, q, 243;",
            "and.b32 a, a, 0x00FF00FF;",
            "add.u32 a, a, 0x000D000D;",
            "shr.u32 a, a, 8;",
            "and.b32 a, a, 0x00010001;",
            "mul.lo.u32 e, a, 0x7FFF;",
        ]
        for plane in range(PLANES):
            lines += [
                "mul.lo.u32 x, q, 3;",
                "and.b32 q, x, 0x00FF00FF;",
                # A digit below the exponent of 128 is the float 128 + digit, and 129 less is the trit.
                "prmt.b32 a, x, 0x43, 0x4341;",
                f"or.b32 b, ${11 + 2 * plane + pair}, e;",
                "fma.rn.bf16x2 y, b, less, zero;",
                f"fma.rn.bf16x2 ${2 * plane + pair}, a, b, y;",
            ]
    return _block(lines)


def _split(bytes_: str, upper: int = 0) -> list[str]:
    """e, o: the even and the odd ones of four bytes, in halves, whose upper bytes are given."""
    return [f"prmt.b32 e, {bytes_}, {upper:#x}, 0x4240;", f"prmt.b32 o, {bytes_}, {upper:#x}, 0x4341;"]


def _numbers(target: str, count: int, added: int = 0) -> list[str]:
    """Upper bytes of the halves of 3^count e and o, to which a number of 32 bits is added."""
    return [
        f"mad.lo.u32 x, e, {3**count}, {added:#x};",
        f"mad.lo.u32 y, o, {3**count}, {added:#x};",
        f"prmt.b32 {target}, x, y, 0x7351;",
    ]


def _leading(target: str, count: int, mark: int = 0) -> list[str]:
    """As `leading`, of bytes q that are the lower ones of e and o, which are floats 1280 + q of 16 bits.

    From 1024 to 2048 such floats are whole numbers, so 1280 + 3^k q / 256 less a half is rounded to 1280 and
    the whole part of the rest. There is a tie for q = 0 only, and its even side is 1280. For the two largest
    k the number that is added keeps its half in 16 bits. GPUs fuse twice as many of these products and sums
    as of integers in the same time, and such are most of what a product of few tokens computes.
    """
    if count < 4 or mark:
        # The floats' upper bytes make a known number, which is taken off again.
        return _numbers(target, count, (mark - 3**count * (FLOAT << 8)) * 0x10001 & 0xFFFFFFFF)
    times = 3**count / 256
    return [
        f"mov.b32 a, {_both(times)};",
        f"mov.b32 b, {_both(1279.5 - 1280 * times)};",
        "fma.rn.f16x2 x, e, a, b;",
        "fma.rn.f16x2 y, o, a, b;",
        f"prmt.b32 {target}, x, y, 0x6240;",
    ]


def _both(value: float) -> str:
    """Both halves of a register: a float of 16 bits, rounded."""
    (bits,) = struct.unpack("<H", struct.pack("<e", value))
    return f"{bits * 0x10001:#x}"


def _block(lines: list[str]) -> str:
    registers = ".reg .b32 e, o, x, y, a, b, q, n0, n1, n2, n3, n4, less, zero;"
    return "{\n" + "\n".join([registers, *lines]) + "\n}"
