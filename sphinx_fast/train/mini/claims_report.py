"""Figures of the claims' runs -> results.md with tables and plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from sphinx_fast.weights.sweep_figure import draw

Seeds = Mapping[int, Any]  # seed -> figures of a run
Variants = Mapping[str, Seeds]
SMOOTH = 20  # steps a point of a curve is the mean of

HEAD = """# The paper's claims at the size of sphinx-mini

Short runs from sphinx-mini's encoders, one thing changed at a time, each with {seeds}; a figure is the mean over the
seeds ± its standard deviation over them. They show which way an effect points at this scale, not how large it is in the
paper.

    make claims          # python -m sphinx_fast.train.mini.claims, after make mini

Measured on {cpu}, {cores} cores, {date}, commit {commit}.
"""


def spread(values: Sequence[float]) -> str:
    """`0.512 ± 0.013`: mean and standard deviation; of one value, itself."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def _over_seeds(seeds: Seeds, value: Callable[[Any], float]) -> list[float]:
    return [value(seeds[seed]) for seed in sorted(seeds)]


def _pooled(bins: Sequence[Mapping[str, float]]) -> float:
    """The value over all questions from those of the bins."""
    return sum(row["n"] * row["value"] for row in bins) / sum(row["n"] for row in bins)


def views(variants: Variants, plot: Callable[..., str]) -> str:
    """Accuracy against the size of the thing."""
    text = (
        "## Sub-images help small objects\n\nThe same steps of stage 2 with the global view alone, and with four crops"
        " beside it, on shapes half as large as those the encoders were taught. The size is the longer side of the"
        " thing over that of the square; a view has 6 x 6 patches and 96 pixels a side.\n"
    )
    for task, title in (("colour", "questions for a colour, accuracy"), ("shape", "questions for a shape, accuracy")):
        bins = [(row["low"], row["high"], row["n"]) for row in next(iter(next(iter(variants.values())).values()))[task]]
        rows, lines = [], dict[str, list[tuple[float, float]]]()
        for k, (low, high, n) in enumerate(bins):
            cells = []
            for name, seeds in variants.items():
                values = _over_seeds(seeds, lambda figures, k=k, task=task: figures[task][k]["value"])  # type: ignore[misc]
                cells.append(spread(values))
                lines.setdefault(name, []).append((low, mean(values)))
            rows.append([f"{low:g} to {high:g}", str(n), *cells])
        whole = [[_pooled(seeds[seed][task]) for seed in sorted(seeds)] for seeds in variants.values()]
        rows.append(["all", str(sum(n for _, _, n in bins)), *map(spread, whole)])
        text += f"\n{title}:\n\n{table(['size', 'questions', *variants], rows)}"
        text += plot(f"views-{task}", title, lines, along="size of the thing", up="right")
    return text


def text(variants: Variants, plot: Callable[..., str]) -> str:
    """The loss on new text while captions are learned."""
    lines, rows = dict[str, list[tuple[float, float]]](), []
    for name, seeds in variants.items():
        curves = [seeds[seed]["text"] for seed in sorted(seeds)]
        starts = range(0, len(curves[0]), SMOOTH)
        lines[name] = [(at, mean(v for curve in curves for v in curve[at : at + SMOOTH])) for at in starts]
        first, last = ([mean(curve[part]) for curve in curves] for part in (slice(0, 5), slice(-SMOOTH, None)))
        captions = [mean(seeds[seed]["caption"][-SMOOTH:]) for seed in sorted(seeds)]
        rows.append([name, spread(first), spread(last), spread(captions)])
    head = ["learned", "text loss, first steps", "text loss, last steps", "caption loss, last steps"]
    return (
        "## Text loss rises without joint text (Fig. 7)\n\nA language model that has read the corpus goes on with"
        " captions, with the corpus beside them or without. Both read the same new documents.\n\n"
        + table(head, rows)
        + plot("text", "loss on text while captions are learned", lines, along="step", up="loss")
    )


def mixing(variants: Variants, plot: Callable[..., str], betas: Sequence[float]) -> str:
    """The loss of each mixture on each domain."""
    (seeds,) = variants.values()
    domains = list(next(iter(seeds.values())))
    names = {"textured": "real (textured)", "clean": "synthetic (clean)"}
    columns = {d: [_over_seeds(seeds, lambda f, d=d, k=k: f[d][k]) for k in range(len(betas))] for d in domains}  # type: ignore[misc]
    both = [[mean(pair) for pair in zip(*(columns[d][k] for d in domains), strict=True)] for k in range(len(betas))]
    lines = {names.get(d, d): [(b, mean(v)) for b, v in zip(betas, columns[d], strict=True)] for d in domains}
    lines["mean"] = [(b, mean(v)) for b, v in zip(betas, both, strict=True)]
    best = {name: min(points, key=lambda p: p[1])[0] for name, points in lines.items()}
    rows = [[f"{beta:g}", *(spread(columns[d][k]) for d in domains), spread(both[k])] for k, beta in enumerate(betas)]
    return (
        "## Mixing beats each domain alone on the other\n\nStage 1 on the real domain, from there on the synthetic one,"
        " and their mixtures: beta is the real one's weight. Loss on held-out captions of each domain, least at "
        + ", ".join(f"{name} {beta:g}" for name, beta in best.items())
        + ".\n\n"
        + table(["beta", *(names.get(d, d) for d in domains), "mean"], rows)
        + plot("mixing", "loss of mixtures on held-out captions", lines, best)
    )


def encoders(variants: Variants, plot: Callable[..., str]) -> str:
    """Held-out caption loss behind one encoder or all."""
    domains = list(next(iter(next(iter(variants.values())).values())))
    rows = [
        [name, *(spread(_over_seeds(seeds, lambda f, d=d: f[d])) for d in domains)]  # type: ignore[misc]
        for name, seeds in variants.items()
    ]
    return (
        "## Four encoders beat any one\n\nThe same steps of stage 1 on both domains, behind all four encoders or one of"
        " them (the Q-Former has no patches and cannot stand alone). Loss on held-out captions:\n\n"
        + table(["encoders", *domains], rows)
    )


def write_report(found: Mapping[str, Variants], out: Path, about: Mapping[str, Any], betas: Sequence[float]) -> None:
    """results.md and results-*.svg in the folder `out`, of the claims that have runs."""
    out.mkdir(parents=True, exist_ok=True)

    def plot(
        name: str, title: str, lines: Mapping[str, list[tuple[float, float]]], best: Mapping[str, float] | None = None,
        **labels: str,
    ) -> str:  # fmt: skip
        (out / f"results-{name}.svg").write_text(draw(title, lines, best or {}, **labels), encoding="utf-8")
        return f"\n![{title}](results-{name}.svg)\n"

    sections: dict[str, Callable[[Variants], str]] = {
        "views": lambda variants: views(variants, plot),
        "text": lambda variants: text(variants, plot),
        "mixing": lambda variants: mixing(variants, plot, betas),
        "encoders": lambda variants: encoders(variants, plot),
    }
    seeds = {len(runs) for variants in found.values() for runs in variants.values()}
    said = f"{min(seeds)} seeds" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)} seeds"
    parts = [HEAD.format(seeds=said, **about)]
    parts += [section(found[claim]) for claim, section in sections.items() if claim in found]
    (out / "results.md").write_text("\n".join(parts), encoding="utf-8")
