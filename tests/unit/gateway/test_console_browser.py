"""The console in a real browser: each page renders, and what it offers is done by clicking.

Needs Debian's `chromium`; the test of accessibility needs `npm ci --prefix tests/npm` too.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from serve_app.config import AtlasConfig, StoreConfig
from serve_app.jobs import do_job
from serve_app.store import create_key, list_policies, newest_pool, update_job
from tests.browser import Browser, chromium, needs_chromium
from tests.console_data import HOSTILE, fill
from tests.console_learned import TRAINING
from tests.gateway_fakes import Loopback, running_gateway

pytestmark = needs_chromium

AXE = Path(__file__).parents[2] / "npm/node_modules/axe-core/axe.min.js"
PAGES = {
    "Overview": "/console",
    "Requests": "/console/requests",
    "Request": "/console/requests/{hostile}",
    "Routing": "/console/routing",
    "Policies": "/console/policies",
    "Pool": "/console/pool",
    "Spend": "/console/spend",
    "Ask": "/console/ask",
}


@dataclass
class Site:
    """A gateway with a filled store, and a browser."""

    gateway: Loopback
    browser: Browser
    hostile: str

    def go(self, name: str) -> None:
        self.browser.go(self.gateway.url + PAGES[name].format(hostile=self.hostile))
        self.browser.wait_for("!document.querySelector('[data-chart]:empty')")

    def done(self, text: str) -> None:
        """Wait until the page says that something was done."""
        self.browser.wait_for(
            f"document.querySelector('#status').textContent === {json.dumps(text)}"
        )


class ThreadLauncher:
    """Does jobs in threads of this process."""

    def __init__(self, store_url: str) -> None:
        self._store = StoreConfig(url=store_url)
        self._threads: dict[str, threading.Thread] = {}

    def start(self, config: AtlasConfig, job_id: str) -> None:
        config = config.model_copy(update={"store": self._store})
        thread = threading.Thread(target=lambda: asyncio.run(do_job(config, job_id)))
        self._threads[job_id] = thread
        thread.start()

    def is_running(self, job_id: str) -> bool:
        return self._threads[job_id].is_alive()

    def stop(self, job_id: str) -> None:
        raise NotImplementedError


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("console")
    with running_gateway(folder) as gateway, chromium(folder) as browser:
        gateway.launcher.running.add(TRAINING)
        hostile = gateway.run(lambda: fill(gateway.store, gateway.outcomes, gateway.config))
        browser.show(1280, 900)
        yield Site(gateway, browser, hostile)


@pytest.mark.parametrize("name", PAGES)
def test_page_renders_without_a_complaint_and_asks_no_other_host(site: Site, name: str) -> None:
    site.go(name)
    assert site.browser.text("h1") == name
    assert site.browser.complaints == []
    assert [url for url in site.browser.asked if not url.startswith(site.gateway.url + "/")] == []


@pytest.mark.parametrize("name", PAGES)
def test_page_fits_a_narrow_dark_window(site: Site, name: str) -> None:
    site.browser.show(400, 800, scheme="dark")
    try:
        site.go(name)
        assert site.browser.evaluate("document.documentElement.scrollWidth") == 400
        assert site.browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(16, 21, 28)"
        )
        assert site.browser.complaints == []
    finally:
        site.browser.show(1280, 900)


@pytest.mark.skipif(not AXE.exists(), reason="`npm ci --prefix tests/npm` was not run")
@pytest.mark.parametrize("name", PAGES)
def test_page_has_no_serious_fault_of_accessibility(site: Site, name: str) -> None:
    site.go(name)
    site.browser.evaluate(AXE.read_text() + "; 0")
    try:
        for scheme in ("light", "dark"):
            site.browser.show(1280, 900, scheme=scheme)
            found = site.browser.evaluate(
                "axe.run().then(r => r.violations.filter(v => ['serious', 'critical'].includes("
                "v.impact)).map(v => v.id + ': ' + v.nodes.map(n => n.html).join(' ')))"
            )
            assert found == [], scheme
    finally:
        site.browser.show(1280, 900)


def test_what_a_caller_or_a_model_wrote_stays_text(site: Site) -> None:
    for name in ("Requests", "Request", "Pool"):
        site.go(name)
        assert (
            site.browser.evaluate("document.querySelectorAll('main script, main img').length") == 0
        )
    site.go("Ask")
    site.browser.type("#question", HOSTILE)
    site.browser.click("#ask button:not([type])")
    site.browser.wait_for("!document.querySelector('#rating').hidden")
    assert site.browser.text("#answer").strip() == HOSTILE
    assert site.browser.evaluate("document.querySelectorAll('main script, main img').length") == 0
    assert site.browser.complaints == []


def test_an_answer_streams_beside_its_explanation_and_is_rated(site: Site) -> None:
    site.go("Ask")
    site.browser.type("#question", "What is 6 times 7?")
    site.browser.click("#ask button:not([type])")
    site.browser.wait_for("!document.querySelector('#rating').hidden")
    assert "What is 6 times 7?" in site.browser.text("#answer")
    assert "large@none" in site.browser.text("#decision")
    site.browser.click("#rating button")
    site.done("The verdict is kept.")
    site.browser.click("#decision a")
    site.browser.wait_for("document.querySelector('.waterfall rect')")


def test_a_request_is_routed_again(site: Site) -> None:
    site.go("Request")
    site.browser.click("#route-again button")
    site.browser.wait_for("document.querySelectorAll('#decision .interval').length === 2")
    assert "95% interval" in site.browser.text("#decision")


def test_requests_are_filtered_without_a_reload(site: Site) -> None:
    site.go("Requests")
    site.browser.evaluate("window.stays = true")
    site.browser.choose("#status", "failed")
    site.browser.wait_for("location.search.includes('status=failed')")
    rows = site.browser.wait_for(
        "[...document.querySelectorAll('#live tbody tr td:last-child')].map(e => e.innerText)"
    )
    assert set(rows) == {"failed"}
    assert site.browser.evaluate("window.stays") is True


def test_a_cluster_is_looked_at_by_clicking(site: Site) -> None:
    site.go("Routing")
    site.browser.click("a[href*='cluster=2']")
    site.browser.wait_for("document.querySelector('#cluster')?.innerText.endsWith('cluster 2')")
    assert "Write a haiku about rain." in site.browser.text()
    assert site.browser.evaluate("document.querySelectorAll('tr.chosen').length") == 1
    assert site.browser.complaints == []


def test_an_evaluation_and_a_training_are_drawn(site: Site) -> None:
    site.go("Policies")
    assert site.browser.evaluate("document.querySelectorAll('.uplot canvas').length") == 2
    legends = site.browser.evaluate(
        "[...document.querySelectorAll('.u-legend')].map(e => e.innerText)"
    )
    assert "iteration" in legends[0]
    assert "utility on questions apart" in legends[0]
    assert "dollars a question" in legends[1]
    for name in ("candidate", "serving", "oracle", "one pair alone"):
        assert name in legends[1]
    assert site.browser.complaints == []


def test_the_curve_of_a_training_grows_while_one_looks(site: Site) -> None:
    site.go("Policies")
    curve = [{"iteration": n, "mean_return": -0.1 * n, "utility": None} for n in range(1, 31)]
    progress = {"done": 30, "total": 60, "phase": "training", "curve": curve}
    site.gateway.run(lambda: update_job(site.gateway.store, TRAINING, progress=progress))
    site.browser.wait_for(
        "JSON.parse(document.querySelector('[data-chart]').dataset.chart).times.length === 30"
        " && document.querySelector('[data-chart] canvas')"
    )
    assert site.browser.complaints == []


def test_a_price_is_set_by_clicking(site: Site) -> None:
    site.go("Pool")
    site.browser.choose("#price-model", "large")
    site.browser.type("#price-in", "3.5")
    site.browser.type("#price-out", "7")
    site.browser.click("form[data-method=PATCH] button")
    site.done("The price is set.")
    pool = site.gateway.run(lambda: newest_pool(site.gateway.store))
    assert pool is not None
    prices = {model["model_id"]: model["price"] for model in pool.models}
    assert prices["large"] == {
        "usd_per_1m_prompt_tokens": 3.5,
        "usd_per_1m_completion_tokens": 7.0,
        "usd_per_1m_cached_prompt_tokens": None,
    }


def test_a_model_is_removed_and_a_refusal_is_shown(site: Site) -> None:
    site.go("Pool")
    site.browser.choose("#remove-model", "broken")
    site.browser.click("form[data-path='/v1/admin/models/{name}'] button")
    site.done("The model is being removed.")
    pool = site.gateway.run(lambda: newest_pool(site.gateway.store))
    assert pool is not None
    assert "broken" not in {model["model_id"] for model in pool.models}
    site.browser.choose("#remove-model", "broken")
    site.browser.click("form[data-path='/v1/admin/models/{name}'] button")
    site.browser.wait_for("document.querySelector('#status').className === 'error'")
    assert "broken" in site.browser.text("#status")


def test_the_console_is_used_with_the_keyboard_alone(site: Site) -> None:
    site.go("Overview")
    site.browser.press("Tab", 9)
    assert site.browser.evaluate("document.activeElement.className") == "skip"
    for _ in range(3):
        site.browser.press("Tab", 9)
    assert site.browser.evaluate("document.activeElement.innerText") == "Routing"
    site.browser.press("Enter", 13)
    site.browser.wait_for("document.querySelector('h1').innerText === 'Routing'")


def test_a_policy_is_promoted_by_clicking(tmp_path: Path) -> None:
    url = f"sqlite+aiosqlite:///{tmp_path / 'atlas.db'}"
    launcher = ThreadLauncher(url)
    with (
        running_gateway(tmp_path, url, launcher=launcher) as gateway,
        chromium(tmp_path) as browser,
    ):
        browser.show(1280, 900)
        browser.go(f"{gateway.url}/console/policies")
        assert "Nothing was promoted yet" in browser.text("#live")
        browser.choose("#candidate", "cold-start")
        browser.click("input[name=force]")
        browser.click("form[data-kind=promote] button")
        browser.wait_for("document.querySelector('#live').innerText.includes('succeeded')")
        assert "forced: " in browser.text("#live")
        policies = gateway.run(lambda: list_policies(gateway.store))
        assert [(policy.policy_version, policy.snapshot_id) for policy in policies] == [(1, None)]


def test_a_browser_logs_in_and_out_and_never_sees_the_cookie(tmp_path: Path) -> None:
    with (
        running_gateway(tmp_path, auth={"mode": "required"}) as gateway,
        chromium(tmp_path) as browser,
    ):
        scopes = ["admin", "chat", "feedback"]
        _, key = gateway.run(lambda: create_key(gateway.store, "an operator", scopes))
        browser.show(1280, 900)
        browser.go(f"{gateway.url}/console/pool")
        assert browser.text("h1") == "Log in"
        browser.type("#key", key)
        browser.press("Enter", 13)
        browser.wait_for("document.querySelector('h1').innerText === 'Pool'")
        assert browser.evaluate("document.cookie") == ""
        browser.choose("#price-model", "small")
        browser.type("#price-in", "1")
        browser.type("#price-out", "1")
        browser.click("form[data-method=PATCH] button")
        browser.wait_for("document.querySelector('#status').textContent === 'The price is set.'")
        browser.click("#log-out")
        browser.wait_for("document.querySelector('h1').innerText === 'Log in'")
