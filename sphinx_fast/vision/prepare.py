"""Reading the encoders' weights out of their modules, and laying side by side what one product can use at once.

No second copy is made and nothing is kept: every call reads the modules' own parameters, so weights that were changed,
loaded again or moved are seen. All that ever changes is where parameters lie: those of q, k and v become three slices
of one storage, under their old names and shapes, and one GEMM takes all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation

from sphinx_fast.vision.layers import Activation, Linear, Norm, gelu_


class NotPlainError(Exception):
    """The modules hold something that the functions of `frozen` do not know: let the modules run themselves."""


def child(module: nn.Module, *names: str) -> Any:
    """The submodule of the first name that exists, in the ways transformers' versions call it; checked by `plain`."""
    for name in names:
        found = getattr(module, name, None)
        if found is not None:
            return plain(found)
    raise NotPlainError(f"{type(module).__name__} has no {' or '.join(names)}")


def plain(module: nn.Module) -> Any:
    """`module`, if a call of it does what its class says and no more.

    Hooks, a replaced forward (accelerate's offloading) and foreign classes (adapters, quantised layers) do more.
    """
    home = type(module).__module__
    if not home.startswith(("torch.nn.modules.", "transformers.", "sphinx_fast.")):
        raise NotPlainError(f"{home}.{type(module).__name__}")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        raise NotPlainError(f"{type(module).__name__} has hooks")
    return module


def linear(module: nn.Module, *names: str) -> Linear:
    """The weights of a submodule that is exactly nn.Linear."""
    found = child(module, *names)
    if type(found) is not nn.Linear:
        raise NotPlainError(type(found).__name__)
    return Linear(found.weight, found.bias)


def norm(module: nn.Module, *names: str) -> Norm:
    """The weights of a submodule that is nn.LayerNorm."""
    found = child(module, *names)
    if not isinstance(found, nn.LayerNorm) or found.bias is None or found.weight is None:
        raise NotPlainError(type(found).__name__)
    return Norm(found.weight, found.bias, found.eps)


def activation(module: nn.Module, *names: str) -> Activation:
    """What an activation module computes: over its argument for the common one."""
    found = child(module, *names)
    exact = isinstance(found, nn.GELU) and found.approximate == "none"
    exact = exact or (type(found) is GELUActivation and found.act is F.gelu)
    return gelu_ if exact else found


def beside(*parts: Linear) -> tuple[Linear, ...]:
    """Layers with one input as one layer whose outputs follow each other; unchanged where they cannot be joined.

    Parameters that do not lie side by side yet are moved, once, if nobody else can hold their memory.
    """
    # Addresses are unknown while a graph is traced. The compiler gets the layers as they are.
    if torch.compiler.is_compiling():
        return parts
    weight = _joined([part.weight for part in parts])
    if weight is None:
        return parts
    if all(part.bias is None for part in parts):
        return (Linear(weight, None),)
    bias = None if any(part.bias is None for part in parts) else _joined([part.bias for part in parts])  # type: ignore[misc]
    return parts if bias is None else (Linear(weight, bias),)


def _joined(parts: list[Tensor]) -> Tensor | None:
    """[a, K], [b, K] ... -> [a + b + ..., K] over the same memory; None where that cannot be."""
    joined = _side_by_side(parts)
    if joined is None and _lay(parts):
        joined = _side_by_side(parts)
    return joined


def _side_by_side(parts: list[Tensor]) -> Tensor | None:
    """A view over parts that follow each other in one storage, else None."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        if part.data_ptr() != end or part.dtype != first.dtype or part.shape[1:] != first.shape[1:]:
            return None
        if not part.is_contiguous():
            return None
        end += part.nbytes
    storage = first.untyped_storage()
    if not first.numel() or end > storage.data_ptr() + storage.nbytes():
        return None
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride())


def _lay(parts: list[Tensor]) -> bool:
    """Move parameters into one storage. False, and nothing is moved, unless each is a plain one with its own memory.

    A parameter that is a view belongs to somebody's flat buffer, shared memory to other processes, other types to
    whoever made them: those stay where they are.
    """
    first = parts[0]
    for part in parts:
        own = type(part) is nn.Parameter and part.untyped_storage().nbytes() == part.nbytes and not part.is_shared()
        like = part.dtype == first.dtype and part.device == first.device and part.shape[1:] == first.shape[1:]
        if not own or not like or not part.is_contiguous() or part.is_inference() or part.device.type == "meta":
            return False
    with torch.inference_mode(False), torch.no_grad():
        together = torch.cat([part.detach() for part in parts])
        for part, slot in zip(parts, together.split([part.shape[0] for part in parts]), strict=True):
            part.data = slot
    return True
