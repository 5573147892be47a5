"""Metrics: the text, read by Prometheus's own parser, and what it counts in a real daemon."""

import socket
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from aufsd.service.metrics import Metrics, by, counter, gauge, labels
from aufsd_client import Client
from aufsd_client.errors import LayerNotFound
from tests.archives import tar
from tests.daemon import Daemon


def samples(text: str) -> dict[str, float]:
    """Value by name and labels, as `name{a=b}`."""
    return {
        f"{sample.name}{{{','.join(f'{k}={v}' for k, v in sorted(sample.labels.items()))}}}": (
            sample.value
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_call_is_counted_by_method_and_outcome_and_falls_into_its_bucket() -> None:
    metrics = Metrics()
    for outcome, seconds in (("ok", 0.0001), ("ok", 0.2), ("LayerNotFound", 500.0)):
        metrics.observe("get", outcome, seconds)
    found = samples(metrics.render().text)
    assert found["aufsd_calls_total{method=get,outcome=ok}"] == 2
    assert found["aufsd_calls_total{method=get,outcome=LayerNotFound}"] == 1
    buckets = {
        bound: found[f"aufsd_call_seconds_bucket{{le={bound},method=get}}"]
        for bound in ("0.0001", "0.1", "0.5", "120.0", "+Inf")
    }
    assert buckets == {"0.0001": 1, "0.1": 1, "0.5": 2, "120.0": 2, "+Inf": 3}
    assert found["aufsd_call_seconds_count{method=get}"] == 3
    assert found["aufsd_call_seconds_sum{method=get}"] == pytest.approx(500.2001)


def test_what_alerts_ask_for_is_there_before_it_happens() -> None:
    metrics = Metrics()
    assert samples(metrics.render().text)["aufsd_incidents_total{}"] == 0
    metrics.observe("diff", "InternalError", 1.0)
    metrics.observe("apply_diff", "Overloaded", 1.0)
    found = samples(metrics.render().text)
    assert (found["aufsd_incidents_total{}"], found["aufsd_calls_overloaded_total{}"]) == (1, 1)


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", "", "ä {}=,"])
def test_a_label_may_hold_anything(value: str) -> None:
    metrics = Metrics()
    metrics.watch(lambda: [gauge("aufsd_x", "x", {labels(kernel=value): 1})])
    families = text_string_to_metric_families(metrics.render().text)
    found = {family.name: family for family in families}["aufsd_x"]
    assert found.samples[0].labels == {"kernel": value}


def test_a_counter_and_a_gauge_say_what_they_are() -> None:
    metrics = Metrics()
    metrics.watch(
        lambda: [counter("aufsd_a_total", "A", by("kind", {"x": 1, "y": 2})), gauge("b", "B", 0.5)]
    )
    families = {f.name: f for f in text_string_to_metric_families(metrics.render().text)}
    assert (families["aufsd_a"].type, families["aufsd_a"].documentation) == ("counter", "A")
    assert (families["b"].type, families["b"].samples[0].value) == ("gauge", 0.5)


# --- of a real daemon -----------------------------------------------------------------------------


def now(client: Client) -> dict[str, float]:
    """What the daemon counts."""
    return samples(client.metrics().text)


@pytest.mark.service
def test_layers_mounts_and_references_are_counted(client: Client) -> None:
    client.create("base")
    client.create("top", parent="base")
    client.get("top")
    client.get("top", hold="process")
    found = now(client)
    assert found["aufsd_layers{}"] == 2
    assert found["aufsd_mounts{backend=overlay}"] == 1
    assert (found["aufsd_references{hold=manual}"], found["aufsd_references{hold=process}"]) == (
        1,
        1,
    )
    assert found["aufsd_holders{}"] == 1
    assert (found["aufsd_mounts_made_total{}"], found["aufsd_unmounts_total{}"]) == (1, 0)
    assert found["aufsd_mount_thread_calls_total{}"] >= 1
    assert found["aufsd_mount_thread_busy_seconds_total{}"] > 0
    client.put("top")
    client.put("top")
    found = now(client)
    assert (found["aufsd_mounts{backend=overlay}"], found["aufsd_unmounts_total{}"]) == (0, 1)
    assert (found["aufsd_references{hold=manual}"], found["aufsd_references{hold=process}"]) == (
        0,
        0,
    )


@pytest.mark.service
def test_archives_are_counted_down_to_the_last_byte(client: Client) -> None:
    archive = tar({"etc/": None, "etc/motd": b"x" * 5000})
    client.create("base")
    client.apply_diff("base", archive)
    written = bytearray()
    result = client.diff("base", written)
    found = now(client)
    assert found["aufsd_archive_bytes_total{kind=diff}"] == len(written) == result.size
    assert found["aufsd_archive_entries_total{kind=diff}"] == result.entries
    assert found["aufsd_archive_bytes_total{kind=apply_diff}"] == len(archive)
    assert found["aufsd_jobs_total{kind=diff}"] == 1
    assert (found["aufsd_jobs_running{}"], found["aufsd_jobs_waiting{}"]) == (0, 0)


@pytest.mark.service
def test_what_fails_is_counted_by_its_name(client: Client) -> None:
    with pytest.raises(LayerNotFound):
        client.get("no-such-layer")
    assert now(client)["aufsd_calls_total{method=get,outcome=LayerNotFound}"] == 1


@pytest.mark.service
def test_peers_that_misbehave_are_dropped_and_counted(served: Daemon, client: Client) -> None:
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(served.monitor_socket)
        peer.settimeout(30)
        peer.sendall(b"x" * (2 << 20) + b"\n")
        while peer.recv(1 << 16):
            pass
    assert now(client)["aufsd_peers_dropped_total{reason=overlong}"] == 1


@pytest.mark.service
def test_the_daemon_as_a_process_is_told_under_the_usual_names(
    served: Daemon, client: Client
) -> None:
    found = now(client)
    assert served.process is not None
    pid = served.process.pid
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    assert found["process_resident_memory_bytes{}"] == pytest.approx(resident, rel=0.1)
    assert found["process_open_fds{}"] == pytest.approx(served.descriptors(), abs=2)
    assert 0 < found["process_cpu_seconds_total{}"] < 60
    assert found["process_start_time_seconds{}"] <= found["aufsd_start_time_seconds{}"]
    assert found["aufsd_store_free_bytes{}"] < found["aufsd_store_size_bytes{}"]


@pytest.mark.service
def test_no_layer_is_a_label(client: Client) -> None:
    client.create("a-name-to-look-for")
    client.get("a-name-to-look-for")
    assert "a-name-to-look-for" not in client.metrics().text
