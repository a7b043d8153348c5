"""A browser for many pages, opened from disk with no network, that outlives its hanging."""

from collections.abc import Callable
from typing import TypeVar

from budgets import WINDOW
from playwright.sync_api import Browser, BrowserContext, Error, Page

from conftest import ARGUMENTS, answered_within, chromium

LOCAL = ("file:", "data:", "blob:", "about:")
SLOW = 20_000  # milliseconds
Found = TypeVar("Found")


class Window:
    """A browser without a network, started again where it has hung, as one in some ten thousand pages makes it.

    Reduced motion, so that no colour is measured half-way through a fade.
    """

    def __init__(self, browser: Browser) -> None:
        self.browser, self.context = browser, self.opened_by(browser)

    @staticmethod
    def opened_by(browser: Browser) -> BrowserContext:
        context = browser.new_context(offline=True, viewport=WINDOW, reduced_motion="reduce", color_scheme="light")
        context.set_default_timeout(SLOW)
        context.route(lambda url: not url.startswith(LOCAL), lambda route: route.abort())
        return context

    def running(self) -> Browser:
        """The browser, a new one where it has ended."""
        if not self.browser.is_connected():
            self.browser = self.browser.browser_type.launch(executable_path=chromium(), args=ARGUMENTS)
            self.context = self.opened_by(self.browser)
        return self.browser

    def new_page(self) -> Page:
        self.running()
        return self.context.new_page()

    def within(self, seconds: float, work: Callable[[], Found]) -> Found | None:
        """What the work gives, or None where the browser had to be ended for it."""
        try:
            with answered_within(seconds):
                return work()
        except Error:
            if self.browser.is_connected():
                raise
            return None
