"""What an adapter, a router or a likelihood may do between the steps of a fit: change masks, buffers and gradients.

These rooms lie below that of the fit. :class:`~bora_pyro.inference.callbacks.Callback` is this class with the types of the fit.

>>> class Count(FitHooks):
...     '''Counts the steps of a fit.'''
...     steps = 0
...
...     def after_step(self, loop):
...         self.steps += 1
>>> hooks = Count()
>>> hooks.after_step(None)
>>> hooks.steps, hooks.state()
(1, {})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class FitHooks:
    """Methods that a fit calls; all do nothing.

    Attributes:
        name: names the tensors of ``state`` in a checkpoint.
        gradient_factor: what ``before_step`` multiplies the gradient of each task by, apart from clipping: a number, or (D,).
        needs_sums: whether it needs averages over all tasks (``loop.state.totals``), even if a step draws only some tasks.
    """

    name: str = "callback"
    needs_sums: bool = False
    gradient_factor: Tensor = torch.ones(())

    def begin(self, model: Any, data: Any) -> None:
        """Called before the first step.

        Raises:
            InputError: it cannot work with this model or these documents.
        """

    def before_passes(self, loop: Any) -> None:
        """Called before each step's passes through the model, which give its gradient; ``before_step`` follows them."""

    def before_step(self, loop: Any) -> None:
        """Called before each step of the optimiser. The gradient is complete and clipped; it may be changed."""

    def after_step(self, loop: Any) -> None:
        """Called after each step of the optimiser."""

    def after_epoch(self, loop: Any) -> None:
        """Called after the last step of each epoch, before the validation documents are scored."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint stores."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that ``state`` returned."""
