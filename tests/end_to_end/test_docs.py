"""What the documents show runs, and what they say of the interface is so."""

import importlib.util
import re
from pathlib import Path

import pytest

from cfsp.models.layouts import LAYOUTS

from ..models import test_detected_experts, test_detection, test_hybrids

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "tutorial.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == len(re.findall(r"^```\w", page, flags=re.MULTILINE)) >= 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/tutorial.md", "exec"), names)
    said = capsys.readouterr().out
    assert "block 3: " in said
    assert re.search(r"perplexity [\d.]+ -> [\d.]+\n", said)
    assert "x the prefill" in said


def test_the_api_page_is_what_the_docstrings_say() -> None:
    path = DOCS / "generate_api.py"
    specification = importlib.util.spec_from_file_location("generate_api", path)
    assert specification is not None
    assert specification.loader is not None
    generator = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generator)
    assert generator.PAGE.read_text() == generator.api(), "python docs/generate_api.py"


def test_every_page_is_in_the_index_and_no_link_is_broken() -> None:
    index = (DOCS / "README.md").read_text()
    for page in sorted(DOCS.glob("*.md")):
        if page.name != "README.md":
            assert f"]({page.name})" in index
        for link in re.findall(r"\]\(([^)#\s]+)\)", page.read_text()):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_method_page_says_where_the_released_score_degenerates() -> None:
    text = (DOCS / "method.md").read_text()
    assert "The released score reads no weights" in text
    (test,) = set(re.findall(r"`(test_the_released_score\w+)`", text))
    assert f"def {test}" in (Path(__file__).parents[1] / "pruning" / "test_scoring.py").read_text()


def test_the_page_of_inputs_names_the_families_and_tests_that_there_are() -> None:
    page, tests = (DOCS / "inputs.md").read_text(), DOCS.parent / "tests"
    parts = dict(re.findall(r"<!-- (.+?) -->\n(.+?)\n\n", page, flags=re.DOTALL))

    def names(part: str) -> set[str]:
        return set(re.findall(r"\b[a-z]\w*", parts[part].partition("):")[2]))

    assert names("written down") == set(LAYOUTS)
    assert names("detected") == set(test_detection.UNKNOWN) | set(test_hybrids.FOUND)
    assert names("experts") == set(test_detected_experts.FAMILIES) - set(LAYOUTS)
    for file in re.findall(r"`(\w+/test_\w+\.py)`", page):
        assert (tests / file).is_file(), file
    for row in re.findall(r"^\| (?!what|---).+$", page, flags=re.MULTILINE):
        assert re.search(r"`\w+/test_\w+\.py` \|$", row), row
