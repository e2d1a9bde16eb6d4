"""The command line: answers on stdout, every user error one line on stderr and status 1."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import GOLDEN, converted

from sphinx_fast.cli import build_parser, main

CAT = str(GOLDEN / "cat.png")
CASE = json.loads((GOLDEN / "llama_ens" / "cases.json").read_text())["cases"][0]


def model() -> list[str]:
    return ["--model", str(converted("llama_ens")), "--device", "cpu", "--max-new-tokens", "16"]


def test_ask_prints_the_answer(capsys: Any) -> None:
    assert main(["ask", CAT, CASE["question"], *model()]) == 0
    assert capsys.readouterr().out == CASE["response"] + "\n"


def test_ask_json(capsys: Any) -> None:
    assert main(["ask", CAT, CASE["question"], "--json", *model()]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["answer"] == CASE["response"] and record["image"] == CAT
    assert record["boxes"] == [] and record["seconds"] > 0


def test_ask_without_a_picture(capsys: Any) -> None:
    assert main(["ask", "-", "Hello", *model()]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_chat_streams_turn_after_turn(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(CASE["question"] + "\nAnd now?\n\n"))
    assert main(["chat", CAT, *model()]) == 0
    out = capsys.readouterr().out
    assert CASE["response"] in out and out.count("> ") == 3


def test_convert_then_ask(capsys: Any, tmp_path: Path) -> None:
    target = tmp_path / "new"
    assert main(["convert", str(GOLDEN / "llama_ens"), str(target), "--quiet"]) == 0
    assert "1 view(s), 291 visual positions" in capsys.readouterr().out
    assert main(["ask", CAT, CASE["question"], "--model", str(target), "--max-new-tokens", "16"]) == 0
    assert capsys.readouterr().out == CASE["response"] + "\n"


def test_doctor_says_what_is_here(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("python", "torch", "transformers", "extension", "gpu"):
        assert word in out


# --- data -------------------------------------------------------------------------------------------------------------
def gqa(folder: Path, name: str = "questions.json", rows: int = 2) -> str:
    """GQA's form, two questions about one picture."""
    for picture in ("cat.jpg", "pictures/cat.png"):
        (folder / picture).parent.mkdir(exist_ok=True)
        (folder / picture).touch()
    table = {str(k): {"imageId": "cat", "question": f"What is {k}?", "answer": f"number {k}"} for k in range(rows)}
    (folder / name).write_text(json.dumps(table))
    return str(folder / name)


def test_data_becomes_json_lines(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "new.jsonl"
    assert main(["data", "gqa", gqa(tmp_path), str(out), "--quiet"]) == 0
    assert capsys.readouterr().out == f"{out}: 1 rows written; pictures are named from {tmp_path}\n"
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["image"] == "cat.jpg" and len(row["conversations"]) == 4


def test_data_of_several_files_with_options(tmp_path: Path, capsys: Any) -> None:
    files = [gqa(tmp_path, name) for name in ("a.json", "b.json")]
    out, root = tmp_path / "new.jsonl", tmp_path / "pictures"
    options = ["--option", "max_turns=1", "--option", "picture={imageId}.png", "--root", str(root)]
    assert main(["data", "gqa", *files, str(out), *options, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{out}: 4 rows written; pictures are named from {root}\n"
    assert {json.loads(line)["image"] for line in out.read_text().splitlines()} == {"cat.png"}
    from sphinx_fast.data.sources import open_source

    assert open_source("llava", out, root=root)[0].picture == root / "cat.png"


def test_data_counts_what_is_left_out(tmp_path: Path, capsys: Any) -> None:
    good = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}
    source, out = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    source.write_text(f'{json.dumps(good)}\nno JSON\n{{"conversations": 3}}\n')
    assert main(["data", "llava", str(source), str(out), "--quiet"]) == 0
    assert "1 rows written, 2 left out (1 not readable, 1 fields); pictures" in capsys.readouterr().out


def test_data_lists_its_types(capsys: Any) -> None:
    from sphinx_fast.data.sources import SOURCES

    assert main(["data", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(SOURCES)
    assert "ocr_vqa           split=1, max_turns=16" in lines
    assert any(line.startswith("vqa ") and "annotations=... (required)" in line for line in lines)
    assert any("ask=people,joints, occluded=false" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gqa", "FILE"], "expected TYPE PATH [PATH ...] OUT.jsonl, or --list"),
        (["gqa", "FILE", "out.json"], "out.json: expected OUT.jsonl"),
        (["llava", "FILE", "OLD"], "exists already"),
        (["gaq", "FILE", "OUT"], "unknown type of data 'gaq'; known: llava"),
        (["gqa", "nowhere.json", "OUT"], "nowhere.json"),
        (["gqa", "FILE", "OUT", "--option", "max_turns"], "expected key=value, got 'max_turns'"),
        (["gqa", "FILE", "OUT", "--option", "max_turns=many"], "max_turns: expected a number, got 'many'"),
        (["gqa", "FILE", "OUT", "--option", "max_turns=0"], "max_turns: expected a number from 1, got 0"),
        (["gqa", "FILE", "OUT", "--option", "color=red"], "gqa: unknown option color; known: picture, max_turns"),
        (["gqa", "FILE", "OUT", "--root", "elsewhere"], "questions.json: no row can be used (1 no picture)"),
        (["vqa", "FILE", "OUT"], "vqa: missing option annotations"),
        (["people", "FILE", "OUT", "--option", "occluded=yes"], "occluded: expected true or false, got 'yes'"),
        (["people", "FILE", "OUT", "--option", "ask=people,dogs"], "ask: expected some of people, joints"),
    ],
)
def test_mistakes_in_data_are_one_line(words: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("kept")
    names = {"FILE": gqa(tmp_path), "OUT": str(tmp_path / "new.jsonl"), "OLD": str(old)}
    assert main(["data", *(names.get(word, word) for word in words), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("sphinx-fast: ") and captured.err.count("\n") == 1
    assert message in captured.err and old.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cat.jpg",
        "old.jsonl",
        "pictures",
        "questions.json",
    ]


MISTAKES: list[tuple[list[str], str]] = [
    (["ask", "nowhere.png", "What?"], "nowhere.png"),
    (["ask", CAT, "What?", "--model", "./nowhere"], "no such folder"),
    (["ask", CAT, "What?", "--model", str(GOLDEN / "llama_ens")], "convert it first"),
    (["ask", CAT, "What?", "--dtype", "int3"], "dtype"),
    (["ask", CAT, "What?", "--quantize", "int3"], "quantize: expected one of int8, int4, nf4, got 'int3'"),
    (["ask", CAT, "What?", "--temperature", "-1"], "temperature"),
    (["ask", CAT, "What?", "--max-new-tokens", "0"], "max_new_tokens"),
    (["convert", "./nowhere", "./new"], "no such folder"),
    (["convert", str(GOLDEN / "llama_ens"), str(GOLDEN)], "exists already"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    if arguments[0] == "ask" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(converted("llama_ens"))]
    capsys.readouterr()
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("sphinx-fast:")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in captured.err


def test_the_verbs_are_frozen() -> None:
    verbs = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    options = {
        verb: sorted(o for a in p._actions for o in a.option_strings if o.startswith("--")) for verb, p in verbs.items()
    }  # type: ignore[union-attr]
    loading = [
        "--device",
        "--dtype",
        "--help",
        "--max-new-tokens",
        "--model",
        "--quantize",
        "--seed",
        "--temperature",
        "--top-p",
        "--variant",
    ]
    assert options == {
        "ask": sorted([*loading, "--json"]),
        "chat": loading,
        "convert": ["--dtype", "--help", "--quiet", "--variant"],
        "data": ["--help", "--list", "--option", "--quiet", "--root"],
        "doctor": ["--help"],
        "mix": ["--beta", "--data", "--device", "--help", "--parts", "--quiet", "--rows", "--sweep", "--weights"],
        "train": ["--dry-run", "--help", "--processes", "--quiet"],
    }
