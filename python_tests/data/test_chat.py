"""LLaVA's, ShareGPT's and OpenAI's rows: what they become, what is wrong with them, random access, other processes."""

from __future__ import annotations

import base64
import json
import pickle
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sphinx_fast.data import chat
from sphinx_fast.data.record import BadRowError, Conversation
from sphinx_fast.data.rows import Reader
from sphinx_fast.data.sources import open_source

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def said(*texts: str, speakers: tuple[str, ...] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": speakers[i % len(speakers)], "value": text} for i, text in enumerate(texts)]


def source(folder: Path, rows: list[Any], type: str = "llava", name: str = "train.jsonl") -> Reader:
    (folder / "a.jpg").write_bytes(PNG)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / name).write_bytes(b"\n".join(lines))
    return open_source(type, folder / name)


def kind(folder: Path, row: Any, type: str = "llava") -> str:
    with pytest.raises(BadRowError, match=r"^train\.jsonl:1: [^\n]+$") as caught:
        source(folder, [row], type)[0]
    return caught.value.kind


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "<image>What?", "<image> What? "])
def test_llava(tmp_path: Path, question: str) -> None:
    row = {"id": "1", "image": "a.jpg", "conversations": said(question, "A cat.", "Where?", "Here.")}
    turns = (("What?", "A cat."), ("Where?", "Here."))
    assert source(tmp_path, [row])[0] == Conversation(turns, tmp_path / "a.jpg", "train.jsonl:1")


def test_a_mark_inside_leaves_one_newline(tmp_path: Path) -> None:
    row = {"image": ["a.jpg"], "conversations": said("a\n<image>\nb", "c")}
    assert source(tmp_path, [row])[0].turns == (("a\nb", "c"),)


def test_a_caption_answers_the_empty_question(tmp_path: Path) -> None:
    assert source(tmp_path, [{"image": "a.jpg", "conversations": said("<image>", "A cat.")}])[0].turns == (
        ("", "A cat."),
    )


def test_sharegpt(tmp_path: Path) -> None:
    """Leading answers and a last question go; a system text stands before the first question."""
    speakers = ("system", "gpt", "user", "chatgpt", "human", "bing", "human")
    row = {"id": 7, "conversations": said("Be kind.", "lost", "Hi", "Hello", "1+1", "2", "lost", speakers=speakers)}
    with_image = {"image": "", "conversations": said("q", "a")}
    rows = source(tmp_path, [row, with_image], "sharegpt")
    assert rows[0] == Conversation((("Be kind.\n\nHi", "Hello"), ("1+1", "2")), None, "train.jsonl:1")
    assert rows[1] == Conversation((("q", "a"),), None, "train.jsonl:2")


def test_an_array_is_read_as_lines_are(tmp_path: Path) -> None:
    rows = [{"conversations": said(f"q{i}", f"a{i}")} for i in range(3)]
    array = source(tmp_path, [json.dumps(rows, indent=1).encode()], name="train.json")
    lines = source(tmp_path, rows, name="lines.json")
    assert (
        [array[i].turns for i in range(3)]
        == [lines[i].turns for i in range(3)]
        == [((f"q{i}", f"a{i}"),) for i in range(3)]
    )
    assert array[-1].name == "train.json:2" and lines[2].name == "lines.json:3" and len(array) == len(lines) == 3
    with pytest.raises(IndexError):
        array[3]


def test_openai(tmp_path: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(PNG).decode()
    rows = [
        {"messages": [{"role": "system", "content": "S"}, *messages("a.jpg")]},
        {"messages": messages(url)},
        {"messages": messages("a.jpg", plain=True)},
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
            ]
        },
    ]
    read = source(tmp_path, rows, "openai")
    assert read[0] == Conversation((("S\n\nWhat?", "A"),), tmp_path / "a.jpg", "train.jsonl:1")
    assert read[1] == Conversation((("What?", "A"),), PNG, "train.jsonl:2")
    assert read[2].picture == tmp_path / "a.jpg" and read[3] == Conversation((("q", "a"),), None, "train.jsonl:4")


def messages(url: str, plain: bool = False) -> list[dict[str, Any]]:
    picture = {"type": "image", "image": url} if plain else {"type": "image_url", "image_url": {"url": url}}
    parts = [picture, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]


LLAVA_BAD = [
    ("not readable", b'{"conversations": ['),
    ("not readable", b'{"conversations": "\xff"}'),
    ("not readable", b"[" * 100_000),
    ("not readable", b'{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "\\ud800"}]}'),
    ("fields", b"17"),
    ("fields", {"conversations": None}),
    ("fields", {"conversations": ["q", "a"]}),
    ("fields", {"conversations": [{"from": "human", "value": 1}, {"from": "gpt", "value": "a"}]}),
    ("fields", {"image": {"path": "a.jpg"}, "conversations": said("q", "a")}),
    ("turns", {"conversations": said("q", "r", speakers=("human",))}),
    ("turns", {"conversations": said("q", "a", "b", speakers=("human", "gpt", "gpt"))}),
    ("turns", {"conversations": said("q", "a", speakers=("human", "narrator"))}),
    ("turns", {"conversations": said("q", "a", "s", speakers=("human", "gpt", "system"))}),
    ("no answer", {"conversations": said("q")}),
    ("no answer", {"conversations": []}),
    ("no answer", {"conversations": said("q", " \n")}),
    ("picture marks", {"image": "a.jpg", "conversations": said("<image><image>", "a")}),
    ("picture marks", {"conversations": said("<image>\nq", "a")}),
    ("picture marks", {"image": ["a.jpg", "b.jpg"], "conversations": said("q", "a")}),
    ("no picture", {"image": "b.jpg", "conversations": said("q", "a")}),
    ("no picture", {"image": "a\0.jpg", "conversations": said("q", "a")}),
    ("no picture", {"image": "https://example.org/a.jpg", "conversations": said("q", "a")}),
    ("picture", {"image": "data:image/png;base64,***", "conversations": said("q", "a")}),
    ("picture", {"image": "data:text/html,x", "conversations": said("q", "a")}),
]


@pytest.mark.parametrize(("expected", "row"), LLAVA_BAD, ids=[f"{i} {k}" for i, (k, _) in enumerate(LLAVA_BAD)])
def test_bad_rows(tmp_path: Path, expected: str, row: Any) -> None:
    assert kind(tmp_path, row) == expected


def test_bad_messages(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "A"}
    two = [{"type": "image", "image": "a.jpg"}] * 2
    assert kind(tmp_path, {"messages": messages("http://x/a.jpg")}, "openai") == "no picture"
    assert kind(tmp_path, {"messages": [{"role": "user", "content": two}, answer]}, "openai") == "picture marks"
    assert kind(tmp_path, {"messages": [{"role": "tool", "content": "q"}, answer]}, "openai") == "turns"
    assert (
        kind(tmp_path, {"messages": [{"role": "user", "content": "q"}, answer | {"content": None}]}, "openai")
        == "no answer"
    )
    for content in (5, ["q"], [{"type": "audio"}], [{"type": "image_url", "image_url": 3}]):
        assert kind(tmp_path, {"messages": [{"role": "user", "content": content}, answer]}, "openai") == "fields"


def test_a_picture_in_the_row_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_PICTURE_BYTES", 100)
    url = "data:image/png;base64," + "A" * 400
    assert kind(tmp_path, {"messages": messages(url)}, "openai") == "picture"


def test_a_thousand_rows_with_a_hundred_bad_ones(tmp_path: Path) -> None:
    """Counted exactly, and the good ones are all there."""
    rng = random.Random(0)
    places = rng.sample(range(1000), 100)
    rows: list[Any] = [{"image": "a.jpg", "conversations": said("<image>\nq", f"a{i}")} for i in range(1000)]
    expected: Counter[str] = Counter()
    for number, place in enumerate(places):
        bad, rows[place] = LLAVA_BAD[number % len(LLAVA_BAD)]
        expected[bad] += 1
    read, found, good = source(tmp_path, rows), Counter[str](), []
    for index in range(len(read)):
        try:
            good.append(read[index].turns[0][1])
        except BadRowError as error:
            found[error.kind] += 1
            assert str(error).startswith(f"train.jsonl:{index + 1}: ") and "\n" not in str(error)
    assert found == expected and good == [f"a{i}" for i in range(1000) if i not in places]


def test_random_access_is_sequential_access(tmp_path: Path) -> None:
    rows: list[Any] = [{"conversations": said("q", "ä" * (i % 50) + f"{i}")} for i in range(70_000)]
    rows[5] = b"  \r"  # a blank line is no row, and line numbers count it
    read = source(tmp_path, rows)
    expected = [row["conversations"][1]["value"] for row in rows if isinstance(row, dict)]
    assert len(read) == 69_999 and read[4].name == "train.jsonl:5" and read[5].name == "train.jsonl:7"
    for index in [*random.Random(1).sample(range(len(read)), 500), 65_535, 65_536, -1]:
        assert read[index].turns[0][1] == expected[index]


def test_a_bad_row_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(BadRowError("turns", "a:1: who")))
    assert isinstance(error, BadRowError) and error.kind == "turns" and str(error) == "a:1: who"


def test_broken_bytes_never_do_more_than_spoil_rows(tmp_path: Path) -> None:
    rows = [{"image": "a.jpg", "conversations": said("<image>\nq", f"a{i}", "b", "c")} for i in range(20)]
    source(tmp_path, rows)
    source(tmp_path, [json.dumps(rows).encode()], name="array.json")
    rng = random.Random(2)
    for name in ("train.jsonl", "array.json"):
        data = (tmp_path / name).read_bytes()
        for _ in range(400):
            broken = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                broken[rng.randrange(len(broken))] = rng.choice((rng.randrange(256), 10, 34, 91, 123))
            (tmp_path / name).write_bytes(broken[: rng.randint(1, len(broken))] if rng.random() < 0.3 else broken)
            try:
                read = open_source("llava", tmp_path / name)
            except ValueError as error:
                assert name in str(error) and "\n" not in str(error)
                continue
            for index in range(len(read)):
                try:
                    read[index]
                except BadRowError as error:
                    assert "\n" not in str(error)
