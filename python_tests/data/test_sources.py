"""Types and options by name, lists of data sets, conversion to JSON lines."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sphinx_fast.data
from sphinx_fast.data.record import Source
from sphinx_fast.data.rows import Joined, Reader
from sphinx_fast.data.sources import SOURCES, MetaEntry, open_source, options_of, read_meta, write_jsonl

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"


def rows(path: Path, number: int, bad: int = 0) -> Path:
    good = [{"image": f"i/{path.stem}.jpg", "conversations": talk(f"q{i}", f"ä{i}")} for i in range(number - bad)]
    path.write_text("\n".join(json.dumps(row) for row in [*good, *[{}] * bad]))
    (path.parent / "i").mkdir(exist_ok=True)
    (path.parent / "i" / f"{path.stem}.jpg").touch()
    return path


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def everything(source: Source) -> list[Any]:
    return [(source[i].turns, source[i].picture) for i in range(len(source))]


# --- types ------------------------------------------------------------------------------------------------------------
def test_unknown_types_and_options_are_answered_with_the_known_ones(tmp_path: Path) -> None:
    path = rows(tmp_path / "a.jsonl", 1)
    with pytest.raises(ValueError, match="unknown type of data 'coco'; known: llava, sharegpt, "):
        open_source("coco", path)
    with pytest.raises(ValueError, match="llava: unknown option max_turns; known: none"):
        open_source("llava", path, max_turns=3)
    with pytest.raises(ValueError, match="detection: unknown option prompt; known: ask, max_turns"):
        open_source("detection", path, prompt="")
    for nothing in (tmp_path / "b.jsonl", str(tmp_path / "*.tar"), []):
        with pytest.raises(ValueError, match=r"no such file|no file was given"):
            open_source("llava", nothing)
    with pytest.raises(ValueError, match=r"a\.json: no such file"):
        open_source("vqa", path, annotations=str(tmp_path / "a.json"))


def test_every_type_and_option_is_documented() -> None:
    text = DOCS.read_text()
    for type in SOURCES:
        assert f"`{type}`" in text, type
        assert not [name for name in options_of(type) if f"`{name}`" not in text]


def test_several_files_are_one_source(tmp_path: Path) -> None:
    paths = [rows(tmp_path / f"{name}.jsonl", number) for name, number in (("a", 3), ("b", 0), ("c", 2))]
    source: Source = open_source("llava", paths)
    assert len(source) == 5 and [source[i].name for i in (0, 2, 3, -1)] == [
        "a.jsonl:1",
        "a.jsonl:3",
        "c.jsonl:1",
        "c.jsonl:2",
    ]
    assert source.name == "a.jsonl and 2 more"
    assert isinstance(source, Reader) and source.groups == (3, 0, 2)
    assert everything(pickle.loads(pickle.dumps(source))) == everything(open_source("llava", str(tmp_path / "?.jsonl")))


def read_all(source: Reader, queue: Any) -> None:
    queue.put([source[i] for i in range(len(source))])


def test_a_spawned_process_reads_the_same(tmp_path: Path) -> None:
    """Of every kind of file; what is sent there is small."""
    lines = rows(tmp_path / "a.jsonl", 500)
    array = tmp_path / "a.json"
    array.write_text(json.dumps([json.loads(line) for line in lines.read_text().splitlines()]))
    gqa = tmp_path / "gqa.json"
    table = {i: {"imageId": f"i/{lines.stem}", "question": f"q{i}", "answer": "a"} for i in range(500)}
    gqa.write_text(json.dumps(table))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(500):
            for kind in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{i}.{kind}")
                member.size = 3
                archive.addfile(member, io.BytesIO(b"%03d" % i))
    pq.write_table(pa.table({"image": [b"J"] * 500, "text": [f"{i}" for i in range(500)]}), tmp_path / "a.parquet")
    (tmp_path / "list.tsv").write_text("i/a.jpg\tcat\n" * 500)
    types = {"llava": [lines, array], "gqa": gqa, "webdataset": "*.tar", "parquet": "*.parquet", "classes": "*.tsv"}
    sources = [open_source(t, p if isinstance(p, list) else tmp_path / p) for t, p in types.items()]
    both = Joined("all", sources)
    expected = [both[i] for i in range(len(both))]
    assert len(both) == 5 * 500 + 32  # 500 questions about one picture, 16 at a time
    assert len(pickle.dumps(both)) < 60_000
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=read_all, args=(both, queue))
    process.start()
    try:
        assert queue.get(timeout=120) == expected
    finally:
        process.join(30)


def test_scenes_are_still_scenes() -> None:
    """No module of the readers hides a name that the package gives."""
    assert callable(sphinx_fast.data.questions) and callable(sphinx_fast.data.scene)


# --- lists of data sets -----------------------------------------------------------------------------------------------
def test_a_released_list(tmp_path: Path) -> None:
    rows(tmp_path / "vg.json", 2)
    (tmp_path / "list.yaml").write_text(
        "META:\n"
        "  - path: 'vg.json'\n    type: 'image_text'\n    root: 'pictures/'\n    ratio: 0.5\n"
        "  -\n    path: /data/text.jsonl\n    type: 'text'\n    prob: 2\n"
        "  - {path: vg.json}\n"
        "  - {path: [q.json], type: vqa, annotations: a.json, max_turns: 4}\n"
    )
    entries = read_meta(tmp_path / "list.yaml")
    assert entries == [
        MetaEntry((str(tmp_path / "vg.json"),), "image_text", tmp_path / "pictures", 0.5),
        MetaEntry(("/data/text.jsonl",), "text", prob=2.0),
        MetaEntry((str(tmp_path / "vg.json"),)),
        MetaEntry(
            (str(tmp_path / "q.json"),), "vqa", options={"annotations": str(tmp_path / "a.json"), "max_turns": 4}
        ),
    ]
    assert len(entries[2].open()) == 2 and entries[2].open()[0].picture == tmp_path / "i" / "vg.jpg"


@pytest.mark.parametrize(
    "text",
    [
        *["", "META: {}", "META: []", "META: [3]", "META: [{type: text}]", "META: [{path: a, type: nothing}]", "a: ["],
        *["META: [{path: a, ratio: -1}]", "META: [{path: a, ratio: .nan}]", "META: [{path: a, prob: yes}]"],
        *["META: [{path: a, weight: 1}]", "META: [{path: a, root: 3}]", "META: [!!python/object:os.system {}]"],
        *["[" * 500, "\x00"],
    ],
)
def test_a_list_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^\S+list\.yaml: [^\n]+$"):
        read_meta(tmp_path / "list.yaml")


# --- conversion -------------------------------------------------------------------------------------------------------
def test_converted_once_and_read_again(tmp_path: Path) -> None:
    source = open_source("llava", rows(tmp_path / "a.jsonl", 30, bad=2))
    assert write_jsonl(source, tmp_path / "out.jsonl", tmp_path, progress=False) == {"written": 28, "fields": 2}
    again = open_source("llava", tmp_path / "out.jsonl")
    assert everything(again) == [(source[i].turns, source[i].picture) for i in range(28)]
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["image"] == "i/a.jpg"
    assert "ä" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")


def test_relative_paths_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written elsewhere, without a root: the pictures lie outside and are named by their whole path."""
    (tmp_path / "a").mkdir()
    rows(tmp_path / "a" / "a.jsonl", 1)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    write_jsonl(open_source("llava", "a/a.jsonl"), "b/out.jsonl", progress=False)
    assert open_source("llava", "b/out.jsonl")[0].picture == tmp_path / "a" / "i" / "a.jpg"


@pytest.mark.parametrize(
    ("number", "bad", "refused"), [(200, 10, False), (11, 10, False), (220, 11, False), (200, 11, True)]
)
def test_more_than_a_twentieth_is_too_much(tmp_path: Path, number: int, bad: int, refused: bool) -> None:
    source = open_source("llava", rows(tmp_path / "a.jsonl", number, bad=bad))
    (tmp_path / "out.jsonl").write_text("old")
    if refused:
        with pytest.raises(ValueError, match=r"^a\.jsonl: 11 of 200 rows are bad, the first: a\.jsonl:190: "):
            write_jsonl(source, tmp_path / "out.jsonl", progress=False)
        assert (tmp_path / "out.jsonl").read_text() == "old"
    else:
        assert write_jsonl(source, tmp_path / "out.jsonl", progress=False) == {"written": number - bad, "fields": bad}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "i", "out.jsonl"]


def test_pictures_in_archives_are_no_files(tmp_path: Path) -> None:
    for name in ("0.jpg", "0.txt"):
        (tmp_path / name).write_text("c")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "0.jpg", "0.jpg")
        archive.add(tmp_path / "0.txt", "0.txt")
    with pytest.raises(ValueError, match=r"a\.tar:0: its picture is no file"):
        write_jsonl(open_source("webdataset", tmp_path / "a.tar"), tmp_path / "out.jsonl", progress=False)
    assert not (tmp_path / "out.jsonl").exists()
