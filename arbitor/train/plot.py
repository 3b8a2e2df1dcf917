"""`loss.png`: bits per byte over the bytes seen, drawn with Pillow."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from arbitor.train.metrics import FIGURES, evaluation_keys, read_metrics

WIDTH, HEIGHT = 960, 540
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 56, 64
START_SHARE = 0.01  # of the run, for which the vertical axis makes no room
SCALE = 2  # drawn this much larger and reduced, which smooths the lines
INK, FAINT, GRID = (38, 43, 51), (112, 120, 132), (230, 233, 238)
RAW, SMOOTH, HELD_OUT = (188, 207, 235), (42, 98, 184), (214, 92, 20)

Point = tuple[float, float]


def plot_loss(metrics: Path, target: Path, title: str) -> None:
    """Draw the training loss and the held-out bits per byte of a `metrics.jsonl`.

    Args:
        metrics: the file.
        target: the PNG to write.
        title: first line of the picture.
    """
    lines = list(read_metrics(metrics))
    steps = [line for line in lines if "loss" in line]
    bytes_at = {line["step"]: line["bytes_seen"] for line in steps}
    figure = next((f for f in FIGURES for line in lines if evaluation_keys(f)[1] in line), "bits_per_byte")
    key = evaluation_keys(figure)[1]
    # The loss stands in the same picture where it is in the same unit.
    raw = [(line["bytes_seen"], line["bits_per_byte"]) for line in steps if line["bits_per_byte"] is not None]
    held_out = [(bytes_at.get(line["step"], 0), line[key]) for line in lines if line.get(key) is not None]
    _draw(raw, _smoothed(raw), held_out, title, FIGURES[figure]).save(target, optimize=True)


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential mean over about a fiftieth of the run, corrected for its start."""
    decay = 1.0 - 1.0 / max(1.0, len(points) / 50)
    mean, weight, smoothed = 0.0, 0.0, []
    for x, y in points:
        mean = decay * mean + (1.0 - decay) * y
        weight = decay * weight + (1.0 - decay)
        smoothed.append((x, mean / weight))
    return smoothed


def _draw(raw: list[Point], smooth: list[Point], held_out: list[Point], title: str, unit: str) -> Image.Image:
    image = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
    # The raw line counts for the lower end only: its first peaks would leave no height for the rest.
    lowest = [min(raw[len(raw) // 10 :], key=lambda point: point[1])] if raw else []
    canvas = _Canvas(image, [*smooth, *held_out, *lowest])
    canvas.axes(title, unit)
    canvas.line(raw, RAW, 1)
    canvas.line(smooth, SMOOTH, 2.5)
    canvas.line(held_out, HELD_OUT, 2)
    canvas.dots(held_out, HELD_OUT)
    entries = [("training, smoothed", SMOOTH)]
    if held_out:
        entries.append((f"held out, first windows {held_out[-1][1]:.3f}", HELD_OUT))
    canvas.legend(entries)
    return image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


class _Canvas:
    """Axes that hold `points`, and what is drawn into them; lengths in pixels of the finished picture."""

    def __init__(self, image: Image.Image, points: Sequence[Point]) -> None:
        self.draw = ImageDraw.Draw(image)
        self.x_max = max((x for x, _ in points), default=1.0) or 1.0
        # The fall of the first moments would leave no height for the rest; it may leave the picture.
        values = [y for x, y in points if x >= START_SHARE * self.x_max] or [0.0, 8.0]
        self.y_step = _round_step((max(values) - min(values)) or 1.0, 6)
        self.y_min = math.floor(min(values) / self.y_step) * self.y_step
        self.y_max = max(math.ceil(max(values) / self.y_step) * self.y_step, self.y_min + self.y_step)

    def axes(self, title: str, unit: str) -> None:
        self.text((LEFT, 14), title, INK, 17, "la")
        self.text((LEFT, TOP - 10), unit, FAINT, 13, "ls")
        self.text((WIDTH - RIGHT, HEIGHT - 14), "bytes seen", FAINT, 13, "rs")
        count = round((self.y_max - self.y_min) / self.y_step)
        digits = max(0, -math.floor(math.log10(self.y_step) + 1e-9))
        for i in range(count + 1):
            value = self.y_min + i * self.y_step
            y = self._y(value)
            self._segment((LEFT, y), (WIDTH - RIGHT, y), GRID)
            self.text((LEFT - 10, y), f"{value:.{digits}f}", INK, 13, "rm")
        step = _round_step(self.x_max, 7)
        for i in range(int(self.x_max / step + 1e-9) + 1):
            x = self._x(i * step)
            self._segment((x, HEIGHT - BOTTOM), (x, HEIGHT - BOTTOM + 5), FAINT)
            self.text((x, HEIGHT - BOTTOM + 10), _short_bytes(i * step), INK, 13, "ma")
        self._segment((LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM), FAINT)

    def line(self, points: Sequence[Point], colour: tuple[int, int, int], width: float) -> None:
        if len(points) > 1:
            pixels = [self._pixel(point) for point in points]
            self.draw.line(pixels, fill=colour, width=round(width * SCALE), joint="curve")

    def dots(self, points: Sequence[Point], colour: tuple[int, int, int]) -> None:
        for point in points:
            x, y = self._pixel(point)
            r = 4 * SCALE
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline="white", width=SCALE)

    def legend(self, entries: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
        for row, (label, colour) in enumerate(entries):
            y = TOP + 16 + 22 * row
            self.text((WIDTH - RIGHT - 36, y), label, INK, 13, "rm")
            self.draw.line(
                [((WIDTH - RIGHT - 28) * SCALE, y * SCALE), ((WIDTH - RIGHT - 4) * SCALE, y * SCALE)],
                fill=colour,
                width=3 * SCALE,
            )

    def text(self, at: Point, text: str, colour: tuple[int, int, int], size: int, anchor: str) -> None:
        font = ImageFont.load_default(size * SCALE)
        self.draw.text((at[0] * SCALE, at[1] * SCALE), text, fill=colour, font=font, anchor=anchor)

    def _x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * value / self.x_max

    def _y(self, value: float) -> float:
        share = (min(value, self.y_max) - self.y_min) / (self.y_max - self.y_min)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * max(0.0, share)

    def _pixel(self, point: Point) -> Point:
        return self._x(point[0]) * SCALE, self._y(point[1]) * SCALE

    def _segment(self, start: Point, end: Point, colour: tuple[int, int, int]) -> None:
        ends = [start[0] * SCALE, start[1] * SCALE, end[0] * SCALE, end[1] * SCALE]
        self.draw.line(ends, fill=colour, width=SCALE)


def _round_step(span: float, count: int) -> float:
    """The smallest of 1, 2, 5 times a power of ten that divides `span` into at most `count` parts."""
    power = 10.0 ** math.floor(math.log10(span / count))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power * count >= span * 0.999)


def _short_bytes(count: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count:g}"
