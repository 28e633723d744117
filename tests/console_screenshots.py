"""Make the pictures of `docs/observability.md`.

How to run: `python -m tests.console_screenshots docs/console`. A gateway with the tests' own store
is shown in Chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.browser import chromium
from tests.console_data import fill
from tests.console_learned import TRAINING
from tests.gateway_fakes import running_gateway

MAX_BYTES = 100_000


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory() as data,
        running_gateway(Path(data)) as gateway,
        chromium(Path(data)) as browser,
    ):
        gateway.launcher.running.add(TRAINING)
        gateway.run(
            lambda: fill(gateway.store, gateway.outcomes, gateway.config, count=400, hours=23.0)
        )
        pages = {
            "overview": ("/console", 1100, 860, "light"),
            "request": ("", 1100, 820, "light"),
            "routing": ("/console/routing?cluster=1#cluster", 1100, 720, "light"),
            "policies": ("/console/policies#evaluation", 1100, 640, "dark"),
            "spend": ("/console/spend", 1100, 700, "light"),
            "ask": ("/console/ask", 1100, 640, "light"),
        }
        for name, (path, width, height, scheme) in pages.items():
            browser.show(width, height, scheme=scheme)
            if name == "request":
                browser.go(f"{gateway.url}/console/requests?status=answered")
                path = browser.evaluate(
                    "document.querySelector('#live tbody a').getAttribute('href')"
                )
            browser.go(gateway.url + path)
            browser.wait_for("!document.querySelector('[data-chart]:empty')")
            if name == "request":
                browser.click("#route-again button")
                browser.wait_for("document.querySelector('#decision table')")
                browser.evaluate("scrollTo(0, 0)")
            if name == "ask":
                browser.type("#question", "What is 6 times 7?")
                browser.click("#ask button:not([type])")
                browser.wait_for("!document.querySelector('#rating').hidden")
            picture = browser.picture()
            assert len(picture) < MAX_BYTES, (name, len(picture))
            (folder / f"{name}.png").write_bytes(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
