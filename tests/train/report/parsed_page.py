"""Reports as a browser reads them."""

from html.parser import HTMLParser

from train.report.page import make_page


class Page(HTMLParser):
    """A page as a browser reads it: elements with their attributes, and the text in them."""

    VOID = ("meta", "link", "img", "br", "col", "input", "image", "line", "rect", "circle", "path")

    def __init__(self, html):
        super().__init__()
        self.elements, self._open, self._texts = [], [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.handle_data(" ")
        self.elements.append((tag, dict(attributes)))
        self._texts.append([])
        if tag not in self.VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._texts.append([])

    def handle_endtag(self, tag):
        assert self.elements[self._open.pop()][0] == tag
        self.handle_data(" ")

    def handle_data(self, data):
        for index in self._open:
            self._texts[index].append(data)

    def texts(self, tag=None, of=None):
        """The text of every element with a tag and a class."""
        return [
            " ".join("".join(text).split())
            for (name, values), text in zip(self.elements, self._texts, strict=True)
            if (tag is None or name == tag) and (of is None or of in values.get("class", "").split())
        ]

    @property
    def text(self):
        return self.texts("body")[0]


def page_of(*runs, examples=50):
    return Page(make_page([str(each.folder) for each in runs], examples))
