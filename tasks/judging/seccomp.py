"""A seccomp filter that lets a program compute and refuses every other system call.

What Python, its standard library and numpy need to compute is listed; what is not listed fails. So the kernel's other
interfaces are out of reach without being named: new processes, sockets, mounts, namespaces, keys, asynchronous input
and output (io_setup, io_uring), watches and quotas (inotify, fanotify, mount listings), other processes' descriptors
(pidfd_getfd), memory that no limit of the process counts, and changes of modes and times, which the devices shown have
in common with the machine's. Threads stay possible: each needs its stack within the limit on address space.

Numbers are those of Linux's arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h; the encoding
is that of linux/filter.h (classic BPF on struct seccomp_data).
"""

import errno
import platform
import struct
from collections.abc import Sequence

_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_OFFSET, _ARCHITECTURE_OFFSET, _FIRST_ARGUMENT_OFFSET, _SECOND_ARGUMENT_OFFSET = 0, 4, 16, 24
_KILL_PROCESS, _FAIL, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_CLONE_THREAD = 0x00010000
# The other ABI of an x86-64 kernel, whose numbers begin here.
_X32 = 0x40000000
# From here on calls are younger than this table: "not implemented", so that a C library takes the older one.
_UNKNOWN = 451

_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE = {"x86_64": 56, "aarch64": 220}
_CLONE3 = 435
_IOCTL = {"x86_64": 16, "aarch64": 29}
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: is it a terminal, is there anything to read, and flags.
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
_FCNTL = {"x86_64": 72, "aarch64": 25}
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC: no locks, leases or notices on files of the machine.
_FCNTLS = (0, 1, 2, 3, 4, 1030)
_ALLOWED = {
    "x86_64": {
        # files and descriptors
        **{"read": 0, "write": 1, "readv": 19, "writev": 20, "pread64": 17, "pwrite64": 18, "preadv": 295},
        **{"pwritev": 296, "preadv2": 327, "pwritev2": 328, "open": 2, "openat": 257, "openat2": 437, "creat": 85},
        **{"close": 3, "close_range": 436, "lseek": 8, "fstat": 5, "stat": 4, "lstat": 6, "newfstatat": 262},
        **{"statx": 332, "access": 21, "faccessat": 269, "faccessat2": 439, "dup": 32, "dup2": 33, "dup3": 292},
        **{"pipe": 22, "pipe2": 293, "getdents": 78, "getdents64": 217, "readlink": 89, "readlinkat": 267},
        **{"statfs": 137, "fstatfs": 138, "ftruncate": 77, "truncate": 76, "fallocate": 285, "fsync": 74},
        **{"fdatasync": 75, "sendfile": 40, "copy_file_range": 326, "fadvise64": 221},
        # names in /tmp
        **{"getcwd": 79, "chdir": 80, "fchdir": 81, "mkdir": 83, "mkdirat": 258, "rmdir": 84, "unlink": 87},
        **{"unlinkat": 263, "rename": 82, "renameat": 264, "renameat2": 316, "link": 86, "linkat": 265},
        **{"symlink": 88, "symlinkat": 266, "umask": 95},
        # waiting, and the pipe that asyncio wakes itself with
        **{"poll": 7, "ppoll": 271, "select": 23, "pselect6": 270, "epoll_create1": 291, "epoll_ctl": 233},
        **{"epoll_wait": 232, "epoll_pwait": 281, "epoll_pwait2": 441, "socketpair": 53, "sendto": 44},
        **{"recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "getsockopt": 55, "setsockopt": 54},
        # memory
        **{"mmap": 9, "munmap": 11, "mremap": 25, "mprotect": 10, "madvise": 28, "brk": 12, "mincore": 27},
        **{"msync": 26, "membarrier": 324},
        # the process itself
        **{"execve": 59, "exit": 60, "exit_group": 231, "getpid": 39, "gettid": 186, "getppid": 110, "getuid": 102},
        **{"geteuid": 107, "getgid": 104, "getegid": 108, "getpgrp": 111, "getpgid": 121, "getsid": 124},
        **{"getgroups": 115, "getresuid": 118, "getresgid": 120, "uname": 63, "sysinfo": 99, "getrlimit": 97},
        **{"setrlimit": 160, "prlimit64": 302, "getrusage": 98, "times": 100, "getrandom": 318, "arch_prctl": 158},
        **{"restart_syscall": 219, "wait4": 61, "waitid": 247, "getpriority": 140, "capget": 125},
        # threads
        **{"futex": 202, "futex_waitv": 449, "set_robust_list": 273, "get_robust_list": 274, "set_tid_address": 218},
        **{"rseq": 334, "sched_yield": 24, "sched_getaffinity": 204, "sched_getparam": 143},
        **{"sched_getscheduler": 145, "sched_get_priority_max": 146, "sched_get_priority_min": 147, "getcpu": 309},
        # signals, which reach nothing but this process, and clocks
        **{"kill": 62, "tkill": 200, "tgkill": 234, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15},
        **{"rt_sigpending": 127, "rt_sigtimedwait": 128, "rt_sigsuspend": 130},
        **{"sigaltstack": 131, "pause": 34, "alarm": 37, "setitimer": 38, "getitimer": 36, "time": 201},
        **{"gettimeofday": 96, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "nanosleep": 35},
    },
    "aarch64": {
        # files and descriptors
        **{"read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68, "preadv": 69},
        **{"pwritev": 70, "preadv2": 286, "pwritev2": 287, "openat": 56, "openat2": 437, "close": 57},
        **{"close_range": 436, "lseek": 62, "fstat": 80, "newfstatat": 79, "statx": 291, "faccessat": 48},
        **{"faccessat2": 439, "dup": 23, "dup3": 24, "pipe2": 59, "getdents64": 61, "readlinkat": 78, "statfs": 43},
        **{"fstatfs": 44, "ftruncate": 46, "truncate": 45, "fallocate": 47, "fsync": 82, "fdatasync": 83},
        **{"sendfile": 71, "copy_file_range": 285, "fadvise64": 223},
        # names in /tmp
        **{"getcwd": 17, "chdir": 49, "fchdir": 50, "mkdirat": 34, "unlinkat": 35, "renameat": 38, "renameat2": 276},
        **{"linkat": 37, "symlinkat": 36, "umask": 166},
        # waiting, and the pipe that asyncio wakes itself with
        **{"ppoll": 73, "pselect6": 72, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "epoll_pwait2": 441},
        **{"socketpair": 199, "sendto": 206, "recvfrom": 207, "shutdown": 210, "getsockname": 204},
        **{"getpeername": 205, "getsockopt": 209, "setsockopt": 208},
        # memory
        **{"mmap": 222, "munmap": 215, "mremap": 216, "mprotect": 226, "madvise": 233, "brk": 214, "mincore": 232},
        **{"msync": 227, "membarrier": 283},
        # the process itself
        **{"execve": 221, "exit": 93, "exit_group": 94, "getpid": 172, "gettid": 178, "getppid": 173, "getuid": 174},
        **{"geteuid": 175, "getgid": 176, "getegid": 177, "getpgid": 155, "getsid": 156, "getgroups": 158},
        **{"getresuid": 148, "getresgid": 150, "uname": 160, "sysinfo": 179, "getrlimit": 163, "setrlimit": 164},
        **{"prlimit64": 261, "getrusage": 165, "times": 153, "getrandom": 278, "restart_syscall": 128, "wait4": 260},
        **{"waitid": 95, "getpriority": 141, "capget": 90},
        # threads
        **{"futex": 98, "futex_waitv": 449, "set_robust_list": 99, "get_robust_list": 100, "set_tid_address": 96},
        **{"rseq": 293, "sched_yield": 124, "sched_getaffinity": 123, "sched_getparam": 121},
        **{"sched_getscheduler": 120, "sched_get_priority_max": 125, "sched_get_priority_min": 126, "getcpu": 168},
        # signals, which reach nothing but this process, and clocks
        **{"kill": 129, "tkill": 130, "tgkill": 131, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139},
        **{"rt_sigpending": 136, "rt_sigtimedwait": 137, "rt_sigsuspend": 133},
        **{"sigaltstack": 132, "setitimer": 103, "getitimer": 102, "gettimeofday": 169, "clock_gettime": 113},
        **{"clock_getres": 114, "clock_nanosleep": 115, "nanosleep": 101},
    },
}


def filter_program() -> bytes:
    """The filter for this machine, as `bwrap --seccomp` reads it.

    Refused calls fail with EPERM. clone3 passes its flags in memory, where no filter can look, so it is "not
    implemented" (ENOSYS) and the C library falls back to clone, which may start threads only.

    Raises:
        ValueError: there is no table for this processor; score code on x86-64 or aarch64.
    """
    machine = platform.machine()
    if machine not in _ALLOWED:
        raise ValueError(f"no table of system calls for {machine}: score code on one of {', '.join(_ALLOWED)}")
    return b"".join(
        [
            _instruction(_LOAD_WORD, _ARCHITECTURE_OFFSET),
            _instruction(_JUMP_EQUAL, _AUDIT_ARCHITECTURE[machine], if_true=1),
            _instruction(_RETURN, _KILL_PROCESS),
            _instruction(_LOAD_WORD, _NUMBER_OFFSET),
            _instruction(_JUMP_AT_LEAST, _X32, if_false=1),
            _instruction(_RETURN, _FAIL | errno.EPERM),
            *(_answer(number, _ALLOW) for number in _ALLOWED[machine].values()),
            _answer(_CLONE3, _FAIL | errno.ENOSYS),
            _instruction(_JUMP_AT_LEAST, _UNKNOWN, if_false=1),
            _instruction(_RETURN, _FAIL | errno.ENOSYS),
            _instruction(_JUMP_EQUAL, _CLONE[machine], if_false=4),
            _instruction(_LOAD_WORD, _FIRST_ARGUMENT_OFFSET),
            _instruction(_JUMP_ANY_BIT, _CLONE_THREAD, if_true=1),
            _instruction(_RETURN, _FAIL | errno.EPERM),
            _instruction(_RETURN, _ALLOW),
            _with_second_argument(_IOCTL[machine], _IOCTLS, errno.ENOTTY),
            _with_second_argument(_FCNTL[machine], _FCNTLS, errno.EPERM),
            _instruction(_RETURN, _FAIL | errno.EPERM),
        ]
    )


def _answer(number: int, answer: int) -> bytes:
    return _instruction(_JUMP_EQUAL, number, if_false=1) + _instruction(_RETURN, answer)


def _with_second_argument(number: int, allowed: Sequence[int], error: int) -> bytes:
    """Allow a call where its second argument is one of these, else let it fail."""
    body = [
        _instruction(_LOAD_WORD, _SECOND_ARGUMENT_OFFSET),
        *(_answer(argument, _ALLOW) for argument in allowed),
        _instruction(_RETURN, _FAIL | error),
    ]
    content = b"".join(body)
    return _instruction(_JUMP_EQUAL, number, if_false=len(content) // len(body[0])) + content


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter; the jumps say how many instructions to leave out."""
    return struct.pack("=HBBI", code, if_true, if_false, operand)
