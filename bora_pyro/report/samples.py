"""Texts that the base, the mean of all tasks and some tasks' adapters write from one beginning."""

from __future__ import annotations

import numpy as np

from bora_pyro.files.text import replaced
from bora_pyro.predict.authors import Authors
from bora_pyro.predict.generate import generate_side_by_side
from bora_pyro.report.blocks import Samples
from bora_pyro.runs.saved import SavedRun

_BEGINNING = 8  # tokens of a document, its start included, that are a prompt where none is given


def written_samples(run: SavedRun, *, number: int, prompt: str | None, max_new_tokens: int, temperature: float) -> Samples:
    """Continue one text with several adapters, all of a posterior's centre where the run has one.

    Args:
        run: the finished run.
        number: how many tasks write: the ones with most and fewest training documents, and others evenly between.
        prompt: the beginning, or what a user says to a fit of chats; None: the beginning of the first test document.
        max_new_tokens: the longest continuation.
        temperature: as for :func:`bora_pyro.predict.generate.generate_side_by_side`.

    Raises:
        InputError: a prompt that cannot be continued.
    """
    raw = prompt is None  # a document's beginning, of a chat too, is no user's words
    if prompt is None:
        documents, tokenizer = run.data.test if run.data.test.num_tokens else run.data.train, run.fitted.model.backbone.tokenizer
        assert tokenizer is not None  # the documents were read with it
        document = documents.document(0)
        prompt = str(tokenizer.decode(document[: max(2, min(_BEGINNING, len(document) - 1))], skip_special_tokens=True))
    counts = dict(zip(run.data.tasks, run.data.train.documents_per_task, strict=True))
    order = sorted(counts, key=lambda task: -counts[task])
    chosen = [order[n] for n in np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)]
    authors = Authors(run.data.tasks)
    notes = {authors.base: "no adapter", authors.mean: "Θ, the mean of all tasks"}
    notes |= {task: f"{counts[task]:,} training document{'s' * (counts[task] != 1)}" for task in chosen}
    texts = generate_side_by_side(
        run.fitted,
        prompt,
        [authors.base, authors.mean, *chosen],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        raw=raw,
    )
    return Samples(prompt, [(replaced(text.task), notes[text.task], text.text) for text in texts])
