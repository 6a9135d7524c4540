"""A page in a headless Chromium: how long it takes to open, told by the page that holds it."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-sync", "--disable-background-networking", "--disable-component-update"),
    *("--disable-extensions", "--enable-logging=stderr"),
)
"""Flags that keep a browser from asking or calling anybody."""
OPENINGS = 3
"""Of each page, in turn, so that a slow spell of the machine meets all of them."""

WATCH = """<!DOCTYPE html><meta charset="utf-8">
<iframe id="frame" width="1200" height="900"></iframe>
<script>
const frame = document.getElementById("frame");
const pages = PAGES.map((address) => ({ address, seconds: [] }));
let turn = 0;
function open() {
  const page = pages[turn % pages.length];
  const began = performance.now();
  frame.src = page.address + "?" + turn;
  const timer = setInterval(() => {
    const inside = frame.contentDocument;
    if (!inside || inside.readyState !== "complete" || inside.URL === "about:blank") return;
    const places = [...inside.querySelectorAll("[data-chart]")];
    if (!inside.URL.endsWith("?" + turn)) return;
    if (!places.length || places.some((place) => !place.querySelector("svg"))) return;
    clearInterval(timer);
    page.seconds.push((performance.now() - began) / 1000);
    page.charts = places.length;
    page.rows = inside.querySelectorAll("tbody tr").length;
    turn += 1;
    if (turn < OPENINGS * pages.length) return open();
    fetch("/told", { method: "POST", body: JSON.stringify(pages) });
  }, 10);
}
open();
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    """Serves a folder and keeps what the page tells."""

    def __init__(self, *args: Any, told: list[Any], heard: threading.Event, **more: Any) -> None:
        self.told, self.heard = told, heard
        super().__init__(*args, **more)

    def do_POST(self) -> None:
        self.told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.heard.set()
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def opened(*pages: Path, profile: Path) -> list[dict[str, Any]]:
    """Open pages in turn, several times each, until all their charts are drawn.

    Args:
        pages: HTML files with `data-chart` places.
        profile: A folder for the browser and for copies of the pages.

    Returns:
        Of each page: `seconds` of each opening, the number of `charts` and of table `rows`.
    """
    assert CHROMIUM is not None
    site = profile / "site"
    site.mkdir(parents=True)
    names = [shutil.copy(page, site / f"{number}.html").name for number, page in enumerate(pages)]
    watch = WATCH.replace("PAGES", json.dumps(names)).replace("OPENINGS", str(OPENINGS))
    (site / "watch.html").write_text(watch)
    told: list[Any] = []
    heard = threading.Event()
    handler = partial(_Handler, directory=str(site), told=told, heard=heard)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/watch.html"
        only = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        # A debugging port keeps the browser open; without one it ends when the page has loaded.
        stay = "--remote-debugging-port=0"
        command = [CHROMIUM, *QUIET, only, stay, f"--user-data-dir={profile / 'browser'}", address]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as browser:
            try:
                assert heard.wait(240), "a page did not draw its charts"
            finally:
                browser.terminate()
                said = browser.communicate(timeout=60)[1]
                server.shutdown()
    assert [line for line in said.splitlines() if "CONSOLE" in line] == []
    return told[0]
