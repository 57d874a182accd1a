"""The base of guides. A guide is a Pyro ``AutoGuide`` with a distribution for every sample site; it can start from a fit.

A new guide is one file with a builder, which is a function with the signature of :class:`GuideBuilder`, and one line in
``bora_pyro/guides/__init__.py``. Further keyword arguments of the builder are the guide's options: ``--guide NAME
--guide_option KEY=VALUE``.
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
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, init_to_mean
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.nn import PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import biject_to
from torch.nn import Parameter

from bora_pyro.data.tasks import TaskData
from bora_pyro.data.token_split import TokenSplit
from bora_pyro.errors import InputError, nearest
from bora_pyro.model import BoRA
from bora_pyro.priors import Flat

#: The initial standard deviation at a site with a flat prior is ``scale`` times this number. The entries of LoRA's matrices are
#: some hundredths, and Θ is the best known site, because the documents of all tasks inform it.
FLAT_UNIT = 0.01


class GuideBuilder(Protocol):
    """The signature of all functions that build a guide. A kind of guide ignores the arguments that it does not need.

    A builder may have further keyword arguments with defaults, which are the guide's options.
    """

    def __call__(
        self,
        model: BoRA,
        sites: Mapping[str, Tensor] | None = None,
        *,
        data: TaskData | None = None,
        scale: float = 0.1,
        temperature: float = 1.0,
    ) -> AutoGuide:
        """Build a guide whose ``state_dict()`` holds all its tensors.

        Args:
            model: the BoRA model.
            sites: values of the sample sites at the guide's centre, as ``model.sites_given(theta, mean)`` returns them; they are
                copied. Default: the start of the adapters.
            data: the documents of the fit, for guides that compute a curvature from them.
            scale: the initial standard deviations in units of the prior's, for guides that learn standard deviations.
            temperature: weight of the KL term, for guides that are not fitted by an ELBO.
        """


def check_no_masks(model: Any, guide: str) -> None:
    """Check that no entry of the model's latents is inactive, for guides whose KL divergence cannot leave entries out.

    Raises:
        InputError: the adapter masks entries of its latents.
    """
    tensors = getattr(model, "tensors", None)
    if tensors is not None and tensors.masks:
        raise InputError(f"guide {guide} cannot leave out the entries that {model.adapter} masks; use the guide normal, or map")


def init_to_start(site: dict[str, Any]) -> Tensor:
    """A copy of the site's mean: the adapter's start for Θ and for independent tasks, zero for deviations.

    ``init_to_mean`` may return an expanded view. Its entries share memory, and an optimiser would update them together.
    """
    return init_to_mean(site).clone(memory_format=torch.contiguous_format)


def init_to_sites(sites: Mapping[str, Tensor] | None) -> Callable[[dict[str, Any]], Tensor]:
    """A function for Pyro's ``init_loc_fn``: it returns copies of the given values; without values, it is ``init_to_start``.

    Raises:
        InputError: raised in the guide's first run, if a site has no value in ``sites`` or a value of another shape.
    """
    return init_to_start if sites is None else partial(_init_to_given, sites=dict(sites))


def make_parameters(guide: AutoGuide, model: BoRA) -> None:
    """Create the guide's parameters, by one run of the model on one short document.

    >>> import bora_pyro as bp
    >>> from bora_pyro.guides import normal_guide
    >>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=2))
    >>> guide = normal_guide(model)
    >>> make_parameters(guide, model)
    >>> len(list(guide.parameters())) > 0
    True
    """
    rows, question = 1, dict[str, Any]()
    if model.likelihood.reads_options:
        rows, question = 2, {"document_index": [0, 0], "correct": [True, False]}
    document = TokenSplit.from_documents([[0, 0]] * rows, task=[0] * rows, num_tasks=model.num_tasks, **question)
    with torch.no_grad():
        guide(document.batches()[0].to(model.backbone.device))


def task_sites(guide: AutoGuide) -> list[str]:
    """The sites of a guide that are inside the plate of tasks."""
    nodes = guide.prototype_trace.iter_stochastic_nodes()
    return [name for name, site in nodes if any(frame.name == "tasks" for frame in site["cond_indep_stack"])]


def parameters_of_tasks(guide: AutoGuide, *args: Any) -> list[Parameter]:
    """The parameters of a guide that it reads inside the plate of tasks, which have a row for each task.

    Args:
        guide: the guide after its first run.
        args: arguments of the guide, for one run without gradients.
    """
    with torch.no_grad(), poutine.seed(rng_seed=0):
        trace = poutine.trace(guide).get_trace(*args)
    inside = set()
    for node in trace.nodes.values():
        if node["type"] == "param" and any(frame.name == "tasks" for frame in node["cond_indep_stack"]):
            value = node["value"]
            inside.add(id(value.unconstrained() if hasattr(value, "unconstrained") else value))
    return [parameter for parameter in guide.parameters() if id(parameter) in inside]


def begins_at_sites(guide: AutoGuide) -> bool:
    """Whether a guide has values of all tasks to start from, and has not run yet."""
    location = getattr(guide, "init_loc_fn", getattr(guide, "_location", None))
    return guide.prototype_trace is None and isinstance(location, partial) and location.func is _init_to_given


def _init_to_given(site: dict[str, Any], sites: dict[str, Tensor]) -> Tensor:
    name, shape = site["name"], site["fn"].shape()
    if name not in sites:
        raise InputError(
            f"sites has no value of {name!r}; give model.sites_given(theta, mean) of the same model{nearest(name, sites)}"
        )
    if sites[name].shape != shape:
        raise InputError(f"sites has {name!r} of shape {tuple(sites[name].shape)}; the model's is {tuple(shape)}")
    return sites[name].detach().clone(memory_format=torch.contiguous_format)


class SiteGuide(AutoGuide):
    """A guide with one distribution per sample site. It is mean field, unless a subclass makes a site depend on earlier ones.

    At a site with real support the guide samples the site itself, so that ``TraceMeanField_ELBO`` computes the KL divergence
    exactly. (Pyro's own ``AutoNormal`` samples an auxiliary site, and a point mass at the site.) At a site with another support
    the guide transforms a distribution on the real line; a positive number is then log-Normal. A subclass defines the initial
    tensors of a site (``begin``) and the distribution with these tensors (``unconstrained``, or ``given`` earlier sites).

    Args:
        model: the BoRA model, or any other Pyro model.
        sites: values of the sample sites at the centre; default: the start of the adapters.
        scale: the initial standard deviations, in units of the prior's.

    Raises:
        InputError: ``scale`` is not a finite number above 0.
    """

    def __init__(self, model: Callable[..., Any], sites: Mapping[str, Tensor] | None = None, *, scale: float = 0.1) -> None:
        if not 0 < scale < float("inf"):
            raise InputError(f"scale is {scale}; give the initial standard deviations as a number above 0, for instance 0.1")
        super().__init__(model, create_plates=getattr(model, "plates", None))
        self._location, self._scale = init_to_sites(sites), scale

    @abstractmethod
    def begin(self, name: str, centre: Tensor, deviation: Tensor, event_dim: int) -> None:
        """Create the parameters of a site, with ``put``.

        Args:
            name: the site.
            centre: the site's initial value on the real line, (*batch, *event).
            deviation: the initial standard deviation; it broadcasts against ``centre``.
            event_dim: number of event dimensions of ``centre``.
        """

    @abstractmethod
    def unconstrained(self, name: str, event_dim: int) -> dist.TorchDistribution:
        """The distribution of a site on the real line."""

    def put(self, kind: str, name: str, value: Tensor, event_dim: int) -> None:
        """Register the parameter ``kind`` of the site ``name``, whose last ``event_dim`` dimensions are one event."""
        value = value.clone(memory_format=torch.contiguous_format)
        # a PyroParam instead of a plain parameter: Pyro's own SVI looks for parameters that Pyro registered
        setattr(self, tensor_key(kind, name), PyroParam(value, event_dim=event_dim))

    def get(self, kind: str, name: str) -> Tensor:
        """The parameter ``kind`` of the site ``name``."""
        return getattr(self, tensor_key(kind, name))

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model = self.model
        # a site whose mean is an earlier site (the centred form) begins at that site's start, and not at a draw of it
        self._model = (InitMessenger(self._location)(model),)
        try:
            super()._setup_prototype(*args, **kwargs)
        finally:
            self._model = (model,)
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            transform = biject_to(site["fn"].support)
            centre = transform.inv(self._location(site))
            for frame in site["cond_indep_stack"]:
                full_size = frame.full_size or frame.size
                if full_size != frame.size:  # the model was first run on some of its tasks
                    centre = periodic_repeat(centre, full_size, frame.dim - site["fn"].event_dim)
            # the standard deviation of a logarithm is relative, so it needs no unit
            deviation = self._scale * (_unit(site["fn"]) if is_real(site["fn"].support) else torch.ones(()))
            self.begin(name, centre, _rows_of(deviation, centre), centre.dim() - len(site["fn"].batch_shape))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site. The arguments are the model's; the first call runs the model with them."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates, values = self._create_plates(*args, **kwargs), dict[str, Tensor]()
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    stack.enter_context(plates[frame.name])
                values[name] = pyro.sample(name, self._posterior(name, site["fn"], values, plates))
        return values

    def given(
        self, name: str, event_dim: int, values: Mapping[str, Tensor], plates: Mapping[str, pyro.plate]
    ) -> dist.TorchDistribution:
        """The distribution of a real site given the sites before it; in a mean-field guide it does not depend on them.

        Args:
            name: the site.
            event_dim: number of event dimensions.
            values: the sites that have been drawn so far.
            plates: the plates by name.
        """
        return self.unconstrained(name, event_dim)

    def _posterior(
        self, name: str, prior: dist.TorchDistribution, values: Mapping[str, Tensor], plates: Mapping[str, pyro.plate]
    ) -> dist.TorchDistribution:
        transform = biject_to(prior.support)
        if is_real(prior.support):
            return self.given(name, prior.event_dim, values, plates)
        base = self.unconstrained(name, transform.domain.event_dim)
        transformed = dist.TransformedDistribution(base, [transform])
        return transformed.to_event(prior.event_dim - transformed.event_dim)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The centre of every site."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        sites = self.prototype_trace.iter_stochastic_nodes()
        return {name: biject_to(site["fn"].support)(self.get("loc", name)).detach() for name, site in sites}


def tensor_key(kind: str, name: str) -> str:
    """The name of a guide's tensor ``kind`` of the site or latent ``name``, without dots, which torch does not allow."""
    return f"{kind}/{name.replace('.', '/')}"


def is_real(support: Any) -> bool:
    """Whether the support of a site's distribution is all real numbers, or all tensors of them."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def _unit(prior: Any) -> Tensor:
    """The prior's standard deviation: a number, or a tensor that broadcasts against the site."""
    while isinstance(prior, dist.Independent | dist.MaskedDistribution):
        prior = prior.base_dist
    return torch.tensor(FLAT_UNIT) if isinstance(prior, Flat) else prior.variance.sqrt()


def _rows_of(deviation: Tensor, centre: Tensor) -> Tensor:
    """The initial deviations with the device and precision of the centre.

    If the first run of the model had fewer rows than the centre, all rows get the deviations of the first one.
    """
    sizes = zip(reversed(deviation.shape), reversed(centre.shape), strict=False)
    fits = all(size in (1, centre_size) for size, centre_size in sizes)
    return (deviation if fits else deviation[:1]).to(centre)
