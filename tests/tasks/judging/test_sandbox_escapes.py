"""What a program in the sandbox can reach of the machine: nothing."""

import json
import os
import socket
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tasks.judging import isolation, sandbox
from tasks.judging.sandbox import Limits, Sandbox, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(Limits(cpu_seconds=2, memory_bytes=2**29))


# Each raises what is expected of an attempt that is refused, and nothing if it succeeds.
ESCAPES = {
    "internet": "import socket\nsocket.create_connection(('1.1.1.1', 53), 1)",
    "loopback": "import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)",
    "name lookup": "import socket\nsocket.getaddrinfo('localhost.localdomain', 80)",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect(UNIX)",
    "abstract unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0' + ABSTRACT)",
    "netlink": "import socket\nsocket.socket(16, socket.SOCK_RAW)",
    "the grader's source": "open(GRADER)",
    "a file of the caller's": "open(WITNESS)",
    "its deletion": "import os\nos.unlink(WITNESS)",
    "the passwords": "open('/etc/passwd')",
    "a shell": "import os\nos.execv('/bin/sh', ['sh'])",
    "the home": "import os\nif not any(map(os.path.lexists, HOME)): raise OSError",
    "writing the root": "open('/new', 'w')",
    "writing the library": "import os, json\nopen(json.__file__, 'a')",
    "writing bytecode": "import json, os\nos.makedirs(os.path.dirname(json.__file__) + '/__pycache__/x')",
    "writing sitecustomize": "open(os_path() + '/sitecustomize.py', 'w')",
    "writing the driver": "open('/sandbox/driver.py', 'r+')",
    "writing shared memory": "open('/dev/shm/x', 'w')",
    "a link to the outside": "import os\nos.symlink(WITNESS, 'link')\nopen('link')",
    "more rights": "import os\nos.setuid(0)",
    "a namespace": "libc('unshare', 0x10000000)",
    "another's namespace": "libc('setns', 0, 0)",
    "a mount": "libc('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "an unmount": "libc('umount2', b'/dev/stdin', 2)",
    "a root": "import os\nos.chroot('/tmp')",
    "ptrace": "libc('ptrace', 16, 1, 0, 0)",
    "another's memory": "libc('process_vm_readv', 1, None, 0, None, 0, 0)",
    "the keyring": "libc('syscall', KEYCTL, 0, -3, 0)",
    "bpf": "libc('syscall', BPF, 0, None, 0)",
    "io_uring": "libc('syscall', 425, 8, None)",
    "clone3": "libc('syscall', 435, None, 0)",
    "the other system call table": "libc('syscall', 0x40000000 + 41, 2, 1, 0)",
    "anonymous files": "import os\nos.memfd_create('x')",
    "System V memory": "libc('shmget', 0, 4096, 0o1777)",
    "a device": "import os\nos.mknod('/tmp/x', 0o020666, 0x101)",
    "the clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "the host's name": "import socket\nsocket.sethostname('x')",
    "a device's mode": "import os\nos.chmod('/dev/null', os.stat('/dev/null').st_mode & 0o7777)",
    "a device's times": "import os\nos.utime('/dev/zero')",
    "a device's owner": "import os\nos.chown('/dev/urandom', -1, os.stat('/dev/urandom').st_gid)",
    "asynchronous input": "libc('syscall', IO_SETUP, 8, ctypes.byref(ctypes.c_ulong()))",
    "watches": "libc('inotify_init1', 0)",
    "watches of all": "libc('fanotify_init', 0, 0)",
    "another's descriptor": "libc('syscall', 438, libc('syscall', 434, 1, 0) or 3, 0, 0)",
    "handles of processes": "libc('syscall', 434, 1, 0)",
    "a lease": "import fcntl\nfcntl.fcntl(open(json.__file__), fcntl.F_SETLEASE, fcntl.F_RDLCK)",
    "a notice": "import fcntl, os\nfcntl.fcntl(os.open('/usr', 0), fcntl.F_NOTIFY, fcntl.DN_ACCESS)",
    "a lock": "import fcntl\nfcntl.flock(open(json.__file__), fcntl.LOCK_EX)",
    "a lock of a part": "import fcntl\nfcntl.lockf(open(json.__file__), fcntl.LOCK_SH)",
    "a larger pipe": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETPIPE_SZ, 2**20)",
    "the mounts": "libc('syscall', 458, MOUNTS, (ctypes.c_uint64 * 8)(), 8, 0)",
    "a mount's state": "libc('syscall', 457, MOUNTS, (ctypes.c_uint64 * 64)(), 512, 0)",
    "a copy of a mount": "libc('syscall', 428, -100, b'/tmp', 0)",
    "timers": "libc('timerfd_create', 0, 0)",
    "events": "libc('eventfd', 0, 0)",
    "another personality": "libc('personality', 0)",
    "a terminal's input": "import fcntl, termios\nfcntl.ioctl(0, termios.TIOCSTI, b'x')",
}
ESCAPE_TOOLS = """
import ctypes, json
MOUNTS = (ctypes.c_uint64 * 3)(24, 2**64 - 1, 0)  # struct mnt_id_req: its size, the root
def libc(name, *arguments):
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def os_path():
    return json.__file__.rsplit("/", 2)[0]
"""


ATTEMPT_ALL = ESCAPE_TOOLS + dedent(
    """
    task = json.load(sys.stdin)
    for name, attempt in task["attempts"].items():
        try:
            exec(attempt, globals() | task["names"])
            print(name)
        except OSError:
            pass
    print("done")
    """
)
# Those that do no harm on this machine.
HARMLESS = (
    *("loopback", "unix socket", "abstract unix socket", "netlink", "the grader's source", "a file of the caller's"),
    *("the passwords", "the home", "anonymous files", "a link to the outside"),
    *("asynchronous input", "watches", "handles of processes", "a lease", "a lock", "timers", "events"),
)


def reached(box: Sandbox, tmp_path: Path, attempts: dict[str, str]) -> list[str]:
    """Run all attempts in one program; which of them succeeded, then "done"."""
    witness, home = tmp_path / "witness", Path.home()
    witness.write_text("here")
    abstract = f"reasoning-qat-{os.getpid()}"
    x86 = os.uname().machine == "x86_64"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        hidden.bind("\0" + abstract)
        hidden.listen()
        names: dict[str, Any] = {
            "PORT": server.getsockname()[1],
            "UNIX": str(tmp_path / "socket"),
            "ABSTRACT": abstract,
            "GRADER": sandbox.__file__,
            "WITNESS": str(witness),
            "HOME": [str(path) for path in (*home.iterdir(), Path(__file__)) if path not in isolation.python().parents],
            "KEYCTL": 250 if x86 else 219,
            "BPF": 321 if x86 else 280,
            "IO_SETUP": 206 if x86 else 0,
        }
        run = box.run(ATTEMPT_ALL, json.dumps({"attempts": attempts, "names": names}), 10_000)
    assert run.end == "exited"
    assert witness.read_text() == "here"
    return run.output.decode().splitlines()


def test_nothing_outside_is_reached(box: Sandbox, tmp_path: Path) -> None:
    assert reached(box, tmp_path, ESCAPES) == ["done"]


def test_without_the_sandbox_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempts are sound: those that are harmless succeed where nothing holds them."""
    monkeypatch.setattr(sandbox, "why_unavailable", lambda: "this machine has none")
    attempts = {name: ESCAPES[name] for name in HARMLESS}
    assert reached(Sandbox(unsafe=True), tmp_path, attempts) == [*HARMLESS, "done"]


def test_only_python_and_numpy_are_there(box: Sandbox) -> None:
    program = dedent(
        """
        import os
        found = [os.path.join(folder, name) for folder, _, names in os.walk("/sandbox") for name in names]
        print(sorted(path for path in found if "/packages/" not in path), os.listdir("/sandbox/packages"))
        print(sorted(os.environ), os.getuid(), os.listdir("/tmp"), os.path.exists("/proc"), sorted(os.listdir("/dev")))
        """
    )
    lines = box.run(program, "", 10_000).output.decode().splitlines()
    assert lines[0].startswith("['/sandbox/driver.py', '/sandbox/solution.py']")
    assert set(eval(lines[0].split("] ", 1)[1])) <= {"numpy", "numpy.libs"}
    variables = ["HOME", "LC_ALL", "OPENBLAS_NUM_THREADS", "PWD", "PYTHONHASHSEED", "PYTHONPATH"]
    assert lines[1] == f"{variables} 65534 [] False ['null', 'stdin', 'urandom', 'zero']"


def test_of_the_machines_libraries_only_those_are_there_that_python_loads(box: Sandbox) -> None:
    program = "import os\nprint([os.path.join(d, n) for d, _, names in os.walk('/usr') for n in names])"
    found = eval(box.run(program, "", 100_000).output)
    python_prefix = str(isolation.python().parent.parent)
    assert any("libc." in path for path in found)
    assert [path for path in found if ".so" not in path and not path.startswith(f"{python_prefix}/")] == []
    assert len(found) < 200 or python_prefix == "/usr"


def test_the_machines_devices_stay_as_they_are(box: Sandbox) -> None:
    before = [os.stat(path) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    program = dedent(
        """
        import os
        for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
            for change in (lambda: os.chmod(path, 0o666), lambda: os.utime(path, (0, 0)), lambda: os.truncate(path, 0)):
                try:
                    change()
                except OSError:
                    pass
        open(os.devnull, "w").write("x")
        print(len(open("/dev/urandom", "rb").read(3)), open("/dev/zero", "rb").read(1))
        """
    )
    assert box.run(program, "", 100).output == b"3 b'\\x00'\n"
    after = [os.stat(path) for path in ("/dev/null", "/dev/zero", "/dev/urandom")]
    assert [(s.st_mode, s.st_uid, s.st_mtime > 1) for s in after] == [(s.st_mode, s.st_uid, True) for s in before]


def test_a_child_that_would_outlive_its_parent_cannot_be_had(box: Sandbox, tmp_path: Path) -> None:
    """Neither a process nor a thread writes to the output after the run has ended."""
    program = dedent(
        """
        import os, threading, time
        def late():
            time.sleep(0.5)
            os.write(1, b"late")
        threading.Thread(target=late, daemon=True).start()
        print("early", flush=True)
        try:
            os.fork() or late()
        except PermissionError:
            pass
        os._exit(0)
        """
    )
    assert box.run(program, "", 100).output == b"early\n"


def test_nothing_is_left_of_one_run_for_the_next(box: Sandbox) -> None:
    program = "import os\nprint(os.listdir('/tmp'))\nopen('/tmp/x', 'w').write('y')"
    assert [box.run(program, "", 100).output for _ in range(2)] == [b"[]\n", b"[]\n"]


def test_a_flood_is_not_read(box: Sandbox) -> None:
    run = box.run("while True: sys.stdout.write('x' * 65536)", "", 1000)
    assert run.end == "output_limit"
    assert len(run.output) <= 1000 + 65536
