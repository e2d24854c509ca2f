"""Checks the built site: links, anchors, public names; in a browser accessibility, layout, requests, search.

    python docs/check_site.py site
    python docs/check_site.py site --pages index.html --screenshots pictures

The browser is the machine's Chromium, of the package `chromium` in Debian.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from shutil import which
from typing import Any, Literal
from urllib.parse import unquote, urljoin, urlsplit

from site_hooks import public_modules

SIZES = {"phone": (390, 844), "desktop": (1280, 900)}
PALETTES: list[Literal["light", "dark"]] = ["light", "dark"]
SEARCHES = {
    "window": ["window-semantics"],
    "sink": ["window-semantics", "reference/longshort"],
    "QK-clip": ["stability", "how-to-spikes", "huggingface"],
}
"""Words, and the pages of which one comes first."""
AXE_OPTIONS = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}


class Page(HTMLParser):
    """The anchors, links and pictures of a page.

    Attributes:
        ids: its anchors.
        links: where its links lead.
        resources: what is loaded to show it.
        without_alt: sources of pictures that have no text.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.without_alt: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update(given[name] for name in ("id", "name") if name in given)
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if "src" in given:
            self.resources.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.resources.append(given["href"])
        if tag == "img" and not given.get("alt"):
            self.without_alt.append(given.get("src", "")[:80])


def check_files(site: Path) -> Iterator[str]:
    """Yield what is wrong with links, pictures and names, without a browser."""
    pages = {file.relative_to(site).as_posix(): Page(file.read_text()) for file in site.rglob("*.html")}
    for name, page in pages.items():
        yield from (f"{name}: a picture has no text: {source}" for source in page.without_alt)
        for link in [*page.links, *page.resources]:
            target = urlsplit(urljoin(f"http://site/{name}", link))
            if target.netloc != "site":
                if link in page.resources and target.scheme != "data":
                    yield f"{name}: loads from elsewhere: {link}"
                continue
            if name == "404.html":  # its links begin at the root of the site, wherever that is
                continue
            path = unquote(target.path).lstrip("/")
            file = f"{path}index.html" if path.endswith("/") or not path else path
            if not (site / file).is_file():
                yield f"{name}: leads nowhere: {link}"
            elif target.fragment and file in pages and unquote(target.fragment) not in pages[file].ids:
                yield f"{name}: has no such anchor: {link}"
    anchors = {anchor for page in pages.values() for anchor in page.ids if anchor.startswith("longshort.")}
    for module in public_modules():
        for name in import_module(module).__all__:
            if not {f"{module}.{name}", f"{module}.{name}.{name}"} & anchors:
                yield f"reference: does not show {module}.{name}"


def check_in_browser(site: Path, names: list[str], screenshots: Path | None) -> Iterator[str]:
    """Yield what is wrong with pages in a browser, in each size and palette, and with the search."""
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with serve(site) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=which("chromium"), args=["--no-sandbox"])
        for (size, (width, height)), palette in itertools.product(SIZES.items(), PALETTES):
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=palette, reduced_motion="reduce"
            )
            page = context.new_page()
            requests: list[str] = []
            errors: list[str] = []
            page.on("request", lambda request, seen=requests: seen.append(request.url))
            page.on("pageerror", lambda error, seen=errors: seen.append(f"error in a script: {error}"))
            for name in names:
                page.goto(f"{address}/{name}", wait_until="load")
                found = check_shown(page) + errors
                found += [
                    f"asks {url}" for url in requests if not url.startswith((address, "data:", "blob:"))
                ]
                yield from (f"{name} ({size}, {palette}): {problem}" for problem in found)
                requests.clear()
                errors.clear()
                if screenshots is not None:
                    file = f"{name.removesuffix('.html').replace('/', '-')}-{size}-{palette}.png"
                    page.screenshot(path=screenshots / file)
            context.close()
        yield from check_search(browser.new_page(), address)
        browser.close()


def check_shown(page: Any) -> list[str]:
    """Check the page that the browser shows: nothing wider than the screen, and the rules of axe-core."""
    from axe_playwright_python.sync_playwright import Axe  # pyright: ignore[reportMissingImports]

    found = []
    width, screen = page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    if width > screen:
        found.append(f"is {width} pixels wide on a screen of {screen}")
    for violation in Axe().run(page, options=AXE_OPTIONS).response["violations"]:
        nodes = violation["nodes"]
        example = " ".join(f"{nodes[0]['html'][:200]} {nodes[0]['failureSummary']}".split())
        found.append(f"{violation['id']}, {len(nodes)} times: {example}")
    return found


def check_search(page: Any, address: str) -> Iterator[str]:
    """Yield which words do not find their pages."""
    page.goto(f"{address}/")
    for words, expected in SEARCHES.items():
        page.goto(f"{address}/?q={words}")
        first = page.locator(".md-search-result__link").first
        first.wait_for(state="attached", timeout=30_000)
        path = urlsplit(first.get_attribute("href")).path.strip("/")
        if path not in expected:
            yield f"search: {words!r} first finds {path}, not one of {expected}"


@contextlib.contextmanager
def serve(site: Path) -> Iterator[str]:
    """Serve the site while the context lasts, and give its address."""
    handler = functools.partial(_QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name of the base class
        pass


def main() -> int:
    """Print what is wrong; return 1 if anything is."""
    parser = argparse.ArgumentParser(description="Check the built site.")
    parser.add_argument("site", type=Path)
    parser.add_argument("--pages", nargs="+", help="pages to show in the browser; the default is all")
    parser.add_argument("--screenshots", type=Path, help="an existing folder for pictures")
    arguments = parser.parse_args()
    if not (arguments.site / "index.html").is_file():
        parser.error(f"site must be a built site, got {arguments.site}; `make docs` builds one")
    all_pages = sorted(file.relative_to(arguments.site).as_posix() for file in arguments.site.rglob("*.html"))
    pages = arguments.pages or all_pages
    count = 0
    for problem in check_files(arguments.site):
        count += 1
        print(problem, flush=True)
    for problem in check_in_browser(arguments.site, pages, arguments.screenshots):
        count += 1
        print(problem, flush=True)
    print(f"{len(all_pages)} pages, {len(pages)} of them in a browser: {count} problems")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
