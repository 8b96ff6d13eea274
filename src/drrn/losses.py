"""Losses by name (`optim.loss`), or of another library by `_target_`.

To add a loss, write a function here and a line in LOSSES, or name any `torch.nn.Module` of (prediction, truth) →
scalar: `optim.loss={_target_: torch.nn.HuberLoss, reduction: sum}`. Ours are sums over pixels and means over the
batch: θ and γ of Sec. 4.2 keep their meaning only on the paper's scale (a mean over pixels is p² times smaller). All
are computed in float32, whatever the precision of the prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drrn.errors import UserError
from drrn.targets import make

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


def loss_of(network: Any, asked: str | dict[str, Any] | None) -> Callable[[Tensor, Tensor], Tensor]:
    """The training loss of a network: `asked`, a name or a `_target_`, else the network's own.

    Raises:
        UserError: a loss is asked for, but only the network's own fits its output; a `_target_` is no Module, or does
            not take its arguments.
    """
    own = network.loss
    if not isinstance(own, str):
        if asked is not None:
            raise UserError(f"optim.loss = {asked}: the network has a loss of its own; give optim.loss=null")
        return own
    if not isinstance(asked, dict):
        return LOSSES[asked or own]
    from torch import nn

    loss = make("optim.loss", asked, nn.Module).requires_grad_(False)  # its parameters are not trained
    loss.register_forward_pre_hook(lambda _, pair: tuple(image.float() for image in pair))
    return loss
