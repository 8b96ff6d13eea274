"""Degradations, which make the low resolution of a ground truth, by the field's names.

BI is the paper's; BD and DN are those of Zhang, Tian, Kong, Zhong, Fu (RDN, CVPR 2018), Sec. 5.1. Training pairs and
test sets use the same functions. To add a degradation, write a function and an entry in DEGRADATIONS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drrn.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BI, READY = "BI", "ready"
BLUR, SIGMA = 7, 1.6  # BD: the side of the Gaussian window and its σ, pixels of the truth
NOISE = 30.0  # DN: σ, levels of 255


def bicubic(planes: NDArray[np.floating], scale: int) -> NDArray[np.float64]:
    """BI: MATLAB's bicubic (Sec. 4.1), not rounded."""
    from drrn.matlab import imresize

    return imresize(planes, 1 / scale)


def blurred(planes: NDArray[np.floating], scale: int) -> NDArray[np.float64]:
    """BD: a Gaussian of 7×7 with σ = 1.6, borders replicated, then every third pixel from the second on, not rounded.

    The kept pixel is the middle one of three, as in MATLAB's `imresize(…, 1/3, 'nearest')`.
    """
    import numpy as np
    import torch
    from kornia.filters import gaussian_blur2d  # here, since its import takes seconds

    stack = torch.from_numpy(np.atleast_3d(planes).transpose(2, 0, 1).astype(np.float64))[None]
    soft = gaussian_blur2d(stack, (BLUR, BLUR), (SIGMA, SIGMA), border_type="replicate")[0].numpy()
    small = np.ascontiguousarray(soft.transpose(1, 2, 0)[scale // 2 :: scale, scale // 2 :: scale])
    return small if planes.ndim == 3 else small[..., 0]


def noisy(pixels: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    """DN: bicubic, then noise of σ = 30 of 255 on R, G and B (or grey), then 8 bits.

    The seed of the noise is made of the scale and the pixels: an image has the same noise each time and in any
    folder, and no two images have the same.
    """
    import hashlib

    import numpy as np

    from drrn.matlab import imresize, to_uint8

    digest = hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).digest()
    rng = np.random.default_rng([scale, *digest])
    small = imresize(pixels / 255.0, 1 / scale)
    return to_uint8(small + rng.normal(0, NOISE / 255, small.shape))


@dataclass(frozen=True)
class Degradation:
    """A degradation.

    Attributes:
        function: (truth, scale) → low resolution [h, w] or [h, w, 3]. The truth [H, W] or [H, W, 3], with sides that
            are multiples of the scale, has Y, or Y, Cb and Cr, in 0…1. None for ready pairs, whose low resolution is
            a file (`sets.ready_low`).
        of_rgb: truth and low resolution are R, G, B (or grey) in 8 bits instead.
        scales: for which it is defined; None is all.
    """

    function: Callable[[NDArray, int], NDArray] | None
    of_rgb: bool = False
    scales: tuple[int, ...] | None = None


DEGRADATIONS: dict[str, Degradation] = {
    BI: Degradation(bicubic),
    "BD": Degradation(blurred, scales=(3,)),
    "DN": Degradation(noisy, of_rgb=True),
    READY: Degradation(None),
}


def check_scales(name: str, scales: Iterable[int], degradation: str) -> None:
    """Refuse scales that a degradation is not defined for; `name` is their key."""
    defined = DEGRADATIONS[degradation].scales
    if defined is not None and not set(scales) <= set(defined):
        listed = ", ".join(f"×{scale}" for scale in defined)
        raise UserError(f"{name} = {sorted(set(scales))}: the degradation {degradation} is defined for {listed} only")


def low_resolution(
    pixels: NDArray[np.uint8], scale: int, degradation: str = BI, colour: bool = False, file: Path | None = None
) -> NDArray[np.float64]:
    """The low resolution of an 8-bit image, as an input of networks.

    Args:
        pixels: truth [H, W] (Y or grey) or [H, W, 3] (RGB), sides multiples of the scale.
        scale: s.
        degradation: of DEGRADATIONS.
        colour: return Y, Cb and Cr of an RGB image instead of Y only.
        file: of the image; needed for ready pairs.

    Returns:
        [H / s, W / s] or [H / s, W / s, 3], 0…1 (bicubic may overshoot).

    Raises:
        UserError: the low-resolution file of a ready pair is missing or has another size.
    """
    from drrn.images import luminance, read_pixels
    from drrn.matlab import rgb2ycbcr
    from drrn.sets import ready_low

    def planes(image: NDArray[np.uint8]) -> NDArray[np.float64]:
        return (rgb2ycbcr(image) if colour and image.ndim == 3 else luminance(image)) / 255.0

    if degradation == READY:
        low = read_pixels(path := ready_low(file, scale))
        if [scale * side for side in low.shape[:2]] != [*pixels.shape[:2]] or low.ndim != pixels.ndim:
            raise UserError(f"{path} is {low.shape}, but 1/{scale} of {file} is {pixels.shape[:2]} / {scale}")
        return planes(low)
    its = DEGRADATIONS[degradation]
    return planes(its.function(pixels, scale)) if its.of_rgb else its.function(planes(pixels), scale)
