"""Training data by its type: `open_source("vqa", "questions.json", annotations="annotations.json", root="train2014")`.

Also the lists of data sets as the released training code has them, and conversion of a source to LLaVA's JSON lines.
"""

from __future__ import annotations

import inspect
import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from dataclasses import field as default
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sphinx_fast.data import answers, coco, referring
from sphinx_fast.data.annotations import annotated
from sphinx_fast.data.chat import llava, openai
from sphinx_fast.data.record import BadRowError, Source
from sphinx_fast.data.rows import Joined, Paths, Reader, extra, files, one_line, opening
from sphinx_fast.data.scene_source import Scenes
from sphinx_fast.data.shards import Shard
from sphinx_fast.data.tables import Table

MOST_BAD = 0.05  # share of bad rows above which a source is refused ...
FEW_BAD = 10  # ... unless they are this few
BESIDE = ("annotations", "instances", "images", "ocr", "names")  # options that are files

DRAWN = ("scenes",)  # types that read no file: their path is not looked at
_READERS: dict[str, Callable[..., Reader]] = {
    "llava": llava,
    "sharegpt": llava,
    "image_text": llava,  # the names of the released lists
    "text": llava,
    "openai": openai,
    "webdataset": Shard,
    "parquet": Table,
    "classes": answers.classes,
    "scenes": Scenes,
}
_RECIPES: dict[str, Callable[..., Any]] = {
    "detection": coco.detection,
    "people": coco.people,
    "refcoco": referring.refcoco,
    "genome_regions": referring.genome_regions,
    "genome_relations": referring.genome_relations,
    "flickr30k": referring.flickr30k,
    "vqa": answers.vqa,
    "gqa": answers.gqa,
    "aokvqa": answers.aokvqa,
    "ocr_vqa": answers.ocr_vqa,
    "textvqa": answers.textvqa,
    "textcaps": answers.textcaps,
    "captions": answers.captions,
}
SOURCES: dict[str, Callable[..., Reader]] = {**_READERS, **{k: partial(annotated, r) for k, r in _RECIPES.items()}}


def options_of(type: str) -> dict[str, inspect.Parameter]:
    """The options of a type, by name."""
    if type not in SOURCES:
        raise ValueError(f"unknown type of data {type!r}; known: {', '.join(SOURCES)}")
    makers = [_READERS[type]] if type in _READERS else [_RECIPES[type], annotated]
    named = [p for maker in makers for p in inspect.signature(maker).parameters.values()]
    return {parameter.name: parameter for parameter in named if parameter.kind is parameter.KEYWORD_ONLY}


def open_source(type: str, path: Paths, *, root: str | Path | None = None, **options: Any) -> Reader:
    """A source of conversations.

    Args:
        type: one of `SOURCES`.
        path: a file (or folder, where the type reads one), several, or globs. Several files are one source, in this
            order; the same options hold for all.
        root: the folder that pictures are named from; by default that of each file.
        options: of the type; those known are named where one is not.

    Raises:
        ValueError: unknown type or option, or a file that cannot be used at all.
    """
    known = options_of(type)
    unknown = sorted(options.keys() - known.keys())
    missing = sorted(k for k, option in known.items() if option.default is option.empty and k not in options)
    if unknown or missing:
        said = f"unknown option {', '.join(unknown)}" if unknown else f"missing option {', '.join(missing)}"
        raise ValueError(f"{type}: {said}; known: {', '.join(known) or 'none'}")
    for key in BESIDE:
        if options.get(key) is not None:
            files(options[key])
    found = files(path) if type not in DRAWN else [Path(type)]
    sources = [SOURCES[type](file, Path(root) if root is not None else file.parent, **options) for file in found]
    return sources[0] if len(sources) == 1 else Joined(f"{found[0].name} and {len(found) - 1} more", sources)


# --- lists of data sets -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class MetaEntry:
    """One data set of a list.

    path, root  files and the folder of their pictures, relative ones below the list's folder
    type        one of `SOURCES`; `image_text`, `text` and none are LLaVA's rows
    ratio       share of the rows that is used
    prob        weight of the data set where sources are drawn by chance; None where the list gives none
    options     of the type: every other key of the entry
    """

    path: tuple[str, ...]
    type: str = "llava"
    root: Path | None = None
    ratio: float = 1.0
    prob: float | None = None
    options: dict[str, Any] = default(default_factory=dict)

    def open(self) -> Reader:
        return open_source(self.type, self.path, root=self.root, **self.options)


def read_meta(path: str | Path) -> list[MetaEntry]:
    """The entries of a YAML list `META: [{path, type, root, ratio, prob}]` (LLaMA2-Accessory's form)."""
    path = Path(path)
    yaml = extra("yaml")
    with opening(path):
        try:
            table = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"no YAML: {one_line(error)}") from error
        rows = table.get("META") if isinstance(table, dict) else None
        if not isinstance(rows, list) or not rows:
            raise ValueError("expected META, a list of data sets")
        return [_entry(row, path.parent, number) for number, row in enumerate(rows)]


def _entry(row: Any, folder: Path, number: int) -> MetaEntry:
    where = f"META[{number}]"
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object")
    row = dict(row)
    paths = row.pop("path", None)
    paths = [paths] if isinstance(paths, str) else paths
    kind = row.pop("type", None) or "llava"
    root, ratio, prob = row.pop("root", None), row.pop("ratio", 1.0), row.pop("prob", None)
    if not isinstance(paths, list) or not paths or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{where}: path: expected a file or a list of files, got {paths!r}")
    if not isinstance(kind, str) or (root is not None and not isinstance(root, str)):
        raise ValueError(f"{where}: type and root: expected text, got {kind!r} and {root!r}")
    for name, value in (("ratio", ratio), ("prob", 1.0 if prob is None else prob)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{where}: {name}: expected a number above 0, got {value!r}")
    unknown = row.keys() - options_of(kind).keys()
    if unknown:
        raise ValueError(f"{where}: unknown key {', '.join(map(str, unknown))}")
    row |= {key: str(folder / row[key]) for key in BESIDE if isinstance(row.get(key), str)}
    places = tuple(str(folder / path) for path in paths)
    return MetaEntry(places, kind, None if root is None else folder / root, float(ratio), prob and float(prob), row)


# --- conversion -------------------------------------------------------------------------------------------------------
def write_jsonl(
    source: Source, out: str | Path, root: str | Path | None = None, progress: bool = True
) -> dict[str, int]:
    """Write a source as LLaVA's JSON lines; the file appears complete or not at all.

    Pictures are named from `root` (by default the folder of `out`, where reading looks for them), those outside of it
    by their whole path.

    Returns how many rows were written ("written") and how many were left out, by kind.

    Raises:
        ValueError: more than 5 % of the rows, and more than ten, are bad; or a picture is no file of its own (in an
            archive, in the row), which JSON lines cannot name.
    """
    out = Path(out)
    counts: Counter[str] = Counter(written=0)
    first = ""
    root = Path(os.path.abspath(out.parent if root is None else root))
    beside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            for index in tqdm(range(len(source)), desc=source.name, disable=not progress, mininterval=5):
                try:
                    row = source[index]
                except BadRowError as error:
                    counts[error.kind] += 1
                    first = first or str(error)
                    continue
                if isinstance(row.picture, Path):
                    row = replace(row, picture=Path(os.path.abspath(row.picture)))
                file.write(json.dumps(row.as_json(root), ensure_ascii=False) + "\n")
                counts["written"] += 1
            bad = len(source) - counts["written"]
            if bad > FEW_BAD and bad > MOST_BAD * len(source):
                raise ValueError(f"{source.name}: {bad} of {len(source)} rows are bad, the first: {first}")
            file.flush()
            os.fsync(file.fileno())
        beside.replace(out)
    finally:
        beside.unlink(missing_ok=True)
    return dict(counts)
