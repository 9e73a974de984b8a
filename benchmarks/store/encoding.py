"""Claim: bytes, error and cost of each quality of the stored features.

    python -m benchmarks.store.encoding

Training-free JBU's features of photographs of coco200 at 224 px, encoded as the main job encodes them, and decoded as
readers do, to [k, 224, 224] float32. Cosine similarity is to the features before they were encoded; seconds are those
of one core (process time), without computing features.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tyro
from torch import Tensor

from benchmarks import rows
from benchmarks.upsamplers import held_out
from benchmarks.upsamplers.held_out import SIZE
from densefeat import layout
from densefeat.rows.bilinear import interpolated
from densefeat.storage.guidance import decode_guidance, encode_guidance
from densefeat.torch import LastStep
from kernels.quantization import Encoding
from pipeline.features.backbone import build_backbone
from pipeline.store.calibration import choose_steps
from pipeline.upsamplers.jbu import JBU

LAYERS = {"lite0": None, "vit": 10}  # of the backbones; None: the main job's default
HALF = (SIZE[0] // 2, SIZE[1] // 2)
FLOORS = {"high": 0.1, "balanced": 0.1, "small": 0.35, "compact": 0.1}
Decode = Callable[[npt.NDArray[Any], npt.NDArray[np.uint8] | None], npt.NDArray[np.float32]]


def main(photos: int = 24, components: tuple[int, ...] = (64, 128)) -> None:
    """Measure."""
    torch.set_num_threads(1)
    images = torch.cat(held_out.photos("val", photos, torch.device("cpu")))
    for name, layer in LAYERS.items():
        known = held_out.BACKBONES[name]
        backbone = build_backbone(known["backbone"], size=SIZE, weights=known["weights"], layer=layer)
        with torch.inference_mode():
            features = torch.cat(list(map(backbone, images.split(4))))
            for k in components:
                low = projected(features, k)
                upsampler = JBU()
                high = torch.cat([upsampler(*one, SIZE) for one in zip(low.split(1), images.split(1), strict=True)])
                for quality, floor in FLOORS.items():
                    stored = high if quality == "high" else low
                    if quality in ("balanced", "small"):
                        pairs = zip(low.split(1), images.split(1), strict=True)
                        stored = torch.cat([upsampler(*one, HALF) for one in pairs])
                    guidance = images if quality == "compact" else None
                    row = {"backbone": name, "k": k, "photos": photos, "quality": quality, "error_floor": floor}
                    row |= measured(stored, guidance, high, floor, decoding(quality)) | rows.measured_on()
                    rows.append("encoding", row)
                    print(json.dumps(row), flush=True)


def projected(features: Tensor, k: int) -> Tensor:
    """The first k principal components of features [B, C, h, w]: [B, k, h, w]."""
    centred = features - features.mean((0, 2, 3), keepdim=True)
    directions = torch.linalg.svd(centred.movedim(1, -1).flatten(0, 2), full_matrices=False)[2]
    return torch.einsum("bchw,kc->bkhw", centred, directions[:k])


def decoding(quality: str) -> Decode:
    """From dequantized values and guidance [H, W, 3] to features."""
    if quality == "high":
        return lambda values, _: values
    if quality == "compact":
        step = LastStep.of({"size": SIZE, "last_step": JBU().last_step()})
        return step.on_arrays
    return lambda values, _: interpolated(values, SIZE)


def measured(stored: Tensor, guidance: Tensor | None, high: Tensor, floor: float, decode: Decode) -> dict[str, Any]:
    """Bytes, cosine similarity and seconds of one image, of values [B, k, …] that are stored for ``high``."""
    step = choose_steps("int8", stored.square().mean((0, 2, 3), dtype=torch.float64).numpy(), floor)
    encoding = Encoding.of_steps(step, torch.device("cpu"))
    nbytes, cosines, encode_s, decode_s = [], [], [], []
    for i, values in enumerate(stored.split(1)):
        pixels = None if guidance is None else np.ascontiguousarray(guidance[i].movedim(0, -1).numpy())
        begun = time.process_time()
        codes = encoding.encode(values).codes[0].numpy()
        chunk = layout.encode_chunk(codes)
        image = None if pixels is None else encode_guidance(pixels)
        encoded = time.process_time()
        read = layout.dequantize(layout.decode_values(chunk, "int8", codes.shape), step)
        found = decode(read, None if image is None else decode_guidance(image))
        encode_s.append(encoded - begun)
        decode_s.append(time.process_time() - encoded)
        nbytes.append(len(chunk) + (0 if image is None else len(image)))
        cosines.append(torch.cosine_similarity(torch.from_numpy(found), high[i], dim=0).flatten().numpy())
    together = np.concatenate(cosines)
    raw = high[0].numel() * 2
    return {
        "nbytes": round(statistics.mean(nbytes)),
        "of_float16": round(raw / statistics.mean(nbytes), 1),
        "cosine": {"mean": round(float(together.mean()), 5), "p1": round(float(np.percentile(together, 1)), 5)},
        "encode_s": round(statistics.median(encode_s), 5),
        "decode_s": round(statistics.median(decode_s), 5),
    }


if __name__ == "__main__":
    tyro.cli(main)
