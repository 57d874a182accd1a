"""The style of the figures: one palette, one set of matplotlib settings, and an axis for τ.

>>> import matplotlib.pyplot as plt
>>> with style():
...     figure, ax = plt.subplots()
>>> tau_axis(ax, ["0", "1", "10", "inf"])
{'0': 0.1, '1': 1.0, '10': 10.0, 'inf': 100.0}
>>> plt.close(figure)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.rcsetup import cycler
from matplotlib.ticker import NullLocator

# The colours of Okabe and Ito, which people with common colour blindness can distinguish.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9"
BLACK, GREY, LIGHT, LIGHT_BLUE = "#000000", "#666666", "#A8A8A8", "#9CC9E8"
PALETTE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 2)), (0, (3, 1)))
SMALL = 8.0  # the smallest font size, in points

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=PALETTE),
    "lines.linewidth": 1.5,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 160,
}


def style() -> AbstractContextManager[None]:
    """A context manager with the matplotlib settings for these figures. Make the figure and draw inside it."""
    return mpl.rc_context(STYLE)


def tau_axis(ax: Axes, taus: Iterable[str], *, also: Iterable[float] = ()) -> dict[str, float]:
    """Make x a logarithmic axis for τ. The values 0 and ∞ are a decade beyond the ends, each behind a break of the axis.

    Args:
        ax: the axis.
        taus: values of τ as text, for instance "0", "100" and "inf". Each gets a tick.
        also: positive numbers that must lie inside the limits too.

    Returns:
        The position of each of ``taus`` on the axis.
    """
    numbers = {tau: float(tau) for tau in taus}
    finite = sorted({value for value in (*numbers.values(), *also) if 0 < value < math.inf}) or [1.0]
    low, high = 10 ** math.floor(math.log10(finite[0])), 10 ** math.ceil(math.log10(finite[-1]))
    places = {
        tau: low / 10 if value == 0 else high * 10.0 if math.isinf(value) else value
        for tau, value in sorted(numbers.items(), key=lambda item: item[1])
    }
    ax.set_xscale("log")
    ax.set_xlim((low / 10 if 0 in numbers.values() else low) / 2, (high * 10 if math.inf in numbers.values() else high) * 2)
    ticks = places or {f"{value:g}": value for value in (low, high)}
    ax.set_xticks(list(ticks.values()), [tau_text(tau) for tau in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("precision of the prior, τ")
    for exists, place in ((0 in numbers.values(), low / math.sqrt(10)), (math.inf in numbers.values(), high * math.sqrt(10))):
        if exists:
            _axis_break(ax, place)
    return places


def tau_text(tau: str) -> str:
    """The tick label of a value of τ.

    >>> [tau_text(tau) for tau in ("0", "100", "1e3", "20000", "inf", "learned")]
    ['0', '100', '1000', '$2\\\\cdot10^{4}$', '∞', 'learned']
    """
    if tau in ("learned", "inf"):
        return "∞" if tau == "inf" else tau
    value = float(tau)
    if value == 0 or 1e-3 <= value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value))
    factor = value / 10**exponent
    return f"$10^{{{exponent}}}$" if math.isclose(factor, 1) else f"${factor:.3g}\\cdot10^{{{exponent}}}$"


def plain_log_ticks(ax: Axes, *, axis: str = "x") -> None:
    """Set the ticks of a logarithmic axis, ``x`` or ``y``, at round multiples of powers of ten, labelled with plain numbers."""
    low, high = getattr(ax, f"get_{axis}lim")()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 1.5, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 500 * low else (1,)
    ticks = [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
    getattr(ax, f"set_{axis}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(ax, f"{axis}axis").set_minor_locator(NullLocator())


def _axis_break(ax: Axes, place: float) -> None:
    on_axis: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False, "gid": "break", "linestyle": "none"}
    ax.plot([place], [0], marker="s", color="white", markersize=6, **on_axis)
    for shift in (0.93, 1.07):
        ax.plot([place * shift], [0], marker=[(-0.5, -1), (0.5, 1)], color="black", markersize=9, markeredgewidth=0.8, **on_axis)
