"""Where a model's files are: a .gguf file, a folder, or the snapshot of a hub id."""

from pathlib import Path

from ..errors import CfspError
from ..io.safetensors import read_index
from .inspection import check_folder_files
from .loading import check_folder, hub_folder

MODEL_FILES = ["*.json", "model*.safetensors", "*.model", "*.txt", "*.jinja"]
TERMS = ("license", "licence", "notice", "use_policy")
"""What the names of files with a model's terms begin with, in any case."""
ANY_CASE = ["".join(f"[{letter.upper()}{letter}]" for letter in name) + "*" for name in TERMS]
HUB_FILES = [*MODEL_FILES, "README.md", *ANY_CASE]


def find_model(model: str | Path) -> Path:
    """The .gguf file or folder of a model, of a hub id its local snapshot; CfspError where there is
    none with weights that are read."""
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise CfspError(f"no such file: {path}")
        return path
    if not path.exists():
        name = str(model)
        local = path.is_absolute() or name.startswith((".", "~")) or name.endswith("/")
        if local or name.count("/") > 1:  # no hub id either
            raise CfspError(f"no such model folder: {model}")
        path = hub_folder(model, HUB_FILES)
    check_folder(path)
    check_folder_files(path)
    return path


def weight_files(model: str | Path) -> list[Path]:
    """The files that hold a model's weights: a .gguf file, or the safetensors of its folder."""
    path = find_model(model)
    if path.suffix == ".gguf":
        return [path]
    return sorted({stored.file for stored in read_index(path).values()})
