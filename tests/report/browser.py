"""A page in a headless Chromium, of Playwright or of the system."""

import shutil
from contextlib import contextmanager

import pytest

SIZES = (320, 360, 768, 1440)


@contextmanager
def chromium():
    """A browser; skips the test, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev)")
    with playwright.sync_playwright() as started:
        kind = started.chromium
        try:
            browser = kind.launch(
                executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium runs here (apt-get install chromium, or playwright install chromium): {str(error)[:80]}")
        yield browser
        browser.close()


@contextmanager
def opened(browser, file, width=1440, scheme="light"):
    """A page whose charts are drawn; ``said`` lists its console's messages and errors, ``asked`` its requests."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-drawn]", state="attached", timeout=120_000)
    yield page
    context.close()
