"""Machines that cannot reach the hub of weights."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.features.hub import go_offline_if_unreachable
from tests.helpers.photographs import photo

ROOT = Path(__file__).parents[3]
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PROXIES, *map(str.upper, PROXIES), "HF_HUB_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server)
    go_offline_if_unreachable()
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.parametrize("endpoint", [None, "http://no-such-host.invalid", "http://127.0.0.1:99999"])
def test_one_that_does_not_answer_is_not_asked_again(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint or closed_port())
    go_offline_if_unreachable()
    assert os.environ.pop("HF_HUB_OFFLINE") == "1"
    assert "cannot be reached" in caplog.text


def test_settings_and_proxies_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    go_offline_if_unreachable()
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    go_offline_if_unreachable()
    assert "HF_HUB_OFFLINE" not in os.environ


def test_the_job_says_so_without_retries(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(photo())
    arguments = [
        "--images",
        str(tmp_path / "photos"),
        "--store",
        str(tmp_path / "store"),
        "--backbone",
        "resnet18.a1_in1k",
    ]
    environment = {**os.environ, "HF_ENDPOINT": closed_port(), "HF_HOME": str(tmp_path / "cache")}
    ran = subprocess.run(
        [sys.executable, "-m", "jobs.upsample_imagenet", *arguments, "--dry-run"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 2
    assert "cannot download its pretrained weights" in ran.stderr
    assert "--weights FILE" in ran.stderr
    assert "Retrying" not in ran.stderr
