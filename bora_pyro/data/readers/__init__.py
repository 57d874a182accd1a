"""Readers: from the bytes of any container to rows of cells as they are written.

>>> import tempfile
>>> from pathlib import Path
>>> folder = Path(tempfile.mkdtemp())
>>> _ = (folder / "ada.csv").write_text("text\\n007\\nNA\\n")
>>> _ = (folder / "bo.jsonl").write_text('{"text": "Hi."}\\n')
>>> raw = open_source([folder / "ada.csv", str(folder / "*.jsonl")], ReadingOptions(task_from="file"))
>>> [cells for _, cells in raw]
[{'text': '007', 'task': 'ada'}, {'text': 'NA', 'task': 'ada'}, {'text': 'Hi.', 'task': 'bo'}]

A format is a function in a file of its own, and a line in ``formats.py``. Plain reading and streaming use the same readers.
"""

from bora_pyro.data.readers.formats import ENDINGS, FORMATS, table_ending
from bora_pyro.data.readers.options import ReadingOptions
from bora_pyro.data.readers.raw import Part, RawTable, Row
from bora_pyro.data.readers.source import Source, check_source, is_hub_id, open_source

__all__ = [
    "ENDINGS", "FORMATS", "Part", "RawTable", "ReadingOptions", "Row", "Source", "check_source", "is_hub_id", "open_source",
    "table_ending",
]  # fmt: skip
