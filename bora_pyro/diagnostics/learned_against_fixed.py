"""How good a learned τ is: its test perplexity against that of the fixed τ of a sweep, paired by seed.

Two fixed τ are named. The *oracle* has the lowest test perplexity. It was chosen with the test documents, which nobody can do in
practice. The other one is *chosen by validation*, as a user would choose.
"""

from __future__ import annotations

import pandas as pd

from bora_pyro.diagnostics.sweep_table import LEARNED, at_best_rates, runs, tau_order

ORACLE, CHOSEN = "oracle", "chosen by validation"


def fixed_taus(table: pd.DataFrame) -> dict[str, str]:
    """The fixed τ of lowest mean test perplexity (the oracle) and that of lowest mean validation perplexity.

        >>> from bora_pyro.diagnostics.sweep_table import COLUMNS, sweep_table
        >>> rows = [("1", 21.0, 20.0), ("100", 19.0, 19.5), ("1000", 20.0, 18.0), ("learned", 18.0, 18.9)]
        >>> values = [{"tau": tau, "validation_perplexity": val, "test_perplexity": test} for tau, val, test in rows]
        >>> table = sweep_table([dict.fromkeys(COLUMNS, 1) | row for row in values])
        >>> fixed_taus(table)
        {'oracle': '1000', 'chosen by validation': '100'}

    Each τ is at its best learning rate, and the means are over the seeds that all fixed τ have.

    Args:
        table: a sweep, as :func:`~bora_pyro.diagnostics.sweep_table.read_sweep` returns it.

    Returns:
        τ by name, ``ORACLE`` and ``CHOSEN``; empty if the sweep has fewer than two fixed τ or no seed that all of them have.
    """
    chosen = runs(at_best_rates(table))
    found = {}
    for name, column in ((ORACLE, "test_perplexity"), (CHOSEN, "validation_perplexity")):
        by_tau = _of_shared_seeds(chosen, column)
        if len(by_tau) > 1 and by_tau.shape[1]:
            means = by_tau.mean(axis="columns").sort_index(key=lambda names: names.map(tau_order))
            found[name] = str(means.idxmin())
    return found


def _of_shared_seeds(chosen: pd.DataFrame, column: str) -> pd.DataFrame:
    """The values of a column by fixed τ, for each seed that all fixed τ have."""
    return chosen[chosen.tau != LEARNED].pivot(index="tau", columns="seed", values=column).dropna(axis="columns")


def ratios(table: pd.DataFrame, tau: str) -> pd.Series:
    """The test perplexity of the learned τ divided by that of a fixed τ, by seed, each at its best learning rate."""
    chosen = runs(at_best_rates(table)).set_index("seed")
    learned, fixed = (chosen.test_perplexity[chosen.tau == name] for name in (LEARNED, tau))
    return (learned / fixed).dropna()


def lines_of_learned(table: pd.DataFrame) -> list[str]:
    """One line for each of the two fixed τ: its name, its value, and the ratio of the learned τ to it, mean ± sd over seeds."""
    lines, shared = [], _of_shared_seeds(runs(at_best_rates(table)), "test_perplexity").shape[1]
    for name, tau in fixed_taus(table).items():
        values = ratios(table, tau)
        if len(values):
            spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
            seeds = f"{len(values)} seed{'s' * (len(values) > 1)}"
            meaning = "lowest test perplexity, an oracle" if name == ORACLE else name
            if shared < len(values):  # some τ was fitted with fewer seeds
                meaning += f", by the {shared} seed{'s' * (shared > 1)} that all tau have"
            lines.append(f"learned against tau = {tau} ({meaning}): test perplexity {values.mean():.3f}{spread} times ({seeds})")
    return lines
