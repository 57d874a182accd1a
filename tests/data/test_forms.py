"""Forms of documents: recognised by their columns, read to known tokens, and overridable."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pandas as pd
import pytest

from bora_pyro.data import AllTrain, load_tasks, read_table, table
from bora_pyro.data.columns import DOCUMENT_FORMS
from bora_pyro.data.forms import FORMS
from bora_pyro.errors import InputError
from tests.chat_documents import ANSWERED, ASKED, CHATML, MARKED, TASK, documents, nano_tokenizer


def test_every_form_has_a_name_for_the_option():
    assert list(FORMS) == [name for name in DOCUMENT_FORMS if name != "auto"]


def sharegpt(*turns):
    return [{"from": role, "value": text} for role, text in turns]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_sharegpt_chats(template):
    rows = [
        {"conversations": sharegpt(("system", "Be brief."), ("human", "Hi"), ("gpt", "Yes?"), ("human", "Bye"), ("gpt", "Bye!"))},
        {"conversations": sharegpt(("user", "Go on"), ("model", "No."), ("observation", "7"), ("Bot", "Seven."))},
    ]
    found, notes = documents(rows, template)
    assert found == [
        ("<system>Be brief.<end><user>Hi<end><assistant>Yes?<end><user>Bye<end><assistant>Bye!<end>", "Yes?<end>Bye!<end>"),
        ("<user>Go on<end><assistant>No.<end><tool>7<end><assistant>Seven.<end>", "No.<end>Seven.<end>"),
    ]
    mapped = (
        "system -> system, human -> user, gpt -> assistant, user -> user, model -> assistant, observation -> tool, "
        "Bot -> assistant"
    )
    assert notes == [f"recognised ShareGPT chats in column 'conversations' ({mapped}): the assistant's turns are predicted"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"conversation": ANSWERED}, "<user>Hi<end><assistant>Yes?<end>"),
        ({"conversations": json.dumps(sharegpt(("human", "Hi"), ("gpt", "Yes?")))}, "<user>Hi<end><assistant>Yes?<end>"),
        (
            {"conversations": sharegpt(("human", "Hi"), ("gpt", "Yes?")), "system": "Be brief."},
            "<system>Be brief.<end><user>Hi<end><assistant>Yes?<end>",
        ),
        ({"conversations": sharegpt(("human", "Hi"), ("gpt", "Yes?")), "system": ""}, "<user>Hi<end><assistant>Yes?<end>"),
    ],
)
def test_other_shapes_of_sharegpt_chats(row, text):
    assert documents([row])[0] == [(text, "Yes?<end>")]


def test_an_unknown_role_is_named():
    rows = [{"conversations": sharegpt(("human", "Hi"), ("gpt", "Yes?"))}, {"conversations": sharegpt(("narrator", "Once"))}]
    with pytest.raises(InputError, match=r"row 2: column 'conversations', message 1 has the role 'narrator'; known: human, user"):
        documents(rows)
    with pytest.raises(InputError, match=r"row 1 has a system prompt in column 'system' and another one in the chat"):
        documents([{"system": "Be long.", "conversations": sharegpt(("system", "Be brief."))}])


ALPACA = "Below is an instruction that describes a task"


def test_alpaca_without_a_chat_template():
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Wait.", "input": "", "output": "I wait."},
        {"instruction": "Wait.", "input": "", "output": " "},
    ]
    assert nano_tokenizer().chat_template is None
    found, notes = documents(rows, None)
    request = "Write a response that appropriately completes the request.\n\n"
    with_input = f"{ALPACA}, paired with an input that provides further context. {request}"
    assert found == [
        (f"</s>{with_input}### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2</s>", "2</s>"),
        (f"</s>{ALPACA}. {request}### Instruction:\nWait.\n\n### Response:\nI wait.</s>", "I wait.</s>"),
    ]
    assert notes == [
        "recognised Alpaca instructions in columns 'instruction', 'input', 'output' (with Alpaca's prompt, because there is no "
        "chat template): 'output' is predicted",
        "1 document with empty text was dropped",
    ]


def test_alpaca_with_a_system_prompt_and_a_history():
    row = {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": "Be brief.", "history": [["Hi", "Yes?"]]}
    [(text, predicted)], notes = documents([row])
    assert text == "<system>Be brief.<end><user>Hi<end><assistant>Yes?<end><user>Add.\n1 + 1<end><assistant>2<end>"
    assert predicted == "2<end>"
    assert "(as chats, because there is a chat template): 'output' is predicted" in notes[0]
    [(text, predicted)], _ = documents([row], None)
    turn = "### Instruction:\nHi\n\n### Response:\nYes?\n\n"
    assert text == f"</s>Be brief.\n\n{turn}### Instruction:\nAdd.\n\n### Input:\n1 + 1\n\n### Response:\n2</s>"
    assert predicted == "2</s>"
    with pytest.raises(InputError, match=r"row 1: column 'history' has \['Hi'\]; give a list of \[question, answer\]"):
        documents([{**row, "history": [["Hi"]]}])


def test_dolly_s_names_of_the_columns():
    row = {"instruction": "Add.", "context": "1 + 1", "response": "2", "category": "sums"}
    [(text, predicted)], notes = documents([row])
    assert (text, predicted) == ("<user>Add.\n1 + 1<end><assistant>2<end>", "2<end>")
    assert "columns 'instruction', 'context', 'response'" in notes[0]


def test_prompts_and_completions():
    found, notes = documents([{"prompt": "Is it?", "completion": " Yes."}], None)
    assert found == [("</s>Is it? Yes.</s>", " Yes.</s>")]
    assert notes == ["recognised prompts and completions in columns 'prompt' and 'completion': the completion is predicted"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_prompts_and_completions_that_are_messages(template):
    prompt = [*ANSWERED, {"role": "user", "content": "So?"}]
    row = {"prompt": prompt, "completion": [{"role": "assistant", "content": "Yes."}]}
    found, notes = documents([row], template)
    assert found == [("<user>Hi<end><assistant>Yes?<end><user>So?<end><assistant>Yes.<end>", "Yes.<end>")]
    assert notes == ["recognised chats in two parts in columns 'prompt' and 'completion': the completion is predicted"]
    # the same columns under other names
    other = {"p": row["prompt"], "c": row["completion"]}
    assert documents([other], template, prompt_column="p", completion_column="c") == (found, [])


def test_a_prompt_of_messages_with_a_completion_of_text_is_refused():
    with pytest.raises(InputError, match=r"has messages in column 'p' and texts in column 'c'; give both as lists of messages"):
        documents([{"p": ASKED, "c": "Yes?"}], prompt_column="p", completion_column="c")


def test_good_and_bad_completions_are_not_mixed():
    rows = [
        {"prompt": "Is it?", "completion": " Yes.", "label": True},
        {"prompt": "Is it?", "completion": " No.", "label": False},
    ]
    with pytest.raises(
        InputError, match=r"with a 'label' that is true or false, as for KTO: .*; keep the rows with true, or name"
    ):
        documents(rows)
    assert len(documents(rows, prompt_column="prompt", completion_column="completion")[0]) == 2
    assert len(documents([{**rows[0], "label": "sports"}])[0]) == 1


def test_pictures_beside_chats_are_named():
    rows = [{"conversations": sharegpt(("human", "<image> What?"), ("gpt", "A cat.")), "image": "cat.png", "video": None}]
    assert documents(rows)[1][1:] == ["only text is read: not the column 'image'"]


REJECTED = {"rejected": "Perhaps."}


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"prompt": "Is it?", "chosen": " Yes."}, ("</s>Is it? Yes.</s>", " Yes.</s>")),
        ({"chosen": "Yes."}, ("</s>Yes.</s>", "Yes.</s>")),
        ({"prompt": ASKED, "chosen": ANSWERED[1:]}, ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")),
        ({"prompt": ASKED, "chosen": ANSWERED[1]}, ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")),
        ({"prompt": ASKED, "chosen": ANSWERED}, ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")),
        ({"prompt": "Hi", "chosen": ANSWERED}, ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")),
        ({"prompt": "Hi", "chosen": ANSWERED[1:]}, ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")),
        ({"chosen": ANSWERED}, ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")),
        (
            {"chosen": [*ANSWERED, {"role": "user", "content": "So?"}, {"role": "assistant", "content": "So."}]},
            ("<user>Hi<end><assistant>Yes?<end><user>So?<end><assistant>So.<end>", "So.<end>"),
        ),
        (
            {"conversations": sharegpt(("human", "Hi")), "chosen": {"from": "gpt", "value": "Yes?"}},
            ("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>"),
        ),
    ],
)
def test_preferences(row, document):
    found, notes = documents([{**row, **REJECTED}])
    assert found == [document]
    assert len(notes) == 1
    assert notes[0].startswith("recognised preferences: the answer in column 'chosen'")
    assert notes[0].endswith(" is predicted, 'rejected' is ignored")


def test_preferences_say_what_else_is_not_read():
    row = {"question": "Hi", "chosen": "Yes?", "rejected": "No", "score": 7}
    _, notes = documents([row])
    assert notes == [
        "recognised preferences: the answer in column 'chosen' after 'question' is predicted, 'rejected' is ignored; not read: "
        "'score'"
    ]
    with pytest.raises(InputError, match=r"row 1: the chat in column 'chosen' has turns of the user, but not the prompt"):
        documents([{"prompt": "Else", "chosen": ANSWERED, "rejected": ANSWERED}])


def test_messages_are_recognised():
    found, notes = documents([{"messages": ANSWERED}])
    assert found == [("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")]
    assert notes == ["recognised chats in column 'messages': the assistant's turns are predicted"]
    assert documents([{"messages": ANSWERED}], messages_column="messages") == (found, [])


def test_a_named_column_of_sharegpt_chats():
    rows = [{"talk": sharegpt(("human", "Hi"), ("gpt", "Yes?"))}]
    found, notes = documents(rows, messages_column="talk")
    assert found == [("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")]
    assert notes == [
        "recognised ShareGPT chats in column 'talk' (human -> user, gpt -> assistant): the assistant's turns are predicted"
    ]


def test_the_column_text_is_read_unless_an_option_says_otherwise():
    rows = [{"text": "Hello.", "conversations": sharegpt(("human", "Hi"), ("gpt", "Yes?"))}]
    assert documents(rows) == (
        [("</s>Hello.</s>", "Hello.</s>")],
        ["the column 'text' is read; to read ShareGPT chats in column 'conversations' (human -> user, gpt -> assistant) instead, "
         "give document_form sharegpt"],
    )  # fmt: skip
    assert documents(rows, document_form="text") == ([("</s>Hello.</s>", "Hello.</s>")], [])
    assert documents(rows, document_form="sharegpt") == ([("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")], [])


def test_several_forms_are_not_guessed():
    rows = [{"messages": ANSWERED, "prompt": "Hi", "chosen": ANSWERED, "rejected": ANSWERED}]
    with pytest.raises(InputError, match=r"documents of several forms: messages \(.*\); preference \(.*\); name the one to read"):
        documents(rows)
    assert documents(rows, document_form="messages")[0][0][1] == "Yes?<end>"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"document_form": "alpacca"}, "document_form is 'alpacca'; allowed: .*did you mean 'alpaca'"),
        (
            {"document_form": "alpaca"},
            "document_form is 'alpaca', but .* has no such documents in columns instruction, output; its columns are task, other",
        ),
        (
            {"document_form": "alpaca", "text_column": "body"},
            "text_column is given, but document_form is 'alpaca', which does not",
        ),
        ({"document_form": "text", "messages_column": "m"}, "messages_column is given, but document_form is 'text'"),
        ({}, r"no column 'text' \(text_column\); its columns are task, other; name the column, or give the columns of"),
    ],
)
def test_forms_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message) as caught:
        documents([{"other": "x"}], **options)
    assert "\n" not in str(caught.value)


CELLS = {
    "sharegpt": {"conversations": sharegpt(("human", "Hi"), ("gpt", "Yes?"))},
    "messages": {"messages": ANSWERED},
    "two parts": {"prompt": ASKED, "completion": ANSWERED[1:]},
    "history": {"instruction": "Add.", "output": "2", "history": [["Hi", "Yes?"]]},
    "tools": {"messages": ANSWERED, "tools": [{"name": "find", "parameters": {"type": "object"}}]},
}


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_streaming_reads_the_same_documents(cells):
    options = {"chat_template": CHATML, "split": AllTrain()}
    plain = load_tasks(table([{**TASK, **cells}] * 2), nano_tokenizer(), **options)
    streamed = load_tasks(table([{**TASK, **cells}] * 2), nano_tokenizer(), streaming=True, **options)
    assert (streamed.digest, streamed.notes, streamed.chat_template) == (plain.digest, plain.notes, CHATML)
    assert any(note.startswith("recognised") for note in plain.notes)


def test_a_file_without_the_optional_columns(tmp_path):
    for name, cells in (("a", {"messages": ANSWERED}), ("b", {**CELLS["tools"], "extra": 1})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"task": name, **cells}) + "\n")
    found, _ = read_table(tmp_path)
    assert [type(json.loads(chat)) for chat in found["messages"]] == [list, dict]
    (tmp_path / "c.jsonl").write_text(json.dumps({"task": "c"}) + "\n")
    with pytest.raises(InputError, match=r"c\.jsonl' has no column 'messages'"):
        read_table(tmp_path)


@pytest.mark.parametrize("container", ["jsonl", "csv", "parquet", "saved"])
@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_every_container_gives_the_same_document(tmp_path, cells, container):
    rows = [{**TASK, **cells}]
    path = tmp_path / f"t.{container}"
    if container == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif container == "csv":
        texts = [{key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows]
        pd.DataFrame(texts).to_csv(path, index=False)
    elif container == "parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    found, notes = read_table(path)
    expected, expected_notes = read_table(pd.DataFrame(rows))
    assert found.to_list() == expected.to_list()
    assert notes == expected_notes


def test_lists_of_parquet_keep_their_structure(tmp_path):
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "again"}]
    rows = [{**TASK, "messages": [{"role": "user", "content": parts}]}]
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    found, _ = read_table(tmp_path / "t.parquet")
    assert json.loads(found["messages"][0]) == rows[0]["messages"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (pd.Timestamp("2020-01-01"), "'when' is a Timestamp"),
        (b"bytes", r"'when' is a bytes \(b'bytes'\), which JSON cannot hold; give text"),
        (float("nan"), r"'when' is a float \(nan\), which JSON cannot hold"),
        ({3: "x"}, "'when' has the key 3; keys are texts"),
        ("\ud83d", "'when' has half a surrogate pair"),
    ],
)
def test_values_that_json_cannot_hold(value, message):
    rows = [{**TASK, "messages": [{"role": "user", "content": "Hi", "meta": {"when": value}}]}]
    with pytest.raises(InputError, match=f"row 1: column 'messages': {message}") as caught:
        read_table(pd.DataFrame(rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value", [True, False, 0, 1.0, 1.5, 2**70, "true", [1, None, [2.0]], {"a": {"b": [False]}}, np.int64(3), np.array([1.5, 2])]
)
def test_nested_values_stay_as_they_are(value):
    rows = [{**TASK, "messages": [{"role": "user", "content": "Hi", "meta": {"x": value}}]}]
    found, _ = read_table(pd.DataFrame(rows))
    kept = json.loads(found["messages"][0])[0]["meta"]["x"]
    expected = value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    assert (kept, type(kept)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"role": "user", "role": "assistant", "content": "x"}]',
            "has the key 'role' twice in one JSON object; keep one of them",
        ),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[" * 80 + "]" * 80, "is nested too deeply; 60 levels are allowed"),
        ('[{"role": "user", "content": ' + "9" * 5000 + "}]", "cannot be read as JSON"),
        ('[{"role": "user", "content": "x", "p": NaN}]', "'p' is a float"),
    ],
)
def test_json_texts_that_are_refused(text, message):
    with pytest.raises(InputError, match=message) as caught:
        read_table(pd.DataFrame([{**TASK, "m": text}]), messages_column="m")
    assert "\n" not in str(caught.value)


def test_turns_that_another_name_of_the_assistant_speaks_are_named():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "model", "content": "Oh."}]
    rows = [{**TASK, "messages": turns}, {**TASK, "messages": turns}]
    _, notes = read_table(pd.DataFrame(rows))
    assert (
        "turns of other roles than 'assistant' are only read, also those of 'model' (2); --document_form sharegpt knows other "
        "names of the assistant" in notes
    )
    found, _ = read_table(pd.DataFrame(rows), document_form="sharegpt", messages_column="messages")
    assert [message["role"] for message in json.loads(found["messages"][0])] == ["user", "assistant", "assistant"]


def test_a_system_prompt_beside_messages_is_named():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    rows = [{**TASK, "system": "Be brief.", "messages": turns}]
    _, notes = read_table(pd.DataFrame(rows))
    assert any(note.endswith("column 'system' is not read (--document_form sharegpt reads it)") for note in notes)
    found, _ = read_table(pd.DataFrame(rows), document_form="sharegpt", messages_column="messages")
    assert json.loads(found["messages"][0])[0] == {"role": "system", "content": "Be brief."}


def pairs_of(rows):
    found, notes = read_table(table({"task": "a", **row} for row in rows), options_column="rejected")
    return [{name: row[name] for name in ("prompt", "text", "options")} for row in found], notes


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"prompt": "Hi", "chosen": " Yes", "rejected": " No"}, ("Hi", " Yes", '[" Yes", " No"]')),
        ({"question": "Hi", "chosen": " Yes", "rejected": " No"}, ("Hi", " Yes", '[" Yes", " No"]')),
        # without prompts: what both begin with, up to a white space, so that no word is cut
        ({"chosen": "Hi. A: Noon", "rejected": "Hi. A: Never"}, ("Hi. A: ", "Noon", '["Noon", "Never"]')),
        ({"chosen": "Noon", "rejected": "Never"}, ("", "Noon", '["Noon", "Never"]')),
        ({"chosen": "Hi\nNo", "rejected": "Hi\nYes"}, ("Hi\n", "No", '["No", "Yes"]')),
        ({"chosen": "so it is", "rejected": "so it"}, ("so ", "it is", '["it is", "it"]')),
    ],
)
def test_preferences_with_the_rejected_answer(row, document):
    found, notes = pairs_of([row])
    assert [tuple(of_row.values()) for of_row in found] == [document]
    assert notes[0].startswith("recognised preferences: the answer in column 'chosen' after ")
    assert notes[0].endswith(" is preferred to that in 'rejected'")


def test_pairs_without_a_preference_are_left_out_and_counted():
    rows = table({"task": "a", "prompt": "Hi", "chosen": text, "rejected": "No"} for text in ("Yes", "No", " "))
    data = load_tasks(rows, nano_tokenizer(), options_column="rejected", split=AllTrain())
    assert data.train.num_documents == 1
    assert "2 documents with empty or equal answers were dropped" in data.notes


def test_chats_have_no_rejected_answers():
    with pytest.raises(InputError, match=r"has chats as preferences.*give texts in the columns prompt, chosen and rejected"):
        pairs_of([{"chosen": ANSWERED, "rejected": ANSWERED}])
