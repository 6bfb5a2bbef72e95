"""HTML as text that is safe by its type: everything that is not `Markup` is escaped when it enters an element."""

from __future__ import annotations

import html
from collections.abc import Iterable

__all__ = ["Content", "Markup", "element", "joined"]

#: Elements without content or an end tag.
VOID = ("br", "img", "input", "meta", "wbr")


class Markup(str):
    """HTML that may enter a page as it is."""

    __slots__ = ()


Content = Markup | str | float | None


def element(tag: str, *content: Content, **attributes: str | float | bool | None) -> Markup:
    """An element.

    Args:
        content: markup, or text to escape; None is left out
        attributes: `_` stands for `-`, and an underscore at the end is dropped (`class_`); None and False are left out
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(str(value), quote=True)}"')
        for name, value in attributes.items()
        if value is not None and value is not False
    )
    end = "" if tag in VOID else f"</{tag}>"
    return Markup(f"<{tag}{written}>{joined(content)}{end}")


def joined(content: Iterable[Content]) -> Markup:
    """Markup and escaped text, one after the other."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in content if part is not None)
    )
