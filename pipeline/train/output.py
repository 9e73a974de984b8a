"""The output folder of a training: what is there already, the claim on it, and the lease while a training writes."""

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from densefeat import layout
from densefeat.errors import StorageUnavailable
from densefeat.storage.objects import Objects
from pipeline.errors import JobError
from pipeline.io.outputs import check_output_file
from pipeline.io.storage import check_writable, storage_explained
from pipeline.reporting.software import software_versions
from pipeline.store.lease import Lease
from pipeline.train.checkpoints import HELD_OUT, LOSSES, has_checkpoints
from schemas.train_options import TrainConfig

__all__ = ["CURVES", "WEIGHTS", "check_outputs_writable", "claimed_output", "stored_configuration"]

WEIGHTS, CURVES = "upsampler.safetensors", "curves.png"
_RESULTS = (WEIGHTS, CURVES, LOSSES, HELD_OUT)  # which a training writes anew
# The object that claims --output. It holds the configuration, which --resume must match.
_CLAIM = "training.json"


def stored_configuration(config: TrainConfig) -> dict[str, Any] | None:
    """Configuration of the training in --output; None if there is none.

    Raises:
        JobError: there is one, and the options do not resume it; its configuration is lost; or there are other files
            that a training would replace.
    """
    with storage_explained(f"--output {config.output}"):
        objects = Objects(config.output)
        try:
            stored: dict[str, Any] = json.loads(objects.get(_CLAIM))["configuration"]
        except FileNotFoundError:
            if has_checkpoints(objects):
                raise JobError(
                    f"--output {config.output} has checkpoints, but no {_CLAIM} with their configuration: choose "
                    "another --output, or delete the checkpoints"
                ) from None
            if objects.exists(layout.ATTRIBUTES):
                raise JobError(f"--output {config.output} is a feature store: choose another --output") from None
            if others := [name for name in _RESULTS if objects.exists(name)]:
                raise JobError(
                    f"--output {config.output} holds {' and '.join(others)}, but no {_CLAIM}: a training would replace "
                    "what may be of another one. Choose another --output, or delete it"
                ) from None
            return None
        except (ValueError, LookupError, TypeError) as error:
            raise JobError(
                f"--output {config.output}: its {_CLAIM} is damaged ({error}), so the configuration of its checkpoints "
                "is unknown: start over with another --output"
            ) from error
    if not config.resume:
        raise JobError(
            f"--output {config.output} already holds a training: pass --resume to continue it, or choose another"
        )
    return stored


def check_outputs_writable(config: TrainConfig) -> None:
    """Check that all outputs are writable before training for hours. The last check, because it writes."""
    check_writable(Objects(config.output), f"--output {config.output}")
    if config.featup_checkpoint is not None:
        check_output_file("--featup-checkpoint", config.featup_checkpoint)


@contextmanager
def claimed_output(output: str, configuration: dict[str, Any], *, begun: bool) -> Iterator[None]:
    """Claim --output for the training in the ``with`` block, and hold the lease of it.

    The claim is the configuration, written unless it is there already. If the block ends without a checkpoint, it is
    removed, and the folder if it was created for it, so that other options can be tried there.

    Args:
        output: folder or URI of the training.
        configuration: everything the weights depend on, JSON-serialisable.
        begun: whether the training is resumed, so that the claim is there.

    Raises:
        JobError: another training is at work there, or was started there in the meantime.
    """
    objects = Objects(output)
    with ExitStack() as stack:
        stack.enter_context(objects.leaving_no_folders())
        with storage_explained(f"--output {output}"):
            stack.enter_context(Lease(objects, None))
        if not begun:
            _claim(objects, configuration)
            stack.callback(_remove_useless_claim, objects)
        yield


def _claim(objects: Objects, configuration: dict[str, Any]) -> None:
    claim = {"configuration": configuration, "versions": software_versions(), "claimed_by": uuid.uuid4().hex}
    with storage_explained(f"--output {objects.uri}"):
        try:
            objects.create(_CLAIM, json.dumps(claim, indent=2).encode())
        except FileExistsError:
            raise JobError(f"another training was started in {objects.uri}: choose another --output") from None


def _remove_useless_claim(objects: Objects) -> None:
    with suppress(OSError, StorageUnavailable):  # do not mask an error of the training
        if not has_checkpoints(objects):
            objects.delete(_CLAIM)
