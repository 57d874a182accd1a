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
from bora_pyro.inference.averaging import weight_sum


class RowMeans:
    """The means of rows over the steps of a fit, each up to a step of its own.

    Args:
        zeros: a row of zeros by name, (1, *shape).
        num_rows: the number of rows.
        folder: folder of memory-mapped files; None: in memory.

    Attributes:
        values: the means by name.
        steps: the step up to which the mean of each row counts, (num_rows,).
    """

    def __init__(self, zeros: Mapping[str, Tensor], num_rows: int, *, folder: Path | None = None) -> None:
        self.values = {name: RowTensor(zero, num_rows, folder=folder) for name, zero in zeros.items()}
        self.steps = torch.zeros(num_rows, dtype=torch.int64)

    def stores(self) -> Iterator[RowTensor]:
        """All tensors with a row for each task."""
        yield from self.values.values()

    def extend(self, index: Tensor, rows: Mapping[str, Tensor], steps: int) -> None:
        """Bring the means of the rows ``index`` up to the step ``steps``; since their own step they have had these values."""
        kept = weight_sum(self.steps[index]) / weight_sum(max(steps, 1))
        for name, store in self.values.items():
            value = rows[name].detach()
            weight = (1 - kept).to(value).view(-1, *[1] * (value.dim() - 1))
            store.write(index, store.read(index).to(value).lerp(value, weight))
        self.steps[index] = steps
