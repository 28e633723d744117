"""Retrieval: the right sentence first, whole source ids, and an index that survives its cache."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from numpy.typing import NDArray

from serve_app.config.tools import EncoderConfig, RetrievalConfig
from serve_app.errors import ToolFailed, ToolRetry
from serve_app.tools.builtin.corpus import read_corpus, split_sentences, words
from serve_app.tools.builtin.retrieval import (
    NO_SOURCES,
    PROBE,
    Index,
    Retrieval,
    SharedEncoder,
    query_line,
    with_question,
)

DOCUMENTS = [
    {
        "id": "paris",
        "title": "Paris",
        "text": "Paris is the capital of France. It lies on the Seine. Dr. Smith lived there.",
    },
    {"id": "rome", "text": "Rome is the capital of Italy. The Tiber flows through it."},
    {"id": "quern", "text": "Tavo Quern was born in Maldor in 1931. He invented the wind loom."},
    {"id": "cats", "text": "Cats sleep for most of the day. Kittens sleep even longer."},
]

CONCEPTS = {"automobile": "car", "car": "car", "vehicle": "car", "feline": "cat", "cat": "cat"}


class ConceptEncoder:
    """A bag of concepts: words of the same meaning fall on the same axis; counts its calls."""

    axes: ClassVar[dict[str, int]] = {}

    def __init__(self, config: EncoderConfig, cache_dir: Path) -> None:
        self.encoded: list[str] = []

    def encode(self, texts: list[str]) -> NDArray[np.float32]:
        self.encoded += texts
        vectors = np.zeros((len(texts), 256), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in words(text):
                concept = CONCEPTS.get(word, word)
                vectors[row, self.axes.setdefault(concept, len(self.axes))] += 1
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit: NDArray[np.float32] = np.divide(vectors, norms, out=vectors, where=norms > 0)
        return unit


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(document) for document in DOCUMENTS) + "\n")
    return path


def make_config(corpus: Path, **settings: Any) -> RetrievalConfig:
    return RetrievalConfig(
        tool_id="retrieval", corpus=corpus, cache_dir=corpus.parent / "cache", **settings
    )


def make_tool(corpus: Path, **settings: Any) -> Retrieval:
    return Retrieval(make_config(corpus, **settings), make_encoder=ConceptEncoder)


def sources(tool: Retrieval, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tool.run({"query": query}, 10).data["sources"]
    return found


def test_best_sentence_comes_first_with_its_source(corpus: Path) -> None:
    result = make_tool(corpus, top_k=2).run({"query": "What is the capital of Italy?"}, 10)
    assert result.text.splitlines()[0] == "[1] Rome is the capital of Italy."
    first = result.data["sources"][0]
    assert (first["id"], first["title"]) == ("rome#0", "rome")
    assert first["text"] == "Rome is the capital of Italy."
    assert len(result.data["sources"]) == 2
    assert len(result.text.splitlines()) == 3


def test_a_result_ends_with_what_was_looked_for_where_that_fits(corpus: Path) -> None:
    query = "What is the capital of Italy? " + 40 * "capital "
    result = make_tool(corpus, top_k=1).run({"query": query}, 10)
    assert result.text == f"[1] Rome is the capital of Italy.\nQuery: {query.strip()}"
    result = make_tool(corpus, top_k=1, max_result_chars=100).run({"query": query}, 10)
    assert result.text == "[1] Rome is the capital of Italy."


def test_context_puts_the_question_once_and_last() -> None:
    text = f"[1] Oslo is in Norway.{query_line('Where is Oslo?')}"
    expected = "Sources:\n[1] Oslo is in Norway.\n\nQuestion: Where is Oslo?"
    assert with_question(text, "Where is Oslo?") == expected


def test_scores_fall_and_are_reciprocal_ranks(corpus: Path) -> None:
    scores = [source["score"] for source in sources(make_tool(corpus, rrf_k=60), "capital")]
    assert scores == sorted(scores, reverse=True)
    assert 1 / 61 - 1e-6 <= scores[0] <= 2 / 61 + 1e-6


def test_meaning_finds_what_words_do_not(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    texts = ["The automobile broke down.", "The soup was hot.", "Rain fell all day."]
    path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)))
    assert sources(make_tool(path), "my car")[0]["id"] == "0#0"
    # Words alone do not know it: what the embedding adds is seen.
    by_words = Retrieval(make_config(path, encoder=None))
    assert by_words.run({"query": "my car"}, 10).text == NO_SOURCES


def test_title_helps_to_find_a_sentence(corpus: Path) -> None:
    found = sources(make_tool(corpus, encoder=None, top_k=3), "Paris Seine")
    assert found[0]["text"] == "It lies on the Seine."


def test_plural_and_case_do_not_matter(corpus: Path) -> None:
    assert sources(make_tool(corpus, encoder=None), "LOOMS")[0]["id"] == "quern#1"


def test_no_match_is_said(corpus: Path) -> None:
    result = Retrieval(make_config(corpus, encoder=None)).run({"query": "zyzzyva"}, 10)
    assert result.text == NO_SOURCES
    assert result.data == {"sources": []}


@pytest.mark.parametrize("query", ["", "   ", "?!", "\n"])
def test_query_without_words_asks_again(corpus: Path, query: str) -> None:
    with pytest.raises(ToolRetry, match="query is empty"):
        make_tool(corpus).run({"query": query}, 10)


def test_same_query_gives_the_same_answer(corpus: Path) -> None:
    first = make_tool(corpus).run({"query": "capital sleep"}, 10)
    assert make_tool(corpus).run({"query": "capital sleep"}, 10) == first


def test_folder_of_text_and_markdown_is_a_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.txt").write_text("The well is deep.\nIt is dry.")
    (folder / "deep" / "two.md").write_text(
        "# The Mill\n\nIt grinds rye.\n\n- Rye is dark.\n- Wheat is pale.\n"
    )
    (folder / "skipped.bin").write_bytes(b"\0")
    sentences = read_corpus(make_config(folder))
    assert [(s.source_id, s.title, s.text) for s in sentences] == [
        ("deep/two#0", "The Mill", "It grinds rye."),
        ("deep/two#1", "The Mill", "Rye is dark."),
        ("deep/two#2", "The Mill", "Wheat is pale."),
        ("one#0", "one", "The well is deep."),
        ("one#1", "one", "It is dry."),
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Smith met Mr. Jones. They ate.", ["Dr. Smith met Mr. Jones.", "They ate."]),
        ("J. R. Ewing left. Bye.", ["J. R. Ewing left.", "Bye."]),
        ("It costs 3.50 dollars. Cheap.", ["It costs 3.50 dollars.", "Cheap."]),
        ('He said "no." Then he left.', ['He said "no."', "Then he left."]),
        ("a line\nbroken here. Next", ["a line broken here.", "Next"]),
        ("First block\n\nSecond block", ["First block", "Second block"]),
        ("# Heading\nText here.", ["Heading", "Text here."]),
        ("", []),
        ("---\n***", []),
        ("x" * 10 + " " + "y" * 10, ["x" * 10, "y" * 10]),
        ("z" * 25, ["z" * 12, "z" * 12, "z"]),
    ],
)
def test_text_is_cut_into_sentences(text: str, expected: list[str]) -> None:
    limit = 12 if text[:1] in "xz" and text else 80
    assert list(split_sentences(text, limit)) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no sentences"),
        ("not json\n", "line 1"),
        ('{"id": 1}\n', "line 1"),
        ("[1]\n", "line 1"),
        ('{"id": 1, "text": "A b."}\n{"id": 1, "text": "C d."}\n', "repeats id '1'"),
    ],
)
def test_malformed_corpus_is_refused_without_its_path(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content)
    with pytest.raises(ToolFailed, match=re.escape(reason)) as caught:
        make_tool(path).warm()
    assert str(tmp_path) not in str(caught.value)


def test_missing_and_oversized_corpora_are_refused(corpus: Path) -> None:
    with pytest.raises(ToolFailed, match="does not exist"):
        make_tool(corpus.with_name("absent")).warm()
    with pytest.raises(ToolFailed, match="more than 10"):
        make_tool(corpus, max_corpus_bytes=10).warm()


class TestCache:
    """The second process finds the embeddings; damage is noticed; a new corpus is a new index."""

    def encoder_of(self, tool: Retrieval) -> ConceptEncoder:
        tool.warm()
        assert isinstance(tool._encoder, ConceptEncoder)
        return tool._encoder

    def test_second_time_nothing_is_encoded_again(self, corpus: Path) -> None:
        assert len(self.encoder_of(make_tool(corpus)).encoded) > 5
        assert self.encoder_of(make_tool(corpus)).encoded == [PROBE]

    @pytest.mark.parametrize("damage", [b"", b"garbage", None])
    def test_damaged_cache_is_built_anew(self, corpus: Path, damage: bytes | None) -> None:
        answer = make_tool(corpus).run({"query": "capital of Italy"}, 10)
        (file,) = (corpus.parent / "cache").iterdir()
        whole = file.read_bytes()
        if damage is None:
            middle = len(whole) // 2
            damage = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
        file.write_bytes(damage)
        tool = make_tool(corpus)
        assert len(self.encoder_of(tool).encoded) > 5
        assert tool.run({"query": "capital of Italy"}, 10) == answer
        assert self.encoder_of(make_tool(corpus)).encoded == [PROBE]

    def test_changed_corpus_is_another_index(self, corpus: Path) -> None:
        make_tool(corpus).warm()
        with corpus.open("a") as out:
            out.write(json.dumps({"id": "new", "text": "Oslo is the capital of Norway."}) + "\n")
        tool = make_tool(corpus)
        assert len(self.encoder_of(tool).encoded) > 5
        assert sources(tool, "capital of Norway")[0]["id"] == "new#0"
        assert len(list((corpus.parent / "cache").iterdir())) == 2

    def test_folder_that_cannot_be_written_is_no_obstacle(self, corpus: Path) -> None:
        (corpus.parent / "cache").write_text("a file where the folder should be")
        assert sources(make_tool(corpus), "capital of Italy")[0]["id"] == "rome#0"


def test_encoder_that_cannot_be_loaded_fails_for_good(corpus: Path) -> None:
    def broken(config: EncoderConfig, cache_dir: Path) -> ConceptEncoder:
        raise OSError("/secret/path/weights not found")

    tool = Retrieval(make_config(corpus), make_encoder=broken)
    with pytest.raises(ToolFailed, match="cannot be loaded") as caught:
        tool.warm()
    assert "secret" not in str(caught.value)


def test_index_ties_go_to_the_earlier_sentence(corpus: Path) -> None:
    sentences = read_corpus(make_config(corpus))
    index = Index([sentences[0], sentences[0]], None)
    found = index.search("France", None, make_config(corpus, encoder=None))
    assert [sentence for sentence, _, _ in found] == [sentences[0], sentences[0]]


def test_real_encoder_ranks_by_meaning(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    texts = ["The automobile would not start.", "Bread is baked in an oven.", "It rained in May."]
    path.write_text("\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(texts)))
    tool = Retrieval(make_config(path, min_similarity=0.2, encoder={"batch_size": 2}))
    assert sources(tool, "car trouble")[0]["id"] == "0#0"
    encoder = tool._encoder
    assert isinstance(encoder, SharedEncoder)
    vectors = encoder.encode(["a", "b"])
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_query_that_is_no_text_asks_again(corpus: Path) -> None:
    with pytest.raises(ToolRetry, match="not valid text"):
        Retrieval(make_config(corpus)).run({"query": "capital \ud800"}, 30)


def test_model_that_is_not_there_fails_for_good(corpus: Path) -> None:
    tool = Retrieval(make_config(corpus, encoder={"model": "./absent"}))
    with pytest.raises(ToolFailed, match="cannot be loaded"):
        tool.warm()


def test_a_corpus_does_not_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder, outside = tmp_path / "corpus", tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.txt").write_text("The secret is out.")
    (folder / "inner" / "a.txt").write_text("This is inside.")
    (folder / "same.txt").symlink_to(folder / "inner" / "a.txt")
    (folder / "folder").symlink_to(outside)
    config = RetrievalConfig(tool_id="docs", corpus=folder)
    assert {s.text for s in read_corpus(config)} == {"This is inside."}
    (folder / "leak.txt").symlink_to(outside / "secret.txt")
    with pytest.raises(ToolFailed, match=r"the link 'leak\.txt' of the corpus leads out of it"):
        read_corpus(config)


def test_the_whole_disk_is_no_corpus() -> None:
    with pytest.raises(ToolFailed, match=r"another file system|more than 100000 files"):
        read_corpus(RetrievalConfig(tool_id="docs", corpus=Path("/")))
