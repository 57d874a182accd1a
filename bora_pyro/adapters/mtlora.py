"""MTLoRA (Agiza et al., 2024, arXiv 2403.20320): a low-rank change for all tasks, and one of its own rank and scale for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from bora_pyro.adapters.base import Factors
from bora_pyro.adapters.layer_options import ChosenLayers, check_kinds, check_rank, read_ranks
from bora_pyro.adapters.shared_plus_task import OWN, SHARED, SharedPlusTaskLoRA, start_of_pair
from bora_pyro.adapters.task_ranks import Ranks, SameRanks, ranks_by_name, ranks_of
from bora_pyro.backbone.layer_tensors import Start
from bora_pyro.backbone.slots import Slot
from bora_pyro.errors import InputError, check_at_least, shown


@dataclass(frozen=True)
class MTLoRA(SharedPlusTaskLoRA):
    """W = W_full + s_0 B_0 A_0 + s_d B_d A_d: a task-agnostic and a task-specific pair, of ranks and scales of their own.

        >>> MTLoRA(rank=8, task_rank=2)
        MTLoRA(rank=8, alpha=8.0, task_rank=2)
        >>> adapter, slot = MTLoRA(rank=8, task_rank=2), Slot("q_proj", ("q_proj",), 16, 32)
        >>> start = adapter.start(slot, None, torch.Generator())
        >>> {name: tuple(value.shape) for name, value in start.latents.items()}
        {'shared_A': (8, 16), 'shared_B': (32, 8), 'lora_A': (2, 16), 'lora_B': (32, 2)}

    Tasks may differ in rank. The latents have the largest rank, and masks leave out the rest:

        >>> adapter = MTLoRA(rank=8, task_ranks={"ada": 1, "bob": 3}).for_tasks(["ada", "bob"])
        >>> adapter.start(slot, None, torch.Generator()).masks["lora_A"][..., 0].int().tolist()
        [[1, 0, 0], [1, 1, 1]]

    With default options it is :class:`~bora_pyro.adapters.SharedPlusTaskLoRA`, bit for bit. All tasks together have
    (r_0 + Σ_d r_d) (in + out) active latents in a layer. In LoRA's form (``factors``) the two pairs are one of rank r_0 + r_d,
    [A_0; A_d] and [B_0, (s_d/s_0) B_d]. So every task is merged and exported exactly. Its PEFT folder has the rank r_0 + r_d of
    the task, and that of Θ has the largest one.

    **The prior.** ``shared_A`` and ``shared_B`` have one value for all tasks and a flat prior: MTLoRA has no τ of the shared
    part, and neither has this adapter. Any prior is on the task's own pair, and τ, fixed or learned, is that of this pair. MTLoRA
    has no prior; it is ``Independent()`` (τ = 0). BoRA's hierarchy is another model: it centres the factors, and
    (B + b)(A + a) ≠ BA + ba. Under τ = 0, Θ is the average of the tasks, in which an inactive entry counts with its start.

    **Weights of the tasks.** The paper's loss is Σ_d w_d L_d: these w_d are ``--task_weights`` (``CausalLM(task_weights=...)``).

    **New tasks** have the largest rank of the tasks of the fit.

    **Learned scales** (``trainable_scales``). The latents are log(s_0/σ_0) and log(s_d/σ_d) for the given scales σ, one number a
    layer each, which start at 0. The first has a flat prior and is common to all tasks; the second has the prior of the task's
    own pair, with a τ of its own where τ is learned by site. The released code learns s itself, which can become negative.

    **What the paper does otherwise.** It adapts a vision transformer that has a stream of activations for each task. In its
    default mode (``matrix`` in the released code) a layer with task-specific pairs gives each of these streams
    W x_d + s_d B_d A_d x_d without the shared change, and the shared stream W x + s_0 B_0 A_0 x, which goes on to the next stage.
    A decoder that reads a text of one task has one stream: either change alone would make the other one unused in that layer.
    So that mode is not built, and the sum of both changes (``matrixv2`` in the released code) is used. The paper puts
    task-specific pairs into the last block of each stage, on the output projection and the feed-forward layers, with r_0 = 64,
    r_d = 4 and both scales 4, which are not α/r. For OPT that is
    ``MTLoRA(rank=64, task_rank=4, shared_scale=4, task_scale=4, task_layers="-1 out_proj fc1 fc2")``. Its dropout of 0.05 is left
    out, as the prior is the only regulariser here.

    Args:
        rank: r_0, the rank of the shared pair.
        alpha: α; the scale of the shared pair is α/r_0. Default: the rank, so that the scale is 1.
        task_rank: r_d of all tasks, or with ``task_ranks`` of those that are not named there. Default: the rank of the shared
            pair in the layer.
        shared_scale: s_0 itself, in the place of ``alpha``.
        task_scale: s_d. Default: s_0.
        trainable_scales: learn the scales.
        task_ranks: r_d by name of the task; or a file: a table with columns ``task`` and ``rank``, or a .yaml or .json mapping.
            The model knows tasks by number: call :meth:`for_tasks`. Or the ranks in the order of the tasks.
        module_ranks: ranks by kind of layer, ``kind:r_0`` or ``kind:r_0/r_d`` with commas or spaces between them, for example
            ``fc1:16/4, q_proj:8``. They go before ``rank`` and ``task_rank``. The scales do not depend on them.
        task_layers: the layers with a task's own pair: numbers of blocks (-1 is the last one), ranges as in Python (``-4:``) and
            kinds of layers, with commas or spaces between them. A layer has one if it is in one of the blocks and of one of the
            kinds. In other layers the shared pair acts alone. Default: all layers.

    Raises:
        InputError: a rank or a scale is out of range; ``alpha`` and ``shared_scale``, or ``module_ranks`` and ``task_ranks``, say
            different things; a text cannot be read; or (from ``check`` and ``for_tasks``) a task, a block or a kind of layer does
            not exist.

    Source: Agiza, Neseem and Reda, "MTLoRA: A Low-Rank Adaptation Approach for Efficient Multi-Task Learning", CVPR 2024.
    """

    shared: ClassVar[tuple[str, ...]] = ("shared_A", "shared_B", "shared_log_scale")

    task_rank: int | None = None
    shared_scale: float | None = None
    task_scale: float | None = None
    trainable_scales: bool = False
    task_ranks: Mapping[str, int] | Sequence[int] | str | Path | None = None
    module_ranks: str | None = None
    task_layers: str | None = None

    def __post_init__(self) -> None:
        check_at_least("rank", self.rank, 1)
        for name in ("shared_scale", "task_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}; give a finite number above 0, for example 1")
        if self.shared_scale is not None:
            alpha = self.shared_scale * self.rank
            if self.alpha not in (None, alpha):
                raise InputError(
                    f"alpha {self.alpha:g} is the scale alpha/rank = {self.alpha / self.rank:g}, and shared_scale is "
                    f"{self.shared_scale:g}; give one of them"
                )
            object.__setattr__(self, "alpha", alpha)
        super().__post_init__()
        if self.task_rank is not None:
            check_rank("task_rank", self.task_rank)
        self._check_task_ranks()
        if self.task_layers is not None:
            ChosenLayers.read("task_layers", self.task_layers)

    def _check_task_ranks(self) -> None:
        given, by_kind = self.task_ranks, self._by_kind
        if given is None:
            return
        if isinstance(given, Path):
            object.__setattr__(self, "task_ranks", str(given))
        elif not given:
            raise InputError(f"task_ranks is {shown(given)}; give the rank of each task, or a file with them, or leave it out")
        elif not isinstance(given, Mapping | str):
            if self.task_rank is not None:
                raise InputError(f"task_rank is {self.task_rank}, and task_ranks has the rank of every task; leave task_rank out")
            object.__setattr__(self, "task_ranks", Ranks(check_rank("a rank in task_ranks", rank) for rank in given))
        for kind, (shared, own) in by_kind.items():
            if own is not None:
                raise InputError(
                    f"task_ranks gives the rank of each task, and module_ranks that of the tasks in {kind}; give {kind}:{shared} "
                    "alone"
                )

    @property
    def _by_kind(self) -> dict[str, tuple[int, int | None]]:
        return {} if self.module_ranks is None else read_ranks("module_ranks", self.module_ranks)

    @property
    def _own_layers(self) -> ChosenLayers:
        """The layers with a task's own pair."""
        return ChosenLayers("task_layers") if self.task_layers is None else ChosenLayers.read("task_layers", self.task_layers)

    def for_tasks(self, tasks: Sequence[str] | None) -> MTLoRA:
        given = self.task_ranks
        if isinstance(given, Ranks):
            return self if tasks is not None else replace(self, task_ranks=None, task_rank=max(given))
        if not isinstance(given, Mapping | str):
            return self
        if tasks is None:
            return replace(self, task_ranks=None, task_rank=max(self.task_rank or 1, *ranks_by_name(given).values()))
        return replace(self, task_ranks=ranks_of(given, tasks, self.task_rank), task_rank=None)

    def check(self, slots: Sequence[Slot], num_tasks: int) -> None:
        if isinstance(self.task_ranks, Mapping | str):
            raise InputError("task_ranks names tasks, which a model knows by number; give adapter.for_tasks(data.tasks)")
        if self.task_ranks is not None and len(self.ranks(slots[0])[1]) != num_tasks:
            raise InputError(f"task_ranks is {self.task_ranks}, and the model has {num_tasks} tasks; give one rank for each")
        check_kinds("module_ranks", list(self._by_kind), slots)
        self._own_layers.check(slots)

    def ranks(self, slot: Slot) -> tuple[int, Sequence[int]]:
        """r_0 of a kind of layer, and r_d: one number for all tasks, or one for each of them."""
        shared, own = self._by_kind.get(slot.name, (self.rank, None))
        if isinstance(self.task_ranks, Ranks):
            return shared, self.task_ranks
        return shared, (own or self.task_rank or shared,)

    def start(self, slot: Slot, weight: Callable[[], Tensor], generator: Generator) -> Start:
        shared, own = self.ranks(slot)
        chosen = self._own_layers
        latents = start_of_pair(SHARED, shared, slot, generator)
        if self.trainable_scales:
            latents[f"{SHARED}_log_scale"] = torch.zeros(1)
        if not (number := chosen.number(slot)):
            return Start(latents)
        latents |= start_of_pair(OWN, max(own), slot, generator)
        if self.trainable_scales:
            latents[f"{OWN}_log_scale"] = torch.zeros(1)
        here, masks = chosen.has(slot, slot.paths[0]), dict[str, Tensor]()
        by_layer = number < len(slot.kind_paths or slot.paths)
        if by_layer or len(set(own)) > 1:
            ranks = torch.tensor(own) if len(set(own)) > 1 else torch.tensor(own[0])
            active = (torch.arange(max(own)) < ranks[..., None]) & here  # (r,), or (D, r)
            masks = {f"{OWN}_A": active[..., :, None], f"{OWN}_B": active[..., None, :]}
        if by_layer and self.trainable_scales:
            masks[f"{OWN}_log_scale"] = torch.tensor([here])
        return Start(latents, masks=masks)

    def relative_scale(self, pair: str, tensors: Mapping[str, Tensor]) -> float | Tensor:
        given = 1.0 if pair == SHARED or self.task_scale is None else self.task_scale / self.scaling
        log = tensors.get(f"{pair}_log_scale")
        return given if log is None else given * log.exp()[..., None]

    @property
    def own_scaling(self) -> float | None:
        return None if self.trainable_scales else self.scaling * float(self.relative_scale(OWN, {}))

    def linear_maps(self, x: Tensor, gradient: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]] | None:
        return None if self.trainable_scales else super().linear_maps(x, gradient, tensors)

    def from_factors(self, factors: Factors, fixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.task_ranks is not None or self.module_ranks is not None or self.task_layers is not None:
            raise InputError(f"LoRA matrices cannot be read as {self}, whose layers or tasks differ; read them as plain LoRA")
        found = super().from_factors(factors, fixed)
        found[f"{OWN}_B"] = found[f"{OWN}_B"] / self.relative_scale(OWN, {})
        scales: dict[str, Any] = {f"{pair}_log_scale": torch.zeros(1) for pair in (SHARED, OWN) if self.trainable_scales}
        return found | scales

    def kept_per_token(self, slot: Slot) -> int:
        shared, own = self.ranks(slot)
        return shared + max(own) * (self._own_layers.number(slot) > 0)

    def kept_per_row(self, slot: Slot) -> int:
        # the B that is multiplied by a learned scale
        return self.kept_per_token(slot) * slot.out_features if self.trainable_scales else 0

    def callbacks(self) -> Sequence[Any]:
        return [SameRanks(self.task_ranks)] if isinstance(self.task_ranks, Ranks) else []

    def __repr__(self) -> str:
        given = [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]
        return f"MTLoRA({', '.join(f'{name}={getattr(self, name)!r}' for name in given)})"
