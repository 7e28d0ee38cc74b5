"""The site: pages and names are all there; where its builder is installed it is built, and what it links to exists."""

import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import foldconv
import foldconv.train

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", [foldconv, foldconv.train], ids=lambda package: package.__name__)
def test_every_public_name_is_on_the_page_of_the_api(package):
    told = re.findall(rf"^::: {re.escape(package.__name__)}\.(\w+)$", API, re.MULTILINE)
    assert sorted(told) == sorted(package.__all__)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = re.findall(r"[\w/-]+\.md$", navigation, re.MULTILINE)
    assert sorted(named) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))


def script(name):
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_of_methods_are_what_their_script_writes():
    written = script("write_method_pages").everything()
    old = [path.name for path, text in written.items() if path.read_text(encoding="utf-8") != text]
    assert old == [], "run python docs/write_method_pages.py"
    assert sorted(path for path in written if DOCS in path.parents) == sorted((DOCS / "methods").iterdir())


def test_pages_of_methods_say_what_is_known():
    doconv = (DOCS / "methods" / "doconv.md").read_text(encoding="utf-8")
    assert "y = (Dᵀ ∘ W) * x" in doconv
    assert "| ImageNet top-1 | ResNet-18 v1 | 70.87 | 71.69 | +0.82 |" in doconv
    assert re.search(r"\| resnet18, 8×224² \| 1\.\d\d \| 1\.\d\d \|", doconv)
    assert re.search(r"\| MNIST: mnist_demo, 15 epochs \|.*\| 20 \| yes \|", doconv)


def test_the_page_of_findings_is_written_from_them():
    module = script("write_findings_page")
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run python docs/write_findings_page.py"
    assert all(map(all, map(module.head, (ROOT / "findings").glob("*.sh"))))


def test_the_page_of_speeds_is_the_measurements():
    module = script("write_speed_table")
    page = (DOCS / "speed.md").read_text(encoding="utf-8")
    assert module.with_table(page) == page, "run python docs/write_speed_table.py"
    assert "| training step, resnet18 8×224² | 1." in page


class Links(HTMLParser):
    """What a page links to, what it loads, and the places in it that can be linked to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.places = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.places |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif found.get("src"):
            self.loaded.append(found["src"])
        elif tag == "link" and "stylesheet" in found.get("rel", ""):
            self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site's pages by path."""
    pytest.importorskip("zensical")
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", folder)
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Links(path) for path in (folder / "site").rglob("*.html") if path.name != "404.html"}


def test_what_pages_link_to_is_there(site):
    assert len(site) == len(list(DOCS.rglob("*.md")))
    wrong = []
    for path, page in site.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            places = site[target].places if target in site else {parts.fragment}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in places):
                wrong.append((path.parent.name, link))
    assert wrong == []


def test_pages_load_nothing_from_elsewhere(site):
    loaded = {address for page in site.values() for address in page.loaded}
    assert loaded
    assert [address for address in loaded if urlsplit(address).netloc] == []


def test_docstrings_become_lists_and_code():
    pytest.importorskip("griffe")
    module = script("docstrings")
    text = """One line.

    Args:
        a, b: two,
            and on.

    Raises:
        ValueError: for no reason.
        Always as it was.

    Source: a paper.

    Example:
        >>> f(1)
        2
    """
    assert module.markdown(text).split("\n\n") == [
        "One line.",
        "**Args**",
        "- `a, b`: two,\n    and on.",
        "**Raises**",
        "- `ValueError`: for no reason.",
        "Always as it was.",
        "**Source:** a paper.",
        "**Example**",
        "```pycon\n>>> f(1)\n2\n```",
    ]
    assert module.markdown("Two.\n\n    >>> f(2)").endswith("```pycon\n>>> f(2)\n```")


@pytest.mark.parametrize("path", sorted(DOCS.glob("notebooks/*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(path, as_version=4)
    assert all(cell.outputs for cell in notebook.cells if cell.cell_type == "code" and "print(" in cell.source)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3")
    client.execute(cwd=str(tmp_path))
