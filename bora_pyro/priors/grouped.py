"""The hierarchical Normal with a level of groups between the tasks and Θ: speakers belong to parties, customers to industries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pyro
import torch
from torch import Tensor

from bora_pyro.errors import InputError, nearest, shown
from bora_pyro.priors.base import PerLatent, StandardNormal, check_tau, event, flat
from bora_pyro.priors.hierarchical import HierarchicalNormal
from bora_pyro.priors.learned import LearnedPrecision

#: The name of the prior in a configuration.
GROUPED = "grouped_normal"
# The first part of the names of what the prior learns of the groups.
_GROUP = "group"


class GroupedNormal(PerLatent):
    """θ_d ~ Normal(Θ_g(d), I/τ), Θ_g ~ Normal(Θ, I/τ_g) with p(Θ) ∝ 1: a hierarchy of three levels.

        >>> GroupedNormal(["Whig", "Democrat", "Whig"], tau=100, tau_group=1000)
        GroupedNormal(2 groups, tau=100, tau_group=1000)
        >>> GroupedNormal(["Whig", "Democrat", "Whig"])
        GroupedNormal(2 groups, tau=learned, tau_group=learned)

    Tasks of one group share more than tasks of different groups (Gelman and Hill, 2007, chapter 11, for models of three levels).
    Both levels are whitened: Θ_g = Θ + y_g/√τ_g and θ_d = Θ_g(d) + z_d/√τ, where y_g and z_d are standard Normal. With
    τ_g → ∞ all groups have the mean Θ, and this is :class:`~bora_pyro.priors.HierarchicalNormal`.

    Both τ can be learned from validation documents, as :class:`~bora_pyro.priors.LearnedPrecision` does it. The slope of a level
    is the derivative of the documents' log-likelihood with respect to the logarithm of a factor of that level's deviations. In a
    linear-Gaussian hierarchy with a flat Θ, the MAP is the posterior mean. The expected slope of both levels is then zero at the
    true τ and τ_g, because the deviations are functions of the training documents. What the groups share is known only as well as
    there are groups. Three groups say little about τ_g.

    Args:
        groups: the name of each task's group, (D,).
        tau: τ, the precision of a task around the mean of its group; None: learned.
        tau_group: τ_g, the precision of the mean of a group around Θ; None: learned.
        per: what has its own τ if it is learned, as for ``LearnedPrecision``. τ_g follows it, except that ``task`` is ``site``.
        start: where a learned τ starts.
        start_group: where a learned τ_g starts.

    Raises:
        InputError: there are fewer than two groups, or each task is a group of its own; a τ is 0, infinite, negative or not a
            number; or an argument of ``LearnedPrecision`` is wrong.
    """

    # θ and Θ do not determine the means of the groups
    per_latent = False

    def __init__(
        self,
        groups: Sequence[str],
        tau: float | None = None,
        tau_group: float | None = None,
        *,
        per: str = "site",
        start: float = 100.0,
        start_group: float = 100.0,
    ) -> None:
        #: The names of the groups, sorted.
        self.groups = tuple(sorted(set(groups)))
        if not 1 < len(self.groups) < len(groups):
            what = "each task is a group of its own" if len(self.groups) > 1 else f"there is one group, {shown(self.groups[0])}"
            raise InputError(f"{what}: a level of groups needs two groups or more, and one of several tasks; leave it out")
        check_level("tau", tau, "map the tasks' column to the groups instead, so that a group is a task")
        check_level("tau_group", tau_group, "leave the groups out, which is the same")
        #: The index of each task's group, (D,).
        self.member = torch.tensor([self.groups.index(name) for name in groups])
        self.tasks = LearnedPrecision(per, start) if tau is None else HierarchicalNormal(tau)
        per_group = "site" if per == "task" else per
        self.level = LearnedPrecision(per_group, start_group) if tau_group is None else HierarchicalNormal(tau_group)
        self.every = max(self.tasks.every, self.level.every)

    def sample(
        self, starts: Mapping[str, Tensor], tasks: pyro.plate, masks: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        groups, masks = self._plate(), masks or {}  # one plate, which every latent enters
        return {name: self._sample(name, start, tasks, groups, masks.get(name)) for name, start in starts.items()}

    def sample_latent(self, name: str, start: Tensor, tasks: pyro.plate, mask: Tensor | None = None) -> Tensor:
        return self._sample(name, start, tasks, self._plate(), mask)

    def _plate(self) -> pyro.plate:
        return pyro.plate("groups", len(self.groups), dim=-1)

    def _sample(self, name: str, start: Tensor, tasks: pyro.plate, groups: pyro.plate, mask: Tensor | None) -> Tensor:
        for level, rows in ((self.tasks, len(self.member)), (self.level, len(self.groups))):
            if isinstance(level, LearnedPrecision):
                level.begin(name, start, rows)
        prior_mean = pyro.sample(f"prior_mean.{name}", flat(start, start.dim(), mask))
        zeros, ones = torch.zeros_like(start), torch.ones_like(start)
        with groups:
            white = event(StandardNormal(zeros, ones), start.dim(), self._of_groups(mask, start), groups)
            deviation_of_group = pyro.sample(f"group.{name}_decentered", white)
        of_groups = self.group_precision(name, start) ** -0.5 * deviation_of_group
        tau = self.precision(name, start)
        with tasks:
            white = event(StandardNormal(zeros, ones), start.dim(), mask, tasks)
            deviation = pyro.sample(f"theta.{name}_decentered", white)
            centre = prior_mean + self.of_tasks(of_groups, tasks.indices)
            scale = (tau[tasks.indices] if tau.dim() > start.dim() else tau) ** -0.5
            return pyro.deterministic(f"theta.{name}", centre + scale * deviation, event_dim=start.dim())

    def _of_groups(self, mask: Tensor | None, start: Tensor) -> Tensor | None:
        """The mask of the groups: an entry is active if it is active in any task of the group."""
        if mask is None or mask.dim() == start.dim():
            return mask
        return torch.stack([mask[(self.member == group).to(mask.device)].any(0) for group in range(len(self.groups))])

    def of_tasks(self, of_groups: Tensor, tasks: Tensor | None = None) -> Tensor:
        """What the groups have, (G, layers, *shape), for each task, (tasks, layers, *shape); ``tasks`` None: all of them."""
        member = self.member if tasks is None else self.member[tasks.to(self.member.device)]
        return of_groups[member.to(of_groups.device)]

    def mean_of(self, name: str, sites: Mapping[str, Tensor], theta: Tensor) -> Tensor:
        return sites[f"prior_mean.{name}"]

    def sites_of(self, name: str, theta: Tensor, mean: Tensor) -> dict[str, Tensor]:
        """Values of the sites for given θ and Θ. The means of the groups, which these do not determine, are at their mode."""
        tau, tau_group = self.precision(name, mean), self.group_precision(name, mean)
        member = self.member[: len(theta)].to(theta.device)
        weight = tau.expand_as(theta) if tau.dim() <= mean.dim() else tau[: len(theta)].expand_as(theta)
        sums = theta.new_zeros((2, len(self.groups), *mean.shape))
        sums[0].index_add_(0, member, weight * (theta - mean))
        sums[1].index_add_(0, member, weight)
        of_group = sums[0] / (tau_group + sums[1])  # Θ_g − Θ
        return {
            f"prior_mean.{name}": mean,
            f"group.{name}_decentered": tau_group**0.5 * of_group,
            f"theta.{name}_decentered": weight**0.5 * (theta - mean - of_group[member]),
        }

    def precision(self, name: str, start: Tensor, sites: Mapping[str, Tensor] | None = None) -> Tensor:
        """τ of the latent ``name``: the precision of a task around the mean of its group."""
        return self.tasks.precision(name, start)

    def group_precision(self, name: str, start: Tensor) -> Tensor:
        """τ_g of the latent ``name``, which broadcasts against (G, layers, *shape)."""
        return self.level.precision(name, start)

    def group_deviations(self, sites: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Θ_g − Θ of every group, in the order of ``groups``: (G, layers, *shape) by name of the latent.

        Args:
            sites: values of the sample sites.
            names: names of the latents.
        """
        white = {name: sites[f"group.{name}_decentered"] for name in names}
        return {name: self.group_precision(name, value[0]) ** -0.5 * value for name, value in white.items()}

    def of_new_task(
        self, sites: Mapping[str, Tensor], means: Mapping[str, Tensor], *, group: str | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A task of a known group has the mean Θ_g and the precision τ.

        A task of no known group has the mean Θ and the variance 1/τ_g + 1/τ, because its group is new too.
        """
        if group is not None and group not in self.groups:
            known = ", ".join(map(shown, self.groups[:8])) + (", ..." if len(self.groups) > 8 else "")
            raise InputError(f"there is no group {shown(group)}; the fit has {known}{nearest(group, self.groups)}")
        _, precisions = super().of_new_task(sites, means)
        if group is None:
            of_group = {name: self.group_precision(name, mean) for name, mean in means.items()}
            return dict(means), {name: 1 / (1 / tau + 1 / of_group[name]) for name, tau in precisions.items()}
        own = {name: value[self.groups.index(group)] for name, value in self.group_deviations(sites, list(means)).items()}
        return {name: mean + own[name] for name, mean in means.items()}, precisions

    def centre(self, name: str, sites: Mapping[str, Tensor]) -> Tensor:
        return sites[f"prior_mean.{name}"] + self.of_tasks(self.group_deviations(sites, [name])[name])

    def average(self, sites: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> dict[str, Tensor]:
        of_tasks = {name: self.of_tasks(value) for name, value in self.group_deviations(sites, [*theta]).items()}
        return {name: of_tasks[name] + (value - of_tasks[name]).mean(0) for name, value in theta.items()}

    def learn(
        self,
        deviations: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        task: Tensor,
        *,
        sites: Mapping[str, Tensor] | None = None,
        all_reduce: Callable[[Tensor], Tensor] = lambda value: value,
    ) -> None:
        assert sites is not None
        names = list(deviations)
        # before τ changes: the deviations of the groups depend on τ_g
        of_tasks = {name: self.of_tasks(value) for name, value in self.group_deviations(sites, names).items()}
        of_groups = {name: (value - value.mean(0))[task] for name, value in of_tasks.items()}
        self.tasks.learn(deviations, gradients, task, all_reduce=all_reduce)
        self.level.learn(of_groups, gradients, task, all_reduce=all_reduce)

    def state(self) -> dict[str, Tensor]:
        found = self.tasks.state()
        for name, value in self.level.state().items():
            kind, _, key = name.partition(".")
            found[f"{kind}.{_GROUP}.{key}"] = value
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        of_level = {}
        for name, value in state.items():
            kind, _, key = name.partition(".")
            if key.startswith(f"{_GROUP}."):
                of_level[f"{kind}.{key.removeprefix(f'{_GROUP}.')}"] = value
        self.level.load_state(of_level)
        self.tasks.load_state({name: value for name, value in state.items() if f".{_GROUP}." not in name})

    def __repr__(self) -> str:
        tau, tau_group = (
            "learned" if isinstance(level, LearnedPrecision) else f"{level.tau:g}" for level in (self.tasks, self.level)
        )
        return f"GroupedNormal({len(self.groups)} groups, tau={tau}, tau_group={tau_group})"


def check_level(name: str, tau: float | None, instead: str) -> None:
    """Check the precision of a level of groups, or of the tasks below it: learned, or a finite number above 0.

    >>> check_level("tau_group", float("inf"), "leave the groups out, which is the same")
    Traceback (most recent call last):
    bora_pyro.errors.InputError: tau_group inf is no level of groups; leave the groups out, which is the same

    Raises:
        InputError: it is 0, infinite, negative or not a number.
    """
    if tau is None:
        return
    check_tau(tau)
    if tau == 0:
        raise InputError(f"{name} 0 is no level of groups: nothing would be shared at it; give a number above 0, or learn it")
    if math.isinf(tau):
        raise InputError(f"{name} inf is no level of groups; {instead}")
