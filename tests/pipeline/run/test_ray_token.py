"""Ray starts where the home cannot be written."""

import os
import subprocess
import sys

import pytest

from pipeline.run.ray.token import ensure_token


@pytest.fixture
def environment(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that what is set here is taken back
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_token_where_ray_cannot_write_one(environment):
    environment.setenv("HOME", "/proc/none")
    ensure_token()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(bytes.fromhex(token)) == 32
    ensure_token()
    assert os.environ["RAY_AUTH_TOKEN"] == token


@pytest.mark.parametrize("chosen", ["RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"])
def test_none_where_somebody_chose_otherwise(environment, chosen):
    environment.setenv("HOME", "/proc/none")
    environment.setenv(chosen, "x")
    ensure_token()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_none_where_ray_can_write_it(environment, tmp_path):
    environment.setenv("HOME", str(tmp_path))
    ensure_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_ray_starts_without_a_home(environment):
    """Through the job's own connection, in a process of its own: Ray keeps what it read of a token."""
    code = "import ray\nfrom pipeline.run.ray import cluster\nwith cluster.connected(): print(ray.is_initialized())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"HOME": "/proc/none"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"
