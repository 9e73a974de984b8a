"""The command ``densefeat``: describe, export and browse a feature store. It only reads the store.

Exit codes: 0: done; 1: the store does not conform to its format (`info --strict`); 2: cannot be done as requested;
70: internal error in densefeat; 130: interrupted.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from densefeat import __version__
from densefeat.errors import DensefeatError

# zarr and pyarrow are imported by the commands that need them, so that --help is quick.
if TYPE_CHECKING:
    from densefeat.store import FeatureStore

__all__ = ["main"]

_Description = TypeVar("_Description")

DONE, NOT_CONFORMING, REFUSED, FAULT, INTERRUPTED = 0, 1, 2, 70, 130


class _Refused(DensefeatError):  # noqa: N818 - says what happened
    """The command cannot be done as requested."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and exit with its code.

    Args:
        arguments: without the program's name; None: those of the process.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # For terminals that lack characters, and paths that are no text.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (DensefeatError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(REFUSED)
    except Exception:
        import traceback

        traceback.print_exc()
        print("internal error; please report it with the traceback above", file=sys.stderr)  # noqa: T201
        sys.exit(FAULT)
    sys.exit(DONE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("densefeat", description="Describe, export or browse a store of dense features.")
    parser.add_argument("--version", action="version", version=f"densefeat {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = _command(commands, "info", _info, "print rows, failures, shape, size and configuration")
    info.add_argument("--json", action="store_true", help="print one JSON object")
    info.add_argument(
        "--strict", action="store_true", help="check the store against docs/format.md, without reading features"
    )

    _command(commands, "card", _card, "print a card of the store, in Markdown, for whoever gets a copy of it")

    export = _command(commands, "export", _export, "write rows to an .npz file, or their pixels to a .parquet file")
    export.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="ROW",
        help="row numbers, or ranges such as 0:100; the last two: --rows=-2:",
    )
    export.add_argument("--keys", nargs="+", default=[], metavar="KEY", help="keys of rows")
    export.add_argument("--output", required=True, type=Path, help="file to write, .npz or .parquet; must not exist")

    browse = _command(commands, "browse", _browse, "show the store in a web browser")
    browse.add_argument("--images", metavar="ROOT", help="folder or URI of the images, if they have moved")
    browse.add_argument(
        "--texts",
        metavar="FILE.npz",
        help="embeddings of texts to compare images with: arrays names [Q] and vectors [Q, C], or one [C] per name",
    )
    browse.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; others than loopback need a token (default: %(default)s)",
    )
    browse.add_argument(
        "--port", type=int, default=8000, help="port to listen on, 0 for any free one (default: %(default)s)"
    )
    browse.add_argument("--token", help="token that each request must carry; random by default on other hosts")
    return parser


def _command(commands: Any, name: str, function: Any, purpose: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=purpose, description=f"{purpose.capitalize()}.")
    command.add_argument("store", metavar="STORE", help="folder or URI of the store")
    command.set_defaults(command=function)
    return command


def _info(options: argparse.Namespace) -> None:
    from densefeat.console.describe import facts_of
    from densefeat.store import FeatureStore

    store = FeatureStore(options.store)
    if options.strict:
        _check(store, as_json=options.json)
        return
    if options.json:
        print(json.dumps(_described(store, facts_of), indent=2))  # noqa: T201
    else:
        print(_described(store, _as_text))  # noqa: T201


def _as_text(store: "FeatureStore") -> str:
    from densefeat.console.describe import facts_of, on_one_line

    facts = facts_of(store)
    k, height, width = facts["shape"]
    statuses = dict(facts["statuses"])
    variance = facts["explained_variance"]
    lines = [facts["uri"], f"rows      {facts['rows']:,}: {statuses.pop('ok', 0):,} with features"]
    lines += [f"          {count:,} {status}, e.g. {facts['examples'][status]}" for status, count in statuses.items()]
    lines.append(f"features  {k}×{height}×{width} {facts['dtype']} (components × height × width)")
    if facts["representation"] == "compact":
        _, low, wide = facts["stored_shape"]
        lines.append(f"          compact: stored at {low}×{wide}; readers take the last step of upsampling")
    lines += [
        f"variance  {'unknown' if variance is None else f'{variance:.1%} explained'}",
        f"size      {facts['nbytes'] / 1e6:,.1f} MB compressed, {facts['uncompressed_nbytes'] / 1e6:,.1f} MB before",
        f"classes   {len(facts['class_names']):,}",
    ]
    lines += [f"appended  {on_one_line(source)}" for source in facts["appended"]]
    lines += [f"{part:<9} {on_one_line(settings)}" for part, settings in facts["configuration"].items()]
    return "\n".join(lines)


def _card(options: argparse.Namespace) -> None:
    from densefeat.console.describe import card
    from densefeat.store import FeatureStore

    print(_described(FeatureStore(options.store), card), end="")  # noqa: T201


def _described(store: "FeatureStore", describe: Callable[["FeatureStore"], _Description]) -> _Description:
    """A description, of which damaged attributes may undo any part.

    Raises:
        _Refused: the store does not conform to its format.
    """
    try:
        return describe(store)
    except (LookupError, TypeError, ValueError, AttributeError):
        from densefeat.conformance import problems

        if found := problems(store):
            raise _Refused(f"{store.uri} does not conform to its format: {'; '.join(found)}") from None
        raise


def _check(store: "FeatureStore", *, as_json: bool) -> None:
    from densefeat.conformance import problems

    found, version = problems(store), store.attributes["format_version"]
    if as_json:
        print(json.dumps({"uri": store.uri, "format_version": version, "problems": found}, indent=2))  # noqa: T201
    else:
        print("\n".join(found) or f"{store.uri} conforms to format version {version}")  # noqa: T201
    if found:
        sys.exit(NOT_CONFORMING)


def _export(options: argparse.Namespace) -> None:
    from densefeat.arguments import row_numbers
    from densefeat.console import export
    from densefeat.storage.failures import is_full
    from densefeat.storage.local_files import create_from
    from densefeat.store import FeatureStore

    write = {".npz": export.write_npz, ".parquet": export.write_pixels}.get(options.output.suffix.lower())
    if write is None:
        raise _Refused(f"--output must end with .npz or .parquet: got {options.output}")
    taken = _Refused(f"--output {options.output} exists: delete it, or choose another name")
    if options.output.exists():
        raise taken
    if not options.output.absolute().parent.is_dir():
        raise _Refused(f"--output {options.output}: the folder {options.output.parent} does not exist")
    if not options.rows and not options.keys:
        raise _Refused("nothing to export: pass --rows or --keys")
    store = FeatureStore(options.store)
    try:
        rows = store.checked_rows([*row_numbers(options.rows, len(store)), *options.keys])
    except (KeyError, ValueError) as error:
        raise _Refused(str(error.args[0])) from error
    partial = options.output.with_name(f".export-{os.getpid()}.tmp")
    try:
        write(store, rows.tolist(), partial)
        create_from(partial, options.output)
    except FileExistsError:  # since it was checked
        raise taken from None
    except OSError as error:
        if not is_full(error):  # of the store, or has the name of a file
            raise
        raise _Refused(f"--output {options.output} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{options.output}: {len(rows):,} row{'s' if len(rows) != 1 else ''}")  # noqa: T201


def _browse(options: argparse.Namespace) -> None:
    from densefeat.page import serve

    try:
        serve(
            options.store,
            images=options.images,
            texts=options.texts,
            host=options.host,
            port=options.port,
            token=options.token,
        )
    except ValueError as error:  # the texts, the port, or the token
        raise _Refused(str(error)) from error


if __name__ == "__main__":
    main()
