"""Fits on prompts with completions and on chats, from the command line to perplexities that are counted by hand."""

from __future__ import annotations

import gzip
import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bora_pyro import infer_task
from bora_pyro.predict.mixture_text import generate
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.saved import load_run
from tests.tiny_base import WORDS, command_main, line, quick_fit, save_base

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


PROMPT = ["--prompt", "one two", "--max_new_tokens", "6", "--task", "Ada"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Options of a quick fit, and the folder that holds its files."""
    folder = tmp_path_factory.mktemp("inputs")
    options = quick_fit(folder) | {"learning_rate": 0.03, "tau": 10, "epochs": 6}
    return {key: value for key, value in options.items() if key != "data"}, folder


def questions(number=10):
    generator = np.random.default_rng(0)
    return [
        {"task": task, "doc_id": f"{task} {n}", "question": " ".join(generator.choice(words, 2)) + f" {n}",
         "answer": " " + " ".join(generator.choice(words, 3))}
        for task, words in WORDS.items()
        for n in range(number)
    ]  # fmt: skip


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fitted(options, folder, **more):
    assert command_main()(line({**options, "output_dir": folder, **more})) == 0
    return RunFolder.open(folder)


def perplexity(base, documents):
    """exp of the mean loss of the tokens that are marked, document by document: (ids, predicted) each."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    total = count = 0
    for ids, predicted in documents:
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, own in enumerate(predicted):
            if own:
                total -= float(log_p[place - 1, ids[place]])
                count += 1
    return math.exp(total / count)


def test_prompts_and_completions_from_end_to_end(inputs, tmp_path):
    options, folder = inputs
    rows = questions()
    data = write_lines(folder / "questions.jsonl", rows)
    options = options | {"data": data, "prompt_column": "question", "completion_column": "answer"}
    run = fitted(options, tmp_path / "run")

    tokenizer, split = AutoTokenizer.from_pretrained(options["base_model"]), run.read_split()["tasks"]
    documents = []
    for row in rows:
        if split[row["task"]][row["doc_id"]] == "test":
            prompt, answer = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("question", "answer"))
            ids = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
            documents.append((ids, [False] * (1 + len(prompt)) + [True] * (len(answer) + 1)))
    metrics = run.read_metrics()
    assert len(documents) == metrics["test_documents"] == 6
    assert metrics["base_test_perplexity"] == pytest.approx(perplexity(options["base_model"], documents), rel=1e-4)
    assert metrics["test_perplexity"] < 0.8 * metrics["base_test_perplexity"]
    # answers and their ends are what it costs, in bits a character of the answers
    bits = math.log2(metrics["test_perplexity"]) * sum(map(sum, (own for _, own in documents)))
    answers = sum(len(row["answer"]) for row in rows if split[row["task"]][row["doc_id"]] == "test")
    assert metrics["test_bits_per_character"] == pytest.approx(bits / answers, rel=1e-5)

    saved = load_run(run.path)
    assert [saved.data.test.document(n).tolist() for n in range(6)] == [ids for ids, _ in documents]
    again = saved.fitted.evaluate(saved.data.test)
    assert again["test_perplexity"] == pytest.approx(metrics["test_perplexity"], rel=1e-6)


def marked_chats(rows, split, tokenizer):
    """The test documents by hand: the tokens of each, and which of them the assistant says."""
    documents = []
    for row in rows:
        if split[row["task"]][row["doc_id"]] == "test":
            ids, own = [], []
            for message in row["talk"]:
                header = tokenizer(message["role"] + ":", add_special_tokens=False)["input_ids"]
                words = tokenizer(f" {message['content']}</s>\n", add_special_tokens=False)["input_ids"]
                ids += header + words
                own += [False] * len(header) + [message["role"] == "assistant"] * len(words)
            documents.append((ids, own))
    return documents


def check_generated(path, fitted, tokenizer, capsys):
    """A prompt is what a user says, and the adapters answer."""
    capsys.readouterr()
    theta, _ = fitted.weights()
    for raw, begun in ((["--json"], "user: one two</s>\nassistant:"), (["--json", "--raw"], "</s>one two")):
        assert command_main("generate")([str(path), *PROMPT, *raw]) == 0
        ids = tokenizer(begun, add_special_tokens=False)["input_ids"]
        expected = generate(fitted.model, ids, draws=lambda: [theta], task_index=0, max_new_tokens=6)
        record = json.loads(capsys.readouterr().out)
        assert (record["prompt"], record["text"]) == ("one two", expected.text)


def test_chats_from_end_to_end(inputs, tmp_path, monkeypatch, capsys):
    options, folder = inputs
    rows = [
        {"task": row["task"], "doc_id": row["doc_id"], "talk": [
            {"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"].strip()},
            {"role": "user", "content": "again"}, {"role": "assistant", "content": row["answer"].split()[0]},
        ]}
        for row in questions()
    ]  # fmt: skip
    template = folder / "chat.jinja"
    template.write_text(TEMPLATE)
    options = options | {"data": write_lines(folder / "chats.jsonl", rows), "messages_column": "talk"}
    options |= {"chat_template": template, "max_tokens": 128, "base_model": save_base(folder / "longer", context=128)}
    run = fitted(options, tmp_path / "run")

    tokenizer, split = AutoTokenizer.from_pretrained(options["base_model"]), run.read_split()["tasks"]
    documents = marked_chats(rows, split, tokenizer)
    metrics = run.read_metrics()
    assert len(documents) == metrics["test_documents"] == 6
    assert metrics["base_test_perplexity"] == pytest.approx(perplexity(options["base_model"], documents), rel=1e-4)
    assert metrics["test_perplexity"] < 0.8 * metrics["base_test_perplexity"]
    saved = load_run(run.path)
    assert [saved.data.test.document(n).tolist() for n in range(6)] == [ids for ids, _ in documents]

    # the run has the template itself: it goes on from the file, and is read where the file is another
    assert run.read_config()["chat_template"] == TEMPLATE
    assert command_main()(line({**options, "output_dir": run.path, "resume": "true"})) == 0
    template.write_text("{{ 'red' if add_generation_prompt else 'blue' }}")
    assert command_main()(line({**options, "output_dir": run.path, "resume": "true"})) == 2
    assert "chat_template is \"{{ 'red'" in capsys.readouterr().err
    again = load_run(run.path)
    assert [again.data.test.document(n).tolist() for n in range(6)] == [ids for ids, _ in documents]
    new = write_lines(folder / "new_chats.jsonl", [{**row, "task": "Dora"} for row in rows[:4]])
    words = line({"data": new, "output_dir": tmp_path / "new", "steps": 1, "messages_column": "talk"})
    assert command_main("adapt")([str(run.path), *words]) == 0
    adapted = load_run(tmp_path / "new")
    assert adapted.fitted.chat_template == TEMPLATE
    splits = (again.data.train, again.data.validation, again.data.test)
    assert adapted.data.train.document(0).tolist() in [part.document(n).tolist() for part in splits for n in range(len(part))]

    check_generated(run.path, again.fitted, tokenizer, capsys)
    monkeypatch.setenv("COLUMNS", "60")
    assert command_main("generate")([str(run.path), *PROMPT]) == 0
    assert [row.strip() for row in capsys.readouterr().out.splitlines()].count("one two") == 1  # a line of its own


def test_recognised_chats_from_end_to_end(inputs, tmp_path, capsys):
    options, folder = inputs
    turns = [
        [{"from": "human", "value": row["question"]}, {"from": "gpt", "value": row["answer"].strip()}] for row in questions()
    ]
    rows = [{"task": row["task"], "conversations": chat} for row, chat in zip(questions(), turns, strict=True)]
    options = options | {"data": write_lines(folder / "shared.jsonl", rows), "chat_template": TEMPLATE, "epochs": 1}
    run = fitted(options, tmp_path / "run")
    note = "recognised ShareGPT chats in column 'conversations' (human -> user, gpt -> assistant): the assistant's turns are"
    assert note in capsys.readouterr().err
    data = load_run(run.path).data
    tokenizer = AutoTokenizer.from_pretrained(options["base_model"])
    [answer] = {tokenizer.decode([token for token in data.train.labels(0).tolist() if token >= 0]).split("</s>")[0].strip()}
    assert answer in [chat[1]["value"] for chat in turns]
    # new tasks are recognised too, or read as an option says
    for more, rows_of_new in (([], rows[:4]), (["--document_form", "text"], [{"task": "Dora", "text": "one two three"}])):
        new = write_lines(folder / "new.jsonl", [{**row, "task": "Dora"} for row in rows_of_new])
        words = line({"data": new, "output_dir": tmp_path / f"new{len(more)}", "steps": 1})
        assert command_main("adapt")([str(run.path), *words, *more]) == 0
        assert load_run(tmp_path / f"new{len(more)}").fitted.chat_template == (None if more else TEMPLATE)


def test_all_of_it_together_and_a_posterior_around_it(inputs, tmp_path):
    options, folder = inputs
    rows = [row | {"country": "NO", "question": row["question"] * 2, "answer": row["answer"] * 6} for row in questions()]
    corpus, weights = folder / "corpus", folder / "weights.csv"
    corpus.mkdir()
    write_lines(corpus / "train.jsonl", rows)
    weights.write_text("task,weight\nNO / Ada,2\n")
    more = {
        "data": corpus, "prompt_column": "question", "completion_column": "answer", "streaming": "true", "max_tokens": 20,
        "long_documents": "split", "task_weights": weights, "tau": "learned", "task_subsampling": "true",
    }  # fmt: skip
    words = [*line({**options, **more, "output_dir": tmp_path / "run"}), "--task_column", "country", "task"]
    assert command_main()(words) == 0
    run = load_run(tmp_path / "run")
    assert run.data.tasks == ["NO / Ada", "NO / Børge B.", "NO / Cleo"]
    assert run.fitted.model.likelihood.task_weights.tolist() == [2.0, 1.0, 1.0]
    assert run.metrics["test_documents"] == 6 < len(run.data.test)
    assert run.fitted.evaluate(run.data.test)["test_perplexity"] == pytest.approx(run.metrics["test_perplexity"], rel=1e-6)
    assert any("were split into" in note for note in run.metrics["notes"])
    chosen = infer_task(run.fitted, run.data.test)
    assert chosen.tokens.tolist() == run.data.test.predicted.tolist()
    own = chosen.log_likelihood.gather(1, run.data.test.task[:, None]).sum()
    assert math.exp(-float(own) / run.data.test.num_tokens) == pytest.approx(run.metrics["test_perplexity"], rel=1e-5)
    posterior = command_main("posterior-fit")
    words = [str(tmp_path / "run"), *line({"output_dir": tmp_path / "posterior", "epochs": 1, "draws": 2})]
    assert posterior(words) == 0
    metrics = load_run(tmp_path / "posterior").metrics
    assert metrics["test_documents"] == run.metrics["test_documents"]
    assert metrics["mixture"]["tokens"] == run.data.test.num_tokens


def test_a_new_task_has_documents_of_the_same_form(inputs, tmp_path):
    options, folder = inputs
    rows, weights = questions(), folder / "weights.yaml"
    weights.write_text("Cleo: 3\n")
    columns = {"prompt_column": "question", "completion_column": "answer"}
    data = write_lines(folder / "old.jsonl", rows)
    fitted({**options, **columns, "data": data, "long_documents": "split", "task_weights": weights}, tmp_path / "run")
    new = write_lines(folder / "new.jsonl", [row | {"task": "Dora", "answer": row["answer"] * 6} for row in rows[:4]])
    words = line({"data": new, "output_dir": tmp_path / "new", "steps": 4, "max_tokens": 20, **columns})
    assert command_main("adapt")([str(tmp_path / "run"), *words]) == 0
    run = load_run(tmp_path / "new")
    assert run.data.tasks == ["Dora"]
    assert run.metrics["train_documents"] == 4 < len(run.data.train)  # in pieces
    assert (run.data.train.labels(0) == -100).sum() > 1
    assert run.fitted.model.likelihood.task_weights is None


def test_several_files_read_in_their_own_way(inputs, tmp_path):
    """A fit on two files with options of reading stores them, and is read back with the same documents; so are new tasks."""
    options, _ = inputs
    rows = [(task, f"{' '.join(words)} {n}") for task, words in WORDS.items() for n in range(6)]
    first, second = tmp_path / "a.csv", tmp_path / "b.tsv.gz"
    first.write_text("".join(f"{task}|{text}å\n" for task, text in rows[::2]), encoding="latin-1")
    second.write_bytes(gzip.compress("".join(f"{task}|{text}å\n" for task, text in rows[1::2]).encode("latin-1")))
    reading = {"separator": "pipe", "encoding": "latin-1", "header": "false", "task_column": 1, "text_column": 2}
    run = tmp_path / "run"
    main = command_main()
    words = line({**options, **reading, "epochs": 1, "output_dir": run})
    assert main([*words, "--data", str(first), str(tmp_path / "b.*")]) == 0
    config = RunFolder.open(run).read_config()
    assert config["data"] == [str(first), str(tmp_path / "b.*")]
    saved = load_run(run, device="cpu")
    assert sum(len(side) for side in (saved.data.train, saved.data.validation, saved.data.test)) == len(rows)
    new = tmp_path / "new"
    (new / "eve").mkdir(parents=True)
    for n in range(3):
        (new / "eve" / f"{n}.txt").write_text(f"{rows[0][1]} {n}", encoding="utf-8")
    adapted = ["--data", str(new), "--task_from", "file", "--text_column", "text", "--steps", "3", "--device", "cpu"]
    assert command_main("adapt")([str(run), *adapted, "--output_dir", str(tmp_path / "adapted")]) == 0
    assert load_run(tmp_path / "adapted", device="cpu").data.tasks == ["eve"]
