"""SHA-256 of the files of a model, against what is known of them: safetensors has no checksums."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..errors import CfspError, shown
from .documents import check_regular, read_text, reading

SUMS_FILE = "SHA256SUMS"  # the format of coreutils' sha256sum
MAX_LIST_BYTES = 16 << 20
READ_BYTES = 16 << 20
HASHERS = min(8, os.cpu_count() or 1)


def sha256_of(
    files: Sequence[Path], *, from_disk: bool = False, progress: bool = True
) -> list[str]:
    """Hexadecimal SHA-256 of files, read side by side; ``from_disk``: drop them from the page cache
    first, where the system takes that advice."""
    for file in files:
        check_regular(file)
    total = sum(file.stat().st_size for file in files)
    bar = tqdm(total=total, desc="verify", unit="B", unit_scale=True, disable=not progress)

    def sha256(file: Path) -> str:
        digest = hashlib.sha256()
        with reading(file), file.open("rb") as stream:
            if from_disk and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while part := stream.read(READ_BYTES):
                digest.update(part)
                bar.update(len(part))
        return digest.hexdigest()

    with bar, ThreadPoolExecutor(HASHERS, thread_name_prefix="hash") as pool:
        return list(pool.map(sha256, files))


def _listed(folder: Path) -> dict[str, str]:
    """File name -> hash, by the list in a folder; an absent one is empty."""
    sums = folder / SUMS_FILE
    known: dict[str, str] = {}
    lines = read_text(sums, most=MAX_LIST_BYTES).split("\n") if sums.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line or line.startswith("#"):
            continue
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if found is None:
            raise CfspError(f"{sums}, line {number}: expected a SHA-256 and a name")
        if known.setdefault(found[2], found[1].lower()) != found[1].lower():
            raise CfspError(f"{sums}, line {number}: another SHA-256 of {shown(found[2])}")
    return known


def known_hashes(files: Sequence[Path]) -> dict[Path, str]:
    """What is known of files: by ``SHA256SUMS`` beside them, else by the hub's cache, where a large
    file is a link to a blob that has its hash as a name."""
    lists = {folder: _listed(folder) for folder in {file.parent for file in files}}
    known: dict[Path, str] = {}
    for file in files:
        blob, listed = file.resolve().name, lists[file.parent]
        if file.name in listed:
            known[file] = listed[file.name]
        elif re.fullmatch(r"[0-9a-f]{64}", blob):
            known[file] = blob
        else:
            raise CfspError(
                f"no hash is known of {file}; `sha256sum {file.name} > {SUMS_FILE}` beside a good "
                "copy makes one"
            )
    return known


def check_hashes(known: Mapping[Path, str], *, progress: bool = True) -> None:
    """Read files whole and raise CfspError for one with another hash, or that cannot be read."""
    for file, found in zip(known, sha256_of(list(known), progress=progress), strict=True):
        if found != known[file]:
            raise CfspError(
                f"{file} is corrupt: its SHA-256 is {found}, should be {known[file]}; fetch it anew"
            )


def write_hashes(folder: Path, *, progress: bool = True) -> None:
    """List the hashes of a folder's weights, read back from the disk, for ``sha256sum --check``."""
    files = sorted(folder.glob("*.safetensors"))
    hashes = sha256_of(files, from_disk=True, progress=progress)
    lines = [f"{found}  {file.name}\n" for found, file in zip(hashes, files, strict=True)]
    (folder / SUMS_FILE).write_text("".join(lines))
