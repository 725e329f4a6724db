"""The few calls of NVIDIA's driver by which processes share the memory of a GPU.

`libcuda` comes with every driver, so this needs no package. PyTorch's own way of sharing would put reference counters
into /dev/shm, which a killed process leaves behind."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.kv.errors import LinkLost
from common.kv.offer import CudaMemory

_LAZY_ENABLE_PEER_ACCESS = 1
_HANDLE_BYTES = 64


class _IpcHandle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


def gpu_ids() -> list[str]:
    """The GPUs that this process sees, in its own order; the same GPU has the same id in all processes."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def export_memory(memory: torch.Tensor) -> CudaMemory:
    """What another process needs to open a device tensor. Raises `LinkLost` where this memory cannot be shared, as that
    of PyTorch's expandable segments."""
    index, address = memory.get_device(), memory.data_ptr()
    handle, base, size = _IpcHandle(), ctypes.c_uint64(), ctypes.c_size_t()
    with _context(index):
        _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
    return CudaMemory(bytes(handle.reserved), address - base.value, gpu_ids()[index])


class OpenedMemory:
    """Memory of another process; `tensor` is all of what was exported, uint8 [num_bytes]."""

    def __init__(self, exported: CudaMemory, num_bytes: int) -> None:
        """Raises `LinkLost`, also for memory of this very process."""
        self._index = gpu_ids().index(exported.gpu_id)
        self._base = ctypes.c_uint64()
        handle = _IpcHandle.from_buffer_copy(exported.handle)
        with _context(self._index):
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._base), handle, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        self.tensor = torch.as_tensor(
            _DeviceBytes(self._base.value + exported.offset, num_bytes), device=f"cuda:{self._index}"
        )

    def close(self) -> None:
        """Nothing may be using `tensor` any more. Idempotent."""
        if self._base.value:
            self.tensor = torch.empty(0, dtype=torch.uint8)
            with _context(self._index):
                _call("cuIpcCloseMemHandle", self._base)
            self._base = ctypes.c_uint64()


class _DeviceBytes:
    """Device memory in the form that PyTorch takes without copying."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


@contextmanager
def _context(index: int) -> Iterator[None]:
    """PyTorch's own context of a device, for the calling thread."""
    torch.cuda.current_stream(index)  # PyTorch makes the context when it is first needed
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    try:
        _call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        _call("cuDevicePrimaryCtxRelease_v2", device)


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(ctypes.c_int(code), ctypes.byref(text))
        raise LinkLost(f"{name}: {text.value.decode() if text.value else code}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise LinkLost(f"no NVIDIA driver: {error}") from error
