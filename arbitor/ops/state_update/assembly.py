"""The rule of `state_update` on four packed bytes, in instructions of NVIDIA's GPUs for pairs of 16 bits.

A 32-bit register holds the same quantity of two weights, one in each half. What is compared in the reference
is a minimum or maximum here, so that nothing branches. Per plane and pair, with span S and T' = T_accum +
vote - S, in halves of 16 bits:

    voted = min(T' - T_accum + S, 1) unsigned                 1 where there is a vote
    up    = max(min(T' + S + 1 - theta, voted), 0)
    down  = max(min(-T' - S + 1 - lowest, voted), 0)
    digit' = min(max(digit + up - down, 0), 2)
    T_accum' = T' + S (1 + digit - digit'), held between the rails of the weight

The first lane of a pair is byte 0 or 1 of the four, the second byte 2 or 3.
"""

PLANES = 5
_LOW_BYTES = 0x00FF00FF
# What the halves can hold: votes reach 2^14, and these come on top.
MAX_SPAN, MAX_THRESHOLD = 4096, 4096
# (v * factor + offset) >> 16 is ceil(256 v / 243) for every v below 243.
REPACK_FACTOR, REPACK_OFFSET = 69043, 65300


def fits(span: int, threshold: int, rail: int) -> bool:
    """Whether constants of `state_update` stay inside 16 bits and need no case of their own."""
    return 0 < span <= MAX_SPAN and 0 < threshold <= MAX_THRESHOLD and rail > 0


def rule(span: int, threshold: int, lowest: int, rail: int, reset: bool) -> str:
    """PTX of the rule.

    Operands: $0 the bytes' new value, $1 to $5 accumulators of the five planes, $6 to $9 flips of the four
    bytes (all in the first). Then the inputs: $10 the bytes, $11 to $15 the accumulators, and for every
    plane four sums (vote - span) * 2^16 + anything below.
    """
    held = min(rail, 127)
    # Instructions on halves take no immediate numbers.
    numbers = {
        "one": 1,
        "two": 2,
        "less": -1,
        "span": span,
        "upper": span + 1 - threshold,
        "lower": 2 - span - lowest,
    }
    lines = [
        ".reg .b32 q0, q1, v0, v1, f0, f1, s0, s1, x, d, t, a, z, u, w, n, l, h;",
        f".reg .b32 {', '.join(numbers)};",
        *(f"mov.b32 {name}, {_both(number)};" for name, number in numbers.items()),
        "prmt.b32 q0, $10, 0, 0x4240;",
        "prmt.b32 q1, $10, 0, 0x4341;",
    ]
    for plane in range(PLANES):
        for pair in range(2):
            first, second = (16 + 4 * plane + byte for byte in (pair, pair + 2))
            q, v, f, s = (f"{name}{pair}" for name in "qvfs")
            lines += [
                # The digit is the overflow of three times the byte; it comes out with 1 added.
                f"mad.lo.u32 x, {q}, 3, 0x01000100;",
                "prmt.b32 d, x, 0, 0x4341;",
                f"and.b32 {q}, x, {_LOW_BYTES:#x};",
                f"prmt.b32 t, ${first}, ${second}, 0x7632;",
                "add.u16x2 z, t, span;",
                "min.u16x2 z, z, one;",
                f"prmt.b32 a, ${11 + plane}, 0, {'0xA280' if pair == 0 else '0xB391'};",
                "add.s16x2 t, t, a;",
                "add.s16x2 u, t, upper;",
                "min.relu.s16x2 u, u, z;",
                "not.b32 w, t;",
                "add.s16x2 w, w, lower;",
                "min.relu.s16x2 w, w, z;",
                "add.u32 n, d, u;",
                "sub.u32 n, n, w;",
                "add.s16x2 n, n, less;",
                "min.relu.s16x2 n, n, two;",
                "sub.u32 d, d, n;",  # 1 - flip
                "add.s16x2 h, n, less;",
                "min.relu.s16x2 h, h, z;",
                f"mad.lo.u32 h, h, {held - 127}, {_both(127)};",
                "not.b32 l, n;",
                "add.s16x2 l, l, two;",
                "min.relu.s16x2 l, l, z;",
                f"mad.lo.u32 l, l, {127 - held}, {_both(-127)};",
                *_total(span, reset),
                "min.s16x2 t, t, h;",
                f"max.s16x2 {s}, t, l;",
                f"mad.lo.u32 {v}, {v}, 3, n;" if plane else f"mov.b32 {v}, n;",
                f"mad.lo.u32 {f}, {f}, 4, d;" if plane else f"mov.b32 {f}, d;",
            ]
        lines.append(f"prmt.b32 ${1 + plane}, s0, s1, 0x6240;")
    return "{\n" + "\n".join(lines + _repacked() + _flips()) + "\n}"


def constraints() -> str:
    """Of the operands of `rule`."""
    return ",".join(["=&r"] * (1 + PLANES + 4) + ["r"] * (1 + PLANES + 4 * PLANES))


def _both(value: int) -> str:
    """A number in both halves."""
    return f"{(value & 0xFFFF) * 0x10001:#x}"


def _total(span: int, reset: bool) -> list[str]:
    """t, the accumulator after its flip, from t = T' and d = 1 - flip."""
    if not reset:
        return [f"mul.lo.u32 a, d, {span};", "add.s16x2 t, t, a;"]
    stays = [f"and.b32 a, d, {_both(1)};", "mul.lo.u32 a, a, 0xFFFF;"]
    return [*stays, "add.s16x2 t, t, span;", "and.b32 t, t, a;"]


def _repacked() -> list[str]:
    """ceil(256 v / 243) of four v, which is the third byte of a product for all v below 243."""
    lines = []
    for byte, half, selector in (
        ("q0", "v0", 0x4440),
        ("q1", "v1", 0x4440),
        ("x", "v0", 0x4442),
        ("d", "v1", 0x4442),
    ):
        lines += [
            f"prmt.b32 {byte}, {half}, 0, {selector:#x};",
            f"mad.lo.u32 {byte}, {byte}, {REPACK_FACTOR}, {REPACK_OFFSET};",
        ]
    return [
        *lines,
        "prmt.b32 q0, q0, q1, 0x0062;",
        "prmt.b32 x, x, d, 0x0062;",
        "prmt.b32 $0, q0, x, 0x5410;",
    ]


def _flips() -> list[str]:
    """Number of weights whose 1 - flip, two bits each, is even."""
    return [
        "not.b32 f0, f0;",
        "not.b32 f1, f1;",
        "and.b32 f0, f0, 0x01550155;",
        "and.b32 f1, f1, 0x01550155;",
        "mad.lo.u32 f0, f1, 2, f0;",
        "popc.b32 $6, f0;",
        *(f"mov.b32 ${7 + byte}, 0;" for byte in range(3)),
    ]
