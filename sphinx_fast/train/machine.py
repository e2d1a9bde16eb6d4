"""The processes and devices of a run, and how a learner is laid over them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sphinx_fast.infer.loading import parse_dtype
from sphinx_fast.train.learner import Learner
from sphinx_fast.train.settings import Settings


@dataclass
class Machine:
    """One process's place in the run.

    rank, world  of torchrun; 0 and 1 without it
    dtype        of the computation
    shard        FSDP2: parameters, moments and gradients lie in parts over the processes. Otherwise every process
                 holds all and gradients are summed.
    """

    device: torch.device
    rank: int
    world: int
    dtype: torch.dtype
    shard: bool

    @classmethod
    def of(cls, settings: Settings) -> Machine:
        """What torchrun's environment and the settings say. Joins the process group where there is one.

        Raises:
            ValueError: a device that is not there, or settings that do not fit the number of processes.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        name = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device: no CUDA GPU is available; `sphinx-fast doctor` says more")
        if device.type == "cuda":
            device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        scale = settings.scale
        fast = torch.float32 if device.type == "cpu" else torch.bfloat16
        dtype = fast if scale.dtype == "auto" else parse_dtype(scale.dtype)
        # One GPU runs sharded over itself: that is where bf16 computation over fp32 weights comes from.
        shard = settings.lora is None and scale.shard and (world > 1 or dtype != torch.float32)
        if dtype != torch.float32 and not shard and settings.lora is None:
            raise ValueError("scale.shard: computing in another dtype than float32 needs it")
        if (world > 1 or shard) and not distributed.is_initialized():
            backend = "gloo" if device.type == "cpu" else "nccl"
            store = None if world > 1 else distributed.HashStore()
            distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
        return cls(device, rank, world, dtype, shard)

    @property
    def first(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def lay_out(self, learner: Learner, *, compiled: bool) -> None:
        """Compile blocks and shard the learner, in place."""
        blocks = list(getattr(learner.language_model, "layers", None) or learner.language_model.h)  # GPT-2's name
        if compiled:
            for block in blocks:
                block.compile(dynamic=True)  # rows differ in length
        if not self.shard:
            return
        mesh = init_device_mesh(self.device.type, (self.world,))
        half = None if self.dtype == torch.float32 else self.dtype
        for block in blocks:
            block.float()
            fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32))
        learner.float()
        # The learner's own arguments hold fp32 coefficients of the loss: they are not cast.
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(learner, mesh=mesh, mp_policy=policy)

    @property
    def gradient_scale(self) -> float:
        """What a loss is multiplied with so that gradients of all processes add up: FSDP takes their mean."""
        return float(self.world) if self.shard else 1.0

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gradients over all processes, where FSDP has not done it."""
        if self.shard or self.world == 1:
            return
        learning = list(parameters)
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in learning])
        distributed.all_reduce(flat)  # one message
        for parameter, part in zip(learning, flat.split([p.numel() for p in learning]), strict=True):
            parameter.grad = part.view_as(parameter)

    def summed(self, tensor: Tensor) -> Tensor:
        """A small tensor summed over all processes."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def gathered(self, value: Any) -> list[Any]:
        """A small object of every process, in order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values
