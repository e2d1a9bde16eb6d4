"""`sphinx-fast mix`: the weighted mean of model folders, or the losses of several means. Imports wait for the run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def run(args: argparse.Namespace) -> int:
    """Mix, or measure; prints one line, or a table."""
    if args.sweep is not None:
        return _run_sweep(args)
    if args.data:
        raise ValueError("mix: --data goes with --sweep")
    from sphinx_fast.weights.alike import names_of
    from sphinx_fast.weights.mix import mix

    weights = _numbers(args.weights) if args.beta is None else [args.beta, 1 - args.beta]
    *folders, target = args.folders
    if len(folders) != len(weights):
        raise ValueError(f"mix: expected {len(weights)} folders and the one to create, got {len(args.folders)}")
    mix(folders, weights, target, parts=args.parts, progress=not args.quiet)
    terms = (f"{weight:.6g} {name}" for weight, name in zip(weights, names_of(folders), strict=True))
    print(f"{target}: {' + '.join(terms)}")
    return 0


def _run_sweep(args: argparse.Namespace) -> int:
    from sphinx_fast.weights.sweep import best, parse_betas, sweep, table, write_report

    betas, files = parse_betas(args.sweep), _domains(args.data)
    folders, target = args.folders[:2], Path(args.folders[2]) if len(args.folders) == 3 else None
    if len(args.folders) not in (2, 3):
        raise ValueError(f"mix: --sweep takes two folders and perhaps one to create, got {len(args.folders)}")
    if target is not None and target.exists():
        raise FileExistsError(f"{target}: exists already")
    if args.rows < 1:
        raise ValueError(f"mix: expected --rows of at least 1, got {args.rows}")
    from transformers import AutoProcessor

    from sphinx_fast.train.held_out import held_out_losses

    processors: list[Any] = []  # read when both folders are known to be good

    def losses(model: Any) -> Any:
        if not processors:
            processors.append(AutoProcessor.from_pretrained(folders[0]))
        return held_out_losses(model, processors[0], files, rows=args.rows)

    points = sweep(folders, betas, losses, parts=args.parts, device=args.device, progress=not args.quiet)
    if target is not None:
        write_report(points, folders, target, parts=args.parts)
    print(table(points))
    print("least: " + ", ".join(f"{name} at {beta:g}" for name, beta in best(points).items()))
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"weights: expected numbers such as 0.5,0.3,0.2, got {text!r}") from None


def _domains(words: Sequence[str]) -> dict[str, Path]:
    """{name: file} of `FILE` (named as its stem) and `NAME=FILE`."""
    files: dict[str, Path] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        named = bool(equals) and not Path(word).exists()
        file = Path(rest if named else word)
        name = name if named else file.stem
        if not file.is_file():
            raise ValueError(f"{file}: no such file")
        if name in files or name in ("", "mean"):
            raise ValueError(f"mix: {name!r} cannot name {'two domains' if name in files else 'a domain'}")
        files[name] = file
    if not files:
        raise ValueError("mix: --sweep needs --data FILE, once for each domain")
    return files
