"""What a run from disk to disk keeps beside its shards, so that a later one can continue it."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..distributed import Ranks
from ..errors import CfspError, named
from ..io.documents import read_as, read_json
from ..io.files import write_json
from ..io.outputs import MANIFEST, RESULT, STATE_FOLDER, can_resume

FORMAT = "cfsp-run-1"
STATISTICS = f"{STATE_FOLDER}/statistics.safetensors"
SHARDS = f"{STATE_FOLDER}/shards"


@dataclass(frozen=True)
class _Manifest:
    identity: dict[str, Any]


def check_resume(partial: Path, identity: dict[str, Any]) -> None:
    """Refuse to continue a run of something else; a folder without a run is no objection. Runs of
    equal ``identity``, plain values that say what they do, give equal bytes."""
    if not can_resume(partial):
        return
    file = partial / MANIFEST
    try:
        known = read_as(_Manifest, file, "manifest", FORMAT).identity
    except CfspError as error:
        raise CfspError(f"cannot resume: {error}") from None
    keys = sorted(identity.keys() | known.keys())
    differing = [named(key) for key in keys if identity.get(key, ...) != known.get(key, ...)]
    if differing:
        raise CfspError(
            f"cannot resume {partial}: it was begun with another {', '.join(differing)}; "
            "`overwrite=True` without `resume=True` begins anew"
        )


def begin(partial: Path, identity: dict[str, Any]) -> None:
    """Record which run fills a folder, or continue it, see :func:`check_resume`: of what is there
    only the shards stay that it finished and nobody has touched since."""
    check_resume(partial, identity)
    if can_resume(partial):
        _drop_unproven(partial)
    else:
        (partial / STATE_FOLDER).mkdir(exist_ok=True)
        write_json(partial / MANIFEST, {"format": FORMAT, "identity": identity})


def keep_shard(file: Path) -> None:
    """Record a finished shard of a result, so that a later run need not write it again."""
    records = file.parents[1] / SHARDS
    records.mkdir(exist_ok=True)
    write_json(records / f"{file.name}.json", {"file": _state_of(file)})


def _state_of(file: Path) -> list[int]:
    """What no write leaves as it was, nor a copy."""
    status = file.lstat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _drop_unproven(partial: Path) -> None:
    """Remove everything from an unfinished result but the shards that have a record."""
    for entry in list(os.scandir(partial / RESULT)):
        file = Path(entry.path)
        try:
            known = read_json(partial / SHARDS / f"{entry.name}.json")
        except CfspError:
            known = None
        if known == {"file": _state_of(file)} and entry.is_file(follow_symlinks=False):
            continue
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(file)
        else:
            file.unlink()


def check_shared(partial: Path, ranks: Ranks) -> None:
    """Raise CfspError on every rank where one does not see the folder that the first has begun."""
    if ranks.size == 1:
        return
    mark = partial / STATE_FOLDER / ranks.of_first(lambda: uuid4().hex)
    if ranks.first:
        mark.touch()
    ranks.barrier()
    unseen = (
        f"rank {ranks.rank} does not see {partial}, which rank 0 made; "
        "`out` must be on a file system that all ranks share"
    )
    ranks.check(None if mark.exists() else unseen)
    if ranks.first:
        mark.unlink()
