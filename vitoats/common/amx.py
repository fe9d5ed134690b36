"""Keeps AMX from this process, to measure all runtimes as they are on a processor that has none."""

import ctypes
import errno
import platform
import struct
import sys

from vitoats.common.errors import RunError

# Linux hands AMX out by a system call. A filter of system calls refuses it, and its processes inherit the filter.
ARCH_PRCTL, NATIVE = 158, 0xC000003E  # the call, and the architecture x86-64
ARCH_GET_XCOMP_PERM, ARCH_REQ_XCOMP_PERM, TILE_DATA = 0x1022, 0x1023, 18
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
LOAD, JUMP_IF_EQUAL, RETURN = 0x20, 0x15, 0x06  # instructions of the filter
CALL_AT, ARCHITECTURE_AT, ARGUMENT_AT = 0, 4, 16  # what they load
ALLOW, FAIL = 0x7FFF0000, 0x00050000
FILTER = (  # instruction, how many to skip if equal and if not, operand
    (LOAD, 0, 0, ARCHITECTURE_AT),
    (JUMP_IF_EQUAL, 0, 5, NATIVE),
    (LOAD, 0, 0, CALL_AT),
    (JUMP_IF_EQUAL, 0, 3, ARCH_PRCTL),
    (LOAD, 0, 0, ARGUMENT_AT),
    (JUMP_IF_EQUAL, 0, 1, ARCH_REQ_XCOMP_PERM),
    (RETURN, 0, 0, FAIL | errno.EPERM),
    (RETURN, 0, 0, ALLOW),
)


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse_amx() -> None:
    """Refuses AMX to this process and those that it starts, for good. Call it before any library may have asked for AMX.

    Raises:
        RunError: a library has asked already, or the system doesn't let processes filter their calls.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    granted = ctypes.c_uint64()
    if libc.syscall(ARCH_PRCTL, ARCH_GET_XCOMP_PERM, ctypes.byref(granted)) == 0 and granted.value >> TILE_DATA & 1:
        raise RunError("AMX is in use in this process already: measure in a fresh one")
    program = _Program(len(FILTER), b"".join(struct.pack("HBBI", *instruction) for instruction in FILTER))
    refused = libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if refused or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0):
        raise RunError("this system does not let a process filter its system calls: leave out `no_amx`")
