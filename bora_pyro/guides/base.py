"""What a guide is: an ``AutoGuide`` of Pyro's with a distribution for every sample site, begun where a fit has ended.

A new guide is one file with a builder, a function as :class:`GuideBuilder` describes it, and one line in
``bora_pyro/guides/__init__.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, init_to_mean
from pyro.nn import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import biject_to

from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.model import BoRA
from bora_pyro.priors import Flat

# Each guide keeps its parameters to itself: with Pyro's global parameter store a second guide in the same process would
# silently take over the first one's. The setting must stand before any guide is built.
pyro.settings.set(module_local_params=True)

#: The first standard deviation of a flat site, times ``scale``: LoRA's entries are some hundredths, and Θ, of which the documents
#: of all tasks tell, is known best.
FLAT_UNIT = 0.01


class GuideBuilder(Protocol):
    """How guides are made, whatever their kind; each kind uses of the arguments what it needs."""

    def __call__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor] | None = None,
        *,
        data: TaskData | None = None,
        scale: float = 0.1,
        temperature: float = 1.0,
    ) -> AutoGuide:
        """Build a guide whose every tensor stands in its ``state_dict()``.

        Args:
            model: the BoRA model.
            sites: the guide's centre, as ``model.sites_given(theta, mean)`` gives it; it is copied. Default: where the adapters
                start.
            data: the documents of the fit, for guides that look at the curvature there.
            scale: the first standard deviations, in units of the prior's, for guides that learn them.
            temperature: weight of the KL term, for guides that are not fitted by an ELBO which has it.
        """


def check_no_masks(model: Any, guide: str) -> None:
    """Refuse a model with inactive entries, for a guide whose KL divergence cannot leave them out.

    Raises:
        InputError: the adapter masks entries of its latents.
    """
    tensors = getattr(model, "tensors", None)
    if tensors is not None and tensors.masks:
        raise InputError(f"guide {guide} cannot leave out the entries that {model.adapter} masks; use the guide normal, or map")


def init_to_start(site: dict[str, Any]) -> Tensor:
    """The site's mean as a tensor of its own: Θ and independent tasks at the adapter's start, deviations at zero.

    ``init_to_mean`` may give an expanded view, whose entries share memory: an optimiser would update them together.
    """
    return init_to_mean(site).clone(memory_format=torch.contiguous_format)


def init_to_sites(sites: Mapping[str, Tensor] | None) -> Callable[[dict[str, Any]], Tensor]:
    """A location for Pyro's ``init_loc_fn``: the given values, copied; ``init_to_start`` where there are none.

    Raises:
        InputError: when the guide is first run, a site that has no value there or one of another shape.
    """
    return init_to_start if sites is None else partial(_init_to_given, sites=dict(sites))


def make_parameters(guide: AutoGuide, model: BoRA) -> None:
    """Run the model once, on one short document, for the guide to make its parameters.

    >>> import bora_pyro as bp
    >>> from bora_pyro.guides import normal_guide
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
    >>> guide = normal_guide(model)
    >>> make_parameters(guide, model)
    >>> len(list(guide.parameters())) > 0
    True
    """
    document = TokenSplit.from_documents([[0, 0]], task=[0], num_tasks=model.num_tasks)
    with torch.no_grad():
        guide(document.batches()[0].to(model.backbone.device))


def begins_at_sites(guide: AutoGuide) -> bool:
    """Whether a guide was given values to begin at, one for each task, and not made yet."""
    location = getattr(guide, "init_loc_fn", getattr(guide, "_location", None))
    return guide.prototype_trace is None and isinstance(location, partial) and location.func is _init_to_given


def _init_to_given(site: dict[str, Any], sites: dict[str, Tensor]) -> Tensor:
    name, shape = site["name"], site["fn"].shape()
    if name not in sites:
        raise InputError(
            f"sites has no value of {name!r}; give model.sites_given(theta, mean) of the model itself{nearest(name, sites)}"
        )
    if sites[name].shape != shape:
        raise InputError(f"sites has {name!r} of shape {tuple(sites[name].shape)}; the model's is {tuple(shape)}")
    return sites[name].detach().clone(memory_format=torch.contiguous_format)


class SiteGuide(AutoGuide):
    """A mean-field guide: one distribution a sample site, independent of the others.

    At a site of real support it is a distribution of that very site (and not, as in Pyro's own ``AutoNormal``, of an auxiliary
    one with a point mass behind it), so that ``TraceMeanField_ELBO`` takes the KL divergence exactly; at any other it is carried
    there from the real line, a positive number being log-Normal. A subclass says how the tensors of a site begin (``begin``) and
    what distribution they stand for (``unconstrained``).

    Args:
        model: the BoRA model, or any model of Pyro's.
        sites: the centre; default: where the adapters start.
        scale: the first standard deviations, in units of the prior's.
    """

    def __init__(self, model: Callable[..., Any], sites: Mapping[str, Tensor] | None = None, *, scale: float = 0.1) -> None:
        if not 0 < scale < float("inf"):
            raise InputError(f"scale is {scale}; give the first standard deviations as a number above 0, for instance 0.1")
        super().__init__(model, create_plates=getattr(model, "plates", None))
        self._location, self._scale = init_to_sites(sites), scale

    @abstractmethod
    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        """Make the parameters of a site, with ``put``.

        Args:
            name: the site.
            centre: where it begins, on the real line: (*batch, *event).
            deviation: the first standard deviation, broadcast against it.
            event_dim: how many dimensions of the centre are the event's.
        """

    @abstractmethod
    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        """The distribution of a site on the real line."""

    def put(self, kind: str, name: str, value: Tensor, event_dim: int) -> None:
        """Keep the parameter ``kind`` of the site ``name``, of which the last ``event_dim`` dimensions belong to one event."""
        value = value.clone(memory_format=torch.contiguous_format)
        # a PyroParam and no plain parameter: stock SVI looks for what Pyro itself has made
        setattr(self, tensor_key(kind, name), PyroParam(value, event_dim=event_dim))

    def get(self, kind: str, name: str) -> Tensor:
        """The parameter ``kind`` of the site ``name``."""
        return getattr(self, tensor_key(kind, name))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            transform = biject_to(site["fn"].support)
            centre = transform.inv(self._location(site))
            for frame in site["cond_indep_stack"]:
                full_size = frame.full_size or frame.size
                if full_size != frame.size:  # the model was first run on some of its tasks
                    centre = periodic_repeat(centre, full_size, frame.dim - site["fn"].event_dim)
            # a log-Normal's standard deviation is a relative one; a scale of 0.1 needs no unit there
            deviation = self._scale * (_unit(site["fn"]) if _is_real(site["fn"].support) else torch.ones(()))
            self.begin(name, centre, _rows_of(deviation, centre), centre.dim() - len(site["fn"].batch_shape))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site; the arguments are the model's, and only the first call looks at them."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates, values = self._create_plates(*args, **kwargs), {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, self._posterior(name, site["fn"]))
        return values

    def _posterior(self, name: str, prior: dist.TorchDistribution) -> dist.TorchDistribution:
        transform = biject_to(prior.support)
        if _is_real(prior.support):
            return self.unconstrained(name, prior.event_dim)
        base = self.unconstrained(name, transform.domain.event_dim)
        carried = dist.TransformedDistribution(base, [transform])
        return carried.to_event(prior.event_dim - carried.event_dim)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The centre of every site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        sites = self.prototype_trace.iter_stochastic_nodes()
        return {name: biject_to(site["fn"].support)(self.get("loc", name)).detach() for name, site in sites}


def tensor_key(kind: str, name: str) -> str:
    """The name of a guide's tensor ``kind`` of the site or latent ``name``: torch allows no dot there."""
    return f"{kind}/{name.replace('.', '/')}"


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _unit(prior: Any) -> Tensor:
    """The prior's standard deviation, one for all entries or broadcast against the site."""
    while isinstance(prior, dist.Independent | dist.MaskedDistribution):
        prior = prior.base_dist
    return torch.tensor(FLAT_UNIT) if isinstance(prior, Flat) else prior.variance.sqrt()


def _rows_of(deviation: Tensor, centre: Tensor) -> Tensor:
    """The first deviations, of the centre's kind; where the model has told them for fewer rows, those of the first for all."""
    fits = all(size in (1, of_centre) for size, of_centre in zip(reversed(deviation.shape), reversed(centre.shape), strict=False))
    return (deviation if fits else deviation[:1]).to(centre)
