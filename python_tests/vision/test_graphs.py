"""Recordings of the tower: buckets, padding, turns, what is recorded anew, and whose memory the features are.

Without a GPU an eager recorder stands in for CUDA's: the same fixed buffers, the calls themselves as the replay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from close import assert_close
from tiny import light_vision, tiny_config, tiny_tower, tiny_views, tower_by_modules
from torch import Tensor, nn

from sphinx_fast.ops import EncoderViews
from sphinx_fast.vision import VisionFeatures, VisionTower
from sphinx_fast.vision.graphs import EagerRecorder, Fingerprint, TowerGraphs, bucket_of, turns_of

VIEWS = {"tiny": 5, "light": 1, "light, five views": 5}


def tower_named(name: str) -> VisionTower:
    return tiny_tower(tiny_config().vision_config if name == "tiny" else light_vision(VIEWS[name]))


class Counting(EagerRecorder):
    """Counts recordings and replays."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, branches: Sequence[Callable[[], None]]) -> Callable[[], None]:
        inner = super().__call__(branches)
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            inner()

        return replay


def graphs(max_pictures: int = 32) -> tuple[TowerGraphs, Counting]:
    counter = Counting()
    return TowerGraphs(max_pictures, recorder=lambda: counter), counter


def replayed(with_graphs: TowerGraphs, tower: VisionTower, views: Tensor) -> VisionFeatures:
    with torch.no_grad():
        return with_graphs(tower, tower.encoder_inputs(views))


def assert_same(ours: VisionFeatures, tower: VisionTower, views: Tensor) -> None:
    """As near to float64 as the modules are. Eager runs of another batch size differ in rounding, so bits may too."""
    with torch.no_grad():
        plain = tower(views)
    inputs = EncoderViews(*(view.double() for view in tower.encoder_inputs(views)))
    exact = tower_by_modules(copy.deepcopy(tower).double(), inputs)
    assert_close(ours.patches, plain.patches, exact.patches, "patches")
    if ours.queries is not None and plain.queries is not None and exact.queries is not None:
        assert_close(ours.queries, plain.queries, exact.queries, "queries")


@pytest.mark.parametrize("per_picture", [1, 5, 10])
def test_buckets_hold_whole_pictures_in_powers_of_two(per_picture: int) -> None:
    pictures = [bucket_of(count, per_picture) / per_picture for count in range(1, 34 * per_picture)]
    assert all(bucket * per_picture >= count + 1 for count, bucket in enumerate(pictures))
    assert set(pictures) == {1, 2, 4, 8, 16, 32, 64}
    assert bucket_of(per_picture, per_picture) == per_picture
    assert bucket_of(3 * per_picture, per_picture) == 4 * per_picture
    assert bucket_of(3 * per_picture - 1, per_picture) == (4 if per_picture > 1 else 2) * per_picture


def test_turns_cover_all_views_once() -> None:
    for count in (1, 4, 5, 19, 20, 21, 100):
        turns = turns_of(count, 5, max_pictures=4)
        assert [i for turn in turns for i in range(turn.start, turn.stop)] == list(range(count))
        assert all(turn.stop - turn.start <= 20 for turn in turns)
    assert turns_of(0, 5) == []


@pytest.mark.parametrize("bad", [0, -1, 3, 33])
def test_the_largest_bucket_is_a_power_of_two(bad: int) -> None:
    with pytest.raises(ValueError, match=f"max_pictures: expected a power of two, got {bad}"):
        TowerGraphs(bad)


@pytest.mark.parametrize("name", VIEWS)
def test_any_batch(name: str) -> None:
    tower = tower_named(name)
    with_graphs, counter = graphs(max_pictures=4)
    size = tower.config.view_size
    for pictures in (1, 3, 4, 1, 7):
        views = tiny_views(pictures * VIEWS[name], size)
        ours = replayed(with_graphs, tower, views)
        assert ours.patches.shape[0] == len(views)
        assert_same(ours, tower, views)
    assert counter.recorded == 2, "one of 1 and one of 4 pictures"
    assert counter.replayed == 6, "seven pictures take two turns of four"


@pytest.mark.parametrize("count", [1, 2, 4, 6, 11])
def test_views_that_are_no_whole_pictures(count: int) -> None:
    tower = tower_named("tiny")
    views = tiny_views(count, 32)
    assert_same(replayed(graphs()[0], tower, views), tower, views)


def test_features_of_earlier_calls_stay() -> None:
    tower = tower_named("tiny")
    with_graphs, _ = graphs(max_pictures=2)
    first = replayed(with_graphs, tower, tiny_views(5, 32))
    kept = [part.clone() for part in first.parts]
    replayed(with_graphs, tower, -tiny_views(15, 32))
    assert all(torch.equal(part, copy_) for part, copy_ in zip(first.parts, kept, strict=True))
    clip, _, dinov2 = first.parts
    assert clip.untyped_storage().data_ptr() == dinov2.untyped_storage().data_ptr(), "slices of one buffer, as eager"


def test_rest_of_a_bucket_is_not_seen() -> None:
    tower = tower_named("tiny")
    with_graphs, _ = graphs()
    views = tiny_views(10, 32)
    replayed(with_graphs, tower, torch.full((20, 3, 32, 32), float("nan")))  # left in the bucket
    assert_same(replayed(with_graphs, tower, tiny_views(15, 32)), tower, tiny_views(15, 32))
    assert torch.equal(replayed(with_graphs, tower, views).patches, replayed(graphs()[0], tower, views).patches)


@torch.no_grad()
def halve(tower: VisionTower) -> None:
    for parameter in tower.parameters():
        parameter.mul_(0.5)


@torch.no_grad()
def load_new(tower: VisionTower) -> None:
    tower.load_state_dict({name: t * 0.5 for name, t in tower.state_dict().items()}, assign=True)


def new_layer(tower: Any) -> None:
    tower.convnext.stages[2].blocks[0].mlp.fc1 = nn.Linear(12, 48)


def new_data(tower: Any) -> None:
    tower.convnext.stages[0].blocks[0].gamma.data = torch.full((4,), 3.0)


CHANGES: dict[str, tuple[Callable[[VisionTower], Any], bool]] = {  # and whether it makes a new recording
    "nothing": (lambda tower: None, False),
    "values in place": (halve, False),
    "weights elsewhere": (load_new, True),
    "a layer replaced": (new_layer, True),
    "data replaced": (new_data, True),
    "a hook": (lambda tower: tower.convnext.register_forward_hook(lambda *_: None), True),
    "half the bits": (lambda tower: tower.bfloat16(), True),
    "another attention": (lambda tower: tower.clip.set_attn_implementation("eager"), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen_and_moved_ones_recorded_anew(change: str) -> None:
    tower = tower_named("tiny")
    with_graphs, counter = graphs()
    views = tiny_views(5, 32)
    replayed(with_graphs, tower, views)
    function, again = CHANGES[change]
    function(tower)
    for _ in range(2):
        assert_same(replayed(with_graphs, tower, views), tower, views)
    assert counter.recorded == (2 if again else 1)


def test_a_fingerprint_of_an_untouched_tower_holds() -> None:
    tower = tower_named("tiny")
    fingerprint = Fingerprint(tower)
    assert fingerprint.holds(tower)
    tower.clip = None
    assert not fingerprint.holds(tower)


def test_copies_are_empty() -> None:
    tower = tower_named("tiny").use_graphs()
    assert tower._graphs is not None
    tower._graphs.recordings[5] = "a recording"  # type: ignore[assignment]
    other = copy.deepcopy(tower)
    assert other._graphs is not None and other._graphs.recordings == {}
    assert copy.copy(TowerGraphs(8)).max_pictures == 8
    tower.bfloat16()
    assert tower._graphs.recordings == {}, "a cast lets go of the memory"
    assert tower.use_graphs(False)._graphs is None


@torch.no_grad()
def test_without_a_gpu_nothing_changes() -> None:
    tower = tower_named("tiny")
    expected = tower(tiny_views(5, 32))
    features = tower.use_graphs()(tiny_views(5, 32))
    assert torch.equal(features.patches, expected.patches)
    assert tower._graphs is not None and not tower._graphs.recordings


def test_inference_mode_leaves_nothing_behind() -> None:
    tower = tower_named("tiny")
    with_graphs, _ = graphs()
    with torch.inference_mode():
        inside = with_graphs(tower, tower.encoder_inputs(tiny_views(5, 32)))
    outside = replayed(with_graphs, tower, tiny_views(5, 32))
    assert torch.equal(inside.patches, outside.patches)
    assert not any(part.is_inference() for part in outside.parts)


@pytest.mark.gpu
class TestOnAGpu:
    """Replay equals eager at the size of the bucket, bit for bit: the same kernels in the same shapes."""

    @pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
    def tower(self, request: pytest.FixtureRequest) -> VisionTower:
        return tower_named("tiny").to("cuda", request.param).requires_grad_(False)

    @pytest.mark.parametrize("pictures", [1, 2, 4, 32])
    def test_replay_equals_eager(self, tower: VisionTower, pictures: int) -> None:
        views = tiny_views(5 * pictures, 32).cuda()
        eager = tower(views)
        tower.use_graphs()
        for _ in range(3):
            ours = tower(views)
            assert torch.equal(ours.patches, eager.patches) and torch.equal(ours.queries, eager.queries)
        assert tower._graphs is not None and list(tower._graphs.recordings) == [5 * pictures]

    @pytest.mark.parametrize("count", [1, 3, 5, 15, 35, 165, 200])
    def test_odd_batches_and_turns(self, tower: VisionTower, count: int) -> None:
        views = tiny_views(count, 32).cuda()
        assert_same(tower.use_graphs()(views), copy.deepcopy(tower).use_graphs(False), views)

    @pytest.mark.parametrize("name", VIEWS)
    def test_every_variant(self, name: str) -> None:
        tower = tower_named(name).cuda().requires_grad_(False)
        views = tiny_views(3 * VIEWS[name], tower.config.view_size).cuda()
        assert_same(tower.use_graphs()(views), copy.deepcopy(tower).use_graphs(False), views)

    def test_kept_features_are_not_overwritten(self, tower: VisionTower) -> None:
        tower.use_graphs()
        first = tower(tiny_views(5, 32).cuda())
        kept = first.patches.clone()
        for _ in range(3):
            tower(-tiny_views(5, 32).cuda())
        assert torch.equal(first.patches, kept)

    @pytest.mark.parametrize("change", [halve, load_new, lambda tower: tower.float()])
    def test_changed_weights(self, tower: VisionTower, change: Any) -> None:
        tower.use_graphs()
        views = tiny_views(5, 32).cuda()
        before = tower(views).patches
        change(tower)
        expected = copy.deepcopy(tower).use_graphs(False)(views).patches
        assert torch.equal(tower(views).patches, expected)
        assert expected.dtype != before.dtype or not torch.equal(before, expected) or change not in (halve, load_new)

    def test_memory_reused_by_others_is_not_the_tower_s(self, tower: VisionTower) -> None:
        """Freed memory is filled between replays: nothing a graph needs may lie there."""
        tower.use_graphs()
        views = tiny_views(5, 32).cuda()
        first = tower(views).patches
        trash = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(64)]
        assert torch.equal(tower(views).patches, first)
        del trash

    def test_other_streams(self, tower: VisionTower) -> None:
        tower.use_graphs()
        views = [tiny_views(5, 32).cuda() * scale for scale in (1.0, -1.0, 0.5, 2.0)]
        expected = [tower(view).patches for view in views]
        streams = [torch.cuda.Stream() for _ in views]
        torch.cuda.synchronize()
        seen = []
        for _ in range(10):
            for stream, view in zip(streams, views, strict=True):
                with torch.cuda.stream(stream):
                    seen.append(tower(view).patches)
        torch.cuda.synchronize()
        assert all(torch.equal(ours, expected[index % 4]) for index, ours in enumerate(seen))

    def test_inductor_agrees(self) -> None:
        tower = tower_named("tiny").cuda().requires_grad_(False)
        views = tower.encoder_inputs(tiny_views(5, 32).cuda())
        compiled, eager = torch.compile(tower.forward, fullgraph=True)(views), tower(views)
        exact = tower_by_modules(copy.deepcopy(tower).double(), EncoderViews(*(view.double() for view in views)))
        assert_close(compiled.patches, eager.patches, exact.patches)
        assert_close(compiled.queries, eager.queries, exact.queries)
