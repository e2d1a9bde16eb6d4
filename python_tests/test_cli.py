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
        "doctor": ["--help"],
    }
