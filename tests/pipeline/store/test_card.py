"""The card of a store: what it says, when it is written, and whose text is left alone."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from densefeat import FeatureStore, layout
from densefeat.console.describe import card
from densefeat.storage.objects import Objects
from jobs.retire_rows import RetireConfig, retire_rows
from jobs.upsample_imagenet import upsample
from pipeline.features.backbone import build_backbone
from pipeline.store.layout import delete_store, foreign_keys, stored_attributes
from pipeline.store.reports import card_is_made, keep_card
from schemas.attributes import StoreAttributes
from tests.helpers.photographs import write_random_images
from tests.helpers.stores import FAILED_ROWS, ROWS, H, K, KnownStore, W, make_store, set_up_store
from tests.helpers.upsample_jobs import config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def known(tmp_path: Path) -> KnownStore:
    return make_store(str(tmp_path / "store"))


def text_of(known: KnownStore) -> str:
    return Objects(known.uri).get(layout.CARD).decode()


def test_a_card_says_how_features_were_made_and_what_failed(known: KnownStore) -> None:
    assert keep_card(Objects(known.uri))
    text = text_of(known)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front)["size_categories"] == ["n<1K"]
    assert f"# Dense features of {ROWS} images: {K} × {H} × {W} of test" in body
    assert f"{ROWS - len(FAILED_ROWS)} of {ROWS} images have features" in body
    assert f"| `corrupt` | {len(FAILED_ROWS)} |" in body
    assert f"| configuration hash | `{known.configuration_hash}` |" in body
    assert "| variance kept | 80.0% |" in body
    assert "licence of the backbone's weights is not known" in body
    table = [line for line in body.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {3}
    printed = subprocess.run(
        [sys.executable, "-m", "densefeat.command_line", "card", known.uri], cwd=ROOT, capture_output=True, text=True
    )
    assert printed.stdout == text


def test_the_licence_of_published_weights_is_kept(known: KnownStore) -> None:
    store = FeatureStore(known.uri)
    attributes = replace(stored_attributes(store.uri, store.attributes), backbone_license="cc-by-nc-4.0")
    own = attributes.to_dict()[layout.ATTRIBUTES_KEY]
    assert StoreAttributes.from_dict(own) == attributes
    store.attributes = own
    assert "published weights are under `cc-by-nc-4.0`" in card(store)
    backbone = build_backbone("resnet18", size=(64, 64), weights="random")
    assert backbone.license is None
    backbone.published = True
    assert backbone.license == "apache-2.0"


def test_a_card_is_replaced_until_somebody_writes_their_own(known: KnownStore) -> None:
    objects = Objects(known.uri)
    keep_card(objects)
    retire_rows(RetireConfig(store=known.uri, rows=("0", "1"), reason="withdrawn"))
    assert "| `retired` | 2 |" in text_of(known)
    own = "".join(line for line in text_of(known).splitlines(keepends=True) if "Made by densefeat" not in line)
    objects.put(layout.CARD, own.encode())
    assert not card_is_made(objects)
    retire_rows(RetireConfig(store=known.uri, restore_all=True))
    assert text_of(known) == own
    assert not keep_card(objects)


def test_a_deleted_store_leaves_only_a_text_of_others(known: KnownStore) -> None:
    objects = Objects(known.uri)
    keep_card(objects)
    assert foreign_keys(objects) == []
    delete_store(objects)
    assert objects.list() == {}
    make_store(known.uri)
    objects.put(layout.CARD, b"Ours.\n")
    delete_store(objects)
    assert list(objects.list()) == [layout.CARD]
    assert foreign_keys(objects) == []


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"one line"])
def test_other_texts_are_not_cards(known: KnownStore, text: bytes) -> None:
    objects = Objects(known.uri)
    objects.put(layout.CARD, text)
    assert not card_is_made(objects)
    assert not keep_card(objects)
    assert objects.get(layout.CARD) == text


def test_an_unfinished_store_has_none(tmp_path: Path) -> None:
    known = set_up_store(str(tmp_path / "store"))
    assert not keep_card(Objects(known.uri))
    assert not (Path(known.uri) / layout.CARD).exists()


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    images = write_random_images(tmp_path / os.fsdecode(b"caf\xe9"), 3)
    assert upsample(config(images, tmp_path / "store")) == 0
    assert r"caf\udce9" in (tmp_path / "store" / layout.CARD).read_text()
