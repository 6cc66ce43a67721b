"""Every reader of cfsp with inputs to damage, and what must hold of those that it accepts."""

import bz2
import contextlib
import dataclasses
import gzip
import io
import json
import lzma
import math
import random
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import safetensors
import torch
import yaml
from pyarrow import parquet

import cfsp
from cfsp.apportion import Steps
from cfsp.calibration import statistics as statistics_file
from cfsp.calibration.mixtures import parse_mixture
from cfsp.calibration.statistics import Statistics, load_statistics, save_statistics
from cfsp.calibration.text import load_text
from cfsp.checkpoints.documents import read_evaluation, read_pruned, read_result
from cfsp.checkpoints.resume import MANIFEST, check_resume
from cfsp.cli.main import build_parser
from cfsp.cli.prune import recipe_of
from cfsp.costs.hardware import parse_memory
from cfsp.costs.latency import LatencyLimit, load_table, save_table
from cfsp.errors import CfspError
from cfsp.io.documents import to_json
from cfsp.io.hashes import SUMS_FILE, known_hashes
from cfsp.io.safetensors import DTYPES, INDEX_FILE, read_header, read_index, read_tensors
from cfsp.io.shard_writer import ShardWriter, pack_shards, write_index
from cfsp.models.opening import open_any
from cfsp.models.tensors import tensor_infos
from cfsp.pruning.budget import parse_model_budget
from cfsp.pruning.plan_file import load_plan, plan_to_dict, save_plan
from cfsp.pruning.planning import make_plan
from cfsp.pruning.recipe import load_recipe, recipe_from_dict
from cfsp.report.page import report_html
from cfsp.report.tables import evaluation_table

from ..conftest import TEXT, make_tiny, make_tokenizer
from .mutation import as_bytes, mutate_bytes, mutate_json, mutate_text, pick


class WrongAccepted(Exception):
    """A reader took what it should have refused."""


def hold(condition: bool, what: str) -> None:
    if not condition:
        raise WrongAccepted(what)


@dataclass(frozen=True)
class Target:
    """A reader."""

    name: str
    weight: int
    make: Callable[[random.Random], bytes]
    """A damaged input."""
    read: Callable[[bytes, Path], Any]
    """Have it read, from a folder that may keep what all inputs need; CfspError refuses it."""
    judge: Callable[[Any, bytes, Path], None] = lambda *_: None
    """Raises WrongAccepted for what was read and should not have been."""
    isolated: bool = False
    """Whether other people's parsers read it, which may crash."""


def every_target(folder: Path) -> list[Target]:
    """All of them; what is made once for all inputs is kept in ``folder``."""
    seeds = _seeds(folder / "seeds")
    return [
        *_weights(seeds),
        *_models(seeds),
        *_plans(seeds),
        *_statistics(seeds),
        *_documents(seeds),
        *_texts(seeds),
        *_strings(),
    ]


def _seeds(folder: Path) -> Path:
    """A tiny model, in one file and in shards, its result, and the documents of both."""
    if folder.is_dir():
        return folder
    folder.mkdir(parents=True)
    model, tokenizer = make_tiny(num_hidden_layers=2, hidden_size=16, head_dim=4), make_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    calibration = cfsp.Calibration(dataset=TEXT, samples=4, seqlen=32)
    recipe = cfsp.Recipe(scorer="obs", width_multiple=8, calibration=calibration)
    found = cfsp.calibrate(folder / "model", recipe=recipe, progress=False)
    save_statistics(found, folder / "statistics.safetensors")
    options = {"statistics": found, "eval_windows": 1, "progress": False}
    cfsp.prune(folder / "model", None, recipe, folder / "result", **options)
    if find_spec("gguf") is not None:
        from ..checkpoints.test_exports import family_tokenizer

        words = family_tokenizer()
        make_tiny(num_hidden_layers=1, vocab_size=len(words)).save_pretrained(folder / "words")
        words.save_pretrained(folder / "words")
        cfsp.export(folder / "words", "gguf", folder / "model.gguf", progress=False)
    tensors = {
        f"t{n}": torch.arange(3 * n + 2.0).to(kind) for n, kind in enumerate(DTYPES.values())
    }
    tensors["empty"] = torch.empty(0, 4)
    infos = tensor_infos(tensors)
    for name, most in (("one", 10**9), ("shards", 200)):
        (folder / name).mkdir()
        shards = pack_shards(infos, most)
        with ShardWriter(folder / name, shards) as writer:
            for key, tensor in tensors.items():
                writer.write(key, tensor)
        write_index(folder / name, shards)
    return folder


def _file(name: str, reader: Callable[[Path], Any], data: bytes, folder: Path) -> Any:
    """What a reader makes of a file."""
    (folder / name).write_bytes(data)
    return reader(folder / name)


def _json_maker(document: Any) -> Callable[[random.Random], bytes]:
    return lambda rng: as_bytes(mutate_json(rng, document))


# Weights


def _split(data: bytes) -> tuple[Any, bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _joined(header: str, values: bytes) -> bytes:
    text = as_bytes(header)
    return struct.pack("<Q", len(text)) + text + values


def _safetensors_maker(data: bytes) -> Callable[[random.Random], bytes]:
    header, values = _split(data)

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, data)
        return _joined(mutate_json(rng, header), values)

    return make


def _judge_safetensors(found: Any, data: bytes, _: Path) -> None:
    try:
        theirs = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise WrongAccepted(f"safetensors refuses it: {str(error)[:60]}") from None
    ours = {name: (list(info.shape), info.dtype) for name, info in found.items()}
    other = {name: (entry["shape"], DTYPES[entry["dtype"]]) for name, entry in theirs.items()}
    hold(ours == other, "other tensors than safetensors finds")
    for name, tensor in read_tensors(found).items():
        bytes_of = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        hold(bytes_of == bytes(theirs[name]["data"]), "other values than safetensors finds")


def _weights(seeds: Path) -> list[Target]:
    whole = (seeds / "one" / "model.safetensors").read_bytes()
    read = partial(_file, "x.safetensors", read_header)
    index = json.loads((seeds / "shards" / INDEX_FILE).read_text())
    shards = {file.name: file.read_bytes() for file in (seeds / "shards").glob("*.safetensors")}
    makers = {name: _safetensors_maker(data) for name, data in shards.items()}

    def make(rng: random.Random) -> bytes:
        name = pick(rng, [INDEX_FILE, INDEX_FILE, *sorted(shards)])
        changed = as_bytes(mutate_json(rng, index)) if name == INDEX_FILE else makers[name](rng)
        return name.encode() + b"\n" + changed

    def read_folder(data: bytes, folder: Path) -> Any:
        name, _, changed = data.partition(b"\n")
        for shard, content in {**shards, INDEX_FILE: json.dumps(index).encode()}.items():
            (folder / shard).write_bytes(changed if shard.encode() == name else content)
        (folder.parent / "x.safetensors").write_bytes(whole)  # where "../x" would lead
        return read_index(folder)

    def judge(found: Any, data: bytes, folder: Path) -> None:
        hold({info.file.parent for info in found.values()} <= {folder}, "a file elsewhere")
        every = [name for shard in shards for name in read_header(folder / shard)]
        used = {info.file.name for info in found.values()}
        hold(used < set(shards) or sorted(every) == sorted(found), "a tensor that is not listed")
        for shard in used:
            own = {name: info for name, info in found.items() if info.file.name == shard}
            _judge_safetensors(own, (folder / shard).read_bytes(), folder)

    return [
        Target("safetensors header", 150, _safetensors_maker(whole), read, _judge_safetensors),
        Target("index and shards", 60, make, read_folder, judge),
    ]


# Models, whole


def _models(seeds: Path) -> list[Target]:
    model = seeds / "model"

    def reader(name: str) -> Callable[[bytes, Path], Any]:
        def read(data: bytes, folder: Path) -> Any:
            shutil.copytree(model, folder / "m", dirs_exist_ok=True)
            return _file(name, lambda file: open_any(file.parent, device="cpu"), data, folder / "m")

        return read

    def target(name: str, weight: int) -> Target:
        make = _json_maker(json.loads((model / name).read_text()))
        return Target(name, weight, make, reader(name), isolated=True)

    found = [
        target("config.json", 12),
        target("tokenizer_config.json", 6),
        target("tokenizer.json", 6),
    ]
    gguf = seeds / "model.gguf"
    if gguf.is_file():
        data = gguf.read_bytes()
        head = data[:6000]

        def make(rng: random.Random) -> bytes:
            return mutate_bytes(rng, head) + data[len(head) :]

        read = partial(_file, "x.gguf", partial(open_any, device="cpu"))
        found.append(Target("GGUF", 6, make, read, isolated=True))
    return found


# Plans and recipes


def _judge_plan(found: Any, _: bytes, folder: Path) -> None:
    save_plan(found, folder / "again.json")
    hold(plan_to_dict(load_plan(folder / "again.json")) == plan_to_dict(found), "saved otherwise")
    for block in found.blocks:
        kept = block.flat_kept
        hold(0 < len(kept) == block.width, "a width that is not that of kept")
        hold(bool((kept.diff() > 0).all()) and kept[-1] < block.intermediate_size, "not ascending")
        values = (block.importance, *block.score_quantiles)
        hold(all(type(value) is float and math.isfinite(value) for value in values), "not finite")
    _judge_recipe(found.recipe, b"", folder)


def _judge_recipe(found: Any, _: bytes, folder: Path) -> None:
    hold(recipe_from_dict(found.to_dict()) == found, "another recipe from its own values")
    hold(recipe_from_dict(json.loads(json.dumps(found.to_dict()))) == found, "not plain values")
    for part in (found, found.calibration):
        for field in dataclasses.fields(part):
            value, default = getattr(part, field.name), field.default
            if default is not None:
                kinds = (int, float) if type(default) is float else (type(default),)
                hold(type(value) in kinds, f"{field.name} of another type")


def _plans(seeds: Path) -> list[Target]:
    plan = json.loads((seeds / "result" / "plan.json").read_text())
    ranges = plan | {"blocks": [{**plan["blocks"][0], "kept": "0-3,5", "width": 5}]}
    makers = [_json_maker(plan), _json_maker(ranges)]
    text = (seeds / "result" / "recipe.yaml").read_text()
    record = yaml.safe_load(text)
    recipes = [_json_maker(record), _json_maker(record["recipe"]), _json_maker({"seed": 1})]

    def as_yaml(rng: random.Random) -> bytes:
        return mutate_bytes(rng, text.encode())

    return [
        Target(
            "plan",
            130,
            lambda rng: pick(rng, makers)(rng),
            partial(_file, "plan.json", load_plan),
            _judge_plan,
        ),
        Target(
            "recipe",
            60,
            lambda rng: pick(rng, [*recipes, as_yaml])(rng),
            partial(_file, "recipe.yaml", load_recipe),
            _judge_recipe,
        ),
    ]


# Statistics


def _judge_statistics(original: Statistics, found: Statistics, _: bytes, folder: Path) -> None:
    """The checksum lets nothing through but what the file held."""
    same = statistics_file.statistics_fingerprint
    hold(same(found) == same(original), "other statistics than were saved")


def _no_weights(_: int) -> Any:
    raise CfspError("no weights")


def _judge_forged(found: Statistics, _: bytes, folder: Path) -> None:
    for block in found.blocks:
        sums = torch.cat([block.sum, block.sum_of_squares, block.influence])
        hold(bool(sums.isfinite().all()) and bool((block.sum_of_squares >= 0).all()), "not finite")
        hold(block.tokens >= 1 and block.windows >= 1, "no tokens")
        hold(type(block.tokens) is int and type(block.windows) is int, "counts of another type")
    save_statistics(found, folder / "again")
    hold(load_statistics(folder / "again").provenance == found.provenance, "saved otherwise")
    for scorer in ("flap", "obs"):
        with contextlib.suppress(CfspError):
            recipe = cfsp.Recipe(scorer=scorer, allocator="uniform", width_multiple=1)
            _judge_plan(make_plan(found, _no_weights, recipe), b"", folder)


def _statistics(seeds: Path) -> list[Target]:
    data = (seeds / "statistics.safetensors").read_bytes()
    header, values = _split(data)
    inner = json.loads(header["__metadata__"]["cfsp"])

    def make(rng: random.Random) -> bytes:
        """The file's header, the header in its metadata, or values."""
        way = rng.random()
        if way < 0.2:
            return _safetensors_maker(data)(rng)
        if way < 0.4:
            changed = bytearray(values)
            at = rng.randrange(len(values) // 8) * 8
            numbers = (math.nan, math.inf, -math.inf, -1.0, 1e300, 0.0)
            changed[at : at + 8] = struct.pack("<d", pick(rng, numbers))
            return _joined(json.dumps(header), bytes(changed))
        text = mutate_json(rng, inner).encode(errors="replace").decode()
        return _joined(json.dumps({**header, "__metadata__": {"cfsp": text}}), values)

    read = partial(_file, "s", load_statistics)
    original = load_statistics(seeds / "statistics.safetensors")

    def forged(data: bytes, folder: Path) -> Any:
        """Read as if the checksum in the file were that of its content."""
        true = statistics_file.statistics_fingerprint
        try:
            told = (re.findall(rb'\\"sha256\\": \\"([0-9a-f]{64})', data) or [b""])[-1]
            statistics_file.statistics_fingerprint = lambda _: told.decode()
            return read(data, folder)
        finally:
            statistics_file.statistics_fingerprint = true

    return [
        Target("statistics", 60, make, read, partial(_judge_statistics, original)),
        Target("statistics, forged checksum", 60, make, forged, _judge_forged),
    ]


# Documents

LATENCY = {
    "format": "cfsp-latency-2",
    "identity": {
        "model": "m",
        "batch": 1,
        "length": 16,
        "context": 0,
        "device": "cpu",
        "versions": {"a": "1"},
    },
    "outer_seconds": 0.5,
    "kinds": [[{"widths": [8, 24, 48], "seconds": [0.1, 0.2, 0.4]}]],
    "blocks": [0, 0],
}
EVALUATION = {
    "models": [
        {
            "model": f"folder/{name}",
            "parameters": 12345,
            "perplexity": 5.5,
            "windows": 3,
            "speed": {"prefill_tokens_per_second": 9.5, "peak_memory_bytes": 1 << 30},
            "tasks": {"questions": {"acc": 0.5, "acc_stderr": 0.1}},
        }
        for name in ("a", "b")
    ]
}
IDENTITY = {"model": "ab", "recipe": {"sparsity": 0.3}, "micro-batch": 2, "plan": None}


def _judge_table(found: Any, _: bytes, folder: Path) -> None:
    save_table(found, folder / "again.json")
    hold(load_table(folder / "again.json") == found, "saved otherwise")
    sizes = [curve.widths[-1] for curve in found.curves]
    limit = LatencyLimit(found, 0.8 * found.dense_seconds, "latency=0.2")
    hold(0 < found.dense_seconds < math.inf, "no time at all")
    if max(sizes) < 10**5 and len(sizes) < 100:
        with contextlib.suppress(CfspError):
            widths = limit.fitted(
                lambda s: tuple(max(1, int((1 - s) * n)) for n in sizes), list(map(Steps, sizes))
            )
            hold(found.predicted(widths) <= limit.seconds * (1 + 1e-9), "too slow")


def _read_manifest(data: bytes, folder: Path) -> Any:
    (folder / MANIFEST).parent.mkdir(exist_ok=True)
    (folder / MANIFEST).write_bytes(data)
    check_resume(folder, IDENTITY)


def _judge_manifest(_: Any, data: bytes, folder: Path) -> None:
    hold(json.loads(data)["identity"] == IDENTITY, "another run")


def _documents(seeds: Path) -> list[Target]:
    manifest = {"format": "cfsp-run-1", "identity": IDENTITY}
    result = seeds / "result"
    names = ("plan.json", "recipe.yaml", "config.json")
    contents = {
        name: yaml.safe_load((result / name).read_text()) for name in names
    }  # JSON is YAML too
    makers = {name: _json_maker(content) for name, content in contents.items()}

    def make(rng: random.Random) -> bytes:
        name = pick(rng, names)
        return name.encode() + b"\n" + makers[name](rng)

    def read(data: bytes, folder: Path) -> Any:
        shutil.copytree(result, folder / "result", dirs_exist_ok=True)
        name, _, changed = data.partition(b"\n")
        if name.decode(errors="replace") in names:
            (folder / "result" / name.decode()).write_bytes(changed)
        read_pruned(folder / "result")
        return read_result(folder / "result")

    def judge(found: Any, _: bytes, folder: Path) -> None:
        report_html([found, found])

    def judge_evaluation(found: Any, _: bytes, folder: Path) -> None:
        told = evaluation_table(found, ())
        texts = [text for measure in told["measures"] for text in measure["texts"]]
        hold(not {"nan", "inf"} & set(texts), "a number that is none")
        json.loads(to_json(found), parse_constant=lambda name: hold(False, f"{name} in JSON"))

    sums = "".join(f"{n:064x}  {name}\n" for n, name in enumerate(("a", "b c", "d"), 10**20))

    def read_sums(data: bytes, folder: Path) -> Any:
        for name in ("a", "b c", "d"):
            (folder / name).touch()
        (folder / SUMS_FILE).write_bytes(data)
        return known_hashes([folder / name for name in ("a", "b c", "d")])

    def judge_sums(found: Any, data: bytes, folder: Path) -> None:
        for file, known in found.items():
            line = rf"^{known}  ?\*?{re.escape(file.name)}$"
            hold(re.search(line, data.decode(), re.M | re.I) is not None, "a hash not in the list")

    return [
        Target(
            "latency table",
            100,
            _json_maker(LATENCY),
            partial(_file, "t.json", load_table),
            _judge_table,
        ),
        Target("manifest", 80, _json_maker(manifest), _read_manifest, _judge_manifest),
        Target(
            "evaluation",
            80,
            _json_maker(EVALUATION),
            partial(_file, "e.json", read_evaluation),
            judge_evaluation,
        ),
        Target("result", 10, make, read, judge),
        Target(SUMS_FILE, 60, lambda rng: mutate_bytes(rng, sums.encode()), read_sums, judge_sums),
    ]


# Text


def _texts(seeds: Path) -> list[Target]:
    rows = [{"text": f"line {n} of é text"} for n in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    files = {
        "x.json": json.dumps(rows).encode(),
        "x.jsonl": lines,
        "chat.jsonl": b"".join(json.dumps({"messages": chat}).encode() + b"\n" for _ in rows),
        "x.csv": b'text,n\nfirst,1\n"second, or not",2\n',
        "x.tsv": b"text\tn\nfirst\t1\nsecond\t2\n",
        "x.txt": "some text\nand é\n".encode(),
        "x.jsonl.gz": gzip.compress(lines, mtime=0),
        "x.txt.xz": lzma.compress(lines),
        "x.jsonl.bz2": bz2.compress(lines),
    }
    nested = pa.Table.from_pylist([{**row, "more": {"n": [1, None]}} for row in rows])
    for name, write in (("x.parquet", parquet.write_table), ("x.arrow", _write_arrow)):
        buffer = io.BytesIO()
        write(nested, buffer)
        files[name] = buffer.getvalue()
    chats = SimpleNamespace(
        chat_template="{}", apply_chat_template=lambda turns, tokenize: str(turns)
    )

    def make(rng: random.Random) -> bytes:
        name = pick(rng, sorted(files))
        return name.encode() + b"\n" + mutate_bytes(rng, files[name])

    def read(data: bytes, folder: Path) -> Any:
        name, _, changed = data.partition(b"\n")
        if name.decode(errors="replace") not in files:
            raise CfspError("of no format")
        return _file(
            name.decode(),
            lambda file: load_text(str(file), "calibrate", None, chats),
            changed,
            folder,
        )

    def judge(found: Any, data: bytes, _: Path) -> None:
        texts = [found] if isinstance(found, str) else found
        hold(all(isinstance(text, str) for text in texts), "no text")

    return [Target("text", 60, make, read, judge, isolated=True)]


def _write_arrow(table: Any, buffer: io.BytesIO) -> None:
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)


# Strings of the command line

FLAGS = {
    "--sparsity": "0.5",
    "--budget": "params=0.25",
    "--width-multiple": "8",
    "--samples": "16",
    "--seqlen": "128",
    "--seed": "3",
    "--micro-batch": "2",
    "--damping": "0.01",
    "--importance-exponent": "1",
    "--search-seed": "3",
    "--epochs": "2",
    "--learning-rate": "0.1",
    "--dataset": "wikitext2:3,c4:1",
    "--scorer": "obs",
    "--bos": "auto",
}


def _string(
    name: str,
    weight: int,
    texts: Sequence[str],
    read: Callable[[str], Any],
    judge: Callable[[Any], None] = lambda _: None,
) -> Target:
    return Target(
        name,
        weight,
        lambda rng: mutate_text(rng, pick(rng, texts)).encode(errors="surrogatepass"),
        lambda data, _: read(data.decode(errors="surrogateescape")),
        lambda found, *_: judge(found),
    )


def _read_flags(text: str) -> Any:
    name, _, value = text.partition(" ")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return recipe_of(build_parser().parse_args(["prune", "m", "--out", "x", name, value]))


def _judge_memory(found: Any) -> None:
    sizes = [size for size in (found.device, found.host) if size is not None]
    hold(bool(sizes) and all(0 < size < 2**63 for size in sizes), "no size")


def _judge_budget(found: Any) -> None:
    hold((found.fraction is None) != (found.parameters is None), "neither or both")
    hold(found.fraction is None or 0 <= found.fraction < 1, "no fraction")
    hold(1 <= found.batch < 2**31 and 1 <= found.length < 2**31, "no shape")
    found.written(found.kept(10**9), 10**9)


def _judge_mixture(found: Any) -> None:
    hold(bool(found) and all(0 < weight < math.inf for weight in found.values()), "no weights")


def _strings() -> list[Target]:
    memory = ("20GiB", "device=20GiB,host=8GiB", "0.5TB", "800 MiB")
    budgets = ("params=0.25", "params=6B", "flops=0.25@8x2048", "latency=.1")
    mixtures = ("wikitext2:3,c4:1", "c4", "builtin:0.5,ptb", f"{TEXT}:2,c4")
    flags = [f"{name} {value}" for name, value in FLAGS.items()]
    return [
        _string("memory", 100, memory, parse_memory, _judge_memory),
        _string("budget", 100, budgets, parse_model_budget, _judge_budget),
        _string("mixture", 80, mixtures, parse_mixture, _judge_mixture),
        _string("options", 40, flags, _read_flags, lambda found: _judge_recipe(found, b"", Path())),
    ]
