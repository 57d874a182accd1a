"""Model cards: README.md files of exported adapters in the form of the Hugging Face hub.

>>> card = adapter_card(CardFacts(base_model="facebook/opt-350m"), "Ada", "ada", "the MAP estimate")
>>> card.data.to_dict()["library_name"], card.data.to_dict()["base_model"]
('peft', 'facebook/opt-350m')
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from bora_pyro.likelihoods import measure_of

TAGS = ("lora", "bora", "bora_pyro", "pyro", "multi-task", "text-generation")
#: File name of the picture in the export's card.
PICTURE = "shrinkage.png"


@dataclass(frozen=True)
class CardFacts:
    """Facts that all cards of one export state.

    Attributes:
        base_model: the base model, as ``adapter_config.json`` names it.
        license: the license as an identifier of the hub. None: none is stated, and the publisher adds one that is compatible with
            the licenses of the base model and of the texts.
        repo_id: ``USER/NAME`` of the repository on the hub; None: the snippets load from the exported folder.
        model: the Bayesian model in one line.
        adapted: whether a finished fit was adapted to these tasks, which were not part of that fit.
        privacy: what a fit with noise guarantees of a document, in one line.
    """

    base_model: str
    license: str | None = None
    repo_id: str | None = None
    model: str = ""
    adapted: bool = False
    privacy: str = ""

    def data(self) -> ModelCardData:
        """The card's metadata. A base model that is a folder on this machine is left out: the hub has no such model."""
        local = _own_name(self.base_model) or Path(self.base_model).exists() or self.base_model.count("/") > 1
        return ModelCardData(
            base_model=None if local else self.base_model,
            library_name="peft",
            license=self.license,
            pipeline_tag="text-generation",
            tags=list(TAGS),
        )


def export_card(
    facts: CardFacts, title: str, scores: Mapping[str, Mapping[str, Any]], folders: Sequence[str], *, picture: bool
) -> ModelCard:
    """Make the card of a whole export: its adapters, how well each one predicts, and how to load them.

    Args:
        facts: facts that all cards state.
        title: the heading.
        scores: for each exported task, by the name of its folder, its entry in ``metrics.json``: ``name``, ``train_documents``,
            ``base_test_perplexity``, ``test_perplexity`` (or the names of another measure), ``deviation_norm``. Θ has no entry.
        folders: all adapter folders, Θ and draws included.
        picture: whether the export contains the picture of the shrinkage.
    """
    first, second = [*folders, *folders][:2]
    lines = [
        f"# {plain(title)}",
        "",
        f"{len(folders)} LoRA adapters of `{facts.base_model}`, one folder each. {_origin(facts)}, for texts of no known task"
        + (". `<task>--draw-<k>` are draws of the posterior." if any("--draw-" in name for name in folders) else "."),
        "",
    ]
    if facts.model:
        lines += [f"Model: `{facts.model}`", ""]
    lines += _privacy(facts)
    measure = measure_of(next(iter(scores.values()), {}))
    what, plural = measure.title, "Perplexities" if measure.exponential else f"{measure.unit}:"
    lines += [
        f"| task | folder | training documents | {what}, base | {what}, adapted | ‖θ_d − Θ‖ |",
        "|---|---|---|---|---|---|",
    ]
    for folder, row in scores.items():
        names = (f"base_test_{measure.name}", f"test_{measure.name}", "deviation_norm")
        numbers = [_number(row.get(name)) for name in names]
        lines.append(f"| {plain(row['name'])} | `{folder}` | {row.get('train_documents', '–')} | {' | '.join(numbers)} |")
    of_test = "are those of test documents" if measure.exponential else f"the means over the test {measure.observation}s"
    lines += ["", f"{plural} {of_test}, which the fit did not use, under the adapter of the task.", ""]
    if picture:
        lines += [f"![distance of each task from Θ]({PICTURE})", "", "Distance of each task's adapter from Θ.", ""]
    lines += ["## Use", "", *_snippet(facts, first)]
    if second != first:
        lines += [
            "", "Load another adapter and switch to it:", "", "```python",
            f"model.load_adapter({_place(facts, second)}, adapter_name={second!r}{_subfolder(facts, second)})",
            f"model.set_adapter({second!r})",
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))", "```", "",
            "PEFT also takes one adapter name a row, `model.generate(..., adapter_names=[...])`. This needs a base whose adapted "
            "layers all keep the batch dimension (OPT's feed-forward layers do not).",
        ]  # fmt: skip
    return _card(facts, lines)


def adapter_card(
    facts: CardFacts,
    task: str | None,
    folder: str,
    kind: str,
    score: Mapping[str, Any] | None = None,
    *,
    relative_error: float = 0.0,
) -> ModelCard:
    """Make the card of one adapter.

    Args:
        facts: facts that all cards state.
        task: the task's name; None for Θ.
        folder: the adapter's folder within the export.
        kind: what the adapter is: "the MAP estimate", "draw 3 of the posterior", ...
        score: the task's entry in ``metrics.json``; None: the card states no scores.
        relative_error: ‖ΔW − (α/r) B A‖ / ‖ΔW‖ of an adapter that has no exact LoRA form.
    """
    name = "Θ, the global mean of all tasks" if task is None else plain(task)
    origin = "a hierarchical fit by `bora_pyro`"
    if facts.adapted and task is None:
        kind, origin = "Θ", f"{origin}, the prior of new tasks that it was adapted to"
    elif facts.adapted:
        origin = f"an adaptation of {origin} to new tasks"
    lines = [f"# {name}", "", f"A LoRA adapter of `{facts.base_model}`: {kind} of {origin}.", ""]
    if relative_error:
        lines += [f"Its change of the weights has no exact LoRA form; this one has a relative error of {relative_error:.2g}.", ""]
    if score is not None:
        measure = measure_of(score)
        base, adapted = (_number(score.get(f"{of}test_{measure.name}")) for of in ("base_", ""))
        what = "Perplexity" if measure.exponential else measure.unit
        others = "drawn towards the other tasks" if facts.adapted else "on the documents of the other tasks"
        lines += [
            f"Fitted on {score.get('train_documents', '–')} documents of the task, and {others} through Θ. "
            f"{what} of its test documents: {base} under the base, {adapted} under the adapter of the fit.", "",
        ]  # fmt: skip
    return _card(facts, [*lines, *_privacy(facts), "## Use", "", *_snippet(facts, folder)])


def _privacy(facts: CardFacts) -> list[str]:
    return [f"Privacy: {plain(facts.privacy)}.", ""] if facts.privacy else []


def _origin(facts: CardFacts) -> str:
    """Say how the adapters of an export were made. The last sentence ends with Θ and has no full stop."""
    if facts.adapted:
        return (
            "A finished fit by `bora_pyro` (BoRA, Bayesian hierarchical LoRA) was adapted to new tasks: each task's adapter θ_d "
            "was inferred from its own texts alone. Its prior is a Normal around the global mean Θ that the fit had learned from "
            "other tasks, so few texts are enough. `global-mean` is that Θ"
        )
    return (
        "They were fitted together by `bora_pyro` (BoRA, Bayesian hierarchical LoRA): all task adapters θ_d have the same Normal "
        "prior around a global mean Θ, so tasks with few texts borrow from the others. `global-mean` is Θ"
    )


def _snippet(facts: CardFacts, folder: str) -> list[str]:
    """Code that loads one adapter, from the repository or, if there is none, from within the folder of the export."""
    if _own_name(facts.base_model):
        load = [
            "from bora_pyro import Backbone", "from peft import PeftModel", "",
            f"backbone = Backbone.from_pretrained({facts.base_model!r})", "base, tokenizer = backbone.model, backbone.tokenizer",
        ]  # fmt: skip
    else:
        load = [
            "from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f"base = AutoModelForCausalLM.from_pretrained({facts.base_model!r})",
            f"tokenizer = AutoTokenizer.from_pretrained({facts.base_model!r})",
        ]  # fmt: skip
    where = "" if facts.repo_id else "Run this in the folder of the export:\n\n"
    return [
        f"{where}```python", *load,
        f"model = PeftModel.from_pretrained(base, {_place(facts, folder)}{_subfolder(facts, folder)})",
        "inputs = tokenizer(\"Once\", return_tensors=\"pt\", return_token_type_ids=False)",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))", "```",
    ]  # fmt: skip


def _own_name(base_model: str) -> bool:
    """Whether transformers cannot load the base by its name alone, and `Backbone.from_pretrained` can."""
    return base_model.startswith("builtin:") or base_model.lower().endswith(".gguf")


def _place(facts: CardFacts, folder: str) -> str:
    return repr(facts.repo_id or folder)


def _subfolder(facts: CardFacts, folder: str) -> str:
    return f", subfolder={folder!r}" if facts.repo_id else ""


def _card(facts: CardFacts, lines: Sequence[str]) -> ModelCard:
    body = "\n".join(lines)
    return ModelCard(f"---\n{facts.data().to_yaml()}\n---\n\n{body}\n")


def plain(text: object) -> str:
    """Escape a text from the data for one cell of a Markdown table: no line break, no mark-up.

    >>> plain("a | <b>\\n*c*")
    'a &#124; &lt;b&gt; \\\\*c\\\\*'
    """
    marks = str.maketrans({"|": "&#124;", "<": "&lt;", ">": "&gt;", "&": "&amp;", **{mark: f"\\{mark}" for mark in "*_`[]#!\\"}})
    return " ".join(str(text).split()).translate(marks)


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "–"
