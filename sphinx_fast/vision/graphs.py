"""CUDA graphs of the tower: one launch for all four encoders instead of about 1,700, and they run side by side.

A graph is recorded for a bucket of views: the views of a picture (1, 5 or 10) times the pictures rounded up to a power
of two. Views are copied into the bucket's inputs, the rest of the bucket computes something nobody reads (a view never
sees another one), and the features are copied out: what a call returned stays as it is. More pictures than the largest
bucket holds go through it in turns.

A graph reads weights where they lay when it was recorded. Values may change in place; weights that moved, a replaced
module or a new hook are noticed before every replay (`Fingerprint`), and all graphs are recorded again.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sphinx_fast.ops import EncoderViews

if TYPE_CHECKING:
    from sphinx_fast.vision.tower import Branch, VisionFeatures, VisionTower

Replay = Callable[[], None]
MAX_PICTURES = 32


def bucket_of(views: int, views_per_picture: int) -> int:
    """Views rounded up to whole pictures, and those to a power of two."""
    pictures = max(1, -(-views // views_per_picture))
    return views_per_picture * (1 << (pictures - 1).bit_length())


def turns_of(views: int, views_per_picture: int, max_pictures: int = MAX_PICTURES) -> list[slice]:
    """Views cut into turns of at most `max_pictures` pictures."""
    limit = views_per_picture * max_pictures
    return [slice(start, min(start + limit, views)) for start in range(0, views, limit)]


class Fingerprint:
    """What a recording relies on: every parameter in its place, every module itself, and no hook that was not there.

    Looked at before every replay, so it keeps the modules' own dictionaries and goes through them in C: a seventh of
    the time that `parameters()` takes.
    """

    def __init__(self, root: nn.Module) -> None:
        modules = list(root.modules())
        self.places = [(m._parameters, name) for m in modules for name in m._parameters]
        self.places += [(m._modules, name) for m in modules for name in m._modules]  # type: ignore[misc]
        self.hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self.things = [place[name] for place, name in self.places]
        self.parameters = [thing for thing in self.things if isinstance(thing, Tensor)]
        self.noted = self._look(root)

    def holds(self, root: nn.Module) -> bool:
        """Whether all of it is still so."""
        now = starmap(dict.get, self.places)
        return all(map(operator.is_, now, self.things)) and self._look(root) == self.noted

    def _look(self, root: nn.Module) -> tuple[list[int], int, list[Any]]:
        return list(map(Tensor.data_ptr, self.parameters)), sum(map(len, self.hooks)), self._attention(root)

    @staticmethod
    def _attention(root: nn.Module) -> list[Any]:
        parts: list[Any] = [*root.children(), *(inner for part in root.children() for inner in part.children())]
        return [part.config._attn_implementation for part in parts if hasattr(part, "config")]


class Recorder(Protocol):
    """Turns calls without order among them into one that repeats them."""

    def __call__(self, branches: Sequence[Branch]) -> Replay:
        """Run the branches to warm up, record them, return the replay."""


class EagerRecorder:
    """Repeats the calls as they are. Stands in for CudaRecorder where there is no GPU, with the same fixed buffers."""

    def __call__(self, branches: Sequence[Branch]) -> Replay:
        def replay() -> None:
            for branch in branches:
                branch()

        replay()
        return replay


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool: they are replayed one after another, never at once."""

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, branches: Sequence[Branch]) -> Replay:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        main, *others = (torch.cuda.Stream() for _ in branches)

        def side_by_side() -> None:
            for stream, branch in zip(others, branches[1:], strict=True):
                stream.wait_stream(main)
                with torch.cuda.stream(stream):
                    branch()
            branches[0]()
            for stream in others:
                main.wait_stream(stream)

        # Libraries choose algorithms and take their workspaces in the first calls, which must not be recorded.
        main.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(main):
            for _ in range(2):
                side_by_side()
        torch.cuda.current_stream().wait_stream(main)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=main, capture_error_mode="thread_local"):
            side_by_side()
        return graph.replay


class Recording(NamedTuple):
    """A bucket's graph and the memory it reads and writes."""

    inputs: EncoderViews
    outputs: VisionFeatures
    replay: Replay


class TowerGraphs:
    """The graphs of one tower, recorded when first needed.

    Calls from several threads or streams wait for each other: the buckets' memory is one. A copy starts without any.

    Args:
        max_pictures: a power of two; the largest bucket. Its inputs, features and activations stay allocated.
        recorder: what makes recordings; `EagerRecorder` for machines without a GPU.
    """

    def __init__(self, max_pictures: int = MAX_PICTURES, recorder: Callable[[], Recorder] = CudaRecorder) -> None:
        if max_pictures < 1 or max_pictures & (max_pictures - 1):
            raise ValueError(f"max_pictures: expected a power of two, got {max_pictures}")
        self.max_pictures, self.recorder = max_pictures, recorder
        self._lock = threading.RLock()
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.max_pictures, self.recorder)

    def clear(self) -> None:
        """Forget all recordings and free their memory."""
        with self._lock:
            self.recordings: dict[int, Recording] = {}
            self._record = self.recorder()
            self._fingerprint: Fingerprint | None = None
            self._done: Any = None

    def __call__(self, tower: VisionTower, views: EncoderViews) -> VisionFeatures:
        """What `tower` makes of `views`, its `encoder_inputs`, without gradients. The features are the caller's own."""
        # Memory that is written in many calls must not be made in inference mode, which is the caller's to leave.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._fingerprint is None or not self._fingerprint.holds(tower):
                self.clear()
            count, per_picture = len(views.clip), tower.config.num_views
            features = tower.empty_features(count, views.clip.device)
            if not self.recordings and any(p.device != views.clip.device for p in tower.parameters()):
                for branch in tower.branches(views, features):  # spread over devices, or loaded on use
                    branch()
                return features
            for turn in turns_of(count, per_picture, self.max_pictures):
                part = EncoderViews(*(view[turn] for view in views))
                recording = self._recording(tower, part, bucket_of(len(part.clip), per_picture))
                self._wait()
                for static, view, read in zip(recording.inputs, part, tower.reads(), strict=True):
                    if read:
                        static[: len(view)].copy_(view)
                recording.replay()
                for own, static in zip(_tensors(features), _tensors(recording.outputs), strict=True):
                    own[turn].copy_(static[: len(part.clip)])
                self._finish(views)
            return features

    def _recording(self, tower: VisionTower, views: EncoderViews, bucket: int) -> Recording:
        if bucket not in self.recordings:
            inputs = EncoderViews(
                *(
                    view.new_zeros(bucket if read else 0, *view.shape[1:])
                    for view, read in zip(views, tower.reads(), strict=True)
                )
            )
            outputs = tower.empty_features(bucket, views.clip.device)
            self._wait()
            replay = self._record(tower.branches(inputs, outputs))
            self.recordings[bucket] = Recording(inputs, outputs, replay)
            if self._fingerprint is None:  # now, since the first run lays weights side by side
                self._fingerprint = Fingerprint(tower)
        return self.recordings[bucket]

    def _wait(self) -> None:
        """The current stream waits until the last call's copies are out."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def _finish(self, views: EncoderViews) -> None:
        if views.clip.is_cuda:
            self._done = torch.cuda.current_stream().record_event()


def _tensors(features: VisionFeatures) -> list[Tensor]:
    return [*features.parts, *([features.queries] if features.queries is not None else [])]
