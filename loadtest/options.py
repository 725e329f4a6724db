"""Options that the load tests have in common: what means the same is called the same, and `--help` says all of it."""

from __future__ import annotations

import argparse

from deploy.options import Help

DTYPES = ("auto", "float32", "bfloat16", "float16")


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Of `python -m loadtest.NAME`."""
    return argparse.ArgumentParser(
        f"python -m loadtest.{name}", description=description, formatter_class=Help, allow_abbrev=False
    )


def add_json(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """`--json FILE`."""
    parser.add_argument("--json", required=required, metavar="FILE", help="where the figures go")


def add_model(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    """`--model DIR` and `--dtype TYPE`."""
    parser.add_argument("--model", default="models/tiny", metavar="DIR", help="Hugging Face checkpoint")
    parser.add_argument("--dtype", default=dtype, choices=DTYPES, help="auto: the checkpoint's")


def add_runs(parser: argparse.ArgumentParser, default: int, what: str) -> None:
    """`--runs N`."""
    parser.add_argument("--runs", type=int, default=default, metavar="N", help=what)


def add_seed(parser: argparse.ArgumentParser, what: str) -> None:
    """`--seed S`."""
    parser.add_argument("--seed", type=int, default=0, metavar="S", help=what)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """What stands behind `--`: as it would be typed after `dejavu serve`."""
    parser.add_argument(
        "serve_options",
        nargs="*",
        metavar="-- SERVE_OPTION",
        help="more options for `dejavu serve`, all behind one --, for example: -- --token-stages 2 --standbys 1",
    )
