"""Does a page that hangs cost one browser, and not the run?"""

import pytest
from playwright.sync_api import Browser, Error
from window import Window

from conftest import ARGUMENTS, chromium

HANGS = "new Promise(() => {})"


def test_where_a_page_hangs_the_browser_is_ended_and_the_next_page_has_a_new_one(browser: Browser) -> None:
    window = Window(browser)
    page = window.new_page()
    assert window.within(1, lambda: page.evaluate(HANGS)) is None
    assert not browser.is_connected()
    assert window.within(60, lambda: window.new_page().evaluate("6 * 7")) == 42
    assert window.browser.is_connected()


def test_an_error_of_a_page_that_answers_is_the_caller_s(browser: Browser) -> None:
    window = Window(browser.browser_type.launch(executable_path=chromium(), args=ARGUMENTS))
    page = window.new_page()
    with pytest.raises(Error, match="is not defined"):
        window.within(60, lambda: page.evaluate("nothing.of.this"))
    assert page.evaluate("6 * 7") == 42
