"""A run's folder in real TensorBoard: served over HTTP, and shown by a headless browser where there is one.

`LIGHTNING_PRUNE_SCREENSHOTS` names a folder to keep pictures of the pages in, to be looked at.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_prune import Epochs, Pruning, SparsityMonitor, Steps
from tests.browser import BROWSER, Page, page
from tests.support import Tiny, loader, trainer

RUN = "tiny/pruned"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """TensorBoard, on this machine only, over the folder of a short run."""
    folder = tmp_path_factory.mktemp("runs")
    logger = TensorBoardLogger(folder, name="tiny", version="pruned")
    pruning = Pruning(0.75, begin=Epochs(1), end=Epochs(3), every=Steps(2))
    fitted = trainer([pruning, SparsityMonitor(summary=False)], folder, logger=logger, log_every_n_steps=1)
    fitted.fit(Tiny(), loader(), loader())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    server = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield _when_ready(f"http://127.0.0.1:{port}", server)
    finally:
        server.terminate()
        server.wait(timeout=20)


def _when_ready(address: str, server: subprocess.Popen[bytes]) -> str:
    """The address, once TensorBoard has read the run."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if server.poll() is not None:
            pytest.fail(f"TensorBoard ended with status {server.returncode}")
        try:
            if "summary/val_acc_best" in get(address, "/data/plugin/scalars/tags").get(RUN, {}):
                return address
        except OSError:
            pass  # it does not listen yet
        time.sleep(0.3)
    raise TimeoutError("TensorBoard did not serve the run within 90 s")


def get(address: str, path: str) -> Any:
    with urllib.request.urlopen(address + path, timeout=20) as reply:
        return json.load(reply)


def test_served(address: str) -> None:
    scalars = get(address, "/data/plugin/scalars/tags")[RUN]
    assert {"sparsity/global", "sparsity/net.0.weight", "compression_ratio", "theoretical_speedup", "mask/churn"} < set(
        scalars
    )
    history = get(address, f"/data/plugin/scalars/scalars?run={RUN}&tag=sparsity/global")
    assert history[0][1:] == [0, 0.0]
    assert history[-1][1:] == [32, 0.75]
    histograms = get(address, "/data/plugin/histograms/tags")[RUN]
    assert {"weights/net.0.weight", "weights_kept/net.2.weight"} < set(histograms)
    shapes = get(address, f"/data/plugin/histograms/histograms?run={RUN}&tag=weights_kept/net.2.weight")
    assert sum(count for _, _, count in shapes[0][2]) == 64
    assert sum(count for _, _, count in shapes[-1][2]) < 64
    assert get(address, "/data/plugin/images/tags")[RUN]["layers"]["samples"] == 1
    assert [each["step"] for each in get(address, f"/data/plugin/images/images?run={RUN}&tag=layers&sample=0")] == [
        0,
        32,
    ]
    assert "summary/text_summary" in get(address, "/data/plugin/text/tags")[RUN]


def test_hyperparameters_are_served_with_the_final_metrics(address: str) -> None:
    def ask(what: str, question: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            f"{address}/data/plugin/hparams/{what}",
            json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as reply:
            return json.load(reply)

    experiment = ask("experiment", {"experimentName": "", "includeMetrics": True})
    assert {info["name"] for info in experiment["hparamInfos"]} >= {"pruning/sparsity", "pruning/schedule"}
    columns = [{"metric": info["name"]} for info in experiment["metricInfos"]]
    question = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": columns,
        "startIndex": 0,
        "sliceSize": 10,
    }
    (group,) = ask("session_groups", question)["sessionGroups"]
    values = {metric["name"]["tag"]: metric["value"] for metric in group["metricValues"]}
    assert group["hparams"]["pruning/sparsity"] == 0.75
    assert values["sparsity/global"] == 0.75
    assert {"summary/val_acc_best", "summary/val_acc_before", "summary/val_loss_last"} < set(values)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if BROWSER is None:
        pytest.skip("no chromium on the PATH to open TensorBoard with")
    with page(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("?tagFilter=sparsity%7Cchurn#timeseries", ["sparsity/global", "mask/churn", "curve"]),
        ("#scalars&tagFilter=sparsity", ["sparsity/global", "sparsity/net.0.weight", "sparsity/target", "curve"]),
        ("#histograms", ["weights_kept/net.0.weight", "weights/net.2.weight", "curve"]),
        ("#images", ["layers", "image 1200x"]),
        ("#text", ["before pruning", "best at target", "compression ratio", "net.2.weight"]),
        ("#hparams", ["pruning/schedule", "Magnitude(p=1.0)", "summary/val_acc_best"]),
    ],
    ids=["timeseries", "scalars", "histograms", "images", "text", "hparams"],
)
def test_shown(address: str, tab: Page, name: str, words: list[str]) -> None:
    tab.open(f"{address}/{name}")
    missing = tab.missing(words)
    pictures = os.environ.get("LIGHTNING_PRUNE_SCREENSHOTS")
    if pictures:
        time.sleep(3)  # let the charts finish their entrance
        Path(pictures).mkdir(parents=True, exist_ok=True)
        tab.photograph(Path(pictures) / f"{name.partition('#')[2].partition('&')[0]}.png")
    assert not missing, f"the {name} page does not show {missing}"
