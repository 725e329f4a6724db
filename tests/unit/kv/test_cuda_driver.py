"""How the driver is called, against a library that has its signatures and says what reached it."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from common.kv import cuda_driver
from common.kv.cuda_driver import IpcHandle, bind, device_bytes, lock_pages, unlock_pages

STAND_IN = """
#include <stddef.h>
typedef unsigned long long CUdeviceptr;
typedef struct { char reserved[64]; } CUipcMemHandle;
int holders = 0, is_begun = 0;
int cuInit(unsigned int flags) { is_begun = flags == 0; return flags; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return is_begun ? 0 : 3; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(0x7fff00000000 + device); holders++; return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { holders--; return 0; }
int cuCtxPushCurrent_v2(void *context) { return context == (void *)0x7fff00000003 ? 0 : 1; }
int cuCtxPopCurrent_v2(void **context) { *context = NULL; return 0; }
int cuGetErrorName(int error, const char **name) {
    *name = error == 201 ? "CUDA_ERROR_INVALID_CONTEXT" : NULL; return 0;
}
int cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr address) {
    *base = address & ~0xfffffULL; *size = 1ULL << 33; return 0;
}
int cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr address) {
    for (int i = 0; i < 64; i++) handle->reserved[i] = (char)(i < 8 ? address >> 8 * i : i);
    return 0;
}
int cuIpcOpenMemHandle_v2(CUdeviceptr *address, CUipcMemHandle handle, unsigned int flags) {
    *address = 0;
    for (int i = 0; i < 8; i++) *address |= (CUdeviceptr)(unsigned char)handle.reserved[i] << 8 * i;
    for (int i = 8; i < 64; i++) if (handle.reserved[i] != i) return 1;
    return flags == 1 ? 0 : 2;
}
int cuIpcCloseMemHandle(CUdeviceptr address) { return address == 0x7f12345600000ULL ? 0 : 1; }
int cuMemHostRegister_v2(void *start, size_t size, unsigned int flags) {
    return start == (void *)0x7f12345600000 && size == 1ULL << 33 && flags == 3 ? 0 : 1;
}
int cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *start, unsigned int flags) {
    *address = (CUdeviceptr)start + (1ULL << 40); return flags;
}
int cuMemHostUnregister(void *start) { return start == (void *)0x7f12345600000 ? 0 : 1; }
"""


pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture
def driver(tmp_path: Path) -> ctypes.CDLL:
    source, library = tmp_path / "driver.c", tmp_path / "driver.so"
    source.write_text(STAND_IN)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    return bind(ctypes.CDLL(str(library)))


def test_a_context_that_was_used_is_kept(driver: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else may have hold of it yet: given back, it would end, with the memory that was opened in it."""
    monkeypatch.setattr(cuda_driver, "_driver", lambda: driver)
    monkeypatch.setattr(cuda_driver, "_primary_context", functools.cache(cuda_driver._primary_context.__wrapped__))
    for _ in range(2):
        assert lock_pages(0x7F12345600000, 1 << 33, 3) == 0x7F12345600000 + (1 << 40)
        unlock_pages(0x7F12345600000, 3)
    assert ctypes.c_int.in_dll(driver, "holders").value == 1


def test_a_copy_is_not_taken_for_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    monkeypatch.setattr(torch, "as_tensor", lambda data, device: memory)
    assert device_bytes(memory.data_ptr(), 64, memory.device) is memory
    with pytest.raises(RuntimeError, match="sees"):
        device_bytes(memory.data_ptr() + 64, 64, memory.device)


def test_every_argument_arrives(driver: ctypes.CDLL) -> None:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    assert driver.cuInit(0) == 0
    assert driver.cuDeviceGet(ctypes.byref(device), 3) == 0 and device.value == 3
    assert driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    assert driver.cuCtxPushCurrent_v2(context) == 0
    assert driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
    name = ctypes.c_char_p()
    driver.cuGetErrorName(201, ctypes.byref(name))
    assert name.value == b"CUDA_ERROR_INVALID_CONTEXT"

    base, size, handle, opened = ctypes.c_uint64(), ctypes.c_size_t(), IpcHandle(), ctypes.c_uint64()
    assert driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), 0x7F12345612345) == 0
    assert (base.value, size.value) == (0x7F12345600000, 1 << 33)
    assert driver.cuIpcGetMemHandle(ctypes.byref(handle), base) == 0
    sent = IpcHandle.from_buffer_copy(bytes(handle.reserved))
    assert driver.cuIpcOpenMemHandle_v2(ctypes.byref(opened), sent, 1) == 0
    assert opened.value == base.value
    assert driver.cuIpcCloseMemHandle(opened) == 0

    start, there = 0x7F12345600000, ctypes.c_uint64()
    assert driver.cuMemHostRegister_v2(start, 1 << 33, 3) == 0
    assert driver.cuMemHostGetDevicePointer_v2(ctypes.byref(there), start, 0) == 0
    assert there.value == start + (1 << 40)
    assert driver.cuMemHostUnregister(start) == 0
