"""A text corpus as one file of token ids, made once: training then reads any part of it by number."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

DTYPE = np.dtype("<u4")
FLUSH = 2**20  # tokens written at a time


def fingerprint(paths: Sequence[str | Path], tokenizer: Any, column: str | None) -> str:
    """What decides the tokens: names, sizes and times of the files, the column, and the tokenizer."""
    digest = hashlib.sha256()
    for path in paths:
        status = os.stat(path)
        digest.update(repr((str(Path(path).absolute()), status.st_size, status.st_mtime_ns, column)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


class TokenFile:
    """Chunks of `length` tokens (and the one that follows) of a corpus."""

    def __init__(self, path: Path, length: int) -> None:
        self.path, self.length = path, length
        self.tokens = path.stat().st_size // DTYPE.itemsize
        if len(self) < 1:
            raise ValueError(f"text: {self.tokens:,} tokens in all, fewer than one chunk of {length:,}")

    def __len__(self) -> int:
        return (self.tokens - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        """[length + 1] tokens."""
        mapped = np.memmap(self.path, DTYPE, "r")  # opened anew: the object travels to worker processes
        return np.array(mapped[index * self.length : (index + 1) * self.length + 1])


def _marked(note: Path) -> str | None:
    """What a note says its tokens are of; None without one, or where a kill cut it off."""
    try:
        return str(json.loads(note.read_text())["mark"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def await_tokens(path: Path, mark: str) -> None:
    """Until another process has written them. Hours, for a large corpus: no message of torch.distributed waits that
    long."""
    while not (path.is_file() and _marked(path.with_suffix(".json")) == mark):
        time.sleep(0.2)


def write_tokens(documents: Iterable[str], tokenizer: Any, path: Path, mark: str, *, progress: bool = True) -> None:
    """Every document as BOS, tokens, EOS, one after another, into `path`, unless it is there with the same `mark`.

    Written beside and renamed, so that an interrupted run leaves nothing half done.
    """
    note = path.with_suffix(".json")
    if path.is_file() and _marked(note) == mark:
        return
    head = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tail = [] if tokenizer.eos_token_id in (None, *head) else [tokenizer.eos_token_id]  # GPT-2: one token for both
    part = path.with_suffix(".part")
    held: list[int] = []
    count = number = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    with part.open("wb") as file, tqdm(desc="tokens of text", unit="", unit_scale=True, disable=not progress) as bar:
        for document in documents:
            ids = tokenizer(document, add_special_tokens=False)["input_ids"]
            held += [*head, *ids, *tail]
            number += 1
            if len(held) >= FLUSH:
                file.write(np.array(held, DTYPE).tobytes())
                count += len(held)
                bar.update(len(held))
                held = []
        file.write(np.array(held, DTYPE).tobytes())
        bar.update(len(held))
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    note.write_text(json.dumps({"mark": mark, "documents": number, "tokens": count + len(held)}))
