# SPDX-License-Identifier: BSD-3-Clause
"""The command ``pyconvbn``.

Exit codes: 0 everything holds, 1 a check or verification failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__, _info

__all__ = ["main"]

FAILED, WRONG_USE = 1, 2


class _UsageError(Exception):
    """Wrong use that only shows after the arguments were parsed."""


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return value


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        try:
            _info.set_num_threads(threads)
        except ValueError as error:
            raise _UsageError(f"argument --threads: {error}") from None


def _print_json(value: Any) -> None:
    # ASCII, so that it is the same in every locale; NaN and Infinity are not JSON.
    print(json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) <= sys.float_info.max:
        return str(value)
    return value


# -- demo --------------------------------------------------------------------------------------


def _check_plot(path: pathlib.Path) -> None:
    """Find out before the work, not after it, that the plot cannot be drawn."""
    if not path.resolve().parent.is_dir():
        raise _UsageError(f"argument --plot: the folder of {str(path)!r} does not exist")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise _UsageError(
            "argument --plot: needs matplotlib, which is not installed "
            "(pip install matplotlib, or 'pyconvbn[plot]')"
        ) from None
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in formats:
        known = ", ".join(sorted(formats))
        raise _UsageError(
            f"argument --plot: expected a file name ending in one of {known}, got {str(path)!r}"
        )


def _check_page(path: pathlib.Path) -> None:
    if not path.resolve().parent.is_dir():
        raise _UsageError(f"argument --html: the folder of {str(path)!r} does not exist")
    if path.is_dir():
        raise _UsageError(f"argument --html: {str(path)!r} is a folder")


def _demo(args: argparse.Namespace) -> int:
    from ._demo_measure import run_demo
    from ._demo_page import write_page
    from ._demo_view import Terminal, demo_text, draw_plot

    if args.plot is not None:
        _check_plot(args.plot)
    if args.html is not None:
        _check_page(args.html)
    _set_threads(args.threads)
    try:
        result = run_demo(images=args.images, batch=args.batch)
    except ValueError as error:
        raise _UsageError(str(error)) from None
    except MemoryError:
        raise _UsageError(f"argument --batch: {args.batch} images do not fit in memory") from None
    if args.plot is not None:
        try:
            draw_plot(result, args.plot)
        except OSError as error:
            raise _UsageError(f"argument --plot: {error}") from None
    if args.html is not None:
        try:
            write_page(result, args.html)
        except OSError as error:
            raise _UsageError(f"argument --html: {error}") from None
    if args.json:
        _print_json(result.to_dict())
    else:
        print(demo_text(result, Terminal(sys.stdout)), end="")
        for what, path in (("plot", args.plot), ("page", args.html)):
            if path is not None:
                print(f"\n{what} written to {path}")
    return 0 if result.verified else FAILED


# -- doctor ------------------------------------------------------------------------------------


def _doctor(args: argparse.Namespace) -> int:
    report = _info.doctor()
    if args.json:
        _print_json(report.to_dict())
    else:
        print(report)
    return 0 if report.ok else FAILED


# -- bench -------------------------------------------------------------------------------------


def _bench(args: argparse.Namespace) -> int:
    from ._bench import bench_text, run_bench
    from ._demo_view import Terminal

    _set_threads(args.threads)
    progress: Callable[[str], None] = lambda _: None  # noqa: E731
    if sys.stderr.isatty():

        def progress(name: str) -> None:
            print(f"\r\x1b[K{name}", end="", file=sys.stderr, flush=True)

    result = run_bench(batch=args.batch, progress=progress)
    progress("")
    if args.json:
        _print_json(result)
    else:
        print(bench_text(result, Terminal(sys.stdout)), end="")
    return 0 if result["verified"] else FAILED


# -- command line ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyconvbn",
        description="Convolution + BatchNorm as one operator over NumPy arrays.",
        epilog="exit codes: 0 everything holds, 1 a check or verification failed, 2 wrong use",
    )
    parser.add_argument("--version", action="version", version=f"pyconvbn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="a trained network on real images: what is folded, is it right, is it faster",
        description="Trace an embedded network, fold its BatchNorms, and run it on handwritten digits it was not "
        "trained on: unfused, fused, folded, and with prepared operators.",
    )
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    demo.add_argument(
        "--plot", type=pathlib.Path, metavar="FILE",
        help="draw digits, times and errors (.png, .svg, ...)",
    )  # fmt: skip
    demo.add_argument(
        "--html", type=pathlib.Path, metavar="FILE",
        help="write the demo as a notebook: graph before and after, report, proof",
    )  # fmt: skip
    demo.add_argument(
        "--images", type=_positive, metavar="N", help="images to classify (default: all)"
    )
    demo.add_argument(
        "--batch", type=_positive, default=64, metavar="N",
        help="batch size of the timing (default: %(default)s)",
    )  # fmt: skip
    demo.add_argument("--threads", type=_positive, metavar="N", help="threads to use")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser(
        "doctor",
        help="check this installation; paste the output into a bug report",
        description="Check this installation against the float64 reference; show its settings.",
    )
    doctor.add_argument("--json", action="store_true", help="print the report as JSON")
    doctor.set_defaults(run=_doctor)

    bench = commands.add_parser(
        "bench",
        help="time a few layers, unfused against fused",
        description="Time a few well-known layers in this process, each checked against float64 "
        "first. The full benchmark, with other libraries, is benchmarks/run.py in the source tree.",
    )
    bench.add_argument("--json", action="store_true", help="print the result as JSON")
    bench.add_argument(
        "--batch", type=_positive, default=1, metavar="N", help="batch size (default: %(default)s)"
    )
    bench.add_argument("--threads", type=_positive, metavar="N", help="threads to use")
    bench.set_defaults(run=_bench)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process); returns the exit code.

    >>> main(["demo", "--json"])  # doctest: +SKIP
    0
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except _UsageError as error:
        print(f"pyconvbn {args.command}: error: {error}", file=sys.stderr)
        return WRONG_USE
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    sys.exit(main())
