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
# Many tasks share one frozen language model, and every task d has its own LoRA weights with the same prior,
# θ_d ~ Normal(Θ, I/τ). The precision τ says how much the tasks share. At τ = 0 each task is independent, and at τ = ∞ all tasks
# have the same adapter. In between, a task borrows from the others; the fewer documents it has, the more it borrows.
#
# This notebook shows how to choose τ, in five steps: a sweep over τ, a comparison of three fits and of the texts they write, the
# best τ of each task, the shrinkage inside a fit, and the gain of each task. The sweeps were made by `scripts/tau_sweep.py` and
# are read from `results/`. The three fits are made here, in a few minutes on two cores.

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

# Settings of the three fits. BORA_PYRO_NOTEBOOK=small makes them small, so that the notebook can be tested in seconds.
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
# There are two corpora, both with few documents a task: the documentation of networkx (a task is a sub-package), and presidents'
# speeches (a task is a president). Every τ is fitted at several learning rates. The validation split chooses the rate, and the
# test split is only reported. If a curve is lowest in the middle, the tasks differ, but can still learn from each other. If it
# falls up to τ = ∞, one adapter can learn everything.

# %%
corpora = {"documentation": "documentation of networkx", "presidents": "presidents' speeches"}
here = Path.cwd()
results = next((path for folder in (here, *here.parents) if (path := folder / "results").is_dir()), Path("results"))
tables = {name: results / f"{name}.parquet" for name in corpora}
# the documentation is needed below; the other corpus is optional
sweeps = {name: read_sweep(path) for name, path in tables.items() if name == "documentation" or path.is_file()}

figure, axes = plt.subplots(1, len(sweeps), figsize=(4.9 * len(sweeps), 3.8), squeeze=False)
for ax, (name, sweep) in zip(axes[0], sweeps.items(), strict=True):
    plots.tau_curve(sweep, ax).set_title(corpora[name])
plt.show()

# %% [markdown]
# The tables show the same results. The sentence below each table compares test perplexities on the same split, seed by seed.


# %%
def worse_by(sweep: pd.DataFrame, tau: str, reference: str) -> str:
    """Difference of test perplexity between two τ in percent: the mean over the seeds that both have."""
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
# A grid of fixed τ needs at least one fit for each τ. The learned τ needs one fit for each learning rate. The tables show how
# much perplexity the learned τ loses or gains.
#
# ## 2. One task under three priors
#
# Now we make three fits, on the documentation with only a few training documents a task: independent tasks, a learned τ, and one
# adapter for all. Each uses the learning rate that the sweep chose for its prior.

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
print(f"learned τ, harmonic mean: {fits['learned'].tau():.0f}")

# %% [markdown]
# The first table has the perplexity on test documents, of all tasks and of the task that we look at below. The second compares
# the three fits document by document. `elpd` is the log probability of the test documents in nats, `elpd_diff` its difference
# from the best fit, and `dse` the standard error of this difference (somewhat too small, because documents of one task share an
# adapter). The order of the three fits can differ between one task and all tasks together; section 3 shows this.

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
# What do the fits write? Each one continues the beginning of the same test document, with the same random numbers. The base has
# only 4.3 million parameters, so the texts are poor under every prior, and a single text is no evidence. The number after each
# name is the perplexity of the real document, which is the better measure.


# %%
@torch.inference_mode()
def write(start: torch.Tensor, change, *, temperature: float = 0.7) -> str:
    """Continue the tokens `start` with an adapter's change of the base (None: the base alone)."""
    generator, tokens = torch.Generator().manual_seed(SEED), start[None]
    for _ in range(NEW_TOKENS):
        probabilities = (backbone.logits(tokens, change)[0, -1] / temperature).softmax(-1)
        token = torch.multinomial(probabilities, 1, generator=generator)
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
    paragraph("the real continuation", backbone.tokenizer.decode(rest, skip_special_tokens=True)),
    paragraph("base model", write(start, None)),
]
for tau, fitted in fits.items():
    log_likelihood = containers[names[tau]]["log_likelihood"]["documents"].values[0, 0, chosen]
    per_token = log_likelihood / containers[names[tau]]["constant_data"]["document_tokens"].values[chosen]
    theta, _ = fitted.weights()
    change = fitted.model.change(theta, torch.tensor([task]))
    texts.append(paragraph(f"{names[tau]} (perplexity of the document: {np.exp(-per_token):.1f})", write(start, change)))
print("\n".join(texts))

# %% [markdown]
# ## 3. The same τ is not best for all
#
# Each task alone would choose its own τ. For every τ of the documentation's sweep, a panel shows how far each task's test
# perplexity is above the task's lowest test perplexity at any fixed τ. The lowest value is only a reference: it comes from the
# test split, so nobody could have chosen it beforehand. A learned τ differs between groups of weights and can even be below it.
# Tasks with the fewest training documents are at the bottom. In a good panel all tasks are near 0.

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
# If widgets are available, the slider below shows the same table as perplexities. A point is a task's perplexity at the chosen τ,
# and a line its range over all fixed τ. The pictures are drawn in advance, so the slider works without a running kernel.


# %%
def picture(tau: str) -> bytes:
    """The tasks' perplexities at one τ, as the bytes of a PNG file."""
    figure, ax = plt.subplots(figsize=(6.2, 4.4))
    plots.task_ranges(by_task.set_axis(labels), tau, ax)
    ax.set_title(f"{title(tau)}: all tasks {runs(sweep).query('tau == @tau').test_perplexity.mean():.2f}")
    figure.savefig(file := BytesIO(), format="png", dpi=80)
    plt.close(figure)
    return file.getvalue()


try:
    import ipywidgets
except ImportError:
    print("the slider needs ipywidgets; the panels above show the same values")
else:
    slider = ipywidgets.SelectionSlider(options=[(tau.replace("inf", "∞"), tau) for tau in taus], description="τ")
    stack = ipywidgets.Stack([ipywidgets.Image(value=picture(tau), format="png") for tau in taus], selected_index=0)
    ipywidgets.jslink((slider, "index"), (stack, "selected_index"))
    bundle = ipywidgets.VBox([slider, stack])._repr_mimebundle_()
    display(bundle | {"text/plain": "(a slider over τ, where widgets can be shown)"}, raw=True)

# %% [markdown]
# ## 4. Inside the fit: how far each task is shrunk
#
# We return to our fit with the learned τ. The picture shows the path of τ during the fit, one line for each kind of layer and
# factor of its LoRA product. The vertical line marks the end of the epoch whose state was kept.

# %%
fitted = fits["learned"]
figure, ax = plt.subplots(figsize=(6.5, 3.6))
plots.tau_path([record for epoch in fitted.history for record in epoch.get("tau_path", [])], ax)
if fitted.best_epoch:
    ax.axvline(fitted.history[fitted.best_epoch - 1]["step"], color=GREY, linewidth=0.8)
plt.show()

# %% [markdown]
# How far is each task from Θ, and in which layers?

# %%
container = shrinkage(fitted, data)
posterior = container["posterior"]
distance = posterior["distance"].values[0, 0]
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), width_ratios=[1, 1.2])
plots.shrinkage_forest(container, axes[0]).set_xlim(right=1.05 * distance.max())
plots.deviation_heatmap(container, axes[1])
plt.show()

# %% [markdown]
# A distance from Θ alone does not show whether the documents or the prior determine it. Two numbers help. γ_d = Σ h/(h + τ), with
# h the curvature of the task's log-likelihood in each entry, is the effective number of entries that the documents determine. The
# pooling factor λ of a layer compares the differences between tasks with their uncertainty. If λ is 1, the differences are not
# larger than the uncertainty; if it is lower, the tasks clearly differ. An adapter has far more entries than a few documents can
# determine, so one should expect a small share γ_d and a λ near 1. The tasks differ most clearly where λ is lower.

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
# Do some tasks deviate in the same direction? The pictures show their changes of the weights, ΔW_d − ΔW_Θ, on the first two
# principal components, and as a dendrogram of all distances. If the shares of variance on the axes are small, the tasks differ in
# many more than two directions, and neighbours in the picture are not always neighbours. If the dendrogram is one long staircase,
# there are no groups. Names without room are left out.

# %%
gram = task_gram(fitted)
figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), width_ratios=[1.2, 1])
plots.task_dendrogram(gram, fitted.tasks, axes[1])
plots.task_pca(gram, fitted.tasks, axes[0])
plt.show()

# %% [markdown]
# ## 5. Do tasks with few documents gain most?
#
# A task with little data should gain most from sharing, as the paper's Figure 3 shows. The sweep can test this. The pictures show
# the gain of a fixed τ, the one that the validation split chose, over each limit, against $N_d$. Bars are standard deviations
# over seeds, if there are several. The text below has the rank correlation of gain and $N_d$.

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
lines.append(f"- $N_d$ is between {gains.documents.min():.0f} and {most:.0f}, and {at_most} tasks have the maximum")
display(Markdown("\n".join(lines)))

# %% [markdown]
# The sweep limits the number of training documents of a task, so $N_d$ has a narrow range and many tasks are at its upper end.
# With such data a correlation near 0 is not evidence against the expectation. A correlation that is not near 0 depends on the few
# tasks below the limit.
#
# ## What to do with your own data
#
# - Fit once with `--tau learned` (in Python: `prior=bp.LearnedPrecision()`), then make the pictures of section 4.
# - If a few percent of perplexity matter, make a sweep with `scripts/tau_sweep.py` on the same data and plot it as in section 1.
#   Choose a learning rate for every τ; otherwise the sweep mostly compares learning rates.
# - Always choose τ with the validation split, and use the test split only once, at the end.
