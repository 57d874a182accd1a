"""Chats with tools, marks and parts, written by templates that take different things: which tokens are predicted."""

from __future__ import annotations

import json

import datasets
import pandas as pd
import pytest

from bora_pyro.data import load_tasks, table
from bora_pyro.data.chat_template import chat_prompt_tokens
from bora_pyro.data.splitters import AllTrain
from bora_pyro.data.tokenise import tokenise
from bora_pyro.errors import InputError
from tests.chat_documents import ANSWERED, ASKED, CHATML, MARKED, documents, nano_tokenizer
from tests.data_fixtures import word_tokenizer

CALLS = (
    "{% if tools %}<tools>{{ tools | tojson }}<end>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name }}({{ ARGUMENTS }}){% endfor %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TO_JSON = CALLS.replace("ARGUMENTS", "c.function.arguments | tojson")
AS_IT_IS = CALLS.replace("ARGUMENTS", "c.function.arguments")
TOOL = {"name": "find", "description": "Finds.", "parameters": {"type": "object", "properties": {"what": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]
WRITTEN_TOOLS = f"<tools>{json.dumps(TOOLS)}<end>"


def call(arguments, **message):
    function = {"name": "find", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}], **message}


def chat(arguments='{"what": "x"}', **message):
    tool = {"role": "tool", "tool_call_id": "1", "content": "7"}
    return [*ASKED, call(arguments, **message), tool, {"role": "assistant", "content": "Seven."}]


CALLED = '<user>Hi<end><assistant>find({"what": "x"})<end><tool>7<end><assistant>Seven.<end>'
PREDICTED = 'find({"what": "x"})<end>Seven.<end>'


@pytest.mark.parametrize("template", [TO_JSON, AS_IT_IS])
@pytest.mark.parametrize("arguments", ['{"what": "x"}', {"what": "x"}], ids=["text", "mapping"])
@pytest.mark.parametrize("tools", [TOOLS, [TOOL], json.dumps([TOOL])], ids=["tools", "functions", "JSON text"])
def test_tools_and_calls_are_given_to_the_template(template, arguments, tools):
    found, notes = documents([{"messages": chat(arguments), "tools": tools}], template)
    assert found == [(WRITTEN_TOOLS + CALLED, PREDICTED)]
    assert notes == ["recognised chats in column 'messages' with tools in column 'tools': the assistant's turns are predicted"]


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_a_call_without_a_content(content):
    assert documents([{"messages": chat(**content)}], TO_JSON)[0] == [(CALLED, PREDICTED)]


def test_openai_s_older_calls():
    older = [
        *ASKED,
        {"role": "assistant", "content": None, "function_call": {"name": "find", "arguments": '{"what": "x"}'}},
        {"role": "function", "name": "find", "content": "7"},
        {"role": "assistant", "content": "Seven."},
    ]
    found, notes = documents([{"messages": older, "functions": [TOOL]}], TO_JSON)
    assert found == [(WRITTEN_TOOLS + CALLED, PREDICTED)]
    assert notes == [
        "recognised chats in column 'messages' with tools in column 'functions': the assistant's turns are predicted"
    ]


def test_calls_of_sharegpt_chats():
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"what": "x"}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "Seven."},
    ]
    found, notes = documents([{"conversations": turns, "tools": json.dumps([TOOL])}], TO_JSON)
    assert found == [(WRITTEN_TOOLS + CALLED, PREDICTED)]
    assert "tools in column 'tools' (human -> user, function_call -> assistant's call, observation -> tool" in notes[0]
    turns[1]["value"] = "find x"
    with pytest.raises(
        InputError, match=r"row 1: column 'conversations', message 2 is not JSON .*; give a call with name and arg"
    ):
        documents([{"conversations": turns}], TO_JSON)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML, "the chat template does not write the tool call of message 2, which would be predicted without it; give a"),
        (MARKED, "the chat template does not write the tool call of message 2"),
        (TO_JSON.replace("in m.tool_calls %}", "in m.tool_calls[:1] %}"), "does not write tool call 2 of message 2"),
    ],
)
def test_a_template_that_drops_tool_calls_is_refused(template, message):
    messages = chat()
    if "call 2" in message:
        messages[1]["tool_calls"].append({"type": "function", "function": {"name": "go", "arguments": "{}"}})
    with pytest.raises(InputError, match=message) as caught:
        documents([{"messages": messages}], template)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_call_that_is_only_read_may_be_dropped_with_a_note(template):
    messages = chat(weight=0)
    [(text, predicted)], notes = documents([{"messages": messages}], template)
    assert (text, predicted) == ("<user>Hi<end><assistant><end><tool>7<end><assistant>Seven.<end>", "Seven.<end>")
    assert notes[-1] == "the chat template does not write tool calls"


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("mark", ["weight", "loss_weight", "train", "loss"])
@pytest.mark.parametrize(("no", "yes"), [(0, 1), (False, True), (0.0, 1.0)])
def test_marked_turns_are_only_read(template, mark, no, yes):
    messages = [
        *ASKED,
        {"role": "assistant", "content": "No?", mark: no},
        *ASKED,
        {"role": "assistant", "content": "Yes?", mark: yes},
        *ASKED,
        {"role": "assistant", "content": "So."},
    ]
    found, notes = documents([{"messages": messages}], template)
    text = "<user>Hi<end><assistant>No?<end><user>Hi<end><assistant>Yes?<end><user>Hi<end><assistant>So.<end>"
    assert found == [(text, "Yes?<end>So.<end>")]
    assert notes[1:] == [
        "1 turn of the assistant is marked with weight, loss_weight, train or loss as not to be predicted: it is only read"
    ]


def test_a_template_that_rewrites_turns_can_be_used_where_the_last_alone_is_predicted():
    template = CHATML.replace("{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}(thinks){% endif %}{{ m.content }}")
    template = template.replace("<assistant>{% endif %}", "<assistant>(thinks){% endif %}")
    messages = [*ANSWERED, *ANSWERED]
    with pytest.raises(InputError, match="writes message 2 differently when others follow"):
        documents([{"messages": messages}], template)
    messages[1] = {**messages[1], "train": False}
    found, _ = documents([{"messages": messages}], template)
    assert found == [("<user>Hi<end><assistant>Yes?<end><user>Hi<end><assistant>(thinks)Yes?<end>", "Yes?<end>")]


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": 0.5}, r"message 2 has weight 0.5; a turn is predicted \(1 or true\) or only read \(0 or false\)"),
        ({"weight": "0"}, "message 2 has weight '0'"),
        ({"weight": 1, "train": False}, "message 2 has weight 1 and train False; give one of them"),
    ],
)
def test_other_weights_are_refused(marks, message):
    with pytest.raises(InputError, match=f"row 1: column 'messages', {message}"):
        documents([{"messages": [*ASKED, {**ANSWERED[1], **marks}]}])


def test_marks_of_other_roles_and_chats_without_a_predicted_turn():
    rows = [
        {"messages": [{**ASKED[0], "weight": 1}, ANSWERED[1]]},
        {"messages": [ASKED[0], {**ANSWERED[1], "weight": 0}]},
        {"messages": ASKED},
    ]
    found, notes = documents(rows)
    assert found == [("<user>Hi<end><assistant>Yes?<end>", "Yes?<end>")]
    assert notes[1:] == [
        "1 turn of the assistant is marked with weight, loss_weight, train or loss as not to be predicted: it is only read",
        "1 turn of other roles is marked to be predicted: it is only read, only the assistant's are predicted",
        "1 chat has no turn of the role 'assistant'",
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED])
@pytest.mark.parametrize("empty", [None, "", " \n", []])
def test_empty_turns_are_not_predicted(template, empty):
    template = template.replace("m.content", "(m.content or '')")
    rows = [{"messages": [*ASKED, {"role": "assistant", "content": empty}, *ANSWERED]}]
    found, notes = documents(rows, template)
    assert [predicted for _, predicted in found] == ["Yes?<end>"]
    assert notes[1:] == ["1 turn of the assistant has no text and no tool call: it is only read"]


def test_a_template_that_drops_the_content_is_refused():
    template = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else m.text }}")
    with pytest.raises(InputError, match="the chat template does not write the content of message 2, which would be predicted"):
        documents([{"messages": ANSWERED}], template)


PARTS = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
OF_PARTS = CHATML.replace(
    "{{ m.content }}", "{% for p in m.content %}{% if p.type == 'text' %}[{{ p.text }}]{% endif %}{% endfor %}"
)
EITHER = CHATML.replace(
    "{{ m.content }}",
    "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | map(attribute='text') | join('+') }}{% endif %}",
)
JOINED = CHATML.replace("{{ m.content }}", "{{ m.content + '' }}")


@pytest.mark.parametrize(
    ("template", "asked", "note"),
    [
        (EITHER, "Hi+you", None),
        (CHATML, "Hi\nyou", "1 message has a list of texts where the chat template takes one text: joined by line ends"),
        (JOINED, "Hi\nyou", "1 message has a list of texts where the chat template takes one text: joined by line ends"),
    ],
)
def test_contents_of_parts(template, asked, note):
    rows = [{"messages": [{"role": "user", "content": PARTS}, ANSWERED[1]]}]
    found, notes = documents(rows, template)
    assert found == [(f"<user>{asked}<end><assistant>Yes?<end>", "Yes?<end>")]
    assert notes[1:] == ([note] if note else [])


def test_texts_for_a_template_that_takes_parts():
    found, notes = documents([{"messages": ANSWERED}], OF_PARTS)
    assert found == [("<user>[Hi]<end><assistant>[Yes?]<end>", "[Yes?]<end>")]
    assert notes[1:] == ["2 messages have a text where the chat template takes a list of parts: given as a list with one part"]


def test_an_empty_list_is_an_empty_text():
    found, _ = documents([{"messages": [{"role": "system", "content": []}, *ANSWERED]}])
    assert found == [("<system><end><user>Hi<end><assistant>Yes?<end>", "Yes?<end>")]


def test_a_template_that_takes_one_part():
    template = CHATML.replace("{{ m.content }}", "{{ m.content[0].text + '' }}")
    rows = [{"messages": [{"role": "user", "content": PARTS}, ANSWERED[1]]}]
    found, notes = documents(rows, template)
    assert found == [("<user>Hi\nyou<end><assistant>Yes?<end>", "Yes?<end>")]
    assert notes[1:] == [
        "1 message has a text where the chat template takes a list of parts: given as a list with one part",
        "1 message has several texts where the chat template takes a list with one part: joined by line ends",
    ]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("call", ["(c.function.arguments | tojson)", "c.function.arguments"])
def test_a_template_that_needs_a_content_beside_calls(content, call):
    template = TO_JSON.replace("{{ c.function.name }}({{ c.function.arguments | tojson }})",
                               "{{ m.content + c.function.name + '(' + " + call + " + ')' }}")  # fmt: skip
    assert documents([{"messages": chat(**content)}], template)[0] == [(CALLED, PREDICTED)]


def test_a_template_that_fails_at_calls_says_so():
    with pytest.raises(
        InputError, match=r"cannot write it \(UndefinedError.*; it seems to know no tool calls: give one that does"
    ):
        documents([{"messages": chat()}], JOINED)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url", "image_url": {"url": "x.png"}}, "holds a part of the type 'image_url'; only text is read"),
        ({"type": "input_audio", "input_audio": {}}, "holds a part of the type 'input_audio'; only text is read"),
        ({"type": "text"}, r"holds \{'type': 'text'\}; only text is read"),
        ("Hi", "holds 'Hi'; only text is read"),
    ],
)
def test_pictures_and_sounds_are_refused(part, message):
    rows = [{"messages": [{"role": "user", "content": [part]}, ANSWERED[1]]}]
    with pytest.raises(InputError, match=f"row 1: column 'messages', message 1 {message}"):
        documents(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 1}, r"message 1 has a content of the type dict \(\{'a': 1\}\); give a text or a list of parts"),
        (5, "of the type int"),
    ],
)
def test_contents_that_are_no_text_are_refused(content, message):
    with pytest.raises(InputError, match=message):
        documents([{"messages": [{"role": "user", "content": content}, ANSWERED[1]]}])


def test_what_a_tool_gives_is_json():
    messages = chat()
    messages[2]["content"] = {"found": [True, None]}
    found, notes = documents([{"messages": messages}], TO_JSON)
    assert '<tool>{"found": [true, null]}<end>' in found[0][0]
    assert "1 message of tools holds a value that is not a text: given to the chat template as JSON text" in notes
    # a template that knows objects gets the object
    as_object = TO_JSON.replace("{{ m.content }}", "{{ m.content if m.content is string else m.content | tojson(indent=1) }}")
    found, notes = documents([{"messages": messages}], as_object)
    assert '<tool>{\n "found": [\n  true,\n  null\n ]\n}<end>' in found[0][0]
    assert len(notes) == 1


@pytest.mark.parametrize("value", [[{"type": "sunny", "degrees": 7}], 7, False, []])
def test_a_tool_may_give_any_value(value):
    messages = chat()
    messages[2]["content"] = value
    found, _ = documents([{"messages": messages}], TO_JSON)
    assert found == [(CALLED.replace("<tool>7", f"<tool>{json.dumps(value) if value != [] else ''}"), PREDICTED)]
    messages[2]["content"] = [{"type": "image_url", "image_url": {"url": "x.png"}}]
    with pytest.raises(InputError, match="message 3 holds a part of the type 'image_url'; only text is read"):
        documents([{"messages": messages}], TO_JSON)


def test_many_unwritten_keys_make_a_short_note():
    extra = {f"key {n}\n" + "x" * 100: n for n in range(12)}
    _, notes = documents([{"messages": [*ASKED, {**ANSWERED[1], **extra}]}])
    assert notes[1].startswith(r"the chat template does not write the key 'key 0\nxxx")
    assert notes[1].endswith(" and 2 more")
    assert len(notes[1]) < 700


def test_null_in_calls_is_missing_unless_arguments_are_json_text():
    found, notes = documents([{"messages": chat({"what": "x", "how": None})}], TO_JSON)
    assert found == [(CALLED, PREDICTED)]
    assert notes[1:] == ["1 cell has null in tools or tool calls: read as missing (to keep it, give arguments as JSON text)"]
    [(_, predicted)], notes = documents([{"messages": chat('{"how": null}')}], TO_JSON)
    assert predicted == 'find({"how": null})<end>Seven.<end>'
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("what: x", "message 2: the arguments of 'find' is not JSON"), ("[1]", r"message 2: the arguments of 'find' are '\[1\]'")],
)
def test_arguments_that_are_no_json(arguments, message):
    with pytest.raises(InputError, match=message):
        documents([{"messages": chat(arguments)}], TO_JSON)
    assert documents([{"messages": chat(arguments)}], AS_IT_IS)[0][0][1] == f"find({arguments})<end>Seven.<end>"


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([1], "message 2 has the tool call 1; give each a function with a name and arguments"),
        ([{"function": {"arguments": "{}"}}], "give each a function with a name"),
        ("{", r"message 2: 'tool_calls' is not JSON"),
    ],
)
def test_calls_that_are_not_calls(calls, message):
    with pytest.raises(InputError, match=message):
        documents([{"messages": [*ASKED, {"role": "assistant", "content": None, "tool_calls": calls}]}], TO_JSON)


def test_what_a_template_leaves_out_is_said_once():
    template = (
        "{% for m in messages if m.role != 'system' and m.role != 'tool' %}<{{ m.role }}>{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}{% if not m.tool_calls %}{{ m.content }}{% endif %}<end>{% endfor %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, *chat(content="Let me see.", reasoning_content="Hm.")]
    _, notes = documents([{"messages": messages, "tools": TOOLS}] * 3, template, document_form="messages")
    assert notes == [
        "the chat template does not write the tools, messages of the role 'system', the text of a turn that calls tools, the key "
        "'reasoning_content' of messages, messages of the role 'tool'"
    ]


def test_a_tokenizer_s_own_template_for_tools():
    own = word_tokenizer()
    own.chat_template = {"default": "{% for m in messages %}red {{ m.content }} {% endfor %}",
                         "tool_use": "{% for m in messages %}blue {{ m.content }} {% endfor %}"}  # fmt: skip
    rows = [{"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}], "task": "a"}] * 2
    rows = [{**row, "tools": tools} for row, tools in zip(rows, (TOOLS, []), strict=True)]
    data = load_tasks(pd.DataFrame(rows), own, split=AllTrain())
    assert [own.decode(data.train.document(n)) for n in range(2)] == ["blue one blue two", "red one red two"]
    assert data.chat_template == own.chat_template["default"]
    assert own.decode(chat_prompt_tokens(own, "one", data.chat_template)) == "red one"


def test_marks_and_tools_are_cached_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    plain = json.dumps(ANSWERED)
    cells = [plain, json.dumps({"messages": ANSWERED, "predicted": [False, False]})]
    cells.append(json.dumps({"messages": ANSWERED, "predicted": [False, True], "tools": TOOLS}))
    seen = []
    for cell in (*cells, plain):
        split = tokenise(
            table([{"task": "a", "messages": cell}]), nano_tokenizer(), task_index={"a": 0}, chat_template=TO_JSON
        ).split
        seen.append([split.document(n).tolist() for n in range(len(split))])
    assert seen[0] == seen[3] != seen[2]
    assert seen[1] == []
