"""The few calls of NVIDIA's driver by which processes share the memory of a GPU, and a GPU reaches that of the host.

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
_FOR_ALL_CONTEXTS, _FOR_THE_DEVICE = 1, 2


class IpcHandle(ctypes.Structure):
    """The driver takes it by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * _HANDLE_BYTES)]


_Address, _Size, _Pointer = ctypes.c_uint64, ctypes.c_size_t, ctypes.POINTER
_SIGNATURES: dict[str, list[Any]] = {
    "cuInit": [ctypes.c_uint],
    "cuDeviceGet": [_Pointer(ctypes.c_int), ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_Pointer(ctypes.c_void_p), ctypes.c_int],
    "cuCtxPushCurrent_v2": [ctypes.c_void_p],
    "cuCtxPopCurrent_v2": [_Pointer(ctypes.c_void_p)],
    "cuGetErrorName": [ctypes.c_int, _Pointer(ctypes.c_char_p)],
    "cuMemGetAddressRange_v2": [_Pointer(_Address), _Pointer(_Size), _Address],
    "cuIpcGetMemHandle": [_Pointer(IpcHandle), _Address],
    "cuIpcOpenMemHandle_v2": [_Pointer(_Address), IpcHandle, ctypes.c_uint],
    "cuIpcCloseMemHandle": [_Address],
    "cuMemHostRegister_v2": [ctypes.c_void_p, _Size, ctypes.c_uint],
    "cuMemHostGetDevicePointer_v2": [_Pointer(_Address), ctypes.c_void_p, ctypes.c_uint],
    "cuMemHostUnregister": [ctypes.c_void_p],
}


def gpu_ids() -> list[str]:
    """The GPUs that this process sees, in its own order; the same GPU has the same id in all processes."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def export_memory(memory: torch.Tensor) -> CudaMemory:
    """What another process needs to open a device tensor. Raises `LinkLost` where this memory cannot be shared, as that
    of PyTorch's expandable segments."""
    index, address = memory.get_device(), memory.data_ptr()
    handle, base, size = IpcHandle(), _Address(), _Size()
    with _context(index):
        # PyTorch cuts its tensors out of larger allocations, and it is an allocation that is shared
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return CudaMemory(bytes(handle.reserved), address - base.value, gpu_ids()[index])


class OpenedMemory:
    """Memory of another process; `tensor` is all of what was exported, uint8 [num_bytes]."""

    def __init__(self, exported: CudaMemory, num_bytes: int) -> None:
        """Raises `LinkLost`, also for memory of this very process."""
        self._index = gpu_ids().index(exported.gpu_id)
        self._base = _Address()
        handle = IpcHandle.from_buffer_copy(exported.handle)
        with _context(self._index):
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._base), handle, _LAZY_ENABLE_PEER_ACCESS)
        device = torch.device("cuda", self._index)
        try:
            self.tensor = device_bytes(self._base.value + exported.offset, num_bytes, device)
        except RuntimeError as error:
            self.close()
            raise LinkLost(f"PyTorch does not take the memory: {error}") from error

    def close(self) -> None:
        """Nothing may be using `tensor` any more. Idempotent."""
        if self._base.value:
            self.tensor = torch.empty(0, dtype=torch.uint8)
            with _context(self._index):
                _call("cuIpcCloseMemHandle", self._base)
            self._base = _Address()


def lock_pages(address: int, num_bytes: int, index: int) -> int:
    """Keeps host memory where it is until `unlock_pages`, for the GPU to reach; where it does: an address of its own.
    Raises `LinkLost`. (PyTorch's call for this leaves its error behind, for the next kernel to fail with.)"""
    there = _Address()
    with _context(index):
        _call("cuMemHostRegister_v2", address, num_bytes, _FOR_ALL_CONTEXTS | _FOR_THE_DEVICE)
        try:
            _call("cuMemHostGetDevicePointer_v2", ctypes.byref(there), address, 0)
        except LinkLost:
            _call("cuMemHostUnregister", address)
            raise
    return there.value


def unlock_pages(address: int, index: int) -> None:
    """Nothing may be using them any more. Raises `LinkLost`."""
    with _context(index):
        _call("cuMemHostUnregister", address)


def device_bytes(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory that kernels of `device` can reach at this address, without a copy: uint8 [num_bytes]. It lives no longer
    than whoever owns it lets it. Raises `RuntimeError` where PyTorch does not take it."""
    seen = torch.as_tensor(_DeviceBytes(address, num_bytes), device=device)
    if seen.data_ptr() != address:  # it takes memory of another device for something to be copied
        raise RuntimeError(f"it lies at {address:#x}, and {device} sees {seen.data_ptr():#x}")
    return seen


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
    _call("cuCtxPushCurrent_v2", _primary_context(index))
    try:
        yield
    finally:
        _call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))


@functools.cache
def _primary_context(index: int) -> ctypes.c_void_p:
    """Kept until the process ends: whoever is the last to give it back ends it, with all memory that was opened in it,
    and PyTorch takes hold of it no sooner than it computes something."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuInit", 0)
    _call("cuDeviceGet", ctypes.byref(device), index)
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise LinkLost(f"{name}: {text.value.decode() if text.value else code}")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return bind(ctypes.CDLL("libcuda.so.1"))
    except OSError as error:
        raise LinkLost(f"no NVIDIA driver: {error}") from error


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Tells ctypes what each call takes: without, an address would be cut to an int."""
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    return library
