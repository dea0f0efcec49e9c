"""The report: what it says, that it is whole and harmless, and how a browser shows it.

`LIGHTNING_PRUNE_SCREENSHOTS` names a folder to keep pictures of the pages in, to be looked at.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from lightning_prune.callbacks.monitor import SparsityMonitor
from lightning_prune.callbacks.pruning import Pruning
from lightning_prune.commands.report import main
from lightning_prune.moments import Epochs
from lightning_prune.plan import SparsityPlan
from lightning_prune.report import report
from lightning_prune.report.figures import thinned
from lightning_prune.report.folder import RunFolder
from lightning_prune.report.page import Page, at_night, escape
from lightning_prune.report.search import verdict
from lightning_prune.search.curves import Sensitivity
from lightning_prune.search.history import TrialRecord, save_trials
from lightning_prune.search.result import SearchResult
from lightning_prune.zoo import MLP, Classifier, Digits
from tests.browser import BROWSER, page
from tests.search.histories import DENSE, HOSTILE, MAX_DROP, history, result
from tests.support import trainer

VOID = {"meta", "br", "hr", "img", "input", "link"}
PLAN = SparsityPlan({"network.0.weight": 0.5})


class Reading(HTMLParser):
    """Keeps what a page holds, and refuses one that is not well-formed or reaches outside."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> inside <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[-1][-1][-1] += data
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def table(self, *header: str) -> list[list[str]]:
        """The rows of the table whose header begins so."""
        (found,) = [rows for rows in self.tables if rows and rows[0][: len(header)] == list(header)]
        return found[1:]


def read(path: Path) -> Reading:
    """The page, after a look at what must hold for any."""
    text = path.read_text(encoding="utf-8")
    found = Reading(text)
    tags = [tag for tag, _ in found.tags]
    assert text.startswith("<!DOCTYPE html>")
    assert set(tags).isdisjoint({"script", "link", "iframe", "object", "embed", "img", "form", "base", "foreignobject"})
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name in ("href", "src", "xlink:href", "action"):
                assert value is not None
                assert value.startswith("#"), f"{tag} links to {value}"
    assert "@import" not in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "prefers-color-scheme:dark" in style
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids)), "an id is there twice"
    referred = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert referred <= set(ids), f"refers to what is not there: {referred - set(ids)}"
    drawings = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert all(each.get("role") == "img" and len(each.get("aria-label") or "") > 20 for each in drawings)
    assert len(drawings) == tags.count("figure") == tags.count("figcaption")
    used = set(re.findall(r"var\(--c-([0-9a-f]{6})\)", text))
    assert all(style.count(f"--c-{colour}:") == 2 for colour in used), "a colour has no night"
    return found


def log(folder: Path, curves: dict[str, list[float]]) -> None:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in curves.items():
            for step, value in enumerate(values):
                writer.add_scalar(tag, value, 10 * step)


def sensitivity(names: tuple[str, ...] = ("net.0.weight", "net.2.weight")) -> Sensitivity:
    rows = tuple((0.9, 0.5 - 0.1 * place) for place in range(len(names)))
    return Sensitivity(names, (0.5, 0.9), {"val_acc": rows}, {"val_acc": 0.95}, 100)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Everything that a search leaves."""
    folder = tmp_path / "runs" / "digits" / "version_0"
    folder.mkdir(parents=True)
    result().save(folder / "search_result.json")
    save_trials(folder / "trials.json", history(60))
    (folder / "sensitivity").mkdir()
    sensitivity().save(folder / "sensitivity" / "sensitivity.json")
    log(folder, {"train_loss": [2.0, 1.0], "val_loss": [1.9, 1.1], "val_acc": [0.5, 0.96], "epoch": [0, 1]})
    log(folder / "recovery", {"val_acc_at_target": [0.93, 0.955], "sparsity/global": [0.8, 0.8]})
    (folder / "recipe.yaml").write_text(
        "# command: lightning-prune search --storage postgresql://me:secret@host/db\n# more\nseed_everything: 0\n"
    )
    (folder / "config.yaml").write_text("seed_everything: 7\n")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A search of which little is left."""
    folder = tmp_path / "small"
    result(measured_latency_s=math.nan).save(folder / "search_result.json")
    return folder


def test_a_search(run: Path) -> None:
    path = report(run)
    assert path == run / "report.html"
    found = read(path)
    assert (
        "Feasible: val_acc dropped by 0.0050 to 0.9550 (dense 0.9600; at most 0.01 was allowed), and a pass is 2.00 "
        "times as fast, measured." in found.text
    )
    assert found.table("", "dense", "found", "change") == [
        ["val_acc", "0.9600", "0.9550", "-0.0050"],
        ["val_acc before recovery", "", "0.9510", ""],
        ["measured latency, ms", "2", "1", "2.00x less"],
        ["estimated latency, ms", "1.9", "0.9", "2.11x less"],
        ["latency by the search (dense: its fastest kernels), ms", "2", "0.9", "2.22x less"],
        ["weights", "1500", "700", "2.14x less"],
        ["multiply-accumulates", "1500", "700", "2.14x less"],
    ]
    facts = {row[0]: row[1] for table in found.tables for row in table if len(row) == 2}
    assert facts["drop against threshold"] == "0.0050 of at most 0.01"
    assert facts["evaluations, the dense network's included"] == "33"
    assert facts["speedup, measured"] == "2.00x"
    assert facts["speedup, estimated"] == "2.11x"
    assert facts["seconds of search"] == "12.5"
    assert facts["device"] == "a machine"
    assert facts["command"] == "lightning-prune search --storage postgresql://me:***@host/db"
    assert "secret" not in path.read_text()
    assert found.table("layer", "sparsity", "kernel", "weights") == [
        ["net.0.weight", "0.8000", "csr", "1,000", "200", "0.4", "0.5", "1"],
        ["net.2.weight", "0.0000", "dense", "500", "500", "0.3", "0.3", ""],
    ]
    trials = found.table("trial", "state", "latency, ms", "val_acc")
    assert len(trials) == 60
    assert trials[0][1] == "complete"
    assert trials[4][1:4] == ["pruned", trials[4][2], "–"]
    assert trials[4][-1].startswith("a cost of 1 is not below")
    assert trials[6][3] == "diverged"
    assert "60 trials: 48 were evaluated" in found.text
    assert "budget and each group's coefficient" in found.text
    assert "pruned: estimated 0.9 ms, measured 1 ms, -10.0%" in found.text
    assert "seed_everything: 7" in found.text
    assert found.table("layer", "0.5", "0.9") == [
        ["net.0.weight", "0.9000", "0.5000"],
        ["net.2.weight", "0.9000", "0.4000"],
    ]
    figures = [attributes for tag, attributes in found.tags if tag == "svg"]
    assert len(figures) == 8
    assert path.stat().st_size < 700_000


def test_what_grew_says_so(tmp_path: Path) -> None:
    result(measured_latency_s=4e-3).save(tmp_path / "search_result.json")
    rows = read(report(tmp_path)).table("", "dense", "found", "change")
    assert ["measured latency, ms", "2", "4", "2.00x more"] in rows


def test_milliseconds_that_disagree_are_explained(tmp_path: Path) -> None:
    details = {"network_calibrated": "yes"}
    result(details=details).save(tmp_path / "search_result.json")
    assert "times its estimate" not in report(tmp_path).read_text()
    result(details=details, dense_measured_latency_s=3e-3).save(tmp_path / "search_result.json")
    assert "took 1.58 times its estimate: this machine was probably slower" in report(tmp_path).read_text()


def sections(path: Path) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", path.read_text())


def test_sections_are_those_of_what_is_there(run: Path) -> None:
    everything = [
        *("Result", "Trials", "The network that was found", "Estimate against measurement", "Recovery"),
        *("Training of the dense network", "Sensitivity", "Command and configuration"),
    ]
    assert sections(report(run)) == everything
    (run / "trials.json").unlink()
    (run / "sensitivity" / "sensitivity.json").unlink()
    for events in run.rglob("events.out*"):
        events.unlink()
    assert sections(report(run)) == [*everything[:1], *everything[2:4], everything[-1]]
    replace(result(), measured_latency_s=math.nan).save(run / "search_result.json")
    assert "Estimate against measurement" not in sections(report(run))
    for name in ("recipe.yaml", "config.yaml"):
        (run / name).unlink()
    assert sections(report(run)) == ["Result", "The network that was found"]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (result(accuracy=0.94, feasible=False), "Not feasible: val_acc dropped by 0.0200 to 0.9400"),
        (result(accuracy=0.97), "Feasible: val_acc is 0.9700"),
        (result(accuracy=math.nan, feasible=False), "Not feasible: val_acc of the network that was found is no finite"),
        (SearchResult.of_nothing("val_acc", "max", 0.01, DENSE), "Not feasible: no plan was evaluated"),
        (result(plan=SparsityPlan({})), "Feasible, but nothing is removed"),
        (result(measured_latency_s=math.nan), "with 2.22 times less latency, estimated."),
        (result(measured_latency_s=math.nan, cost=math.nan), "at most 0.01 was allowed)."),
        (result(mode="min", accuracy=1.0, dense_accuracy=0.995), "dropped by 0.0050 to 1.0000"),
    ],
)
def test_verdicts(tmp_path: Path, found: SearchResult, words: str) -> None:
    assert words in verdict(found)
    found.save(tmp_path / "search_result.json")
    shown = read(report(tmp_path))
    assert verdict(found) in shown.text
    kind = next(each["class"] for tag, each in shown.tags if tag == "p" and "verdict" in (each.get("class") or ""))
    assert kind == f"verdict {'good' if found.feasible else 'bad'}"
    for word in ("nan", "inf", "None"):
        assert not re.search(rf"\b{word}\b", shown.text), f"the page says {word}"


@pytest.mark.parametrize("number", [0, 1, 7, 200])
def test_any_number_of_trials(tmp_path: Path, number: int) -> None:
    save_trials(tmp_path / "trials.json", history(number))
    path = report(tmp_path)
    found = read(path)
    assert "The search has no result yet" in found.text
    assert f"{number} trials" in found.text
    assert path.stat().st_size < 900_000
    if number:
        assert len(found.table("trial", "state")) == number


def test_nothing_but_diverged_trials(tmp_path: Path) -> None:
    trials = tuple(TrialRecord(i, cost=1.0, evaluated=True, params={"budget": 0.1 * i}) for i in range(12))
    save_trials(tmp_path / "trials.json", replace(history(0), trials=trials))
    SearchResult.of_nothing("val_acc", "max", MAX_DROP, DENSE).save(tmp_path / "search_result.json")
    found = read(report(tmp_path))
    assert "12 were evaluated, of which 0 were accurate enough and 12 diverged" in found.text
    assert "cannot be told" in found.text


@pytest.mark.parametrize("name", [HOSTILE, "_層.weight\ud800\x00", "a$\\frac{$", "]]></svg><b>&amp;lt;"])
def test_names_are_shown_as_they_are(tmp_path: Path, name: str) -> None:
    replace(result(name), metric=name, details={"device": name, "layers": [{"name": name}]}).save(
        tmp_path / "search_result.json"
    )
    of = history(30, metric=name, objective=name, unit=name)
    of = replace(
        of, trials=tuple(replace(t, reason=t.reason and name, params={name: t.params["budget"]}) for t in of.trials)
    )
    save_trials(tmp_path / "trials.json", of)
    sensitivity((name, "other")).save(tmp_path / "sensitivity.json")
    tag = name.encode("utf-8", "replace").decode()
    log(tmp_path, {tag: [1.0, 0.5], f"sparsity/{tag}": [0.0, 0.5]})
    (tmp_path / "config.yaml").write_text(f"# {tag}\n")
    layer = {"layer": name, "kernel": name, "sparsity": name, "pays_from": name}
    (tmp_path / "kernel_report.json").write_text(
        json.dumps({"schema": "lightning-prune/kernel-report/1", "layers": [layer], "machine": {"device": name}})
    )
    found = read(report(tmp_path))
    shown = tag.replace("\x00", "�")
    cells = {cell for table in found.tables for row in table for cell in row}
    assert shown in cells
    assert {tag for tag, _ in found.tags}.isdisjoint({"b", "script"})


def test_a_folder_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nothing to report in .*looked for search_result.json, trials.json, ev"
    ):
        report(tmp_path)
    log(tmp_path / "version_3", {"loss": [1.0]})
    (tmp_path / "version_4").mkdir()
    with pytest.raises(FileNotFoundError, match=r"; there is something in version_3; give the folder of a run"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()
    with pytest.raises(FileNotFoundError, match=r"there is no folder '.*none'"):
        report(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        report(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("search_result.json", "is no search result"),
        ("trials.json", "holds no trials"),
        ("sensitivity.json", "is not a whole file of sensitivities"),
        ("kernel_report.json", "is no kernel report"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it(run: Path, name: str, words: str) -> None:
    (run / name).write_text('{"schema":')
    with pytest.raises(ValueError, match=rf"{name}.*{words}"):
        report(run)


def test_a_kernel_report_without_names(tmp_path: Path) -> None:
    for content, why in (
        ({"schema": "other/1", "layers": []}, "schema 'other/1'"),
        ({"schema": "lightning-prune/kernel-report/1", "layers": [{}]}, "a layer has no name"),
        ({"schema": "lightning-prune/kernel-report/1"}, "'layers'"),
    ):
        (tmp_path / "kernel_report.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"no kernel report \(.*{why}"):
            report(tmp_path)


def test_the_kernel_report_of_profile(tmp_path: Path) -> None:
    rows = [
        {"layer": "a", "sparsity": 0.9, "kernel": "csr", "estimated_s": 1e-3, "measured_s": None, "pays_from": "never"},
        {"layer": "b", "sparsity": 0.9, "kernel": "csr", "dense_s": 2e-3, "pays_from": 0.7},
    ]
    whole = {"schema": "lightning-prune/kernel-report/1", "layers": rows, "layout": "nchw", "dense_s": 3e-3}
    (tmp_path / "latency").mkdir()
    (tmp_path / "latency" / "kernel_report.json").write_text(json.dumps(whole))
    assert read(report(tmp_path)).table("layer", "sparsity", "kernel") == [
        ["a", "0.900", "csr", "1", "–", "–", "never"],
        ["b", "0.900", "csr", "–", "–", "2", "0.70"],
        ["whole pass", "", "nchw", "–", "–", "3", ""],
    ]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two epochs on digits."""
    folder = tmp_path_factory.mktemp("runs")
    logger = TensorBoardLogger(folder, name="digits", version="pruned")
    torch.manual_seed(0)
    pruning = Pruning({"network.*": 0.75}, begin=0.0, end=Epochs(1), every=Epochs(1))
    model = Classifier(MLP([64, 32, 10]), input_shape=[1, 8, 8])
    run = trainer([pruning, SparsityMonitor(summary=False)], folder, logger=logger, log_every_n_steps=5, max_epochs=2)
    run.fit(model, datamodule=Digits())
    return folder / "digits" / "pruned"


def test_a_fit(fitted: Path, tmp_path: Path) -> None:
    path = report(fitted, tmp_path / "deep" / "fit.html")
    assert path == tmp_path / "deep" / "fit.html"
    found = read(path)
    assert sections(path) == ["Before and after", "Metrics", "Sparsity"]
    rows = {row[0]: row for row in found.table("weight", "at the start", "at the end")}
    assert rows["global"][1:] == ["0.0000", "0.7500"]
    assert sum(name.endswith(".weight") for name in rows) == 2
    metrics = {row[0]: row[1:] for row in found.table("metric", "first", "lowest")}
    assert {"val_acc", "val_loss"} <= set(metrics)
    assert not any(name.startswith(("sparsity", "summary", "epoch")) for name in metrics)
    sizes = found.table("weight", "shape", "params")
    assert sizes[-1][0] == "total"
    assert sizes[-1][2] == f"{64 * 32 + 32 * 10:,}"
    assert found.table("", "before pruning")[0][0].startswith("val_")


def test_long_runs_are_thinned_and_gaps_stay_gaps(tmp_path: Path) -> None:
    log(tmp_path, {"val_loss": [math.nan, *(1.0 / (1 + i) for i in range(4999))], "latency/estimated_ms": [2.0, 1.0]})
    curve = RunFolder.read(tmp_path).events.scalars["val_loss"]
    shown = thinned(curve)
    assert (len(curve), shown[0][0], shown[-1]) == (5000, 0, curve[-1])
    assert 400 <= len(shown) <= 802
    assert max(value for _, value in shown[1:]) == 1.0
    assert set(shown[1:]) < set(curve)
    assert [step for step, _ in shown] == sorted(step for step, _ in shown)
    assert thinned(curve[:800]) == curve[:800]
    path = report(tmp_path)
    assert sections(path) == ["Metrics", "Estimated latency"]
    assert read(path).table("metric", "first")[0][1:] == ["–", "0.0002", "1.0000", "0.0002"]
    assert path.stat().st_size < 300_000


def test_the_page_is_the_same_every_time(small: Path) -> None:
    assert report(small).read_bytes() == report(small, small / "again.html").read_bytes()


def test_an_output_that_cannot_be_written_leaves_what_was_there(small: Path) -> None:
    (small / "blocked").write_text("a file")
    with pytest.raises(OSError, match="blocked"):
        report(small, small / "blocked" / "report.html")


def test_escape_and_colours() -> None:
    assert escape("<a href='x'>&\x07") == "&lt;a href=&#x27;x&#x27;&gt;&amp;�"
    for colour in ("000000", "e5e5e5", "1f5a96", "c9d8e8", "ffffff"):
        assert re.fullmatch("[0-9a-f]{6}", at_night(colour))

    def light(colour: str) -> int:
        return sum(int(colour[i : i + 2], 16) for i in (0, 2, 4))

    assert light(at_night("000000")) > light(at_night("e5e5e5")) > light(at_night("ffffff"))
    empty = Page("<title>")
    empty.section("left out")
    empty.table("nothing", ["a"], [])
    assert "left out" not in empty.html()
    assert "<title>&lt;title&gt;</title>" in empty.html()


@pytest.mark.parametrize("many", [64, 65])
def test_long_tables_are_folded(many: int) -> None:
    long = Page("")
    long.section("s")
    long.table("rows", ["a"], [["x"]] * many)
    assert ("<details>" in long.html()) is (many == 65)


def test_the_command(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(small)])
    assert (small / "report.html").is_file()
    assert "report.html" in "".join(capsys.readouterr().out.split())
    main([str(small), "--output", str(small / "other.html")])
    assert (small / "other.html").read_bytes() == (small / "report.html").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--help"], 0, "The page is a single file"),
        ([], 2, "RUN_DIR"),
        (["x", "--out", "y"], 2, "unrecognized arguments: --out"),
    ],
)
def test_the_commands_help(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == code
    assert words in "".join(capsys.readouterr())


@pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH to open the report with")
def test_in_a_browser(run: Path, fitted: Path, tmp_path: Path) -> None:
    fit = report(fitted, tmp_path / "fit.html")
    search = report(run)
    with page(tmp_path / "browser", height=6000) as tab:
        for dark in (False, True):
            scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            tab._send("Emulation.setEmulatedMedia", features=scheme)
            for path, words in (
                (
                    search,
                    ["Feasible:", "curve", "net.0.weight", "all evaluations", "evaluation, the dense", "val_loss"],
                ),
                (fit, ["curve", "of each layer", "val_acc", "0.7500"]),
            ):
                tab.open(path.as_uri())
                assert tab.missing(words, timeout_s=20) == []
                look = "getComputedStyle(document.{}).{}"
                paper = _evaluated(tab, look.format("body", "backgroundColor"))
                ink = _evaluated(tab, look.format("querySelector('svg text')", "fill"))
                assert (paper, ink) == (
                    ("rgb(20, 24, 29)", "rgb(230, 237, 243)") if dark else ("rgb(255, 255, 255)", "rgb(27, 31, 36)")
                )
                wide = _evaluated(tab, "document.documentElement.scrollWidth <= innerWidth")
                assert wide is True, "the page is wider than the window"
                drawn = "[...document.querySelectorAll('svg')].every(e => e.getBoundingClientRect().width > 200)"
                assert _evaluated(tab, drawn) is True
                if pictures := os.environ.get("LIGHTNING_PRUNE_SCREENSHOTS"):
                    Path(pictures).mkdir(parents=True, exist_ok=True)
                    tab.photograph(Path(pictures) / f"{path.stem}_{'dark' if dark else 'light'}.png")
        for path in (search, fit):
            tab._send("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=1, mobile=True)
            tab.open(path.as_uri())
            assert tab.missing(["curve"]) == []
            assert _evaluated(tab, "document.documentElement.scrollWidth") <= 390, "a phone has to scroll sideways"


def _evaluated(tab: Any, expression: str) -> Any:
    return tab._send("Runtime.evaluate", expression=expression)["result"]["value"]
