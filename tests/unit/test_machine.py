"""What figures say of where they were taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtest.machine import describe_machine

CARD = "NVIDIA H200, 580.159.04, 143771 MiB"


@pytest.mark.parametrize(("code", "gpus"), [(0, [CARD, CARD]), (9, [])])
def test_its_gpus_belong_to_it(code: int, gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{CARD}\\n{CARD}\\n'; exit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert describe_machine()["gpus"] == gpus


def test_without_the_driver_there_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_machine()["gpus"] == []
