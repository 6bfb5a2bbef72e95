"""Fixtures that tests of pages share."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser

import pytest


class Reader(HTMLParser):
    """Collects the elements and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="session")
def read() -> Callable[[str], Reader]:
    """A function that parses a page: its elements with their attributes, in `tags`, and its `text`."""

    def parsed(document: str) -> Reader:
        reader = Reader()
        reader.feed(document)
        return reader

    return parsed
