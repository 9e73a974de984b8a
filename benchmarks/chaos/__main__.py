"""Claim: whatever is killed, stopped, lost, refused or broken while a job runs, its store is that of a quiet run.

    python -m benchmarks.chaos                         # all scenarios; make chaos
    python -m benchmarks.chaos --scenario all --short  # some minutes
    python -m benchmarks.chaos --scenario storage --seed 7

The main job on a Ray cluster of several nodes on this machine, at an S3 server on this machine. Faults come from
outside, and are real: signals to processes, requests that the storage answers badly, late or never, images that make
the decoder crash, and nodes whose clock is an hour off. Each scenario is compared with the job in one process without
faults: exit code, all bytes of the store but the records of when and where shards were made, and the index. The faults
are drawn from the seed, and strike by the number of finished shards.
"""

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from benchmarks import rows
from benchmarks.chaos.run import Quiet, run
from benchmarks.chaos.schedule import SCENARIOS, shortened

IMAGES, SHORT_IMAGES = 512, 160
MOST_SAID = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="which to run")
    parser.add_argument("--images", type=int, help=f"number of images; {IMAGES}, or {SHORT_IMAGES} with --short")
    parser.add_argument("--faults", type=int, help="number of faults that strike each scenario; else its own")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--short", action="store_true", help="every kind of fault once; no row is kept")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr, datefmt="%H:%M:%S")
    images = arguments.images or (SHORT_IMAGES if arguments.short else IMAGES)
    failed, quiet = False, Quiet()
    for name in arguments.scenario:
        scenario = SCENARIOS[name]
        if arguments.short:
            scenario = shortened(scenario)
        if arguments.faults is not None:
            scenario = scenario.with_faults(arguments.faults)
        folder = Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
        print(f"{name}: {images} images, seed {arguments.seed}; logs in {folder}", file=sys.stderr)
        outcome = run(name, scenario, images, arguments.seed, folder, quiet)
        print(json.dumps(outcome.row))
        for wrong in outcome.wrong[:MOST_SAID]:
            print(f"{name}: {wrong}", file=sys.stderr)
        if len(outcome.wrong) > MOST_SAID:
            print(f"{name}: and {len(outcome.wrong) - MOST_SAID:,} more", file=sys.stderr)
        failed |= bool(outcome.wrong)
        if not outcome.wrong and not arguments.short:
            rows.append("chaos", {**outcome.row, **rows.measured_on()})
    sys.exit(failed)


if __name__ == "__main__":
    main()
