"""Chats: written by a template, and of their tokens the assistant's are predicted."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from bora_pyro.backbone.backbone import BUILTIN_BASES
from bora_pyro.data import load_tasks, read_table, table
from bora_pyro.data.chat import read_chats
from bora_pyro.data.chat_template import load_chat_template
from bora_pyro.data.encode import encoder
from bora_pyro.data.forms.chats import Chats
from bora_pyro.data.forms.messages import messages_of
from bora_pyro.data.tokenise import tokenise
from bora_pyro.errors import InputError
from tests.data_fixtures import CHAT, END, START, UNKNOWN, SlowWords, word_tokenizer
from tests.data_fixtures import CHAT_TEMPLATE as PLAIN

RED, GREEN, BLUE, ONE, TWO, THREE = range(3, 9)
MARKED = (
    "{% for m in messages %}{{ m.role }} : {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>{% endgeneration %} "
    "{% else %}{{ m.content }} </s> {% endif %}{% endfor %}"
)
# user : red </s> assistant : green blue </s> user : one </s> assistant : two </s>
_HEADER = [UNKNOWN, UNKNOWN]
IDS = [*_HEADER, RED, END, *_HEADER, GREEN, BLUE, END, *_HEADER, ONE, END, *_HEADER, TWO, END]
LABELS = [-100] * 6 + [GREEN, BLUE, END] + [-100] * 6 + [TWO, END]


def chat_messages(cell, where):
    """The messages that are stored of a cell."""
    return json.loads(Chats(None).content(messages_of(cell, where), None, where))


def encode(chats, *, template, **options):
    """(ids, labels, characters) of each document."""
    rows = [{"task": "a", "messages": json.dumps(chat)} for chat in chats]
    result = tokenise(table(rows), word_tokenizer(), task_index={"a": 0}, chat_template=template, **options)
    split = result.split
    return [(split.document(n).tolist(), split.labels(n).tolist(), int(split.characters[n])) for n in range(len(split))], result


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_all_turns_of_the_assistant_are_predicted_and_nothing_else(template):
    documents, _ = encode([CHAT], template=template)
    assert documents == [(IDS, LABELS, len(" green blue </s>") + len(" two </s>"))]


def test_a_chat_of_the_tokenizer_s_own_template():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = PLAIN
    rows = [{"task": task, "talk": CHAT, "doc_id": f"{task} {n}"} for task in "ab" for n in range(4)]
    data = load_tasks(table(rows), tokenizer, messages_column="talk")
    assert data.train.labels(0).tolist() == LABELS
    assert data.train.num_tokens == 5 * len(data.train)
    assert data.notes == ["1 text stands in more than one split (kept)"]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>\n"
    "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_both_ways_agree_with_transformers_own_mask():
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
    chat = [{"role": "system", "content": "Be brief."}, *CHAT, {"role": "user", "content": " ok?\nAye "}]
    expected = tokenizer.apply_chat_template(
        chat, chat_template=CHATML_MARKED, return_dict=True, return_assistant_tokens_mask=True
    )
    assert sum(expected["assistant_masks"]) > 10
    for template in (CHATML, CHATML_MARKED):
        [(ids, observed, stops)] = read_chats(tokenizer, [json.dumps(chat)], template)
        assert ids == expected["input_ids"]
        assert observed == [bool(own) for own in expected["assistant_masks"]]
        assert len(stops) == len(ids)
        own = tokenizer.decode([token for token, is_own in zip(ids, observed, strict=True) if is_own])
        assert own == "green blue<|im_end|>\ntwo<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "own"),
    [
        # closed where nobody is asked to go on; the end counts as the last turn's
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% else %}</s>{% endif %}",
            " green blue [end] two [end]</s>",
        ),
        # a request that begins a thought, of which the turns have none
        (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }} [end]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]\n(thinking){% endif %}",
            " green blue [end] two [end]",
        ),
        # another end mark for the last turn than for those before it
        (
            "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' and loop.last and not "
            "add_generation_prompt %} [return]{% else %} [end]{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant:{% endif %}",
            " green blue [end] two [return]",
        ),
        # no request at all
        (
            "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]"
            "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
            " green blue</s> two</s>",
        ),
    ],
)
def test_requests_and_ends_of_other_templates(template, own):
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
    [(ids, observed, _)] = read_chats(tokenizer, [json.dumps(CHAT)], template)
    assert tokenizer.decode([token for token, is_own in zip(ids, observed, strict=True) if is_own]) == own


def test_a_template_that_thinks_in_the_last_turn_alone_is_refused():
    template = (
        "{% for m in messages %}[{{ m.role }}] {% if loop.last and m.role == 'assistant' %}(thinking) {% endif %}{{ m.content }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
    with pytest.raises(InputError, match="writes message 2 differently when others follow"):
        list(read_chats(tokenizer, [json.dumps(CHAT)], template))


def test_the_assistant_may_have_the_first_word():
    first = [{"role": "assistant", "content": "red"}, *CHAT[:2]]
    documents, _ = encode([first], template=PLAIN)
    assert documents[0][1] == [-100, -100, RED, END, -100, -100, -100, -100, -100, -100, GREEN, BLUE, END]
    # where the template writes nothing before it, the start stands there
    bare = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %} {% endfor %}"
    documents, _ = encode([first[:1]], template=bare)
    assert documents == [([START, RED], [-100, RED], 3)]


DEFAULTS = "{% if messages[0].role != 'system' %}system : green red </s> {% endif %}"


@pytest.mark.parametrize(
    "words", ["red", "green", "assistant", "system : green", ": red", "  red ", [{"type": "text", "text": "red"}]]
)
@pytest.mark.parametrize("before", ["", DEFAULTS])
def test_words_of_the_first_turn_that_stand_before_it_too(words, before):
    text = "(m.content if m.content is string else m.content[0].text)|trim"
    template, marked = before + PLAIN.replace("m.content", text), before + MARKED.replace("m.content", text)
    chat = [{"role": "assistant", "content": words}, *CHAT[:2]]
    [(_, expected, _)], _ = encode([chat], template=marked)
    [(_, labels, _)], _ = encode([chat], template=template)
    assert labels == expected


@pytest.mark.parametrize(
    ("content", "template"),
    [
        (None, PLAIN.replace("m.content", "m.content or 'red'")),
        ([], PLAIN.replace("m.content", "'red'")),
        ("red", PLAIN.replace("m.content", "'red'")),
        ("one", "{% if messages[0].content == 'one' %}two {% endif %}" + PLAIN),
    ],
)
def test_a_first_turn_that_does_not_show_is_refused(content, template):
    chat = [{"role": "assistant", "content": content, "tool_calls": [1]}, *CHAT[:2]]
    with pytest.raises(InputError, match=r"begins with the assistant's turn, .* marks it with {% generation %}") as caught:
        encode([chat], template=template)
    assert "\n" not in str(caught.value)


def test_a_message_that_calls_a_tool_is_written_as_transformers_writes_it():
    tokenizer = word_tokenizer()
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "red"}], "name": None}
    chat = [CHAT[0], call, {"role": "tool", "content": "blue"}, CHAT[3]]
    template = PLAIN.replace("m.content", "m.tool_calls[0].name if m.tool_calls else m.content")
    [(ids, observed, _)] = read_chats(tokenizer, [json.dumps(chat_messages(chat, "here"))], template)
    assert ids == tokenizer.apply_chat_template(chat, chat_template=template, return_dict=True)["input_ids"]
    assert [token for token, own in zip(ids, observed, strict=True) if own] == [RED, END, TWO, END]


def test_a_chat_is_cut_and_one_without_the_assistant_dropped():
    documents, result = encode([CHAT], template=PLAIN, max_tokens=9)
    assert documents == [(IDS[:9], LABELS[:9], len(" green blue </s>"))]
    assert (result.num_cut, result.num_dropped) == (1, 0)
    documents, result = encode([CHAT, CHAT[:1]], template=PLAIN, max_tokens=6)
    assert (documents, result.num_dropped) == ([], 2)


def test_a_chat_is_split_and_pieces_without_the_assistant_left_out():
    documents, result = encode([CHAT], template=PLAIN, max_tokens=4, long_documents="split")
    # behind the first token, by threes: [: red </s>] [assistant : green] [blue </s> user] [: one </s>] [assistant : two] [</s>]
    assert [document[:2] for document in documents] == [
        ([START, *_HEADER, GREEN], [-100, -100, -100, GREEN]),
        ([START, BLUE, END, UNKNOWN], [-100, BLUE, END, -100]),
        ([START, *_HEADER, TWO], [-100, -100, -100, TWO]),
        ([START, END], [-100, END]),
    ]
    assert sum(document[2] for document in documents) == len(" green blue </s>") + len(" two </s>")
    assert (result.num_documents, result.num_split) == (1, 1)
    # a tokenizer without bos: the token before the piece stands there, and nothing that the text does not have
    forms = encoder(word_tokenizer(bos=False), 4, long_documents="split", chat_template=PLAIN)
    found = forms({"task": ["a"], "messages": [json.dumps(CHAT)]})
    assert found["input_ids"] == [IDS[k : k + 4] for k in (3, 6, 12, 15)]
    assert found["observed"] == [[False, *(token >= 0 for token in LABELS[k + 1 : k + 4])] for k in (3, 6, 12, 15)]


def test_a_note_says_what_was_dropped():
    rows = [{"task": task, "messages": CHAT} for task in "ab" for _ in range(5)]
    rows += [{"task": "a", "messages": CHAT[:1]}, {"task": "a", "messages": []}]
    data = load_tasks(table(rows), word_tokenizer(), messages_column="messages", chat_template=PLAIN, fractions=(1, 0, 0))
    assert "1 document with no messages was dropped" in data.notes
    assert "1 document without a token to predict within 256 was dropped" in data.notes


@pytest.mark.parametrize("form", ["jsonl", "parquet", "csv", "saved", "list"])
def test_every_form_of_table_gives_the_same_chats(tmp_path, form):
    rows = [{"task": "a", "chat": CHAT}, {"task": "b", "chat": [CHAT[0], {**CHAT[1], "name": "x"}]}]
    path = tmp_path / f"t.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    elif form == "csv":
        pd.DataFrame([{**row, "chat": json.dumps(row["chat"])} for row in rows]).to_csv(path, index=False)
    elif form == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    source = table(rows) if form == "list" else path
    result, notes = read_table(source, messages_column="chat")
    assert result.column_names == ["task", "messages", "group"]
    assert [json.loads(chat) for chat in result["messages"]] == [rows[0]["chat"], rows[1]["chat"]]
    assert notes == []


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[{", r"here is not JSON \(.*\); give a list of \{role, content\} as JSON text"),
        ('"hello"', r"here is a str \('hello'\), not a list of \{role, content\}"),
        (7, "here is a int"),
        ([{"role": "user"}], r"here, message 1 is \{'role': 'user'\}; give each message a role, a text, and a content"),
        ([{"role": 1, "content": "x"}], "give each message a role, a text, and a content"),
        (["hello"], "message 1 is 'hello'"),
    ],
)
def test_cells_that_are_no_chat(cell, message):
    with pytest.raises(InputError, match=message) as caught:
        chat_messages(cell, "here")
    assert "\n" not in str(caught.value)


def test_lists_of_parquet_are_lists():
    assert chat_messages(np.array(CHAT, dtype=object), "here") == CHAT


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, r"tokenizer '.*' has no chat template to write chats with; give one with --chat_template FILE\.jinja"),
        ("{{ raise_exception('roles must alternate') }}", "the chat template cannot write it .*roles must alternate"),
        ("{% for %}", "the chat template cannot write it"),
        (
            "{% for m in messages %}{{ 'red' if loop.last else 'blue' }} {{ m.content }} {% endfor %}",
            r"writes message 2 differently when others follow and does not mark .*: --chat_template FILE\.jinja",
        ),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(InputError, match=message) as caught:
        encode([CHAT], template=template)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_does_not_know_where_its_tokens_stand_is_refused():
    with pytest.raises(InputError, match="does not give the positions of its tokens; use a fast one for chats"):
        list(read_chats(SlowWords(), [json.dumps(CHAT)], PLAIN))


def test_a_template_comes_from_a_file_or_as_it_is(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(PLAIN)
    assert load_chat_template(file) == load_chat_template(str(file)) == load_chat_template(PLAIN) == PLAIN
    assert load_chat_template(None) is None
    with pytest.raises(InputError, match=r"missing\.jinja' cannot be read"):
        load_chat_template(tmp_path / "missing.jinja")
    file.write_text("hello")
    with pytest.raises(InputError, match="is not a Jinja template: it has neither"):
        load_chat_template(file)
    with pytest.raises(
        InputError, match=r"'/dev/zero' cannot be read \(OSError: it is not a regular file\); give a \.jinja file"
    ):
        load_chat_template("/dev/zero")
    with file.open("wb") as opened:
        opened.truncate(2**33)  # takes no room on the disk
    with pytest.raises(InputError, match="it has more than 1048576 bytes"):
        load_chat_template(file)


def test_another_template_is_tokenised_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for template in (PLAIN, PLAIN, PLAIN.replace(" :", "")):
        documents, _ = encode([CHAT], template=template)
    assert documents[0][0] != IDS
    assert len(list((tmp_path / "bora_pyro").glob("*.arrow"))) == 2
