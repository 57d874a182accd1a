"""The readers that ``scripts/maintenance/fuzz.py`` tests: all of the library that reads files, with valid files of a tiny fit."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from bora_pyro.backbone.backbone import BUILTIN_BASES
from bora_pyro.data.columns import Columns
from bora_pyro.data.folder_check import check_folder
from bora_pyro.data.readers import ReadingOptions
from bora_pyro.data.split import apply_split
from bora_pyro.data.streaming import stream_documents
from bora_pyro.data.tables import read_table
from bora_pyro.exchange.load import load_peft
from bora_pyro.files.tensors import read_digest
from bora_pyro.guides import map_guide
from bora_pyro.inference.checkpoint import Checkpoint
from bora_pyro.inference.loop import Loop
from bora_pyro.options.command_line import parse_config, to_yaml
from bora_pyro.runs.build import build_run
from bora_pyro.runs.config.map_fit import MapFitConfig
from bora_pyro.runs.folder import RunFolder
from bora_pyro.runs.map_fit import run_map_fit
from bora_pyro.runs.results_table import rows_of_run
from bora_pyro.runs.saved import load_run


@dataclass(frozen=True)
class Reader:
    """A function that reads one kind of file.

    Attributes:
        name: name of the reader.
        file: path at which it reads the damaged file.
        form: format of the file, a key of ``fuzz_mutations.FORMS``.
        read: function that reads the file at a path.
        share: share of the inputs, relative to the other readers.
        valid: contents of valid files, which are damaged.
        foreign: whether these are valid files of other formats, which the reader may refuse.
    """

    name: str
    file: Path
    form: str
    read: Callable[[Path], object]
    share: float
    valid: list[bytes]
    foreign: bool = False


def readers(folder: Path) -> list[Reader]:
    """Make valid files in ``folder`` with a tiny fit, and return all readers in a fixed order."""
    words = ["red green blue", 'one, "two"', "Ærlig\nsagt", "north east south west"]
    rows = [
        {"task": task, "text": f"{n} {words[n % 4]} {task}", "doc_id": f"s{n}"}
        for task in ("Ada", "Bo B.", "東京")
        for n in range(8)
    ]
    config = _tiny_run(folder, rows)
    return [*_input_readers(folder, rows, config), *_run_readers(folder / "run", rows, config)]


def _input_readers(folder: Path, rows: list[dict[str, str]], config: MapFitConfig) -> list[Reader]:
    """Readers of what a fit is given: tables, configurations, folders of data."""
    few = pd.DataFrame(rows).iloc[[0, 1, 8, 9, 16]]
    saved, card = folder / "saved", folder / "card"
    datasets.Dataset.from_list(rows[:2]).save_to_disk(saved)
    card.mkdir()
    few.to_csv(card / "train.csv", index=False)

    tables, documents = _tables(few), folder / "documents" / "ada"
    documents.mkdir(parents=True)
    options = to_yaml(config).encode()
    short = b"tau: 1e3\nrank: 4\ntargets: [q_proj, v_proj]\nalpha: null\ndata: 'a b.csv'\noverwrite: yes # now\n"

    def configuration(file: Path) -> None:
        parse_config(MapFitConfig, ["--config", str(file)]).validate()

    (folder / "several").mkdir()
    (folder / "several" / "a.jsonl").write_text('{"meta": {"task": "a"}, "text": "b", "doc_id": "0"}\n')

    def table_of(**options: Any) -> Callable[[Path], object]:
        return lambda file: read_table(file, reading=ReadingOptions(**options))

    bare = few.to_csv(index=False, sep="|", quoting=3, escapechar="\\").encode()
    cp1252, wide = few.head(2).to_csv(index=False).encode("cp1252"), few.to_csv(index=False, sep=";").encode("utf-16")
    several = [folder / "several" / "a.jsonl", folder / "several" / "b.jsonl"]
    several[0].write_text('{"meta": {"task": "a"}, "text": "b", "doc_id": "0"}\n')
    no_header = ReadingOptions(header=False)
    packed = ("csv.gz", "jsonl.gz", "csv.zst", "json.xz", "tsv.bz2", "csv.zip", "parquet.gz")
    return [
        *(Reader(f"table .{n}", folder / f"t.{n}", _FORMS.get(n, n), read_table, 10, [raw]) for n, raw in tables.items()),
        *(_packed(folder / f"t.{name}", tables) for name in packed),
        Reader("table, quoting none", folder / "bare.csv", "text", table_of(quoting="none", separator="|"), 5, [bare]),
        Reader("table, no header", folder / "none.csv", "csv", lambda file: read_table(
            file, task_column="1", text_column="column2", reading=no_header
        ), 3, [tables["csv"]]),
        Reader("table, other encoding", folder / "cp1252.csv", "csv", table_of(encoding="cp1252"), 3, [cp1252]),
        Reader("table, UTF-16", folder / "wide.csv", "text", read_table, 3, [wide]),
        Reader("table .csv, streamed", folder / "s.csv", "csv", _stream(folder), 2, [tables["csv"]]),
        Reader("other files as .csv", folder / "other.csv", "text", read_table, 3, [*tables.values()], foreign=True),
        Reader("text documents", documents / "a.txt", "text", lambda _: read_table(
            documents.parent, reading=ReadingOptions(task_from="file")
        ), 3, [b"One.\nTwo.\n"]),
        Reader("file among several", several[1], "jsonl", lambda _: read_table(
            several, task_column="meta.task"
        ), 3, [several[0].read_bytes()]),
        Reader("configuration", folder / "fit.yaml", "yaml", configuration, 12, [short, short, short, options]),
        Reader("data card", card / "README.md", "yaml", lambda _: check_folder(card), 5, [
            b"---\nlicense: mit\nconfigs:\n- config_name: a\n  data_files:\n  - split: train\n    path: train*.csv\n---\nText.\n"
        ]),
        _of(saved / "state.json", "saved data set", "json", lambda _: check_folder(saved), 5),
    ]  # fmt: skip


# The forms of mutations of endings that have no form of their own.
_FORMS = {"ndjson": "jsonl"}


def _packed(file: Path, tables: dict[str, bytes]) -> Reader:
    kind = file.name.split(".")[1]
    return Reader(f"table .{kind}{file.suffix}", file, _FORMS.get(kind, kind), read_table, 3, [tables[kind]])


def _tables(few: pd.DataFrame) -> dict[str, bytes]:
    """A small table in every format."""
    spreadsheet = io.BytesIO()
    few.to_excel(spreadsheet, index=False)
    lines = few.to_json(orient="records", lines=True, force_ascii=False).encode()
    return {
        "csv": few.to_csv(index=False).encode(),
        "tsv": few.to_csv(index=False, sep="\t").encode(),
        "jsonl": lines,
        "ndjson": lines,
        "json": few.to_json(orient="records", force_ascii=False).encode(),
        "parquet": few.to_parquet(),
        "xlsx": spreadsheet.getvalue(),
    }


def _stream(folder: Path) -> Callable[[Path], object]:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return lambda file: stream_documents(file, tokenizer, Columns(), max_tokens=16)


def _run_readers(run: Path, rows: list[dict[str, str]], config: MapFitConfig) -> list[Reader]:
    """Readers of what a fit wrote: the files of its run folder, its adapters and checkpoints, and the whole run."""
    model, data = build_run(config, quiet=True)
    loop = Loop(
        model, data, map_guide(model), learning_rate=1e-2, warmup=0.1, token_budget=256, accumulate=1, gradient_clip=1.0, seed=0,
        epochs=2,
    )  # fmt: skip
    split_of, _ = read_table(pd.DataFrame(rows))
    [newest] = (run / "checkpoints").iterdir()
    adapter = run / "adapters" / "ada"

    def tensors(file: Path) -> None:
        RunFolder(run).load_tensors(file.stem)
        RunFolder(run).load_metadata(file.stem)

    found = [
        _of(run / "config.yaml", "run: config", "yaml", lambda _: RunFolder.open(run), 2),
        _of(run / "metrics.json", "run: metrics", "json", lambda _: rows_of_run(run), 5),
        _of(run / "metrics.jsonl", "run: log", "jsonl", lambda _: RunFolder(run).read_log(), 8),
        _of(run / "split.json", "run: split", "json", lambda _: apply_split(split_of, RunFolder(run).read_split()), 8),
        _of(run / "posterior.safetensors", "run: posterior", "safetensors", tensors, 2),
        _of(run / "posterior.safetensors", "run: posterior, signed", "safetensors", lambda file: tensors(_signed(file)), 8),
        _of(adapter / "adapter_model.safetensors", "adapter", "safetensors", lambda _: load_peft(adapter, model), 8),
        _of(adapter / "adapter_config.json", "adapter: config", "json", lambda _: load_peft(adapter, model), 4),
        _of(newest, "run: checkpoint", "safetensors", lambda file: loop.load(Checkpoint(file)), 2),
        _of(newest, "run: checkpoint, signed", "safetensors", lambda file: loop.load(Checkpoint(_signed(file))), 6),
    ]  # fmt: skip
    for name, form in (("config.yaml", "yaml"), ("metrics.json", "json"), ("split.json", "json")):
        found.append(_of(run / name, f"whole run: {name}", form, lambda _: load_run(run, device="cpu"), 0.1))
    posterior = run / "posterior.safetensors"

    def whole_run(file: Path) -> None:
        _signed(file)
        load_run(run, device="cpu")

    return [*found, _of(posterior, "whole run: posterior.safetensors, signed", "safetensors", whole_run, 0.1)]


def _signed(file: Path) -> Path:
    """Replace the digest in a file by the digest of its present bytes, so that the damage is not found by the digest."""
    _, found, place = read_digest(file)
    if place + len(found) <= file.stat().st_size and place > 8:
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(found.encode())
    return file


def _of(file: Path, name: str, form: str, read: Callable[[Path], object], share: float) -> Reader:
    return Reader(name, file, form, read, share, [file.read_bytes()])


def _tiny_run(folder: Path, rows: list[dict[str, str]]) -> MapFitConfig:
    base = folder / "base"
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_BASES["builtin:nano"])
    tokenizer.save_pretrained(base)
    sizes = {"hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(base)
    data = folder / "rows.csv"
    pd.DataFrame(rows).to_csv(data, index=False)
    config = MapFitConfig(
        data=str(data), base_model=str(base), max_tokens=16, token_budget=256, rank=2, targets=["v_proj", "fc2"], epochs=1,
        device="cpu", threads=1, output_dir=str(folder / "run"),
    )  # fmt: skip
    run_map_fit(config, quiet=True)
    return config
