"""WebDataset shards and Parquet: rows, groups, broken files; documents in constant memory."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sphinx_fast.data import rows as shared
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Reader
from sphinx_fast.data.sources import open_source
from sphinx_fast.data.tables import documents

TALK = {"conversations": [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]}


def shard(path: Path, members: list[tuple[str, Any]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def outcome(source: Reader, index: int) -> Any:
    try:
        return source[index]
    except BadRowError as error:
        assert "\n" not in str(error)
        return error.kind


def test_members_are_grouped_by_key(tmp_path: Path) -> None:
    path = shard(
        tmp_path / "a.tar",
        [
            ("x/0.jpg", b"J"),
            ("x/0.txt", "Ein Bär".encode()),
            ("x/0.json", {"width": 3, "caption": "unused"}),
            ("y/0.PNG", b"P"),  # another folder, another key
            ("y/0.json", TALK),
            ("z.1.webp", b"W"),  # the key ends at the first dot
            ("z.1.json", {"caption": "c"}),
            ("z.2.cls", b"5"),  # of no use, and another row does not begin
            ("v.jpeg", b"V"),
            ("v.json", {"text": "t"}),
            ("talk.json", {"conversations": [{"from": "user", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ],
    )
    source = open_source("webdataset", path, prompt="Describe.")
    assert [outcome(source, i) for i in range(len(source))] == [
        Conversation((("Describe.", "Ein Bär"),), b"J", "a.tar:0"),
        Conversation((("q", "a"),), b"P", "a.tar:1"),
        Conversation((("Describe.", "c"),), b"W", "a.tar:2"),
        Conversation((("Describe.", "t"),), b"V", "a.tar:3"),
        Conversation((("q", "a"),), None, "a.tar:4"),
    ]


def test_shards_and_their_groups(tmp_path: Path) -> None:
    for name, rows in (("s0.tar", 3), ("s1.tar", 1), ("s2.tar", 2)):
        shard(
            tmp_path / name, [(f"{i}.{kind}", f"{name} {i}".encode()) for i in range(rows) for kind in ("jpg", "txt")]
        )
    source = open_source("webdataset", str(tmp_path / "s*.tar"))
    assert source.groups == (3, 1, 2) and len(source) == 6
    assert [source[i].turns[0][1] for i in range(6)] == [
        "s0.tar 0",
        "s0.tar 1",
        "s0.tar 2",
        "s1.tar 0",
        "s2.tar 0",
        "s2.tar 1",
    ]
    assert source[-1].name == "s2.tar:1" and source[0].turns == (("", "s0.tar 0"),)


BAD = [
    ("no answer", [(".jpg", b"J")]),
    ("no answer", [(".jpg", b"J"), (".txt", b" ")]),
    ("no answer", [(".jpg", b"J"), (".json", {"width": 1})]),
    ("no picture", [(".txt", b"c")]),
    ("no picture", [(".json", {"caption": "c"})]),
    ("no picture", [(".json", TALK | {"image": "a.jpg"})]),
    ("picture marks", [(".json", TALK)]),
    ("not readable", [(".jpg", b"J"), (".json", b"{")]),
    ("not readable", [(".jpg", b"J"), (".txt", b"\xff")]),
    ("fields", [(".jpg", b"J"), (".json", {"caption": 1})]),
    ("fields", [(".jpg", b"J"), (".json", {"conversations": 1})]),
    ("turns", [(".jpg", b"J"), (".json", {"conversations": TALK["conversations"][:1] * 2})]),
]


def test_a_thousand_rows_with_a_hundred_bad_ones(tmp_path: Path) -> None:
    members: list[tuple[str, Any]] = []
    expected: Counter[str] = Counter()
    for row in range(1000):
        parts: list[tuple[str, Any]] = [(".jpg", b"J"), (".txt", b"c")]
        if row % 10 == 3:
            bad, parts = BAD[row // 10 % len(BAD)]
            expected[bad] += 1
        members += [(f"{row:04}{suffix}", content) for suffix, content in parts]
    source = open_source("webdataset", shard(tmp_path / "a.tar", members))
    found = Counter(kind for kind in (outcome(source, i) for i in range(len(source))) if isinstance(kind, str))
    assert len(source) == 1000 and found == expected and sum(found.values()) == 100


def test_an_archive_that_breaks_off(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", [(f"{i}.{kind}", b"x" * 600) for i in range(4) for kind in ("jpg", "txt")])
    whole = path.read_bytes()
    path.write_bytes(whole[: 5 * 1536 + 700])  # within the text of row 2
    source = open_source("webdataset", path)
    assert [isinstance(outcome(source, i), Conversation) for i in range(len(source))] == [True, True, False, False]
    assert outcome(source, 2) == outcome(source, 3) == "not readable"
    path.write_bytes(whole[:3072] + b"?" * 512 + whole[3584:])  # the header of row 1
    source = open_source("webdataset", path)
    assert len(source) == 2 and outcome(source, 1) == "not readable"
    for nothing in (b"", b"no archive" * 100):
        path.write_bytes(nothing)
        with pytest.raises(ValueError, match=r"^\S+a\.tar: "):
            open_source("webdataset", path)


# --- Parquet ----------------------------------------------------------------------------------------------------------
def test_parquet(tmp_path: Path) -> None:
    """Pictures as bytes, as Hugging Face's struct, as paths; captions or conversations; groups are row groups."""
    (tmp_path / "a.jpg").write_bytes(b"A")
    caption = {"image": [b"0", b"1", b"2"], "caption": ["c0", "c1", "c2"], "unused": [1, 2, 3]}
    pq.write_table(pa.table(caption), tmp_path / "bytes.parquet", row_group_size=2)
    structs = [{"bytes": b"S", "path": "x.jpg"}, {"bytes": None, "path": "a.jpg"}]
    pq.write_table(pa.table({"image": structs, "text": ["s", "p"]}), tmp_path / "struct.parquet")
    talk = pa.table(
        {
            "image": ["a.jpg", None],
            "conversations": [TALK["conversations"], [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]],
        }
    )
    pq.write_table(talk, tmp_path / "talk.parquet")
    source = open_source("parquet", [tmp_path / f"{name}.parquet" for name in ("bytes", "struct", "talk")])
    sent = pickle.dumps(source)
    assert source.groups == (2, 1, 2, 2)
    assert [(source[i].turns, source[i].picture) for i in (6, 5, 4, 3, 2, 1, 0)] == [
        ((("q", "a"),), None),
        ((("q", "a"),), tmp_path / "a.jpg"),
        ((("", "p"),), tmp_path / "a.jpg"),
        ((("", "s"),), b"S"),
        ((("", "c2"),), b"2"),
        ((("", "c1"),), b"1"),
        ((("", "c0"),), b"0"),
    ]
    assert source[2].name == "bytes.parquet:2" and pickle.dumps(source) == sent  # row groups stay here


def test_bad_rows_of_parquet(tmp_path: Path) -> None:
    table = pa.table({"image": [None, b"J", b"J"], "caption": ["c", None, " "]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source("parquet", tmp_path / "a.parquet")
    assert [outcome(source, i) for i in range(3)] == ["no picture", "no answer", "no answer"]
    pq.write_table(pa.table({"image": [1], "caption": ["c"]}), tmp_path / "a.parquet")
    assert outcome(open_source("parquet", tmp_path / "a.parquet"), 0) == "fields"
    pq.write_table(pa.table({"image": [b"J"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="expected a column"):
        open_source("parquet", tmp_path / "a.parquet")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(shared.importlib, "import_module", missing)
    with pytest.raises(ValueError, match=r'pyarrow is missing: pip install "sphinx-fast\[train\]"'):
        open_source("parquet", tmp_path / "a.parquet")


@pytest.mark.parametrize("type", ["webdataset", "parquet"])
def test_broken_bytes_never_do_more_than_spoil_rows(tmp_path: Path, type: str) -> None:
    path = tmp_path / "a"
    if type == "webdataset":
        shard(
            path,
            [(f"{i}.{kind}", b"x" * 40) for i in range(4) for kind in ("jpg", "txt")] + [("n" * 200 + ".txt", b"")],
        )
    else:
        text = [f"text {i}" for i in range(40)]
        pq.write_table(pa.table({"image": [b"JPEG"] * 40, "text": text}), path, row_group_size=16)
    data, rng = path.read_bytes(), random.Random(3)
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(broken))
            broken[at] = rng.choice((rng.randrange(256), broken[at] ^ (1 << rng.randrange(8))))
            if type == "webdataset" and rng.random() < 0.7:  # a header whose checksum is right again
                at -= at % 512
                header = broken[at : at + 148] + b" " * 8 + broken[at + 156 : at + 512]
                broken[at + 148 : at + 156] = b"%06o\0 " % sum(header)
        path.write_bytes(broken[: rng.randint(1, len(broken))] if rng.random() < 0.2 else broken)
        try:
            source = open_source(type, path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        for index in range(min(len(source), 50)):
            outcome(source, index)


# --- documents --------------------------------------------------------------------------------------------------------
def test_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2, 3], "content": ["p0", None, "p2"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "j0"}\n\n{"text": 1}\nno\n{"content": "j1"}\n{"text": "\\ud800"}\n')
    (tmp_path / "c.txt").write_bytes("t0\n\fä1\f\f \n\f".encode() + b"\xff\ft2")
    (tmp_path / "d.txt").write_text("whole\nfile")
    bad: Counter[str] = Counter()
    paths = [tmp_path / "a.parquet", tmp_path / "b.jsonl", str(tmp_path / "*.txt")]
    assert list(documents(paths, bad=bad)) == ["p0", "p2", "j0", "j1", "t0\n", "ä1", "t2", "whole\nfile"]
    assert bad == {"fields": 2, "not readable": 3}
    assert list(documents(tmp_path / "a.parquet", "content")) == ["p0", "p2"]
    with pytest.raises(ValueError, match="no column 'body', only id, content"):
        list(documents(tmp_path / "a.parquet", "body"))
    with pytest.raises(ValueError, match="no such file"):
        list(documents(tmp_path / "z.txt"))


def test_documents_need_constant_memory(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\f".join(b"%d" % i + b"x" * 9_990 for i in range(4_000)))
    tracemalloc.start()
    try:
        lengths = [len(document) for document in documents(tmp_path / "a.txt")]
        assert lengths == [9_990 + len(f"{i}") for i in range(4_000)]
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
