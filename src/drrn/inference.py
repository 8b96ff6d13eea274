"""Running a trained network on whole images: any size, in bounded memory, as fast as is simple.

What the speed is made of (CPU, 128 features; `Folded` gives the same output to rounding):

- BatchNorm disappears. Before its ReLU it is an affine map a channel; where the tensor in front of it is needed
  nowhere else it is folded into the convolution that made that tensor, and into the identity added there.
- The sum and the ReLU that follow a convolution run inside it (oneDNN post-ops), while its result is in cache.
  Elsewhere (CUDA, a CPU without oneDNN) they run in place after it.
- Channels last, weights in oneDNN's own order, three feature maps alive at any time.

Further ideas belong into `Convolution` (another kernel) or `Folded` (another order of work); everything below
them is about tiles.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.images import orientations
from drrn.model import DRRN

# Bytes that the feature maps of one tile may take, when so much is there. Larger tiles waste less on their
# overlap: B1U25 at 128 features computes 30 % more than it keeps with 1 GB, 52 % more with 0.5 GB.
TILE_BYTES = 1_000_000_000
TILE_PIXELS = 1 << 22  # for narrow networks; a larger tile saves nothing more, and strips of the image grow with it
# Feature maps alive at the peak of `Folded`: identity, the unit's middle and its output.
MAPS = 3

Affine = tuple[Tensor, Tensor] | None  # scale and shift of every channel; None: there is no BatchNorm


def super_resolve(
    network: DRRN,
    x: NDArray[np.floating],
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """The network's estimate of an image of any size; in tiles when it is large, with the same result.

    Args:
        network: on any device; BatchNorm uses its running statistics whatever mode the network is in.
        x: interpolated luminance [H, W], 0…1.
        tile: side in pixels of what a tile adds to the result; it is computed with `receptive_radius` more
            pixels on every side that is not a border of the image. None: by the memory available.
        self_ensemble: average the results for the 8 orientations of the image; takes 8 times as long.
        progress: called with (tiles done, tiles in all), first with 0.

    Returns:
        [H, W], not clamped. Tiles change it by rounding only (1e-5).

    Raises:
        ValueError: `x` is not [H, W] with at least one pixel, or `tile` is below 1.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x is [H, W] with at least one pixel, not {x.shape}")
    result = np.empty(x.shape, np.float32)
    top = 0
    for strip in super_resolve_strips(network, lambda a, b: x[a:b], x.shape, tile, self_ensemble, progress):
        result[top : top + len(strip)] = strip
        top += len(strip)
    return result


def super_resolve_strips(
    network: DRRN,
    rows: Callable[[int, int], NDArray[np.floating]],
    shape: tuple[int, int],
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[NDArray[np.float32]]:
    """`super_resolve` for an image that is never in memory as a whole.

    Args:
        network, tile, self_ensemble, progress: as in `super_resolve`.
        rows: called with (first, last + 1), gives those rows of the interpolated luminance [rows, W], 0…1.
            Neighbouring calls overlap by twice the receptive radius.
        shape: (H, W) of the whole.

    Yields:
        Strips [h, W] of the result, from the top.

    Raises:
        ValueError: `tile` is below 1.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile = {tile}: a tile has at least 1 pixel")
    folded, radius = Folded(network), network.receptive_radius
    height, width = shape
    if tile is None:
        tile_height, tile_width = tile_shape(shape, radius, tile_pixels(network))
    else:
        tile_height, tile_width = tile, tile
    tops, lefts = range(0, height, tile_height), range(0, width, tile_width)
    done, total = 0, len(tops) * len(lefts)
    if progress:
        progress(done, total)
    for top in tops:
        bottom = min(top + tile_height, height)
        above, below = max(top - radius, 0), min(bottom + radius, height)
        x = np.asarray(rows(above, below), dtype=np.float32)
        strip = np.empty((bottom - top, width), np.float32)
        for left in lefts:
            right = min(left + tile_width, width)
            before, after = max(left - radius, 0), min(right + radius, width)
            region = x[:, before:after]
            y = _ensemble(folded, region) if self_ensemble else _run(folded, region)
            strip[:, left:right] = y[top - above : bottom - above, left - before : right - before]
            done += 1
            if progress:
                progress(done, total)
        yield strip


def _run(folded: Folded, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """[h, w] → [h, w], as one tile."""
    tensor = torch.from_numpy(np.ascontiguousarray(x)).to(folded.device, folded.dtype)
    return folded(tensor[None, None])[0, 0].float().cpu().numpy()


def _ensemble(folded: Folded, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The mean over the 8 orientations, each turned back [h, w] → [h, w]."""
    total = np.zeros(x.shape, np.float64)
    for o, turned in enumerate(orientations(x)):
        y = _run(folded, turned)
        total += np.rot90(np.fliplr(y) if o >= 4 else y, -(o % 4))
    return (total / 8).astype(np.float32)


def tile_pixels(network: DRRN) -> int:
    """Pixels of a tile, overlap included: its feature maps fit half of the memory now free, 1 GB at most.

    Never so few that the overlap quadruples the work (B1U25: 64 MB).
    """
    parameter = next(network.parameters())
    if parameter.device.type == "cuda":
        room = torch.cuda.mem_get_info(parameter.device)[0] / 2
    else:
        room = min(TILE_BYTES, available_memory() / 2)
    most = int(room / (MAPS * network.features * parameter.element_size()))
    return max(min(most, TILE_PIXELS), (4 * network.receptive_radius) ** 2)


def tile_shape(shape: tuple[int, int], radius: int, pixels: int) -> tuple[int, int]:
    """The division of an image into equal tiles that computes the fewest pixels.

    Args:
        shape: (H, W) of the image.
        radius: pixels of overlap on every inner side.
        pixels: at most so many a tile, overlap included; where not even one row of a tile fits, tiles of
            about twice the radius.

    Returns:
        (h, w) of what one tile adds to the result.
    """
    height, width = shape
    best, cost = (min(2 * radius, height), min(2 * radius, width)), math.inf
    for n in range(1, height + 1):  # strips
        tile_height = -(-height // n)
        room = pixels // min(height, tile_height + 2 * radius)  # how wide a tile may be, overlap included
        if room >= width:
            m = 1
        elif room > 2 * radius:
            m = -(-width // (room - 2 * radius))
        else:
            continue
        work = (height + 2 * radius * (n - 1)) * (width + 2 * radius * (m - 1))
        if work < cost:
            best, cost = (tile_height, -(-width // m)), work
        if m == 1 or tile_height <= radius:  # ever lower strips only compute more
            break
    return best


def available_memory() -> int:
    """Bytes of memory that can still be had: of the machine, or of the control group if that allows less."""
    sizes = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    except (OSError, StopIteration, ValueError):  # not Linux
        try:
            sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
        except (AttributeError, OSError, ValueError):  # Windows
            sizes.append(4 * 1024**3)
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        sizes.append(max(0, limit - used))
    except (OSError, ValueError):  # no such group, or "max": no limit
        pass
    return min(sizes)


# ---------------------------------------------------------------------- the network, folded


def affine(norm: nn.Module) -> Affine:
    """BatchNorm in evaluation mode as scale and shift of every channel, float64 [C]; None for no norm."""
    if not isinstance(norm, nn.BatchNorm2d):
        return None
    values = norm.running_mean, norm.running_var, norm.weight, norm.bias
    mean, var, weight, bias = (value.detach().cpu().double() for value in values)
    scale = weight / torch.sqrt(var + norm.eps)
    return scale, bias - mean * scale


class Convolution:
    """A 3×3 convolution, the affine map of a BatchNorm after it, a sum and a ReLU, as one step.

    Args:
        conv: weights and bias; copied.
        after: affine map of every output channel, folded into them.
    """

    def __init__(self, conv: nn.Conv2d, after: Affine) -> None:
        weight, bias = conv.weight, conv.bias
        if after is not None:
            scale, shift = after
            weight = weight.cpu().double() * scale[:, None, None, None]
            bias = shift if bias is None else bias.cpu().double() * scale + shift
        self.bias = None if bias is None else bias.to(conv.weight)
        self.weight = weight.to(conv.weight).contiguous(memory_format=torch.channels_last)
        self.fused = (
            self.weight.device.type == "cpu"
            and self.weight.dtype == torch.float32
            and torch.backends.mkldnn.is_available()
            and torch.backends.mkldnn.enabled
        )
        if self.fused:
            size = [1, self.weight.shape[1], 256, 256]  # a typical tile; only the order of the weights follows it
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, [1, 1], [1, 1], [1, 1], 1, size)

    def __call__(self, x: Tensor, add: Tensor | None = None, relu: bool = True) -> Tensor:
        """x [N, C, H, W] → ReLU(W ∗ x + b + add) [N, C', H, W]; `add` is overwritten by the result."""
        if self.fused:  # the operators that Inductor emits on CPUs; torch's version is pinned
            geometry = ([1, 1], [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
            if add is None:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, self.weight, self.bias, *geometry, "relu" if relu else "none", [], ""
                )
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                add, x, self.weight, self.bias, *geometry, "add", 1.0, "relu" if relu else None, [], ""
            )
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        y = y if add is None else add.add_(y)
        return y.relu_() if relu else y


class Folded:
    """A copy of a network for inference: Eq. 4–9 with every BatchNorm folded and every ReLU fused.

    Between two convolutions stands ReLU(norm(H)). In the multi-path structure H^u itself is needed by nobody
    else (Eq. 5 adds H⁰), so with norm(H) = s·H + t

        ReLU(norm(H^u)) = ReLU((s·W_b) ∗ q + (s·b + t) + s·H⁰),

    one convolution with a sum and a ReLU. In DRRN_C H^u is the next unit's identity and stays.
    """

    @torch.inference_mode()
    def __init__(self, network: DRRN) -> None:
        parameter = next(network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        packed: dict[nn.Conv2d, Convolution] = {}

        def convolution(conv: nn.Conv2d, after: Affine) -> Convolution:
            if after is not None:
                return Convolution(conv, after)
            if conv not in packed:  # shared by all units when no BatchNorm tells them apart
                packed[conv] = Convolution(conv, None)
            return packed[conv]

        blocks = list(network.blocks)
        self.rectified, self.input_relu = network.rectified_identity, blocks[0].input_relu
        self.first = self._channels(affine(blocks[0].norm))
        self.blocks = []
        for b, block in enumerate(blocks):
            following = affine(blocks[b + 1].norm if b + 1 < len(blocks) else network.norm_rec)
            norms = [affine(norm) for norm in block.norm_a] + [following]  # norms[u] is applied to H^u
            units = []
            for u in range(block.U):
                w = 0 if block.weight_sharing else u
                keep = not block.multi_path and u + 1 < block.U  # H^{u+1} itself is needed
                units.append(
                    (
                        convolution(block.conv_a[w], affine(block.norm_b[u])),
                        convolution(block.conv_b[w], None if keep else norms[u + 1]),
                        self._channels(norms[u + 1]),
                        keep,
                    )
                )
            conv = convolution(block.conv, None if units else following)
            self.blocks.append((conv, self._channels(norms[0]), units))
        self.rec = convolution(network.conv_rec, None)

    def _channels(self, values: Affine) -> Affine:
        """Scale and shift [C] → [1, C, 1, 1] as the feature maps are."""
        return values and tuple(v.to(self.device, self.dtype)[None, :, None, None] for v in values)

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """What `network(x)` gives [N, 1, H, W] → [N, 1, H, W]."""
        with torch.backends.cudnn.flags(allow_tf32=False):  # TF32 is off by 1e-3
            a = _norm(x, self.first)  # [N, 1, H, W]
            a = F.relu(a) if self.input_relu else a
            for conv, norm, units in self.blocks:
                if not units:
                    a = conv(a)
                    continue
                H = conv(a, relu=False).contiguous(memory_format=torch.channels_last)  # H⁰
                a = F.relu_(_norm(H, norm)) if norm else F.relu(H)
                if self.rectified:
                    H.relu_()  # from here on H is an identity only
                for conv_a, conv_b, following, keep in units:
                    q = conv_a(a)  # norm_b and ReLU are in it
                    if keep:
                        H = conv_b(q, add=H, relu=False)
                        a = torch.clamp_min(_norm(H, following, out=a), 0, out=a)
                        if self.rectified:
                            H.relu_()
                    else:  # the identity, scaled as the norm after it does, into the memory of a
                        a = a.copy_(H) if following is None else torch.mul(H, following[0], out=a)
                        a = conv_b(q, add=a)
                    del q
            return self.rec(a, relu=False) + (F.relu(x) if self.rectified else x)


def _norm(H: Tensor, norm: Affine, out: Tensor | None = None) -> Tensor:
    """norm(H) in new memory or in `out`; H itself where there is no norm."""
    return H if norm is None else torch.mul(H, norm[0], out=out).add_(norm[1])
