"""README.md and the pages in docs/: links lead somewhere, every page is linked, what is named is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", read(path), flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_first_page_is_short_and_shows_something() -> None:
    lines = read(README).splitlines()
    assert len(lines) <= 130
    picture = next(i for i, line in enumerate(lines) if "](docs/example.png)" in line)
    assert picture < 25 and "simulated" in "".join(lines[picture : picture + 3])
    assert lines.index("## First result") < 30


def test_every_page_is_linked_from_the_first() -> None:
    assert set(re.findall(r"\]\(docs/(\w+\.md)\)", read(README))) == {path.name for path in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_functions_that_are_named_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", read(page), flags=re.S)
    if page.name == "extending.md":
        text = re.sub(r"^`[\w/]+\.py`:$", "", text, flags=re.M)  # the files that a reader adds
    for name in re.findall(r"`((?:[a-z_0-9]+/)*[a-z_0-9]+\.(?:py|ipynb|txt)|(?:[a-z_0-9]+/)+)`", text):
        assert (ROOT / name).exists(), name
    for name, path in re.findall(r"`([\w.]+)` \(`([\w/]+\.py)`\)", text):
        *owner, last = name.split(".")
        for part in (*owner, last):
            assert re.search(rf"^ *(class|def) {part}\b", read(ROOT / path), flags=re.M), (name, path)
