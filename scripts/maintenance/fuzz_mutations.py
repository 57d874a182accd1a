"""Mutations of files for ``scripts/maintenance/fuzz.py``: of their bytes and of their structure."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import random
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import pandas as pd
import pyarrow

# Tokens that often break parsers, of any format.
TOKENS = [
    b'"', b'""', b"'", b"\\", b",", b"\t", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xe2\x80\xa8",
    b"\xed\xa0\x80", b"\xc2\x85", b"\x1b[2J", b"\\ud800", b"\\u0000", b"\\Uffffffff", b"1e999", b"-1", b"9" * 400, b"9" * 5000,
    b"NaN", b"-Infinity", b"null", b"true", b"[" * 2000, b'{"a":' * 2000, b"{}", b"[]", b": ", b"- ", b"? ", b"# ", b"&a ", b"*a",
    b"<<: ", b"!!python/object/apply:os.abort []", b"!!bool x", b"!!int ''", b"!!timestamp x", b"!!binary '?'", b"!!set {a}",
    b"%TAG ! tag:a,2000:\n---\n", b"---\n", b"...\n", b"|\n", b">-\n", b"0b_", b"1:60", b"2020-13-45", b"=", b"~", b"PAR1",
    b"../../x", b"task", b"text", b"x" * 3000,
]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 10**30, 1e308, math.nan, math.inf, "", "\ud800", "x" * 2000, "../..", [], [[]], {}, {"a": {}},
    [None], "F32", "train", [2**62, 4], [0, -4], [1, 2, 3], {"x": "y"},
]  # fmt: skip


def _bytes(rng: random.Random, raw: bytes, others: list[bytes]) -> bytes:
    """Apply one random mutation to bytes."""
    a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
    c = min(b, a + rng.randrange(1, 16))
    other = rng.choice(others)
    match rng.randrange(9):
        case 0 if raw:  # a flipped bit
            a = min(a, len(raw) - 1)
            return raw[:a] + bytes([raw[a] ^ 1 << rng.randrange(8)]) + raw[a + 1 :]
        case 1:
            return raw[:a]
        case 2:
            return raw[:a] + raw[c:]
        case 3:
            return raw[:a] + rng.randbytes(rng.randrange(1, 9)) + raw[c:]
        case 4:
            return raw[:b] + raw[a:b] + raw[b:]
        case 5:  # the end of another file
            return raw[:a] + other[rng.randrange(len(other) + 1) :]
        case 6:
            return raw[:a] + rng.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1]).to_bytes(8, "little") + raw[a + 8 :]
        case _:
            return raw[:a] + rng.choice(TOKENS) + raw[rng.choice((a, c)) :]


def _nested(rng: random.Random, value: Any) -> Any:
    """Apply one random mutation somewhere in nested lists and mappings."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or rng.random() < 0.2:
        return rng.choice(VALUES)
    key = rng.choice(keys)
    match rng.randrange(8):
        case 0:
            del value[key]
        case 1 if isinstance(value, dict):
            value[rng.choice(["", "\ud800", "__metadata__", "a/b", "x" * 500, *keys])] = value.pop(key)
        case 2 if isinstance(value, list):
            value *= 2
        case 3:
            value[key] = rng.choice(VALUES)
        case _:
            value[key] = _nested(rng, value[key])
    return value


def _json(rng: random.Random, raw: bytes) -> bytes:
    return json.dumps(_nested(rng, json.loads(raw)), ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")


def _lines(rng: random.Random, raw: bytes, change: Callable[[random.Random, bytes], bytes]) -> bytes:
    lines = raw.split(b"\n")
    n = rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines.insert(rng.randrange(len(lines) + 1), lines[n])
        case 1:
            rng.shuffle(lines)
        case _ if lines[n].strip():
            lines[n] = change(rng, lines[n])
    return b"\n".join(lines)


def _option(rng: random.Random, line: bytes) -> bytes:
    key, _, value = line.partition(b":")
    token = rng.choice(TOKENS)
    return rng.choice(
        [key + b": " + token, token + b": " + value, b"  " + line, b"\t" + line, key + b":\n- " + token + b"\n- a", b"- " + line]
    )


def _table(rng: random.Random, raw: bytes, separator: str = ",") -> bytes:
    rows = list(csv.reader(io.StringIO(raw.decode()), delimiter=separator))
    row = rng.choice(rows)
    match rng.randrange(5):
        case 0:
            row.append(row[0])
        case 1:
            row.pop()
        case 2:
            row[:] = row * rng.randrange(2, 50)
        case _:
            row[rng.randrange(len(row))] = rng.choice(TOKENS).decode(errors="replace")
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)), lineterminator="\n").writerows(
        rows
    )
    return text.getvalue().encode(errors="surrogatepass")


def _parquet(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() < 0.7:  # parquet stores its metadata at the end of the file
        n = len(raw) - 9 - rng.randrange(min(600, len(raw) - 9))
        return raw[:n] + rng.randbytes(1) + raw[n + 1 :]
    cells = [3, 2.5, math.nan, None, True, b"\xff", ["a"], {"a": 1}, "text", pd.Timestamp(0), pd.Timedelta(1), 2**70]
    columns = {name: [rng.choice(cells)] * 3 for name in rng.sample(["task", "text", "doc_id", "task ", ""], 3)}
    buffer = io.BytesIO()
    try:
        pd.DataFrame(columns).to_parquet(buffer)
    except (ValueError, TypeError, OverflowError):  # parquet has no type for a column
        return raw
    return buffer.getvalue()


def _spreadsheet(rng: random.Random, raw: bytes) -> bytes:
    """Mutate one part of a .xlsx file, most often the cells."""
    with zipfile.ZipFile(io.BytesIO(raw)) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    cells = [name for name in parts if name.startswith("xl/worksheets/")]
    name = rng.choice(cells if cells and rng.random() < 0.7 else list(parts))
    swaps = [
        (b"<v>", b"<f>"), (b't="s"', b't="e"'), (b't="n"', b't="d"'), (b'r="A1"', b'r="XFD9"'), (b"<row ", b"<row>"),
        (b"1", b"-9"),
    ]  # fmt: skip
    parts[name] = parts[name].replace(*rng.choice(swaps)) if rng.random() < 0.4 else _bytes(rng, parts[name], [*parts.values()])
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for part, content in parts.items():
            file.writestr(part, content)
    return buffer.getvalue()


def _tensors(rng: random.Random, raw: bytes) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    head, body = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    match rng.randrange(4):
        case 0:  # NaN, infinity, the largest float32
            n = rng.randrange(0, len(body) - 3, 4)
            body = body[:n] + rng.choice((b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f")) + body[n + 4 :]
        case 1 if "progress" in head.get("__metadata__", {}):
            head["__metadata__"]["progress"] = _json(rng, head["__metadata__"]["progress"].encode()).decode(errors="replace")
        case 2:  # the header entry of one tensor
            name = rng.choice([name for name in head if name != "__metadata__"])
            head[name] = _nested(rng, head[name])
        case _:
            head = _nested(rng, head)
    text = json.dumps(head).encode()
    length = len(text) if rng.random() < 0.9 else rng.choice([0, 2**40, 2**64 - 1, len(text) + 1])
    return length.to_bytes(8, "little") + text + body


FORMS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "csv": _table,
    "tsv": lambda rng, raw: _table(rng, raw, "\t"),
    "json": _json,
    "jsonl": lambda rng, raw: _lines(rng, raw, _json),
    "yaml": lambda rng, raw: _lines(rng, raw, _option),
    "parquet": _parquet,
    "xlsx": _spreadsheet,
    "text": lambda rng, raw: _lines(rng, raw, lambda rng, line: _bytes(rng, line, [raw])),
    "safetensors": _tensors,
}


def _zipped(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("t.csv", raw)
    return buffer.getvalue()


#: Compressions, by the ending of a file.
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": lambda raw: gzip.compress(raw, 1, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lambda raw: lzma.compress(raw, preset=0),
    ".zst": lambda raw: bytes(pyarrow.compress(raw, codec="zstd", asbytes=True)),
    ".zip": _zipped,
}


# What a mutation of the structure raises if an earlier one has destroyed it.
_DESTROYED = (ValueError, LookupError, TypeError, AttributeError, csv.Error, zipfile.BadZipFile, zlib.error)


def damaged(rng: random.Random, valid: list[bytes], form: str, *, packed: str = "") -> bytes:
    """Apply up to four mutations to a valid file. Those of its structure come first: a file with changed bytes may have none.

    Args:
        rng: random number generator.
        valid: contents of valid files, before their compression.
        form: their format, a key of ``FORMS``.
        packed: the ending of the file. If it is one of ``PACKED``, the compressed bytes may be mutated, too.
    """
    raw = rng.choice(valid)
    for _ in range(rng.choice((0, 1, 1, 2))):
        try:
            raw = FORMS[form](rng, raw)
        except _DESTROYED:
            break
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        raw = _bytes(rng, raw, valid)
    if packed in PACKED:
        raw = PACKED[packed](raw)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            raw = _bytes(rng, raw, [raw])
    return raw
