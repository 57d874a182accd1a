# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How strong should the prior be?
#
# Many tasks share one frozen language model, and every task d has LoRA weights of its own under one prior,
# θ_d ~ Normal(Θ, I/τ). The precision τ says how much the tasks share: at τ = 0 each task is on its own, at τ = ∞ there is one
# adapter for all, and in between a task leans on the others as far as its own documents leave room for that.
#
# This notebook asks which τ to take, in five steps: a sweep over τ, three fits side by side with the texts they write, each
# task's own view of τ, what shrinkage looks like inside a fit, and which tasks gain. The sweeps were made by
# `scripts/tau_sweep.py` and are read from `results/`; the three fits are made here, in a few minutes on two cores.

# %%
# %matplotlib inline
import os
import textwrap
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import Markdown, display
from scipy.stats import spearmanr

import bora_pyro as bp
from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.deviations import task_gram
from bora_pyro.diagnostics.plots.style import GREY, LIGHT, tau_text
from bora_pyro.diagnostics.plots.sweeps import gain_by_task
from bora_pyro.diagnostics.shrinkage import compare_priors, held_out, shrinkage
from bora_pyro.diagnostics.sweep_table import at_best_rates, best_rates, best_tau, read_sweep, runs, summary, tau_order

# What the three fits are made of. BORA_PYRO_NOTEBOOK=small makes them in seconds, to see that everything runs.
DOCUMENTS = {"max_tokens": 128, "max_train_documents": 8, "max_eval_documents": 6}
TARGETS, RANK, EPOCHS, TOKEN_BUDGET = ["q_proj", "v_proj", "fc1", "fc2"], 8, 6, 1024
TASK, PROMPT_TOKENS, NEW_TOKENS = "algorithms.shortest_paths", 24, 60
SEED = 0
if os.environ.get("BORA_PYRO_NOTEBOOK") == "small":
    DOCUMENTS = {"max_tokens": 48, "max_train_documents": 3, "max_eval_documents": 2, "num_tasks": 3}
    TARGETS, RANK, EPOCHS, TOKEN_BUDGET = ["q_proj", "v_proj"], 2, 2, 64
    TASK, PROMPT_TOKENS, NEW_TOKENS = "algorithms", 8, 4

transformers.utils.logging.disable_progress_bar()
plt.rcParams.update(plots.STYLE | {"figure.dpi": 100})

# %% [markdown]
# ## 1. The question in one picture
#
# Two corpora, both with few documents a task: the documentation of networkx (a task is a sub-package), and presidents' speeches
# (a task is a president). Every τ is fitted at several learning rates, and the validation split chooses the rate; the test split
# is only reported. A curve that is lowest in the middle says that tasks differ and still have something to tell one another; one
# that falls all the way to τ = ∞ says that what there is to learn is the same for all.

# %%
corpora = {"documentation": "documentation of networkx", "presidents": "presidents' speeches"}
here = Path.cwd()
results = next((path for folder in (here, *here.parents) if (path := folder / "results").is_dir()), Path("results"))
tables = {name: results / f"{name}.parquet" for name in corpora}
# the rest of the notebook is about the documentation; the other corpus is shown where its table is
sweeps = {name: read_sweep(path) for name, path in tables.items() if name == "documentation" or path.is_file()}

figure, axes = plt.subplots(1, len(sweeps), figsize=(4.9 * len(sweeps), 3.8), squeeze=False)
for ax, (name, sweep) in zip(axes[0], sweeps.items(), strict=True):
    plots.tau_curve(sweep, ax).set_title(corpora[name])
plt.show()

# %% [markdown]
# The same in numbers. The sentence under each table compares test perplexities on the same split, seed by seed.


# %%
def worse_by(sweep: pd.DataFrame, tau: str, reference: str) -> str:
    """By how many percent the test perplexity at one τ is above that at another: the mean over the seeds that both have."""
    by_tau = runs(at_best_rates(sweep)).pivot(index="seed", columns="tau", values="test_perplexity")
    percent = (100 * (by_tau[tau] / by_tau[reference] - 1)).dropna()
    return f"{percent.mean():+z.1f} %" + (f" (± {percent.std():.1f})" if len(percent) > 1 else "")


def title(tau: str) -> str:
    return "learned τ" if tau == "learned" else f"τ = {tau_text(tau)}"


for name, sweep in sweeps.items():
    chosen = best_tau(sweep)
    others = [tau for tau in ("0", "inf", "learned") if tau in best_rates(sweep) and tau != chosen]
    lines = [f"{worse_by(sweep, tau, chosen)} at {title(tau)}" for tau in others]
    display(Markdown(f"**{corpora[name].capitalize()}**\n\n{summary(sweep)}"))
    display(Markdown(f"The validation split chooses {title(chosen)}. Test perplexity against that: {', '.join(lines)}."))

# %% [markdown]
# A grid of fixed τ costs a fit, or several, for each τ; the learned τ costs one fit for each learning rate. The rows above show
# what that saving costs in perplexity.
#
# ## 2. One task under three priors
#
# Now three fits of our own, on the documentation with only a few training documents a task: independent tasks, a learned τ, one
# adapter for all. Each has the learning rate that the sweep chose for its prior.

# %%
backbone = bp.Backbone.from_pretrained("builtin:nano", targets=TARGETS)
data = bp.load_tasks("builtin:documentation", backbone.tokenizer, seed=SEED, **DOCUMENTS)
priors = {"0": bp.Independent(), "learned": bp.LearnedPrecision(), "inf": bp.Pooled()}
rates = best_rates(sweeps["documentation"])
fits = {}
for tau, prior in priors.items():
    model = bp.BoRA(backbone, len(data.tasks), adapter=bp.LoRA(rank=RANK), prior=prior, seed=SEED)
    fits[tau] = bp.fit(model, data, epochs=EPOCHS, learning_rate=float(rates[tau]), token_budget=TOKEN_BUDGET, seed=SEED)
print(data)
print(f"learned τ, geometric mean: {fits['learned'].tau():.0f}")

# %% [markdown]
# Perplexity on held-out documents, of all tasks and of the one that we look at below; then the three fits compared document by
# document: `elpd` is the log probability of the test documents in nats, `elpd_diff` how much is missing to the best, `dse` the
# standard error of that difference (rather too small, as documents of one task share an adapter). One task need not rank the
# three as all tasks together do; section 3 comes back to that.

# %%
names = {tau: title(tau) for tau in fits}
scores = {tau: fitted.evaluate(data.test) for tau, fitted in fits.items()}
task = data.tasks.index(TASK)
base = scores["0"]
perplexity = pd.DataFrame(
    {"all tasks": base["base_test_perplexity"], TASK: base["tasks"][task]["base_test_perplexity"]}, index=["base model"]
)
for tau, score in scores.items():
    perplexity.loc[names[tau]] = [score["test_perplexity"], score["tasks"][task]["test_perplexity"]]
display(perplexity.round(2))

containers = {names[tau]: held_out(fitted, data) for tau, fitted in fits.items()}
comparison = compare_priors(containers)
display(comparison[["rank", "elpd", "elpd_diff", "dse", "perplexity"]].round(2))

# %%
figure, ax = plt.subplots(figsize=(5.5, 2.2))
plots.compare_forest(comparison, ax)
plt.show()


# %% [markdown]
# What do they write? Each fit continues the same beginning of a test document, drawn token by token with the same random
# numbers. The base has 4.3 million parameters, so these texts are rough whatever the prior, and one text proves nothing; the
# number beside each name, the perplexity of the document's real text, is the better guide.


# %%
@torch.inference_mode()
def write(start: torch.Tensor, change, *, temperature: float = 0.7) -> str:
    """Continue the tokens `start` with the changes that an adapter makes to the base (None: the base alone)."""
    draws, tokens = torch.Generator().manual_seed(SEED), start[None]
    for _ in range(NEW_TOKENS):
        probabilities = (backbone.logits(tokens, change)[0, -1] / temperature).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=draws)
        if token.item() == backbone.tokenizer.eos_token_id:
            break
        tokens = torch.cat([tokens, token[None]], 1)
    return backbone.tokenizer.decode(tokens[0, len(start) :])


def paragraph(head: str, text: str) -> str:
    return f"{head}\n{textwrap.fill(' '.join(text.split()), 110, initial_indent='    ', subsequent_indent='    ')}\n"


of_task = [n for n in range(len(data.test)) if data.test.task[n] == task]
chosen = max(of_task, key=lambda n: len(data.test.document(n)))
document = data.test.document(chosen)
start, rest = document[:PROMPT_TOKENS], document[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]
texts = [
    paragraph(f"the beginning ({TASK})", backbone.tokenizer.decode(start, skip_special_tokens=True)),
    paragraph("how it really goes on", backbone.tokenizer.decode(rest, skip_special_tokens=True)),
    paragraph("base model", write(start, None)),
]
for tau, fitted in fits.items():
    held = containers[names[tau]]
    per_token = held["log_likelihood"]["documents"].values[0, 0, chosen] / held["constant_data"]["document_tokens"].values[chosen]
    theta, _ = fitted.weights()
    change = fitted.model.change(theta, torch.tensor([task]))
    texts.append(paragraph(f"{names[tau]} (perplexity of the document: {np.exp(-per_token):.1f})", write(start, change)))
print("\n".join(texts))

# %% [markdown]
# ## 3. The same τ is not best for all
#
# Each task, seen alone, would choose a τ of its own. The panels show, for every τ of the documentation's sweep, by how much each
# task's test perplexity lies above the lowest that any fixed τ gives that task. Nobody could have chosen that lowest value
# beforehand, as it is read off the test split: it is a yardstick, not a method (and a learned τ, which differs between groups of
# weights, may even fall below it). Tasks with the fewest training documents stand at the bottom. Look for the panel in which all
# tasks are near 0.

# %%
sweep = at_best_rates(sweeps["documentation"])
documents = sweep.groupby("task").task_train_documents.mean().sort_values(kind="stable")
taus = sorted(sweep.tau.unique(), key=tau_order)
by_task = sweep.groupby(["task", "tau"]).task_test_perplexity.mean().unstack().loc[documents.index, taus]
lowest = by_task.drop(columns="learned", errors="ignore").min(axis=1)
excess = 100 * (by_task.div(lowest, axis=0) - 1)
rows = np.arange(len(documents))
labels = [f"{name} ({number:.0f})" for name, number in documents.items()]

columns = -(-len(taus) // 2)
figure, axes = plt.subplots(2, columns, figsize=(10, 7.6), sharex=True, sharey=True)
for ax, tau in zip(axes.flat, taus, strict=False):
    ax.hlines(rows, 0, excess[tau], colors=LIGHT, linewidth=1)
    ax.plot(excess[tau], rows, "o", markersize=4)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_title(f"{title(tau)}\nmedian {excess[tau].median():.1f} %, most {excess[tau].max():.0f} %", fontsize=9)
for ax in axes.flat[len(taus) :]:
    ax.set_visible(False)
axes[0, 0].set_yticks(rows, labels)
for ax in axes[:, 0]:
    ax.set_ylabel("task ($N_d$)")
figure.supxlabel("test perplexity above the task's own lowest (%)", fontsize=9)
plt.show()

# %% [markdown]
# Where widgets run, the slider below goes through the same table, this time in perplexities themselves: the point is a task's
# perplexity at the chosen τ, the line its range over all fixed τ. The pictures are drawn beforehand, so that the slider needs no
# running kernel.


# %%
def picture(tau: str) -> bytes:
    """The tasks' perplexities at one τ, as the bytes of a PNG."""
    figure, ax = plt.subplots(figsize=(6.2, 4.4))
    fixed = by_task.drop(columns="learned", errors="ignore")
    ax.hlines(rows, fixed.min(axis=1), fixed.max(axis=1), colors=LIGHT, linewidth=2)
    ax.plot(by_task[tau], rows, "o")
    ax.set_yticks(rows, labels)
    ax.set_ylabel("task ($N_d$)")
    ax.set_xscale("log")
    low, high = by_task.min(axis=None) * 0.93, by_task.max(axis=None) * 1.07
    ax.set_xlim(low, high)
    ticks = [tick for tick in (2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500) if low < tick < high]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.xaxis.minorticks_off()
    ax.set_xlabel("test perplexity of the task")
    ax.set_title(f"{title(tau)}: all tasks {runs(sweep).query('tau == @tau').test_perplexity.mean():.2f}")
    figure.savefig(file := BytesIO(), format="png", dpi=80)
    plt.close(figure)
    return file.getvalue()


try:
    import ipywidgets
except ImportError:
    print("no slider without ipywidgets; the panels above show all its pictures")
else:
    slider = ipywidgets.SelectionSlider(options=[(tau.replace("inf", "∞"), tau) for tau in taus], description="τ")
    stack = ipywidgets.Stack([ipywidgets.Image(value=picture(tau), format="png") for tau in taus], selected_index=0)
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    bundle = ipywidgets.VBox([slider, stack])._repr_mimebundle_()
    display(bundle | {"text/plain": "(a slider over τ, where widgets can be shown)"}, raw=True)

# %% [markdown]
# ## 4. Inside the fit: who is shrunk how far
#
# Back to our own fit with the learned τ. How τ moved during it, one line for each kind of layer and factor of its LoRA product;
# the vertical line marks the end of the epoch whose state was kept:

# %%
fitted = fits["learned"]
figure, ax = plt.subplots(figsize=(6.5, 3.6))
plots.tau_path([record for epoch in fitted.history for record in epoch.get("tau_path", [])], ax)
if fitted.best_epoch:
    ax.axvline(fitted.history[fitted.best_epoch - 1]["step"], color=GREY, linewidth=0.8)
plt.show()

# %% [markdown]
# How far each task stands from Θ, and in which layers:

# %%
container = shrinkage(fitted, data)
posterior = container["posterior"]
distance = posterior["distance"].values[0, 0]
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), width_ratios=[1, 1.2])
plots.shrinkage_forest(container, axes[0]).set_xlim(right=1.05 * distance.max())
plots.deviation_heatmap(container, axes[1])
plt.show()

# %% [markdown]
# A distance from Θ says little by itself: is it what the documents ask for, or all that the prior lets through? Two numbers
# help. γ_d = Σ h/(h + τ), with h the curvature of the task's log-likelihood in each entry, counts the entries that the task's
# documents determine rather than the prior. The pooling factor λ, of a layer, compares the tasks' differences with what is not
# known of them: 1 means that the differences drown in that uncertainty, lower values that the tasks do stand apart. An adapter
# has far more entries than a few documents can determine, so a small share γ_d and a λ near 1 are to be expected; the places
# where λ is lower are where the tasks differ most clearly.

# %%
gamma = posterior["effective_parameters"].values[0, 0]
entries = int(container["constant_data"]["parameters"])
print(f"entries of one task's adapter: {entries:,}")
print(f"γ_d: {gamma.min():.0f} to {gamma.max():.0f}, that is {gamma.min() / entries:.2%} to {gamma.max() / entries:.2%} of them")
print(f"rank correlation of γ_d and ‖θ_d − Θ‖: {spearmanr(gamma, distance).statistic:+.2f}")

figure, ax = plt.subplots(figsize=(6.5, 3.8))
plots.pooling_factors(container, ax)
plt.show()

# %% [markdown]
# Are there tasks that deviate in the same direction? Here are their changes to the weights, ΔW_d − ΔW_Θ, on the first two
# principal components, and as a dendrogram of all distances. Both have a way of saying no: small shares of the variance on the
# axes mean that the tasks lie in many more than two directions, so that neighbours in the picture need not be neighbours; and a
# dendrogram that is one long staircase has no groups to show. Names for which there is no room are left out.

# %%
gram = task_gram(fitted)
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), width_ratios=[1.2, 1])
plots.task_dendrogram(gram, fitted.tasks, axes[1])
plots.task_pca(gram, fitted.tasks, axes[0])
plt.show()

# %% [markdown]
# ## 5. Who gains: is it the tasks with few documents?
#
# A task with little data should gain most over being alone, and that is what the paper's Figure 3 shows. The sweep can be asked:
# the gain of a fixed τ between the limits, the one that the validation split chose, over either limit, against $N_d$, with the
# standard deviation over seeds where there are several, and the rank correlation of the two.

# %%
table = sweeps["documentation"]
chosen = best_tau(table[~table.tau.isin(["0", "inf"])])
figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
lines = []
for ax, reference in zip(axes, ("0", "inf"), strict=True):
    plots.task_gain(table, ax, tau=chosen, reference=reference)
    gains = gain_by_task(table, tau=chosen, reference=reference)
    correlation, p = spearmanr(gains.documents, gains.gain)
    lines.append(
        f"- over {title(reference)}: {(gains.gain > 0).sum()} of {len(gains)} tasks gain, median {gains.gain.median():.1f} %; "
        f"rank correlation with $N_d$ {correlation:+.2f} (p = {p:.2g})"
    )
plt.show()
most = gains.documents.max()
at_most = (gains.documents == most).sum()
lines.append(f"- $N_d$ goes from {gains.documents.min():.0f} to {most:.0f}, and {at_most} tasks have that most")
display(Markdown("\n".join(lines)))

# %% [markdown]
# The sweep gives every task at most so many training documents, so that $N_d$ covers a narrow range and many tasks stand at its
# upper end. A correlation near 0 is then no evidence against the expectation, only a lack of evidence for it, and one that is not
# near 0 rests on the few tasks below the cap.
#
# ## What to do with your own data
#
# - Fit once with `--tau learned` (in Python: `prior=bp.LearnedPrecision()`), then look at section 4's pictures.
# - If a few percent of perplexity matter, sweep: `scripts/tau_sweep.py` takes the same data, and section 1 shows what may come
#   of it. Give every τ its own learning rate, or the comparison is one of learning rates.
# - Whatever chooses τ, let it be the validation split; keep the test split for the one number at the end.
