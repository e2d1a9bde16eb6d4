"""A linear layer of a language model of 7B, quantised as `--quantize` does it, beside the same layer as it is.

    python bench/bench_quantize.py [--save]

4,096 x 4,096, one row (a step of one question) and 64. Needs torchao. The percentage is of the rate at which two
buffers are read; to be read are the weights as they are stored.
"""

from __future__ import annotations

import copy

import torch
from common import Line, arguments, median_seconds, read_ceiling, save
from torch import nn

from sphinx_fast.weights.quantize import stored_bytes, torchao_config

WIDTH = 4096


def layers(dtype: torch.dtype, device: str) -> dict[str, nn.Module]:
    """The layer as it is, and by each method that runs there."""
    from torchao.quantization import quantize_

    torch.manual_seed(0)
    found: dict[str, nn.Module] = {"plain": nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).to(device, dtype)}
    for method in ("int8", "int4"):
        found[method] = copy.deepcopy(found["plain"])
        quantize_(found[method], torchao_config(method, device))
    return found


@torch.inference_mode()
def main() -> None:
    chosen = arguments(__doc__ or "")
    ceiling = read_ceiling(chosen.device)
    lines: list[Line] = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for rows in (1, 64):
            found = layers(dtype, chosen.device)
            x = torch.randn(rows, WIDTH, device=chosen.device).to(dtype)
            calls = {method: (lambda layer=layer, x=x: layer(x)) for method, layer in found.items()}
            seconds = median_seconds(calls, chosen.device, chosen.seconds)
            for method, layer in found.items():
                rate = sum(map(stored_bytes, layer.parameters())) / seconds[method] / 1e9
                line = Line("quantize", f"{method} {name}, {rows} rows", seconds[method] * 1e3, rate, 0.0)
                line.percent_of_ceiling, line.ceiling = 100 * rate / ceiling, "reads"
                line.ratio_to = {"plain": seconds["plain"] / seconds[method]}
                print(line, flush=True)
                lines.append(line)
    save(lines, chosen)


if __name__ == "__main__":
    main()
