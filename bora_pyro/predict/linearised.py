"""The model made linear in its weights: logits(x; θ̂) + J(x) (θ − θ̂), where J is the Jacobian of the logits at θ̂.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
>>> batch = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[1, 0], num_tasks=2).batches()[0]
>>> centre = {name: start.expand(2, *start.shape) for name, start in model.starts.items()}
>>> linear = LinearisedBoRA(model, centre)
>>> at_centre, first, second = (linear.logits(batch, {name: centre[name] + k / 10 for name in centre}) for k in (0, 1, 2))
>>> torch.allclose(second - first, first - at_centre, atol=1e-3)
True
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bora_pyro.backbone.configuration import model_type
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.data.batch import Batch
from bora_pyro.errors import InputError
from bora_pyro.model import BoRA, Weights


class LinearisedBoRA(BoRA):
    """A BoRA model whose logits are replaced by their first-order expansion around θ̂, for predictions.

    Laplace's approximation with a Gauss-Newton curvature is the posterior of this model. So its draws should predict with this
    model, and not with the network, which is another function far from θ̂ (Immer et al., 2021; for LoRA: Yang et al., 2024). The
    draws of every guide can be used, also those of a fitted Normal.

    J (θ − θ̂) is one Jacobian-vector product. Forward-mode differentiation computes it in the same pass as the logits at θ̂. This
    takes about the time of three passes.

    Args:
        model: the BoRA model.
        centre: θ̂ of all tasks, (D, layers, *shape) by name of the latent.
    """

    def __init__(self, model: BoRA, centre: Weights) -> None:
        vars(self).update(vars(model))  # the same model in all but its logits
        self.centre = centre

    def logits(self, batch: Batch, weights: Weights | None) -> Tensor:
        """Linearised logits (rows, tokens, vocabulary) of a batch, or those of the base where there are no weights."""
        logits = self.lazy_logits(batch, weights)
        return logits() if isinstance(logits, LazyLogits) else logits

    def lazy_logits(self, batch: Batch, weights: Weights | None) -> Tensor | LazyLogits:
        """As ``logits``, without the head. The head is linear, so it can be applied after the expansion.

        Raises:
            InputError: an operation of the base has no forward derivative.
        """
        if weights is None or weights is self.centre:
            return super().lazy_logits(batch, weights)
        chosen = None if batch.tasks is None else batch.tasks.index
        centre = self.centre if chosen is None else {name: value[chosen] for name, value in self.centre.items()}
        try:
            return _expand(lambda theta: super(LinearisedBoRA, self).lazy_logits(batch, theta), centre, weights)
        except NotImplementedError as error:
            raise InputError(
                f"the base {model_type(self.backbone.model.config)!r} cannot be linearised, because one of its operations has no "
                f"forward derivative ({str(error).partition('.')[0]}); predict with the draws themselves"
            ) from None


class _FrozenLinear(TorchFunctionMode):
    """Differentiates frozen linear layers with one product. Torch would also multiply by the weight's derivative, which is 0."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and not any(map(_has_tangent, args[1:])) and _has_tangent(args[0]):
            x, tangent = forward_ad.unpack_dual(args[0])
            return forward_ad.make_dual(func(x, *args[1:]), func(tangent, args[1]))
        return func(*args, **(kwargs or {}))


def _has_tangent(value: Tensor | None) -> bool:
    return value is not None and forward_ad.unpack_dual(value).tangent is not None


def _expand(function: Callable[[Weights], Tensor | LazyLogits], centre: Weights, weights: Weights) -> Tensor | LazyLogits:
    """function(centre) plus its derivative in the direction weights − centre."""
    # inference mode has no derivatives at all, and torch's fused attention has no forward ones
    with torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level(), _FrozenLinear():
        output = function(_duals(centre, weights))
        at_centre, derivative = forward_ad.unpack_dual(output.states if isinstance(output, LazyLogits) else output)
        expanded = at_centre + derivative
    return LazyLogits(expanded, output.head) if isinstance(output, LazyLogits) else expanded


def _duals(centre: Weights, weights: Weights) -> Weights:
    """The centre, with the derivative weights − centre."""
    with warnings.catch_warnings():
        # at the first dual tensor torch compiles some derivatives, and warns of its own compiler
        warnings.filterwarnings("ignore", message="`torch.jit.script` is", category=DeprecationWarning)
        # the values of pooled tasks are one tensor in memory, which a dual tensor cannot be
        return {name: forward_ad.make_dual(value.contiguous(), weights[name] - value) for name, value in centre.items()}
