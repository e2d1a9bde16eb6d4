"""The room views: pictures -> normalised views, beside what others run for it.

    python bench/bench_views.py [--device cuda] [--threads 2] [--save]

Peers: `pillow`, the Pillow and torch pipeline of the released model (bit-equal to ours), and `torch u8`, torch's
antialiased uint8 resize with the same padding, normalisation and cut (not bit-equal). With --device cuda ours reads
pictures that are on the device already; the peers work on the host and move their views there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Line, arguments, copy_ceiling, measure, save
from torch import Tensor

from sphinx_fast.image.views import CLIP_MEAN, CLIP_STD, PAD_COLOUR, num_views, pad_offsets, reference_views
from sphinx_fast.ops import views

SHAPES = [  # pictures, height, width, picture_size, view_size
    (1, 300, 451, 224, 224),
    (1, 480, 640, 448, 224),
    (1, 1080, 1920, 448, 224),
    (1, 1080, 1920, 672, 224),
    (8, 480, 640, 448, 224),
]


def torch_views(picture: Tensor, picture_size: int, view_size: int) -> Tensor:
    height, width = picture.shape[:2]
    side, left, top = pad_offsets(width, height)
    square = torch.tensor(PAD_COLOUR, dtype=torch.uint8, device=picture.device).view(3, 1, 1).repeat(1, side, side)
    square[:, top : top + height, left : left + width] = picture.permute(2, 0, 1)
    canvas = F.interpolate(square[None], (picture_size, picture_size), mode="bicubic", antialias=True)[0]
    mean, std = (torch.tensor(v, device=picture.device).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pixels = canvas.float().div_(255).sub_(mean).div_(std)
    ratio = picture_size // view_size
    if ratio == 1:
        return pixels[None]
    overview = F.interpolate(pixels[None].half(), (view_size, view_size), mode="bicubic").float()
    crops = pixels.view(3, ratio, view_size, ratio, view_size).permute(1, 3, 0, 2, 4)
    return torch.cat([overview, crops.reshape(-1, 3, view_size, view_size)])


def main() -> None:
    chosen = arguments(__doc__ or "")
    ceiling = copy_ceiling(chosen.device)
    print(f"copy: {ceiling:.1f} GB/s, {torch.get_num_threads()} threads")
    lines: list[Line] = []
    for count, height, width, picture_size, view_size in SHAPES:
        host = [torch.randint(0, 256, (height, width, 3), dtype=torch.uint8) for _ in range(count)]
        pictures = [picture.to(chosen.device) for picture in host]
        images = count * num_views(picture_size, view_size)
        out = torch.empty(images, 3, view_size, view_size, device=chosen.device)

        def ours(pictures=pictures, out=out, picture_size=picture_size, view_size=view_size):  # type: ignore[no-untyped-def]
            return views(pictures, picture_size=picture_size, view_size=view_size, out=out)

        def pillow(host=host, picture_size=picture_size, view_size=view_size):  # type: ignore[no-untyped-def]
            return [reference_views(p.numpy(), picture_size, view_size).to(chosen.device) for p in host]

        def torch_u8(host=host, picture_size=picture_size, view_size=view_size):  # type: ignore[no-untyped-def]
            return [torch_views(p, picture_size, view_size).to(chosen.device) for p in host]

        moved = sum(picture.numel() for picture in pictures) + out.numel() * out.element_size()
        shape = f"{count} x {height}x{width} -> {images} x {view_size}"
        lines.append(measure("views", shape, ours, {"pillow": pillow, "torch u8": torch_u8}, moved, ceiling, chosen))
    save(lines, chosen)


if __name__ == "__main__":
    main()
