"""How the server makes one value of those of several clients: a weighted mean, a trimmed mean, and bounded updates.

>>> values = [{"x": torch.tensor([0.0])}, {"x": torch.tensor([3.0])}, {"x": torch.tensor([900.0])}]
>>> weighted_mean(values, [1.0, 2.0, 0.0])["x"], trimmed_mean(values, 0.34)["x"]
(tensor([2.]), tensor([3.]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bora_pyro.errors import InputError

#: Named tensors.
Tensors = dict[str, Tensor]
#: How the server aggregates, by the name that a configuration gives it.
MEAN, TRIMMED_MEAN = AGGREGATES = ("mean", "trimmed_mean")


def weighted_mean(values: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> Tensors:
    """Σ_k w_k x_k / Σ_k w_k, summed in float64. One value alone is returned as it is.

    Args:
        values: the tensors of each client, of the same names and shapes.
        weights: w_k, with a sum above 0.
    """
    total = sum(weights)
    if len(values) == 1:
        return dict(values[0])
    found: Tensors = {}
    for name, first in values[0].items():
        parts = (value[name].double() * (weight / total) for value, weight in zip(values, weights, strict=True))
        found[name] = torch.stack([*parts]).sum(0).to(first.dtype)
    return found


def trimmed(clients: int, trim: float) -> int:
    """How many values of each end a trimmed mean of K clients leaves out: ⌊trim · K⌋."""
    return int(trim * clients + 1e-9)


def trimmed_mean(values: Sequence[Mapping[str, Tensor]], trim: float) -> Tensors:
    """The mean of each entry without its ⌊trim · K⌋ largest and smallest values (Yin et al., 2018, arXiv 1803.01498).

    The K clients count the same: with weights, one client that claims many documents would outweigh the others. One value is left
    out at each end if ⌊trim · K⌋ is 0, because messages of some clients are missing.

    Args:
        values: the tensors of each client, of three or more.
        trim: the fraction left out at each end, below a half.
    """
    count = max(1, trimmed(len(values), trim))
    found: Tensors = {}
    for name in values[0]:
        ordered = torch.stack([value[name] for value in values]).sort(0).values
        found[name] = ordered[count : len(values) - count].double().mean(0).to(ordered.dtype)
    return found


def clipped(value: Mapping[str, Tensor], before: Mapping[str, Tensor], clip: float) -> tuple[Tensors, float]:
    """The value moved back towards ``before``, so that the norm of its update over all tensors is at most ``clip``.

        >>> clipped({"x": torch.tensor([3.0, 4.0])}, {"x": torch.zeros(2)}, 1.0)
        ({'x': tensor([0.6000, 0.8000])}, 5.0)

    Args:
        value: the tensors of a client.
        before: the tensors that it began with.
        clip: the largest norm; inf: none.

    Returns:
        The bounded tensors, and the norm of the update as it came.
    """
    norm = float(torch.stack([(value[name].double() - before[name].double()).square().sum() for name in value]).sum().sqrt())
    if norm <= clip:
        return dict(value), norm
    # as numbers of float64: an update of 1e30 has a square that float32 does not hold
    part = clip / norm
    near = {name: before[name].double() + part * (value[name].double() - before[name].double()) for name in value}
    return {name: moved.to(value[name].dtype) for name, moved in near.items()}, norm


#: A trimmed mean needs so many clients.
LEAST_TRIMMED = 3


def check_trim(trim: float, clients: int) -> None:
    """Check that a trimmed mean of so many clients leaves some values out.

    >>> check_trim(0.1, 5)
    Traceback (most recent call last):
    bora_pyro.errors.InputError: trim is 0.1, which leaves no value of 5 clients out; give 0.2 or more, or aggregate mean

    Raises:
        InputError: it leaves none out, or there are fewer than three clients.
    """
    if clients < LEAST_TRIMMED:
        raise InputError(f"a trimmed mean needs three clients a round, and there are {clients}; give aggregate mean")
    if not trimmed(clients, trim):
        raise InputError(
            f"trim is {trim:g}, which leaves no value of {clients} clients out; give {-(-1000 // clients) / 1000:g} or more, or "
            "aggregate mean"
        )
