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
# # What does a posterior know that a point estimate does not?
#
# A MAP fit gives each task one adapter θ_d. A posterior gives many that the task's documents allow, and with them answers to
# questions that one adapter cannot answer: which tasks are known well, how far a prediction depends on weights that nobody knows,
# and whether a text is of a kind that the fit has seen.
#
# This notebook fits a MAP estimate with a learned τ on the documentation of networkx (a task is a sub-package), then a mean-field
# Normal around it, and asks these questions one by one. Both fits are made here, in a few minutes on one core; with data of your
# own they are `scripts/map_fit.py` and `scripts/posterior_fit.py`.

# %%
# %matplotlib inline
import os
import tempfile
import textwrap
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import transformers
from IPython.display import display
from scipy.stats import spearmanr

from bora_pyro import fit
from bora_pyro.data import TokenSplit
from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.calibration import area_under_risk_coverage, calibration, foreign_auroc, reliability, risk_coverage
from bora_pyro.diagnostics.plots.style import BLUE, VERMILLION, plain_log_ticks
from bora_pyro.guides import normal_guide
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run, sampled_tau

# What is fitted. BORA_PYRO_NOTEBOOK=small makes it in seconds, to see that everything runs.
FIT = {
    "num_tasks": 12, "max_tokens": 128, "max_train_documents": 32, "max_eval_documents": 8, "rank": 4,
    "targets": ["q_proj", "v_proj", "fc1", "fc2"], "token_budget": 512, "epochs": 3, "learning_rate": 0.02,
}  # fmt: skip
AROUND, DRAWS = {"epochs": 4, "learning_rate": 0.003, "token_budget": 256}, 8
TASK, PROMPT_TOKENS, NEW_TOKENS, SHOWN_TOKENS, FIRST = "algorithms.connectivity", 24, 40, 96, 40
if os.environ.get("BORA_PYRO_NOTEBOOK") == "small":
    FIT |= {"num_tasks": 3, "max_tokens": 32, "max_train_documents": 9, "max_eval_documents": 2, "rank": 2, "targets": ["v_proj"]}
    FIT |= {"token_budget": 256, "epochs": 1}
    AROUND["epochs"], DRAWS, TASK, PROMPT_TOKENS, NEW_TOKENS, SHOWN_TOKENS = 1, 2, "algorithms", 8, 3, 30

transformers.utils.logging.disable_progress_bar()
plt.rcParams.update(plots.STYLE | {"figure.dpi": 100})

# %% [markdown]
# ## 1. A point, and a posterior around it
#
# The MAP fit finds θ, Θ and τ. The posterior then has a mean and a standard deviation for every entry of Θ and of each task's
# deviation; it begins at the MAP with standard deviations of half the prior's, keeps τ, and is fitted by the evidence lower
# bound, at a lower learning rate than the MAP. Of all epochs that one is kept whose mean has the lowest validation perplexity;
# epoch 0 is the start, with standard deviations that nothing has been learned about, so look that it is another.

# %%
folder = tempfile.TemporaryDirectory()
fitted_map, around = f"{folder.name}/map", f"{folder.name}/posterior"
run_map_fit(MapFitConfig(output_dir=fitted_map, **FIT), quiet=True)
run_posterior_fit(PosteriorFitConfig(run=fitted_map, output_dir=around, draws=1, **AROUND), quiet=True)

point, run = load_run(fitted_map), load_run(around)
posterior, data, model = run.posterior(seed=0), run.data, run.fitted.model
tokenizer = model.backbone.tokenizer
print(posterior, data, sep="\n")
print(f"learned τ, geometric mean: {point.fitted.tau():.0f}")
print(f"validation perplexity: MAP {point.fitted.validation_perplexity:.2f}", end="")
print(f", posterior mean {run.fitted.validation_perplexity:.2f} (epoch {run.fitted.best_epoch} of {len(run.fitted.history)})")

# %% [markdown]
# ## 2. Which tasks are known well
#
# `deviation_scales` is the posterior standard deviation of a task's deviation θ_d − Θ in units of the prior's, the root mean
# square over all entries: 1 where the documents have said nothing, lower the more they have said. An adapter has more entries
# than a few thousand tokens can determine, so that values not far below 1 are no failure; what counts is the order of the tasks,
# and it should be that of their training tokens.

# %%
scales = posterior.deviation_scales(draws=2 * DRAWS).numpy()
tokens = torch.zeros(data.num_tasks).index_add_(0, data.train.task, data.train.lengths - 1.0).numpy()
figure, ax = plt.subplots(figsize=(6.5, 4))
ax.plot(tokens, scales, "o", color=BLUE)
ax.set_xscale("log")
ax.set_xlim(0.75 * tokens.min(), 1.35 * tokens.max())
plain_log_ticks(ax)
ax.margins(y=0.12)
ax.set_xlabel("training tokens of the task")
ax.set_ylabel("posterior sd of θ$_d$ − Θ / prior sd")
plots.place_labels(ax, tokens, scales, data.tasks)
plt.show()
print(f"rank correlation with the number of training tokens: {spearmanr(tokens, scales).statistic:+.2f}")

# %% [markdown]
# ## 3. What the mixture predicts
#
# Three ways to predict from the same data: the MAP estimate; the adapter at the posterior's mean; the mixture, whose probability
# of each token is the mean over draws of theirs. Perplexity and the Brier score reward good probabilities, the calibration error
# (ECE) asks whether tokens predicted with confidence p come true a share p of the time; confidence above accuracy is
# overconfidence. All on the test documents, which no fit has seen.

# %%
of_map, mean = point.fitted.weights()[0], posterior.mean()
predictions = {
    "base model": predictive(model, data.test, lambda: [None]),
    "MAP": predictive(point.fitted.model, data.test, lambda: [of_map]),
    "mean": predictive(model, data.test, lambda: [mean]),
    "mixture": posterior.score(data.test, draws=DRAWS),
}
rows = {}
for name, predicted in predictions.items():
    of_all = calibration(predicted)
    rows[name] = {"perplexity": predicted.perplexity(), "Brier score": of_all.brier, "ECE": of_all.ece}
    rows[name] |= {"accuracy": of_all.accuracy, "confidence": of_all.confidence}
display(pd.DataFrame(rows).T.round(3))

# %%
figure, ax = plt.subplots(figsize=(5.2, 5.2))
tables = {name: reliability(predictions[name].confidence, predictions[name].correct) for name in ("MAP", "mean", "mixture")}
plots.reliability_diagram(tables, ax)
plt.show()

# %% [markdown]
# Points below the diagonal are overconfident, points above it underconfident. A mixture is flatter than its draws are on average,
# and too flat where they are too wide; section 7 comes back to their width. The error bars take tokens for independent; tokens of
# one document are not, so the bars are rather too short.
#
# ## 4. Where a prediction should not be trusted
#
# The mixture's uncertainty of a token, its entropy, has two parts. The *aleatoric* part is the mean entropy of the draws: what
# would remain unsure if the weights were known. The rest is *epistemic*, the mutual information of the token and the weights: how
# far the draws disagree. Below, one test document, each token on a background as dark as its epistemic uncertainty before it was
# read.

# %%
mixture, task = predictions["mixture"], data.tasks.index(TASK)
of_task = [n for n in range(len(data.test)) if data.test.task[n] == task]
chosen = max(of_task, key=lambda n: len(data.test.document(n)))
in_document = mixture.document == chosen
shown = [tokenizer.decode([token]) for token in mixture.label[in_document][:SHOWN_TOKENS].tolist()]
figure, ax = plt.subplots(figsize=(8, 4.6))
ax.set_title(f"{TASK}, beginning of test document {chosen}", loc="left")
plots.token_uncertainty(shown, mixture.epistemic[in_document][:SHOWN_TOKENS], ax)
plt.show()

# %% [markdown]
# Is the uncertainty of use? Refuse the most uncertain tokens and look at the error rate of those that are kept. An uncertainty
# that knows where the model is wrong brings the curve down quickly; one that knows nothing leaves it level. The area under a
# curve is the mean error rate over all coverages, lower is better.

# %%
wrong = (~mixture.correct).double()
measures = {"epistemic": mixture.epistemic, "total": mixture.total, "1 − confidence": 1 - mixture.confidence}
figure, ax = plt.subplots(figsize=(5.8, 3.8))
curves = {name: risk_coverage(values, wrong) for name, values in measures.items()}
plots.risk_coverage_curves(curves, ax, risk="share of wrong predictions")
plt.show()
for name, values in measures.items():
    print(f"area under the curve, {name}: {area_under_risk_coverage(values, wrong):.3f}")
print(f"nothing refused: {wrong.mean():.3f}")

# %% [markdown]
# Where the top token is wrong is foremost a matter of how much the text leaves open, and the total uncertainty measures that.
# The epistemic part has another use: it should be high for texts of a kind that no task has. Here are some plain sentences in
# English and in German, each under the adapter of one of the tasks in turn, against the test documents under their own; of every
# text the first tokens only, for all are more uncertain at their beginning.

# %%
FOREIGN = {
    "English prose": [
        "My grandmother kept bees behind the old barn, and every August the whole kitchen smelled of honey and warm wax.",
        "The ferry was late again, so we sat on the quay, shared an orange, and watched two boys fish without any luck.",
        "She had promised herself never to return to that town, yet there she stood, suitcase in hand, in the same rain.",
        "Season the soup with salt and a little lemon, let it simmer for half an hour, and serve it with black bread.",
        "Nobody in the village could remember a winter like this one; even the church bell had frozen to its beam.",
        "He laughed, shook the snow from his coat, and asked whether there was any coffee left for a tired postman.",
        "The home team lost in the last minute, but the crowd sang on as if the cup were already theirs.",
        "When the lights came back on, the stage was empty, and the violin lay on the chair where she had been.",
    ],
    "German prose": [
        "Meine Großmutter hielt Bienen hinter der alten Scheune, und im August roch die ganze Küche nach Honig und Wachs.",
        "Die Fähre kam wieder zu spät, also saßen wir am Kai, teilten eine Orange und sahen zwei Jungen beim Angeln zu.",
        "Sie hatte sich geschworen, nie in diese Stadt zurückzukehren, und doch stand sie nun da, im selben Regen.",
        "Die Suppe mit Salz und etwas Zitrone würzen, eine halbe Stunde köcheln lassen und mit Schwarzbrot servieren.",
        "Niemand im Dorf erinnerte sich an einen solchen Winter; sogar die Kirchenglocke war am Balken festgefroren.",
        "Er lachte, schüttelte den Schnee vom Mantel und fragte, ob für einen müden Briefträger noch Kaffee übrig sei.",
        "Die Heimmannschaft verlor in der letzten Minute, doch das Publikum sang weiter, als gehöre ihm der Pokal schon.",
        "Als das Licht wieder anging, war die Bühne leer, und die Geige lag auf dem Stuhl, auf dem sie gesessen hatte.",
    ],
}


def beginnings(predicted) -> pd.DataFrame:
    """A row a document: means over its first tokens, in nats a token."""
    values = {"epistemic": predicted.epistemic, "total": predicted.total, "−log p": -predicted.log_prob}
    table = pd.DataFrame({"document": predicted.document} | values)
    return table.groupby("document").head(FIRST).groupby("document").mean()


texts = {"test documents": beginnings(mixture)}
for name, sentences in FOREIGN.items():
    each = [posterior.predict(text, data.tasks[n % data.num_tasks], draws=DRAWS) for n, text in enumerate(sentences)]
    texts[name] = pd.concat([beginnings(predicted) for predicted in each], ignore_index=True)

figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True)
for ax, score in zip(axes, ("epistemic", "total"), strict=True):
    label = f"{score} uncertainty (nats a token)"
    plots.scores_by_origin({name: table[score] for name, table in texts.items()}, ax, score=label)
axes[1].set_ylabel("")
plt.show()

own = texts["test documents"]
auroc = {name: {score: foreign_auroc(own=own[score], foreign=texts[name][score]) for score in own.columns} for name in FOREIGN}
display(pd.DataFrame(auroc).rename_axis("area under the ROC curve").round(2))

# %% [markdown]
# The table has the probability that a foreign text has the higher score than a test document: 1 tells all of them apart, ½ is a
# coin. `−log p` is no doubt of the model's but its surprise at the tokens themselves; it can be had from one adapter, without a
# posterior, and is what the other two have to be compared with. Prose is so far from docstrings that surprise alone can tell it
# apart; the two uncertainties need not see the next token, so that they can stop a text while it is being written, and the first
# two rows say whether the epistemic part does that better than the whole. Sixteen sentences are an illustration; `foreign_auroc`
# is the tool for more.
#
# ## 5. What the draws write
#
# A beginning of a test document, continued by the mean, by two draws, and by the mixture, with the same random numbers. The
# mixture's next token comes from the mean of all draws' probabilities, so that its text is no one draw's. The first number is the
# writer's own mean log probability of its tokens, the second the mixture's epistemic uncertainty of them; one adapter has none.

# %%
document = data.test.document(chosen)
start, rest = document[:PROMPT_TOKENS], document[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]


def paragraph(head: str, text: str) -> str:
    return f"{head}\n{textwrap.fill(' '.join(text.split()), 110, initial_indent='    ', subsequent_indent='    ')}\n"


ways = {
    "posterior mean": {"how": "mean"},
    "draw 0": {"how": "draw", "draw": 0},
    "draw 1": {"how": "draw", "draw": 1},
    f"mixture of {DRAWS} draws": {"how": "mixture", "draws": DRAWS},
}
lines = [
    paragraph(f"the beginning ({TASK})", tokenizer.decode(start, skip_special_tokens=True)),
    paragraph("how it really goes on", tokenizer.decode(rest, skip_special_tokens=True)),
]
for name, how in ways.items():
    written = posterior.generate(start, TASK, max_new_tokens=NEW_TOKENS, temperature=0.7, seed=0, **how)
    head = f"{name} ({written.log_prob.mean():.2f} nats a token"
    head += f", epistemic {written.epistemic.mean():.3f})" if how["how"] == "mixture" else ")"
    lines.append(paragraph(head, written.text))
print("\n".join(lines))

# %% [markdown]
# The base has 4.3 million parameters: none of these texts is good, and one text proves nothing.
#
# ## 6. How sure is τ?
#
# So far τ was the number that the MAP fit had learned. It can be a random variable too, here with σ = τ^(−½) ~ HalfCauchy(0.1)
# for each kind of layer and factor, begun at the learned values (`--tau half_cauchy`). This fit is made for τ and not for
# prediction: it has a larger learning rate, so that τ can move, and no validation documents, so that the last epoch is kept.

# %%
start = load_run(fitted_map).fitted
sites = sampled_tau(start.model, "half_cauchy", start)
nothing = TokenSplit.from_documents([], task=[], num_tasks=data.num_tasks)
around_tau = AROUND | {"learning_rate": 0.02}
fitted = fit(start.model, replace(data, validation=nothing), guide=normal_guide(start.model, sites, scale=0.5), **around_tau)

sampled = Posterior(fitted)
sites = [sampled.sites(k) for k in range(100)]
learned = point.fitted.tau_by_group()
tau = {name: np.array([float(site[f"precision.{name}"]) for site in sites]) for name in learned}
names = sorted(learned)
places = np.arange(len(names))
low, middle, high = (np.array([np.quantile(tau[name], share) for name in names]) for share in (0.05, 0.5, 0.95))
figure, ax = plt.subplots(figsize=(6, 0.9 + 0.3 * len(names)))
ax.hlines(places, low, high, color=BLUE)
ax.plot(middle, places, "|", color=BLUE, markersize=9, label="τ random: median and middle 90 %")
ax.plot([learned[name] for name in names], places, "s", color=VERMILLION, label="τ learned by the MAP fit")
ax.set_xscale("log")
ax.set_yticks(places, names)
ax.set_ylim(-0.7, len(names) - 0.3)
plain_log_ticks(ax)
ax.set_xlabel("precision of the prior, τ")
ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
plt.show()

of_each = {}
for name, each in {"τ learned": posterior, "τ random": sampled}.items():
    predicted = predictive(each.model, data.validation, lambda each=each: [each.mean()])
    of_each[name] = {
        "τ, geometric mean": each.fitted.tau(),
        "‖θ_d − Θ‖, mean over tasks": float(each.fitted.deviation_norms().mean()),
        "posterior sd / prior sd": float(each.deviation_scales(draws=2 * DRAWS).mean()),
        "validation perplexity of the mean": predicted.perplexity(),
    }
display(pd.DataFrame(of_each).round(2))

# %% [markdown]
# The bound has a way out that the data do not ask for: deviations that all but keep their prior, a ratio of standard deviations
# near 1, under a τ that is too large, so that each costs little and tasks differ less. Squares far to the left of the lines,
# smaller distances ‖θ_d − Θ‖, a ratio near 1 and a higher perplexity together say that the fit has taken it; then trust the
# learned τ. The intervals know nothing of this: they are those of the approximation, which takes τ and the deviations for
# independent. A perplexity that differs little may also be the learning rate's doing.
#
# ## 7. What not to trust
#
# How wide should the draws be? Here they are moved towards the mean: 0 is the mean itself, 1 the draws of the posterior as it
# was fitted, and the perplexity of the mixture is that of the validation documents, which may be used to choose.

# %%
centre = run.fitted.sites()


def narrowed(factor: float):
    """Draws whose sites lie between the mean's, at 0, and the posterior's own, at 1."""
    for number in range(DRAWS if factor else 1):
        sites = posterior.sites(number)
        yield model.weights_given({name: centre[name] + factor * (value - centre[name]) for name, value in sites.items()})[0]


widths = {}
for factor in (0.0, 0.3, 0.6, 1.0):
    predicted = predictive(model, data.validation, lambda factor=factor: narrowed(factor))
    widths[factor] = {"validation perplexity": predicted.perplexity(), "ECE": calibration(predicted).ece}
    widths[factor]["epistemic (nats a token)"] = float(predicted.epistemic.mean())
display(pd.DataFrame(widths).T.rename_axis("width of the draws").round(3))

# %% [markdown]
# - **The standard deviations of single entries.** A mean-field Normal leaves out how entries depend on each other: it is narrower
#   than the posterior in every direction in which they can make up for one another. Read `deviation_scales` as an order of tasks.
# - **The width of the draws.** Narrow entry by entry, draws may still be too wide together: thousands of entries that the data
#   do not determine each add noise, and documents with hundreds of dependent tokens count for less than independent ones
#   would. If a width below 1 wins in the table, fit again with `--temperature` below 1, and let the validation split choose
#   it. Epistemic uncertainties depend on that choice; their order does so less.
# - **A fit that is too short.** Standard deviations move slowly from where they began, half the prior's. Fit until the
#   validation perplexity of the mixture no longer falls.
# - **Small differences.** All of this is one seed and one split; on data of your own repeat it with others.

# %%
folder.cleanup()
