"""README.md files of exported adapters, as the Hugging Face hub reads them.

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

TAGS = ("lora", "bora", "bora_pyro", "pyro", "multi-task", "text-generation")
#: The picture of the export's card, a file beside it.
PICTURE = "shrinkage.png"


@dataclass(frozen=True)
class CardFacts:
    """What the cards of one export have in common.

    Attributes:
        base_model: the base, as ``adapter_config.json`` names it.
        license: an identifier of the hub, or None: whoever publishes adds one, which must go with the base's and the texts'.
        repo_id: ``USER/NAME`` where the export goes to the hub; None: the snippets read the folder itself.
        model: the model in a line.
        adapted: the tasks are new ones, to which a finished fit to others was adapted.
    """

    base_model: str
    license: str | None = None
    repo_id: str | None = None
    model: str = ""
    adapted: bool = False

    def data(self) -> ModelCardData:
        """The block of metadata; a base that is a folder of this machine is left out, since the hub knows it not."""
        local = self.base_model.startswith("builtin:") or Path(self.base_model).exists() or self.base_model.count("/") > 1
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
    """The card of an export: what is in it, how well each adapter predicts, and how to load them.

    Args:
        facts: what all cards say.
        title: the heading.
        scores: of each task by its folder, as ``metrics.json`` has them: ``name``, ``train_documents``, ``base_test_perplexity``,
            ``test_perplexity``, ``deviation_norm``; of tasks that are in the export and of Θ's folder nothing.
        folders: all adapter folders, Θ and draws included.
        picture: whether the picture of the shrinkage stands beside the card.
    """
    first, second = [*folders, *folders][:2]
    lines = [
        f"# {plain(title)}",
        "",
        f"{len(folders)} LoRA adapters of `{facts.base_model}`, one folder each. {_origin(facts)}, for texts of no known task"
        + ("; `<task>--draw-<k>` are draws of the posterior." if any("--draw-" in name for name in folders) else "."),
        "",
    ]
    if facts.model:
        lines += [f"Model: `{facts.model}`", ""]
    lines += [
        "| task | folder | training documents | perplexity, base | perplexity, adapted | ‖θ_d − Θ‖ |",
        "|---|---|---|---|---|---|",
    ]
    for folder, row in scores.items():
        numbers = [_number(row.get(name)) for name in ("base_test_perplexity", "test_perplexity", "deviation_norm")]
        lines.append(f"| {plain(row['name'])} | `{folder}` | {row.get('train_documents', '–')} | {' | '.join(numbers)} |")
    lines += ["", "Perplexities are of test documents that no part of the fit has seen, at the adapter of the task.", ""]
    if picture:
        lines += [f"![distance of each task from Θ]({PICTURE})", "", "Distance of each task's adapter from Θ.", ""]
    lines += ["## Use", "", *_snippet(facts, first)]
    if second != first:
        lines += [
            "", "Another adapter beside it:", "", "```python",
            f"model.load_adapter({_place(facts, second)}, adapter_name={second!r}{_subfolder(facts, second)})",
            f"model.set_adapter({second!r})",
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))", "```", "",
            "PEFT also takes one name a row, `model.generate(..., adapter_names=[...])`, where the base keeps its rows apart in "
            "all adapted layers (OPT's feed-forward layers do not).",
        ]  # fmt: skip
    return _card(facts, lines)


def adapter_card(facts: CardFacts, task: str | None, folder: str, kind: str, score: Mapping[str, Any] | None = None) -> ModelCard:
    """The card of one adapter.

    Args:
        facts: what all cards say.
        task: the task's name; None for Θ, whose adapter is no one task's.
        folder: the adapter's folder within the export.
        kind: what the adapter is: "the MAP estimate", "draw 3 of the posterior", ...
        score: the task's entry in ``metrics.json``.
    """
    name = "Θ, the global mean of all tasks" if task is None else plain(task)
    origin = "a hierarchical fit by `bora_pyro`"
    if facts.adapted and task is None:
        kind, origin = "Θ", f"{origin}, the prior of new tasks that it was adapted to"
    elif facts.adapted:
        origin = f"an adaptation of {origin} to new tasks"
    lines = [f"# {name}", "", f"A LoRA adapter of `{facts.base_model}`: {kind} of {origin}.", ""]
    if score is not None:
        base, adapted = _number(score.get("base_test_perplexity")), _number(score.get("test_perplexity"))
        others = "held to those of other tasks" if facts.adapted else "on those of the others"
        lines += [
            f"Fitted on {score.get('train_documents', '–')} documents of the task, and {others} through Θ. "
            f"Perplexity of its test documents: {base} under the base, {adapted} under the adapter of the fit.", "",
        ]  # fmt: skip
    return _card(facts, [*lines, "## Use", "", *_snippet(facts, folder)])


def _origin(facts: CardFacts) -> str:
    """How the adapters of an export came about; the sentence ends with Θ."""
    if facts.adapted:
        return (
            "A finished fit by `bora_pyro` (BoRA, Bayesian hierarchical LoRA) was adapted to new tasks: each task's adapter θ_d "
            "was inferred from its own texts alone, under the Normal around a global mean Θ that the fit had learned from other "
            "tasks, so that few texts are enough. `global-mean` is that Θ"
        )
    return (
        "They were fitted together by `bora_pyro` (BoRA, Bayesian hierarchical LoRA): every task's adapter θ_d under one Normal "
        "around a global mean Θ, so that tasks with few texts borrow from the others. `global-mean` is Θ"
    )


def _snippet(facts: CardFacts, folder: str) -> list[str]:
    """Loading one adapter; without a repository it is read from the export, in which the code runs."""
    if facts.base_model.startswith("builtin:"):
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
    where = "" if facts.repo_id else "From within the folder of the export:\n\n"
    return [
        f"{where}```python", *load,
        f"model = PeftModel.from_pretrained(base, {_place(facts, folder)}{_subfolder(facts, folder)})",
        "inputs = tokenizer(\"Once\", return_tensors=\"pt\", return_token_type_ids=False)",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))", "```",
    ]  # fmt: skip


def _place(facts: CardFacts, folder: str) -> str:
    return repr(facts.repo_id or folder)


def _subfolder(facts: CardFacts, folder: str) -> str:
    return f", subfolder={folder!r}" if facts.repo_id else ""


def _card(facts: CardFacts, lines: Sequence[str]) -> ModelCard:
    body = "\n".join(lines)
    return ModelCard(f"---\n{facts.data().to_yaml()}\n---\n\n{body}\n")


def plain(text: object) -> str:
    """A text from data as one cell of a table: no line break, no mark-up.

    >>> plain("a | <b>\\n*c*")
    'a &#124; &lt;b&gt; \\\\*c\\\\*'
    """
    marks = str.maketrans({"|": "&#124;", "<": "&lt;", ">": "&gt;", "&": "&amp;", **{mark: f"\\{mark}" for mark in "*_`[]#!\\"}})
    return " ".join(str(text).split()).translate(marks)


def _number(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, int | float) else "–"
