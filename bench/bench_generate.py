"""Many questions on one picture: the engine beside transformers' generate, tokens per second and time to first token.

    python bench/bench_generate.py [--device cuda] [--save]    # a line per number of questions and dtype
    pytest bench/bench_generate.py --benchmark-only            # a few of the same calls under pytest-benchmark

A Llama of 134M parameters (7B on a GPU) with random weights, five views of 291 visual tokens, which both sides are
given: no encoder runs. Greedy, 32 new tokens, questions of 8 words. Nothing is kept from call to call unless a line
says so.
    generate         model.generate with SDPA, called for each question
    generate batch   model.generate with SDPA on all questions as one batch
    compiled         (GPU) the same with a static cache, compiled by transformers
    step compiled    (GPU) a loop over a static cache whose step is compiled, as gpt-fast does it
The percentage is of what a decoding step must read at least (weights, the prefix once, suffixes) at the rate at which
two buffers are read. `first token`: a question on a new picture, on a picture that was asked about, and the second turn
of a conversation, each beside the same prompt on an engine that keeps nothing. `equal`: of 50 prompts, the share whose
greedy tokens are the same asked together and alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from common import Line, arguments, median_seconds, read_ceiling, save, seconds_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import PreTrainedTokenizerFast, StaticCache

from sphinx_fast import SphinxConfig, SphinxForConditionalGeneration
from sphinx_fast.infer import Sampling
from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.request import Picture, Request
from sphinx_fast.model.conversation import conversation_prompt
from sphinx_fast.model.processor import SphinxProcessor

NEW, VIEWS = 32, 5
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ENCODER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "image_size": 224, "patch_size": 14}  # fmt: skip
LLAMA = {
    "cpu": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "cuda": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
QUESTIONS = {"cpu": (1, 4, 16, 32), "cuda": (1, 2, 4, 8, 16, 32, 64)}
BATCHES = {"cpu": (16,), "cuda": (1, 2, 4, 8, 16, 32, 64)}  # generate on a batch of these


def small_sphinx(device: str, dtype: torch.dtype) -> tuple[SphinxForConditionalGeneration, SphinxProcessor]:
    """A language model of the size that is measured behind encoders of no size, and a tokenizer of a token a word."""
    vision = {"picture_size": 448, "view_size": 224, "grid_size": 16, "num_query_tokens": 32, "convnext_size": 256,
              "dinov2_size": 224, "clip_config": ENCODER, "dinov2_config": ENCODER, "qformer_vision_config": ENCODER,
              "convnext_config": {"depths": (1, 1, 1, 1), "hidden_sizes": (4, 8, 12, 16)},
              "qformer_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                 "intermediate_size": 32, "encoder_hidden_size": 16}}  # fmt: skip
    text = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 4096, "bos_token_id": 1,
            "eos_token_id": 2, "pad_token_id": 0, **LLAMA[device]}  # fmt: skip
    torch.manual_seed(0)
    config = SphinxConfig(vision_config=vision, text_config=text, image_token_id=32000)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = SphinxForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None  # every answer takes its 32 tokens
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(32000)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0")
    return model, SphinxProcessor.from_config(config, tokenizer)


class Bench:
    """The calls that are timed, on one model."""

    def __init__(self, device: str, dtype: torch.dtype, graphs: bool = False) -> None:
        self.model, self.processor = small_sphinx(device, dtype)
        self.device, width = device, self.model.config.text_config.hidden_size
        self.visual = torch.randn(VIEWS, 291, width, device=device).to(dtype)
        self.engine = Engine(self.model, self.processor, picture_cache=0, max_rows=64)
        self.keeping = Engine(self.model, self.processor, max_rows=64)
        for engine in (self.engine, self.keeping):
            engine.use_graphs(graphs)
        self.kept = Picture(None, VIEWS, "kept", True, self.visual)

    def prompt(self, number: int) -> str:
        return conversation_prompt([(f"w{100 + number} w5 w6 w7 w8 w9 w10 w11", None)])

    def ask(self, engine: Engine, prompts: list[str], picture: Picture | None = None, new: int = NEW) -> list[Request]:
        picture = picture or Picture(None, VIEWS, object(), False, self.visual)
        settings = Sampling(max_new_tokens=new, stop=())
        requests = [engine.request(prompt, picture, settings) for prompt in prompts]
        for _ in engine.serve(requests):
            pass
        return requests

    def many(self, count: int) -> list[Request]:
        return self.ask(self.engine, [self.prompt(number) for number in range(count)])

    def again(self, count: int) -> list[Request]:
        return self.ask(self.keeping, [self.prompt(number) for number in range(count)], self.kept)

    def inputs(self, count: int) -> dict[str, Tensor]:
        rows = [self.processor.prompt_ids(self.prompt(number), views=[VIEWS]) for number in range(count)]
        ids = torch.tensor(rows, device=self.device)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "visual_tokens": self.visual.repeat(count, 1, 1)}

    @torch.inference_mode()
    def generate(self, count: int, **options: Any) -> Tensor:
        language_model = self.model.model.language_model
        language_model.set_attn_implementation("sdpa")
        out: Tensor = self.model.generate(
            **self.inputs(count), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options
        )
        return out

    def step_compiled(self, count: int) -> Callable[[], Tensor]:
        """gpt-fast's way: a static cache, one compiled step, a Python loop around it."""
        self.model.model.language_model.set_attn_implementation("sdpa")
        inputs = self.inputs(count)
        length = inputs["input_ids"].shape[1]
        cache = StaticCache(config=self.model.config.text_config, max_cache_len=length + NEW)

        def step(ids: Tensor, position: Tensor) -> Tensor:
            logits = self.model(input_ids=ids, position_ids=position[None], past_key_values=cache).logits
            return logits[:, -1].argmax(-1, keepdim=True)

        compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)

        @torch.inference_mode()
        def run() -> Tensor:
            cache.reset()
            logits = self.model(**inputs, past_key_values=cache, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
            for position in range(length, length + NEW - 1):
                token = compiled(token, torch.tensor([position], device=self.device)).clone()
            return token

        return run

    def bytes_of_a_step(self, count: int) -> int:
        """Weights but the embedding, the prefix once, and every suffix at half of its answer."""
        language_model, head = self.model.model.language_model, self.model.lm_head
        weights = sum(p.nbytes for p in language_model.parameters()) + head.weight.nbytes
        weights -= language_model.get_input_embeddings().weight.nbytes
        config = self.model.config.text_config
        position = 2 * config.num_hidden_layers * config.hidden_size * self.visual.element_size()
        return int(weights + position * (VIEWS * 291 + count * (20 + NEW // 2)))

    def kept_megabytes(self) -> float:
        """Of keys and values in the engine's pools."""
        pools = self.engine.runner.prefixes, self.engine.runner.suffixes
        return sum(pool.slots * pool.slot_bytes for pool in pools) / 1e6


def tokens_line(bench: Bench, count: int, name: str, ceiling: float, chosen: argparse.Namespace) -> Line:
    calls: dict[str, Callable[[], object]] = {"": lambda: bench.many(count), "generate": lambda: bench.generate(1)}
    if chosen.device == "cuda":
        calls["compiled"] = lambda: bench.generate(count, cache_implementation="static")
        calls["step compiled"] = bench.step_compiled(count)
    prefill = {"first": lambda: bench.ask(bench.engine, [bench.prompt(n) for n in range(count)], new=1)}
    seconds = median_seconds(calls | prefill, chosen.device, chosen.seconds, least=3)
    if count in BATCHES[chosen.device]:  # minutes on a CPU: two times, ours beside it, and no call to warm up
        batch = {"generate batch": lambda: bench.generate(count), "ours beside it": lambda: bench.many(count)}
        times = [{name: seconds_of(call, chosen.device) for name, call in batch.items()} for _ in range(2)]
        ratio = statistics.mean(one["generate batch"] / one["ours beside it"] for one in times)
        seconds["generate batch"] = ratio * seconds[""]
    step = (seconds[""] - seconds["first"]) / (NEW - 1)
    rate = bench.bytes_of_a_step(count) / step / 1e9
    line = Line("generate", f"{count} questions, {VIEWS * 291} {name}", seconds[""] * 1e3, rate, 100 * rate / ceiling)
    line.ceiling = "reads"
    # Per token: a call for one question makes NEW tokens, ours count * NEW.
    line.ratio_to = {
        peer: seconds[peer] * (count if peer == "generate" else 1) / seconds[""]
        for peer in seconds
        if peer not in ("", "first")
    }
    line.figures = {
        "tokens/s": count * NEW / seconds[""],
        "first token ms": seconds["first"] * 1e3,
        "step ms": step * 1e3,
        "keys and values MB": bench.kept_megabytes(),
    }
    print(line, flush=True)
    return line


def first_token_lines(bench: Bench, name: str, chosen: argparse.Namespace) -> list[Line]:
    first = conversation_prompt([("w100 w5 w6 w7 w8 w9 w10 w11", None)])
    turn = conversation_prompt([("w100 w5 w6 w7 w8 w9 w10 w11", "w7 " * 20), ("w101 w5 w6 w7 w8 w9 w10", None)])
    settings = Sampling(max_new_tokens=1, stop=())
    lines = []
    bench.again(1)
    before = bench.ask(bench.keeping, [first], bench.kept, new=20)[0]
    prompt_ids = bench.processor.prompt_ids(first, views=[VIEWS])
    place = before.suffix
    assert place is not None

    def second_turn() -> object:
        # As the answer's turn would find it: the first turn's ids are there, the rest is new.
        place.ids, place.length = prompt_ids[before.shared :], len(prompt_ids) - before.shared
        request = bench.keeping.request(turn, bench.kept, settings, before)
        for _ in bench.keeping.serve([request]):
            pass
        return request

    ours: dict[str, Callable[[], object]] = {
        "new picture": lambda: bench.ask(bench.engine, [first], new=1),
        "picture asked before": lambda: bench.ask(bench.keeping, [first], bench.kept, new=1),
        "second turn": second_turn,
    }
    for what, call in ours.items():
        prompt = turn if what == "second turn" else first
        uncached = lambda prompt=prompt: bench.ask(bench.engine, [prompt], new=1)  # noqa: E731
        seconds = median_seconds({"": call, "nothing kept": uncached}, chosen.device, chosen.seconds, least=3)
        line = Line("generate", f"first token, {what} {name}", seconds[""] * 1e3, 0.0, 0.0)
        line.ratio_to = {"nothing kept": seconds["nothing kept"] / seconds[""]}
        print(line, flush=True)
        lines.append(line)
    return lines


def equal_line(bench: Bench, name: str) -> Line:
    """How many of 50 prompts have the same greedy tokens asked together and alone."""
    prompts = [bench.prompt(number) for number in range(50)]
    together = bench.ask(bench.keeping, prompts, bench.kept)
    alone = [bench.ask(bench.keeping, [prompt], bench.kept)[0] for prompt in prompts]
    same = statistics.mean(one.tokens == other.tokens for one, other in zip(together, alone, strict=True))
    line = Line("generate", f"equal, 50 prompts {name}", 0.0, 0.0, 100 * same, ceiling="prompts")
    print(line, flush=True)
    return line


@pytest.mark.parametrize("call", ["many", "again", "generate"])
def test_generate(benchmark: Any, call: str) -> None:
    bench = Bench("cpu", torch.float32)
    benchmark.pedantic(getattr(bench, call), args=(1,), rounds=1)


def main() -> None:
    chosen = arguments(__doc__ or "")
    ceiling = read_ceiling(chosen.device)
    print(f"reads: {ceiling:.1f} GB/s")
    lines: list[Line] = []
    for name, dtype in DTYPES.items():
        if chosen.device == "cuda" and name == "fp32":
            continue
        bench = Bench(chosen.device, dtype, graphs=chosen.device == "cuda")
        lines += [tokens_line(bench, count, name, ceiling, chosen) for count in QUESTIONS[chosen.device]]
        lines += first_token_lines(bench, name, chosen)
        lines.append(equal_line(bench, name))
    save(lines, chosen)


if __name__ == "__main__":
    main()
