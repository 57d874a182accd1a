"""Fit adapters to rewards: the adapted model writes, a function rewards, and the hierarchical prior is the anchor.

>>> import bora_pyro as bp
>>> model = bp.BoRA(bp.Backbone.from_pretrained("builtin:nano"), 2, adapter=bp.LoRA(rank=1), prior=bp.HierarchicalNormal(tau=100))
>>> check_model(model)  # it can be fitted to rewards
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.callbacks import Callback
from bora_pyro.inference.continuation import Continuation
from bora_pyro.inference.fit import fit
from bora_pyro.inference.fitted import Fitted
from bora_pyro.inference.loop import usual_callbacks
from bora_pyro.inference.options import FitOptions
from bora_pyro.likelihoods.reward import NEGATIVE_REWARD, RewardObjective
from bora_pyro.model import BoRA, Weights
from bora_pyro.options.field import with_changes
from bora_pyro.rewards.judge import Reward, TextJudge
from bora_pyro.rewards.options import RewardOptions
from bora_pyro.rewards.prompts import PromptTexts, check_prompts
from bora_pyro.rewards.rollouts import Rollouts

# Added to the seed, so that held-out texts are no draws of a training step.
_VALIDATION = 2**31


def reward_fit(
    model: BoRA,
    data: TaskData,
    reward: Reward,
    options: RewardOptions | None = None,
    *,
    prompts: PromptTexts | None = None,
    sites: Mapping[str, Tensor] | None = None,
    checkpoints: Path | Continuation | None = None,
    stop: Callable[[], bool] | None = None,
    on_step: Callable[[dict[str, Any]], None] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    **changes: Any,
) -> Fitted:
    """Fit adapters by MAP, with rewards of what they write in place of the likelihood of given texts.

        >>> import bora_pyro as bp
        >>> from bora_pyro.rewards import RegexCount
        >>> backbone = bp.Backbone.from_pretrained("builtin:nano")
        >>> rows = [{"task": name, "text": f"Say {n} words"} for name in ("ada", "bob") for n in range(5)]
        >>> prompts = bp.load_tasks(bp.table(rows), backbone.tokenizer)
        >>> model = bp.BoRA(backbone, len(prompts.tasks), adapter=bp.LoRA(rank=2), prior=bp.HierarchicalNormal(tau=100))
        >>> few = {"epochs": 1, "samples": 2, "new_tokens": 2, "validation_samples": 1}
        >>> fitted = reward_fit(model, prompts, RegexCount("the"), **few)
        >>> sorted(name for name in fitted.history[0] if "reward" in name)
        ['reward', 'rewards', 'validation_reward', 'validation_reward_last']

    The objective is that of :class:`~bora_pyro.likelihoods.reward.RewardObjective` plus the log-prior of the adapters. A prompt
    counts as one document, so τ has the meaning that it has in a fit to as many documents. The validation prompts choose the
    epoch: the one with the largest mean reward is kept, the start included. Without validation prompts, the last epoch is.

    Args:
        model: the BoRA model, with a prior whose τ is given. Its likelihood does not matter.
        data: the prompts, read as texts (``load_tasks``). They may be of several tasks; a step has prompts of several.
        reward: any function ``(prompt, text, task) -> number``.
        options: the options; default: ``RewardOptions()``.
        prompts: the texts of the prompts as the reward gets them; default: they are decoded from their tokens.
        sites: values of the sample sites to begin at, as ``Fitted.sites()``; default: the adapters' usual start.
        checkpoints: a folder for checkpoints, as for :func:`~bora_pyro.inference.fit.fit`.
        stop: called after each step. If it returns true, the fit saves its state and stops.
        on_step: called after each step with the report of the epoch so far.
        on_epoch: called after each epoch with its report.
        changes: single options, for example ``epochs=3``.

    Returns:
        The fit, with the given model. Its history has for each epoch the mean ``reward`` of the training texts; ``rewards``, with
        mean and standard deviation by task; ``clipped``, the fraction of clipped ratios; ``kl``, the divergence from the base in
        nats a token; ``distance``, the mean over tasks of ‖θ_d − θ_d at the start‖; and ``validation_reward``.

    Raises:
        InputError: an option has a value that is not allowed; the prior learns τ; the adapter has dropout; the router reads texts
            by several tasks; the documents are no prompts; a reward is no finite number; or as for ``fit``.
    """
    plan = RewardFit.of(model, data, reward, with_changes(options or RewardOptions(), changes), prompts=prompts, sites=sites)

    def record(report: dict[str, Any]) -> None:
        name_rewards(report)
        if on_epoch:
            on_epoch(report)

    fitted = fit(
        plan.model,
        data,
        plan.options,
        guide=plan.guide,
        callbacks=plan.callbacks,
        steps=plan.rollouts.steps,
        checkpoints=checkpoints,
        stop=stop,
        on_step=on_step,
        on_epoch=record,
    )
    return plan.result(fitted)


@dataclasses.dataclass(frozen=True)
class RewardFit:
    """What a fit from rewards consists of, before it runs.

    Attributes:
        model: the model with the objective of rewards.
        given: the model with its own likelihood.
        guide: the point estimate that is fitted.
        rollouts: the steps, a callback.
        judge: writes and rewards the texts of held-out prompts.
        start: θ at the start, (D, layers, *shape) by name.
        options: the options of the loop.
    """

    model: BoRA
    given: BoRA
    guide: AutoDelta
    rollouts: Rollouts
    judge: TextJudge
    start: Weights
    options: FitOptions

    @classmethod
    def of(
        cls,
        model: BoRA,
        data: TaskData,
        reward: Reward,
        options: RewardOptions,
        *,
        prompts: PromptTexts | None = None,
        sites: Mapping[str, Tensor] | None = None,
    ) -> RewardFit:
        """Put a fit together. The arguments are those of :func:`reward_fit`.

        Raises:
            InputError: as for :func:`reward_fit`.
        """
        options.validate()
        check_model(model)
        check_prompts(model.backbone, data)
        judge = TextJudge(
            reward,
            data.tasks,
            prompts,
            new_tokens=options.new_tokens,
            samples=options.validation_samples,
            seed=(options.seed + _VALIDATION) % 2**32,
        )
        objective = RewardObjective(options.clip, options.ratio, options.kl_weight, judge=judge)
        trained = copy.copy(model)
        trained.likelihood = objective.with_task_weights(model.likelihood.task_weights)
        guide = map_guide(trained, sites)
        if sites is None:
            start = {name: value.expand(model.num_tasks, *value.shape) for name, value in model.starts.items()}
        else:
            start = model.weights_given(sites)[0]
        start = {name: value.detach().clone() for name, value in start.items()}
        rollouts = Rollouts(trained, guide, data, judge, options, start)
        return cls(trained, model, guide, rollouts, judge, start, options.fit_options)

    @property
    def callbacks(self) -> list[Callback]:
        """Those of the adapter and the router, and the rollouts."""
        return [*usual_callbacks(self.model), self.rollouts]

    def result(self, fitted: Fitted) -> Fitted:
        """The fit with the given model. A reward is no perplexity, so the validation score is in the history alone."""
        return dataclasses.replace(fitted, model=self.given, validation_score=None)


def check_model(model: BoRA) -> None:
    """Check that a model can be fitted to rewards.

    Raises:
        InputError: its prior learns τ, its router reads texts by several tasks, or its adapter has dropout.
    """
    if model.prior.every:
        raise InputError(
            "the prior learns tau from held-out texts, of which a fit from rewards has none; give a number for tau, such as 100"
        )
    if getattr(model.adapter, "dropout", 0.0):
        raise InputError(
            f"{model.adapter} drops inputs in a step and not where texts are written, so their probabilities would differ; give "
            "an adapter without dropout"
        )
    if model.router.reads_all_tasks:
        raise InputError(f"{model.router} reads a text by several tasks; a fit from rewards needs the router by_task")


def name_rewards(report: dict[str, Any]) -> None:
    """Turn the negative rewards of an epoch's report into rewards.

    >>> report = {"validation_negative_reward": -2.0}
    >>> name_rewards(report)
    >>> report
    {'validation_reward': 2.0}
    """
    for name in [name for name in report if NEGATIVE_REWARD.name in name]:
        report[name.replace(NEGATIVE_REWARD.name, "reward")] = -report.pop(name)
