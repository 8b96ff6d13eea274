"""A folded network on its way down an image, in strips without overlap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from drrn.fast.folded import Convolution, Folded, Unit, activate
from drrn.fast.precision import tf32

MAPS = 3  # feature maps alive at its peak: identity, the unit's middle and its output


class Rows:
    """Those rows of a feature map that are needed again, while the map is made from top to bottom."""

    def __init__(self, layout: torch.memory_format) -> None:
        self.layout = layout
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
        joined = torch.empty(size, memory_format=self.layout, **kind)
        work(joined[:, :, held - spoilt[0] :])
        if held:
            joined[:, :, :held] = self.map
        self.map = joined[:, :, : held + h]

    def forget(self, until: int) -> None:
        """Let go of the rows above row `until` of the image."""
        rest = self.map[:, :, until - self.first :]
        if self.kept is None or self.kept.shape != rest.shape:
            self.kept = rest.clone(memory_format=self.layout)
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
        make = partial(Rows, folded.layout)
        self.x = make()
        self.inputs = [[make() for _ in range(1 + len(units))] for _, _, units in folded.blocks] + [[make()]]
        self.identities = [[make() for _ in units] for _, _, units in folded.blocks]

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
        scale = norm[0] if norm and chain is None else None  # as the norm does that is folded into conv_b

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
