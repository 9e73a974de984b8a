import hashlib
import json

import pytest
import tyro

from schemas.attributes import StoreAttributes
from schemas.checks import parse_size
from schemas.configuration import StoreConfiguration, differences
from schemas.options import UpsampleConfig
from schemas.upsamplers import ImplicitOptions, JBUOptions, LiFTOptions, MultiviewOptions, NoOptions
from tests.helpers.stores import known_configuration


def config(**options: object) -> UpsampleConfig:
    return UpsampleConfig(images="photos", store="features", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "size"), [("224", (224, 224)), ("224x336", (224, 336))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size("--size", text) == size
    assert config(size=text).output_size_px == size
    assert config(output_size=text).output_size_px == size


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "0"}, "--size is in pixels"),
        ({"size": "224,224"}, "--size is in pixels"),
        ({"output_size": "big"}, "--output-size is in pixels"),
        ({"components": 0}, "--components is a number of components, .* or a share .*: got 0"),
        ({"shard_images": 0}, "--shard-images"),
        ({"limit": 0}, "--limit"),
        ({"batch_size": -1}, "--batch-size"),
        ({"error_floor": -0.1}, "--error-floor"),
        ({"error_floor": float("nan")}, "--error-floor must be a finite number: got nan"),
        ({"error_floor": 1e300}, "--error-floor must be at most 1, .*: got 1e\\+300"),
        ({"error_floor": 0.1, "dtype": "float16"}, "--error-floor 0.1 is for --dtype int8: got float16"),
        ({"stall_timeout_s": float("inf")}, "--stall-timeout-s must be a finite number: got inf"),
        ({"max_failed_share": 2}, "--max-failed-share is a share"),
        ({"resume": True, "overwrite": True}, "pass only one"),
        ({"shards": "1-3"}, "--shards is a range"),
        ({"shards": "3:3"}, "is empty"),
    ],
)
def test_what_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [(None, range(10)), ("2:4", range(2, 4)), (":3", range(3)), ("8:", range(8, 10)), ("8:99", range(8, 10))],
)
def test_shard_ranges(shards: str | None, expected: range) -> None:
    assert config(shards=shards).shard_range(10) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", JBUOptions()),
        ("--jbu-kernels wide", JBUOptions(jbu_kernels="wide")),
        ("--upsampler bilinear", NoOptions()),
        ("--upsampler lift --lift-iterations 3", LiFTOptions(lift_iterations=3)),
        ("--upsampler multiview --views 5 --regularisation 0.5", MultiviewOptions(views=5, regularisation=0.5)),
        ("--upsampler multiview --jbu-kernels wide", MultiviewOptions(jbu_kernels="wide")),
        ("--upsampler implicit --views 3000 --fit-steps 7", ImplicitOptions(views=3000, fit_steps=7)),
    ],
)
def test_every_upsampler_has_its_own_options_flat_on_the_command_line(line: str, expected: object) -> None:
    arguments = f"--images photos --store features --upsampler-weights file.pth {line}".split()
    parsed = tyro.cli(UpsampleConfig, args=arguments)
    assert parsed.upsampler_weights == "file.pth"
    assert parsed.upsampler_options == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"jbu_kernels": "wide", "upsampler": "bilinear"},
            "--jbu-kernels wide is for --upsampler jbu or multiview: got bilinear",
        ),
        ({"lift_iterations": 2}, "--lift-iterations 2 is for --upsampler lift: got jbu"),
        ({"views": 5, "upsampler": "bilinear"}, "--views 5 is for --upsampler multiview or implicit: got bilinear"),
        ({"fit_steps": 9, "upsampler": "multiview"}, "--fit-steps 9 is for --upsampler implicit: got multiview"),
        ({"regularisation": 1.0, "upsampler": "implicit"}, "--regularisation 1.0 is for --upsampler multiview: got"),
        ({"smoothing": 1e30, "upsampler": "multiview"}, "--smoothing must be at most 1000, .*: got 1e\\+30"),
        ({"regularisation": 1e30, "upsampler": "multiview"}, "--regularisation must be at most 1000, .*: got 1e\\+30"),
        ({"lift_iterations": 0, "upsampler": "lift"}, "--lift-iterations must be at least 1: got 0"),
        ({"views": 1, "upsampler": "implicit"}, "--views must be at least 2: got 1"),
        ({"regularisation": -1.0, "upsampler": "multiview"}, "--regularisation must be at least 0"),
        ({"fit_steps": 0, "upsampler": "implicit"}, "--fit-steps must be at least 1"),
    ],
)
def test_options_of_upsamplers_are_checked(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_shards_are_larger_for_smaller_values() -> None:
    usual = 128 * 224 * 224
    assert config().shard_rows(usual) == 64
    assert config(dtype="float16").shard_rows(2 * usual) == 8
    assert config(shard_images=5).shard_rows(usual) == 5
    large = 384 * 448 * 448
    assert config().shard_rows(large) == 6
    assert config(dtype="float16").shard_rows(2 * large) == 3
    assert config().shard_rows(10**10) == 1


def test_differences_name_the_field() -> None:
    stored = {"backbone": {"name": "a", "layer": 11}, "pca": {"components": 64}}
    asked = {"backbone": {"name": "a", "layer": 9}, "pca": {"components": 64, "basis": "f00"}}
    assert differences(stored, asked) == [
        "backbone.layer: stored 11, asked 9",
        'pca.basis: stored null, asked "f00"',
    ]
    assert differences(stored, stored) == []


def test_the_hash_does_not_depend_on_order_but_on_every_value() -> None:
    configuration = known_configuration("f00")
    document = configuration.to_dict()
    backwards = {name: dict(reversed(part.items())) for name, part in reversed(document.items())}
    assert StoreConfiguration.from_dict(backwards).hash == configuration.hash
    for part, fields in document.items():
        for name in fields:
            changed = {**document, part: {**fields, name: "another"}}
            assert StoreConfiguration.from_dict(changed).hash != configuration.hash


def test_the_hash_is_that_of_earlier_stores() -> None:
    """Of canonical JSON, in which float16 has no error floor, a fitted basis has two fields, and sizes are lists."""
    configuration = known_configuration("f00", "float16", fitted_on_images=5)
    document = {
        "backbone": {"name": "test"},
        "geometry": {"fit": "crop", "max_pixels": 1048576, "min_side": 1, "output_size": [12, 10], "size": [12, 10]},
        "pca": {"basis": "f00", "components": 5, "fitted_on_images": 5},
        "source": {
            "image_column": None, "images": "/photos", "keys_sha256": configuration.source.keys_sha256,
            "kind": "folder", "limit": None, "rows": 11,
        },
        "storage": {"dtype": "float16", "shard_images": 4, "zstd_level": 1},
        "upsampler": {"name": "bilinear"},
    }  # fmt: skip
    assert configuration.hash == hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    assert StoreConfiguration.from_dict(document) == configuration


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "unknown parts seed"),
        ({"pca": None}, "has no pca"),
        ({"pca": {}}, r"configuration\.pca: .*components"),
        ({"storage": {"dtype": "int8", "codec": "x"}}, r"configuration\.storage: unknown fields codec"),
    ],
)
def test_another_configuration_is_refused_by_name(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StoreConfiguration.from_dict({**known_configuration("f00").to_dict(), **change})


def test_attributes_survive_json() -> None:
    attributes = StoreAttributes(known_configuration("f00"), {"torch": "2"}, ("x", "y"), 0.9, "f00", True)
    own = attributes.to_dict()["densefeat"]
    assert own["configuration_hash"] == attributes.hash
    assert StoreAttributes.from_dict(json.loads(json.dumps(own))) == attributes
