"""The messages of etcd3 under today's protobuf."""

from __future__ import annotations

import importlib

from common.etcd.shim import load_etcdrpc


def test_messages_travel() -> None:
    rpc = load_etcdrpc()
    request = rpc.TxnRequest(compare=[rpc.Compare(key=b"k", target=rpc.Compare.MOD, mod_revision=3)])
    assert rpc.TxnRequest.FromString(request.SerializeToString()) == request
    assert rpc.AlarmType.Name(1) == "NOSPACE"


def test_etcd3_itself_imports_afterwards() -> None:
    rpc = load_etcdrpc()
    etcd3 = importlib.import_module("etcd3")
    assert etcd3.etcdrpc is rpc
    assert load_etcdrpc() is rpc
