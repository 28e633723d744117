"""The console over HTTP: who gets in, what pages hold, and that nothing in them runs."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest

from serve_app.gateway.console.assets import FOLDER
from serve_app.gateway.console.clusters import clusters_of
from serve_app.gateway.console.evaluations import pareto_chart
from serve_app.gateway.console.shaping import waterfall, wilson
from serve_app.gateway.console.spending import saving
from serve_app.schemas import SpanKind, SpanRecord
from serve_app.store import create_key, revoke_key
from serve_app.store.choices import Choices, ClusterChoices
from serve_app.store.traffic import ProfileMean, UsageTotals
from tests.console_data import fill
from tests.console_learned import EXAMPLES, PAIRS, REPORT
from tests.gateway_fakes import Loopback, eventually, running_gateway
from tests.router_data import make_snapshot

PAGES = (
    "/console",
    "/console/requests",
    "/console/routing",
    "/console/policies",
    "/console/pool",
    "/console/spend",
    "/console/ask",
)
PRICE = {"usd_per_1m_prompt_tokens": 1.0, "usd_per_1m_completion_tokens": 1.0}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Loopback, str]]:
    with running_gateway(tmp_path_factory.mktemp("open")) as gateway:
        yield gateway, gateway.run(lambda: fill(gateway.store, gateway.outcomes, gateway.config))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    folder = tmp_path_factory.mktemp("locked")
    with running_gateway(folder, auth={"mode": "required"}) as loopback:
        yield loopback


def make_key(gateway: Loopback, *scopes: str) -> tuple[str, str]:
    return gateway.run(lambda: create_key(gateway.store, "an operator", scopes))


def log_in(gateway: Loopback, key: str) -> httpx2.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx2.post(f"{gateway.url}/console/session", json={}, headers=headers, timeout=20)


def cookie_of(gateway: Loopback, key: str) -> dict[str, str]:
    header = log_in(gateway, key).headers["set-cookie"]
    return {"cookie": header.partition(";")[0]}


class Tags(HTMLParser):
    """Tags of a page with their attributes, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))


# Who gets in.


@pytest.mark.parametrize("path", PAGES)
def test_without_a_session_a_page_is_the_form_that_asks_for_a_key(
    locked: Loopback, path: str
) -> None:
    response = httpx2.get(locked.url + path)
    assert response.status_code == 401
    assert "<h1>Log in</h1>" in response.text


def test_a_session_opens_the_pages_and_the_api_and_its_cookie_is_not_the_key(
    locked: Loopback,
) -> None:
    _, key = make_key(locked, "admin", "chat")
    response = log_in(locked, key)
    assert response.status_code == 204
    header = response.headers["set-cookie"]
    assert key not in header
    assert re.fullmatch(
        r"atlas_session=[\w-]{43}; Path=/; Max-Age=43200; HttpOnly; SameSite=Strict", header
    )
    cookie = cookie_of(locked, key)
    for path in (*PAGES, "/v1/admin/models", "/v1/models"):
        assert httpx2.get(locked.url + path, headers=cookie).status_code == 200, path


def test_a_session_may_do_what_its_key_may(locked: Loopback) -> None:
    _, admin = make_key(locked, "admin")
    _, chat = make_key(locked, "chat")
    assert log_in(locked, chat).status_code == 403
    response = httpx2.get(f"{locked.url}/console/ask", headers=cookie_of(locked, admin))
    assert response.status_code == 403
    assert "lacks the scope" in response.text


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://127.0.0.1:1"])
def test_a_page_of_another_site_cannot_use_a_session(locked: Loopback, origin: str | None) -> None:
    _, key = make_key(locked, "admin", "chat")
    headers = cookie_of(locked, key) | ({} if origin is None else {"origin": origin})
    for method, path, body in (
        ("PATCH", "/v1/admin/models/small", PRICE),
        ("POST", "/v1/admin/jobs", {"kind": "fit"}),
        ("DELETE", "/v1/admin/models/small", None),
        ("POST", "/v1/route", {"model": "atlas", "messages": [{"role": "user", "content": "x"}]}),
    ):
        response = httpx2.request(method, locked.url + path, headers=headers, json=body)
        assert response.status_code == 403, (method, path)
        assert "page of this host" in response.text


def test_a_page_of_this_host_uses_the_session(locked: Loopback) -> None:
    _, key = make_key(locked, "admin")
    headers = cookie_of(locked, key) | {"origin": locked.url}
    response = httpx2.patch(f"{locked.url}/v1/admin/models/small", json=PRICE, headers=headers)
    assert response.status_code == 200


def test_a_key_that_is_sent_counts_whatever_the_cookie_says(locked: Loopback) -> None:
    _, admin = make_key(locked, "admin")
    headers = cookie_of(locked, admin) | {"authorization": "Bearer wrong"}
    assert httpx2.get(f"{locked.url}/v1/admin/models", headers=headers).status_code == 401


def test_a_session_begins_with_a_key_and_not_with_a_session(locked: Loopback) -> None:
    _, key = make_key(locked, "admin")
    headers = cookie_of(locked, key) | {"origin": locked.url}
    response = httpx2.post(f"{locked.url}/console/session", json={}, headers=headers)
    assert response.status_code == 401


def test_no_answer_with_a_cookie_is_kept(locked: Loopback) -> None:
    _, key = make_key(locked, "admin")
    headers = {"authorization": f"Bearer {key}", "idempotency-key": "again"}
    response = httpx2.post(f"{locked.url}/console/session", json={}, headers=headers)
    assert response.status_code == 400
    assert "set-cookie" not in response.headers


def test_after_logging_out_the_cookie_is_worth_nothing(locked: Loopback) -> None:
    _, key = make_key(locked, "admin")
    headers = cookie_of(locked, key) | {"origin": locked.url}
    response = httpx2.request("DELETE", f"{locked.url}/console/session", headers=headers)
    assert "Max-Age=0" in response.headers["set-cookie"]
    page = f"{locked.url}/console"
    assert eventually(lambda: httpx2.get(page, headers=headers).status_code == 401, 20)


def test_a_session_ends_with_its_key(locked: Loopback) -> None:
    key_id, key = make_key(locked, "admin")
    cookie = cookie_of(locked, key)
    locked.run(lambda: revoke_key(locked.store, key_id))
    page = f"{locked.url}/console"
    assert eventually(lambda: httpx2.get(page, headers=cookie).status_code == 401, 20)


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    with running_gateway(tmp_path, console=False) as gateway:
        for path in ("/", "/console", "/console/static/console.js"):
            assert httpx2.get(gateway.url + path).status_code == 404


def test_a_person_is_led_there_and_a_program_finds_nothing(
    filled: tuple[Loopback, str],
) -> None:
    gateway, _ = filled
    response = httpx2.get(f"{gateway.url}/", headers={"accept": "text/html,*/*"})
    assert (response.status_code, response.headers["location"]) == (303, "/console")
    assert httpx2.get(f"{gateway.url}/").status_code == 404


# What pages hold.


@pytest.mark.parametrize("path", [*PAGES, "/console/requests/{hostile}"])
def test_a_page_runs_no_code_but_our_files_and_escapes_what_others_wrote(
    filled: tuple[Loopback, str], path: str
) -> None:
    gateway, hostile = filled
    response = httpx2.get(gateway.url + path.format(hostile=hostile))
    assert response.status_code == 200
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "unsafe" not in policy
    assert response.headers["cache-control"] == "no-store"
    tags = Tags()
    tags.feed(response.text)
    assert {tag for tag, _ in tags.found} & {"img", "style", "iframe", "object"} == set()
    for tag, given in tags.found:
        assert [name for name in given if name == "style" or name.startswith("on")] == []
        for name in {"src", "href", "action", "hx-get", "data-path"} & set(given):
            assert given[name].startswith(("/", "#")), (tag, given)
        if tag == "script":
            assert given["src"].startswith("/console/static/")


def test_the_overview_sums_up_all_requests(filled: tuple[Loopback, str]) -> None:
    gateway, _ = filled
    text = httpx2.get(f"{gateway.url}/console").text
    assert "<dt>Requests</dt><dd>61</dd>" in text
    assert "policy 2" in text


def test_a_request_is_shown_with_its_spans(filled: tuple[Loopback, str]) -> None:
    gateway, hostile = filled
    text = httpx2.get(f"{gateway.url}/console/requests/{hostile}").text
    assert text.count("<rect") == 5
    assert "the engine said &lt;script&gt;" in text


def test_a_request_is_shown_with_the_profiles_questions_nearest_to_it(
    filled: tuple[Loopback, str],
) -> None:
    gateway, hostile = filled
    text = httpx2.get(f"{gateway.url}/console/requests/{hostile}").text
    shown = text.partition("<h2>Neighbours</h2>")[2].partition("<h2>Route again</h2>")[0]
    found = re.findall(r'<td class="number">([\d.]+)</td>', shown)
    assert len(found) == 5
    assert found[:3] == ["1.000"] * 3  # as many as there are of its topic
    assert shown.count("What is 17 times 23?") == 3
    assert "large@none <strong>1.00</strong>" in shown


def test_clusters_are_shown_with_questions_of_the_profile_alone(
    filled: tuple[Loopback, str],
) -> None:
    gateway, _ = filled
    text = httpx2.get(f"{gateway.url}/console/routing?cluster=1").text
    assert "<li>Who wrote Middlemarch?</li>" in text
    assert "Where does the Rhine end?" in text
    assert "What is 6 times 7?" not in text
    assert "Win rate in cluster 1" in text


def test_policies_are_shown_side_by_side_since_the_trials_began(
    filled: tuple[Loopback, str],
) -> None:
    gateway, _ = filled
    text = httpx2.get(f"{gateway.url}/console/policies").text
    shown = text.partition("<h2>Side by side</h2>")[2].partition("<h2>What served when</h2>")[0]
    rows = [re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", row)) for row in shown.split("<tr>")[2:5]]
    assert [row.split()[:2] for row in rows] == [["2", "serving"], ["3", "canary"], ["4", "shadow"]]
    assert rows[0].split()[2] == "55"
    assert rows[1].split()[3] == "6"
    assert rows[2].split()[2] == "21"


def test_the_queue_of_a_model_and_a_server_that_is_away_are_shown(
    filled: tuple[Loopback, str],
) -> None:
    gateway, _ = filled
    text = httpx2.get(f"{gateway.url}/console/pool").text
    (row,) = [one for one in text.split("<tr>") if ">small <" in one]
    assert '<td class="number">7</td>' in row


def test_limits_are_shown_with_what_is_reserved_and_left(filled: tuple[Loopback, str]) -> None:
    gateway, _ = filled
    text = httpx2.get(f"{gateway.url}/console/spend").text
    shown = text.partition("<h2>Limits</h2>")[2].partition("<h2>By key</h2>")[0]
    rows = [re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", row)) for row in shown.split("<tr>")[2:]]
    assert "team blue dollars per day $2.00 $0 $0.500 $1.50" in rows[0]
    assert "team blue tokens per day 50,000 0 2,000 48,000" in rows[1]
    assert "<dt>Saved</dt>" in text


def test_requests_are_found_by_what_is_known_of_them(filled: tuple[Loopback, str]) -> None:
    gateway, _ = filled

    def found(query: str) -> int:
        text = httpx2.get(f"{gateway.url}/console/requests?{query}").text
        return len(set(re.findall(r"/console/requests/(req_\w+)", text)))

    assert found("status=failed") == 4
    assert found("candidate=large@none&window=1h") == 10
    assert found("owner=nobody") == 0
    assert found("min_usd=0.0005") == 12
    assert found("path=policy&status=answered&owner=local") == 19


def test_the_list_goes_on_from_where_a_page_ended(filled: tuple[Loopback, str]) -> None:
    gateway, _ = filled
    seen: list[str] = []
    address: str | None = "/console/requests"
    while address is not None:
        text = httpx2.get(gateway.url + address).text
        seen += re.findall(r"/console/requests/(req_\w+)", text)
        after = re.search(r'class="button" href="([^"]+)"', text)
        address = None if after is None else after[1].replace("&amp;", "&")
    assert len(seen) == len(set(seen)) == 61


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/console/requests?min_usd=much", 400),
        ("/console/requests?before=x_y", 400),
        ("/console/requests?path=nowhere", 400),
        ("/console/requests?window=1y", 400),
        ("/console?window=1y", 400),
        ("/console/requests/req_0", 404),
        ("/console/routing?cluster=x", 400),
        ("/console/routing?cluster=77", 404),
        ("/console/policies?version=-1", 400),
        ("/console/policies?version=1", 404),
    ],
)
def test_what_cannot_be_shown_is_said_on_a_page(
    filled: tuple[Loopback, str], path: str, status: int
) -> None:
    gateway, _ = filled
    response = httpx2.get(gateway.url + path)
    assert response.status_code == status
    assert "<h1>This did not work</h1>" in response.text


def test_a_file_of_others_is_as_it_was_published() -> None:
    vendored = json.loads((FOLDER / "vendored.json").read_text())
    for name, of in vendored.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == of["sha256"], name
    assert {name.partition(".")[0] for name in vendored if name.endswith("LICENSE")} == {
        "htmx",
        "uPlot",
    }


# Shapes.


def test_an_interval_of_few_verdicts_is_wide_and_stays_in_its_range() -> None:
    few, many = wilson(3, 3), wilson(300, 300)
    assert few.high == many.high == 1.0
    assert few.low == pytest.approx(0.438, abs=0.001)
    assert many.low == pytest.approx(0.987, abs=0.001)


def test_spans_are_drawn_below_what_they_are_part_of() -> None:
    def span(span_id: int, above: int | None, began_s: float, took_s: float | None) -> SpanRecord:
        return SpanRecord(
            span_id, above, SpanKind.NODE, str(span_id), began_s, took_s, None, 0, 0, 0.0, {}
        )

    spans = [
        span(0, None, 0.0, 2.0),
        span(1, 0, 0.5, 0.5),
        span(2, 0, 1.0, None),
        span(3, 1, 0.5, 0),
    ]
    bars = waterfall(spans, 2.0)
    assert [(bar.span.span_id, bar.depth) for bar in bars] == [(0, 0), (1, 1), (3, 2), (2, 1)]
    assert [(bar.left, bar.width) for bar in bars] == [(0, 100), (25, 25), (25, 0.4), (50, 50)]


def test_the_curve_of_an_evaluation_has_every_price_once_and_the_pairs_apart() -> None:
    chart = pareto_chart(REPORT)
    assert chart is not None
    assert chart["times"] == sorted(set(chart["times"]))
    series = {one["label"]: one for one in chart["series"]}
    assert list(series) == ["candidate", "serving", "oracle", "random", "one pair alone"]
    assert [name for name, one in series.items() if one["is_scattered"]] == ["one pair alone"]
    alone = {
        x: y for x, y in zip(chart["times"], series["one pair alone"]["values"], strict=True) if y
    }
    assert alone == {0.0001: 0.66, 0.0006: 0.75}
    assert pareto_chart({"frontiers": {"candidate": [{"score": 1}]}}) is None
    assert pareto_chart({}) is None


def test_what_is_free_stands_left_of_what_costs_least() -> None:
    points = [{"cost_usd": 0.0, "score": 0.5}, {"cost_usd": 0.01, "score": 0.7}]
    chart = pareto_chart({"frontiers": {"candidate": points}})
    assert chart is not None
    assert chart["times"] == [0.001, 0.01]


def test_the_least_confident_cluster_comes_first_and_those_without_requests_last() -> None:
    def went(cluster: int | None, requests: int, confidence: float) -> ClusterChoices:
        choices = Choices(requests, 0, 0.0, 0.0, requests * confidence, 4, 3)
        return ClusterChoices(cluster, PAIRS[0], choices)

    snapshot = replace(make_snapshot(), pairs=PAIRS, examples=EXAMPLES)
    found = clusters_of(snapshot, [went(0, 5, 0.9), went(2, 3, 0.4), went(None, 2, 0.2)])
    assert [one.index for one in found] == [None, 2, 0, 1]
    assert [one.confidence for one in found] == pytest.approx([0.2, 0.4, 0.9, None])
    assert found[1].examples == EXAMPLES[2]
    best = found[2].candidates[0]
    assert (best.pair, best.requests) == (PAIRS[2], 0)
    assert best.fitted is not None
    assert best.fitted.low < best.fitted.middle < best.fitted.high <= 1
    assert best.evidence == pytest.approx(50)
    assert {one.is_best for one in found if one.index is None} == {None}
    (rated,) = [one for one in found[1].candidates if one.requests]
    assert rated.win_rate is not None
    assert (rated.verdicts, rated.win_rate.middle) == (4, 0.75)


def test_what_was_saved_is_scaled_by_the_prices_on_the_profile() -> None:
    means = {
        PAIRS[0]: ProfileMean(100, 0.6, 0.001),
        PAIRS[1]: ProfileMean(100, 0.8, 0.004),
        PAIRS[2]: ProfileMean(3, 1.0, 0.1),
    }
    used = [
        UsageTotals(str(PAIRS[0]), 30, 0, 0, 0, 0.06),
        UsageTotals(str(PAIRS[1]), 10, 0, 0, 0, 0.08),
        UsageTotals("pattern:vote@none", 5, 0, 0, 0, 9.0),
    ]
    found = saving(used, means, frozenset(PAIRS))
    assert found is not None
    assert (found.best, found.requests) == (PAIRS[1], 40)
    assert found.paid_usd == pytest.approx(0.14)
    assert found.at_best_usd == pytest.approx(0.14 * 40 * 0.004 / (30 * 0.001 + 10 * 0.004))
    assert found.score == pytest.approx(0.65)
    assert saving(used, {}, frozenset(PAIRS)) is None
    assert saving([], means, frozenset(PAIRS)) is None
