"""What can be read from files and folders, which column of a table, and what is said where none
fits."""

import bz2
import gzip
import json
import lzma
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import csv, parquet
from transformers import PreTrainedTokenizerFast

import cfsp
from cfsp.calibration.text import CALIBRATE, EVALUATE, check_dataset, load_text
from cfsp.calibration.windows import Calibration, calibration_tokens
from cfsp.errors import CfspError

from ..cli.test_cli import run
from ..conftest import make_tokenizer

TEXTS = ["one two", "three", "four"]
JOINED = "one two three four"
ROLES = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def write_arrow(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_lines(table: pa.Table, path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))


def write_list(table: pa.Table, path: Path) -> None:
    path.write_text(json.dumps(table.to_pylist(), indent=1))


WRITERS: dict[str, Callable[[pa.Table, Path], None]] = {
    "a.parquet": lambda table, path: parquet.write_table(table, path),
    "a.arrow": write_arrow,
    "b.arrow": write_stream,
    "a.jsonl": write_lines,
    "lines.json": write_lines,
    "list.JSON": write_list,
}
FLAT = {
    "a.csv": lambda table, path: csv.write_csv(table, path),
    "a.tsv": lambda table, path: csv.write_csv(table, path, csv.WriteOptions(delimiter="\t")),
}


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zst}

STRINGS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "categorical": pa.dictionary(pa.int32(), pa.string()),
    "large categorical": pa.dictionary(pa.int8(), pa.large_string()),
}
BESIDE = {
    "struct": [{"source": "x", "n": 1}, None, {"source": "y", "n": 2}],
    "list": [["a"], [], ["b", "c"]],
    "deep": [[{"a": [{"b": 1}]}], [], None],
    "numbers": [1.5, 2.5, None],
    "nulls": [None, None, None],
    "strings": ["x", "y", "z"],
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("kind", STRINGS)
def test_every_kind_of_string_is_text(name: str, kind: str, tmp_path: Path) -> None:
    column = pa.array(TEXTS)
    if pa.types.is_dictionary(STRINGS[kind]):
        column = column.dictionary_encode()
    table = pa.table({"id": [1, 2, 3], "sentence": column.cast(STRINGS[kind])})
    WRITERS[name](table, tmp_path / name)
    assert load_text(str(tmp_path / name), CALIBRATE) == JOINED


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("beside", BESIDE)
def test_anything_may_be_beside_the_text(name: str, beside: str, tmp_path: Path) -> None:
    WRITERS[name](pa.table({"first": BESIDE[beside], "text": TEXTS}), tmp_path / name)
    assert load_text(str(tmp_path / name), CALIBRATE) == JOINED


def test_what_is_beside_the_text_in_json_may_change_its_type(tmp_path: Path) -> None:
    rows = [{"text": text, "meta": meta} for text, meta in zip(TEXTS, (1, {"a": 2}, "x"))]  # noqa: B905
    assert load_text(jsonl(tmp_path / "a.jsonl", *rows), CALIBRATE) == JOINED


@pytest.mark.parametrize("name", [*WRITERS, *FLAT])
def test_nulls_are_skipped(name: str, tmp_path: Path) -> None:
    table = pa.table({"n": [1, 2, 3, 4, 5], "text": [None, "one two", None, "three", "four"]})
    (WRITERS | FLAT)[name](table, tmp_path / name)
    assert load_text(str(tmp_path / name), CALIBRATE) == JOINED
    assert load_text(str(tmp_path / name), EVALUATE) == "one two\n\nthree\n\nfour"


@pytest.mark.parametrize("name", [*WRITERS, *FLAT])
def test_nothing_but_nulls_is_one_line(name: str, tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([None, None], pa.string()), "n": [1, 2]})
    (WRITERS | FLAT)[name](table, tmp_path / name)
    with pytest.raises(CfspError, match=f"{name}' has no text: all its rows are null$"):
        load_text(str(tmp_path / name), CALIBRATE)


def test_empty_strings_are_separators_as_ever(tmp_path: Path) -> None:
    """WikiText's protocol counts them."""
    parquet.write_table(pa.table({"text": ["", "a", "", "b"]}), tmp_path / "a.parquet")
    assert load_text(str(tmp_path / "a.parquet"), EVALUATE) == "\n\na\n\n\n\nb"


def test_cells_of_csv_may_be_quoted_long_and_of_several_lines(tmp_path: Path) -> None:
    long = "word " * 60_000
    file = tmp_path / "a.csv"
    file.write_bytes(
        f'\ufeffn,text\r\n1,"say ""hi"",\nbob"\r\n2,{long}\r\n3,\r\n4\r\n5,x\r\n'.encode()
    )
    assert load_text(str(file), CALIBRATE) == f'say "hi",\nbob {long} x'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nhello, world\n", "row 1 has more than the 1 fields of its header"),
        ("a.csv", "id,text\n1,fine\n2,Well, then\n", "row 2 has more than the 2 fields"),
        ("a.tsv", "text\na\tb\n", r"put fields that hold '\\t' in quotes"),
        ("a.csv", "text,text\na,b\n", "has two columns of one name: 'text, text'"),
        ("a.txt", "text\0", "is not text, it has NUL at byte 4"),
        ("a.tar", "ok\n\0\0", "is not text, it has NUL at byte 3"),
        ("a.jsonl", '{"text": ["a"], "id": "x"}\n', "column 'text' of .* has no strings"),
        ("a.jsonl", '{"text": {"a": 1}, "lang": "en"}\n', "column 'text' of .* has no strings"),
    ],
)
def test_what_would_be_read_otherwise_than_meant_is_refused(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CfspError, match=message):
        load_text(str(tmp_path / name), CALIBRATE)


def test_ndjson_is_jsonl_and_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "a.txt").write_text("\ufeffa b")
    for name in ("a.ndjson", "a.txt"):
        assert load_text(str(tmp_path / name), CALIBRATE) == "a b"


@pytest.mark.parametrize("name", ["../elsewhere/x.arrow", "/etc/passwd", "a/b.arrow"])
def test_a_saved_folder_names_its_own_files_alone(name: str, tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    state = tmp_path / "saved" / "state.json"
    state.write_text(state.read_text().replace("data-00000-of-00001.arrow", name))
    with pytest.raises(CfspError, match=r"state\.json names '.*', which is not in its folder"):
        load_text(str(tmp_path / "saved"), CALIBRATE)


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", [*WRITERS, *FLAT, "a.txt", "LICENSE"])
def test_compressed_files_are_what_they_hold(suffix: str, name: str, tmp_path: Path) -> None:
    plain, packed = tmp_path / name, tmp_path / f"{name}{suffix}"
    if name in ("a.txt", "LICENSE"):
        plain.write_text(JOINED)
    else:
        (WRITERS | FLAT)[name](pa.table({"n": [1, 2, 3], "text": TEXTS}), plain)
    packed.write_bytes(COMPRESS[suffix](plain.read_bytes()))
    assert load_text(str(packed), CALIBRATE) == JOINED


@pytest.mark.parametrize("suffix", COMPRESS)
def test_several_frames_are_read_and_a_torn_file_is_refused(suffix: str, tmp_path: Path) -> None:
    data, file = bytes(os.urandom(50_000).hex(), "ascii"), tmp_path / f"a.txt{suffix}"
    file.write_bytes(COMPRESS[suffix](data) + COMPRESS[suffix](b" end"))
    assert load_text(str(file), CALIBRATE) == data.decode() + " end"
    for damaged in (COMPRESS[suffix](data)[:-900], b"not compressed"):
        file.write_bytes(damaged)
        with pytest.raises(CfspError, match=rf"cannot load dataset '.*a.txt{suffix}': \w+: \w"):
            load_text(str(file), CALIBRATE)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "a", "content": "b", "messages": [{"role": "user", "content": "c"}]}, "a"),
        ({"path": "x.py", "content": "b", "license": "mit"}, "b"),
        ({"n": 1, "sentence": "d", "tags": ["x"]}, "d"),
        ({"prompt_id": "x", "messages": [{"role": "user", "content": "c"}]}, "<user>c"),
        ({"id": "x", "conversations": [{"from": "human", "value": "c"}]}, "<user>c"),
        ({"messages": "no chat", "n": 1}, "no chat"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_the_column_is_found(row: dict[str, object], text: str, name: str, tmp_path: Path) -> None:
    WRITERS[name](pa.Table.from_pylist([row]), tmp_path / name)
    assert load_text(str(tmp_path / name), CALIBRATE, None, with_template()) == text


def with_template(template: str = ROLES) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "b.arrow"])
@pytest.mark.parametrize(
    ("chat", "text"),
    [
        ([{"role": "system", "content": "s"}, {"role": "x", "content": "u"}], "<system>s<x>u"),
        (
            [{"from": "system", "value": "s"}, {"from": "human", "value": "u"},
             {"from": "gpt", "value": "a"}],
            "<system>s<user>u<assistant>a",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": part} for part in "ab"]}],
            "<user>ab",
        ),
        ([{"role": "assistant", "content": None, "weight": 1}], "<assistant>"),
        ([{"role": "assistant", "tool_calls": [{"name": "f"}]}], "<assistant>"),
    ],
)  # fmt: skip
def test_chats_go_through_the_chat_template(
    name: str, chat: list[object], text: str, tmp_path: Path
) -> None:
    rows = [{"id": "x", "talk": chat}, {"id": "y", "talk": None}, {"id": "z", "talk": chat}]
    WRITERS[name](pa.Table.from_pylist(rows), tmp_path / name)
    found = load_text(str(tmp_path / name), EVALUATE, "talk", with_template())
    assert found == f"{text}\n\n{text}"


@pytest.mark.parametrize(
    ("chat", "template", "told"),
    [
        ([{"role": "user", "content": "u"}], None, "no chat template.*columns: id .string., mess"),
        ([{"role": "user", "content": "u"}], "{{ raise_exception('odd') }}", "fails: Templ.*: odd"),
        ([{"role": "u", "content": [{"type": "image", "text": "u"}]}], ROLES, "parts that are not"),
    ],
)
def test_chats_that_cannot_be_text_are_one_line(
    chat: list[object], template: str | None, told: str, tmp_path: Path
) -> None:
    tokenizer = with_template(template) if template else make_tokenizer()
    file = jsonl(tmp_path / "a.jsonl", {"id": "x", "messages": chat})
    with pytest.raises(CfspError, match=f"a.jsonl, row 1 of column 'messages': .*{told}"):
        load_text(file, CALIBRATE, None, tokenizer)


@pytest.mark.parametrize(
    ("row", "column", "told"),
    [
        ({"n": 1, "tags": ["a"]}, None, r"of strings, or messages, conversations or content, got "
         r"n \(int64\), tags \(list<\w+: string>\); `text_column` names another"),
        ({"a": "x", "b": "y"}, None, r"got a \(string\), b \(string\); `text_column` names"),
        ({"a": "x", "n": 1}, "gone", r"`text_column` 'gone' is not in .*: a \(string\), n \(int64"),
        ({"a": "x", "n": 1}, "n", r"`text_column` 'n' of .* has neither strings nor chats; its"),
        ({"text": "x", "n": {"a": 1}}, "n", r"neither .*: text \(string\), n \(struct<a: int64>\)"),
    ],
)  # fmt: skip
def test_where_no_column_fits_their_names_and_types_are_told(
    row: dict[str, object], column: str | None, told: str, tmp_path: Path
) -> None:
    parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    with pytest.raises(CfspError, match=told):
        load_text(str(tmp_path / "a.parquet"), CALIBRATE, column)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "a.jsonl has no rows"),
        (b"\n\n", "a.jsonl has no rows"),
        (b"[]", "a.jsonl has no rows"),
        (b'"text"\n"text"\n', "row 1 is no object with columns"),
        (
            b'{"text": "a"}\n{"text": "b"\n',
            r"is neither JSON nor an object a line, at line 2: '{\"text\": \"b\"'",
        ),
        (b'{"text": "a"}\n' * 1500 + b'{"text": 5}\n', "row 1501 of .*: not text but of type int"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl is not text in UTF-8, at byte 24$"),
        (b'{"text": ' + b"[" * 100_000, "RecursionError"),
        (b"[" * 100_000, "RecursionError"),
        ('{"text": "a"}'.encode("utf-16"), "a.jsonl is not text in UTF-8, at byte 0$"),
    ],
)
def test_what_is_no_table_is_one_line(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(CfspError, match=told) as caught:
        load_text(str(tmp_path / "a.jsonl"), CALIBRATE)
    assert "\n" not in str(caught.value)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a\\ud800b \\ud83d\\ude00"}')
    assert load_text(str(file), CALIBRATE) == "a?b 😀"


@pytest.mark.parametrize(
    ("content", "byte"), [(b"\xff\xfe\xfa", 0), (b"abc\n" * 10 + b"\xe9", 40), (b"a\xc3(", 1)]
)
def test_text_that_is_not_utf_8_is_told_with_the_byte(
    content: bytes, byte: int, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(CfspError, match=f"a.txt is not text in UTF-8, at byte {byte}$"):
        load_text(str(tmp_path / "a.txt"), CALIBRATE)


def test_line_ends_of_plain_text_are_newlines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a\r\nb\rc\n\u2028é".encode())
    assert load_text(str(tmp_path / "a.txt"), CALIBRATE) == "a\nb\nc\n\u2028é"


@pytest.mark.parametrize(
    "name", ["a.txt", "data/b", "c.jsonl.gz", "d.parquet:3", "./e", "f.CSV", "g.tsv.zst"]
)
def test_a_missing_file_is_called_so(name: str) -> None:
    with pytest.raises(CfspError, match=rf"^dataset '{name}': no such file$"):
        check_dataset(name)


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "fifo", "fifo.jsonl"])
def test_devices_and_pipes_are_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if not name.startswith("/dev"):
        os.mkfifo(name)
    with pytest.raises(CfspError, match=f"dataset '{name}' is neither a file nor a folder"):
        load_text(name, CALIBRATE)


def splits(folder: Path, *names: str, suffix: str = ".jsonl") -> Path:
    folder.mkdir(parents=True)
    for name in names:
        jsonl(folder / f"{name}{suffix}", {"text": name, "meta": 1}, {"text": "x", "meta": {}})
    return folder


@pytest.mark.parametrize("form", ["hub", "in data/", "shards", "saved", "gz"])
@pytest.mark.parametrize(
    ("names", "calibrated", "evaluated"),
    [
        (("train", "validation", "test"), "train", "test"),
        (("train", "validation"), "train", "validation"),
        (("train",), "train", "train"),
        (("test",), "test", "test"),
    ],
)
def test_a_folder_has_splits(
    form: str, names: tuple[str, ...], calibrated: str, evaluated: str, tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    if form == "saved":
        rows = {name: Dataset.from_dict({"text": [name, "x"], "n": [{}, {}]}) for name in names}
        DatasetDict(rows).save_to_disk(folder)
    elif form == "in data/":
        splits(folder / "data", *names)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    elif form == "shards":
        splits(folder, *(f"{name}-00000-of-00001" for name in names))
    else:
        splits(folder, *names)
    if form == "gz":
        for file in list(folder.iterdir()):
            (folder / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    said = {purpose: load_text(str(folder), purpose) for purpose in (CALIBRATE, EVALUATE)}
    assert said[CALIBRATE].split("-")[0].split()[0] == calibrated
    assert said[EVALUATE].split("-")[0].split("\n")[0] == evaluated


def test_a_shard_of_nulls_is_passed_over(tmp_path: Path) -> None:
    folder = splits(tmp_path / "set", "train-00001-of-00003", "train-00002-of-00003")
    jsonl(folder / "train-00000-of-00003.jsonl", {"text": None}, {"text": None})
    assert load_text(str(folder), CALIBRATE) == "train-00001-of-00003 x train-00002-of-00003 x"


def test_the_cards_own_splits_count(tmp_path: Path) -> None:
    folder = splits(tmp_path / "set", "a", "b")
    configs = (
        "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.jsonl\n"
    )
    (folder / "README.md").write_text(f"---\n{configs}  - split: test\n    path: a.jsonl\n---\n")
    assert load_text(str(folder), CALIBRATE) == "b x"
    assert load_text(str(folder), EVALUATE) == "a\n\nx"


def card_outside(folder: Path) -> None:
    configs = "configs:\n- config_name: default\n  data_files: ../secret.jsonl\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n")


def two_configs(folder: Path) -> None:
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.jsonl\n" for n in ("train", "dev"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


def other_splits(folder: Path) -> None:
    (folder / "train.jsonl").unlink()
    Dataset.from_dict({"text": ["x"]}).save_to_disk(folder / "saved")
    names = {name: Dataset.from_dict({"text": ["x"]}) for name in ("left", "right")}
    DatasetDict(names).save_to_disk(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (card_outside, r"README names '.*secret.jsonl', outside of the folder"),
        (two_configs, "pick one among the available configs"),
        (other_splits, "has no split train, got left, right"),
        (lambda folder: os.mkfifo(folder / "README.md"), "README.md is neither a file nor a fo"),
        (lambda folder: os.mkfifo(folder / "state.json"), "state.json is neither a file nor"),
        (lambda folder: (folder / "train.jsonl").unlink(), "doesn't contain any data files"),
        (lambda folder: (folder / "set.py").write_text("raise SystemExit('it ran')"),
         "Dataset scripts are no longer supported"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_read_is_one_line_and_its_code_never_runs(
    change: Callable[[Path], None], told: str, tmp_path: Path
) -> None:
    jsonl(tmp_path / "secret.jsonl", {"text": "s"})
    folder = splits(tmp_path / "set", "train")
    change(folder)
    with pytest.raises(CfspError, match=told) as caught:
        load_text(str(folder), CALIBRATE)
    assert "\n" not in str(caught.value)
    assert "set" not in sys.modules


def test_the_column_is_a_setting_of_calibration_and_of_recipes(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "t" * 99, "body": "b" * 99})
    for column, letter in ((None, "t"), ("body", "b")):
        settings = Calibration(f"{file},builtin", 4, 16, text_column=column)
        found = calibration_tokens(make_tokenizer(), settings)
        assert letter * 16 in [make_tokenizer().decode(window) for window in found]
    recipe = cfsp.Recipe(calibration=Calibration(file, text_column="body"))
    assert cfsp.pruning.recipe.recipe_from_dict(recipe.to_dict()) == recipe


def test_every_command_takes_the_column(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = jsonl(
        tmp_path / "a.jsonl", *({"a": "some words", "b": "other words"} for _ in range(200))
    )
    text = ("--dataset", file, "--text-column", "b")
    small = ("--samples", 4, "--seqlen", 16, "--quiet")
    out, back = tmp_path / "out", tmp_path / "back"
    for command in (
        ("prune", tiny_folder, "--out", out, *text, *small, "--width-multiple", 1,
         "--eval-windows", 0),
        ("recover", out, "--out", back, "--steps", 1, "--batch-size", 2, "--eval-windows", 0,
         "--quiet"),
        ("evaluate", back, *text, "--seqlen", 16, "--windows", 2),
        ("calibrate", tiny_folder, "--out", tmp_path / "s.safetensors", *text, *small),
    ):  # fmt: skip
        code, _, error = run(capsys, *command)
        assert code == 0, error
    assert "text_column: b" in (back / "recipe.yaml").read_text()
    code, _, error = run(capsys, "evaluate", out, "--dataset", file, "--seqlen", 16)
    assert code == 2
    assert "got a (string), b (string); --text-column names another" in error


@pytest.mark.parametrize("name", [*WRITERS, *FLAT, "a.jsonl.gz", "a.jsonl.zst", "saved"])
def test_damaged_files_are_text_or_one_line(name: str, tmp_path: Path) -> None:
    """Arrow's offsets are checked before they are followed: a wrong one would end the process."""
    table, file = pa.table({"n": [1, 2, 3] * 9, "text": TEXTS * 9}), tmp_path / name
    if name == "saved":
        Dataset(table).save_to_disk(file)
        (damaged,) = file.glob("*.arrow")
    else:
        damaged = file
        suffix = name.partition("jsonl.")[2]
        WRITERS.get(name, FLAT.get(name, write_lines))(table, file)
        if suffix:
            file.write_bytes(COMPRESS[f".{suffix}"](file.read_bytes()))
    good, draw, errors = damaged.read_bytes(), random.Random(0), []
    for number in range(150):
        data = bytearray(good)
        for _ in range(draw.choice((1, 3, 20))):
            data[draw.randrange(len(data))] = draw.choice((0, 127, 255, draw.randrange(256)))
        damaged.write_bytes(data if number % 3 else data[: draw.randrange(len(data))])
        try:
            assert isinstance(load_text(str(file), CALIBRATE), str)
        except CfspError as error:
            errors.append(str(error))
    assert len(errors) > 10
    assert not [error for error in errors if "\n" in error]
