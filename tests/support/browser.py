"""A real browser, run inside a network namespace, and the page that it visits."""

import logging
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from tests.support import without_netlink
from tests.support.netns import Namespace

PATIENCE = 60_000.0
"""Milliseconds to wait for a condition on a busy host."""
_FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking", "--no-first-run")


@contextmanager
def browser_in(namespace: Namespace, folder: Path, *flags: str) -> Iterator[Browser]:
    """Debian's chromium, running inside the namespace. It does not notice that addresses and devices there come and go."""
    found = shutil.which("chromium")
    assert found is not None, "the tests of the page need Debian's chromium: make needs"
    program = folder / "chromium"
    without = [sys.executable, without_netlink.__file__]
    if said := namespace.run([*without, "true"]):
        logging.getLogger(__name__).warning("pages may fail with ERR_NETWORK_CHANGED: %s", said)
    command = ["ip", "netns", "exec", namespace.name, *without, found]
    program.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
    program.chmod(0o755)
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*_FLAGS, *flags], timeout=PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def visitor(browser: Browser, base: str, **options: object) -> Iterator[Page]:
    """A page in a new profile. The test fails if the page's script fails or violates its Content Security Policy."""
    context: BrowserContext = browser.new_context(base_url=base, **options)  # type: ignore[arg-type]
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if "Content Security Policy" in message.text else None)
    page.on(
        "request", lambda request: wrong.append(request.url) if not request.url.startswith((base, "data:", "blob:")) else None
    )
    try:
        yield page
    finally:
        context.close()
    assert not wrong, wrong


def sign_in(page: Page, key: str) -> None:
    page.goto("/sign-in")
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Overview")


def faults_of(page: Page) -> list[str]:
    """The violations that axe rates serious or critical."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {node['html'][:200]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def picture(page: Page, name: str) -> None:
    """Save a screenshot for the documentation, if SIDEROLINK_PICTURES names a folder."""
    if folder := os.environ.get("SIDEROLINK_PICTURES"):
        page.screenshot(path=Path(folder) / f"{name}.png")
