from __future__ import annotations

import pandas as pd
import pytest

from bora_pyro.data import load_tasks, talk_of_norway
from bora_pyro.errors import InputError
from tests.data_fixtures import word_tokenizer

LONG = "Takk for ordet, president. Det er en stor dag for oss alle."


def ton(path, speeches):
    """ton.csv with so many speeches of each speaker, in no order of time."""
    rows = [
        {
            "id": n,
            "rep_name": name,
            "time": str(pd.Timestamp("1998-10-01", tz="Europe/Oslo") + pd.Timedelta(days=(7 * n) % count)),
            "text": f"{LONG} {n}",
        }
        for name, count in speeches.items()
        for n in range(count)
    ]
    for row in rows:
        row["time"] = row["time"].replace(" ", "T")
    file = path / "ton.csv"
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def counts(data):
    return pd.DataFrame({"task": data["task"][:], "split": data["split"][:]}).value_counts().to_dict()


def test_paper_is_chronological(tmp_path):
    data = talk_of_norway(ton(tmp_path, {"Abid Q. Raja": 200, "Bo": 101, "Few": 100}))
    assert counts(data) == {
        ("Abid Q. Raja", "train"): 100,
        ("Abid Q. Raja", "validation"): 34,
        ("Abid Q. Raja", "test"): 66,
        ("Bo", "train"): 51,
        ("Bo", "validation"): 17,
        ("Bo", "test"): 33,
    }
    frame = data.to_pandas()
    for _, one in frame.groupby("task"):
        days = {name: part["date"] for name, part in one.groupby("split")}
        assert days["train"].max() <= days["validation"].min() <= days["validation"].max() <= days["test"].min()


def test_released_counts_are_those_of_the_paper(tmp_path):
    # 338 speeches of Abid Q. Raja: the published counts are 169, 84 and 85.
    speakers = {"Abid Q. Raja": 338, "B. Two": 201, "C Three": 200, "D Four": 1000, "E Five": 999}
    data = talk_of_norway(ton(tmp_path, speakers), "released")
    result = counts(data)
    assert {task for task, _ in result} == {"abid q raja", "b two", "e five"}
    assert [result["abid q raja", name] for name in ("train", "validation", "test")] == [169, 84, 85]


def test_released_takes_the_first_25_and_no_short_speeches(tmp_path):
    file = ton(tmp_path, {f"Speaker {n:02}": 201 for n in range(27)})
    frame = pd.read_csv(file)
    frame.loc[0, "text"] = "Takk."
    frame.to_csv(file, index=False)
    data = talk_of_norway(file, "released")
    assert sorted(set(data["task"])) == [f"speaker {n:02}" for n in range(25)]
    assert data["task"][:].count("speaker 00") == 200


def test_empty_speeches_count_for_nothing(tmp_path):
    file = ton(tmp_path, {"A": 101, "B": 101})
    frame = pd.read_csv(file)
    frame.loc[0, "text"] = None
    frame.to_csv(file, index=False)
    assert set(talk_of_norway(file)["task"]) == {"B"}


def test_columns_and_use(tmp_path):
    data = talk_of_norway(ton(tmp_path, {"A": 120, "B": 130}))
    assert data.column_names == ["task", "text", "date", "doc_id", "split"]
    assert len(set(data["doc_id"])) == 250
    assert data["date"][0] == "1998-10-01"
    loaded = load_tasks(data, word_tokenizer(), split_column="split", max_tokens=128)
    assert [len(split) for split in (loaded.train, loaded.validation, loaded.test)] == [125, 42, 83]


def test_bad_input_gives_one_line(tmp_path):
    file = ton(tmp_path, {"A": 3})
    with pytest.raises(InputError, match=r"selection is 'papers'; allowed: paper, released; did you mean 'paper'\?"):
        talk_of_norway(file, "papers")
    with pytest.raises(InputError, match=r"has no speaker with more than 100 speeches; give the whole ton\.csv"):
        talk_of_norway(file)
    with pytest.raises(InputError, match=r"has no speaker with more than 200 speeches"):
        talk_of_norway(file, "released")
    with pytest.raises(InputError, match=r"does not exist; take ton\.csv from https://github\.com/ltgoslo/talk-of-norway"):
        talk_of_norway(tmp_path / "none.csv")
    frame = pd.read_csv(file)
    frame.rename(columns={"rep_name": "name"}).to_csv(file, index=False)
    with pytest.raises(InputError, match=r"has no column 'rep_name'; .*did you mean 'name'\?"):
        talk_of_norway(file)
    frame.assign(time="soon").to_csv(file, index=False)
    with pytest.raises(InputError, match=r"row 1: time 'soon' is not a date; write yyyy-mm-dd"):
        talk_of_norway(file)
