"""What a model writes behind held-out prompts: its rewards, its length, and how far it is from the base.

>>> numbers_text([256, -2.06251])
'256 -2.0625'
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from bora_pyro import BoRA
from bora_pyro.backbone.texts import tokenizer_of
from bora_pyro.data import TokenSplit
from bora_pyro.data.rollout import Rollout
from bora_pyro.likelihoods.reward import token_log_probs, written_tokens
from bora_pyro.rewards.judge import TextJudge
from bora_pyro.rewards.prompts import prompt_ids

# Tokens of a pass that measures texts.
_TOKENS = 4096


@torch.no_grad()
def about_texts(
    model: BoRA, theta: dict[str, Tensor] | None, prompts: TokenSplit, judge: TextJudge, *, samples: int
) -> dict[str, Any]:
    """Write texts behind prompts, always with the same seed, and measure them.

    Args:
        model: the model.
        theta: θ of all tasks, (D, layers, *shape) by name; None: the base.
        prompts: the prompts.
        judge: writes and rewards the texts.
        samples: number of texts behind each prompt.

    Returns:
        ``test_reward``, the mean; ``task_rewards``, that of each task; ``tokens``, of a text, the end token included; and in nats
        a written token ``entropy``, the mean of −log p, and ``kl``, that of log p − log q, with p of the adapters and q of the
        base.
    """
    tokenizer, task = tokenizer_of(model.backbone), prompts.task.repeat_interleave(samples)
    ids = [prompt_ids(prompts.document(n), tokenizer) for n in range(len(prompts)) for _ in range(samples)]
    texts = judge.write(model, theta, ids, task, task, seed=0)
    rewards = judge.rewards(model, ids, texts, task)
    rollout = Rollout.of(ids, texts, task=task, advantage=torch.zeros(len(ids)), samples=samples, scale=1.0)
    own = base = tokens = 0.0
    for part in rollout.parts(_TOKENS):
        batch = part.to(model.backbone.device)
        written = written_tokens(batch)
        own += float((token_log_probs(model, theta, batch) * written).sum())
        base += float((token_log_probs(model, None, batch) * written).sum())
        tokens += float(written.sum())
    return {
        "test_reward": float(rewards.mean()),
        "task_rewards": numbers_text(float(rewards[task == d].mean()) for d in range(prompts.num_tasks)),
        "tokens": tokens / len(ids),
        "entropy": -own / tokens,
        "kl": (own - base) / tokens,
    }


def numbers_text(values: Iterable[float]) -> str:
    """Numbers as a cell of the table."""
    return " ".join(f"{value:.5g}" for value in values)
