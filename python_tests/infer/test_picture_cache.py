"""The picture cache: its bound and order under threads, its keys, and what asking twice costs and may not change."""

from __future__ import annotations

import copy
import random
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import GOLDEN, converted, tiny_model
from torch import Tensor, nn

from sphinx_fast import Sphinx
from sphinx_fast.infer import PictureCache
from sphinx_fast.infer.engine import Engine
from sphinx_fast.infer.picture_cache import DEFAULT_BYTES, ModelIdentity, PictureEntry, PictureKey, weights_state
from sphinx_fast.model.image_processor import TRANSFORMS, SphinxImageProcessor, SphinxImageProcessorReference

CAT = GOLDEN / "cat.png"
COFFEE = GOLDEN / "coffee_portrait.png"


def key(number: int) -> PictureKey:
    return PictureKey(bytes([number]), (1, 1), "mode", 1)


def entry(size: int, value: int = 0) -> PictureEntry:
    """An entry of `size` bytes that say `value`."""
    return PictureEntry(torch.full((size,), value, dtype=torch.uint8))


def kept(cache: PictureCache, numbers: range) -> list[int]:
    """Which of the keys are there, without a hit: by looking at a copy of the inside."""
    return [n for n in numbers if key(n) in cache._entries]


# --- the cache alone --------------------------------------------------------------------------------------------------
def test_the_least_recently_used_go_first() -> None:
    cache = PictureCache(30)
    for number in range(3):
        cache.put(key(number), entry(10, number))
    assert kept(cache, range(4)) == [0, 1, 2]  # full to the last byte
    assert cache.get(key(0)) is not None  # now 1 is the oldest
    cache.put(key(3), entry(10, 3))
    assert kept(cache, range(4)) == [0, 2, 3]
    cache.put(key(2), entry(10, 9))  # a put refreshes too
    cache.put(key(4), entry(15))
    assert kept(cache, range(5)) == [2, 4]
    found = cache.get(key(2))
    assert isinstance(found, PictureEntry) and found.visual_tokens.tolist() == [9] * 10
    assert cache.stats() == (2, 0, 3, 25, 2)


def test_one_entry_evicts_as_many_as_it_needs_and_no_more() -> None:
    cache = PictureCache(30)
    for number in range(3):
        cache.put(key(number), entry(10))
    cache.put(key(3), entry(11))
    assert (kept(cache, range(4)), cache.stats().bytes) == ([2, 3], 21)
    cache.put(key(2), entry(19))  # in its own place: nothing else has to go
    assert (kept(cache, range(4)), cache.stats().bytes, cache.stats().evictions) == ([2, 3], 30, 2)


def test_an_entry_larger_than_the_cache_changes_nothing() -> None:
    cache = PictureCache(20)
    cache.put(key(0), entry(10, 5))
    cache.put(key(1), entry(21))
    cache.put(key(0), entry(21, 6))
    found = cache.get(key(0))
    assert isinstance(found, PictureEntry) and found.visual_tokens[0] == 5
    assert (kept(cache, range(2)), cache.stats().bytes, cache.stats().evictions) == ([0], 10, 0)
    cache.put(key(1), entry(20))  # exactly as large
    assert kept(cache, range(2)) == [1]


def test_counts_and_clear() -> None:
    cache = PictureCache(100)
    assert cache.get(key(0)) is None
    cache.put(key(0), entry(60))
    cache.put(key(1), entry(60))
    assert cache.get(key(0)) is None
    assert cache.get(key(1)) is not None
    assert cache.stats()._asdict() == {"hits": 1, "misses": 2, "evictions": 1, "bytes": 60, "entries": 1}
    cache.clear()
    assert cache.get(key(1)) is None
    assert cache.stats() == (1, 3, 1, 0, 0)
    cache.put(key(0), entry(100))
    assert cache.stats().bytes == 100


def test_a_cache_of_zero_bytes_keeps_nothing() -> None:
    cache = PictureCache(0)
    cache.put(key(0), entry(1))
    assert cache.get(key(0)) is None
    assert cache.stats().entries == 0


@pytest.mark.parametrize("bound", [-1, 1.5, "1GB"])
def test_an_impossible_bound_is_refused_before_anything_is_loaded(bound: Any) -> None:
    with pytest.raises(ValueError, match="picture_cache: expected a number of bytes, 0 or more, got"):
        PictureCache(bound)
    with pytest.raises(ValueError, match="picture_cache: expected"):
        Sphinx.from_pretrained(picture_cache=bound, variant="sphinx-9k")


def test_an_entry_counts_its_memory_and_keeps_no_larger_storage_alive() -> None:
    batch = torch.arange(4 * 6 * 8, dtype=torch.float32).reshape(4, 6, 8)
    single = PictureEntry(batch[1:2])
    assert single.nbytes == 6 * 8 * 4 == single.visual_tokens.untyped_storage().nbytes()
    assert torch.equal(single.visual_tokens, batch[1:2])
    whole = PictureEntry(batch)
    assert whole.visual_tokens is batch and whole.nbytes == batch.nbytes  # nothing to save, nothing copied
    with torch.inference_mode():
        made = torch.zeros(6, 8)
        assert PictureEntry(made).visual_tokens is not made and PictureEntry(made).intact


def test_threads_never_pass_the_bound_and_never_see_another_value() -> None:
    cache = PictureCache(1000)
    wrong: list[str] = []
    done = threading.Event()

    def hammer(seed: int) -> None:
        draw = random.Random(seed)
        for step in range(1000):
            number = draw.randrange(40)
            found = cache.get(key(number))
            if found is None:
                cache.put(key(number), entry(20 + number * 3, number))
            elif not isinstance(found, PictureEntry) or found.visual_tokens.tolist() != [number] * (20 + number * 3):
                wrong.append(f"{number}: {found}")
            if step % 300 == 299 and seed == 0:
                cache.clear()

    def watch() -> None:
        while not done.wait(0.0005):
            stats = cache.stats()
            if not 0 <= stats.bytes <= 1000:
                wrong.append(str(stats))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places in the middle of everything
    try:
        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(hammer, range(8)))
    finally:
        done.set()
        watcher.join()
        sys.setswitchinterval(interval)
    assert wrong == []
    stats = cache.stats()
    assert stats.hits + stats.misses == 8 * 1000 and stats.hits and stats.evictions
    assert stats.bytes == sum(nbytes for _, nbytes in cache._entries.values())
    assert stats.entries == len(cache._entries)


# --- keys -------------------------------------------------------------------------------------------------------------
def test_the_content_the_size_the_mode_and_the_model_make_the_key() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    first = PictureKey.of(picture, "mode", 1)
    assert first == PictureKey.of(torch.from_numpy(picture), "mode", 1) == PictureKey.of(picture.copy(), "mode", 1)
    mirrored = np.ascontiguousarray(picture[:, ::-1])
    assert first == PictureKey.of(mirrored[:, ::-1], "mode", 1)  # a view with other strides, the same pixels
    changed = picture.copy()
    changed[3, 5, 2] ^= 1
    others = [
        PictureKey.of(changed, "mode", 1),
        PictureKey.of(picture.reshape(6, 4, 3), "mode", 1),  # the same bytes
        PictureKey.of(picture, "other", 1),
        PictureKey.of(picture, "mode", 2),
    ]
    assert len({first, *others}) == 5


def test_whatever_changes_the_views_changes_the_mode_and_random_views_have_none() -> None:
    processors = [
        SphinxImageProcessor(448, 224),
        SphinxImageProcessor(224, 224),
        SphinxImageProcessor(448, 448),
        SphinxImageProcessor(448, 224, transform="resized_center_crop"),
        SphinxImageProcessorReference(448, 224),
    ]
    assert len({processor.mode for processor in processors}) == len(processors)
    assert SphinxImageProcessor(448, 224, max_pixels=9).mode == processors[0].mode
    assert SphinxImageProcessor(448, 224, transform="random_resized_crop").mode is None


def test_the_transforms_with_a_mode_draw_nothing() -> None:
    for name, transform in TRANSFORMS.items():
        state = torch.get_rng_state()
        transform(30, 40, 16)
        drew = not torch.equal(state, torch.get_rng_state())
        assert drew == (SphinxImageProcessor(16, 16, transform=name).mode is None), name


# --- the model as it is now -------------------------------------------------------------------------------------------
def layer(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Sequential(nn.Linear(3, 2, bias=False))).eval()


def _fused_step(module: nn.Module) -> None:
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def _in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module[0].bias.zero_()  # type: ignore[index]


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        module[2][0].weight[1, 2] += 1  # type: ignore[index]


CHANGES = {
    "in place": _in_place,
    "in place in inference mode": _in_inference_mode,
    "a fused optimizer's step": _fused_step,
    "load_state_dict": lambda module: module.load_state_dict(layer(1).state_dict()),
    "load_state_dict, assigned": lambda module: module.load_state_dict(layer(1).state_dict(), assign=True),
    "dtype": lambda module: module.bfloat16(),
    "rounded and back": lambda module: module.half().float(),
    "another module": lambda module: setattr(module, "0", layer(1)[0]),  # type: ignore[index]
    "another parameter": lambda module: setattr(module[1], "bias", nn.Parameter(torch.ones(3))),
    "a buffer": lambda module: module[1].register_buffer("scale", torch.ones(1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_gives_a_new_number(change: str) -> None:
    module, identity = layer(), ModelIdentity()
    number = identity.current(module)
    module(torch.zeros(1, 3))  # using it changes nothing
    assert number is not None and identity.current(module) == number
    CHANGES[change](module)
    changed = identity.current(module)
    assert changed not in (number, None) and identity.current(module) == changed


def test_numbers_never_return() -> None:
    seen = set()
    for seed in range(50):  # each dies before the next is made, at the same address as likely as not
        module, identity = layer(seed), ModelIdentity()
        seen.add(identity.current(module))
        del module, identity
    assert len(seen) == 50
    module, identity = layer(), ModelIdentity()
    first = identity.current(module)
    weight = module[0].weight.data  # type: ignore[index]
    module[0].weight.data = weight.clone()  # type: ignore[index]
    second = identity.current(module)
    module[0].weight.data = weight  # type: ignore[index]
    assert len({first, second, identity.current(module)}) == 3  # the old state again is a new number


def test_weights_that_were_only_moved_while_they_ran_keep_their_number() -> None:
    module, identity = layer(), ModelIdentity()
    number = identity.current(module)
    assert number is not None
    weight = module[0].weight  # type: ignore[index]
    weight.data = weight.data.clone()
    identity.after(number, module)
    assert identity.current(module) == number
    _in_place(module)  # written to while they ran: what was computed may be of either
    identity.after(number, module)
    changed = identity.current(module)
    assert changed is not None and changed != number
    weight.data = weight.data.clone()
    identity.after(number, module)  # of a pass that began before the change
    assert identity.current(module) not in (number, changed)


def test_training_mode_has_no_number() -> None:
    module, identity = layer(), ModelIdentity()
    number = identity.current(module)
    module[2].train()  # type: ignore[index]
    assert identity.current(module) is None
    module.eval()
    assert identity.current(module) == number


def test_weights_made_in_inference_mode_have_a_number() -> None:
    with torch.inference_mode():
        module = layer()
    identity = ModelIdentity()
    number = identity.current(module)
    assert number is not None and identity.current(module) == number
    with torch.inference_mode():
        module[0].weight = nn.Parameter(torch.ones(3, 3), requires_grad=False)  # type: ignore[index]
    assert identity.current(module) != number


# --- asking -----------------------------------------------------------------------------------------------------------
class Counted(Sphinx):
    """Sphinx that counts how often its vision tower runs."""

    passes = 0

    def count(self) -> Counted:
        def passed(*_: Any) -> None:
            self.passes += 1

        self.model.model.vision_tower.register_forward_hook(passed)
        return self


def load(name: str = "llama_ens", **options: Any) -> Counted:
    sphinx = Counted.from_pretrained(converted(name), device="cpu", dtype=torch.float32, **options)
    assert isinstance(sphinx, Counted)
    return sphinx.count()


@pytest.fixture
def sphinx() -> Iterator[Counted]:
    yield load()


def test_ask_stream_and_chat_encode_a_picture_once(sphinx: Counted) -> None:
    array = np.asarray(Image.open(CAT).convert("RGB"))
    kinds: list[Any] = [CAT, str(CAT), CAT.read_bytes(), Image.open(CAT), array, torch.from_numpy(array.copy())]
    kinds += [array[::-1].copy()[::-1], torch.from_numpy(array.copy()).permute(2, 0, 1)]
    for kind in kinds:
        sphinx.ask(kind, "What?", max_new_tokens=2)
    list(sphinx.stream(CAT, "And?", max_new_tokens=2))
    talk = sphinx.chat(CAT)
    talk.say("What?", max_new_tokens=2)
    talk.say("And?", max_new_tokens=2)
    assert sphinx.passes == 1
    tokens = sphinx.engine.encode(CAT)
    assert tokens is not None
    prefix = sphinx.engine.runner.prefixes.slot_bytes  # kept beside the visual tokens
    assert sphinx.picture_cache.stats() == (len(kinds) + 3, 1, 0, tokens.nbytes + prefix, 2)
    sphinx.ask(None, "Hello", max_new_tokens=2)  # no picture, no lookup
    sphinx.ask(COFFEE, "What?", max_new_tokens=2)
    assert (sphinx.passes, sphinx.picture_cache.stats().entries, sphinx.picture_cache.stats().misses) == (2, 4, 2)


def test_a_file_that_was_overwritten_is_another_picture(sphinx: Counted, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(CAT.read_bytes())
    before = sphinx.engine.encode(path)
    path.write_bytes(COFFEE.read_bytes())
    after = sphinx.engine.encode(path)
    assert sphinx.passes == 2
    assert before is not None and after is not None and not torch.equal(before, after)


@pytest.mark.parametrize("name", ["llama_ens", "llama_ens5"])
def test_answers_are_the_same_with_the_cache_on_and_off(name: str) -> None:
    kept_here, off = load(name), load(name, picture_cache=0)
    for settings in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 5}):
        for picture in (CAT, None):
            answers = {s.ask(picture, "What is it?", max_new_tokens=5, **settings) for s in (kept_here, off)}
            assert len(answers) == 1
    first, second = (s.engine.encode(CAT) for s in (kept_here, off))
    assert first is not None and second is not None and torch.equal(first, second)
    assert kept_here.passes == 1 and off.passes == 3
    assert off.picture_cache.stats() == (0, 0, 0, 0, 0)


def test_the_bound_is_a_parameter_and_evicted_pictures_are_encoded_again() -> None:
    assert load().picture_cache.max_bytes == DEFAULT_BYTES
    tokens = load().engine.encode(CAT)
    assert tokens is not None
    sphinx = load(picture_cache=tokens.nbytes)
    for picture in (CAT, CAT, COFFEE, COFFEE, CAT):
        sphinx.engine.encode(picture)
    assert sphinx.passes == 3
    assert sphinx.picture_cache.stats() == (2, 3, 2, tokens.nbytes, 1)
    small = load(picture_cache=tokens.nbytes - 1)
    again = [small.engine.encode(CAT) for _ in range(2)]
    assert small.passes == 2 and small.picture_cache.stats().entries == 0
    assert again[0] is not None and torch.equal(again[0], tokens)


def test_a_conversation_outlives_the_eviction_of_its_picture() -> None:
    sphinx = load(picture_cache=1)
    talk = sphinx.chat(CAT)
    sphinx.picture_cache.clear()
    assert talk.say("What?", max_new_tokens=4) == load().ask(CAT, "What?", max_new_tokens=4)
    assert sphinx.passes == 1


def test_models_that_share_a_cache_never_see_each_others_tokens() -> None:
    shared = PictureCache()
    one, five, again = load(picture_cache=shared), load("llama_ens5", picture_cache=shared), load(picture_cache=shared)
    assert one.picture_cache is five.picture_cache is shared
    with torch.no_grad():
        again.model.model.fusion.patch_projection.norm.bias.add_(1)
    for sphinx, name in ((one, "llama_ens"), (five, "llama_ens5")):
        tokens, alone = sphinx.engine.encode(CAT), load(name, picture_cache=0).engine.encode(CAT)
        assert tokens is not None and alone is not None and torch.equal(tokens, alone)
    ours, theirs = one.engine.encode(CAT), again.engine.encode(CAT)
    assert ours is not None and theirs is not None and not torch.equal(ours, theirs)
    assert shared.stats()[:2] == (1, 3)
    shared.clear()
    assert shared.stats().bytes == 0 and one.engine.encode(CAT) is not None and one.passes == 2


def test_a_change_of_weights_is_noticed(sphinx: Counted) -> None:
    before = sphinx.engine.encode(CAT)
    with torch.no_grad():
        sphinx.model.model.vision_tower.clip.post_layernorm.bias.add_(1)
    after = sphinx.engine.encode(CAT)
    assert before is not None and after is not None and not torch.equal(before, after)
    with torch.no_grad():
        sphinx.model.model.fusion.view_start.add_(1)
    assert sphinx.engine.encode(CAT) is sphinx.engine.encode(CAT)
    with torch.no_grad():
        sphinx.model.lm_head.weight.mul_(0.5)  # the visual tokens do not depend on it
    sphinx.engine.encode(CAT)
    assert sphinx.passes == 3
    other = Engine(load("llama_ens").model, sphinx.processor, sphinx.picture_cache)
    assert other.encode(CAT) is not after


def test_nothing_is_kept_while_the_model_trains_or_the_views_are_random(sphinx: Counted) -> None:
    sphinx.model.train()
    for _ in range(2):
        sphinx.engine.encode(CAT)
    sphinx.model.eval()
    sphinx.processor.image_processor.transform = "random_resized_crop"
    square = Image.open(CAT).crop((0, 0, 300, 300))  # of long pictures it always takes the middle
    first, second = (sphinx.engine.encode(square) for _ in range(2))
    assert first is not None and second is not None and not torch.equal(first, second)
    assert sphinx.passes == 4 and sphinx.picture_cache.stats() == (0, 0, 0, 0, 0)
    sphinx.processor.image_processor.transform = "resized_center_crop"
    cropped = sphinx.engine.encode(COFFEE)
    sphinx.processor.image_processor.transform = "padded_resize"
    padded = sphinx.engine.encode(COFFEE)
    assert cropped is not None and padded is not None and not torch.equal(cropped, padded)


def test_offloaded_weights_are_encoded_once() -> None:
    accelerate = pytest.importorskip("accelerate")
    sphinx = load()
    expected = sphinx.engine.encode(CAT)
    sphinx.picture_cache.clear()
    accelerate.cpu_offload(sphinx.model, execution_device=torch.device("cpu"))
    tokens = [sphinx.engine.encode(CAT) for _ in range(3)]
    torch.testing.assert_close(tokens[0], expected)  # offloaded weights may take another path through the encoders
    assert tokens[0] is tokens[1] is tokens[2]
    assert sphinx.passes == 2


def test_tokens_are_shared_and_answering_does_not_write_to_them(sphinx: Counted) -> None:
    tokens = sphinx.engine.encode(CAT)
    assert tokens is not None and tokens is sphinx.engine.encode(CAT)
    before = tokens.clone()
    talk = sphinx.chat(CAT)
    for _ in range(2):
        talk.say("What?", max_new_tokens=4, temperature=0.7)
    assert torch.equal(tokens, before) and tokens is sphinx.engine.encode(CAT) and sphinx.passes == 1


@pytest.mark.parametrize("inference", [False, True])
def test_tokens_that_a_caller_wrote_to_are_not_handed_out_again(sphinx: Counted, inference: bool) -> None:
    with torch.inference_mode(inference):
        first, sane = sphinx.engine.encode(CAT), load(picture_cache=0).engine.encode(CAT)
        assert first is not None and sane is not None
        first[0, 0] = 0
        again = sphinx.engine.encode(CAT)
        assert again is not None and torch.equal(again, sane)
        again.flatten(0, 1)[3].mul_(2)  # through a view
        more = sphinx.engine.encode(CAT)
        assert more is not None and torch.equal(more, sane)
        assert more is sphinx.engine.encode(CAT)
    assert sphinx.picture_cache.stats() == (1, 3, 0, sane.nbytes, 1)


def test_threads_that_ask_one_new_picture_at_once_get_the_same_tokens() -> None:
    sphinx = load()
    expected = load(picture_cache=0).engine.encode(CAT)
    assert expected is not None
    sphinx.engine.encode(COFFEE)  # the first pass may move weights, and threads would see it half done
    sphinx.picture_cache.clear()
    start = threading.Barrier(4)

    def encode(_: int) -> list[Tensor | None]:
        start.wait()
        return [sphinx.engine.encode(CAT) for _ in range(5)]

    with ThreadPoolExecutor(4) as pool:
        found = [tokens for several in pool.map(encode, range(4)) for tokens in several]
    assert all(tokens is not None and torch.equal(tokens, expected) for tokens in found)
    stats = sphinx.picture_cache.stats()
    assert (stats.entries, stats.bytes, stats.hits + stats.misses) == (1, expected.nbytes, 21)
    assert 2 <= stats.misses <= 5 and sphinx.passes == stats.misses


def test_a_copy_of_an_engine_has_an_empty_cache_of_its_own(sphinx: Counted) -> None:
    tokens = sphinx.engine.encode(CAT)
    other = copy.deepcopy(sphinx.engine)
    assert other.picture_cache is not sphinx.picture_cache
    assert other.picture_cache.stats() == (0, 0, 0, 0, 0)
    assert other.picture_cache.max_bytes == sphinx.picture_cache.max_bytes
    copied = other.encode(CAT)
    assert tokens is not None and copied is not None and torch.equal(tokens, copied)


def test_encoders_write_to_none_of_their_weights() -> None:
    """They may move them, once: otherwise no picture would ever be found again."""
    model = tiny_model()
    modules = (model.model.vision_tower, model.model.fusion)
    states = [weights_state(*modules)]
    for _ in range(2):
        with torch.inference_mode():
            model.model.visual_tokens(torch.zeros(5, 3, 32, 32))
        states.append(weights_state(*modules))
    assert states[0] is not None and states[1] is not None
    assert states[0].versions == states[1].versions and states[1] == states[2]
