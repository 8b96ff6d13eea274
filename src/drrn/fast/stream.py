"""A folded network applied to an image from top to bottom, in strips without overlap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drrn.fast.folded import Convolution, Folded, Unit, activate
from drrn.fast.precision import tf32

MAPS = 3  # feature maps in memory at the peak: identity, the unit's middle and its output


class Rows:
    """The rows of a feature map that later layers still need; the map is computed from top to bottom."""

    def __init__(self, layout: torch.memory_format) -> None:
        self.layout = layout
        self.first = 0  # the image's row at which `map` begins
        self.map: Tensor | None = None  # [N, C, h, W]
        self.kept: Tensor | None = None  # buffer of the rows that `forget` kept

    def __getitem__(self, rows: slice) -> Tensor:
        """Rows of the image, as a view [N, C, h, W]."""
        return self.map[:, :, rows.start - self.first : rows.stop - self.first]

    def append(self, new: Tensor) -> None:
        """Add rows [N, C, h, W]."""
        self.map = new if self.map is None else torch.cat([self.map, new], dim=2)

    def fill(self, like: Tensor, work: Callable[[Tensor], Any], spoilt: tuple[int, int] = (0, 0)) -> None:
        """Add rows that `work` writes in place, without a copy.

        Args:
            like: a tensor with shape, dtype and device of the new rows, [N, C, h, W].
            work: writes into a tensor [N, C, spoilt[0] + h + spoilt[1], W].
            spoilt: rows above and below the new ones that `work` may overwrite with wrong values.
        """
        n, c, h, w = like.shape
        held = 0 if self.map is None else self.map.shape[2]
        size, kind = (n, c, held + h + spoilt[1], w), {"dtype": like.dtype, "device": like.device}
        joined = torch.empty(size, memory_format=self.layout, **kind)
        work(joined[:, :, held - spoilt[0] :])
        if held:
            joined[:, :, :held] = self.map
        self.map = joined[:, :, : held + h]

    def forget(self, until: int) -> None:
        """Drop the rows above row `until` of the image."""
        rest = self.map[:, :, until - self.first :]
        if self.kept is None or self.kept.shape != rest.shape:
            self.kept = rest.clone(memory_format=self.layout)
        else:  # reuse the memory: glibc before 2.38 does not fill gaps of the heap with aligned blocks
            self.kept.copy_(rest)
        self.map, self.first = self.kept, until


class Stream:
    """A folded network applied to an image from top to bottom: each call takes rows and returns those completed.

    A convolution can compute a row once it has the input row below. So each convolution lags one row behind the
    previous one and keeps the rows that it needs again; per strip only two rows of each unit are computed twice.

    Args:
        folded: the network.
        height: rows of the image. Above its first and below its last row every layer is padded with zeros.
    """

    def __init__(self, folded: Folded, height: int) -> None:
        self.folded, self.height, self.end = folded, height, 0
        make = partial(Rows, folded.layout)
        self.x = make()
        self.inputs = [[make() for _ in range(1 + len(units))] for _, _, units in folded.blocks] + [[make()]]
        self.identities = [[make() for _ in units] for _, _, units in folded.blocks]

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """The image's next rows [N, 1, h, W] → the newly completed rows [N, 1, h', W], h' ≥ 0.

        Raises:
            ValueError: more rows came than the image has.
        """
        folded, rows = self.folded, (self.end, self.end + x.shape[2])  # the newest rows of the current layer
        self.end, nothing = rows[1], x[:, :, :0]
        if self.end > self.height:
            raise ValueError(f"{self.end} rows came of an image of {self.height}")
        with tf32(folded.tf32):
            self.x.append(F.relu(x) if folded.rectified else x.clone())
            self.inputs[0][0].fill(x, lambda out: activate(x, folded.first, out, folded.input_relu))
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
                following[0].fill(H, lambda out, H=H, norm=norm: activate(H, norm, out))
                if folded.rectified:
                    H.relu_()  # from here on used as an identity only
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
        """The rows that `reach` convolutions complete when `rows` are added to their input; none if first = end."""
        first, end = rows
        return max(first - reach, 0), end if end == self.height else max(end - reach, 0)

    def _rows(self, conv: Convolution, a: Rows, first: int, end: int, relu: bool = True) -> Tensor:
        """Rows first … end - 1 of the convolution of `a.map`, which must have row first - 1 (or be the top)."""
        padded = first == 0 or end == self.height
        y = conv(a.map, relu=relu, padded=padded)
        above = first - a.first - (not padded)
        return y[:, :, above : above + end - first]

    def _convolve(
        self, conv: Convolution, a: Rows, rows: tuple[int, int], relu: bool
    ) -> tuple[Tensor, tuple[int, int]]:
        """The rows [N, C', h, W] of a convolution completed by `rows`, the newest of `a`; and their (first, end)."""
        first, end = rows = self._complete(rows, 1)
        y = a.map
        if first < end:
            y = self._rows(conv, a, first, end, relu)
            a.forget(max(end - 1, 0))
        return y, rows

    def _unit(
        self, unit: Unit, a: Rows, identity: Rows, chain: Rows | None, following: Rows, rows: tuple[int, int]
    ) -> tuple[int, int]:
        """Add the unit's rows completed by `rows`, the newest of `a`: ReLU(norm(H^u)) to `following`, H^u to `chain`.

        Returns (first, end) of the rows.
        """
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
        scale = norm[0] if norm and chain is None else None  # s·H⁰ of `Folded`: the norm is folded into conv_b

        def add(out: Tensor) -> None:
            inner = out[:, :, spoilt[0] : spoilt[0] + end - first]
            if scale is None:
                inner.copy_(H)
            else:
                torch.mul(H, scale, out=inner)
            conv_b(q, add=out, relu=chain is None, padded=padded)

        (following if chain is None else chain).fill(H, add, spoilt)
        if chain is not None:
            del q
            H = chain[first:end]
            following.fill(H, lambda out: activate(H, norm, out))
            if self.folded.rectified:
                H.relu_()
        return first, end
