"""The tool that reads pictures: the real models on pictures of text."""

from __future__ import annotations

import pytest

from serve_app.config.tools import OcrConfig
from serve_app.errors import ToolFailed, ToolTimeout
from serve_app.tools.builtin.ocr import NO_TEXT, Ocr
from tests.pictures import picture, png_header, url, written

TEXT = "The Hobus Society was founded in 1921."


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return Ocr(OcrConfig(tool_id="ocr"))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_a_line_is_read_from_a_picture_of_each_type(ocr: Ocr, kind: str) -> None:
    read = ocr.run({"pictures": [url(written(TEXT, kind), kind)]}, 60)
    assert read.text == TEXT
    assert read.data["scores"][0][0] > 0.9


def test_lines_come_from_top_to_bottom_and_pictures_in_their_order(ocr: Ocr) -> None:
    pictures = [url(written("Total: 14 apples\nPrice: $3.50 each")), url(written("Thank you"))]
    read = ocr.run({"pictures": pictures}, 60)
    assert read.data["texts"] == ["Total: 14 apples\nPrice: $3.50 each", "Thank you"]
    assert read.text == "Total: 14 apples\nPrice: $3.50 each\n\nThank you"


def test_a_picture_without_text_says_so(ocr: Ocr) -> None:
    assert ocr.run({"pictures": [url(picture(size=(200, 100)))]}, 60).text == NO_TEXT


def test_a_long_text_is_cut_in_each_picture() -> None:
    small = Ocr(OcrConfig(tool_id="ocr", max_result_chars=64))
    read = small.run({"pictures": [url(written(TEXT)), url(written(TEXT))]}, 60)
    assert read.data["texts"] == [f"{TEXT[:32]} [cut]"] * 2
    assert len(read.text) <= 64


@pytest.mark.parametrize(
    "data", [png_header(40, 40), written(TEXT)[:200], b""], ids=["no pixels", "cut off", "empty"]
)
def test_a_picture_that_cannot_be_decoded_fails_without_a_word_of_the_decoder(
    ocr: Ocr, data: bytes
) -> None:
    with pytest.raises(ToolFailed, match=r"^a picture cannot be decoded$"):
        ocr.run({"pictures": [url(data)]}, 60)


def test_no_picture_is_begun_after_the_deadline(ocr: Ocr) -> None:
    with pytest.raises(ToolTimeout):
        ocr.run({"pictures": [url(written(TEXT))]}, 0)


def test_reports_hold_no_picture(ocr: Ocr) -> None:
    assert ocr.recorded({"pictures": [url(written(TEXT))]}) == {"pictures": 1}
