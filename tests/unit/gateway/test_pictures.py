"""Pictures in a request: which are taken, and with which words the others are refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from serve_app.config import LimitsConfig
from serve_app.errors import InvalidRequest
from serve_app.gateway.chat.chat_call import to_chat_call
from serve_app.gateway.chat.parsing import parse_json, validate
from serve_app.gateway.chat.wire import ChatRequest
from serve_app.schemas import ChatCall
from tests.pictures import asking, gif_with_large_frame, part, picture, png_header, url

LIMITS = LimitsConfig(max_picture_bytes=4096, max_picture_pixels=1000, max_pictures=2)
URL = "messages[0].content[1].image_url.url"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://127.0.0.1/x"/></svg>'


def read(*messages: dict[str, Any], limits: LimitsConfig = LIMITS) -> ChatCall:
    body = json.dumps({"model": "atlas", "messages": messages}).encode()
    request = validate(ChatRequest, parse_json(body, limits.max_json_depth))
    return to_chat_call(request, request_id="req_1", owner="me", default_alpha=0.1, limits=limits)


def with_url(text: str) -> dict[str, Any]:
    return asking({"type": "image_url", "image_url": {"url": text}})


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (picture("png"), "png"),
        (picture("jpeg"), "jpeg"),
        (picture("jpeg", progressive=True), "jpg"),
        (picture("webp"), "webp"),
        (picture("webp", lossless=True), "webp"),
        (picture("webp", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"), "webp"),
        (picture("gif"), "gif"),
        (picture("png") + b"\0" * 9, "png"),
    ],
    ids=["png", "jpeg", "progressive", "webp", "lossless", "extended", "gif", "with a tail"],
)
def test_a_picture_reaches_the_engine_as_it_came(data: bytes, kind: str) -> None:
    message = asking(part(data, kind, detail="high"))
    assert read(message).messages == (message,)


def test_the_query_is_the_text_beside_the_pictures() -> None:
    assert read(asking(text="What is this?")).query == "What is this?"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_the_size_of_a_picture_is_read_from_its_header(kind: str) -> None:
    with pytest.raises(InvalidRequest, match="got 40 x 26"):
        read(asking(part(picture(kind, (40, 26)), kind)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://example.com/cat.png", "nothing is fetched"),
        ("http://169.254.169.254/latest", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("", "nothing is fetched"),
        (url(SVG, "svg+xml"), "no other type"),
        (url(picture("bmp"), "bmp"), "no other type"),
        ("data:text/html;base64,PGI+", "no other type"),
        ("data:image/png,abc", "as data:image/png;base64"),
        ("data:image/png;base64,abc!", "not base64"),
        ("data:image/png;base64,äöü=", "not base64"),
        ("data:image/png;base64," + "QUJD" * 2 + "\n", "not base64"),
        ("data:image/png;base64,", "no whole png"),
        (url(SVG), "no whole png"),
        (url(picture("jpeg")), "no whole png"),
        (url(picture("png")[:-4]), "no whole png"),
        (url(picture("png")[:20]), "no whole png"),
        (url(picture("jpeg")[:-2], "jpeg"), "no whole jpeg"),
        (url(picture("jpeg")[:30] + b"\xff\xd9", "jpeg"), "no whole jpeg"),
        (url(b"\xff\xd8" + b"\xff\xe0\0\2" * 1020 + b"\xff\xd9", "jpeg"), "no whole jpeg"),
        (url(picture("webp")[:-1], "webp"), "no whole webp"),
        (url(picture("webp")[:10], "webp"), "no whole webp"),
        (url(picture("gif")[:-1], "gif"), "no whole gif"),
        (url(picture("gif")[:12] + b";", "gif"), "no whole gif"),
        (url(b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * 2000 + b"\0;", "gif"), "no whole gif"),
        (url(png_header(60_000, 60_000)), "1 to 1000 pixels here, got 60000 x 60000"),
        (url(png_header(0, 7)), "1 to 1000 pixels here, got 0 x 7"),
        (url(gif_with_large_frame(65_535, 65_535), "gif"), "got 65535 x 65535"),
        (url(b"\0" * 4097), "at most 4096 bytes here, got 4097"),
        (url(b"\0" * 9000), "at most 4096 bytes"),
    ],
)
def test_what_is_no_picture_is_refused_at_its_field(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(with_url(text))
    assert (caught.value.param, caught.value.status_code) == (URL, 400)
    assert says in caught.value.message


def test_a_refusal_repeats_nothing_of_the_url() -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(with_url("https://user:secret@example.com/cat.png"))
    assert "secret" not in caught.value.message


def test_pictures_are_counted_over_all_messages() -> None:
    with pytest.raises(InvalidRequest, match="at most 2 pictures in all, got 3"):
        read(asking(part(), part()), asking())


@pytest.mark.parametrize("role", ["system", "developer", "assistant", "tool"])
def test_only_users_send_pictures(role: str) -> None:
    message = {**asking(), "role": role}
    if role == "tool":
        message["tool_call_id"] = "c"
    with pytest.raises(InvalidRequest) as caught:
        read(message)
    assert caught.value.param == "messages[0].content[1].type"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({"type": "input_audio", "input_audio": {}}, "messages[0].content[1].type"),
        ({"type": "image_url"}, "messages[0].content[1].image_url"),
        ({"type": "image_url", "image_url": "u"}, "messages[0].content[1].image_url"),
        ({"type": "image_url", "image_url": {"url": 5}}, URL),
        (part(detail="huge"), "messages[0].content[1].image_url.detail"),
    ],
    ids=["another kind", "nothing", "no object", "a number", "another detail"],
)
def test_a_wrong_part_is_named(content: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        read(asking(content))
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\xff\xd8" + b"\xff" * (3 << 20) + b"\xff\xd9", "jpeg"),
        (b"\xff\xd8" + b"\xff\xe0\0\2" * (3 << 18) + b"\xff\xd9", "jpeg"),
        (b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1a\0" * (1 << 19) + b";", "gif"),
        (b"GIF89a\1\0\1\0\0\0\0!\xfe" + b"\1a" * (1 << 20) + b";", "gif"),
    ],
    ids=["filling", "segments", "extensions", "blocks"],
)
def test_no_picture_takes_long_to_check(data: bytes, kind: str) -> None:
    message = asking(part(data, kind))
    began_s = time.thread_time()
    with pytest.raises(InvalidRequest, match="no whole"):
        read(message, limits=LimitsConfig())
    assert time.thread_time() - began_s < 2.0
