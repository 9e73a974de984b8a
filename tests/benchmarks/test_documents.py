"""README.md and docs/: their tables are those of the rows, their links lead somewhere."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.tables.documents import DOCUMENTS, ROOT, TABLES, names, with_tables

WITH_TABLES = [document for document in DOCUMENTS if document.name != "format.md"]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def test_every_document_is_checked() -> None:
    tracked = subprocess.run(["git", "ls-files", "README.md", "docs/*.md"], cwd=ROOT, capture_output=True, text=True)
    assert {str(document.relative_to(ROOT)) for document in DOCUMENTS} == set(tracked.stdout.split())
    assert len(DOCUMENTS) >= 3


@pytest.mark.parametrize("document", WITH_TABLES, ids=lambda path: path.name)
def test_tables_are_those_of_the_rows(document: Path) -> None:
    text = document.read_text()
    assert names(text)
    assert with_tables(text) == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_mark_belongs_to_a_table(document: Path) -> None:
    """A mark that is misspelt or lacks its end is no table, and its content would never be checked."""
    text = document.read_text()
    assert text.count("<!--") == 2 * len(names(text))


def test_every_table_is_shown_once() -> None:
    shown = Counter(name for document in DOCUMENTS for name in names(document.read_text()))
    assert shown == Counter(list(TABLES))


def test_an_unknown_table_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such_table"):
        with_tables("<!-- table: no_such_table -->\nold\n<!-- end -->\n")


@pytest.mark.parametrize("document", WITH_TABLES, ids=lambda path: path.name)
def test_a_changed_figure_is_found_and_mended(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.tables import __main__ as command

    text = document.read_text()
    table = re.search(r"<!-- table: \w+ -->\n.*?<!-- end -->", text, re.DOTALL)
    assert table is not None
    wrong = text.replace(table[0], re.sub(r"\d", "7", table[0], count=3))
    assert wrong != text
    copy = tmp_path / document.name
    copy.write_text(wrong)
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "DOCUMENTS", [copy])
    monkeypatch.setattr(sys, "argv", ["tables", "--check"])
    with pytest.raises(SystemExit, match=document.name):
        command.main()
    assert copy.read_text() == wrong
    monkeypatch.setattr(sys, "argv", ["tables"])
    command.main()
    assert copy.read_text() == text


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_repository_lead_somewhere(document: Path) -> None:
    broken = []
    for link in LINK.findall(document.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def anchors(document: Path) -> set[str]:
    """Those that GitHub gives to headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def test_the_readme_is_read_in_one_go() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 260
