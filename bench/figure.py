"""docs/views.svg, docs/attention.svg and docs/engine.svg: time or rate against size, ours and each peer, from results.

python bench/figure.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 420, 60, 150, 30, 50
COLOURS = {
    "ours": "#c22",
    "pillow": "#36c",
    "torch u8": "#393",
    "resize": "#999",
    "resize+write": "#555",
    "limit": "#bbb",
    "sdpa": "#36c",
    "rows": "#393",
    "flash-attn": "#a60",
    "flashinfer": "#639",
    "generate": "#36c",
    "generate batch": "#393",
}
Series = dict[str, list[tuple[float, float]]]  # of each name (size, milliseconds or rate)


def series(room: str, size_of: Callable[[dict[str, object]], float | None], rate: str = "") -> tuple[Series, str]:
    """The lines of a result file that `size_of` gives a size, the last of each size; what they were measured on.

    Milliseconds, or the figure that is called `rate`.
    """
    found: dict[str, dict[float, float]] = {}
    about = ""
    for text in (ROOT / f"bench/results/{room}-cpu.jsonl").read_text().splitlines():
        line = json.loads(text)
        size = size_of(line)
        if size is None:
            continue
        for name, ratio in {"ours": 1.0, **line["ratio_to"]}.items():
            if name in COLOURS:
                value = line["figures"][rate] / ratio if rate else line["milliseconds"] * ratio
                found.setdefault(name, {})[size] = value
        about = f"{line['device']}, threads: {line['threads']}, torch {line['torch']}, commit {line['commit'][:7]}"
    return {name: sorted(points.items()) for name, points in found.items()}, about


def draw(title: str, lines: Series, about: str, label: Callable[[float], str]) -> str:
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x0, x1, y0, y1 = (math.log10(v) for v in (min(xs), max(xs), min(ys) * 0.8, max(ys) * 1.3))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (math.log10(y) - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="18">{title}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}" font-size="10" fill="#666">{about}</text>',
    ]
    for power in range(math.floor(y0), math.ceil(y1) + 1):
        for value in (10**power, 3 * 10**power):
            if y0 <= math.log10(value) <= y1:
                y = at(min(xs), value)[1]
                parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#eee"/>')
                parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for x in sorted(set(xs)):
        left = at(x, min(ys))[0]
        parts.append(f'<text x="{left:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{label(x)}</text>')
    ends: list[float] = []
    for name, points in sorted(lines.items(), key=lambda item: -item[1][-1][1]):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        wide = 3 if name == "ours" else 1.5
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="{wide}"/>')
        if len(points) == 1:
            x, y = at(*points[0])
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[name]}"/>')
        y = max([at(*points[-1])[1], *(end + 14 for end in ends[-1:])])
        ends.append(y)
        parts.append(f'<text x="{WIDTH - RIGHT + 8}" y="{y + 4:.1f}" fill="{COLOURS[name]}">{name}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def pixels(line: dict[str, object], threads: int = 1, size: int = 448) -> float | None:
    """Of single pictures cut at `size`."""
    shape = re.fullmatch(r"1 x (\d+)x(\d+) -> (\d+) x 224", str(line["shape"]))
    if not shape or line["threads"] != threads or int(shape[3]) != 1 + (size // 224) ** 2:
        return None
    return int(shape[1]) * int(shape[2])


def questions(line: dict[str, object]) -> float | None:
    """On one picture of 1,455 positions, fp32."""
    shape = re.fullmatch(r"(\d+) (?:on 1|separate), 1455 \+ 16 fp32", str(line["shape"]))
    return int(shape[1]) if shape and ("on 1" in str(line["shape"]) or shape[1] == "1") else None


def answered(line: dict[str, object]) -> float | None:
    """Questions on one picture, bf16."""
    shape = re.fullmatch(r"(\d+) questions, 1455 bf16", str(line["shape"]))
    return int(shape[1]) if shape else None


if __name__ == "__main__":
    title = "One picture to all encoders' inputs at 448 px, fp32: milliseconds"
    views = draw(title, *series("views", pixels), lambda x: f"{x / 1e6:.2g} Mpixel")
    (ROOT / "docs/views.svg").write_text(views)
    title = "Questions on one picture, a step of a layer over 1,455 + 16 positions, fp32: milliseconds"
    attention = draw(title, *series("attention", questions), lambda x: f"{x:g}")
    (ROOT / "docs/attention.svg").write_text(attention)
    title = "Questions on one picture of 1,455 positions, Llama of 134M, bf16, 32 new tokens: tokens per second"
    engine = draw(title, *series("generate", answered, "tokens/s"), lambda x: f"{x:g}")
    (ROOT / "docs/engine.svg").write_text(engine)
