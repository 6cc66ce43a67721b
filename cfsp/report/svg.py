"""Charts as inline SVG that fits any width: x in percent, y in pixels, colours by CSS class.

Numbers are also told in text: a chart has an ``aria-label``, its marks have tooltips.
"""

import base64
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup

X_LABELS = 18  # pixels under the plot
PADDING = 8  # pixels over it, so that the highest label fits
SERIES = 6  # colours of lines; more results than that repeat them
STRIP_BINS = 512
STRIP_COLOUR = (59, 125, 196)  # is told from both backgrounds


@dataclass(frozen=True)
class Axis:
    """From values to pixels from the top of a plot of ``height``."""

    low: float
    high: float
    height: int
    log: bool = False

    def y(self, value: float) -> float:
        """Pixels from the top; values beyond the axis are at its end."""
        low, high, value = (self._scaled(v) for v in (self.low, self.high, value))
        share = (value - low) / (high - low) if high > low else 0.0
        return PADDING + self.height * (1 - min(max(share, 0.0), 1.0))

    def _scaled(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value

    def ticks(self) -> list[float]:
        """Round values that fall on the axis."""
        if not self.log:
            return round_ticks(self.low, self.high)
        decades = math.log10(self.high / self.low)
        steps = (1, 2, 5) if decades < 2.5 else (1,)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        powers = range(first, last + 1, math.ceil(decades / 6))
        values = [step * 10.0**power for power in powers for step in steps]
        return [value for value in values if self.low <= value <= self.high]


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """A number in few characters: 1,536; 0.097; 1.8e+06."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}"


def band(position: int, count: int, share: float = 0.8) -> tuple[float, float]:
    """(left, width) in percent of mark ``position`` of ``count``."""
    return (position + (1 - share) / 2) / count * 100, share / count * 100


def centre(position: int, count: int, share: float = 0.8) -> float:
    """The middle of a :func:`band`."""
    left, width = band(position, count, share)
    return left + width / 2


def series(position: int) -> str:
    """The class that gives a result its colour."""
    return f"series-{position % SERIES}"


def rect(left: float, width: float, top: float, bottom: float, kind: str) -> Markup:
    """A filled rectangle: x in percent, y in pixels."""
    return Markup(
        '<rect class="{}" x="{:.3f}%" width="{:.3f}%" y="{:.1f}" height="{:.1f}"/>'
    ).format(kind, left, width, top, max(bottom - top, 0.0))


def dot(x: float, y: float, kind: str, radius: float = 3) -> Markup:
    """A disc: x in percent, y in pixels."""
    disc = Markup('<circle class="{}" cx="{:.3f}%" cy="{:.1f}" r="{}"/>')
    return disc.format(kind, x, y, radius)


def line(points: Iterable[tuple[float, float]], height: float, kind: str) -> Markup:
    """A line through points: x in percent, y in pixels of a plot that is ``height`` high."""
    path = "M" + "L".join(f"{x:.2f} {y:.1f}" for x, y in points)
    return Markup(
        '<svg class="lines" viewBox="0 0 100 {0}" preserveAspectRatio="none" width="100%" '
        'height="{0}"><path class="{1}" d="{2}" vector-effect="non-scaling-stroke"/></svg>'
    ).format(height, kind, path)


def mark(title: str, *shapes: Markup) -> Markup:
    """Shapes with a tooltip."""
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup().join(shapes))


@dataclass(frozen=True)
class Plot:
    """A plot with its axes, which the page's template draws."""

    axis: Axis
    marks: Sequence[Markup]
    """What is in it, the lowest first."""
    label: str
    """What it shows, for those who do not see it."""
    x_labels: Sequence[tuple[float, str]]
    """(percent, text) under it."""
    legend: Sequence[tuple[str, str]] = ()
    """(class, text) of every kind of mark."""

    @property
    def height(self) -> int:
        """Pixels with all that is around it."""
        return PADDING + self.axis.height + X_LABELS

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """(pixels from the top, text) of y."""
        return [(self.axis.y(value), number(value)) for value in self.axis.ticks()]


def block_labels(count: int) -> list[tuple[float, str]]:
    """Numbers under a plot of ``count`` blocks, few enough for a phone."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if count / s <= 8)
    return [((n + 0.5) / count * 100, str(n)) for n in range(0, count, step)]


def kept_shares(kept: torch.Tensor, size: int, bins: int) -> torch.Tensor:
    """Share of the channels in each of ``bins`` parts of ``size`` channels that is kept: [bins]."""
    size = max(size, 1)
    found = torch.bincount(kept * bins // size, minlength=bins)
    every = torch.bincount(torch.arange(size) * bins // size, minlength=bins)
    return found / every.clamp_min(1)


def kept_strip(kept: torch.Tensor, size: int) -> str:
    """Which of ``size`` channels are kept, left to right, as the data URI of a PNG one pixel high.

    Opaque where all channels under a pixel are kept, transparent where none is.
    """
    bins = min(max(size, 1), STRIP_BINS)
    levels = (kept_shares(kept, size, bins) * 15).round().to(torch.uint8)
    if bins % 2:
        levels = torch.cat([levels, levels.new_zeros(1)])
    pixels = (levels[0::2] << 4 | levels[1::2]).numpy().tobytes()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", bins, 1, 4, 3, 0, 0, 0)),
        (b"PLTE", bytes(STRIP_COLOUR) * 16),
        (b"tRNS", bytes(range(0, 256, 17))),
        (b"IDAT", zlib.compress(b"\0" + pixels, 9)),
        (b"IEND", b""),
    )
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
