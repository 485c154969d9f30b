"""Reads a page as a browser would, for the tests of what is written into one."""

import html.parser
import re
from urllib.parse import unquote

VOID = ("meta", "br", "img")


class Reader(html.parser.HTMLParser):
    """Collects tags, ids, what is referred to, the text and the rows of tables, and checks that tags close."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.ids, self.references, self.open = [], [], [], []
        self.rows, self.texts, self.images = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.references += [value for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
        self.images += [attrs] if tag == "img" else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.remove(tag) if tag in self.open else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.texts.append(data)
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def cells(self) -> set[str]:
        """What stands in the cells of all tables."""
        return {cell for row in self.rows for cell in row}

    @property
    def text(self) -> str:
        """Everything that is read, with single spaces."""
        return " ".join(" ".join(self.texts).split())


def check_self_contained(page: str) -> None:
    """Asserts that a page is well formed, runs nothing and loads nothing, and that what it refers to is in it."""
    reader = Reader(page)
    assert not reader.open
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(reader.tags)
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in reader.references)
    assert not re.search(r"(@import|url\((?!#)|\son\w+=|srcset)", page)
    assert len(set(reader.ids)) == len(reader.ids)
    wanted = {unquote(r[1:]) for r in reader.references if r[0] == "#"} | set(re.findall(r"url\(#([^)]+)\)", page))
    assert wanted <= set(reader.ids)
