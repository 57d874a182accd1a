"""A generator: a method with all that turns a task vector into the latents of an adapter.

>>> from bora_pyro.predict.generators import Ridge
>>> layout = Layout({"q_proj.lora_B": (2, 3)})
>>> random = torch.Generator().manual_seed(0)
>>> vectors, latents = torch.randn((6, 4), generator=random), torch.randn((6, 6), generator=random)  # six tasks
>>> generator = Generator.fit(Ridge(), vectors, latents, layout=layout)
>>> generator.generate(torch.randn(4, generator=random))["q_proj.lora_B"].shape
torch.Size([2, 3])

Every statistic of a generator is of its training tasks. ``generate`` is a function of the vector and of the generator alone: the
new task has no adapter whose mean and scale could be used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bora_pyro.errors import InputError
from bora_pyro.predict.generators import METHODS, Method
from bora_pyro.predict.generators.layout import Layout
from bora_pyro.predict.generators.space import Space

#: The least number of tasks that a generator learns from. With one of them left out, three are left for ridge regression, which
#: chooses its penalty by leaving out one of these in turn.
LEAST_TASKS = 4

_SPACE, _METHOD, _VECTORS = "space.", "method.", "vectors"


@dataclass(frozen=True, eq=False)
class Generator:
    """A fitted generator of adapters.

    Attributes:
        method: the fitted method.
        space: the coordinates of adapters.
        mean, scale: (hidden,) float64, mean and standard deviation of the training tasks' vectors.
    """

    method: Method
    space: Space
    mean: Tensor
    scale: Tensor

    @classmethod
    def fit(
        cls,
        method: Method,
        vectors: Tensor,
        latents: Tensor,
        *,
        layout: Layout,
        draws: Tensor | None = None,
        components: int | None = None,
        space: Space | None = None,
        seed: int = 0,
    ) -> Generator:
        """Fit a method to the adapters of D tasks.

        Args:
            method: the method, which is fitted in place.
            vectors: (D, hidden), the vector of each task.
            latents: (D, P), the adapter of each task.
            layout: the latents of an adapter.
            draws: (D, K, P), draws of each task's adapter from its posterior; None: the adapters alone.
            components: as for :meth:`Space.of`.
            space: the space of these adapters, if it is known already.
            seed: seed of the fit.

        Raises:
            InputError: there are too few tasks, or all tasks have the same adapter.
        """
        if len(latents) < LEAST_TASKS - 1:
            raise InputError(f"{len(latents)} tasks are given; a generator learns from {LEAST_TASKS} tasks or more")
        space = space or Space.of(latents, layout, components=components)
        if not space.components:
            raise InputError("all tasks have the same adapter, so there is nothing to generate; use that one")
        c = vectors.double()
        mean, scale = c.mean(0), c.std(0, correction=0)
        # an entry that is the same in all training tasks says nothing about others
        scale = torch.where(scale > 0, scale, torch.inf)
        # the draws of one task at a time: in float64 all of them may be too large
        of_draws = None if draws is None else torch.stack([space.coordinates(of_task) for of_task in draws])
        method.fit((c - mean) / scale, space.coordinates(latents), draws=of_draws, seed=seed)
        return cls(method, space if method.uses_latents else space.without_basis(), mean, scale)

    @property
    def layout(self) -> Layout:
        """The latents of an adapter."""
        return self.space.standard.layout

    def flat(self, vector: Tensor, *, draw: int | None = None) -> Tensor:
        """The adapter of a task with the vector (hidden,), flat: (P,) float32.

        Args:
            vector: the vector.
            draw: number of a draw from the distribution of adapters; the same number always gives the same draw. None: its
                centre.

        Raises:
            InputError: the vector has another size than those of the training tasks, or the method has no draws.
        """
        if vector.shape != self.mean.shape:
            raise InputError(
                f"the task vector has {tuple(vector.shape)} numbers, those that the generator has learned from "
                f"{tuple(self.mean.shape)}; use the base of the generator"
            )
        if draw is not None and not self.method.has_draws:
            raise InputError(
                f"{type(self.method).__name__} gives one adapter and no draws; leave draws out, or fit a generator of method cvae"
            )
        if not self.method.uses_latents:
            return self.space.standard.centre.clone()
        return self.space.latents(self.method.generate((vector.double() - self.mean) / self.scale, draw=draw))

    def generate(self, vector: Tensor, *, draw: int | None = None) -> dict[str, Tensor]:
        """The adapter of a task as latents, (layers, *shape) by name; the arguments are those of :meth:`flat`."""
        return self.layout.unflatten(self.flat(vector, draw=draw))

    def state(self) -> dict[str, Tensor]:
        """All tensors, for a safetensors file."""
        tensors = {f"{_SPACE}{name}": value for name, value in self.space.state().items()}
        tensors |= {f"{_METHOD}{name}": value for name, value in self.method.state().items()}
        # an infinite scale is stored as 0: no number of a file is infinite
        return tensors | {_VECTORS: torch.stack([self.mean, torch.where(self.scale.isinf(), 0.0, self.scale)])}

    def describe(self) -> dict[str, Any]:
        """What the tensors do not say, in values for JSON."""
        name = next(name for name, kind in METHODS.items() if type(self.method) is kind)
        options: Any = self.method
        return {
            "method": name,
            "options": dataclasses.asdict(options),
            "chosen": self.method.chosen(),
            "latents": {latent: list(shape) for latent, shape in self.layout.shapes.items()},
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> Generator:
        """The generator with these tensors and this description.

        Raises:
            InputError: they do not fit together.
        """
        try:
            layout = Layout({str(name): tuple(map(int, shape)) for name, shape in about["latents"].items()})
            method = METHODS[about["method"]](**about["options"])
            space = Space.from_state(_part(state, _SPACE), layout)
            if space.standard.centre.shape != (layout.size,):
                raise ValueError(
                    f"its mean adapter has {space.standard.centre.numel()} numbers, its description says {layout.size}"
                )
            mean, scale = state[_VECTORS].double()
            method.load_state(_part(state, _METHOD))
            found = cls(method, space, mean, torch.where(scale > 0, scale, torch.inf))
            if found.flat(mean).shape != (layout.size,):
                raise ValueError("its tensors have other sizes than its description says")
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            raise InputError(f"the generator is damaged ({' '.join(str(error).split())[:200]}); fit it again") from None
        return found


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
