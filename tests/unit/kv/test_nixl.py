"""What the transfer library does by itself."""

from __future__ import annotations

import time

import pytest

from common.kv.nixl_agent import NixlAgent, nixl_module


@pytest.mark.skipif(nixl_module() is None, reason="needs the transfer library: pip install .[nixl]")
def test_an_agent_without_work_leaves_the_processor_alone() -> None:
    agent = NixlAgent("idle")
    used_s = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - used_s < 0.03
    assert agent.metadata
