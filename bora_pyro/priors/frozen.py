"""Finished adapters, which do not change, and latents of a router, which are inferred: the prior of a fit of gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.priors.base import PerLatent

#: Prefix of the names of the given tensors in the state of the prior.
GIVEN = "given."
_THETA, _MEAN, _ROWS, _DRAWS = (f"{GIVEN}{part}." for part in ("theta", "mean", "rows", "draws"))


class FrozenAdapters(PerLatent):
    """θ_d of all tasks is given. Every other latent, such as a gate, is Normal(0, σ²) for each task, independently.

        >>> prior = FrozenAdapters({"q_proj.lora_A": torch.ones(2, 4, 8)}, {"q_proj.lora_A": torch.zeros(4, 8)}, scale=0.5)
        >>> prior
        FrozenAdapters(1 latents of 2 tasks, scale=0.5)
        >>> with pyro.poutine.trace() as trace:
        ...     rows = prior.sample_latent("q_proj.gate", torch.zeros(4, 3), pyro.plate("tasks", 2, dim=-1))
        >>> rows.shape, "theta.q_proj.gate" in trace.trace.nodes
        (torch.Size([2, 4, 3]), True)

    The rows of the first tasks may be given as well. Then only those of the later tasks are inferred: this is how an adapter is
    added to a finished router. The adapters may also have draws from their posterior, of which :meth:`choose` selects one.

    Args:
        theta: θ of all tasks, (D, layers, *shape) by name of the latent.
        means: Θ, (layers, *shape) by name.
        scale: σ.
        rows: values of other latents for the first tasks, (tasks, layers, *shape) by name; default: none are given.
        draws: draws of θ of all tasks.

    Raises:
        InputError: σ is not a finite number above 0; or there are draws of other latents than θ has.
    """

    def __init__(
        self,
        theta: Mapping[str, Tensor],
        means: Mapping[str, Tensor],
        *,
        scale: float = 1.0,
        rows: Mapping[str, Tensor] | None = None,
        draws: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        if not 0 < scale < math.inf:
            raise InputError(f"the scale of the gates is {scale}; give a finite number above 0")
        self.scale = float(scale)
        self.theta = {name: value.detach() for name, value in theta.items()}
        self.centres = {name: means[name].detach() for name in theta}
        self.rows = {name: value.detach() for name, value in (rows or {}).items()}
        if any(draw.keys() != self.theta.keys() for draw in draws):
            raise InputError("the draws are of other latents than the adapters; give draws of the same fit")
        self.stacked = {name: torch.stack([draw[name].detach() for draw in draws]) for name in theta} if draws else {}
        self._number: int | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], *, scale: float) -> FrozenAdapters:
        """The prior that had this ``state()``."""
        parts = [_part(state, prefix) for prefix in (_THETA, _MEAN, _ROWS, _DRAWS)]
        theta, means, rows, stacked = parts
        number = len(next(iter(stacked.values()))) if stacked else 0
        draws = [{name: value[k] for name, value in stacked.items()} for k in range(number)]
        return cls(theta, means, scale=scale, rows=rows, draws=draws)

    @property
    def num_draws(self) -> int:
        """Number of draws."""
        return len(next(iter(self.stacked.values()))) if self.stacked else 0

    def draw(self, number: int) -> dict[str, Tensor]:
        """θ of all tasks in a draw, without the router's latents."""
        return {name: value[number] for name, value in self.stacked.items()}

    def choose(self, number: int | None) -> None:
        """Sample the draw with this number from now on; None: θ itself."""
        self._number = number

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        if name in self.theta:
            every = self.theta[name] if self._number is None else self.stacked[name][self._number]
        else:
            known = self.rows.get(name, start.new_zeros(0, *start.shape))
            zeros = start.new_zeros(tasks.size - len(known), *start.shape)
            every = torch.cat(
                [known.to(start), pyro.sample(f"theta.{name}", dist.Normal(zeros, self.scale).to_event(zeros.dim()))]
            )
        every = every.to(start.device)
        return every if tasks.subsample_size == len(every) else every[tasks.indices.to(every.device)]

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return self.centres[name].to(theta) if name in self.theta else torch.zeros_like(theta[0])

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        return {} if name in self.theta else {f"theta.{name}": theta[len(self.rows.get(name, ())) :]}

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        if name in self.theta:
            raise InputError("the adapters of this fit are given, so their tau is not known; use the run that they are from")
        return start.new_tensor(self.scale**-2)

    def state(self) -> dict[str, Tensor]:
        parts = ((_THETA, self.theta), (_MEAN, self.centres), (_ROWS, self.rows), (_DRAWS, self.stacked))
        return {f"{prefix}{name}": value for prefix, part in parts for name, value in part.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        parts = ((_THETA, self.theta), (_MEAN, self.centres), (_ROWS, self.rows), (_DRAWS, self.stacked))
        for prefix, part in parts:
            for name in part:
                part[name] = state.get(f"{prefix}{name}", part[name])

    def __repr__(self) -> str:
        tasks = len(next(iter(self.theta.values()), ()))
        return f"FrozenAdapters({len(self.theta)} latents of {tasks} tasks, scale={self.scale:g})"


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
