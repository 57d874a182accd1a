"""A toy member of each axis, as a user would write it: one class each, that the library knows by its base class alone."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch

from bora_pyro import BoRA, HierarchicalNormal
from bora_pyro.adapters import Adapter, LoRA
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.guides import SiteGuide
from bora_pyro.inference.callbacks import Callback
from bora_pyro.likelihoods import Likelihood
from bora_pyro.priors import Prior, with_shared
from bora_pyro.priors.base import StandardNormal, flat
from bora_pyro.routers import Router
from tests.tiny import TASKS, tiny_backbone


class Grow(Callback):
    """Activates one more entry after each epoch, and counts the steps."""

    name = "grow"
    steps = 0

    def after_step(self, loop):
        self.steps += 1

    def after_epoch(self, loop):
        for mask in loop.model.tensors.masks.values():
            active = int(mask.sum(-1).max())
            mask[..., : active + 1] = True

    def state(self):
        return {"steps": torch.tensor(self.steps)}

    def load_state(self, state):
        self.steps = int(state["steps"])


@dataclass(frozen=True)
class Spectral(Adapter):
    """Scales the singular directions of the frozen weight: ΔW = U diag(c) Vᵀ, of which more become active during a fit."""

    directions: int = 4

    def start(self, slot, weight, generator):
        left, _, right = torch.linalg.svd(weight(), full_matrices=False)
        k = self.directions
        return Start(
            {"change": torch.zeros(k)},
            fixed={"left": left[:, :k].contiguous(), "right": right[:k].contiguous()},
            masks={"change": torch.arange(k) < 1},
        )

    def delta(self, tensors):
        return (tensors["left"] * tensors["change"][..., None, :]) @ tensors["right"]

    def callbacks(self):
        return [Grow()]


@dataclass(frozen=True)
class Projected(Adapter):
    """An adapter that holds another: the inner change without what it does to the largest direction of the frozen weight."""

    rank: int = 2
    inner: LoRA = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "inner", LoRA(self.rank))

    def start(self, slot, weight, generator):
        inner = self.inner.start(slot, weight, generator)
        left = torch.linalg.svd(weight(), full_matrices=False).U[:, :1].contiguous()
        return Start(inner.latents, fixed=inner.fixed | {"left": left}, buffers=inner.buffers, masks=inner.masks)

    def delta(self, tensors):
        inner = self.inner.delta(tensors)
        return inner - tensors["left"] @ (tensors["left"].mT @ inner)


class OneFactor(Prior):
    """A joint prior over all latents of a task: θ_d = Θ + u_d λ with one number u_d ~ Normal(0, 1) a task."""

    def sample(self, starts, tasks, masks=None):
        sampled = {}
        with tasks:
            u = pyro.sample("factor", StandardNormal(torch.zeros(1), torch.ones(1)).to_event(1))
        for name, start in starts.items():
            mean = pyro.sample(f"prior_mean.{name}", flat(start, start.dim()))
            loading = pyro.sample(f"loading.{name}", dist.Normal(torch.full_like(start, 0.01), 1.0).to_event(start.dim()))
            sampled[name] = mean + u.view(-1, *[1] * start.dim()) * loading
        return sampled

    def means(self, sites, theta):
        return {name: sites[f"prior_mean.{name}"] for name in theta}

    def sites(self, theta, means):
        first = next(iter(theta))
        u = torch.linspace(-1, 1, len(theta[first]))[:, None]
        loadings = {f"loading.{name}": (theta[name][-1] - theta[name][0]) / 2 for name in theta}
        return {"factor": u} | {f"prior_mean.{name}": value for name, value in means.items()} | loadings

    def __repr__(self):
        return "OneFactor()"


class CountTokens(Callback):
    """Adds up how much weight each task's adapter had, in a buffer."""

    name = "count_tokens"

    def after_step(self, loop):
        for name, counts in loop.model.tensors.buffers.items():
            counts += loop.model.router.seen.pop(name)


class TokenMixture(Router):
    """Every token is read by a mixture of all tasks' adapters, with gates of its own: softmax(R x)."""

    shared = ("gate",)
    reads_all_tasks = True

    def __init__(self, tasks: int = 3) -> None:
        self.tasks = tasks
        self.seen: dict[str, torch.Tensor] = {}

    def start(self, slot, weight, generator):
        gate = 0.1 * torch.randn((self.tasks, slot.in_features), generator=generator)
        return Start({"gate": gate}, buffers={"counts": torch.zeros(self.tasks)})

    def change(self, model, weights, row, task):
        def change(slot, layer, x, output):
            gates = torch.softmax(x @ weights[f"{slot.name}.gate"][0, layer].mT, -1)  # (rows, tokens, tasks)
            if torch.is_grad_enabled():  # in training only
                self.seen[f"{slot.name}.counts"] = self.seen.get(f"{slot.name}.counts", 0) + gates.detach().sum((0, 1))
            for d in range(self.tasks):
                of_task = {name: weights[f"{slot.name}.{name}"][d, layer] for name in model.tensors.names(slot)}
                latents = {name: value.expand(len(x), *value.shape) for name, value in of_task.items()}
                output = output + gates[..., d, None] * model.output(x, model.tensors.at_layer(slot, layer, latents))
            return output

        return change

    def callbacks(self):
        return [CountTokens()]

    def __repr__(self):
        return f"TokenMixture({self.tasks})"


class DoubleExponential(SiteGuide):
    """A guide with Laplace's double exponential distribution at every site, which is sharper than a Normal."""

    def begin(self, name, centre, deviation, event_dim):
        self.put("loc", name, centre, event_dim)
        self.put("log_scale", name, (deviation / 2**0.5).log().expand(centre.shape), event_dim)

    def unconstrained(self, name, event_dim):
        return dist.Laplace(self.get("loc", name), self.get("log_scale", name).exp()).to_event(event_dim)


def double_exponential_guide(model, sites=None, *, data=None, scale=0.1, temperature=1.0):
    return DoubleExponential(model, sites, scale=scale)


def letters():
    """A data source: two tasks whose texts are letters."""
    return [{"task": task, "text": " ".join(task * 4) + f" {number}"} for task in "ab" for number in range(8)]


class Certainty(Likelihood):
    """An objective that is no likelihood of texts: the model is to be sure of its next token, whatever that is."""

    def __init__(self, weight: float = 0.1) -> None:
        self.weight = weight

    def __call__(self, model, weights, batch):
        log_p = torch.log_softmax(model.logits(batch, weights).float(), -1)
        entropy = -(log_p.exp() * log_p).sum(-1) * batch.attention_mask
        pyro.factor("certainty", -self.weight * batch.scale * entropy.sum())

    def observations(self, documents, tokens):
        return documents

    def score(self, model, weights, batch):
        log_p = torch.log_softmax(model.logits(batch, weights).float(), -1)
        return ((log_p.exp() * log_p).sum(-1) * batch.attention_mask).sum(-1)

    def __repr__(self):
        return f"Certainty(weight={self.weight:g})"


def model_with(member):
    """The model of a toy member, on a tiny base."""
    parts = {
        "adapter": {"adapter": Spectral()},
        "wrapper": {"adapter": Projected()},
        "prior": {"adapter": LoRA(rank=1), "prior": OneFactor()},
        "router": {
            "adapter": LoRA(rank=1), "router": TokenMixture(TASKS), "prior": with_shared(HierarchicalNormal(10), ("gate",)),
        },
        "objective": {"adapter": LoRA(rank=1), "likelihood": Certainty()},
    }  # fmt: skip
    options = {"prior": HierarchicalNormal(10)} | parts[member]
    return BoRA(tiny_backbone("llama", targets=["q_proj", "down_proj"]), TASKS, **options)
