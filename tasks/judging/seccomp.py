"""A seccomp filter that keeps a program from starting processes and from kernel interfaces no solution needs.

A limit on processes (RLIMIT_NPROC) does not bind root and counts the user's other processes on older kernels; refusing
the system call binds everybody. Threads stay possible: each needs its stack within the limit on address space.

Numbers are those of Linux's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; the encoding
is that of linux/filter.h (classic BPF on struct seccomp_data).
"""

import errno
import platform
import struct

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _FIRST_ARGUMENT_OFFSET = 0, 4, 16
_KILL_PROCESS, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_CLONE_THREAD = 0x00010000
# The other ABI of an x86-64 kernel, whose numbers begin here.
_X32 = 0x40000000

_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_IO_URING = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
_DENIED = {
    "x86_64": {
        # processes, and what reaches into them
        **{"fork": 57, "vfork": 58, "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311},
        # sockets of any family, and user namespaces with the privileges they bring
        **{"socket": 41, "unshare": 272, "setns": 308},
        # memory that no limit of the process counts
        **{"shmget": 29, "semget": 64, "msgget": 68, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447},
        # large kernel interfaces
        **{"add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321, "perf_event_open": 298, "userfaultfd": 323},
        **_IO_URING,
    },
    "aarch64": {
        **{"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271},
        **{"socket": 198, "unshare": 97, "setns": 268},
        **{"shmget": 194, "semget": 190, "msgget": 186, "mq_open": 180, "memfd_create": 279, "memfd_secret": 447},
        **{"add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280, "perf_event_open": 241, "userfaultfd": 282},
        **_IO_URING,
    },
}


def filter_program() -> bytes:
    """The filter for this machine, as `bwrap --seccomp` reads it.

    Denied calls fail with EPERM. clone3 passes its flags in memory, where no filter can look, so it is "not
    implemented" (ENOSYS) and the C library falls back to clone, which may start threads only.

    Raises:
        ValueError: there is no table for this processor; score code on x86-64 or aarch64.
    """
    machine = platform.machine()
    if machine not in _DENIED:
        raise ValueError(f"no table of system calls for {machine}: score code on one of {', '.join(_DENIED)}")
    return b"".join(
        [
            _instruction(_LOAD_WORD, _ARCHITECTURE_OFFSET),
            _instruction(_JUMP_EQUAL, _AUDIT_ARCHITECTURE[machine], if_true=1),
            _instruction(_RETURN, _KILL_PROCESS),
            _instruction(_LOAD_WORD, _NUMBER_OFFSET),
            _instruction(_JUMP_AT_LEAST, _X32, if_false=1),
            _instruction(_RETURN, _FAIL | errno.EPERM),
            *(_refuse(number, errno.EPERM) for number in _DENIED[machine].values()),
            _refuse(_CLONE3, errno.ENOSYS),
            _instruction(_JUMP_EQUAL, _CLONE[machine], if_false=3),
            _instruction(_LOAD_WORD, _FIRST_ARGUMENT_OFFSET),
            _instruction(_JUMP_ANY_BIT, _CLONE_THREAD, if_true=1),
            _instruction(_RETURN, _FAIL | errno.EPERM),
            _instruction(_RETURN, _ALLOW),
        ]
    )


def _refuse(number: int, error: int) -> bytes:
    return _instruction(_JUMP_EQUAL, number, if_false=1) + _instruction(_RETURN, _FAIL | error)


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter; the jumps say how many instructions to leave out."""
    return struct.pack("=HBBI", code, if_true, if_false, operand)
