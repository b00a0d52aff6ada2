"""The documentation against the programs: options, links, files, the version, and the API reference."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import re
import shlex
import sys
from pathlib import Path

import pytest

import jaxsteer
from train.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])
PACKAGES = ("jaxsteer", "jaxsteer.io", "jaxsteer.inference", "jaxsteer.theory")
API = ROOT / "docs" / "api"
GCLOUD = {"--enable-hierarchical-namespace", "--uniform-bucket-level-access"}
TAKE_CONFIG = ("sft", "lofit", "compare", "plan", "dpo", "grpo", "distill")
OWN_TASKS = ("sft", "lofit", "plan")
"""Programs that the configs of `sft` are for."""
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*[\w]")
PROGRAM = re.compile(
    r"(?:(?:\.venv/bin/)?python3? -m train[. ]|(?<![\w/.-])(?:\.venv/bin/)?jaxsteer )(\w+)(?![\w.])(.*)"
)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(text, languages=("bash", "sh", "console", "")):
    """The lines of the fenced blocks in these languages; lines continued with a backslash are joined."""
    for _, language, body in FENCE.findall(text):
        if language in languages:
            yield from body.replace("\\\n", " ").splitlines()


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(text):
    """(program, arguments) of every command line that a page shows."""
    indented = re.findall(r"^ {4}(.*)$", text.replace("\\\n", " "), re.MULTILINE)
    for line in [*blocks(text), *indented, *inline_code(text)]:
        if (found := PROGRAM.search(line)) and found[1] in COMMANDS:
            yield found[1], shlex.split(found[2], comments=True)


@functools.cache
def help_of(program, *start):
    """The help text of a program, after the words that choose its config or study."""
    modules = [f"train.{program}.command", f"train.{program}.__main__", f"train.{program}"]
    module = next(name for name in modules if _exists(name))
    shown = io.StringIO()
    before, sys.argv = sys.argv, [program, *start, "--help"]
    try:
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit) as done:
            importlib.import_module(module).main()
    finally:
        sys.argv = before
    assert done.value.code in (0, None), (program, start)
    return shown.getvalue()


def _exists(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent is no package
        return False


def options(program, arguments=()):
    """The options of a program, with the config or study that the arguments begin with."""
    first = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    takes_config = program in TAKE_CONFIG
    if takes_config and (ROOT / first).is_file():
        start: tuple[str, ...] = (str(ROOT / first),)
    elif first and (program in ("bench", "theory") or (takes_config and (ROOT / "configs" / f"{first}.py").is_file())):
        start = (first,)
    else:
        start = ()
    texts = [help_of(program, *start)]
    if program in OWN_TASKS and not start:
        texts += [help_of(program, task) for task in ("jsonl", "gsm8k_smollm2", "table")]  # each has its own --task.*
    return set(OPTION.findall(" ".join(texts)))


@functools.cache
def every_option():
    words = {"bench": ("train", "decode", "eval", "load", "serve", "accelerator"), "theory": _choices("theory")}
    found = {"--help", "--version"}
    for program in COMMANDS:
        for start in words.get(program, ("",)):
            found |= options(program, (start,) if start else ())
    return found


def _choices(program):
    return re.search(r"\{([\w,-]+)\}", help_of(program))[1].split(",")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_documented_commands(page):
    """Each option of each command line is one that its program knows."""
    unknown = [
        f"{program} {' '.join(arguments[:1])}: {option}"
        for program, arguments in commands(page.read_text(encoding="utf-8"))
        for option in OPTION.findall(" ".join(word for word in arguments if word.startswith("--")))
        if option not in options(program, arguments)
    ]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_named_in_the_text(page):
    """Options in running text belong to some program: ours, the scripts for pods, make, or pip."""
    scripts = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tpu_scripts").iterdir() if p.suffix == ".sh")
    others = {*GCLOUD, *OPTION.findall(scripts)} if page.name == "pods.md" else set()
    named = {
        option
        for code in inline_code(page.read_text(encoding="utf-8"))
        if code.startswith("--")
        for option in OPTION.findall(code)
    }
    assert not named or not named - every_option() - others


def test_the_check_of_options_finds_a_wrong_one():
    text = "```bash\n.venv/bin/python -m train.sft configs/jsonl.py --batch-size 4 \\\n    --rows 4  # --not-this\n```"
    ((program, arguments),) = commands(text)
    assert arguments == ["configs/jsonl.py", "--batch-size", "4", "--rows", "4"]
    known = options(program, arguments)
    assert {"--batch-size", "--task.train"} <= known
    assert "--rows" not in known
    assert [c[0] for c in commands("run `jaxsteer evaluate none --by likelihood` now")] == ["evaluate"]


def test_the_readme_shows_commands():
    assert len(list(commands((ROOT / "README.md").read_text(encoding="utf-8")))) >= 3


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files(page):
    """Relative links lead to files of the repository, their anchors to headings; files named in the text exist."""
    text = page.read_text(encoding="utf-8")
    prose = FENCE.sub("", text)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    named = {code for code in inline_code(text) if IN_REPOSITORY.fullmatch(code)}
    missing += sorted(code for code in named - TO_BE_WRITTEN if not (ROOT / code).exists())
    assert not missing


IN_REPOSITORY = re.compile(r"(?:jaxsteer|train|configs|docs|tests|tpu_scripts|\.github)/[\w./-]+")
TO_BE_WRITTEN = {"jaxsteer/interventions/scale.py", "configs/arc_local.py"}
"""Files that readers are shown how to write."""


def anchors(file):
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_one_version():
    assert f"## [{jaxsteer.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {jaxsteer.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page for page in PAGES if ".github" not in page.parts]
    assert not [name for page in pages if (name := name_of(page)) not in navigation]


def test_docstrings_are_laid_out_for_the_site():
    """Where the site's tools are installed (`make docs`)."""
    for tool in ("mkdocs", "griffe"):
        pytest.importorskip(tool)
    spec = importlib.util.spec_from_file_location("mkdocs_site", ROOT / "docs" / "mkdocs_site.py")
    site = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site)
    source = """Steering s[slot][site], `s[a][b]`.

kind         all or none
first, last  the first tokens and
             the last

Args:
    x  y: as it is, [a][b]"""
    expected = r"""Steering s[slot]\[site], `s[a][b]`.

- `kind`: all or none
- `first, last`: the first tokens and the last

Args:
    x  y: as it is, [a]\[b]"""
    assert site.as_markdown(source) == expected
    assert site.as_markdown("One line.\n\n    indented   code[a][b]\n") == "One line.\n\n    indented   code[a][b]"


@pytest.mark.parametrize("package", PACKAGES)
def test_the_reference_has_every_public_name(package):
    """By itself, with its module, or with all that its package exports."""
    shown = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in API.glob("*.md")), re.MULTILINE))
    missing = [
        f"{package}.{name}"
        for name, module in exported(package).items()
        if not {package if package != "jaxsteer" else None, module, f"{package}.{name}"} & shown
    ]
    assert not missing, f"give each a `::: name` in docs/api/: {missing}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_a_docstring(package):
    bare = [f"{module}.{name}" for name, module in exported(package).items() if not docstring(module, name)]
    assert not bare


def exported(package):
    """The public names of a package, each with the module that defines it, without importing them."""
    init = ast.parse(Path(importlib.util.find_spec(package).origin).read_text(encoding="utf-8"))
    names = set(getattr(importlib.import_module(package), "__all__", ()))
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(init)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if (alias.asname or alias.name) in names
    }


def docstring(module, name):
    """The docstring of a class, a function or an assignment at the top of a module; follows imports."""
    body = ast.parse(Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return ast.get_docstring(node)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            text = after.value if isinstance(after, ast.Expr) else None
            return text.value if isinstance(text, ast.Constant) else None
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return docstring(node.module, name)
    return None
