"""Which linear layers an adapter can change: those that a base calls, with all tokens of each row in order.

>>> from bora_pyro.backbone.passes import hooks
>>> used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
>>> calls = [LayerCalls({"used": used, "unused": unused}, (3, 5)) for _ in range(2)]
>>> for recorded in calls:
...     with hooks() as hook:
...         recorded.record(hook)
...         _ = used(torch.ones(3, 5, 2))
>>> unusable_layers(*calls)
{'unused': 'are not called when the base reads text'}

An adapter of its own for each row needs to know the row of each input. A routed expert, for example, reads tokens that are
gathered from all rows, and other ones each time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from bora_pyro.backbone.passes import Hooks, hooks, is_close
from bora_pyro.backbone.slots import linear_shape

#: Why an adapter cannot change a layer, as the end of "layers that ...".
NOT_CALLED = "are not called when the base reads text"
NO_TENSOR = "do not map one tensor to one tensor"
MIXED_ROWS = "do not read all tokens of each row in order, for example routed experts"
NO_GRADIENT = "pass no gradient to a prediction, for example because they only select what attention reads"
# Inputs of other tokens differ by about their own size, rounding in a short precision by much less.
_SAME = 0.1


class LayerCalls:
    """What the linear layers of a base are called with in one pass.

    Args:
        linear: the layers, by path.
        shape: rows and tokens of the pass.
    """

    def __init__(self, linear: Mapping[str, nn.Module], shape: Sequence[int]) -> None:
        self.linear, (self.rows, self.tokens) = linear, shape
        #: By path, for each call: random projections of the first row's input, or why the call cannot be used.
        self.calls: dict[str, list[Tensor | str]] = {path: [] for path in linear}
        self._directions: dict[int, Tensor] = {}

    def record(self, hook: Hooks) -> None:
        """Record the calls of all layers while the hooks are there."""
        for path, module in self.linear.items():
            hook(module, self._recorder(self.calls[path]))

    def _recorder(self, calls: list[Tensor | str]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: calls.append(self._of_call(module, args, output))

    def _of_call(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | str:
        x, (in_features, out_features, _) = args[0] if args else None, linear_shape(module)
        if not (isinstance(x, Tensor) and isinstance(output, Tensor)) or x.shape[-1] != in_features:
            return NO_TENSOR
        if output.shape != (*x.shape[:-1], out_features):
            return NO_TENSOR
        if x.shape[0] != self.rows if x.dim() > 2 else len(x) != self.rows * self.tokens:
            return MIXED_ROWS
        if in_features not in self._directions:
            self._directions[in_features] = torch.randn((in_features, 4), generator=Generator().manual_seed(0))
        first = x.reshape(self.rows, -1, in_features)[0].detach()
        return (first.float() @ self._directions[in_features].to(x.device)).cpu()


def unusable_layers(one: LayerCalls, other: LayerCalls) -> dict[str, str]:
    """Why an adapter cannot change a layer, by path, for the layers of which that is so.

    Args:
        one: the calls in a pass.
        other: the calls in another pass, in which only the first row has the same tokens.
    """
    found = {}
    for path, calls in one.calls.items():
        both = [*calls, *other.calls[path]]
        reasons = [call for call in both if isinstance(call, str)]
        if not both:
            found[path] = NOT_CALLED
        elif reasons:
            found[path] = reasons[0]
        elif not _same_row(calls, other.calls[path]):
            found[path] = MIXED_ROWS
    return found


def _same_row(calls: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether the first row gave the same inputs in both passes."""
    if [call.shape for call in calls] != [call.shape for call in others]:
        return False
    return all(is_close(x, y, _SAME) for x, y in zip(calls, others, strict=True))


def without_gradient(model: PreTrainedModel, linear: Mapping[str, nn.Module], input_ids: Tensor) -> list[str]:
    """The paths of the layers from whose outputs no gradient can come, so that their adapters would never change.

    A gradient that is zero counts as one: it may become another number when other weights have changed.

    Args:
        model: the base.
        linear: the layers, each called with a tensor.
        input_ids: (rows, tokens).
    """
    if not linear:
        return []
    shifts = {path: torch.zeros((), requires_grad=True) for path in linear}

    def add(shift: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Tensor]:
        return lambda module, args, output: output + shift.to(output)

    with torch.enable_grad(), hooks() as hook:
        for path, module in linear.items():
            hook(module, add(shifts[path]))
        logits = model(input_ids=input_ids, use_cache=False).logits
        if not logits.requires_grad:
            return list(linear)
        gradients = torch.autograd.grad(logits.float().sum(), list(shifts.values()), allow_unused=True)
    return [path for path, gradient in zip(shifts, gradients, strict=True) if gradient is None]
