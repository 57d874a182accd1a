"""Continuations of one prompt by the base model, by the mean of all tasks and by the adapters of some tasks, or by gates."""

from __future__ import annotations

import numpy as np

from bora_pyro.files.text import replaced
from bora_pyro.predict.authors import Authors
from bora_pyro.predict.generate import generate_side_by_side
from bora_pyro.report.blocks import Samples
from bora_pyro.runs.saved import SavedRun

_PROMPT_TOKENS = 8  # tokens of a document that serve as the default prompt, the start token included


def written_samples(run: SavedRun, *, number: int, prompt: str | None, max_new_tokens: int, temperature: float) -> Samples:
    """Continue one prompt with several adapters. A posterior run uses the posterior's centre.

    Args:
        run: the finished run.
        number: how many tasks continue the prompt: those with the most and the fewest training documents, and others evenly
            spaced between them.
        prompt: the text to continue, or a user's message if the fit is one to chats; None: the beginning of the first test
            document.
        max_new_tokens: largest number of tokens in a continuation.
        temperature: as for :func:`bora_pyro.predict.generate.generate_side_by_side`.

    Raises:
        InputError: the prompt cannot be continued.
    """
    raw = prompt is None  # the beginning of a document, also of a chat, is not a user's message
    if prompt is None:
        documents, tokenizer = run.data.test if run.data.test.num_tokens else run.data.train, run.fitted.model.backbone.tokenizer
        assert tokenizer is not None  # it tokenised the documents
        document = documents.document(0)
        prompt = str(tokenizer.decode(document[: max(2, min(_PROMPT_TOKENS, len(document) - 1))], skip_special_tokens=True))
    counts = dict(zip(run.data.tasks, run.data.train.documents_per_task, strict=True))
    order = sorted(counts, key=lambda task: -counts[task])
    chosen = [order[n] for n in np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)]
    authors = Authors(run.data.tasks, routed=run.fitted.model.router.reads_all_tasks)
    notes = {authors.base: "no adapter"}
    if authors.routed is not None:
        notes[authors.routed] = "gates choose the adapters of each token"
    else:
        notes[authors.mean] = "Θ, the mean of all tasks"
        notes |= {task: f"{counts[task]:,} training document{'s' * (counts[task] != 1)}" for task in chosen}
    texts = generate_side_by_side(
        run.fitted,
        prompt,
        [*notes],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        raw=raw,
    )
    return Samples(prompt, [(replaced(text.task), notes[text.task], text.text) for text in texts])
