"""Claim: this commit writes bit-identical stores to another's: every upsampler, both dtypes, 0, 1 and 2 workers.

    python -m benchmarks.jobs.same_bytes 8a1e354    # any commit, tag or branch; run it after a large refactoring

Both commits run on this machine with this Python, on the same photographs and weights; digests stored in the repository
would be valid for one processor only. The features' objects, the index and the small arrays (steps and PCA) are
compared. The exit code is 1 if any differ. With ``--basis`` all jobs share a basis fitted by the other commit, so that
a change in fitting bases does not hide other differences.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
SIZE, CHANNELS, PATCH = "64", 128, 8  # for layer 2 of resnet18
BACKBONE = ["--backbone", "resnet18", "--weights", "random", "--layer", "2", "--size", SIZE, "--device", "cpu"]
JOB = ["--components", "6", "--shard-images", "4", "--batch-size", "3", "--max-failed-share", "0.5"]

# Random but fixed weights, saved by the other commit from its own networks, wherever they are located there.
MAKE_WEIGHTS = f"""
import importlib, sys, torch
def network(*places):
    for place in places:
        try:
            return importlib.import_module(place)
        except ImportError:
            pass
    raise SystemExit(f"none of {{places}} exists")
torch.manual_seed(0)
lift = network("pipeline.upsamplers.lift.network", "pipeline.lift").LiFT({CHANNELS}, {PATCH})
anyup = network("pipeline.upsamplers.anyup.network", "pipeline.anyup").AnyUp(16)
torch.save(lift.state_dict(), sys.argv[1] + "/lift.pth")
torch.save(anyup.state_dict(), sys.argv[1] + "/anyup.pth")
"""


@dataclass(frozen=True)
class Case:
    """One job: its name, its options besides the common ones, and the number of workers."""

    name: str
    options: tuple[str, ...]
    workers: int = 0


def cases(folder: Path) -> list[Case]:
    """Every upsampler in both dtypes without Ray; the default one on one and two Ray workers."""
    upsamplers: dict[str, tuple[str, ...]] = {
        "bilinear": ("--upsampler", "bilinear"),
        "jbu": (),
        "lift": ("--upsampler", "lift", "--upsampler-weights", f"{folder}/lift.pth"),
        "anyup": ("--upsampler", "anyup", "--upsampler-weights", f"{folder}/anyup.pth"),
        "multiview": ("--upsampler", "multiview", "--upsampler-weights", f"{folder}/pooling.safetensors"),
        "multiview-fitted": ("--upsampler", "multiview", "--views", "3"),
        "implicit": ("--upsampler", "implicit", "--views", "4", "--fit-steps", "3"),
    }
    every = [
        Case(f"{name}-{dtype}", (*options, "--dtype", dtype))
        for name, options in upsamplers.items()
        for dtype in ("int8", "float16")
    ]
    return [*every, Case("jbu-1-worker", (), 1), Case("jbu-2-workers", (), 2)]


def run(checkout: Path, module: str, *options: str) -> None:
    """Run a job of a checkout."""
    command = [sys.executable, "-m", module, *options, *BACKBONE]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{checkout}: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def make_photographs(folder: Path) -> None:
    """Eleven crops of scikit-image's photographs."""
    import skimage
    from PIL import Image

    folder.mkdir()
    names = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
    for i in range(11):
        picture = Image.open(Path(skimage.__file__).parent / "data" / names[i % 5]).convert("RGB")
        picture.crop((9 * i, 7 * i, 9 * i + 150 + i, 7 * i + 130)).save(folder / f"{i:02}.png")


def add_unusable(folder: Path) -> None:
    """Add two files that become failed rows."""
    from PIL import Image

    Image.new("RGB", (3, 3)).save(folder / "05b_small.png")
    (folder / "07b_cut.png").write_bytes((folder / "07.png").read_bytes()[:5000])


def digests(store: Path) -> dict[str, str]:
    """SHA-256 of everything that readers read: the features' objects, small arrays and the index."""
    files = [*store.glob("features/c/**/*"), *store.glob("step/c/*"), *store.glob("pca/*/c/**/*")]
    files += store.glob("upsampler/*/c/**/*")
    files.append(store / "index.parquet")
    return {str(f.relative_to(store)): hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(files) if f.is_file()}


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Create a temporary work tree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "densefeat"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=CHECKOUT, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=CHECKOUT, check=True)


def compare(other: Path, folder: Path, basis: bool) -> int:
    """Run all cases in both checkouts; return the number of cases that differ."""
    images = folder / "photographs"
    make_photographs(images)
    subprocess.run([sys.executable, "-c", MAKE_WEIGHTS, folder], cwd=other, check=True)
    source = ["--images", str(images)]
    fit = ["--fit-images", "6", "--views", "5", "--held-out-views", "3"]
    job = "jobs.fit_pooling" if (other / "jobs" / "fit_pooling.py").exists() else "jobs.fit_downsampler"
    run(other, job, *source, "--output", f"{folder}/pooling.safetensors", *fit)
    shared: list[str] = []
    if basis:
        run(other, "jobs.fit_pca", *source, "--output", f"{folder}/basis.npz", "--components", "6", "--workers", "0")
        shared = ["--pca", f"{folder}/basis.npz"]
    add_unusable(images)
    failed = 0
    for case in cases(folder):
        results = []
        for name, checkout in (("other", other), ("this", CHECKOUT)):
            store = folder / name / case.name
            options = [*source, "--store", str(store), *JOB, *shared, *case.options, "--workers", str(case.workers)]
            run(checkout, "jobs.upsample_imagenet", *options)
            results.append(digests(store))
        others, own = results
        different = sorted(key for key in {*others, *own} if others.get(key) != own.get(key))
        failed += bool(different)
        verdict = f"DIFFERENT: {', '.join(different)}" if different else "same"
        print(f"{case.name:20} {len(others):3} files  {verdict}", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit to compare with")
    parser.add_argument("--basis", action="store_true", help="share a basis that the other commit fitted")
    arguments = parser.parse_args()
    with checked_out(arguments.commit) as other, tempfile.TemporaryDirectory() as folder:
        failed = compare(other, Path(folder), arguments.basis)
    print(f"{failed} cases differ" if failed else "all cases are the same")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
