"""The first thing that runs in the sandbox: takes its limits, says it is ready, then hands over to the program.

It runs as a script and needs the standard library only. From the hand-over on nothing here is trusted: the program
shares this process. It holds no expected output, so the worst that a program can make it say is a wrong answer.
"""

import contextlib
import importlib
import json
import math
import os
import resource
import sys
import time
import types
from typing import Any

READY = b"\n"

# What LiveCodeBench gives every program (lcb_runner/evaluation/testing_util.py): all names of these modules, in this
# order, because later ones hide earlier ones; then some of the modules by name; then deep recursion.
STAR_IMPORTS = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
NAMED_IMPORTS = tuple(name for name in STAR_IMPORTS if name not in ("builtins", "typing"))
RECURSION_LIMIT = 50_000
# The digits of an integer that Python reads or prints (lcb_runner/evaluation/compute_code_generation_metrics.py).
MOST_DIGITS = 50_000


def main(path: str, limits: str, function: str) -> None:
    """Run the program at `path` as __main__, or write the result of its `function`, if named, to stdout as JSON.

    The function's arguments are a JSON list on stdin; what the program itself prints is then dropped.
    """
    for name, most in json.loads(limits).items():
        _limit(getattr(resource, name), most)
    module = _module("solution" if function else "__main__")
    with open(path, "rb") as file:
        source = file.read()
    answers = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    if function:
        os.dup2(null, 1)
    os.close(null)
    os.write(answers, READY)
    if function:
        _call(source, module, function, answers)
    else:
        os.close(answers)
        _run(source, module)


def _limit(kind: int, most: int) -> None:
    if kind == resource.RLIMIT_CPU:
        most += math.ceil(time.process_time())
    allowed = resource.getrlimit(kind)[1]
    most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
    # Past the soft limit on processor time comes a signal that says why; who ignores it is killed a second later.
    hard = most + 1 if kind == resource.RLIMIT_CPU and most != allowed else most
    resource.setrlimit(kind, (most, hard))


def _module(name: str) -> types.ModuleType:
    """An empty module of this name with LiveCodeBench's imports, the one that `import name` finds."""
    module = sys.modules[name] = types.ModuleType(name)
    for imported in STAR_IMPORTS:
        exec(f"from {imported} import *", module.__dict__)
    module.__dict__.update({imported: importlib.import_module(imported) for imported in NAMED_IMPORTS})
    sys.setrecursionlimit(RECURSION_LIMIT)
    sys.set_int_max_str_digits(MOST_DIGITS)
    sys.argv = ["solution.py"]
    return module


def _run(source: bytes, module: types.ModuleType) -> None:
    with contextlib.suppress(SystemExit):  # a regular end whatever the status, as in LiveCodeBench
        exec(compile(source, "solution.py", "exec"), module.__dict__)


def _call(source: bytes, module: types.ModuleType, function: str, answers: int) -> None:
    arguments = json.load(sys.stdin)
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    owner = module.Solution() if hasattr(module, "Solution") else module
    result = json.dumps(getattr(owner, function)(*arguments), default=_plain)
    with open(answers, "w") as file:
        file.write(result)
    os._exit(0)  # threads and exit handlers of the program have nothing to add


def _plain(value: Any) -> Any:
    """numpy's scalars, which JSON does not know; anything else is no answer."""
    return value.item()


if __name__ == "__main__":
    main(*sys.argv[1:])
