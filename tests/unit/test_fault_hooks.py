"""The hooks for faults: absent unless they are asked for."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from common.fault_hooks import STUCK_LOOP, STUCK_STEP, VARIABLE, install_fault_hook


@pytest.mark.parametrize("setting", [None, "", "0", "true"])
async def test_hooks_are_absent_by_default(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if setting is not None:
        monkeypatch.setenv(VARIABLE, setting)
    for number in (STUCK_LOOP, STUCK_STEP):
        assert not install_fault_hook(asyncio.get_running_loop(), number, lambda: None)
        assert signal.getsignal(number) is signal.SIG_DFL


async def test_the_signal_calls_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    loop, failed = asyncio.get_running_loop(), asyncio.Event()
    assert install_fault_hook(loop, STUCK_LOOP, failed.set)
    try:
        os.kill(os.getpid(), STUCK_LOOP)
        async with asyncio.timeout(10):
            await failed.wait()
    finally:
        loop.remove_signal_handler(STUCK_LOOP)
