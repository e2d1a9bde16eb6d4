"""`attn_implementation="sphinx_fast"` in models of transformers, and attention of follow-up questions."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from tiny import tiny_config, tiny_model
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from sphinx_fast.model import attention
from sphinx_fast.ops import KeyValues

TEXT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE = 299


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Queries that the kernel was asked for."""
    seen: list[Tensor] = []
    real = attention.attention

    def counted(query: Tensor, **rest: Any) -> Tensor:
        seen.append(query)
        return real(query, **rest)

    monkeypatch.setattr(attention, "attention", counted)
    return seen


def wide(model: PreTrainedModel) -> Any:
    """Weights wide enough that positions and pictures change what is chosen."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval()


def llama(kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    return wide(LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=kv_heads))).to(dtype)


def tokens(model: Any, implementation: str, **inputs: Any) -> Tensor:
    getattr(model, "model", model).get_decoder().set_attn_implementation(implementation)
    result: Tensor = model.generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return result


def assert_same_tokens(model: Any, steps: list[Tensor], **inputs: Any) -> None:
    expected = tokens(model, "sdpa", **inputs)
    assert not steps
    ours = tokens(model, "sphinx_fast", **inputs)
    assert torch.equal(ours, expected)
    assert len(steps) == 11 * 2, "every token but the first, in both layers"


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama(steps: list[Tensor], kv_heads: int, padded: bool, cache: str | None) -> None:
    ids = torch.randint(3, 299, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = mask[2, :9] = 0
    rest: dict[str, Any] = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    assert_same_tokens(llama(kv_heads), steps, input_ids=ids, attention_mask=mask, **rest)


def test_a_sliding_window(steps: list[Tensor]) -> None:
    model = wide(MistralForCausalLM(MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=8)))
    assert_same_tokens(model, steps, input_ids=torch.arange(3, 33).view(2, 15))


def test_llava(steps: list[Tensor]) -> None:
    """A model of the LLaVA type: pictures in front of the text, a vision encoder that keeps its own attention."""
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = LlamaConfig(**TEXT, num_key_value_heads=2)
    model = wide(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    )
    ids = torch.randint(3, 299, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 1:17] = IMAGE
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    assert_same_tokens(model, steps, input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))


def test_sphinx(steps: list[Tensor]) -> None:
    config = tiny_config(text={"head_dim": 16})
    model = tiny_model(config)
    ids = torch.full((1, 1 + 5 * config.vision_config.tokens_per_view + 6), config.image_token_id)
    ids[:, 0], ids[:, -6:] = 1, torch.arange(10, 16)
    pixels = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    assert_same_tokens(model, steps, input_ids=ids, pixel_values=pixels)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "sphinx_fast"])
def test_one_implementation_for_the_whole_model(implementation: str) -> None:
    model = tiny_model()
    model.set_attn_implementation(implementation)
    assert model.model.language_model.config._attn_implementation == implementation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_step_is_as_near_to_float64_as_sdpa(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    query, key, value = (torch.randn(2, heads, length, 32, generator=generator).to(dtype)
                         for heads, length in ((8, 1), (2, 70), (2, 70)))  # fmt: skip
    mask = torch.rand(2, 1, 1, 70, generator=generator) > 0.3
    module = nn.Module()
    module.num_key_value_groups = 4  # type: ignore[assignment]
    ours, weights = attention.attention_forward(module, query, key, value, mask, scaling=0.3)
    assert weights is None
    plain, exact = (
        F.scaled_dot_product_attention(
            query.to(of), key.to(of).repeat_interleave(4, 1), value.to(of).repeat_interleave(4, 1), mask, scale=0.3
        ).transpose(1, 2)
        for of in (dtype, torch.float64)
    )
    assert_close(ours, plain, exact)


UNLIKE: dict[str, dict[str, Any]] = {
    "a prompt": {"query": torch.randn(2, 4, 3, 16)},
    "a gradient": {"query": torch.randn(2, 4, 1, 16, requires_grad=True)},
    "float64": {"query": torch.randn(2, 4, 1, 16).double(), "key": torch.randn(2, 4, 9, 16).double(),
                "value": torch.randn(2, 4, 9, 16).double()},
    "a head size": {"query": torch.randn(2, 4, 1, 20), "key": torch.randn(2, 4, 9, 20),
                    "value": torch.randn(2, 4, 9, 20)},
    "an additive mask": {"attention_mask": torch.zeros(2, 1, 1, 9)},
    "a mask of heads": {"attention_mask": torch.ones(2, 4, 1, 9, dtype=torch.bool)},
    "values of another width": {"value": torch.randn(2, 4, 9, 32)},
    "a position bias": {"position_bias": torch.randn(2, 4, 1, 9)},
}  # fmt: skip


@pytest.mark.parametrize("what", UNLIKE)
def test_what_the_kernel_does_not_do_is_done_by_torch(steps: list[Tensor], what: str) -> None:
    given = {"query": torch.randn(2, 4, 1, 16), "key": torch.randn(2, 4, 9, 16), "value": torch.randn(2, 4, 9, 16),
             "attention_mask": None} | UNLIKE[what]  # fmt: skip
    out, _ = attention.attention_forward(nn.Module(), **given)
    mask = given["attention_mask"] if "position_bias" not in given else given["position_bias"]
    causal = given["query"].shape[2] > 1
    expected = F.scaled_dot_product_attention(given["query"], given["key"], given["value"], mask, is_causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert not steps


# --- follow-up questions ----------------------------------------------------------------------------------------------
Given = tuple[Tensor, Tensor, Tensor, KeyValues]


def follow_up(lengths: list[int], key_lengths: list[int], dtype: torch.dtype, prefix: int = 37) -> Given:
    generator = torch.Generator().manual_seed(5)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    shared = KeyValues(random(1, 2, prefix, 32), random(1, 2, prefix, 32))
    return random(4, sum(lengths), 32), random(2, sum(key_lengths), 32), random(2, sum(key_lengths), 32), shared


def one_by_one(given: Given, lengths: list[int], key_lengths: list[int]) -> Tensor:
    """Each sequence alone: its keys behind the prefix, causal."""
    query, key, value, prefix = given
    parts = []
    for q, k, v in zip(query.split(lengths, 1), key.split(key_lengths, 1), value.split(key_lengths, 1), strict=True):
        keys, values = torch.cat([prefix.key[0], k], 1), torch.cat([prefix.value[0], v], 1)
        mask = torch.ones(q.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - q.shape[1])
        parts.append(F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True))
    return torch.cat(parts, 1)


def fake_flash_attn(seen: list[str]) -> Any:
    """The two functions, by what flash-attn's documentation says of them."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        k, v = (tensor.repeat_interleave(groups, 1).transpose(0, 1).double() for tensor in (key, value))
        scores = query.transpose(0, 1).double() @ k.transpose(1, 2) * (scale or query.shape[-1] ** -0.5)
        if causal:
            seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril(scores.shape[2] - scores.shape[1])
            scores = scores.masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype), scores.logsumexp(-1).float()

    def flash_attn_func(
        query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float | None, return_attn_probs: bool
    ) -> tuple[Tensor, Tensor, None]:
        seen.append("shared")
        assert return_attn_probs
        out, lse = attend(query[0], key[0], value[0], softmax_scale, False)
        return out[None], lse[None], None

    def flash_attn_varlen_func(
        query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int, *,
        softmax_scale: float | None, causal: bool, return_attn_probs: bool,
    ) -> tuple[Tensor, Tensor, None]:  # fmt: skip
        seen.append("own")
        assert causal and return_attn_probs and ends_q.dtype == ends_k.dtype == torch.int32
        lengths, key_lengths = ends_q.diff().tolist(), ends_k.diff().tolist()
        assert (longest_q, longest_k) == (max(lengths), max(key_lengths))
        parts = [attend(*one, softmax_scale, True) for one in
                 zip(query.split(lengths), key.split(key_lengths), value.split(key_lengths), strict=True)]  # fmt: skip
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1), None

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


@pytest.mark.parametrize("way", ["sdpa", "flash-attn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [37, 0])
@pytest.mark.parametrize(
    ("lengths", "held"),
    [([1], [0]), ([7], [0]), ([3, 1, 9], [0, 0, 0]), ([5, 0, 2], [0, 0, 0]), ([3, 1, 9], [4, 70, 0]), ([2], [11])],
    ids=str,
)
def test_follow_up_questions(
    monkeypatch: pytest.MonkeyPatch, lengths: list[int], held: list[int], prefix: int, dtype: torch.dtype, way: str
) -> None:
    key_lengths = [new + old for new, old in zip(lengths, held, strict=True)]
    given = follow_up(lengths, key_lengths, dtype, prefix)
    seen: list[str] = []
    follow = attention.FollowUp(lengths, key_lengths)
    if way == "sdpa":
        ours = follow(*given)
    else:
        monkeypatch.setattr(attention, "flash_attn", fake_flash_attn(seen))
        ours = follow._by_flash_attn(*given, None)
        assert sorted(seen) == (["own", "shared"] if prefix else ["own"])
    plain, exact = (
        one_by_one(
            (*(tensor.to(of) for tensor in given[:3]), KeyValues(given[3].key.to(of), given[3].value.to(of))),  # type: ignore[arg-type]
            lengths,
            key_lengths,
        )
        for of in (dtype, torch.float64)
    )
    assert_close(ours, plain, exact)


def test_a_question_does_not_see_another() -> None:
    query, key, value, prefix = follow_up([4, 5], [4, 5], torch.float32)
    both = attention.FollowUp([4, 5])(query, key, value, prefix)
    key[:, :4], value[:, :4] = 100.0, -100.0
    assert torch.equal(attention.FollowUp([4, 5])(query, key, value, prefix)[:, 4:], both[:, 4:])


def test_bad_follow_ups_are_refused() -> None:
    query, key, value, prefix = follow_up([4, 5], [4, 5], torch.float32)
    for lengths, key_lengths in (([4], None), ([4, 6], None), ([10, -1], None), ([4, 5], [4]), ([4, 5], [4, 6])):
        with pytest.raises(ValueError, match="lengths"):
            attention.FollowUp(lengths, key_lengths)(query, key, value, prefix)
    two = KeyValues(prefix.key.expand(2, -1, -1, -1), prefix.value.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="prefix"):
        attention.FollowUp([4, 5])(query, key, value, two)
