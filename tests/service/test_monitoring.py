"""What monitoring systems run: the plugin, the textfile, the alerts and the dashboard."""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aufsd_client import Client
from aufsd_client.errors import UnmountBusy
from tests.daemon import Daemon, daemon

MONITORING = Path(__file__).parents[2] / "systemd/monitoring"
PLUGIN = MONITORING / "check_aufsd.py"


def check(path: str, *arguments: str) -> tuple[int, str]:
    """Run the plugin, by a Python that has nothing else; its exit status and its line."""
    done = subprocess.run(
        # -I -S: no package of this environment is at hand
        [sys.executable, "-I", "-S", str(PLUGIN), "--socket", path, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    return done.returncode, done.stdout.rstrip("\n")


def figures(line: str) -> dict[str, list[str]]:
    """The performance data: value, warning, critical, least, most by name."""
    pairs = (field.split("=") for field in line.partition(" | ")[2].split())
    return {name: value.split(";") for name, value in pairs}


# --- the plugin -----------------------------------------------------------------------------------


@pytest.mark.service
def test_a_daemon_that_is_well_is_ok_with_its_figures(served: Daemon, client: Client) -> None:
    client.create("base")
    client.create("top", parent="base")
    client.get("top")
    status, line = check(served.monitor_socket)
    assert status == 0
    version = client.version()
    sentence = f"aufsd {version.version} on overlay: 2 layers, 1 mounts, 1 references"
    assert line.startswith(f"AUFSD OK - {sentence} | layers=2;;;0; ")
    found = figures(line)
    assert (found["mounts"][0], found["references"][0], found["busy"][0]) == ("1", "1", "0")
    assert re.fullmatch(r"[\d.]+%", found["free"][0])
    assert re.fullmatch(r"[\d.]+s", found["time"][0])


@pytest.mark.service
def test_one_that_is_degraded_is_a_warning_that_says_why(served: Daemon, client: Client) -> None:
    client.create("base")
    client.create("top", parent="base")
    with open(f"{client.get('top').path}/held", "w"), pytest.raises(UnmountBusy):
        client.put("top")
    status, line = check(served.monitor_socket)
    assert status == 1
    why = "mounts: 1 mounts stand though no reference is left: top (EBUSY)"
    assert line.startswith(f"AUFSD WARNING - {why} | ")
    assert figures(line)["busy"][0] == "1"


@pytest.mark.service
def test_one_that_was_stopped_or_killed_is_critical(served: Daemon) -> None:
    sentence = f"aufsd does not run: nobody listens on {served.monitor_socket}"
    served.kill()
    assert check(served.monitor_socket) == (2, f"AUFSD CRITICAL - {sentence}")
    served.start()
    assert check(served.monitor_socket)[0] == 0
    served.stop()
    assert check(served.monitor_socket) == (2, f"AUFSD CRITICAL - {sentence}")


@pytest.mark.service
def test_one_that_hangs_is_critical(served: Daemon) -> None:
    assert served.process is not None
    served.process.send_signal(signal.SIGSTOP)
    try:
        assert check(served.monitor_socket, "--timeout", "0.3") == (
            2,
            f"AUFSD CRITICAL - aufsd did not answer on {served.monitor_socket} within 0.3 s",
        )
    finally:
        served.process.send_signal(signal.SIGCONT)


@pytest.mark.service
def test_one_that_turns_the_plugin_away_is_critical_and_says_why(tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--max-connections", "1") as served,
        Client(served.monitor_socket) as other,
    ):
        other.ping()
        status, line = check(served.monitor_socket)
    assert status == 2
    assert line.startswith("AUFSD CRITICAL - aufsd refused to answer: there are 1 connections")


@pytest.mark.service
@pytest.mark.parametrize(
    ("thresholds", "status", "sentence"),
    [
        (("-w", "layers=5"), 0, "OK - aufsd"),
        (("-w", "layers=2"), 1, "WARNING - layers is 3, not within 2"),
        (("-w", "layers=1", "-c", "layers=2"), 2, "CRITICAL - layers is 3, not within 2"),
        (("-w", "layers=1", "-c", "layers=9"), 1, "WARNING - layers is 3, not within 1"),
        (("-c", "free=101:"), 2, "CRITICAL - free is "),
        (("-w", "mounts=@0"), 1, "WARNING - mounts is 0, not within @0"),
        (("-w", "time=~:60", "-c", "layers=@7:9"), 0, "OK - aufsd"),
    ],
)
def test_a_figure_beyond_its_threshold_is_told(
    served: Daemon, client: Client, thresholds: tuple[str, ...], status: int, sentence: str
) -> None:
    for name in ("a", "b", "c"):
        client.create(name)
    found, line = check(served.monitor_socket, *thresholds)
    assert (found, line[: len(f"AUFSD {sentence}")]) == (status, f"AUFSD {sentence}")


@pytest.mark.service
def test_thresholds_stand_in_the_performance_data(served: Daemon) -> None:
    _, line = check(served.monitor_socket, "-w", "jobs=3", "-c", "jobs=~:9")
    assert figures(line)["jobs"] == ["0", "3", "~:9", "0", ""]


@pytest.mark.parametrize(
    "answer",
    [b"[]\n", b"nonsense\n", b'{"jsonrpc": "2.0"}\n', b"[1]\n", b'[{"id": "health"}]\n'],
)
def test_an_answer_of_something_else_is_unknown(answer: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "m.sock")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        plugin = subprocess.Popen(
            [sys.executable, "-I", "-S", str(PLUGIN), "-s", path], stdout=subprocess.PIPE, text=True
        )
        peer, _ = listening.accept()
        with peer:
            peer.sendall(answer)
            said, _ = plugin.communicate(timeout=60)
    assert plugin.returncode == 3
    assert said.startswith("AUFSD UNKNOWN - the answer is not one of aufsd's: ")


@pytest.mark.parametrize(
    "arguments",
    [("--no-such",), ("-w", "layers"), ("-w", "nothing=1"), ("-c", "layers=9:1"), ("-t", "soon")],
)
def test_a_wrong_usage_is_unknown_and_no_alarm(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, PLUGIN, *arguments], capture_output=True, check=False)
    assert done.returncode == 3
    assert b"usage: check_aufsd" in done.stderr


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("10", [0, 5, 10], [-1, 10.5]),
        ("10:", [10, 1e9], [9.9, -1]),
        ("~:10", [-1e9, 10], [10.1]),
        ("10:20", [10, 15, 20], [9, 21]),
        ("@10:20", [9, 21], [10, 15, 20]),
        ("-5:-1", [-5, -1], [0, -6]),
        ("0.5", [0.5], [0.6]),
    ],
)
def test_a_range_is_the_guidelines(text: str, inside: list[float], outside: list[float]) -> None:
    parse: Any = runpy.run_path(str(PLUGIN))["parse_range"]
    limits = parse(text)
    assert [limits.alerts(value) for value in inside] == [False] * len(inside)
    assert [limits.alerts(value) for value in outside] == [True] * len(outside)


# --- node_exporter's textfile ---------------------------------------------------------------------


def write_textfile(file: Path, path: str) -> int:
    return subprocess.run(
        [sys.executable, "-I", "-S", MONITORING / "textfile.py", file, "--socket", path],
        stderr=subprocess.DEVNULL,
        timeout=60,
        check=False,
    ).returncode


@pytest.mark.service
def test_the_textfile_has_the_metrics_but_not_those_that_node_exporter_has_itself(
    served: Daemon, client: Client, tmp_path: Path
) -> None:
    client.create("base")
    file = tmp_path / "aufsd.prom"
    assert write_textfile(file, served.monitor_socket) == 0
    text = file.read_text()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {"aufsd_up", "aufsd_layers", "aufsd_call_seconds"} <= families
    assert {name for name in families if not name.startswith("aufsd_")} == set()
    assert "\naufsd_up 1\n" in text
    assert file.stat().st_mode & 0o777 == 0o644


@pytest.mark.service
def test_the_textfile_of_a_stopped_daemon_says_so_and_nothing_else(
    served: Daemon, tmp_path: Path
) -> None:
    file = tmp_path / "aufsd.prom"
    write_textfile(file, served.monitor_socket)
    served.stop()
    assert write_textfile(file, served.monitor_socket) == 1
    assert file.read_text().splitlines()[2:] == ["aufsd_up 0"]
    assert os.listdir(tmp_path).count("aufsd.prom.new") == 0


# --- Prometheus and Grafana -----------------------------------------------------------------------


@pytest.mark.promtool
@pytest.mark.parametrize("what", ["check rules aufsd.rules.yml", "test rules aufsd.rules.test.yml"])
def test_promtool_passes_the_alerts(what: str) -> None:
    done = subprocess.run(
        ["promtool", *what.split()], cwd=MONITORING, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.promtool
@pytest.mark.service
def test_promtool_finds_no_fault_in_the_metrics(client: Client) -> None:
    client.create("base")
    text = client.metrics().text
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_alert_is_tested_and_explained() -> None:
    alerts = re.findall(r"- alert: (\w+)", (MONITORING / "aufsd.rules.yml").read_text())
    tests = (MONITORING / "aufsd.rules.test.yml").read_text()
    explained = (MONITORING.parents[1] / "docs/operations.md").read_text()
    for alert in alerts:
        fires = rf"alertname: {alert}\n +eval_time: \w+\n +exp_alerts:"
        assert re.search(fires, tests), f"no test in which {alert} fires"
        assert f"`{alert}`" in explained, f"docs/operations.md does not explain {alert}"


@pytest.mark.service
def test_what_alerts_and_dashboard_ask_for_exists(served: Daemon, client: Client) -> None:
    client.create("base")
    families = text_string_to_metric_families(client.metrics().text)
    # a histogram's samples too
    known = {sample.name for family in families for sample in family.samples} | {"aufsd_up"}
    dashboard = json.loads((MONITORING / "grafana-aufsd.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    asked += [annotation["expr"] for annotation in dashboard["annotations"]["list"]]
    asked += re.findall(r"expr: (?:>-\n)?(.*?)\n +(?:for|labels):", _rules(), flags=re.DOTALL)
    names = set(re.findall(r"\b(?:aufsd|process)_\w+", " ".join(asked)))
    assert len(names) > 30
    assert names - known == set()


def _rules() -> str:
    return (MONITORING / "aufsd.rules.yml").read_text()


def test_the_panels_of_the_dashboard_do_not_lie_on_one_another() -> None:
    dashboard = json.loads((MONITORING / "grafana-aufsd.json").read_text())
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
