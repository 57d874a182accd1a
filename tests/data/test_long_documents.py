"""Long documents, cut or split: no token is lost, every one is predicted once, and the pieces stay together."""

from __future__ import annotations

import pytest
import torch

from bora_pyro.data import load_tasks, table
from bora_pyro.data.encode import encoder
from bora_pyro.data.tokenise import tokenise
from bora_pyro.errors import InputError
from tests.data_fixtures import END, START, WORDS, SlowWords, table_rows, word_tokenizer

RED, GREEN, BLUE, ONE, TWO, THREE = range(3, 9)


def split_texts(texts, tokenizer, max_tokens):
    rows = table([{"task": "a", "text": text} for text in texts])
    result = tokenise(rows, tokenizer, task_index={"a": 0}, max_tokens=max_tokens, long_documents="split")
    split = result.split
    return [(split.document(n).tolist(), int(split.characters[n])) for n in range(len(split))], result


@pytest.mark.parametrize("make", [word_tokenizer, lambda: word_tokenizer(template="<s> $A </s>"), SlowWords])
def test_pieces_begin_with_the_start_and_the_last_has_the_end(make):
    pieces, result = split_texts(["red green blue one two", "red green"], make(), max_tokens=4)
    assert pieces == [
        ([START, RED, GREEN, BLUE], len("red green blue")),
        ([START, ONE, TWO, END], len(" one two")),
        ([START, RED, GREEN, END], len("red green")),
    ]
    assert (result.num_documents, result.num_split, result.num_cut, result.num_dropped) == (2, 1, 0, 0)


@pytest.mark.parametrize("max_tokens", [2, 3, 4, 5, 9, 10, 11, 64])
@pytest.mark.parametrize("special", [{}, {"eos": False}, {"bos": False}])
def test_no_token_is_lost(max_tokens, special):
    tokenizer = word_tokenizer(**special)
    generator = torch.Generator().manual_seed(0)
    texts = [
        "  " * (n % 2) + " ".join(WORDS[k] for k in torch.randint(6, (n + 1,), generator=generator).tolist()) + " " * (n % 3)
        for n in range(12)
    ]
    whole = encoder(tokenizer, 10**6)({"task": texts, "text": texts})
    pieces = encoder(tokenizer, max_tokens, long_documents="split")({"task": texts, "text": texts})
    for n, text in enumerate(texts):
        own = [k for k, row in enumerate(pieces["row"]) if row == n]
        assert [token for k in own for token in pieces["input_ids"][k][1:]] == whole["input_ids"][n][1:]
        assert {pieces["input_ids"][k][0] for k in own} == {whole["input_ids"][n][0]}
        assert sum(pieces["characters"][k] for k in own) == len(text)
        lengths = [len(pieces["input_ids"][k]) for k in own]
        assert set(lengths[:-1]) <= {max_tokens}
        assert 2 <= lengths[-1] <= max_tokens
    assert not any(pieces["cut"])


def test_pieces_are_on_the_side_of_their_document_and_noted():
    rows = table_rows("ab")
    cut = load_tasks(table(rows), word_tokenizer(), group_column="group", max_tokens=4)
    whole = load_tasks(table(rows), word_tokenizer(), group_column="group")
    data = load_tasks(table(rows), word_tokenizer(), group_column="group", max_tokens=4, long_documents="split")
    assert data.split_record == cut.split_record == whole.split_record
    for name in ("train", "validation", "test"):
        one, all_of_it = getattr(data, name), getattr(whole, name)
        assert one.num_tokens == all_of_it.num_tokens
        assert int(one.characters.sum()) == int(all_of_it.characters.sum())
        assert torch.cat([one.document(n)[1:] for n in range(len(one))]).tolist() == [
            token for n in range(len(all_of_it)) for token in all_of_it.document(n)[1:].tolist()
        ]
    bodies = [len(row["text"].split()) + 1 for row in rows]  # with the end; three to a piece
    long = [-(-body // 3) for body in bodies if body > 3]
    assert data.notes == [f"{len(long)} of 20 documents are longer than 4 tokens and were split into {sum(long)} pieces"]
    assert sum(len(getattr(data, name)) for name in ("train", "validation", "test")) == 20 - len(long) + sum(long)


def test_the_number_of_documents_that_are_kept_is_of_whole_ones():
    rows = [{"task": task, "text": " ".join([WORDS[n]] * 5)} for task in "ab" for n in range(6)]
    data = load_tasks(table(rows), word_tokenizer(), max_tokens=4, long_documents="split", max_train_documents=1)
    assert data.train.documents_per_task == [1, 1]
    assert len(data.train) == 4  # in two pieces each


def test_another_way_is_refused():
    with pytest.raises(InputError, match="long_documents is 'spilt'; allowed: cut, split; did you mean 'split'"):
        load_tasks(table(table_rows("ab")), word_tokenizer(), long_documents="spilt")
