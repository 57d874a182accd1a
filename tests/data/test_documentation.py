"""Docstrings as text: found wherever they stand, without importing what they document."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from bora_pyro.data.documentation import documentation_rows, read_docstrings
from bora_pyro.errors import InputError

LONG = "This docstring is long enough to be kept, as it has more than the eighty characters that are asked for."
FILES = {
    "__init__.py": f'"""The package. {LONG}"""\nraise RuntimeError("nobody may import this")\n',
    "shapes.py": f'''
"""Shapes. {LONG}

    Indented.
"""

def outer(x):
    """Outer. {LONG}"""
    def inner():
        """Inner. {LONG}"""
        async def innermost():
            """Innermost. {LONG}"""
    return inner

class Circle:
    """Circle. {LONG}"""

    class Centre:
        """Centre. {LONG}"""

    def area(self):
        r"""Area \\pi r^2. {LONG}"""

    def short(self):
        """Too short."""

    def bare(self):
        "{LONG}" + "not a docstring"

if True:
    def conditional():
        """Conditional. {LONG}"""
''',
    "sub/deep/__init__.py": f'"""Deep. {LONG}"""\n',
    "sub/broken.py": f'"""Broken. {LONG}"""\ndef (:\n',
    "sub/latin.py": f'"""Norw\xe6gian. {LONG}"""\n'.encode("latin-1"),
    "sub/null.py": f'"""Null. {LONG}"""\n\0\n',
    "sub/escape.py": f'"""Escape \\d. {LONG}"""\n',  # Python warns of \d
    "sub/empty.py": "",
    "sub/notes.txt": f'"""Notes. {LONG}"""\n',
    "tests/test_shapes.py": f'"""Tests. {LONG}"""\n',
    "sub/tests/helpers.py": f'"""Helpers. {LONG}"""\n',
    "sub/testing/tools.py": f'"""Tools. {LONG}"""\n',
    "_vendor/other.py": f'"""Vendored. {LONG}"""\n',
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, with every kind of docstring."""
    for name, text in FILES.items():
        file = tmp_path / "tiny_documented" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.syspath_prepend(tmp_path)
    return "tiny_documented"


def test_every_docstring_is_found_with_its_place(package):
    found = [(entry["module"], entry["object"], entry["text"].split()[0].strip(".")) for entry in read_docstrings(package)]
    assert found == [
        ("tiny_documented", "", "The"),
        ("tiny_documented.shapes", "", "Shapes"),
        ("tiny_documented.shapes", "outer", "Outer"),
        ("tiny_documented.shapes", "outer", "Inner"),
        ("tiny_documented.shapes", "outer", "Innermost"),
        ("tiny_documented.shapes", "Circle", "Circle"),
        ("tiny_documented.shapes", "Circle", "Centre"),
        ("tiny_documented.shapes", "Circle", "Area"),
        ("tiny_documented.shapes", "", "Conditional"),
        ("tiny_documented.sub.deep", "", "Deep"),
        ("tiny_documented.sub.escape", "", "Escape"),
    ]


def test_texts_are_clean(package):
    texts = {entry["object"]: entry["text"] for entry in read_docstrings(package) if entry["module"].endswith("shapes")}
    first = next(entry["text"] for entry in read_docstrings(package) if entry["text"].startswith("Shapes"))
    assert first == f"Shapes. {LONG}\n\nIndented."
    assert all(text == text.strip() for text in texts.values())


def test_min_characters(package):
    def first_words(least):
        return [entry["text"].split()[0] for entry in read_docstrings(package, min_characters=least)]

    assert "Too" in first_words(1)
    assert "Too" in first_words(len("Too short."))
    assert "Too" not in first_words(len("Too short.") + 1)
    assert first_words(10_000) == []


def test_a_module_is_read_as_a_package_is(tmp_path, monkeypatch):
    (tmp_path / "tiny_module.py").write_text(FILES["shapes.py"])
    monkeypatch.syspath_prepend(tmp_path)
    assert {entry["module"] for entry in read_docstrings("tiny_module")} == {"tiny_module"}


@pytest.mark.parametrize("name", ["no_such_package", "no_such_package.part", ".relative", ""])
def test_a_package_that_is_not_there(name):
    with pytest.raises(InputError, match="is not installed; install it with: pip install") as caught:
        list(read_docstrings(name))
    assert repr(name) in str(caught.value)


def test_a_package_without_source():
    with pytest.raises(InputError, match="package 'sys' has no Python source"):
        list(read_docstrings("sys"))


def test_rows_of_a_package(tmp_path, monkeypatch):
    files = {
        "__init__.py": "",
        "top.py": [f"Top {n}." for n in range(3)],
        "part/one.py": [f"One {n}." for n in range(2)],
        "part/two.py": ["Two.", "One 0.", "Two."],  # repeated texts count once
        "part/deep/three.py": [f"Three {n}." for n in range(2)],
        "part/deep/er/four.py": ["Four."],
    }
    for name, texts in files.items():
        file = tmp_path / "tiny_parts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(f'def f{n}():\n    """{text} {LONG}"""\n' for n, text in enumerate(texts)))
    monkeypatch.syspath_prepend(tmp_path)
    rows = documentation_rows("tiny_parts", min_documents=3)
    assert Counter(row["task"] for row in rows) == {"part": 3, "part.deep": 3, "top": 3}
    assert [row["doc_id"] for row in rows if row["task"] == "part"] == [
        "tiny_parts.part.one:f0",
        "tiny_parts.part.one:f1",
        "tiny_parts.part.two:f0",
    ]
    assert {row["task"] for row in documentation_rows("tiny_parts", min_documents=4)} == set()


def test_the_documentation_of_networkx_is_many_tasks():
    rows = documentation_rows()
    counts = Counter(row["task"] for row in rows)
    assert len(counts) > 15
    assert min(counts.values()) >= 12
    assert all(sorted(row) == ["doc_id", "task", "text"] for row in rows)
    assert len({row["text"] for row in rows}) == len(rows)
    tasks = defaultdict(set)
    for row in rows:
        tasks[row["doc_id"]].add(row["task"])
    assert {len(names) for names in tasks.values()} == {1}
    assert max(Counter(row["doc_id"] for row in rows).values()) > 1  # the docstrings of one class stay together
    assert not any(".tests" in row["doc_id"] for row in rows)
