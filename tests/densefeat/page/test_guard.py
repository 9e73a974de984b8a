"""Who is answered: Host, token, paths below --images."""

from pathlib import Path

import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from densefeat.layout import INDEX
from densefeat.page import create_app
from densefeat.storage.parquet import parquet_bytes, read_parquet
from tests.densefeat.page.stores import photographed_store
from tests.helpers.stores import ROWS, make_store

TOKEN = "not-to-be-guessed"


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return photographed_store(tmp_path_factory.mktemp("guard"))


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.5", "", "localhost.evil"])
def test_foreign_hosts_are_refused(uri: str, host: str) -> None:
    client = TestClient(create_app(uri))
    for path in ("/", "/static/main.js", "/api/store"):
        assert client.get(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:9", "[::1]:8000", "LOCALHOST"])
def test_loopback_hosts_are_answered(uri: str, host: str) -> None:
    answer = TestClient(create_app(uri)).get("/api/store", headers={"Host": host})
    assert answer.status_code == 200
    assert "default-src 'self'" in answer.headers["content-security-policy"]


def test_other_addresses_need_a_token(uri: str) -> None:
    with pytest.raises(ValueError, match="give a token"):
        create_app(uri, host="0.0.0.0")
    client = TestClient(create_app(uri, host="0.0.0.0", token=TOKEN), base_url="http://10.0.0.7:8000")
    for path in ("/", "/static/main.js", "/api/store", "/?token=wrong", "/?token="):
        assert client.get(path).status_code == 403
    assert client.get("/api/store", headers={"Authorization": "Bearer wrong"}).status_code == 403
    name = client.get("/", params={"token": TOKEN}, follow_redirects=False).headers["set-cookie"].partition("=")[0]
    client.cookies.clear()
    assert client.get("/api/store", headers={"Cookie": f"{name}=wrong"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert client.get("/api/store", headers=bearer).status_code == 200


def test_the_token_stays_in_a_cookie_after_the_first_visit(uri: str) -> None:
    client = TestClient(create_app(uri, host="0.0.0.0", token=TOKEN), base_url="http://10.0.0.7:8000")
    first = client.get("/image/1", params={"token": TOKEN, "layer": "segments"}, follow_redirects=False)
    assert first.status_code == 303
    assert first.headers["location"] == "/image/1?layer=segments"
    assert "httponly" in first.headers["set-cookie"].lower()
    assert client.get("/api/store").status_code == 200
    away = client.get("http://10.0.0.7:8000//evil.example", params={"token": TOKEN}, follow_redirects=False)
    assert away.headers["location"] == "/evil.example"


def test_two_pages_of_one_host_do_not_take_each_others_cookies(uri: str) -> None:
    cookies: list[str] = []
    clients = []
    for number, token in enumerate(("first", "second")):
        app = create_app(uri, host="0.0.0.0", token=token)
        client = TestClient(app, base_url=f"http://10.0.0.7:800{number}")
        answer = client.get("/", params={"token": token}, follow_redirects=False)
        cookies.append(answer.headers["set-cookie"].partition(";")[0])
        clients.append(TestClient(app, base_url=f"http://10.0.0.7:800{number}"))
    for client in clients:  # browsers send both to both
        assert client.get("/api/store").status_code == 403
        assert client.get("/api/store", headers={"Cookie": "; ".join(cookies)}).status_code == 200
        assert client.get("/api/store", headers={"Cookie": "; ".join(cookies[::-1])}).status_code == 200
    assert cookies[0].partition("=")[0] != cookies[1].partition("=")[0]


@pytest.mark.parametrize("key", ["../secret.jpg", "class/../../secret.jpg", "/etc/passwd", "link/secret.jpg", ""])
def test_keys_do_not_lead_out_of_the_images(tmp_path: Path, key: str) -> None:
    uri, root, outside = str(tmp_path / "store"), tmp_path / "images", tmp_path / "outside"
    make_store(uri)
    root.mkdir()
    outside.mkdir()
    (root / "link").symlink_to(outside)
    for folder in (outside, tmp_path):
        (folder / "secret.jpg").write_bytes(b"secret")
    file = tmp_path / "store" / INDEX
    index = read_parquet(file.read_bytes())
    field = index.schema.get_field_index("key")
    file.write_bytes(parquet_bytes(index.set_column(field, index.schema.field("key"), pa.array([key] * ROWS))))
    client = TestClient(create_app(uri, images=str(root)), base_url="http://localhost")
    answer = client.get("/api/photograph/0")
    assert answer.status_code == 404
    assert "--images" in answer.json()["error"]
    assert "key that" in answer.json()["error"]


def test_static_files_stay_in_their_folder(uri: str) -> None:
    client = TestClient(create_app(uri), base_url="http://localhost")
    assert client.get("/static/%2e%2e/app.py").status_code == 404
