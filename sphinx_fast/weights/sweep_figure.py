"""Lines as an SVG, those of a sweep for instance: a line per domain over beta, its least marked; light or dark as the
reader is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 70, 150, 40, 60
COLOURS = (
    "#2878c8",
    "#d9660a",
    "#2a9440",
    "#b0489c",
    "#8c7a00",
    "#10939c",
    "#cc3d4f",
    "#7a6fd0",
)  # of middle lightness
STYLE = """<style>
.paper { fill: #fff } .ink { fill: #222 } .mean { fill: #666; stroke: #666 } .grid { stroke: #e4e4e4 }
@media (prefers-color-scheme: dark) {
.paper { fill: #15181c } .ink { fill: #ddd } .mean { fill: #aaa; stroke: #aaa } .grid { stroke: #33383f }
}
</style>"""


def draw(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    best: Mapping[str, float],
    *,
    along: str = "beta",
    up: str = "loss",
) -> str:
    """Lines {name: (beta, loss) ...} and the beta of each one's least. "mean" is dashed; nan and inf are left out."""
    shown = {name: sorted(p for p in points if math.isfinite(p[1])) for name, points in lines.items()}
    xs, ys = ([point[axis] for points in shown.values() for point in points] or [0.0] for axis in (0, 1))
    (x0, x1), (y0, y1) = _span(xs, 0), _span(ys, 0.06)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (right - LEFT)

    def down(y: float) -> float:
        return floor - (y - y0) / (y1 - y0) * (floor - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        STYLE,
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text class="ink" x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text class="ink" x="{(LEFT + right) / 2}" y="{HEIGHT - 16}" text-anchor="middle">{along}</text>',
        f'<text class="ink" transform="translate(18 {(TOP + floor) / 2}) rotate(-90)" text-anchor="middle">{up}</text>',
    ]
    for value, label in _ticks(y0, y1, 6):
        y = down(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text class="ink" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in _ticks(x0, x1, 10):
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{floor}"/>')
        parts.append(f'<text class="ink" x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{label}</text>')
    end = -math.inf  # of the label above
    order = sorted((name for name in shown if shown[name]), key=lambda name: -shown[name][-1][1])
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(name for name in shown if name != "mean")}
    for name in order:
        colour = f'fill="{colours[name]}" stroke="{colours[name]}"' if name in colours else 'class="mean"'
        dashes = "" if name in colours else ' stroke-dasharray="5 4"'
        path = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in shown[name])
        parts.append(f'<polyline points="{path}" {colour} fill-opacity="0" stroke-width="2"{dashes}/>')
        for x, y in shown[name]:
            radius = 5 if x == best.get(name) else 2
            parts.append(f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="{radius}" {colour}/>')
        end = max(down(shown[name][-1][1]), end + 15)
        parts.append(f'<text x="{right + 10}" y="{end + 4:.1f}" {colour} stroke-width="0">{escape(name[:20])}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    """From the least to the greatest with a margin on both sides, never empty."""
    low, high = min(values), max(values)
    extra = (high - low) * margin if high > low else 0.1 * max(1.0, abs(high))
    return low - extra, high + extra


def _ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most `most` + 1, and how they are written."""
    power = math.floor(math.log10((high - low) / most))
    step, decimals = next(
        (factor * 10.0**p, max(0, -p))
        for p in (power, power + 1)
        for factor in (1, 2, 5)
        if (high - low) / (factor * 10.0**p) <= most + 1e-9
    )
    return [
        (i * step, f"{i * step:.{decimals}f}")
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
