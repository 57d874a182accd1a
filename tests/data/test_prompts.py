"""Prompt and completion: the prompt is read, the completion is predicted, and nothing else counts."""

from __future__ import annotations

import math

import datasets
import pandas as pd
import pytest
import torch

from bora_pyro import evaluate, load_tasks
from bora_pyro.data import TokenSplit, read_table, table
from bora_pyro.data.digest import document_checksums
from bora_pyro.data.subset import subset
from bora_pyro.data.tasks import TaskData
from bora_pyro.data.tokenise import tokenise
from bora_pyro.diagnostics.unknown_texts import sample_texts
from bora_pyro.errors import InputError
from bora_pyro.guides import map_guide
from bora_pyro.inference.loop import Loop
from bora_pyro.predict.mixture import predictive
from tests.data_fixtures import CHAT_TEMPLATE, END, START, UNKNOWN, SlowWords, word_tokenizer
from tests.tiny import random_weights, tiny_bora
from tests.tiny_base import script

RED, GREEN, BLUE, ONE, TWO, THREE = range(3, 9)
READ, OWN = False, True


def encode(pairs, tokenizer=None, **options):
    """(ids, labels, characters) of each document."""
    rows = [{"task": "a", "prompt": prompt, "text": text} for prompt, text in pairs]
    result = tokenise(table(rows), tokenizer or word_tokenizer(), task_index={"a": 0}, **options)
    split = result.split
    return [(split.document(n).tolist(), split.labels(n).tolist(), int(split.characters[n])) for n in range(len(split))], result


@pytest.mark.parametrize("template", [None, "<s> $A", "$A </s>", "<s> $A </s>"])
def test_the_completion_and_the_end_are_predicted(template):
    documents, _ = encode([("red green", " blue one")], word_tokenizer(template=template))
    assert documents == [([START, RED, GREEN, BLUE, ONE, END], [-100, -100, -100, BLUE, ONE, END], len(" blue one"))]


def test_a_tokenizer_without_offsets():
    documents, _ = encode([("red green", " blue one two three")], SlowWords(), max_tokens=5, long_documents="split")
    head = [START, RED, GREEN]
    assert [ids for ids, _, _ in documents] == [[*head, BLUE, ONE], [*head, TWO, THREE], [*head, END]]
    assert sum(characters for _, _, characters in documents) == len(" blue one two three")


def test_an_empty_prompt_leaves_a_text():
    assert encode([("", "red")])[0] == [([START, RED, END], [-100, RED, END], 3)]


def test_where_the_tokens_run_over_the_seam_both_sides_are_tokenised_apart():
    # "gre" + "en" would be one word; what a model goes on from is the prompt's own tokens
    documents, _ = encode([("red gre", "en blue")])
    assert documents == [([START, RED, UNKNOWN, UNKNOWN, BLUE, END], [-100, -100, -100, UNKNOWN, BLUE, END], len("en blue"))]


@pytest.mark.parametrize(
    ("max_tokens", "ids", "characters"),
    [(5, [START, RED, GREEN, BLUE, ONE], len(" blue one")), (4, [START, RED, GREEN, BLUE], len(" blue"))],
)
def test_a_long_completion_is_cut(max_tokens, ids, characters):
    documents, result = encode([("red green", " blue one")], max_tokens=max_tokens)
    assert documents == [(ids, [-100] * 3 + ids[3:], characters)]
    assert result.num_cut == 1


@pytest.mark.parametrize("long_documents", ["cut", "split"])
def test_a_prompt_that_leaves_no_room_makes_no_document(long_documents):
    documents, result = encode([("red green", " blue"), ("red", " one")], max_tokens=3, long_documents=long_documents)
    assert documents[0][:2] == ([START, RED, ONE], [-100, -100, ONE])
    assert result.num_dropped == 1


def test_every_piece_of_a_long_completion_has_the_prompt():
    documents, result = encode([("red green", " blue one two ")], max_tokens=5, long_documents="split")
    head = [START, RED, GREEN]
    assert documents == [
        ([*head, BLUE, ONE], [-100] * 3 + [BLUE, ONE], len(" blue one")),
        ([*head, TWO, END], [-100] * 3 + [TWO, END], len(" two ")),
    ]
    assert (result.num_documents, result.num_split, result.num_cut) == (1, 1, 0)


def test_a_table_of_prompts():
    frame = pd.DataFrame({"task": ["a"] * 4, "q": ["Why?", None, "So?", "?"], "a": [" It is.", " Yes.", " ", None], "text": "x"})
    result, notes = read_table(frame, prompt_column="q", completion_column="a")
    assert result.to_list() == [
        {"task": "a", "prompt": "Why?", "text": " It is.", "group": "row 1"},
        {"task": "a", "prompt": "", "text": " Yes.", "group": "row 2"},
    ]
    assert notes == ["2 documents with empty text were dropped"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_column": "q"}, "prompt_column is given without completion_column; .*give both, or text_column alone"),
        ({"completion_column": "a"}, "completion_column is given without prompt_column"),
        ({"prompt_column": "q", "completion_column": "b"}, r"no column 'b' \(completion_column\)"),
        ({"prompt_column": "p", "completion_column": "a"}, r"no column 'p' \(prompt_column\)"),
        ({"prompt_column": "q", "completion_column": "a", "text_column": "t"}, "text_column and prompt_column are given; "),
        ({"prompt_column": "q", "completion_column": "a", "messages_column": "m"}, "prompt_column and messages_column are given"),
    ],
)
def test_columns_that_do_not_go_together(options, message):
    with pytest.raises(InputError, match=message) as caught:
        read_table(pd.DataFrame({"task": ["a"], "q": ["?"], "a": ["!"]}), **options)
    assert "\n" not in str(caught.value)


def test_equal_completions_of_different_prompts_are_different_documents():
    rows = [{"task": task, "q": f"{task} {n}", "a": " yes"} for task in "ab" for n in range(5)]
    data = load_tasks(table(rows), word_tokenizer(), prompt_column="q", completion_column="a")
    assert data.notes == []
    again = load_tasks(table(rows), word_tokenizer(), text_column="a")
    assert again.notes == ["1 text stands in more than one split (kept)"]


def test_prompts_and_texts_are_cached_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    first, _ = encode([("red", " green")])
    assert encode([("red", " green")])[0] == first
    assert encode([("", "red green")])[0][0][1] == [-100, RED, GREEN, END]
    assert encode([("red", " green")], long_documents="split")[0] == first
    assert len(list((tmp_path / "bora_pyro").glob("*.arrow"))) == 3


# What the rest of the library makes of tokens that are only read: documents 0 and 2 have prompts of three and one tokens.
DOCUMENTS, PROMPTS, TASK = [[0, 5, 6, 7, 8, 9], [0, 9, 8], [0, 4, 4, 5]], [4, 1, 2], [0, 1, 0]


@pytest.fixture
def split():
    return TokenSplit.from_documents(DOCUMENTS, task=TASK, num_tasks=3, pad_token_id=1, read=PROMPTS)


def test_counts_are_of_predicted_tokens(split):
    assert split.predicted.tolist() == [2, 2, 2]
    assert split.num_tokens == 6
    assert repr(split) == "TokenSplit(3 documents, 6 predicted tokens, 3 tasks)"
    assert split.characters.tolist() == [2, 2, 2]
    assert split.tokens_per_task.tolist() == [10, 3, 0]  # the work
    assert split.documents_per_task == [2, 1, 0]


@pytest.mark.parametrize("token_budget", [1, 12, 100])
def test_batches_and_their_parts_have_the_labels_of_the_documents(split, token_budget):
    for batch in split.batches(token_budget=token_budget, seed=0):
        for part in (batch, *batch.parts(6)):
            for row, n in enumerate(part.index.tolist()):
                length = len(DOCUMENTS[n])
                expected = [-100] * PROMPTS[n] + DOCUMENTS[n][PROMPTS[n] :]
                assert part.labels[row, :length].tolist() == expected == split.labels(n).tolist()
                assert (part.labels[row, length:] == -100).all()
            assert part.predicted.tolist() == split.predicted[part.index].tolist()


def test_a_subset_has_the_documents_as_they_are(split):
    for documents in ([2, 0], [1], [2, 0, 0, 2, 2], []):
        part = split.subset(torch.tensor(documents, dtype=torch.int64))
        assert [part.labels(n).tolist() for n in range(len(part))] == [split.labels(n).tolist() for n in documents]
        assert part.predicted.tolist() == split.predicted[documents].tolist()
        assert part.task.tolist() == split.task[documents].tolist()
    assert sample_texts(split, 2, seed=0).num_tokens == 4


def test_some_tasks_have_the_documents_as_they_are(split):
    part = subset(TaskData(["a", "b", "c"], split, split, split), ["c", "a"], max_train_documents=1)
    assert [part.test.labels(n).tolist() for n in range(2)] == [split.labels(n).tolist() for n in (0, 2)]
    assert (part.test.task.tolist(), part.test.num_tasks, part.test.num_tokens) == ([0, 0], 2, 4)
    assert part.train.num_tokens == 2


def by_hand(model, theta, n):
    """log p of what document n has behind its prompt, from the logits."""
    [batch] = TokenSplit.from_documents([DOCUMENTS[n]], task=[TASK[n]], num_tasks=3).batches()
    with torch.no_grad():
        log_p = model.logits(batch, theta)[0].log_softmax(-1)
    return sum(float(log_p[place - 1, DOCUMENTS[n][place]]) for place in range(PROMPTS[n], len(DOCUMENTS[n])))


def test_perplexity_is_that_of_the_completions(split):
    model = tiny_bora()
    theta = random_weights(model)
    (scores,) = evaluate(model, split, theta)
    expected = [by_hand(model, theta, n) for n in range(3)]
    assert scores.log_likelihood.tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.tokens.tolist() == [2, 2, 2]
    assert scores.perplexity() == pytest.approx(math.exp(-sum(expected) / 6), rel=1e-5)
    assert scores.perplexity(0) == pytest.approx(math.exp(-(expected[0] + expected[2]) / 4), rel=1e-5)
    predictions = predictive(model, split, lambda: [theta])
    assert predictions.label.tolist() == [8, 9, 9, 8, 4, 5]
    assert predictions.perplexity() == pytest.approx(scores.perplexity(), rel=1e-5)


def test_the_loss_of_a_step_is_a_predicted_token_s(split):
    model = tiny_bora()
    data = TaskData(["a", "b", "c"], split, split, split)
    options = {"warmup": 0.1, "token_budget": 100, "accumulate": 1, "gradient_clip": 1.0, "seed": 0, "epochs": 1}
    loop = Loop(model, data, map_guide(model), learning_rate=1e-30, deviation_reach=0.0, **options)
    report = loop.run_epoch(None)
    (base,) = evaluate(model, split, None)  # the adapters begin at no change
    assert report["loss"] == pytest.approx(-float(base.log_likelihood.sum()) / 6, rel=1e-5)
    assert loop.observations == 6


def test_the_checksum_of_a_document_knows_what_is_predicted(split):
    plain = TokenSplit.from_documents(DOCUMENTS, task=TASK, num_tasks=3)
    other = TokenSplit.from_documents(DOCUMENTS, task=TASK, num_tasks=3, read=[3, 1, 2])
    sums = [document_checksums(each).tolist() for each in (split, other, plain)]
    assert sums[0][0] != sums[1][0] != sums[2][0]
    assert sums[0][1:] == sums[1][1:]


def test_the_arms_of_the_benchmark_count_predicted_tokens(split):
    work = script("arms").Work(tiny_bora().backbone, split, None, rows=2, max_tokens=6, rank=2, tau=1.0)
    assert work.predicted(torch.tensor([0, 2])) == 4
    assert work.features()[0]["labels"] == [-100] * 4 + [8, 9]


def test_bad_masks_give_one_line():
    with pytest.raises(InputError, match="document 1 has no token to predict; leave it out"):
        TokenSplit.from_documents([[1, 2], [1, 2]], task=[0, 0], num_tasks=1, read=[1, 2])
    tokens, lengths, one = torch.tensor([1, 2]), torch.tensor([2]), torch.tensor([0])
    for observed in ([True, True], [False]):
        with pytest.raises(InputError, match="give a bool a token, False for the first"):
            TokenSplit(tokens, lengths, task=one, characters=one, num_tasks=1, observed=torch.tensor(observed))
    with pytest.raises(InputError, match=r"offsets \(1\) and lengths \(1\) disagree, or reach beyond the 2 tokens"):
        TokenSplit(tokens, lengths, task=one, characters=one, num_tasks=1, offsets=torch.tensor([1]))


@pytest.mark.parametrize(
    ("cells", "options", "words"),
    [
        (
            {"p": "red red red", "text": "blue"},
            {"prompt_column": "p", "completion_column": "text"},
            "6 documents without a token to predict within 4 were dropped); give prompts that leave room for a token of their "
            "completions within 4, and",
        ),
        (
            {"m": [{"role": "user", "content": "red"}, {"role": "Assistant", "content": "blue"}]},
            {"messages_column": "m", "chat_template": CHAT_TEMPLATE},
            "6 documents without a token to predict within 4 were dropped); give chats in which a turn of the role 'assistant' "
            "begins within 4 tokens, and",
        ),
    ],
)
def test_where_nothing_is_left_the_error_says_why(cells, options, words):
    rows = [{"task": task, **cells} for task in "ab" for _ in range(3)]
    with pytest.raises(InputError, match="no training document is left") as caught:
        load_tasks(table(rows), word_tokenizer(), max_tokens=4, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
