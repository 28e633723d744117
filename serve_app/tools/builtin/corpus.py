"""A corpus as sentences: files and JSONL in, sentences with their source ids and words out."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from serve_app.config.tools import RetrievalConfig
from serve_app.errors import ToolFailed

_ABBREVIATIONS = (
    r"mr|mrs|ms|dr|prof|st|sr|jr|vs|etc|e\.g|i\.e|cf|no|vol|fig|al|inc|ltd|approx|dept|est"
)
_SENTENCE_END = re.compile(
    r"""(?<=[.!?])\s+(?=["'“(\[]?[A-Z0-9])|(?<=[.!?]["'”)\]])\s+(?=["'“(\[]?[A-Z])"""
)
_ABBREVIATION_END = re.compile(rf"(?:^|[\s(])(?:{_ABBREVIATIONS})\.$", re.IGNORECASE)
_INITIAL_END = re.compile(r"(?:^|[\s(.])[A-Z]\.$")
_LIST_ITEM = re.compile(r"\s*(?:[-*+•]|\d{1,3}[.)])\s")
_WORD = re.compile(r"\w+")
_MAX_ENTRIES = 100_000
"""Files and folders of a corpus; one with more is a mistake, such as `/`."""
# fmt: off
_STOP_WORDS = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "did", "do", "does", "for", "from",
    "had", "has", "have", "how", "i", "if", "in", "is", "it", "its", "me", "my", "of", "on",
    "or", "s", "that", "the", "their", "there", "these", "they", "this", "to", "was", "were",
    "what", "when", "where", "which", "who", "whom", "why", "will", "with", "you", "your",
))
# fmt: on


@dataclass(frozen=True)
class Sentence:
    """One sentence and where it stands."""

    source_id: str
    """`document#position`, counted from 0."""
    title: str
    """The document's title; empty where it has none."""
    text: str


def split_sentences(text: str, max_chars: int) -> Iterator[str]:
    """Cut running text into sentences.

    Args:
        text: Prose; blank lines, list items and headings end a sentence too.
        max_chars: Longer sentences are cut at a space.

    Yields:
        Sentences with their white space collapsed.
    """
    for block in _blocks(text):
        pending = ""
        for part in _SENTENCE_END.split(" ".join(block.split())):
            pending = f"{pending} {part}" if pending else part
            if _ABBREVIATION_END.search(pending) or _INITIAL_END.search(pending):
                continue
            yield from _cut(pending, max_chars)
            pending = ""
        yield from _cut(pending, max_chars)


def _blocks(text: str) -> Iterator[str]:
    """Paragraphs, list items and headings, each by itself."""
    block: list[str] = []
    for line in text.splitlines():
        heading = line.startswith("#")
        if not line.strip() or heading or _LIST_ITEM.match(line):
            yield "\n".join(block)
            block = []
        block.append(line)
        if heading:
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def _cut(sentence: str, max_chars: int) -> Iterator[str]:
    sentence = re.sub(r"^(?:#+|[-*+•]|\d+[.)])\s+", "", sentence.strip())
    while len(sentence) > max_chars:
        cut = sentence.rfind(" ", 1, max_chars + 1)
        cut = cut if cut > 0 else max_chars
        yield sentence[:cut].strip()
        sentence = sentence[cut:].strip()
    if _WORD.search(sentence):
        yield sentence


def read_corpus(config: RetrievalConfig) -> list[Sentence]:
    """Read a corpus into sentences, in a fixed order.

    Args:
        config: Where it is and how sentences are cut.

    Returns:
        Every sentence.

    Raises:
        ToolFailed: If there is no corpus, or it is too large, malformed or empty.
    """
    path = config.corpus
    if path.is_dir():
        files = _text_files(path)
    elif path.is_file():
        files = [path]
    else:
        raise ToolFailed("the corpus does not exist")
    # The files of a kernel's own file system say that they have no bytes, and have some.
    size = sum(max(f.stat().st_size, 1) for f in files)
    if size > config.max_corpus_bytes:
        raise ToolFailed(f"the corpus has {size} bytes, more than {config.max_corpus_bytes}")
    sentences = []
    for document_id, title, text in _documents(path, files):
        for position, sentence in enumerate(split_sentences(text, config.max_sentence_chars)):
            sentences.append(Sentence(f"{document_id}#{position}", title, sentence))
    if not sentences:
        raise ToolFailed("the corpus holds no sentences")
    return sentences


def _text_files(folder: Path) -> list[Path]:
    """The `.txt` and `.md` files below a folder, in a fixed order.

    Raises:
        ToolFailed: If the folder leads out of itself, by a link or into another file system (as
            `/` does into `/proc`), or holds too much to be a corpus.
    """
    inside, device = folder.resolve(), folder.stat().st_dev
    files, entries = [], 0
    for parent, folders, names in os.walk(folder):
        entries += len(folders) + len(names)
        if entries > _MAX_ENTRIES:
            raise ToolFailed(f"the corpus has more than {_MAX_ENTRIES} files and folders")
        if os.stat(parent).st_dev != device:
            name = Path(parent).relative_to(folder).as_posix()
            raise ToolFailed(f"the folder {name!r} of the corpus lies in another file system")
        for name in names:
            file = Path(parent, name)
            if file.suffix not in (".txt", ".md") or not file.is_file():
                continue
            if file.is_symlink() and not file.resolve().is_relative_to(inside):
                shown = file.relative_to(folder).as_posix()
                raise ToolFailed(f"the link {shown!r} of the corpus leads out of it")
            files.append(file)
    return sorted(files)


def _documents(path: Path, files: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of every document."""
    if path.is_dir():
        for file in files:
            text = file.read_text(encoding="utf-8", errors="replace")
            name = file.relative_to(path).with_suffix("").as_posix()
            heading = re.match(r"\s*#\s+(.+)\n", text)
            if heading:
                text = text[heading.end() :]
            yield name, heading[1].strip() if heading else file.stem.replace("_", " "), text
        return
    seen = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                document_id, text = str(record["id"]), str(record["text"])
            except (ValueError, KeyError, TypeError):
                raise ToolFailed(f"line {number} of the corpus has no id and text") from None
            if document_id in seen:
                raise ToolFailed(f"line {number} of the corpus repeats id {document_id!r}")
            seen.add(document_id)
            yield document_id, str(record.get("title") or ""), text


def words(text: str) -> list[str]:
    """The words BM25 compares: lower case, no stop words, plural s taken off.

    Args:
        text: Any text.

    Returns:
        Its words; all of them if it has nothing but stop words.
    """
    found = [word.lower() for word in _WORD.findall(text)]
    kept = [word for word in found if word not in _STOP_WORDS] or found
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in kept]
