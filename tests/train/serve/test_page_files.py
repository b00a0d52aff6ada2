"""The page's files: how they are served, and that they fit together. In a browser: test_page.py."""

import re

import pytest

from train.serve.app import PAGE

FILES = sorted(path.name for path in PAGE.iterdir())
SCRIPTS = {name: (PAGE / name).read_text() for name in FILES if name.endswith(".js")}
INDEX = (PAGE / "index.html").read_text()
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def policy_of(response):
    """The Content-Security-Policy, as a dict."""
    rules = (rule.split() for rule in response.headers["content-security-policy"].split(";"))
    return {name: values for name, *values in rules}


@pytest.mark.parametrize("path", ["/", *(f"/static/{name}" for name in FILES)])
def test_files_come_with_their_type_and_a_policy_that_allows_nothing_from_elsewhere(client, path):
    response = client.get(path)
    assert response.status_code == 200
    ending = "html" if path == "/" else path.rpartition(".")[2]
    assert response.headers["content-type"].partition(";")[0] == TYPES[ending]
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = policy_of(response)
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == ["'none'"]
    assert {value for values in policy.values() for value in values} <= {"'none'", "'self'", "data:"}
    assert response.headers["cache-control"] == "no-cache"


def test_an_unchanged_file_is_not_sent_again(client):
    first = client.get("/static/main.js")
    again = client.get("/static/main.js", headers={"if-none-match": first.headers["etag"]})
    assert again.status_code == 304
    assert "content-security-policy" in again.headers


@pytest.mark.parametrize("path", ["/static/none.js", "/static/", "/static/../app.py", "/static/%2e%2e/app.py"])
def test_nothing_else_is_served(client, path):
    assert client.get(path).status_code == 404


def test_every_file_is_used_and_every_file_that_is_used_is_there():
    used = {"index.html", *re.findall(r'(?:href|src)="static/([^"]+)"', INDEX)}
    for text in SCRIPTS.values():
        used |= set(re.findall(r'from "\./([^"]+)"', text))
    assert used == set(FILES)


def test_scripts_look_up_elements_and_icons_that_exist():
    ids = set(re.findall(r' id="([^"]+)"', INDEX))
    for name, text in SCRIPTS.items():
        assert set(re.findall(r'\bat\("([^"]+)"\)', text)) <= ids, name
        assert {f"icon-{icon}" for icon in re.findall(r'\bicon\("([^"]+)"\)', text)} <= ids, name


def test_no_script_makes_markup_of_text_or_code_of_strings():
    forbidden = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|write\(|\beval\(|new Function|DOMParser|srcdoc")
    assert {name: found for name, text in SCRIPTS.items() if (found := forbidden.findall(text))} == {}


def test_the_document_has_no_code_and_no_style_of_its_own():
    """The policy would block them, silently."""
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", INDEX) == []


def test_no_file_names_another_host():
    for name in FILES:
        hosts = set(re.findall(r"(?:https?:)?//([\w.-]+\.\w+)", (PAGE / name).read_text()))
        assert hosts <= {"www.w3.org"}, name  # the name of SVG's elements, which is not fetched
