"""``docs/cluster/grafana.json``: a dashboard that Grafana can import, of metrics that exist."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import ray

from pipeline.run.ray.metrics import METRICS

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[3] / "docs" / "cluster" / "grafana.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES: list[str] = [target["expr"] for panel in PANELS for target in panel["targets"]]
SELECTOR = re.compile(r"(\w+)\{([^}]*)\}")
OF_RAY = {"SessionName", "NodeAddress", "WorkerId", "Component", "Version"}  # labels that Ray adds to all
OF_PROMETHEUS = {"instance"}


def test_its_metrics_and_labels_exist() -> None:
    labels = {metric.exported: set(metric.tags) for metric in METRICS}
    shown = {name: matchers for query in QUERIES for name, matchers in SELECTOR.findall(query) if "densefeat" in name}
    assert shown.keys() == labels.keys()
    for query in QUERIES:
        names = [name for name, _ in SELECTOR.findall(query)]
        for name, matchers in SELECTOR.findall(query):
            asked = set(re.findall(r'(\w+)(?:=~|!=|!~|=)"', matchers))
            assert asked <= OF_RAY | labels.get(name, set()), query
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert {by} <= OF_RAY | OF_PROMETHEUS | set().union(*(labels.get(name, set()) for name in names)), query
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"ray_densefeat_\w+", text)) == labels.keys()


def test_its_metrics_of_nodes_are_rays() -> None:
    reporter = Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    exported = {f"ray_{name}" for name in re.findall(r'"(node_\w+)": Gauge', reporter.read_text())}
    named = set(re.findall(r"ray_node_\w+", json.dumps(DASHBOARD)))
    assert {"ray_node_cpu_utilization", "ray_node_gpus_utilization"} <= named <= exported


def test_counters_are_shown_as_rates_or_totals() -> None:
    """A bare counter says nothing: it restarts with every worker."""
    for query in QUERIES:
        for metric in (metric for metric in METRICS if metric.kind == "counter" and metric.exported in query):
            total = f"sum({metric.exported}{{"
            assert total in query or f"rate({metric.exported}{{" in query, query


def test_grafana_can_import_it() -> None:
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert DASHBOARD["schemaVersion"] >= 36  # data sources as objects with a type and a uid
    assert "id" not in DASHBOARD  # it is the database's
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert len({panel["id"] for panel in PANELS}) == len(PANELS) > 10
    for panel in PANELS:
        assert panel["title"]
        assert panel["description"]
        assert panel["type"] in ("timeseries", "stat")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for sourced in (panel, *panel["targets"]):
            assert sourced["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for query in QUERIES:
        assert set(re.findall(r"\$(\w+)", query)) <= {*variables, "__rate_interval"}
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing)


def test_panels_do_not_overlap() -> None:
    for panel in PANELS:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart = (one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
                 or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"])  # fmt: skip
        assert apart, (one, other)
