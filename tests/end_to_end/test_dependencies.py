"""What is imported is declared, and every declared version is one that CI tests."""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CALLED = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "lm_eval": "lm-eval"}
"""Packages whose modules have another name."""
PRESENT_OR_NOT_NEEDED = {"vllm"}
"""Imported by what only it calls."""


def requirements(extra: str | None = None) -> dict[str, Requirement]:
    """By canonical name, without the project's own extras."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = map(Requirement, listed)
    return {canonicalize_name(r.name): r for r in found if r.name != PROJECT["name"]}


def imports(folder: str) -> Iterator[str]:
    """The packages that the modules of a folder import anywhere."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield (node.module or "").partition(".")[0]


def outside(*folders: str) -> set[str]:
    """What they import that neither Python nor this repository has, as packages are called."""
    known = {*sys.stdlib_module_names, *(path.name for path in ROOT.iterdir())}
    names = {name for folder in folders for name in imports(folder)} - known
    return {CALLED.get(name, name) for name in names - PRESENT_OR_NOT_NEEDED}


def test_what_is_imported_is_declared_and_what_is_declared_is_imported() -> None:
    optional = [requirements(extra) for extra in ("gguf", "eval", "report", "recover")]
    assert outside("cfsp", "cfsp_kernels") == {
        *requirements(),
        *(n for own in optional for n in own),
    }


def test_the_kernels_need_torch_and_triton_alone() -> None:
    assert outside("cfsp_kernels") == {"torch", "triton"}


def pins(name: str) -> dict[str, str]:
    """The versions of a constraints file."""
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


EXTRAS = (None, "gguf", "report", "recover", "test")


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_oldest_versions_that_ci_tests_are_the_lower_bounds(extra: str | None) -> None:
    oldest = pins("constraints-oldest.txt")
    for name, requirement in requirements(extra).items():
        (bound,) = requirement.specifier
        assert bound.operator == ">="
        assert oldest[name] == bound.version or oldest[name] == f"{bound.version}.0", name


def test_the_newest_versions_that_ci_tests_are_allowed() -> None:
    newest = pins("constraints.txt")
    for extra in (*EXTRAS, "dev"):
        for name, requirement in requirements(extra).items():
            assert newest[name] in requirement.specifier, name


def test_no_oldest_version_is_pinned_that_nothing_asks_for() -> None:
    asked = {name for extra in EXTRAS for name in requirements(extra)}
    assert set(pins("constraints-oldest.txt")) == asked
