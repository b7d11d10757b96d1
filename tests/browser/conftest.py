"""Fixtures: one Chromium a module, a page of its own for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Chromium, Page


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    """One that was told nothing."""
    with Chromium() as browser:
        yield browser


@pytest.fixture
def page(chromium: Chromium) -> Iterator[Page]:
    """A page that must end without an uncaught error or an unhandled rejection."""
    with chromium.page() as page:
        yield page
        assert page.errors == []
