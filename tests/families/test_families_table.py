"""The table of families says what is so: each is pruned, compared, reloaded, or refused."""

from collections.abc import Callable
from functools import cache

import pytest
from transformers import CONFIG_MAPPING

from .checks import Outcome, outcomes
from .page import HEAD, PAGE, row
from .tiny import FAMILIES

GROUPS = 4
"""One fresh process reloads the results of a group; it takes seconds to start."""
GROUP_OF = {name: number * GROUPS // len(FAMILIES) for number, name in enumerate(FAMILIES)}
KNOWN = [name for name, family in FAMILIES.items() if family.model_type in CONFIG_MAPPING]
"""The others came to transformers later than this version."""
REMAKE = "python -m tests.families --write"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    @cache
    def group(number: int) -> dict[str, Outcome]:
        names = [name for name in KNOWN if GROUP_OF[name] == number]
        return outcomes(names, tmp_path_factory.mktemp("families"))

    return lambda name: group(GROUP_OF[name])[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_pruned_as_its_row_says(name: str, outcome: Callable[[str], Outcome]) -> None:
    if name not in KNOWN:
        pytest.skip("not in this version of transformers")
    found = outcome(name)
    assert bool(found.refused) != bool(found.checks)
    assert all(found.checks), row(found)
    assert "\n" not in found.refused
    assert row(found) in PAGE.read_text().splitlines(keepends=True), REMAKE


def test_the_page_has_a_row_for_every_family_in_order() -> None:
    page = PAGE.read_text()
    assert page.startswith(HEAD), REMAKE
    starts = [f"| {family.title} | `{family.model_type}` |" for family in FAMILIES.values()]
    rows = page.removeprefix(HEAD).splitlines()
    assert len(rows) == len(starts) == len(set(starts)) >= 60, REMAKE
    for line, start in zip(rows, starts, strict=True):
        assert line.startswith(start), REMAKE
