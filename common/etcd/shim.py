"""`etcd3`'s messages and stubs under today's protobuf.

The generated modules of `etcd3` 0.12.0 date from protobuf 3.x and build descriptors in a way that protobuf >=
4 refuses. The serialized descriptors inside them are still good: they are read out of the source without
running it and loaded into a private pool (private, so that another package with a `kv.proto` does not clash).
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "etcd3.etcdrpc"
PROTOS = ("kv", "auth", "rpc")
"""in the order in which they import each other"""


def load_etcdrpc() -> Any:
    """The module `etcd3.etcdrpc`, its protobuf messages as attributes, and `rpc_pb2_grpc` with the stubs.

    Afterwards `import etcd3` works too. Raises `ImportError` when `etcd3` is missing or another version.
    """
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    spec = importlib.util.find_spec("etcd3")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package etcd3 is not installed: pip install 'dejavu-serve[server]'")
    folder = Path(spec.submodule_search_locations[0]) / "etcdrpc"
    pool = DescriptorPool()
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    modules = {PACKAGE: package}
    for proto in PROTOS:
        pool.AddSerializedFile(_serialized_descriptor(folder / f"{proto}_pb2.py"))
        module = _message_module(pool, proto)
        modules[module.__name__] = module
        setattr(package, f"{proto}_pb2", module)
    _copy_public(modules[f"{PACKAGE}.rpc_pb2"], package)
    sys.modules.update(modules)
    try:
        _copy_public(_import_stubs(folder / "rpc_pb2_grpc.py"), package)
    except BaseException:
        for name in modules:
            del sys.modules[name]
        raise
    return package


def _serialized_descriptor(path: Path) -> bytes:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Call):
            text = ast.literal_eval(node.value.args[0])
            return str(text).encode("latin1")
    raise ImportError(f"no serialized descriptor in {path}: etcd3 0.12.0 is expected")


def _message_module(pool: DescriptorPool, proto: str) -> ModuleType:
    descriptor = pool.FindFileByName(f"{proto}.proto")
    module = ModuleType(f"{PACKAGE}.{proto}_pb2")
    for name, message in descriptor.message_types_by_name.items():
        setattr(module, name, GetMessageClass(message))
    for name, enum in descriptor.enum_types_by_name.items():
        setattr(module, name, EnumTypeWrapper(enum))
    return module


def _import_stubs(path: Path) -> ModuleType:
    name = f"{PACKAGE}.rpc_pb2_grpc"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _copy_public(source: ModuleType, target: ModuleType) -> None:
    for name, value in vars(source).items():
        if not name.startswith("_"):
            setattr(target, name, value)
