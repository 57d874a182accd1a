"""BoRA as a Pyro model: prior x adapter x router x backbone x likelihood.

>>> import bora_pyro as bp
>>> bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 25, adapter=bp.LoRA(rank=4), prior=bp.HierarchicalNormal(tau=100))
BoRA(25 tasks, LoRA(rank=4, alpha=4.0), HierarchicalNormal(tau=100), CausalLM(unit='tokens'))
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bora_pyro.adapters import Adapter, LoRA
from bora_pyro.adapters.factor import Factor, prior_factor
from bora_pyro.backbone.backbone import Backbone, Change
from bora_pyro.backbone.head import LazyLogits
from bora_pyro.backbone.layer_tensors import LayerTensors
from bora_pyro.data.batch import Batch, TaskDraw
from bora_pyro.errors import InputError
from bora_pyro.likelihoods import CausalLM, Likelihood
from bora_pyro.priors import HierarchicalNormal, Prior
from bora_pyro.priors.task_plate import TaskPlate
from bora_pyro.routers import ByTask, Router

#: Adapter tensors by ``<slot>.<latent>``: (D, layers, *shape) for all tasks, (layers, *shape) for one.
Weights = dict[str, Tensor]


class BoRA:
    """The joint density of documents and adapters, p(Θ) Π_d p(θ_d | Θ) Π_n p(w_{d,n} | θ_d), as a Pyro model.

        >>> import bora_pyro as bp
        >>> from pyro import poutine
        >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1))
        >>> split = bp.data.TokenSplit.from_documents([[0, 5, 6], [0, 7]], task=[0, 1], num_tasks=2)
        >>> trace = poutine.trace(model).get_trace(split.batches()[0])
        >>> [name for name, node in trace.nodes.items() if node["type"] == "sample" and "q_proj" in name]
        ['prior_mean.q_proj.lora_A', 'theta.q_proj.lora_A_decentered', 'theta.q_proj.lora_A', ...]

    It is a plain callable for Pyro (``SVI``, ``poutine.trace``, ``Predictive``, ``pyro.render_model``). The language model
    is no child of a ``torch.nn.Module`` here, so that none of its parameters becomes a site.

    Args:
        backbone: the frozen language model.
        num_tasks: D, two or more; one is enough where the prior shares nothing between tasks (``Given``).
        adapter: which latents change a layer; default ``LoRA()``.
        prior: how tasks share; default ``HierarchicalNormal()``.
        likelihood: what is observed; default ``CausalLM()``.
        router: which adapter reads a token; default ``ByTask()``.
        seed: of the adapters' common start.

    Raises:
        InputError: too few tasks; or the adapter's options speak of other layers or tasks.
    """

    #: What the adapter adds to the prior, beside the density of its latents.
    factor: Factor | None = None

    def __init__(
        self,
        backbone: Backbone,
        num_tasks: int,
        *,
        adapter: Adapter | None = None,
        prior: Prior | None = None,
        likelihood: Likelihood | None = None,
        router: Router | None = None,
        seed: int = 0,
    ) -> None:
        self.backbone, self.num_tasks, self.adapter, self.router = backbone, num_tasks, adapter or LoRA(), router or ByTask()
        self.prior, self.likelihood = prior or HierarchicalNormal(), likelihood or CausalLM()
        if num_tasks < self.prior.least_tasks:
            raise InputError(
                f"{num_tasks} task given; BoRA shares between tasks and needs 2 or more (for one task use peft's LoRA)"
            )
        self.adapter.check(backbone.slots, num_tasks)
        self.tensors = LayerTensors.of((self.adapter, self.router), backbone, seed=seed)
        self.starts, self.fixed = self.tensors.latents, self.tensors.fixed
        self.output, self.add = self.adapter.output, self.adapter.add
        self.factor = prior_factor(self.adapter, backbone.slots, self.tensors)

    def __call__(self, batch: Batch) -> None:
        """Run the model on one batch of documents."""
        self.likelihood(self, self.weights(batch), batch)

    def plates(self, batch: Batch | TaskDraw | None = None) -> pyro.plate:
        """The plate of tasks, of all or of those that a batch speaks of: a guide's ``create_plates``."""
        draw = batch.tasks if isinstance(batch, Batch) else batch
        return TaskPlate(self.num_tasks, draw) if isinstance(draw, TaskDraw) else pyro.plate("tasks", self.num_tasks, dim=-1)

    def weights(self, batch: Batch | TaskDraw | None = None) -> Weights:
        """Sample θ: the latents of all tasks, (D, layers, *shape) each, or a row for each task that a batch speaks of."""
        weights = self.prior.sample(self.starts, plate := self.plates(batch), self.tensors.masks)
        if self.factor is not None:
            self.factor(weights, plate)
        return weights

    def logits(self, batch: Batch, weights: Weights | None) -> Tensor:
        """Logits (rows, tokens, vocabulary) of a batch under its adapters, or under the base where there are no weights."""
        return self.backbone.logits(batch.input_ids, self._change(weights, batch), layout=batch.layout)

    def lazy_logits(self, batch: Batch, weights: Weights | None) -> Tensor | LazyLogits:
        """As ``logits``, for a likelihood or a score, which needs no more than a chunk of them at once."""
        return self.backbone.lazy_logits(batch.input_ids, self._change(weights, batch), layout=batch.layout)

    @property
    def longest_shared(self) -> int:
        """The longest row of several continuations of one prompt (``Batch.layout``) that the base reads; 0: it reads none."""
        return self.backbone.longest_shared

    def _change(self, weights: Weights | None, batch: Batch) -> Change | None:
        return None if weights is None else self.change(weights, batch.row, batch.task)

    def change(self, weights: Weights, row: Tensor, task: Tensor | None = None) -> Change:
        """How the adapters in the rows ``row`` (rows,) of the weights, of the tasks ``task``, change the layers' outputs."""
        return self.router.route(self, weights, row, row if task is None else task)

    def weights_given(self, sites: Mapping[str, Tensor], tasks: TaskDraw | None = None) -> tuple[Weights, Weights]:
        """θ of all tasks or of some, (D, layers, *shape), and Θ, (layers, *shape), for given values of the sample sites."""
        with torch.no_grad():
            theta = poutine.condition(self.weights, data=dict(sites))(tasks)
            return theta, self.prior.means(sites, theta)

    def sites_given(self, theta: Weights, mean: Weights) -> Weights:
        """Values of the sample sites for given θ, (D, layers, *shape), and Θ, (layers, *shape): `weights_given` undone."""
        return self.prior.sites(theta, mean)

    def state(self) -> Weights:
        """What a fit changes beside the guide's parameters: what the prior has learned, buffers and masks."""
        return {f"prior/{name}": value for name, value in self.prior.state().items()} | self.tensors.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave, or a part of it."""
        own = {name.removeprefix("prior/"): value for name, value in state.items() if name.startswith("prior/")}
        self.prior.load_state({name: value.to(self.backbone.device) for name, value in own.items()})
        self.tensors.load_state(state)

    def __repr__(self) -> str:
        parts = [self.adapter, self.prior, self.likelihood] + [self.router] * (not isinstance(self.router, ByTask))
        return f"BoRA({self.num_tasks} tasks, {', '.join(map(repr, parts))})"
