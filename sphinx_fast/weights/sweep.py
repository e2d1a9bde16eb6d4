"""Which beta: the loss of beta * first + (1 - beta) * second for several beta, without writing a model.

The first folder is loaded once; for each beta the mixed tensors are computed from both folders, rounded as `mix` would
store them, and written over its parameters. So a beta does not depend on those before it, 1 is the first folder bit for
bit, and memory is that of one model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.core_model_loading import revert_weight_conversion

from sphinx_fast.model.sphinx import SphinxForConditionalGeneration
from sphinx_fast.weights.alike import names_of
from sphinx_fast.weights.checkpoint import PathLike
from sphinx_fast.weights.files import new_folder
from sphinx_fast.weights.foreign import WeightsError
from sphinx_fast.weights.mix import Parts, Sources
from sphinx_fast.weights.sweep_figure import draw

MAX_BETAS = 1001


class Point(NamedTuple):
    """The losses of one beta, by domain."""

    beta: float
    losses: dict[str, float]

    @property
    def mean(self) -> float:
        """Over the domains."""
        return math.fsum(self.losses.values()) / len(self.losses)


def parse_betas(text: str) -> list[float]:
    """ "0,0.25,1" -> [0, 0.25, 1]; "0,0.1,...,1" -> the eleven tenths, each the float nearest to its decimal.

    Raises:
        ValueError: no numbers from 0 to 1, or an ellipsis that does not reach the number after it.
    """
    betas: list[Decimal] = []
    words = [word.strip() for word in text.split(",")]
    for position, word in enumerate(words):
        if word == "...":
            if position < 2 or words[position - 2] == "..." or position + 1 == len(words):
                raise ValueError(f"sweep: expected two numbers before ... and one after, got {text!r}")
            step, end = betas[-1] - betas[-2], _beta(words[position + 1], text)
            try:
                count = (end - betas[-1]) / step
            except ArithmeticError:  # no step at all, or one too small for any number of them
                count = Decimal(0)
            if not 1 <= count <= MAX_BETAS or count != int(count):
                raise ValueError(f"sweep: steps of {step} from {betas[-1]} do not reach {end} (in {MAX_BETAS})")
            betas += [betas[-1] + step * i for i in range(1, int(count))]
        else:
            betas.append(_beta(word, text))
    return list(dict.fromkeys(map(float, betas)))


def _beta(word: str, text: str) -> Decimal:
    try:
        beta = Decimal(word)
    except InvalidOperation:
        beta = Decimal("NaN")
    if not (beta.is_finite() and 0 <= beta <= 1):
        raise ValueError(f"sweep: expected numbers from 0 to 1 such as 0,0.1,...,1, got {text!r}")
    return beta


def sweep(
    folders: Sequence[PathLike],
    betas: Sequence[float],
    losses: Callable[[SphinxForConditionalGeneration], Mapping[str, float]],
    *,
    parts: Parts = "llm",
    device: str | torch.device | None = None,
    progress: bool = False,
) -> list[Point]:
    """The losses of every beta.

    Args:
        folders: two, as for `mix`; beta is the first one's weight.
        betas: from 0 to 1.
        losses: {domain: loss} of a model; the same domains each time. It may not keep or change the model.
        parts: as for `mix`.
        device: where the model goes (default: the GPU if there is one).
        progress: show a bar of the betas.

    Raises:
        WeightsError: as of `mix`, and for a model whose loaded tensors are not those on disk (experts fused in one).
        ValueError: not two folders, a beta that is none, or changing domains.
    """
    from sphinx_fast.infer.loading import load  # it stands above this package

    if len(folders) != 2:
        raise ValueError(f"sweep: expected two folders, got {len(folders)}")
    if wrong := [beta for beta in betas if not 0 <= beta <= 1]:
        raise ValueError(f"sweep: expected betas from 0 to 1, got {wrong[0]:g}")
    sources = Sources(folders, parts)
    sources.check_frozen()
    model = load(sources.folders[0], device=device, dtype=None, variant=None, quantize=None).model
    parameters = _parameters(model, sources)
    points: list[Point] = []
    for beta in tqdm(betas, desc="sweep", disable=not progress):
        for key, parameter in parameters.items():
            _write(sources, key, (beta, 1 - beta), parameter)
        points.append(Point(float(beta), {name: float(loss) for name, loss in losses(model).items()}))
        if not points[-1].losses or points[-1].losses.keys() != points[0].losses.keys():
            raise ValueError(f"sweep: the losses at {beta:g} are of other domains than those at {betas[0]:g}")
    return points


def _parameters(model: SphinxForConditionalGeneration, sources: Sources) -> dict[str, Tensor]:
    """{key on disk: the model's own tensor, flat} of what is mixed."""
    state = model.state_dict()
    own = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    on_disk = revert_weight_conversion(model, state)
    found: dict[str, Tensor] = {}
    for key in sorted(sources.mixed):
        tensor = on_disk.get(key)
        if tensor is None or tensor.untyped_storage().data_ptr() not in own or not tensor.is_contiguous():
            raise WeightsError(f"{sources.folders[0]}: {key} is fused when loaded; write mixtures with mix instead")
        found[key] = tensor.view(-1)
    return found


@torch.no_grad()
def _write(sources: Sources, key: str, weights: tuple[float, float], parameter: Tensor) -> None:
    start = 0
    for block in sources.blocks(key, weights):
        parameter[start : start + len(block)].copy_(block)
        start += len(block)


def columns(points: Sequence[Point]) -> dict[str, list[float]]:
    """{domain: its loss at each beta}, and "mean" where there are several."""
    found = {name: [point.losses[name] for point in points] for name in points[0].losses}
    return found | {"mean": [point.mean for point in points]} if len(found) > 1 else found


def best(points: Sequence[Point]) -> dict[str, float]:
    """{column: the beta of its least loss}; the first of equals, none where no loss is finite."""
    found: dict[str, float] = {}
    for name, losses in columns(points).items():
        finite = [(loss, point.beta) for loss, point in zip(losses, points, strict=True) if math.isfinite(loss)]
        if finite:
            found[name] = min(finite, key=lambda pair: pair[0])[1]
    return found


def table(points: Sequence[Point]) -> str:
    """Markdown: a row per beta, a column per domain and their mean; the least of each column is in bold."""
    least, losses = best(points), columns(points)
    rows = [["beta", *(name.replace("|", r"\|") for name in losses)]]
    for index, (beta, _) in enumerate(points):
        marks = ("**" if least.get(name) == beta else "" for name in losses)
        values = (column[index] for column in losses.values())
        rows.append([f"{beta:g}", *(f"{mark}{value:.4f}{mark}" for mark, value in zip(marks, values, strict=True))])
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, [f"{'-' * (width - 1)}:" for width in widths])
    return "\n".join(
        f"| {' | '.join(word.rjust(width) for word, width in zip(row, widths, strict=True))} |" for row in rows
    )


def write_report(points: Sequence[Point], folders: Sequence[PathLike], target: PathLike, *, parts: Parts) -> None:
    """`sweep.json`, `sweep.md` and `sweep.svg` in a new folder. Raises FileExistsError where it is there already."""
    names = names_of(folders)
    losses, least = columns(points), best(points)
    title = f"Loss of beta {names[0]} + (1 - beta) {names[1]}"
    rows = [
        {"beta": point.beta, "losses": {name: _json(column[index]) for name, column in losses.items()}}
        for index, point in enumerate(points)
    ]
    record = {"parts": parts, "folders": names, "rows": rows, "best": least}
    lines = {name: [(p.beta, loss) for p, loss in zip(points, column, strict=True)] for name, column in losses.items()}
    with new_folder(target) as folder:
        (folder / "sweep.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        (folder / "sweep.md").write_text(f"# {title}\n\n{table(points)}\n", encoding="utf-8")
        (folder / "sweep.svg").write_text(draw(title, lines, least), encoding="utf-8")


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no nan
