"""The steps of a fit from rewards: the adapted model writes, the texts get rewards, and one or more steps follow.

In each epoch every training prompt is drawn once, in an order that the seed gives, so a step has prompts of several tasks. The
texts of all of them are written in one batch, each by the adapter of its task.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data.batch import Batch
from bora_pyro.data.rollout import Rollout
from bora_pyro.data.tasks import TaskData
from bora_pyro.errors import InputError
from bora_pyro.inference.callbacks import Callback, FitLoop
from bora_pyro.inference.schedule import epoch_seed, step_seed
from bora_pyro.likelihoods.policy import RewardBuffer, standardised
from bora_pyro.likelihoods.reward import RewardObjective, token_log_probs
from bora_pyro.model import BoRA, Weights
from bora_pyro.rewards.judge import TextJudge
from bora_pyro.rewards.options import BUFFER, RewardOptions
from bora_pyro.rewards.prompts import prompt_ids

# The tensors of the present rollout that a checkpoint stores, between steps with the same texts.
_STORED = (
    "input_ids", "attention_mask", "labels", "task", "index", "piece_share", "advantage", "sampled_log_prob", "base_log_prob",
)  # fmt: skip
_ROLLOUT = "rollout."


class Rollouts(Callback):
    """Writes the texts of each step and gives them advantages. It is also the callback that reports rewards and drift.

    Its state, and so a checkpoint, has the buffer of rewards, the sums of the epoch so far, and the present texts.

    Args:
        model: the model with the objective :class:`~bora_pyro.likelihoods.reward.RewardObjective`.
        guide: the guide of the fit, a point estimate.
        data: the prompts.
        judge: writes and rewards texts.
        options: the options of the fit.
        start: θ at the start of the fit, (D, layers, *shape) by name, from which the drift is measured.
    """

    name = "rollouts"

    def __init__(
        self, model: BoRA, guide: AutoGuide, data: TaskData, judge: TextJudge, options: RewardOptions, start: Weights
    ) -> None:
        self.model, self.guide, self.data, self.judge, self.options, self.start = model, guide, data, judge, options, start
        assert isinstance(model.likelihood, RewardObjective)
        self.objective = model.likelihood
        self.rounds = math.ceil(len(data.train) / options.prompts_per_step)
        self.buffer = None
        if options.baseline == BUFFER:
            self.buffer = RewardBuffer(len(data.train), size=options.buffer_size, least=options.buffer_least)
        self._begin_epoch()
        # epoch and round of the present texts
        self._of = torch.tensor([-1, -1])
        self._rollout: Rollout | None = None

    def _begin_epoch(self) -> None:
        # by task: number of texts, sum of their rewards, sum of squares; and the objective's counts
        self._rewards = torch.zeros((len(self.data.tasks), 3), dtype=torch.float64)
        self._counts = torch.zeros(4, dtype=torch.float64)

    def steps(self, epoch: int) -> Sequence[list[Batch]]:
        """The steps of an epoch. A step's texts are written when the step is read."""
        return _Steps(self, epoch)

    def step(self, epoch: int, number: int) -> list[Batch]:
        """The batches of one step."""
        place = number // self.options.inner_steps
        if self._rollout is None or self._of.tolist() != [epoch, place]:
            self._rollout = self._written(epoch, place)
            self._of = torch.tensor([epoch, place])
        return [*self._rollout.parts(self.options.token_budget)]

    @torch.no_grad()
    def _written(self, epoch: int, place: int) -> Rollout:
        options, train = self.options, self.data.train
        generator = torch.Generator().manual_seed(epoch_seed(options.seed, epoch))
        order = torch.randperm(len(train), generator=generator)
        drawn = order[place * options.prompts_per_step : (place + 1) * options.prompts_per_step]
        tokenizer = tokenizer_of(self.model.backbone)
        prompts = [prompt_ids(train.document(n), tokenizer) for n in drawn.tolist() for _ in range(options.samples)]
        task = train.task[drawn].repeat_interleave(options.samples)
        weights = self.weights()
        texts = self.judge.write(self.model, weights, prompts, task, task, seed=step_seed(options.seed, epoch, place))
        rewards = self.judge.rewards(self.model, prompts, texts, task)
        self._rewards.index_add_(0, task, torch.stack([torch.ones_like(rewards), rewards, rewards.square()], 1))
        rollout = Rollout.of(
            prompts,
            texts,
            task=task,
            advantage=self._advantages(drawn, rewards.view(len(drawn), -1)).flatten(),
            samples=options.samples,
            scale=float(self.rounds),
            pad_token_id=train.pad_token_id,
        )
        return self._with_log_probs(rollout, weights)

    def _advantages(self, prompt: Tensor, rewards: Tensor) -> Tensor:
        most = self.options.most_advantage
        return standardised(rewards, most=most) if self.buffer is None else self.buffer.advantages(prompt, rewards, most=most)

    def _with_log_probs(self, rollout: Rollout, weights: Weights) -> Rollout:
        """The rollout with the log-probabilities of its tokens, computed in the passes that the step will make.

        Before the first of its steps, ρ is then 1 without any rounding.
        """
        device, most = self.model.backbone.device, self.model.backbone.pass_tokens
        sampled = torch.zeros(rollout.labels.shape)
        base = sampled.clone()
        for whole in rollout.parts(self.options.token_budget):
            for part in whole.parts(most):
                batch = part.to(device)
                for found, adapters in ((sampled, weights), (base, None)):
                    log_prob = token_log_probs(self.model, adapters, batch).cpu()
                    found[part.index, : log_prob.shape[1]] = log_prob
        return replace(rollout, sampled_log_prob=sampled, base_log_prob=base)

    def weights(self) -> Weights:
        """θ of all tasks at the present state, (D, layers, *shape) by name."""
        return self.model.weights_given({name: value.detach() for name, value in self.guide.median().items()})[0]

    def after_step(self, loop: FitLoop) -> None:
        self._counts, self.objective.counts = self._counts + self.objective.counts, torch.zeros_like(self._counts)
        ratios, clipped, tokens, kl = self._counts.tolist()
        number, total, _ = self._rewards.sum(0).tolist()
        # a step with the same texts as the last one of a resumed epoch may have none of this epoch
        loop.report |= {"reward": total / max(number, 1), "clipped": clipped / max(ratios, 1), "kl": kl / max(tokens, 1)}

    def after_epoch(self, loop: FitLoop) -> None:
        found = {}
        for name, (number, total, squares) in zip(self.data.tasks, self._rewards.tolist(), strict=True):
            if number:
                mean = total / number
                found[name] = {"reward": mean, "reward_sd": math.sqrt(max(squares / number - mean**2, 0.0)), "texts": int(number)}
        distance = distances(self.weights(), self.start)
        loop.report |= {"rewards": found, "distance": float(distance.mean())}
        self._begin_epoch()

    def state(self) -> dict[str, Tensor]:
        found = {"rewards": self._rewards, "counts": self._counts, "of": self._of}
        if self.buffer is not None:
            found |= {"buffer": self.buffer.rewards, "added": self.buffer.added}
        if self._rollout is not None and self.options.inner_steps > 1:
            found |= {f"{_ROLLOUT}{name}": getattr(self._rollout, name) for name in _STORED}
        return {name: value.clone() for name, value in found.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        own = {name: value for name, value in state.items() if not name.startswith(_ROLLOUT)}
        expected = {name: value.shape for name, value in self.state().items() if not name.startswith(_ROLLOUT)}
        if {name: value.shape for name, value in own.items()} != expected:
            raise InputError(
                "the checkpoint's rewards are of other prompts, tasks or another buffer; give the options of its run, or start "
                "afresh with --overwrite true"
            )
        self._rewards, self._counts, self._of = own["rewards"], own["counts"], own["of"]
        if self.buffer is not None:
            self.buffer.rewards, self.buffer.added = own["buffer"], own["added"]
        stored: dict[str, Any] = {name.removeprefix(_ROLLOUT): state[name] for name in state.keys() - own.keys()}
        self._rollout = Rollout(**stored, scale=float(self.rounds)) if stored.keys() == {*_STORED} else None


class _Steps(Sequence[list[Batch]]):
    def __init__(self, rollouts: Rollouts, epoch: int) -> None:
        self._rollouts, self._epoch = rollouts, epoch

    def __len__(self) -> int:
        return self._rollouts.rounds * self._rollouts.options.inner_steps

    @overload
    def __getitem__(self, position: int) -> list[Batch]: ...
    @overload
    def __getitem__(self, position: slice) -> list[list[Batch]]: ...
    def __getitem__(self, position: int | slice) -> Any:
        if isinstance(position, slice):
            return [self[number] for number in range(*position.indices(len(self)))]
        if not 0 <= position < len(self):
            raise IndexError(position)
        return self._rollouts.step(self._epoch, position)


def distances(theta: Weights, start: Weights) -> Tensor:
    """‖θ_d − θ_d at the start‖ of each task, (D,).

    >>> distances({"B": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}, {"B": torch.zeros(2, 2)})
    tensor([5., 1.])
    """
    squares = [(theta[name] - start[name]).flatten(1).square().sum(-1) for name in theta]
    return torch.stack(squares).sum(0).sqrt().cpu()
