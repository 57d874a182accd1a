"""Compare draws of two posteriors: entries of the adapters, next-token probabilities, and diagnostics of chains."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from bora_pyro import BoRA
from bora_pyro.data.batch import IGNORED, Batch
from bora_pyro.model import Weights

#: Values of the model's sites by name.
Sites = dict[str, Tensor]


def entries(model: BoRA, draws: Iterable[Sites]) -> dict[str, Tensor]:
    """Concatenate the entries of all latents, for each draw.

    Returns:
        ``mean``, Θ of shape (draws, 1, entries), and ``deviation`` and ``theta`` of shape (draws, D, entries).
    """
    rows: dict[str, list[Tensor]] = {"mean": [], "deviation": [], "theta": []}
    for sites in draws:
        theta, mean = model.weights_given(sites)
        own = torch.cat([value.flatten(1) for value in theta.values()], 1)
        common = torch.cat([value.flatten() for value in mean.values()])[None]
        for name, value in (("mean", common), ("deviation", own - common), ("theta", own)):
            rows[name].append(value)
    return {name: torch.stack(values).double() for name, values in rows.items()}


@torch.no_grad()
def probabilities(model: BoRA, batch: Batch, draws: Iterable[Weights | None]) -> Tensor:
    """Next-token probabilities of the mixture of draws at every predicted position: (tokens, vocabulary)."""
    predicted = batch.labels[:, 1:] != IGNORED
    return torch.stack([model.logits(batch, weights)[:, :-1][predicted].softmax(-1) for weights in draws]).mean(0)


def compare(
    counts: Sequence[int], reference: dict[str, Tensor], found: dict[str, Tensor]
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Compare posterior means and standard deviations.

    Args:
        counts: number of documents of each task.
        reference: entries of the draws of NUTS, from :func:`entries`.
        found: entries of the draws of a guide.

    Returns:
        A table with a row for each entry, and the errors and ratios of the summary by column.
    """
    tables, numbers = [], {}
    for quantity, values in reference.items():
        nuts_mean, nuts_sd, mean, sd = values.mean(0), values.std(0), found[quantity].mean(0), found[quantity].std(0)
        for d, documents in enumerate([0] if quantity == "mean" else counts):
            columns = {"nuts_mean": nuts_mean[d], "nuts_sd": nuts_sd[d], "mean": mean[d], "sd": sd[d]}
            of = {"quantity": quantity, "documents": documents, "entry": range(len(mean[d]))}
            tables.append(pd.DataFrame(of | {name: value.numpy() for name, value in columns.items()}))
            ratio = float((sd[d] / nuts_sd[d]).log().mean().exp())
            numbers[quantity if quantity == "mean" else f"{quantity}_{documents}"] = ratio
            if quantity == "theta":
                error = (mean[d] - nuts_mean[d]) / nuts_sd[d]
                numbers[f"error_{documents}"] = float(error.square().mean().sqrt())
    return pd.concat(tables, ignore_index=True), numbers


def diagnostics(model: BoRA, chains: Sequence[list[Sites]]) -> dict[str, float]:
    """The largest r-hat and the smallest effective sample size over all entries of Θ, θ and the deviations (ArviZ)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        import arviz  # imported here because it takes seconds
    drawn = [entries(model, chain) for chain in chains]
    data = arviz.convert_to_dataset({name: torch.stack([chain[name] for chain in drawn]).numpy() for name in drawn[0]})
    r_hat = max(float(value.max()) for value in arviz.rhat(data).values())
    ess = min(float(value.min()) for kind in ("bulk", "tail") for value in arviz.ess(data, method=kind).values())
    return {"r_hat": r_hat, "ess": ess}
