"""The mean of each task's rows over the steps of a fit whose steps draw tasks (`averaging` has the weights).

A row that stayed the same from step s to step t adds its value with weight W_t − W_s. So a mean is brought up to date only when a
step changes its row, and before it is read.

>>> means = RowMeans({"x": torch.zeros(1, 1)}, 3)
>>> row = torch.tensor([1])
>>> means.extend(row, {"x": torch.tensor([[1.0]])}, steps=2)  # it was 1 in the first two steps
>>> means.extend(row, {"x": torch.tensor([[4.0]])}, steps=3)
>>> means.values["x"].read(row)  # (2 · 1 + 6 · 1 + 12 · 4) / 20
tensor([[2.8000]])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from bora_pyro.files.row_file import RowTensor
from bora_pyro.inference.averaging import GROUP, weight_sum
from bora_pyro.inference.spread import BEST, COLUMN, VARIANCE, Collection, extended


def copies_of(average: bool, collection: Collection | None) -> int:
    """How many numbers a fit keeps for each parameter of a task: itself, the best one, two moments, the mean, and the spread."""
    return 4 + average + (0 if collection is None else 2 * len(collection.groups()))


class RowMeans:
    """The means of rows over the steps of a fit, each up to a step of its own.

    Args:
        zeros: a row of zeros by name, (1, *shape).
        num_rows: the number of rows.
        folder: folder of memory-mapped files; None: in memory.
        collection: the steps that count, for a guide that is made of them; None: all steps.

    Attributes:
        values: the means by name.
        steps: the step up to which the mean of each row counts, (num_rows,).
        now: the spread around the means (`spread`), by group and name; empty without a collection.
        best: the spread that was kept.
    """

    def __init__(
        self,
        zeros: Mapping[str, Tensor],
        num_rows: int,
        *,
        folder: Path | None = None,
        collection: Collection | None = None,
    ) -> None:
        self.collection = collection

        def stores() -> dict[str, RowTensor]:
            return {name: RowTensor(zero, num_rows, folder=folder) for name, zero in zeros.items()}

        groups = [] if collection is None else collection.groups()
        self.values, self.now, self.best = stores(), {group: stores() for group in groups}, {group: stores() for group in groups}
        self.steps = torch.zeros(num_rows, dtype=torch.int64)

    def stores(self) -> Iterator[RowTensor]:
        """All tensors with a row for each task."""
        for group in self.groups().values():
            yield from group.values()

    def extend(self, index: Tensor, rows: Mapping[str, Tensor], steps: int) -> None:
        """Bring the means of the rows ``index`` up to the step ``steps``; since their own step they have had these values."""
        after = 0 if self.collection is None else self.collection.after
        kept = weight_sum((self.steps[index] - after).clamp(min=0)) / weight_sum(max(steps - after, 1))
        for name, store in self.values.items():
            value = rows[name].detach()
            part = (1 - kept).to(value).view(-1, *[1] * (value.dim() - 1))
            mean = store.read(index).to(value)
            if self.now:
                variances = self.now[VARIANCE][name]
                variances.write(index, extended(variances.read(index).to(value), value - mean, part))
            store.write(index, mean.lerp(value, part))
        self.steps[index] = steps

    def take_column(self, index: Tensor, rows: Mapping[str, Tensor], step: int) -> None:
        """Keep the deviations of the rows ``index`` from their means, which are up to date, as the column that a step gives."""
        assert self.collection is not None
        for name, column in self.now[COLUMN.format(self.collection.place(step))].items():
            value = rows[name].detach()
            column.write(index, value - self.values[name].read(index).to(value))

    def keep(self) -> None:
        """Store the current spread as the best one."""
        for group, stores in self.now.items():
            for name, store in stores.items():
                self.best[group][name].copy_from(store)

    def groups(self) -> dict[str, dict[str, RowTensor]]:
        """The tensors of a checkpoint, by group."""
        return {GROUP: self.values} | self.now | {f"{BEST}{group}": stores for group, stores in self.best.items()}
