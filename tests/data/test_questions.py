"""Questions with options: a question is one document, whose options stay in one batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from bora_pyro import InputError, TaskData
from bora_pyro.backbone.backbone import BUILTIN_BASES
from bora_pyro.data import TokenSplit, load_tasks, table
from bora_pyro.data.subset import subset
from bora_pyro.inference.folds import Folds
from bora_pyro.inference.steps import EpochSteps
from bora_pyro.inference.task_groups import task_groups
from tests.data_fixtures import WORDS, word_tokenizer
from tests.tiny import tiny_questions

CROSSFIT = Path(__file__).parents[2] / "shared" / "data" / "crossfit_choices.jsonl.gz"
OPTIONS = ["red", "green blue", "one"]
COLUMNS = {"prompt_column": "prompt", "completion_column": "completion", "options_column": "options"}


def rows(number=10, *, tasks="ab"):
    """Prompts with three options, which are JSON text, as in a .csv file."""
    return [
        {
            "task": task, "prompt": f"{WORDS[3 + n % 3]} ", "completion": OPTIONS[(n + d) % 3],
            "options": json.dumps(OPTIONS),
        }
        for d, task in enumerate(tasks)
        for n in range(number)
    ]  # fmt: skip


def load(changed=None, **options):
    return load_tasks(table(changed or rows()), word_tokenizer(), **COLUMNS, **options)


@pytest.mark.parametrize("streaming", [False, True])
def test_each_option_is_a_row_behind_the_prompt(streaming):
    data = load(streaming=streaming)
    assert repr(data.train) == "TokenSplit(12 questions with 36 options, 84 predicted tokens, 2 tasks)"
    assert repr(data).endswith("documents: 12 train, 4 validation, 4 test)")
    assert data.train.documents_per_task == [6, 6]
    tokenizer = word_tokenizer()
    for question in range(12):
        members = (data.train.document_of == question).nonzero()[:, 0].tolist()
        texts = [tokenizer.decode(data.train.document(n)).split() for n in members]
        assert [text[2:-1] for text in texts] == [option.split() for option in OPTIONS]
        assert len({text[1] for text in texts}) == 1
        assert [(text[0], text[-1]) for text in texts] == [("<s>", "</s>")] * 3
        assert [int(data.train.predicted[n]) for n in members] == [2, 3, 2]
        assert int(data.train.correct[members].sum()) == 1
    assert data.digest == load(streaming=not streaming).digest


def test_the_right_option_is_the_completion():
    of_lists = [row | {"options": OPTIONS} for row in rows()]
    data, tokenizer = load(of_lists), word_tokenizer()
    assert data.digest == load().digest
    right = [tokenizer.decode(data.train.document(n)[2:-1]) for n in data.train.correct.nonzero()[:, 0].tolist()]
    as_text = load_tasks(table(rows()), tokenizer, prompt_column="prompt", completion_column="completion")
    assert right == [tokenizer.decode(as_text.train.document(n)[2:-1]) for n in range(len(as_text.train))]


def test_the_digest_knows_which_option_is_right():
    one = tiny_questions()
    flipped = one.replace(correct=one.correct.clone())
    first = (one.document_of == 0).nonzero()[:, 0]
    flipped.correct[first] = one.correct[first].roll(1)
    none = one.subset(torch.arange(0))
    digests = {TaskData(["a", "b", "c"], split, none, none).digest for split in (one, flipped)}
    assert len(digests) == 2


def test_a_limit_of_documents_counts_questions():
    data = load(max_train_documents=2, max_eval_documents=1)
    assert data.train.documents_per_task == [2, 2]
    assert (len(data.train), len(data.test)) == (12, 6)
    few = subset(data, ["b"], max_train_documents=1)
    assert (few.train.num_documents, len(few.train), len(few.test)) == (1, 3, 3)


# Batches


def check_whole(split, batches):
    """Each question is in one batch with all its rows, one after the other."""
    seen = []
    for batch in batches:
        documents = split.document_of[batch.index]
        assert documents.unique_consecutive().tolist() == documents[batch.first_rows].tolist()
        assert torch.equal(documents[batch.first_rows][batch.question], documents)
        assert torch.equal(batch.correct, split.correct[batch.index])
        for document in documents.unique().tolist():
            assert (documents == document).sum() == (split.document_of == document).sum()
        seen += documents[batch.first_rows].tolist()
    assert sorted(seen) == [*range(split.num_documents)]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("budget", [1, 20, 50, 10_000])
def test_options_never_fall_apart(budget, seed):
    split = tiny_questions((7, 4, 9))
    batches = list(split.batches(token_budget=budget, seed=seed))
    check_whole(split, batches)
    for batch in batches:
        assert batch.input_ids.numel() <= budget or len(batch.first_rows) == 1
    for tokens in (1, 30, 10_000):
        parts = [part for batch in batches for part in batch.parts(tokens)]
        check_whole(split, parts)
        assert sum(part.share for part in parts) == pytest.approx(len(batches))
        assert all(part.input_ids.numel() <= max(tokens, 1) or len(part.first_rows) <= 2 for part in parts)


def test_steps_folds_and_groups_keep_questions_whole():
    split = tiny_questions((7, 4, 9))
    steps = EpochSteps(split, token_budget=40, seed=1, accumulate=2, partition=[torch.tensor([0, 2]), torch.tensor([1])])
    check_whole(split, [batch for step in steps for batch in step])
    folds = Folds.of(split, "half", learns_tau=True)
    assert sorted(torch.cat([folds.choosing, folds.teaching]).tolist()) == [*range(len(split))]
    choosing, teaching = split.subset(folds.choosing), split.subset(folds.teaching)  # refused if a question fell apart
    assert abs(choosing.num_documents - teaching.num_documents) <= 3
    none = split.subset(torch.arange(0))
    data = TaskData(["a", "b", "c"], split, none, none)
    for group in task_groups(data, token_budget=150):
        of_group = split.subset(torch.isin(split.task, group).nonzero()[:, 0])
        assert len(of_group.batches(token_budget=150)) == 1 or len(group) == 1


def test_own_rows_are_one_for_each_question():
    split = tiny_questions()
    [batch] = split.batches(token_budget=10_000)
    assert torch.equal(replace(batch, own_rows=True).row, batch.question)
    assert batch.row.tolist() == batch.task.tolist()


# What is refused, and what is left out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": ["red"]}, "give a list of two or more texts"),
        ({"options": ["red", " "]}, "give a list of two or more texts"),
        ({"options": "no JSON"}, "is not JSON"),
        ({"options": ["rad", "green"], "completion": "red"}, r"lacks the completion 'red'.* by letter; did you mean 'rad'\?"),
        ({"options": ["red", "red"], "completion": "red"}, "has the option 'red' alone; give two different ones or more"),
    ],
)
def test_options_that_cannot_be_used(change, words):
    changed = rows()
    changed[7] |= {name: value if isinstance(value, str) else json.dumps(value) for name, value in change.items()}
    with pytest.raises(InputError, match=words) as error:
        load(changed)
    assert "row 8: column 'options'" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_that_stands_twice_counts_once():
    changed = rows()
    changed[3]["options"] = json.dumps(["red", *OPTIONS])
    data = load(changed)
    assert "1 prompt with an option twice; it counts once" in data.notes
    assert len(data.train) == 36


def test_questions_that_are_too_long_are_left_out_and_counted():
    changed = rows()
    long = {n: "green " * 30 for n in (0, 5, 15)}
    for n, option in long.items():
        changed[n]["options"] = json.dumps([*OPTIONS, option])
    data = load(changed, max_tokens=16)
    assert data.train.num_documents + data.validation.num_documents + data.test.num_documents == 17
    assert data.train.lengths.max() < 16
    assert "3 documents with an option that has no token, or more than 16 with its prompt, were dropped" in data.notes
    assert data.counts.left_out == {"with an option without a token, or too long": 3}
    for row in changed[:10]:
        row["options"] = json.dumps([*OPTIONS, "green " * 30])
    with pytest.raises(InputError, match=r"task 'a' .* has room for all its options within max_tokens 16"):
        load(changed, max_tokens=16)
    for row in changed:
        row["options"] = json.dumps([*OPTIONS, "green " * 30])
    with pytest.raises(InputError, match="give prompts and options of 16 tokens or fewer together"):
        load(changed, max_tokens=16)


def test_documents_without_prompts_have_no_options():
    texts = [{"task": row["task"], "text": row["completion"], "options": row["options"]} for row in rows()]
    with pytest.raises(InputError, match=r"'options', but the documents of .* are no prompts with completions"):
        load_tasks(table(texts), word_tokenizer(), options_column="options")
    chats = [row | {"prompt": [{"role": "user", "content": "one"}]} for row in rows()]
    chats = [row | {"completion": [{"role": "assistant", "content": row["completion"]}]} for row in chats]
    with pytest.raises(InputError, match="are no prompts with completions"):
        load(chats)
    with pytest.raises(InputError, match=r"has no column 'choices' \(options_column\)"):
        load_tasks(table(rows()), word_tokenizer(), **COLUMNS | {"options_column": "choices"})
    with pytest.raises(InputError, match="no option is split"):
        load(long_documents="split")


def test_a_split_knows_what_a_question_is():
    split = tiny_questions()
    with pytest.raises(InputError, match="some options of a question and not the others"):
        split.batches(documents=torch.arange(1))
    with pytest.raises(InputError, match=r"question 0 has 1 options, . of them right; give two options or more"):
        split.subset(torch.arange(1))
    two = split.correct.clone()
    two[(split.document_of == 2).nonzero()[:, 0]] = True
    with pytest.raises(InputError, match=r"question 2 has . options, . of them right"):
        split.replace(correct=two)
    with pytest.raises(InputError, match="document_index is missing"):
        TokenSplit.from_documents([[0, 5], [0, 6]], task=[0, 0], num_tasks=2, correct=[True, False])


@pytest.mark.skipif(not CROSSFIT.is_file(), reason="CrossFit's questions are not here")
def test_crossfits_questions_are_read():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
    few = {"split_column": "split", "max_tokens": 512, "max_train_documents": 2, "max_eval_documents": 1}
    data = load_tasks(str(CROSSFIT), tokenizer, **COLUMNS, **few)
    assert (data.num_tasks, data.train.num_documents) == (63, 126)
    assert "4 prompts with an option twice; it counts once" in data.notes
    options = torch.bincount(data.train.document_of)
    assert (int(options.min()), int(options.max())) == (2, 20)
