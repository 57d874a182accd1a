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
# # What does a posterior tell us that a point estimate does not?
#
# A MAP fit gives each task one adapter θ_d. A posterior gives a distribution of adapters that agree with the task's documents.
# It answers questions that one adapter cannot answer: which tasks are known well, how much a prediction depends on uncertain
# weights, and whether a text is of a kind that the fit has seen.
#
# This notebook fits a MAP estimate with a learned τ on the documentation of networkx (a task is a sub-package). Then it fits a
# mean-field Normal around it and answers these questions one by one. Both fits are made here, in a few minutes on one core. For
# your own data, use `scripts/map_fit.py` and `scripts/posterior_fit.py`.

# %%
# %matplotlib inline
import os
import tempfile
import textwrap
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch
import transformers
from IPython.display import display
from scipy.stats import spearmanr

from bora_pyro import fit
from bora_pyro.data import TokenSplit
from bora_pyro.diagnostics import plots
from bora_pyro.diagnostics.calibration import area_under_risk_coverage, calibration, foreign_auroc, reliability, risk_coverage
from bora_pyro.diagnostics.plots.style import BLUE, plain_log_ticks
from bora_pyro.guides import normal_guide
from bora_pyro.predict.mixture import predictive
from bora_pyro.predict.posterior import Posterior
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.config.posterior_fit import PosteriorFitConfig
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.posterior_fit import run_posterior_fit
from bora_pyro.runs.saved import load_run, sampled_tau

# Settings of the fits. BORA_PYRO_NOTEBOOK=small makes them small, so that the notebook can be tested in seconds.
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
# The MAP fit finds θ, Θ and τ. The posterior has a mean and a standard deviation for every entry of Θ and of each task's
# deviation. It starts at the MAP with standard deviations of half the prior's. It keeps τ and is fitted by the evidence lower
# bound, with a lower learning rate than the MAP. The fit keeps the epoch whose mean has the lowest validation perplexity. Check
# that this is not epoch 0, the start, where no standard deviation has been learned yet.

# %%
folder = tempfile.TemporaryDirectory()
fitted_map, around = f"{folder.name}/map", f"{folder.name}/posterior"
run_map_fit(MapFitConfig(output_dir=fitted_map, **FIT), quiet=True)
run_posterior_fit(PosteriorFitConfig(run=fitted_map, output_dir=around, draws=1, **AROUND), quiet=True)

point, run = load_run(fitted_map), load_run(around)
posterior, data, model = run.posterior(seed=0), run.data, run.fitted.model
tokenizer = model.backbone.tokenizer
print(posterior, data, sep="\n")
print(f"learned τ, harmonic mean: {point.fitted.tau():.0f}")
print(f"validation perplexity: MAP {point.fitted.validation_perplexity:.2f}", end="")
print(f", posterior mean {run.fitted.validation_perplexity:.2f} (epoch {run.fitted.best_epoch} of {len(run.fitted.history)})")

# %% [markdown]
# ## 2. Which tasks are known well
#
# `deviation_scales` is the posterior standard deviation of a task's deviation θ_d − Θ in units of the prior's, as the root mean
# square over all entries. It is 1 if the documents have no information, and lower the more information they have. An adapter has
# more entries than a few thousand tokens can determine, so values slightly below 1 are not a failure. The order of the tasks is
# what matters: it should follow their numbers of training tokens.

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
# There are three ways to predict: the MAP estimate, the adapter at the posterior's mean, and the mixture, which averages the
# token probabilities of several draws. Perplexity and the Brier score reward good probabilities. The calibration error (ECE)
# measures whether tokens that are predicted with confidence p are right with frequency p. If confidence is above accuracy, the
# model is overconfident. All numbers are from the test documents, which no fit has seen.

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
# Points below the diagonal are overconfident, and points above it are underconfident. A mixture is less confident than its draws
# on average, and underconfident if the draws are too wide; section 7 examines their width. The error bars assume independent
# tokens. Tokens of one document are dependent, so the bars are somewhat too short.
#
# ## 4. Where a prediction should not be trusted
#
# The mixture's uncertainty about a token, its entropy, has two parts. The *aleatoric* part is the mean entropy of the draws: it
# would remain if the weights were known. The rest is *epistemic*, the mutual information of the token and the weights: it
# measures how much the draws disagree. The picture shows one test document. The darker the background of a token, the larger the
# epistemic uncertainty before it was read.

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
# Is the uncertainty useful? We reject the most uncertain tokens and compute the error rate of the others. If the uncertainty
# predicts errors, the curve falls quickly; if it does not, the curve stays level. The area under a curve is the mean error rate
# over all coverages. Lower is better.

# %%
wrong = (~mixture.correct).double()
measures = {"epistemic": mixture.epistemic, "total": mixture.total, "1 − confidence": 1 - mixture.confidence}
figure, ax = plt.subplots(figsize=(5.8, 3.8))
curves = {name: risk_coverage(values, wrong) for name, values in measures.items()}
plots.risk_coverage_curves(curves, ax, risk="share of wrong predictions")
plt.show()
for name, values in measures.items():
    print(f"area under the curve, {name}: {area_under_risk_coverage(values, wrong):.3f}")
print(f"no token rejected: {wrong.mean():.3f}")

# %% [markdown]
# Most errors occur where the text can continue in many ways, and the total uncertainty measures this. The epistemic part has
# another use: it should be high for texts of a kind that no task has. Here we compare sentences in English and in German, each
# under the adapter of one of the tasks in turn, with the test documents under their own adapters. We use only the first tokens of
# each text, because all texts are more uncertain at their beginning.

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
    """One row for each document: means over its first tokens, in nats a token."""
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
# The table has the probability that a foreign text has a higher score than a test document: 1 is a perfect separation, ½ is
# chance. `−log p` is the model's surprise at the tokens. It needs only one adapter and no posterior, so it is the baseline for
# the other two. Prose is so different from docstrings that surprise alone can separate them. The two uncertainties do not need
# the next token, so they can be used to stop a text while it is written. The first two rows show whether the epistemic part does
# this better than the total. Sixteen sentences are only an illustration; use `foreign_auroc` for larger samples.
#
# ## 5. What the draws write
#
# The mean, two draws and the mixture continue the beginning of a test document, with the same random numbers. The mixture takes
# each token from the mean of all draws' probabilities, so its text differs from that of each draw. The first number is the mean
# log probability of the written tokens under their own adapter or mixture. The second is the mixture's epistemic uncertainty
# about them; a single adapter has none.

# %%
document = data.test.document(chosen)
start, rest = document[:PROMPT_TOKENS], document[PROMPT_TOKENS : PROMPT_TOKENS + NEW_TOKENS]


def paragraph(head: str, text: str) -> str:
    return f"{head}\n{textwrap.fill(' '.join(text.split()), 110, initial_indent='    ', subsequent_indent='    ')}\n"


ways = {"posterior mean": {"how": "mean"}, "draw 0": {"how": "draw", "draw": 0}, "draw 1": {"how": "draw", "draw": 1}}
ways[f"mixture of {DRAWS} draws"] = {"how": "mixture", "draws": DRAWS}
lines = [
    paragraph(f"the beginning ({TASK})", tokenizer.decode(start, skip_special_tokens=True)),
    paragraph("the real continuation", tokenizer.decode(rest, skip_special_tokens=True)),
]
for name, how in ways.items():
    written = posterior.generate(start, TASK, max_new_tokens=NEW_TOKENS, temperature=0.7, seed=0, **how)
    head = f"{name} ({written.log_prob.mean():.2f} nats a token"
    head += f", epistemic {written.epistemic.mean():.3f})" if how["how"] == "mixture" else ")"
    lines.append(paragraph(head, written.text))
print("\n".join(lines))

# %% [markdown]
# The base has only 4.3 million parameters, so none of these texts is good, and a single text is no evidence.
#
# ## 6. How certain is τ?
#
# So far τ was the number that the MAP fit had learned. It can also be a random variable, here with σ = τ^(−½) ~ HalfCauchy(0.1)
# for each kind of layer and factor, started at the learned values (`--tau half_cauchy`). This fit is made to study τ, not to
# predict. It has a larger learning rate, so that τ can move, and no validation documents, so that the last epoch is kept.

# %%
start = load_run(fitted_map).fitted
sites = sampled_tau(start.model, "half_cauchy", start)
nothing = TokenSplit.from_documents([], task=[], num_tasks=data.num_tasks)
around_tau = AROUND | {"learning_rate": 0.02}
fitted = fit(start.model, replace(data, validation=nothing), guide=normal_guide(start.model, sites, scale=0.5), **around_tau)

sampled = Posterior(fitted)
sites = [sampled.sites(k) for k in range(100)]
learned = point.fitted.tau_by_group()
tau = {name: [float(site[f"precision.{name}"]) for site in sites] for name in learned}
figure, ax = plt.subplots(figsize=(6, 0.9 + 0.3 * len(tau)))
plots.tau_intervals(tau, learned, ax)
plt.show()

of_each = {}
for name, each in {"τ learned": posterior, "τ random": sampled}.items():
    predicted = predictive(each.model, data.validation, lambda each=each: [each.mean()])
    of_each[name] = {
        "τ, harmonic mean": each.fitted.tau(),
        "‖θ_d − Θ‖, mean over tasks": float(each.fitted.deviation_norms().mean()),
        "posterior sd / prior sd": float(each.deviation_scales(draws=2 * DRAWS).mean()),
        "validation perplexity of the mean": predicted.perplexity(),
    }
display(pd.DataFrame(of_each).round(2))

# %% [markdown]
# The evidence lower bound has a bad optimum: the deviations almost keep their prior (a ratio of standard deviations near 1), and
# τ is too large, so that tasks differ less. Four signs together show that the fit has reached it: squares far to the left of the
# lines, smaller distances ‖θ_d − Θ‖, a ratio near 1 and a higher perplexity. In this case, trust the learned τ. The intervals do
# not include this error: they are those of the approximation, which assumes that τ and the deviations are independent. A small
# difference in perplexity can also come from the learning rate.
#
# ## 7. What not to trust
#
# How wide should the draws be? Here we move them towards the mean: width 0 is the mean itself, and width 1 has the draws of the
# fitted posterior. The perplexity of the mixture is computed on the validation documents, so it may be used to choose the width.

# %%
centre = run.fitted.sites()


def narrowed(factor: float):
    """Draws whose sites are between those of the mean (0) and those of the posterior (1)."""
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
# - **The standard deviations of single entries.** A mean-field Normal ignores dependence between entries. It is narrower than the
#   posterior in every direction in which entries can compensate each other. Use `deviation_scales` only to order tasks.
# - **The width of the draws.** Each entry may be too narrow, and yet the draws as a whole too wide: thousands of entries that the
#   data do not determine add noise, and hundreds of dependent tokens of a document have less information than independent ones.
#   If a width below 1 is best in the table, fit again with `--temperature` below 1, and choose it with the validation split.
#   Epistemic uncertainties depend on this choice; their order depends on it less.
# - **A fit that is too short.** Standard deviations move slowly from their start, half the prior's. Fit until the validation
#   perplexity of the mixture stops falling.
# - **Small differences.** All results are from one seed and one split. Repeat them with others on your own data.

# %%
folder.cleanup()
