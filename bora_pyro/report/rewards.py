"""What a fit from rewards measures, on its page: rewards by task before and after, the course of the fit, and the drift.

>>> found = {"reward": {"test_reward_before": -2.0, "test_reward_after": -1.5, "kl": 0.25, "clipped": 0.0}}
>>> [(number.label, number.text, number.note) for number in reward_numbers(found)][0]
('test reward', '−1.500', '−2.000 before the fit')
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bora_pyro.diagnostics import plots
from bora_pyro.files.text import replaced
from bora_pyro.report.blocks import Column, Folded, Number, Pictures, Section, Table, number_text
from bora_pyro.report.pictures import draw_picture


def reward_numbers(metrics: Mapping[str, Any]) -> Iterator[Number]:
    """The headline numbers: the reward of held-out prompts, and the drift from the base. None for another kind of run."""
    about = metrics.get("reward") or {}
    for split in ("test", "validation"):
        before, after = (about.get(f"{split}_reward_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            yield Number(f"{split} reward", number_text(after, 3), f"{number_text(before, 3)} before the fit")
    if about.get("kl") is not None:
        # the texts were written during the epoch, so the kept state may be further away
        note = "nats a token (KL), mean of the texts of the kept epoch"
        note += f"; {about['clipped']:.1%} of the ratios clipped" if about.get("clipped") is not None else ""
        yield Number("drift from the base", number_text(about["kl"], 3), note)


def reward_section(metrics: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Section:
    """The section with the rewards, which has no blocks for another kind of run.

    Args:
        metrics: the content of ``metrics.json``.
        history: the records of ``metrics.jsonl``.
    """
    about, history = metrics.get("reward"), [record for record in history if record.get("reward") is not None]
    if not about:
        return Section("rewards", "Rewards", [])
    blocks: list[Any] = [_by_task(metrics)]
    if history:
        best, caption = metrics.get("best_epoch"), "Mean reward of the texts that the model wrote to learn from during each epoch"
        if any(record.get("validation_reward") is not None for record in history):
            caption += ", and of those behind the validation prompts after it"
            caption += ". The fit kept the state of the epoch with the ring" if best else ". The fit kept its start"
        picture = draw_picture(
            "rewards",
            "Rewards by epoch",
            f"{caption}.",
            lambda ax: plots.reward_curves(history, ax, best_epoch=best),
        )
        blocks += [Pictures([picture]), _by_epoch(history), _by_epoch_and_task(history)]
    kept = f"The state after epoch {metrics['best_epoch']} is kept" if metrics.get("best_epoch") else "The start is kept"
    why = "it has the largest validation reward" if about.get("chosen_by") == "validation" else "there are no validation prompts"
    lead = f"Reward: {about.get('name')}. {kept}; {why}."
    return Section("rewards", "Rewards", blocks, replaced(lead))


def _by_task(metrics: Mapping[str, Any]) -> Table:
    """Rewards of the test prompts by task, or of the validation prompts of a run without test prompts."""
    about, tasks = metrics["reward"], [row for row in metrics["tasks"].values() if row.get("reward")]
    split = "test" if "test_reward_after" in about else "validation"

    def numbers(own: Mapping[str, Any]) -> list[float | None]:
        before, after = (own.get(f"{split}_reward_{when}") for when in ("before", "after"))
        change = None if before is None or after is None else after - before
        return [before, after, change, own.get(f"{split}_reward_sd_after"), own.get("distance")]

    columns = [Column("task"), Column("training prompts", 0), Column(f"{split} prompts", 0), Column("reward before", 3)]
    columns += [Column("reward after", 3), Column("change", 3, sign=True), Column("standard deviation after", 3)]
    columns += [Column("distance from the start", 2)]
    rows = [
        [replaced(row["name"]), row.get("train_documents"), row["reward"].get(f"{split}_prompts", 0), *numbers(row["reward"])]
        for row in tasks
    ]
    prompts = (sum(row[place] or 0 for row in rows) for place in (1, 2))
    caption = f"Mean reward of the texts behind the {split} prompts, by task, before and after the fit"
    return Table(caption, columns, rows, total=["all tasks", *prompts, *numbers(about)])


def _by_epoch(history: Sequence[Mapping[str, Any]]) -> Table:
    columns = [Column("epoch", 0), Column("reward", 3), Column("validation reward", 3), Column("clipped, %", 2)]
    columns += [Column("KL from the base, nats a token", 4), Column("distance from the start", 2)]
    rows = [
        [
            record.get("epoch"), record["reward"], record.get("validation_reward"),
            None if record.get("clipped") is None else 100 * record["clipped"], record.get("kl"), record.get("distance"),
        ]
        for record in history
    ]  # fmt: skip
    caption = "Epochs: mean reward of its training texts, of the validation prompts after it, and how far the adapters have moved"
    return Table(caption, columns, rows)


def _by_epoch_and_task(history: Sequence[Mapping[str, Any]]) -> Folded:
    columns = [Column("epoch", 0), Column("task"), Column("texts", 0), Column("reward", 3), Column("standard deviation", 3)]
    rows = [
        [record.get("epoch"), replaced(task), own["texts"], own["reward"], own["reward_sd"]]
        for record in history
        for task, own in (record.get("rewards") or {}).items()
    ]
    return Folded("Rewards by epoch and task", Table("The training texts of each epoch and task", columns, rows))
