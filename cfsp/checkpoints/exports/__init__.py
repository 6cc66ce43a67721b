"""A pruned model in the formats of other runtimes: each is written, read back and compared."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import CfspError, unknown_name
from ...io.outputs import new_file, new_folder
from ...models.loading import quiet_loading
from . import gguf_model, nemotron_nas, padded
from .source import Details, ExportOptions, ExportSource, open_source


@dataclass(frozen=True)
class Exporter:
    """One format."""

    check: Callable[[ExportSource, ExportOptions], None]
    """Raises CfspError for a model that the format cannot hold, before any work."""
    write: Callable[[ExportSource, ExportOptions, Path, bool], Details]
    """Writes to a path, perhaps with a progress bar, reads back, compares; uses up the source."""
    options: frozenset[str] = frozenset()
    """Names of the :class:`ExportOptions` that the format takes."""
    suffix: str | None = None
    """Suffix of the one file that is written; None for a folder."""


EXPORTERS: dict[str, Exporter] = {
    "nemotron-nas": Exporter(nemotron_nas.check, nemotron_nas.write),
    "gguf": Exporter(gguf_model.check, gguf_model.write, frozenset({"type", "pre"}), ".gguf"),
    "padded": Exporter(padded.check, padded.write, frozenset({"multiple"})),
}


@dataclass(frozen=True)
class ExportResult:
    """What was written."""

    format: str
    out: Path
    widths: tuple[int, ...]
    """FFN channels of every block of the model that was exported."""
    nbytes: int
    """Size on disk."""
    details: dict[str, Any]
    """What the format has to say: see the writer of each."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the details beside the rest."""
        plain = {"format": self.format, "out": str(self.out), "widths": list(self.widths)}
        return {**plain, "bytes": self.nbytes, **self.details}


def export(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    type: str | None = None,
    pre: str | None = None,
    multiple: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ExportResult:
    """Write a model, pruned or not, in the format of another runtime.

    Tensor by tensor from disk to disk where the model is a folder of safetensors under their own
    names. ``out`` appears only when it is whole, was read back and compared.

    Args:
        model: folder, hub id or .gguf file.
        to: "nemotron-nas", "gguf" or "padded".
        out: a folder to make; for gguf a file.
        type: gguf: "F32", "F16", "BF16" or "Q8_0"; as stored by default.
        pre: gguf: llama.cpp's name of the tokenizer's pre-tokenizer; found out by default.
        multiple: padded: the width becomes a multiple of this, 1 by default.
        overwrite: replace ``out``, where cfsp wrote all of it.
        progress: show a bar on stderr.

    Raises:
        CfspError: an unknown format, an option of another format, a model that the format cannot
            hold, an output that exists or cannot be written.
        RuntimeError: what was read back differs. A defect.
    """
    exporter = EXPORTERS.get(to)
    if exporter is None:
        raise unknown_name("format", to, EXPORTERS)
    options, out = ExportOptions(type.upper() if type else None, pre, multiple), Path(out)
    for name, value in asdict(options).items():
        if value is not None and name not in exporter.options:
            valid = [other for other, entry in EXPORTERS.items() if name in entry.options]
            raise CfspError(f"{name} is an option of {', '.join(valid)}, not of {to}")
    if exporter.suffix and out.suffix != exporter.suffix:
        raise CfspError(f"output {out}: {to} is one file, its name ends in {exporter.suffix}")
    new_output = new_file if exporter.suffix else new_folder
    with quiet_loading(), new_output(out, overwrite, inputs=[model]) as partial:
        source = open_source(model)
        exporter.check(source, options)
        details = exporter.write(source, options, partial, progress)
    nbytes = sum(file.stat().st_size for file in (out.rglob("*") if out.is_dir() else [out]))
    return ExportResult(to, out, source.widths, nbytes, details)
