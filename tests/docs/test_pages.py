"""The documents say what is there: links, paths, the index of decisions, the commands, the version."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from vllm_agentserve import __version__

DESIGN = ROOT / "docs" / "design"
RESULTS = ROOT / "docs" / "results"
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *DESIGN.glob("*.md"),
    *RESULTS.glob("*.md"),
    ROOT / "patches" / "README.md",
]
DECISIONS = [page for page in DESIGN.glob("*.md") if page.name != "README.md"]
SECTIONS = ["Question", "Decision", "Why", "What lost", "What it costs", "Where", "What would change our mind"]
PATH = re.compile(r"`((?:[\w.-]+/)*[\w.-]+\.(?:py|md|json|patch|toml)|(?:[\w.-]+/)+)`")
"""A file with an ending, or a folder with its slash, between backquotes."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), link


def test_every_page_of_results_is_in_their_index() -> None:
    index = (RESULTS / "README.md").read_text()
    for page in RESULTS.glob("*.md"):
        assert page.name == "README.md" or f"| [{page.name}]({page.name}) |" in index, page.name


@pytest.mark.parametrize(
    "page", [*DECISIONS, DESIGN / "README.md", RESULTS / "faults.md", ROOT / "CONTRIBUTING.md"], ids=name_of
)
def test_the_paths_a_page_names_exist(page: Path) -> None:
    """From the root, or modules from the package as on the architecture page."""
    named = PATH.findall(page.read_text())
    assert named
    made = {"bench-results/"}
    for path in named:
        assert path in made or (ROOT / path).exists() or (ROOT / "vllm_agentserve" / path).exists(), path


def test_every_decision_is_in_the_index() -> None:
    index = re.findall(r"^\| \[([\w-]+\.md)\]\(([\w-]+\.md)\) \|", (DESIGN / "README.md").read_text(), re.MULTILINE)
    assert all(text == link for text, link in index)
    assert sorted(link for _, link in index) == sorted(page.name for page in DECISIONS)


@pytest.mark.parametrize("page", DECISIONS, ids=name_of)
def test_a_decision_has_all_its_parts(page: Path) -> None:
    assert re.findall(r"^## (.+)$", page.read_text(), re.MULTILINE) == SECTIONS


def test_every_make_target_is_explained() -> None:
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for target in targets.split():
        assert target == "setup" or f"`make {target}`" in page, target


def test_the_changes_name_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    first = re.search(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == __version__
