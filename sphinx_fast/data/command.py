"""`sphinx-fast data`: any data set as LLaVA's JSON lines, or the list of the types there are."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sphinx_fast.data.sources import SOURCES, open_source, options_of, write_jsonl


def run(args: argparse.Namespace) -> int:
    """Convert, or list; prints one line of counts, or a line for each type."""
    if args.list:
        print(listed())
        return 0
    if len(args.words) < 3:
        raise ValueError("data: expected TYPE PATH [PATH ...] OUT.jsonl, or --list")
    kind, *paths, target = args.words
    out = Path(target)
    # A forgotten OUT must not cost a data set: the last PATH would stand in its place.
    if out.suffix != ".jsonl":
        raise ValueError(f"{out}: expected OUT.jsonl, the file to create")
    if out.exists():
        raise FileExistsError(f"{out}: exists already")
    source = open_source(kind, paths, root=args.root, **options(kind, args.option))
    counts = write_jsonl(source, out, args.root, progress=not args.quiet)
    written = counts.pop("written")
    left = ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
    if not written:
        out.unlink()
        raise ValueError(f"{source.name}: no row can be used" + (f" ({left})" if left else ""))
    said = f"{written:,} rows written" + (f", {sum(counts.values()):,} left out ({left})" if left else "")
    print(f"{out}: {said}; pictures are named from {args.root or out.parent}")
    return 0


def listed() -> str:
    """A line for each type: its options with their defaults."""
    width = max(map(len, SOURCES))
    return "\n".join(
        f"{kind:{width}}  {', '.join(map(_shown, options_of(kind).values()))}".rstrip() for kind in SOURCES
    )


def _shown(option: inspect.Parameter) -> str:
    if option.default is option.empty:
        return f"{option.name}=... (required)"
    if isinstance(option.default, tuple):
        return f"{option.name}={','.join(option.default)}"
    if isinstance(option.default, bool):
        return f"{option.name}={str(option.default).lower()}"
    return f"{option.name}={'...' if option.default in (None, '') else option.default}"


def options(kind: str, words: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as the options of a type, each of its default's type; a comma separates several values."""
    known, values = options_of(kind), {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"data: --option: expected key=value, got {word!r}")
        values[key] = _value(key, text, known[key].default) if key in known else text  # unknown ones are said later
    return values


def _value(key: str, text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(f"data: {key}: expected true or false, got {text!r}")
        return text == "true"
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"data: {key}: expected a number, got {text!r}") from None
    return text.split(",") if isinstance(default, tuple) or key == "ask" else text
