"""The preview shows what a fit would read, and that only."""

from __future__ import annotations

import io
import json

import pytest
from rich.text import Text

from bora_pyro import InputError
from bora_pyro.backbone.tokenizer import load_tokenizer
from bora_pyro.data import TaskData, TokenSplit
from bora_pyro.runs.config.map_fit import MapFitConfig, parse_config
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.preview import PreviewConfig, document_text, preview, show, task_table
from tests.data_fixtures import CHAT, CHAT_TEMPLATE, word_tokenizer
from tests.tiny_base import command_main, documents, line, quick_fit, save_base, write_table


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def printed(config):
    file = io.StringIO()
    show(config, preview(config), file=file)
    return file.getvalue()


def test_the_preview_of_a_table(base, tmp_path, capsys):
    frame = documents().assign(date="2001", doc_id=[f"d{n}" for n in range(30)])
    frame.loc[3, "text"] = " "
    data = write_table(tmp_path / "t.csv", frame)
    assert command_main("preview")(line({"data": data, "base_model": base, "max_tokens": 32, "most": 2})) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[:3] == [f"source: {data}", "columns: 'task', 'text', 'doc_id'; not read: 'date'", "form of the documents: text"]
    assert lines[3].startswith("data: 30 rows read; 29 documents of 3 tasks: 17 train, 6 validation, 6 test (1 row left out: ")
    assert lines[4] == "note: 1 document with empty text was dropped"
    rows = [text.split() for text in lines if text.startswith(("  B", "  C", "  A", "  ..."))]
    assert [row[:1] for row in rows] == [["Børge"], ["Cleo"], ["..."]]
    assert rows[1][1:4] == ["6", "2", "2"]
    assert rows[2][2:7] == ["1", "more", "5", "2", "2"]
    # the first training document of the first two tasks, all of it predicted
    shown = [text for text in lines if text.startswith("</s>⟦")]
    assert len(shown) == 2
    assert shown[0].removeprefix("</s>⟦").removesuffix("</s>⟧") in set(frame[frame["task"] == "Ada"]["text"])
    assert list(tmp_path.iterdir()) == [tmp_path / "t.csv"]


def test_pieces_of_a_long_document_are_told_where_one_is_shown(base, tmp_path):
    data = write_table(tmp_path / "t.csv", documents().assign(text="red green blue one " * 9))  # 37 tokens to predict
    config = PreviewConfig(data=data, base_model=str(base), max_tokens=16, long_documents="split")
    out = printed(config)
    pieces = len(preview(config).data.train) // 18
    assert pieces > 1
    assert f"Ada, the first of {pieces} pieces: 16 tokens, 15 of them predicted" in out
    assert [row.split()[1:4] for row in out.splitlines() if row.startswith("  Cleo")] == [["6", "2", "2"]]


def test_of_a_question_the_right_option_is_shown(base, tmp_path):
    columns = {"prompt_column": "prompt", "completion_column": "completion", "options_column": "options"}
    rows = [{"task": task, "prompt": "Ada is", "completion": " red", "options": [" one two", " red"]} for task in "ab" * 4]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = printed(PreviewConfig(data=str(tmp_path / "t.jsonl"), base_model=base, max_tokens=32, **columns))
    assert "columns: 'task', 'prompt', 'completion', 'options'" in out
    assert "a, with the right one of 2 options: " in out
    assert out.count("</s>Ada is⟦ red</s>⟧") == 2
    assert "one two" not in out


def test_it_counts_as_a_fit_counts(tmp_path):
    options = quick_fit(tmp_path)
    fit = parse_config(MapFitConfig, line(options | {"output_dir": tmp_path / "run", "epochs": 1}))
    metrics = run_map_fit(fit, quiet=True)
    found = preview(PreviewConfig(data=fit.data, base_model=fit.base_model, max_tokens=fit.max_tokens, seed=fit.seed))
    assert found.data.counts.as_dict() == metrics["data"]


def test_prompts_and_chats_show_what_is_predicted(tmp_path):
    rows = [{"task": task, "q": "red one", "a": f" {word}"} for task in "ab" for word in ("two", "three", "blue")]
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    out = printed(PreviewConfig(data=str(file), prompt_column="q", completion_column="a", documents=1))
    assert sum("red one⟦ " in text and text.endswith("</s>⟧") for text in out.splitlines()) == 1
    assert "form of the documents: prompt_completion" in out
    rows = [{"task": task, "messages": CHAT} for task in "ab" for _ in range(3)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    out = printed(PreviewConfig(data=str(file), chat_template=CHAT_TEMPLATE, documents=2))
    assert out.count("user : red </s> assistant :⟦ green blue </s>⟧ user : one </s> assistant :⟦ two </s> ⟧") == 2
    assert "note: recognised " in out


def test_long_parts_are_shortened_and_names_and_texts_are_harmless():
    tokenizer = word_tokenizer()
    ids = tokenizer(" ".join(["red", "green"] * 1000)).input_ids
    split = TokenSplit.from_documents([[0, *ids, 3]], task=[0], num_tasks=1, read=[len(ids) + 1])
    text = document_text(split, 0, tokenizer, ("[[", "]]"))
    assert isinstance(text, Text)
    assert "characters ..." in text.plain
    assert text.plain.endswith("[[ red]]")
    assert len(text.plain) < 700


def test_the_table_of_many_tasks_has_the_largest_first():
    split = TokenSplit.from_documents([[0, 5]] * 6, task=[0, 1, 1, 2, 2, 2], num_tasks=3)
    data = TaskData(["a" * 200, "b\x1b[2J", "c"], split, split, split)
    table = task_table(data, 2)
    assert [str(cell) for cell in table.columns[0].cells] == ["c", "b\\x1b[2J", "... and 1 more"]
    assert [list(column.cells) for column in table.columns[1:]] == [["3", "2", "1"]] * 3 + [["9", "6", "3"]]


def test_a_file_that_cannot_show_the_signs_gets_others(tmp_path):
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    config = PreviewConfig(data=write_table(tmp_path / "t.csv", documents()), documents=1)
    show(config, preview(config), file=file)
    file.flush()
    assert b"</s>[[" in raw.getvalue()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"data": "no_such.csv"}, "file 'no_such.csv' does not exist"),
        ({"dta": "t.csv"}, "unknown option 'dta'; did you mean 'data'?"),
        ({"epochs": 3}, "unknown option 'epochs'"),
        ({"base_model": "builtin:nanoo"}, "no embedded base 'builtin:nanoo'"),
        ({"max_tokens": 1}, "max_tokens is 1"),
        ({"text_column": "txt"}, "no column 'txt'"),
        ({"most": 0}, "most is 0"),
    ],
)
def test_bad_input_is_one_line(options, words, capsys):
    assert command_main("preview")(line(options)) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert words in error


def test_a_base_that_reads_less_is_noted(tmp_path):
    base = save_base(tmp_path / "base", context=16)
    config = PreviewConfig(data=write_table(tmp_path / "t.csv", documents()), base_model=base)
    assert "note: max_tokens 256 is more than the base model reads; 16 is used" in printed(config)
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_columns_that_stand_for_others_are_read(base, tmp_path):
    rows = [{"meta": {"speaker": f"{n % 2}"}, "text": "A set.", "date": "2001"} for n in range(6)]
    nested = tmp_path / "t.jsonl"
    nested.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"base_model": base, "max_tokens": 32}
    lines = printed(PreviewConfig(data=str(nested), task_column="meta.speaker", **options)).splitlines()
    assert lines[1] == "columns: 'meta.speaker', 'text'; not read: 'date'"
    bare = tmp_path / "t.csv"
    bare.write_text("0,A set.,x\n1,A set.,x\n" * 3)
    lines = printed(PreviewConfig(data=str(bare), header=False, task_column="1", text_column="2", **options)).splitlines()
    assert lines[1] == "columns: '1', '2'; not read: 'column3'"
