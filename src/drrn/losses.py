"""What training minimises, by name (`optim.loss`). A loss of one's own is a function here and a line in LOSSES.

Each is a sum over pixels and a mean over the batch: θ and γ of Sec. 4.2 keep their meaning only on the paper's
scale (a mean over pixels is p² times smaller). All are in float32, whatever the precision of the prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drrn.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

CHARBONNIER = 1e-3  # ε of LapSRN's loss


def euclidean(prediction: Tensor, truth: Tensor) -> Tensor:
    """Eq. 10: 1/(2N) Σ ‖x̃ − D(x)‖² over N patches [N, 1, p, p] → scalar."""
    return (prediction.float() - truth.float()).square().sum() / (2 * len(prediction))


def l1(prediction: Tensor, truth: Tensor) -> Tensor:
    """1/N Σ |x̃ − D(x)| over N patches [N, 1, p, p] → scalar (EDSR, Sec. 3.3, but for its mean over pixels)."""
    return (prediction.float() - truth.float()).abs().sum() / len(prediction)


def charbonnier(prediction: Tensor, truth: Tensor) -> Tensor:
    """1/N Σ √((x̃ − D(x))² + ε²), ε = 0.001, over N patches [N, 1, p, p] → scalar (LapSRN, Eq. 1)."""
    return ((prediction.float() - truth.float()).square() + CHARBONNIER**2).sqrt().sum() / len(prediction)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean,
    "l1": l1,
    "charbonnier": charbonnier,
}


def loss_of(network: Any, asked: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss that a network is trained with: the one asked for by name, else its own.

    Raises:
        UserError: another is asked for than the one that belongs to what the network returns.
    """
    own = network.loss
    if isinstance(own, str):
        return LOSSES[asked or own]
    if asked is not None:
        raise UserError(f"optim.loss = {asked}: the network brings a loss of its own; give optim.loss=null")
    return own
