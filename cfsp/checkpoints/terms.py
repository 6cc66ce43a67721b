"""The terms that a model comes with: its license and notices, and what its card says of them."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import yaml

from ..models.finding import TERMS

WEIGHTS_AND_CODE = (".safetensors", ".bin", ".gguf", ".json", ".py")
MAX_BYTES = 1 << 20
FRONT_MATTER = ("license", "license_name", "license_link")
"""What the hub's front matter says of the license."""


def copy_terms(source: Path | None, folder: Path) -> None:
    """Copy the license, notice and policy files of a model's folder, where it is known, into the
    folder of a model made of it."""
    if source is None:
        return
    for file in sorted(source.iterdir()):
        if not file.name.lower().startswith(TERMS) or file.suffix.lower() in WEIGHTS_AND_CODE:
            continue
        if is_of(source, file) and file.stat().st_size <= MAX_BYTES:
            shutil.copyfile(file, folder / file.name)
        else:
            warnings.warn(f"{file} is not copied: not a file in there of up to 1 MiB", stacklevel=2)


def is_of(folder: Path, file: Path) -> bool:
    """Whether a file, behind a link or not, lies in a folder, or where the hub's cache keeps what
    its folders link to: terms are published with the result, and nothing else may be."""
    try:
        found, place = file.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):
        return False
    blobs = place.parent.parent / "blobs"
    return found.is_file() and found.parent in (place, blobs)


def front_matter_terms(source: Path | None) -> dict[str, Any]:
    """What the card of a model's folder says of the license; {} where it has none to read."""
    if source is None or not is_of(source, source / "README.md"):
        return {}
    with (source / "README.md").open(errors="replace") as stream:
        head = stream.read(MAX_BYTES)
    if not head.startswith("---\n"):
        return {}
    try:
        said = yaml.safe_load(head[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    if not isinstance(said, dict):
        return {}
    return {key: said[key] for key in FRONT_MATTER if isinstance(said.get(key), str)}
