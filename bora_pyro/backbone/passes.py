"""Short passes through a base model that find out what it does: their tokens, their hooks, and how to compare results.

>>> with hooks() as hook:
...     layer, seen = nn.Linear(2, 3), []
...     hook(layer, lambda module, args, output: seen.append(tuple(output.shape)))
...     _ = layer(torch.ones(5, 2))
>>> seen, len(layer._forward_hooks)
([(5, 3)], 0)

All random numbers come from generators of their own, so that a pass changes no seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel

from bora_pyro.backbone.configuration import special_tokens, token_rows

#: Rows and tokens of a pass.
ROWS, TOKENS = 3, 7
#: Tokens of a pass that shows what a short one does not, such as layers that compress many tokens into one.
MANY_TOKENS = 256
#: The largest difference, relative to the largest value, that rounding makes in float32 and in shorter or quantised numbers.
ROUNDING, COARSE_ROUNDING = 1e-3, 0.2


def ordinary_tokens(model: PreTrainedModel) -> Tensor:
    """The token ids that stand for text, in random order: without padding, and without ids for an image or the like."""
    vocabulary, special = token_rows(model), special_tokens(model.config)
    usual = [token for token in range(min(vocabulary, 2**16)) if token not in special]
    # a vocabulary of special tokens alone has no others
    allowed = torch.tensor(usual if len(usual) > 1 else range(vocabulary))
    return allowed[torch.randperm(len(allowed), generator=Generator().manual_seed(0))]


def probe_tokens(
    model: PreTrainedModel, device: torch.device, *, context: int | None = None, shape: tuple[int, int] = (ROWS, TOKENS)
) -> Tensor:
    """Ordinary tokens, (rows, tokens) int64, all different if the vocabulary is large enough.

    Args:
        model: the base.
        device: the device of the tokens.
        context: the most tokens that the base reads.
        shape: rows and tokens, if the base can read so many.
    """
    ordinary, rows, tokens = ordinary_tokens(model), shape[0], min(shape[1], context or shape[1])
    return ordinary.repeat(-(-rows * tokens // len(ordinary)))[: rows * tokens].view(rows, tokens).to(device)


def rounding_of(model: PreTrainedModel) -> float:
    """The largest relative difference between results that differ only in rounding."""
    coarse = model.dtype not in (torch.float32, torch.float64) or getattr(model, "is_quantized", False)
    return COARSE_ROUNDING if coarse else ROUNDING


def is_close(x: Tensor, y: Tensor, rounding: float) -> bool:
    """Whether two tensors differ by no more than ``rounding`` times the largest value."""
    return bool((x.float() - y.float()).abs().max() <= rounding * y.float().abs().max())


class Hooks:
    """Forward hooks and replaced forward functions of modules, until ``close``."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __call__(self, module: nn.Module, hook: Callable[[nn.Module, tuple[Any, ...], Any], Any]) -> None:
        """Add a forward hook."""
        self._undo.append(module.register_forward_hook(hook).remove)

    def replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Call ``forward`` instead of the module's own function."""
        # accelerate may have replaced it already, to move its inputs between devices
        own: Any = vars(module).get("forward")
        self._undo.append(lambda: delattr(module, "forward") if own is None else setattr(module, "forward", own))
        module.forward = forward

    def close(self) -> None:
        """Restore the modules."""
        for undo in reversed(self._undo):
            undo()


@contextmanager
def hooks() -> Iterator[Hooks]:
    """A context manager that restores the modules at its end."""
    added = Hooks()
    try:
        yield added
    finally:
        added.close()
