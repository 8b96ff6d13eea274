"""Running a trained network on whole images: any size, in bounded memory, as fast as is simple.

What the speed is made of (CPU, 128 features; `Folded` gives the same output to rounding):

- BatchNorm disappears. Before its ReLU it is an affine map a channel; where the tensor in front of it is needed
  nowhere else it is folded into the convolution that made that tensor, and into the identity added there.
- The sum and the ReLU that follow a convolution run inside it (oneDNN post-ops), while its result is in cache.
  Elsewhere (CUDA, a CPU without oneDNN) they run in place after it.
- Channels last, weights in oneDNN's own order, three feature maps in work at any time.
- An image goes through in strips, and each layer keeps the rows that it needs again (`Stream`): maps small enough
  that memory need not be had from the kernel afresh (`machine.keep_heap`), and no overlap to compute twice.

Further ideas belong into `Convolution` (another kernel) or `Stream` (another order of work); everything above them
divides images.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from drrn.images import orientations
from drrn.model import DRRN

ROOM = 1_000_000_000  # bytes that feature maps may take, when twice as many are free
MAPS = 3  # feature maps alive at the peak of `Stream`: identity, the unit's middle and its output
STRIP_BYTES = 24_000_000  # of one map on a CPU; with a unit's kept rows below 32 MB, where `keep_heap` ends
LOW_STRIP_BYTES = 5_000_000  # the same in tiles that were asked for: who asks for them lacks memory
STRIP_ROWS = 24  # or about so many, where a map of them is larger; two of each unit's 48 are computed twice
TILE_PIXELS = 1 << 24  # of the strip of an image that tiles make up

Affine = tuple[Tensor, Tensor] | None  # scale and shift of every channel; None: there is no BatchNorm


def super_resolve(
    network: DRRN,
    x: NDArray[np.floating],
    tile: int | None = None,
    self_ensemble: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float32]:
    """The network's estimate of an image of any size; in parts when it is large, with the same result.

    Args:
        network: on any device; BatchNorm uses its running statistics whatever mode the network is in.
        x: interpolated luminance [H, W], 0…1.
        tile: side in pixels of what a tile adds to the result; it is computed with `receptive_radius` more
            pixels on every side that is not a border of the image. None: strips as wide as the image, which need
            no such overlap, or large tiles where there is no memory for them or the image is turned.
        self_ensemble: average the results for the 8 orientations of the image; takes 8 times as long.
        progress: called with (parts done, parts in all), first with 0.

    Returns:
        [H, W], not clamped. The division changes it by rounding only (1e-5).

    Raises:
        ValueError: `x` is not [H, W] with at least one pixel, or `tile` is below 1.
    """
    x = np.asarray(x)
    if x.ndim != 2 or x.size == 0:
        raise ValueError(f"x is [H, W] with at least one pixel, not {x.shape}")
    result, top = np.empty(x.shape, np.float32), 0
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
    room: int | None = None,
) -> Iterator[NDArray[np.float32]]:
    """`super_resolve` for an image that is never in memory as a whole.

    Args:
        network, tile, self_ensemble, progress: as in `super_resolve`.
        rows: called with (first, last + 1), gives those rows of the interpolated luminance [rows, W], 0…1, from
            the top. With tiles, neighbouring calls overlap by twice the receptive radius.
        shape: (H, W) of the whole.
        room: bytes that feature maps may take; None: `free_room`.

    Yields:
        Strips [h, W] of the result, from the top.

    Raises:
        ValueError: `tile` is below 1.
    """
    if tile is not None and tile < 1:
        raise ValueError(f"tile = {tile}: a tile has at least 1 pixel")
    room = free_room(network) if room is None else room
    fits = at_once(network, shape, room) or most_rows(network, shape[1], room) >= STRIP_ROWS
    streams = tile is None and not self_ensemble and fits
    folded, progress = Folded(network), progress or (lambda done, total: None)
    if streams:
        yield from _stream(folded, rows, shape, strips(network, shape, room), progress)
        return

    def whole(x: NDArray[np.floating]) -> NDArray[np.float32]:
        parts = strips(network, x.shape, room, LOW_STRIP_BYTES if tile else STRIP_BYTES)
        return np.concatenate(list(_stream(folded, lambda a, b: x[a:b], x.shape, parts, lambda a, b: None)))

    (height, width), radius = shape, network.receptive_radius
    tile_height, tile_width = (tile, tile) if tile else tile_shape(network, shape, room)
    tops, lefts = range(0, height, tile_height), range(0, width, tile_width)
    done, total = 0, len(tops) * len(lefts)
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
            y = ensemble(whole, region) if self_ensemble else whole(region)
            strip[:, left:right] = y[top - above : bottom - above, left - before : right - before]
            done += 1
            progress(done, total)
        yield strip


def _stream(
    folded: Folded,
    rows: Callable[[int, int], NDArray[np.floating]],
    shape: tuple[int, int],
    parts: list[tuple[int, int]],
    progress: Callable[[int, int], None],
) -> Iterator[NDArray[np.float32]]:
    """An image in strips of its whole width, rows (first, end) of it at a time."""
    stream = Stream(folded, shape[0])
    progress(0, len(parts))
    for done, (first, end) in enumerate(parts, start=1):
        x = torch.from_numpy(np.array(rows(first, end), np.float32))
        y = stream(x.to(folded.device, folded.dtype)[None, None])[0, 0].float().cpu().numpy()
        progress(done, len(parts))
        if len(y):
            yield y


def ensemble(whole: Callable[[NDArray], NDArray], x: NDArray[np.floating]) -> NDArray[np.float32]:
    """The mean of `whole` over the 8 orientations, each turned back [h, w] → [h, w]."""
    total = np.zeros(x.shape, np.float64)
    for o, turned in enumerate(orientations(x)):
        y = whole(turned)
        total += np.rot90(np.fliplr(y) if o >= 4 else y, -(o % 4))
    return (total / 8).astype(np.float32)


def free_room(network: DRRN) -> int:
    """Bytes that feature maps may take: half of the memory now free; on a CPU 1 GB at most."""
    device = next(network.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if free < max(2 * ROOM, cached):
            torch.cuda.empty_cache()  # what PyTorch keeps for later; what it keeps for a CUDA graph stays
        return torch.cuda.mem_get_info(device)[0] // 2
    return min(ROOM, available_memory() // 2)


def at_once(network: DRRN, shape: tuple[int, int], room: int) -> bool:
    """Whether an image [H, W] needs no strips."""
    return MAPS * shape[0] * _row_bytes(network, shape[1]) <= room


def _row_bytes(network: DRRN, width: int) -> int:
    """Of a feature map."""
    return width * network.features * next(network.parameters()).element_size()


def most_rows(network: DRRN, width: int, room: int) -> int:
    """Rows that may go through a stream at a time; 0 or less where what the layers keep needs more than `room`."""
    return (room // _row_bytes(network, width) - _kept_rows(network)) // MAPS


def _kept_rows(network: DRRN) -> int:
    """Rows of a map that the layers keep, for each by which they lag: a unit four of its input, and four of an
    identity, two of them beside the new map that they are copied to. And some at the edges of the maps in work.
    """
    return 4 * network.receptive_radius + 4 * MAPS


def strips(network: DRRN, shape: tuple[int, int], room: int, most: int | None = None) -> list[tuple[int, int]]:
    """The rows (first, end) of an image [H, W] that go through a stream together: on a CPU, few enough to be fast.

    A map has at most `most` bytes (None: STRIP_BYTES), or STRIP_ROWS where those are more. The last strip is lower
    than the others, since with it every layer makes up for its lag.
    """
    height, width = shape
    rows, on_cpu = most_rows(network, width, room), next(network.parameters()).device.type == "cpu"
    if at_once(network, shape, room) and not (on_cpu and rows >= STRIP_ROWS):
        return [(0, height)]
    if on_cpu:
        rows = min(rows, (STRIP_BYTES if most is None else most) // _row_bytes(network, width))
    rows = max(rows, STRIP_ROWS)
    if height <= rows:
        return [(0, height)]
    rest = height - max(rows - network.receptive_radius, 1)
    return list(itertools.pairwise([*range(0, rest, _equal(rest, rows)), rest, height]))


def tile_shape(network: DRRN, shape: tuple[int, int], room: int) -> tuple[int, int]:
    """(h, w) of equal tiles of an image [H, W], each streamed within `room`, whichever way it is turned.

    At least twice the receptive radius: a tile computes at most four times what it adds.
    """
    (height, width), radius = shape, network.receptive_radius
    side = room // (_row_bytes(network, 1) * (MAPS * STRIP_ROWS + _kept_rows(network))) - 2 * radius
    least = max(TILE_PIXELS // width, 4 * radius)  # rows that the caller has in memory
    return _equal(height, max(min(side, least), 2 * radius)), _equal(width, max(side, 2 * radius))


def _equal(length: int, most: int) -> int:
    """The size of the fewest equal parts of at most so many."""
    return -(-length // -(-length // most))


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

    def __call__(self, x: Tensor, add: Tensor | None = None, relu: bool = True, padded: bool = True) -> Tensor:
        """x [N, C, H, W] → ReLU(W ∗ x + b + add) [N, C', H, W]; `add` is overwritten by the result.

        Not `padded`, there are no zeros above and below x: [N, C', H - 2, W].
        """
        padding = [int(padded), 1]
        if self.fused:  # the operators that Inductor emits on CPUs; torch's version is pinned
            geometry = (padding, [1, 1], [1, 1], 1)  # padding, stride, dilation, groups
            if add is None:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, self.weight, self.bias, *geometry, "relu" if relu else "none", [], ""
                )
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                add, x, self.weight, self.bias, *geometry, "add", 1.0, "relu" if relu else None, [], ""
            )
        y = F.conv2d(x, self.weight, self.bias, padding=padding)
        y = y if add is None else add.add_(y)
        return y.relu_() if relu else y


class Unit(NamedTuple):
    """A residual unit, folded."""

    conv_a: Convolution  # with norm_b and its ReLU
    conv_b: Convolution  # with `norm` and its ReLU, unless H^u is kept
    norm: Affine  # what H^u passes next
    keep: bool  # H^u itself is needed: DRRN_C


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
                    Unit(
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

    def __call__(self, x: Tensor) -> Tensor:
        """What `network(x)` gives [N, 1, H, W] → [N, 1, H, W]."""
        return Stream(self, x.shape[2])(x)


class Rows:
    """Those rows of a feature map that are needed again, while the map is made from top to bottom."""

    def __init__(self) -> None:
        self.first = 0  # row of the image at which `map` begins
        self.map: Tensor | None = None  # [N, C, h, W]
        self.kept: Tensor | None = None  # what `forget` left

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of the image, as a view [N, C, h, W]."""
        return self.map[:, :, rows.start - self.first : rows.stop - self.first]

    def append(self, new: Tensor) -> None:
        """Add rows [N, C, h, W]."""
        self.map = new if self.map is None else torch.cat([self.map, new], dim=2)

    def fill(self, like: Tensor, work: Callable[[Tensor], Any], spoilt: tuple[int, int] = (0, 0)) -> None:
        """Add rows that are written where they will stand, which spares a copy.

        Args:
            like: a tensor of the size and kind of what is added, [N, C, h, W].
            work: writes it, into [N, C, spoilt[0] + h + spoilt[1], W].
            spoilt: rows above and below that need not be right afterwards.
        """
        n, c, h, w = like.shape
        held = 0 if self.map is None else self.map.shape[2]
        size, kind = (n, c, held + h + spoilt[1], w), {"dtype": like.dtype, "device": like.device}
        joined = torch.empty(size, memory_format=torch.channels_last, **kind)
        work(joined[:, :, held - spoilt[0] :])
        if held:
            joined[:, :, :held] = self.map
        self.map = joined[:, :, : held + h]

    def forget(self, until: int) -> None:
        """Let go of the rows above row `until` of the image."""
        rest = self.map[:, :, until - self.first :]
        if self.kept is None or self.kept.shape != rest.shape:
            self.kept = rest.clone(memory_format=torch.channels_last)
        else:  # again and again into the same memory: glibc before 2.38 does not fill its gaps with aligned blocks
            self.kept.copy_(rest)
        self.map, self.first = self.kept, until


class Stream:
    """A folded network on its way down an image: rows go in, the rows that they complete come out.

    A convolution completes a row once it has the row below. So each lags one row behind the one before it and keeps
    the rows that it needs again: however few go in at a time, nothing is computed twice but two rows a unit.

    Args:
        folded: the network.
        height: rows of the image. Above the first and below the last of them every layer sees zeros.
    """

    def __init__(self, folded: Folded, height: int) -> None:
        self.folded, self.height, self.end = folded, height, 0
        self.x = Rows()
        self.inputs = [[Rows() for _ in range(1 + len(units))] for _, _, units in folded.blocks] + [[Rows()]]
        self.identities = [[Rows() for _ in units] for _, _, units in folded.blocks]

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """The image's next rows [N, 1, h, W] → the rows that are complete now [N, 1, h', W], h' ≥ 0.

        Raises:
            ValueError: there are more rows than the image has.
        """
        folded, rows = self.folded, (self.end, self.end + x.shape[2])  # those of the image that a layer adds
        self.end, nothing = rows[1], x[:, :, :0]
        if self.end > self.height:
            raise ValueError(f"{self.end} rows came of an image of {self.height}")
        with _float32():
            self.x.append(F.relu(x) if folded.rectified else x.clone())
            self.inputs[0][0].fill(x, lambda out: _activate(x, folded.first, out, folded.input_relu))
            for b, (conv, norm, units) in enumerate(folded.blocks):
                a, *following = [*self.inputs[b], self.inputs[b + 1][0]]
                H, rows = self._convolve(conv, a, rows, relu=not units)  # H⁰
                if rows[0] == rows[1]:
                    return nothing
                if not units:
                    following[0].append(H)
                    continue
                identity = self.identities[b][0]
                identity.append(H)
                H = identity[rows[0] : rows[1]]
                following[0].fill(H, lambda out, H=H, norm=norm: _activate(H, norm, out))
                if folded.rectified:
                    H.relu_()  # from here on it is an identity only
                del H
                for u, unit in enumerate(units):
                    chain = self.identities[b][u + 1] if unit.keep else None
                    rows = self._unit(unit, following[u], identity, chain, following[u + 1], rows)
                    if rows[0] == rows[1]:
                        return nothing
                    if chain is not None:
                        identity.forget(rows[1])
                        identity = chain
                identity.forget(rows[1])
            residual, rows = self._convolve(folded.rec, self.inputs[-1][0], rows, relu=False)
            if rows[0] == rows[1]:
                return nothing
            y = residual + self.x[rows[0] : rows[1]]
            self.x.forget(rows[1])
            return y

    def _complete(self, rows: tuple[int, int], reach: int) -> tuple[int, int]:
        """Rows that `reach` convolutions complete with the `rows` that their input adds; first = end: none."""
        first, end = rows
        return max(first - reach, 0), end if end == self.height else max(end - reach, 0)

    def _rows(self, conv: Convolution, a: Rows, first: int, end: int, relu: bool = True) -> Tensor:
        """Rows first … end - 1 of a convolution of all that `a` holds, from row first - 1 on."""
        padded = first == 0 or end == self.height
        y = conv(a.map, relu=relu, padded=padded)
        above = first - a.first - (not padded)
        return y[:, :, above : above + end - first]

    def _convolve(
        self, conv: Convolution, a: Rows, rows: tuple[int, int], relu: bool
    ) -> tuple[Tensor, tuple[int, int]]:
        """The rows [N, C', h, W] of a convolution that `rows`, the newest of `a`, complete; and which they are."""
        first, end = rows = self._complete(rows, 1)
        y = a.map
        if first < end:
            y = self._rows(conv, a, first, end, relu)
            a.forget(max(end - 1, 0))
        return y, rows

    def _unit(
        self, unit: Unit, a: Rows, identity: Rows, chain: Rows | None, following: Rows, rows: tuple[int, int]
    ) -> tuple[int, int]:
        """Add the rows that `rows`, the newest of `a`, complete: of ReLU(norm(H^u)), and of H^u to a `chain`."""
        conv_a, conv_b, norm, _ = unit
        first, end = self._complete(rows, 2)
        if first == end:
            return first, end
        above, below = int(first > 0), int(end < self.height)
        q = self._rows(conv_a, a, first - above, end + below)
        a.forget(max(end - 2, 0))
        padded = not (above and below)
        spoilt = (above, below) if padded else (0, 0)
        H = identity[first:end]

        def add(out: Tensor, scale: Tensor | None, relu: bool) -> None:
            inner = out[:, :, spoilt[0] : spoilt[0] + end - first]
            if scale is None:
                inner.copy_(H)
            else:
                torch.mul(H, scale, out=inner)
            conv_b(q, add=out, relu=relu, padded=padded)

        if chain is None:  # the identity, scaled as the norm after it does
            following.fill(H, lambda out: add(out, norm and norm[0], True), spoilt)
        else:
            chain.fill(H, lambda out: add(out, None, False), spoilt)
            del q
            H = chain[first:end]
            following.fill(H, lambda out: _activate(H, norm, out))
            if self.folded.rectified:
                H.relu_()
        return first, end


@contextmanager
def _float32() -> Iterator[None]:
    """Without TF32, which is off by 1e-3, and without trying cuDNN's algorithms for every height of a strip."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = cudnn.benchmark = False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark = before


def _activate(H: Tensor, norm: Affine, out: Tensor, relu: bool = True) -> Tensor:
    """ReLU(norm(H)) into `out`."""
    if norm is not None:
        H = torch.mul(H, norm[0], out=out).add_(norm[1])
    return torch.clamp_min(H, 0, out=out) if relu else out.copy_(H)
