"""Decoding of four packed bytes at once, in instructions of NVIDIA's GPUs.

A byte q is the fraction q / 256 in base 3, so floor(q 3^k / 256) is the number that its first k digits make:
the upper byte of a product that fits into 16 bits for all k up to 5. A register of 32 bits takes two such
products, and a digit is such a number less three times the one before, which for four of them in the bytes of
a register never borrows.
"""

PLANES = 5
# Added to 243 q, it carries into the upper byte where q is no byte that packing produces.
MARK = 13


def leading(count: int, mark: int = 0) -> str:
    """$0: the numbers that the first `count` digits of the bytes in $1 make; `mark` is added to 3^count q."""
    return _block([*_split("$1"), *_numbers("$0", count, mark)])


def digit(plane: int) -> str:
    """$0: digit number `plane` of the bytes in $1."""
    if plane == 0:
        return leading(1)
    return _block(
        [
            *_split("$1"),
            *_numbers("a", plane + 1),
            *_numbers("b", plane),
            "mad.lo.s32 $0, b, -3, a;",
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
    return _block([*lines, *_numbers("a", PLANES, MARK), "xor.b32 $5, a, n4;"])


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


def _split(bytes_: str) -> list[str]:
    """e, o: the even and the odd ones of four bytes, in halves."""
    return [f"prmt.b32 e, {bytes_}, 0, 0x4240;", f"prmt.b32 o, {bytes_}, 0, 0x4341;"]


def _numbers(target: str, count: int, mark: int = 0) -> list[str]:
    """Upper bytes of 3^count e and o."""
    return [
        f"mad.lo.u32 x, e, {3**count}, {mark * 0x10001:#x};",
        f"mad.lo.u32 y, o, {3**count}, {mark * 0x10001:#x};",
        f"prmt.b32 {target}, x, y, 0x7351;",
    ]


def _block(lines: list[str]) -> str:
    registers = ".reg .b32 e, o, x, y, a, b, q, n0, n1, n2, n3, n4, less, zero;"
    return "{\n" + "\n".join([registers, *lines]) + "\n}"
