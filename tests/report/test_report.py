"""The HTML report: what it says, that it is whole and needs nothing else, and a real browser."""

import base64
import dataclasses
import html
import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml

import cfsp
from cfsp.calibration.curves import ErrorCurve
from cfsp.checkpoints.documents import Result, read_result
from cfsp.cli.main import main
from cfsp.report.page import report_html
from cfsp.report.svg import Axis, kept_strip, round_ticks

from ..conftest import TEXT, make_tiny, make_tokenizer

HOSTILE = '</style><script src="http://evil.example/x.js"></script>{{ 7 * 7 }}'
VOID = {"meta", "img", "br", "link", "input", "hr"}


def prune_into(folder: Path, scorer: str) -> Result:
    calibration = cfsp.Calibration(dataset="builtin", samples=2, seqlen=32)
    recipe = cfsp.Recipe(sparsity=0.3, scorer=scorer, width_multiple=1, calibration=calibration)
    cfsp.prune(make_tiny(), make_tokenizer(), recipe, folder, eval_windows=2, progress=False)
    return read_result(folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Result]:
    """A plain result, and one whose names are an attack."""
    folder = tmp_path_factory.mktemp("report")
    plain = prune_into(folder / "tiny-cfsp", "cfsp")
    prune_into(folder / "<img src=x onerror=alert(1)>", "flap")
    hostile = folder / "<img src=x onerror=alert(1)>"
    record = yaml.safe_load((hostile / "recipe.yaml").read_text())
    record["provenance"]["model"] = HOSTILE
    (hostile / "recipe.yaml").write_text(yaml.safe_dump(record))
    return [plain, read_result(hostile)]


@pytest.fixture(scope="module")
def evaluations(results: list[Result]) -> list[dict]:
    return [
        {
            "model": name,
            "perplexity": 100.0 * place,
            "speed": {
                "prefill_tokens_per_second": 50.0 * place,
                "decode_tokens_per_second": 10.0,
                "peak_memory_bytes": 1 << 30,
            },
            "tasks": {"questions": {"acc": place / 4, "acc_stderr": 0.1}},
        }
        for place, name in ((1, results[0].dense_name), (2, str(results[0].folder)))
    ]


@pytest.fixture(scope="module")
def page(results: list[Result], evaluations: list[dict]) -> str:
    return report_html(results, evaluations)


class Elements(HTMLParser):
    """All elements and the text, and whether every tag is closed where it was opened."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def test_the_page_is_whole_and_asks_for_nothing(page: str) -> None:
    elements = Elements(page).elements
    tags = [tag for tag, _ in elements]
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(tags)
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids)) >= 4
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes)
        assert (
            str(attributes.get("src", "data:")).startswith("data:image/png;base64,") or tag != "img"
        )
        if "href" in attributes:
            assert str(attributes["href"]).removeprefix("#") in ids
    assert "url(" not in page
    assert "@import" not in page
    policy = dict(elements[tags.index("meta") + 4][1])
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_names_are_text(page: str, results: list[Result]) -> None:
    parsed = Elements(page)
    assert HOSTILE in parsed.text
    assert results[1].name in parsed.text
    assert [tag for tag, _ in parsed.elements if tag == "img"] == ["img"] * 8


def test_what_is_seen_is_also_said(page: str) -> None:
    """Every picture has a text, every chart a label, and scrolled tables can be reached."""
    for tag, attributes in Elements(page).elements:
        if tag == "img":
            assert re.fullmatch(r"block \d+: \d+ of 48 kept", str(attributes["alt"]))
        if tag == "svg" and "area" in str(attributes["class"]):
            assert (attributes["role"], bool(attributes["aria-label"])) == ("img", True)
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]


def test_the_numbers_are_those_of_the_plan_and_the_run(results: list[Result], page: str) -> None:
    text = Elements(page).text
    for result in results:
        for block in result.plan.blocks:
            assert f"{block.importance:.5f}" in text
        measured = result.measured
        assert f"{measured['parameters_after']:,}" in text
        assert f"{measured['perplexity_after']['perplexity']:,.2f}" in text
        assert result.plan.model_fingerprint in text
    widths = re.findall(r"<title>block \d+: (\d+) of 48 channels kept", page)
    assert [int(width) for width in widths] == [w for r in results for w in r.plan.widths]


def test_measured_speed_is_set_beside_the_dense_models(page: str) -> None:
    text = Elements(page).text
    assert "+100.0% from 50.0" in text
    assert "questions, acc" in text
    assert "acc_stderr" not in text
    rows = re.findall(r'bar-text">([\d.x ()]+)<', page)
    assert {"50.0", "100.0 (2.00x)", "0.2500", "0.5000"} <= set(rows)
    assert 'style="width:50.00%"' in page


def test_results_are_compared_with_the_dense_model_that_all_were(results: list[Result]) -> None:
    plain = results[0]
    recipe = dataclasses.replace(plain.plan.recipe, allocator="knapsack", compensation="bias")
    plan = dataclasses.replace(plain.plan, recipe=recipe)
    other = dataclasses.replace(plain, folder=Path("other"), plan=plan)
    renamed = {**plain.record["provenance"], "model": "another"}
    labels = re.compile(r'bar-label">([^<]*)<')
    for second, dense in ((other, ["dense"]), (with_record(other, provenance=renamed), [])):
        table, _, rest = report_html([plain, second]).partition("<h3>Perplexity</h3>")
        bars = rest.partition("</section>")[0]
        assert labels.findall(bars) == [*dense, "tiny-cfsp", "other"]
    assert re.findall(r"<td>([\w-]+)</td>", table) == [
        "cfsp", "cfsp", "none", "cfsp", "knapsack", "bias"
    ]  # fmt: skip


def test_the_recipe_names_what_had_an_effect(results: list[Result]) -> None:
    def names(**choices: object) -> str:
        recipe = dataclasses.replace(results[0].plan.recipe, **choices)
        plan = dataclasses.replace(results[0].plan, recipe=recipe)
        text = Elements(report_html([dataclasses.replace(results[0], plan=plan)])).text
        return text.partition("Recipe")[2].partition("Every block")[0]

    plain = names()
    assert "width multiple" in plain
    assert not any(name in plain for name in ("epochs", "learning rate", "search", "error scale"))
    assert "epochs" in names(compensation="blockwise")
    knapsack = names(allocator="knapsack")
    assert "error scale" in knapsack
    assert "search" not in knapsack
    searched = names(allocator="search", search_windows=2)
    assert "search windows" in searched
    assert "importance exponent" in searched


@pytest.mark.parametrize(("trust", "stock"), [(True, False), (False, True)])
def test_the_trust_flag_is_named_only_where_it_is_needed(
    results: list[Result], trust: bool, stock: bool
) -> None:
    config = {"model_type": "llama" if stock else "cfsp_llama"}
    page = report_html([dataclasses.replace(results[0], config=config)])
    assert ("trust_remote_code" in page) is trust
    assert "cfsp export tiny-cfsp --to gguf" in page


def test_a_plan_of_an_earlier_version_has_no_scores_to_show(
    results: list[Result], tmp_path: Path
) -> None:
    folder = shutil.copytree(results[0].folder, tmp_path / "old")
    document = json.loads((folder / "plan.json").read_text())
    for block in document["blocks"]:
        assert len(block.pop("score_quantiles").split()) == 33
    (folder / "plan.json").write_text(json.dumps(document))
    assert "Scores of the channels" in report_html([results[0]])
    assert "Scores of the channels" not in report_html([read_result(folder)])


def with_record(pruned: Result, **changes: object) -> Result:
    """The result with more in recipe.yaml."""
    record = {**pruned.record, **changes}
    record["result"] = {**pruned.record["result"], **changes.get("result", {})}
    return dataclasses.replace(pruned, record=record)


def test_least_squares_and_error_curves_are_shown_where_they_are_known(
    results: list[Result],
) -> None:
    fits = [
        {"block": 0, "ffns": 1, "applied": 1, "error_before": 0.5, "error_after": 0.25},
        {"block": 2, "ffns": 1, "applied": 0, "error_before": 0.125, "error_after": 0.375},
        {"block": 3, "ffns": 2, "applied": 2, "error_before": None, "error_after": None},
    ]
    widths = torch.tensor([0, 24, 48])
    curves = {
        1: ErrorCurve(widths, torch.tensor([8.0, 2.0, 0.0]).double()),
        2: ErrorCurve(widths, torch.tensor([0.0, 0.0, 0.0]).double()),
        3: ErrorCurve(widths, torch.tensor([1.0, torch.nan, 0.0]).double()),
    }
    plan = results[0].plan
    blocks = tuple(
        dataclasses.replace(block, error_curves=(curves[number],) if number in curves else ())
        for number, block in enumerate(plan.blocks)
    )
    known = with_record(results[0], result={"fits": fits})
    page = report_html([dataclasses.replace(known, plan=dataclasses.replace(plan, blocks=blocks))])
    text = Elements(page).text
    assert "block 0: error 0.5 without, 0.25 with the fit; fitted" in text
    assert "block 2: error 0.125 without, 0.375 with the fit; left as it was" in text
    assert "block 3: error" not in text
    assert "2 of 2" in text
    width = results[0].plan.widths[1]
    error = 0.25 * (48 - width) / 24 if width > 24 else 1 - 0.75 * width / 24
    assert f"block 1: {100 * width / 48:.0f}% kept, error {error:.3g}" in text
    assert page.count('class="curve"') == 1
    plain = Elements(report_html(results[:1])).text
    assert "Least squares" not in plain
    assert "Error curves" not in plain
    assert "Blocks fitted again" not in plain


def test_blocks_fitted_again_are_shown_where_the_errors_are_known(results: list[Result]) -> None:
    refits = [
        {"block": 0, "way": "sequential", "errors": [0.5, 0.25], "kept": 1},
        {"block": 0, "way": "blockwise", "errors": [0.25, 0.0625, 0.125], "kept": 1},
        {"block": 1, "way": "blockwise", "errors": [0.375, 0.75], "kept": 0},
        {"block": 2, "way": "blockwise", "errors": [0.5, float("nan")], "kept": 1},
        {"block": 3, "way": "sequential", "errors": [], "kept": 1},
        {"block": 3, "way": "sequential", "errors": [1.0], "kept": 7},
        {"block": "x"},
    ]
    page = report_html([with_record(results[0], result={"refits": refits})])
    assert re.findall(r"<title>(block \d: error .*?)</title>", page) == [
        "block 0: error 0.5 as cut",
        "block 0: error 0.25 after the closed form",
        "block 0: error 0.0625 after epochs of Adam",
        "block 1: error 0.375 as cut",
        "block 1: error 0.375 after epochs of Adam",
    ]
    rows = re.findall(r'<tr><th scope="row">(\d)</th><td>(\w+)</td>(.*?)</tr>', page)
    assert [(block, way) for block, way, _ in rows if way in ("sequential", "blockwise")] == [
        ("0", "sequential"), ("0", "blockwise"), ("1", "blockwise"), ("2", "blockwise"),
        ("3", "sequential"),
    ]  # fmt: skip
    assert "0.0625, 0.125</td>" in page


def test_a_run_that_fits_and_allocates_by_error_shows_all_of_it(tmp_path: Path) -> None:
    recipe = cfsp.Recipe(
        sparsity=0.3,
        scorer="obs",
        allocator="knapsack",
        compensation="blockwise",
        sequential=True,
        epochs=1,
        width_multiple=1,
        calibration=cfsp.Calibration(dataset=TEXT, samples=4, seqlen=64),
    )
    run = cfsp.prune(
        make_tiny(), make_tokenizer(), recipe, tmp_path / "all", eval_windows=0, progress=False
    )
    found = read_result(tmp_path / "all")
    assert found.refits == list(run.report.refits)
    page = report_html([found])
    assert page.count('class="curve"') == len(run.plan.blocks) == 4
    for block, plan in enumerate(run.plan.blocks):
        (curve,) = plan.error_curves
        error = float(curve.at(torch.tensor([plan.width])) / curve.errors[0])
        assert f"block {block}: {100 * plan.width / 48:.0f}% kept, error {error:.3g}" in page
        assert f"block {block}: error {run.report.fits[block][0].error_before:.3g} without" in page
    shown = re.findall(r"<title>block \d: error \S+ (as cut|after .*?)</title>", page)
    assert shown == ["as cut", "after the closed form", "after epochs of Adam"] * 4


def test_a_recovery_on_the_same_text_is_the_last_perplexity(results: list[Result]) -> None:
    measured = results[0].measured["perplexity_after"]
    recovery = [
        {"settings": {"steps": 7}, "result": {"perplexity_after": {**measured, **changes}}}
        for changes in ({"perplexity": 12.5}, {"perplexity": 3.25, "windows": 99})
    ]
    text = Elements(report_html([with_record(results[0], recovery=recovery)])).text
    assert text.count("12.50") == 2  # tile and bar
    assert "3.25" not in text.partition("Recovery 1")[0]
    assert "settings · steps" in text


def pixels(uri: str) -> tuple[int, list[int]]:
    """(width, levels) of a strip's PNG."""
    data = base64.b64decode(uri.partition(",")[2])
    chunks, at = {}, 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert zlib.crc32(kind + body) == int.from_bytes(data[at + 8 + length : at + 12 + length])
        chunks[kind] = body
        at += 12 + length
    row = zlib.decompress(chunks[b"IDAT"])[1:]
    width = int.from_bytes(chunks[b"IHDR"][:4])
    return width, [level for byte in row for level in (byte >> 4, byte & 15)][:width]


def test_a_strip_shows_which_channels_are_kept() -> None:
    assert pixels(kept_strip(torch.tensor([0, 3, 4]), 5)) == (5, [15, 0, 0, 15, 15])
    width, levels = pixels(kept_strip(torch.arange(1024, 2048), 2048))
    assert (width, levels) == (512, [0] * 256 + [15] * 256)
    assert set(pixels(kept_strip(torch.arange(0, 1024, 2), 1024))[1]) == {8}


def test_axes_have_few_round_ticks() -> None:
    assert round_ticks(0, 1536) == [0, 500, 1000, 1500]
    assert round_ticks(0, 0.495) == pytest.approx([0, 0.2, 0.4])
    assert Axis(1.4, 110, 100, log=True).ticks() == [2, 5, 10, 20, 50, 100]
    assert Axis(0.5, 2e6, 100, log=True).ticks() == [1e1, 1e3, 1e5]


def cli(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main(["report", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_command_writes_the_page_and_the_pictures(
    results: list[Result],
    evaluations: list[dict],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, pictures, measured = (tmp_path / name for name in ("a/r.html", "pictures", "e.json"))
    measured.write_text(json.dumps({"models": evaluations}))
    arguments = (results[0].folder, "--out", out, "--evaluation", measured)
    code, said = cli(capsys, *arguments, "--png", pictures, "--json")
    assert code == 0
    assert out.read_text() == report_html(results[:1], evaluations)
    written = json.loads(said)
    assert written["report"] == str(out)
    assert [Path(path).name for path in written["pictures"]] == [
        f"tiny-cfsp-{kind}.png" for kind in ("widths", "kept", "scores")
    ]
    for picture in written["pictures"]:
        assert Path(picture).read_bytes().startswith(b"\x89PNG")
    code, said = cli(capsys, *arguments)
    assert (code, said.strip()) == (2, f"cfsp: error: output {out} exists; --overwrite replaces it")
    assert cli(capsys, *arguments, "--overwrite")[0] == 0


def test_a_mistake_is_one_line_and_writes_nothing(
    results: list[Result], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.json").write_text('{"models": [{"perplexity": 3}]}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "empty").mkdir()
    shutil.copy(results[0].folder / "plan.json", tmp_path / "broken")
    shutil.copy(results[0].folder / "config.json", tmp_path / "broken")
    (tmp_path / "broken" / "recipe.yaml").write_text("- 1")
    plain, out = results[0].folder, tmp_path / "r.html"
    for arguments, message in (
        ((tmp_path / "empty",), "has no plan.json; a report is of a folder that cfsp prune wrote"),
        ((tmp_path / "broken",), "recipe.yaml must be a mapping"),
        ((plain, "--evaluation", tmp_path / "absent"), "cannot read evaluation"),
        ((plain, "--evaluation", tmp_path / "wrong.json"), "is not what cfsp evaluate --json"),
        ((plain, plain, "--png", tmp_path / "p"), "two of them have one name"),
        ((tmp_path,), "r.html is inside the input"),
    ):
        code, said = cli(capsys, *arguments, "--out", out)
        assert (code, len(said.splitlines())) == (2, 1)
        assert message in said
        assert not out.exists()
    assert not (tmp_path / "p").exists()


def test_a_browser_shows_it_without_errors_or_requests(page: str, tmp_path: Path) -> None:
    """Dark, and as narrow as a phone, with no word of a table on two lines. The third frame is what
    a request would look like."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium")
    asking = page.replace("</main>", '<img src="https://example.invalid/x.png" alt=""></main>')
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{html.escape(content)}"></iframe>'
        for width, content in ((320, page), (1280, page), (320, asking))
    )
    script = """onload = () => document.querySelectorAll("iframe").forEach(frame => {
        const page = frame.contentDocument
        const root = page.documentElement
        console.log("seen", frame.width, root.scrollWidth - root.clientWidth,
            frame.contentWindow.getComputedStyle(page.body).backgroundColor,
            page.querySelector("rect.kept").getBoundingClientRect().width > 1,
            [...page.querySelectorAll("td, #compared thead th")].every(cell => {
                const text = page.createRange()
                text.selectNodeContents(cell)
                const lines = text.getClientRects().length
                return lines <= (cell.tagName == "TH" ? cell.textContent.split(" ").length : 1)
            }))
    })"""
    (tmp_path / "frames.html").write_text(f"<!doctype html>{frames}<script>{script}</script>")
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--blink-settings=preferredColorScheme=0", "--enable-logging=stderr",
            f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    said = re.findall(r'CONSOLE[^"]*"(.*)", source:', done.stderr)
    dark = "rgb(15, 20, 27) true true"
    assert [line for line in said if line.startswith("seen")] == [
        f"seen 320 0 {dark}", f"seen 1280 0 {dark}", f"seen 320 0 {dark}"
    ]  # fmt: skip
    (refused,) = [line for line in said if not line.startswith("seen")]
    assert "https://example.invalid/x.png" in refused
    assert "img-src data:" in refused
