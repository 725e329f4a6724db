"""What the load tests pass on to `dejavu serve`."""

from __future__ import annotations

import pytest

from loadtest.options import add_json, add_serve_options, new_parser


@pytest.mark.parametrize("options", [[], ["--colocated"], ["--colocated", "--token-stages", "2"], ["--host", "::1"]])
def test_what_stands_behind_two_dashes_is_for_the_system(options: list[str]) -> None:
    parser = new_parser("serve", "")
    add_json(parser)
    add_serve_options(parser)
    assert parser.parse_args(["--json", "FILE", "--", *options]).serve_options == options


def test_the_help_tells_defaults_but_not_of_what_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    parser = new_parser("serve", "Says so.")
    add_json(parser)
    parser.add_argument("--runs", default=3, help="as many")
    parser.print_help()
    told = capsys.readouterr().out
    assert "as many (default: 3)" in told and "None" not in told
