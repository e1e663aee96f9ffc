"""Small packages in every form of import and definition, with edits that matter to `body` and edits that do not."""

from __future__ import annotations

from typing import NamedTuple

Edit = tuple[str, str, str]
"""(file, old text, new text)."""


class Case(NamedTuple):
    """`tasks__stage` is the file tasks/stage.py."""

    name: str
    sources: dict[str, str]
    matter: list[Edit]
    do_not: tuple[Edit, ...] | list[Edit] = ()


CASES = [
    Case(
        "import from",
        {
            "tasks__stage": """\
from quant.m import f

def body(c):
    return f(c)
""",
            "quant__m": """\
K = 1
L = 2

def f(x):
    return x + K

def g(x):
    return x + L
""",
        },
        [
            ("quant__m", "x + K", "x - K"),
            ("quant__m", "K = 1", "K = 3"),
            ("quant__m", "def f(x)", "def f(x, y=1)"),
        ],
        [
            ("quant__m", "L = 2", "L = 3"),
            ("quant__m", "x + L", "x * L"),
            ("quant__m", "def g", "def h"),
        ],
    ),
    Case(
        "aliases",
        {
            "tasks__stage": """\
from quant.m import f as a, g as b
import quant.m as n

def body(c):
    return a(c) - b(c) + n.h(c)
""",
            "quant__m": """\
def f(x):
    return 1

def g(x):
    return 2

def h(x):
    return 3

def i(x):
    return 4
""",
        },
        [
            ("tasks__stage", "f as a, g as b", "g as a, f as b"),
            ("quant__m", "return 1", "return 10"),
            ("quant__m", "return 3", "return 30"),
        ],
        [
            ("quant__m", "return 4", "return 40"),
        ],
    ),
    Case(
        "dotted import",
        {
            "tasks__stage": """\
import quant.inner.m

def body(c):
    return quant.inner.m.f(c)
""",
            "quant__inner____init__": "",
            "quant__inner__m": """\
def f(x):
    return 1

def g(x):
    return 2
""",
        },
        [
            ("quant__inner__m", "return 1", "return 10"),
            ("quant__inner____init__", "", "print(1)\n"),
        ],
        [
            ("quant__inner__m", "return 2", "return 20"),
        ],
    ),
    Case(
        "relative imports",
        {
            "tasks__stage": """\
from .room import near
from .room.deep import far

def body(c):
    return near.f(c) + far(c)
""",
            "tasks__room____init__": "",
            "tasks__room__near": """\
from ..other import N

def f(x):
    return N
""",
            "tasks__room__deep": """\
def far(x):
    return 5
""",
            "tasks__other": """\
N = 1
M = 2
""",
        },
        [
            ("tasks__other", "N = 1", "N = True"),
            ("tasks__room__deep", "5", "6"),
            ("tasks__room__near", "return N", "return -N"),
        ],
        [
            ("tasks__other", "M = 2", "M = 3"),
        ],
    ),
    Case(
        "imports inside functions",
        {
            "tasks__stage": """\
def body(c):
    from quant import m
    from quant.n import g as h
    return m.f(c) + h(c)
""",
            "quant__m": """\
def f(x):
    return 1

def other(x):
    return 2
""",
            "quant__n": """\
def g(x):
    return 3
""",
        },
        [
            ("quant__m", "return 1", "return 10"),
            ("quant__n", "return 3", "return 30"),
        ],
        [
            ("quant__m", "return 2", "return 20"),
        ],
    ),
    Case(
        "re-export and __all__",
        {
            "tasks__stage": """\
from quant import f

def body(c):
    return f(c)
""",
            "quant____init__": """\
from .impl import f, g
__all__ = ['f', 'g']
""",
            "quant__impl": """\
def f(x):
    return 1

def g(x):
    return 2
""",
        },
        [
            ("quant__impl", "return 1", "return 10"),
            ("quant____init__", "import f, g", "import g as f"),
        ],
        [
            ("quant__impl", "return 2", "return 20"),
            ("quant____init__", "['f', 'g']", "['f']"),
        ],
    ),
    Case(
        "classes across modules",
        {
            "tasks__stage": """\
from quant.child import Child

def body(c):
    return Child().run()
""",
            "quant__child": """\
from quant.base import Base

class Child(Base):
    size: int = 3
    def run(self):
        return self.step()
""",
            "quant__base": """\
from quant.deco import wrap

class Base:
    @wrap
    def step(self):
        return 1

class Apart:
    def step(self):
        return 2
""",
            "quant__deco": """\
def wrap(f):
    return f

def unused(f):
    return 3
""",
        },
        [
            ("quant__base", "return 1", "return 10"),
            ("quant__child", "size: int = 3", "size: int = 4"),
            ("quant__child", "size: int", "size: float"),
            ("quant__deco", "return f", "return None"),
            ("quant__child", "(Base)", "(Base, object)"),
        ],
        [
            ("quant__base", "return 2", "return 20"),
            ("quant__deco", "return 3", "return 30"),
        ],
    ),
    Case(
        "defaults, closures, lambdas, comprehensions",
        {
            "tasks__stage": """\
from quant.m import A, B, C, D

def body(c, size=A):
    def inner():
        return B
    key = lambda x: x + C
    return [inner() + key(D) for _ in range(size)]
""",
            "quant__m": """\
A = 1
B = 2
C = 3
D = 4
E = 5
""",
        },
        [
            ("quant__m", "A = 1", "A = 0"),
            ("quant__m", "B = 2", "B = 0"),
            ("quant__m", "C = 3", "C = 0"),
            ("quant__m", "D = 4", "D = 0"),
        ],
        [
            ("quant__m", "E = 5", "E = 6"),
        ],
    ),
    Case(
        "chains of constants",
        {
            "tasks__stage": """\
from quant.m import TOP

def body(c):
    return TOP
""",
            "quant__m": """\
A = 1
B, Z = (A, 2), 3
TOP = {'x': B}
OTHER = 7
""",
        },
        [
            ("quant__m", "A = 1", "A = 2"),
            ("quant__m", "(A, 2)", "(A, 3)"),
            ("quant__m", "'x'", "'y'"),
        ],
        [
            ("quant__m", "OTHER = 7", "OTHER = 8"),
        ],
    ),
    Case(
        "conditional definitions",
        {
            "tasks__stage": """\
from quant.m import f

def body(c):
    return f(c)
""",
            "quant__m": """\
import sys

if sys.platform == 'linux':
    def f(x):
        return 1
else:
    from quant.n import f

def g(x):
    return 2
""",
            "quant__n": """\
def f(x):
    return 3
""",
        },
        [
            ("quant__m", "return 1", "return 10"),
            ("quant__n", "return 3", "return 30"),
            ("quant__m", "'linux'", "'x'"),
        ],
        [
            ("quant__m", "return 2", "return 20"),
        ],
    ),
    Case(
        "try and except",
        {
            "tasks__stage": """\
try:
    from quant.fast import f
except ImportError:
    from quant.slow import f

def body(c):
    return f(c)
""",
            "quant__fast": """\
def f(x):
    return 1
""",
            "quant__slow": """\
def f(x):
    return 2
""",
        },
        [
            ("quant__fast", "return 1", "return 10"),
            ("quant__slow", "return 2", "return 20"),
        ],
    ),
    Case(
        "for type checkers",
        {
            "tasks__stage": """\
from __future__ import annotations
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quant.m import T

def body(c: T) -> T:
    x: T = c
    return x
""",
            "quant__m": """\
print('loaded')

class T:
    size = 1
""",
        },
        [
            ("tasks__stage", "return x", "return -x"),
        ],
        [
            ("quant__m", "size = 1", "size = 2"),
            ("quant__m", "loaded", "again"),
            ("tasks__stage", "c: T", "c: list[T]"),
            ("tasks__stage", "x: T = c", "x: int = c"),
        ],
    ),
    Case(
        "what a module does when it is imported",
        {
            "tasks__stage": """\
import quant.m

def body(c):
    return 1
""",
            "quant__m": """\
from quant.n import TABLE, register, helper

@register
def one(x):
    return helper(1)

TABLE['two'] = helper
TABLE.x += 3
register(lambda: 4)
_kept = register(5)

def unused():
    return 6
""",
            "quant__n": """\
TABLE = {}

def register(f):
    return f

def helper(x):
    return 7

def apart():
    return 8
""",
        },
        [
            ("quant__m", "helper(1)", "helper(2)"),
            ("quant__m", "'two'", "'three'"),
            ("quant__m", "+= 3", "+= 4"),
            ("quant__m", "lambda: 4", "lambda: 5"),
            ("quant__m", "register(5)", "register(6)"),
            ("quant__n", "return 7", "return 70"),
            ("quant__n", "return f", "return None"),
            ("quant__n", "TABLE = {}", "TABLE = {'a': 1}"),
        ],
        [
            ("quant__m", "return 6", "return 60"),
            ("quant__n", "return 8", "return 80"),
        ],
    ),
    Case(
        "objects and classes that register themselves",
        {
            "tasks__stage": """\
import quant.m

def body(c):
    return 1
""",
            "quant__m": """\
from quant.n import Base, Entry, Plain

ONE = Entry(1)
TWO = Plain(2)

class Hooked(Base):
    size = 3
""",
            "quant__n": """\
ALL = []

class Entry:
    def __init__(self, x):
        ALL.append(x)

class Plain:
    y = 4

class Base:
    def __init_subclass__(cls):
        ALL.append(cls)
""",
        },
        [
            ("quant__m", "Entry(1)", "Entry(9)"),
            ("quant__m", "size = 3", "size = 30"),
            ("quant__n", "ALL = []", "ALL = [0]"),
        ],
        [
            ("quant__m", "Plain(2)", "Plain(3)"),
            ("quant__n", "y = 4", "y = 5"),
        ],
    ),
    Case(
        "a module as a value",
        {
            "tasks__stage": """\
from quant import m
import quant.n as n

def body(c):
    return getattr(m, c.name)() + n.missing()
""",
            "quant__m": """\
def f():
    return 1

def g():
    return 2
""",
            "quant__n": """\
def __getattr__(name):
    return f

def f():
    return 3
""",
        },
        [
            ("quant__m", "return 1", "return 10"),
            ("quant__m", "return 2", "return 20"),
            ("quant__n", "return 3", "return 30"),
        ],
    ),
    Case(
        "star import",
        {
            "tasks__stage": """\
from quant.m import *

def body(c):
    return f(c)
""",
            "quant__m": """\
def f(x):
    return 1

K = 2
""",
        },
        [
            ("quant__m", "return 1", "return 10"),
            ("quant__m", "K = 2", "K = 3"),
        ],
    ),
    Case(
        "names by text",
        {
            "tasks__stage": """\
import importlib

TABLE = {'a': 'quant.m:f'}

def body(c):
    place, name = TABLE[c].split(':')
    other = importlib.import_module(f'quant.room.{c}')
    return getattr(importlib.import_module(place), name)()
""",
            "quant__m": """\
def f():
    return 1

def g():
    return 2
""",
            "quant__room____init__": "",
            "quant__room__x": """\
def h():
    return 3
""",
        },
        [
            ("quant__m", "return 1", "return 10"),
            ("quant__room__x", "return 3", "return 30"),
        ],
        [
            ("quant__m", "return 2", "return 20"),
        ],
    ),
    Case(
        "a module name that is computed from a table of the file",
        {
            "tasks__stage": """\
from quant.registry import TABLE

def body(c):
    return TABLE[c].load()
""",
            "quant__registry": """\
import importlib
from dataclasses import dataclass

@dataclass(frozen=True)
class Method:
    code: str

    def load(self):
        module, _, name = self.code.partition(":")
        return getattr(importlib.import_module(module), name)

TABLE = {"a": Method("quant.a:run")}
""",
            "quant__a": """\
def run():
    return 1
""",
            "quant__b": """\
def run():
    return 2
""",
        },
        [
            ("quant__a", "return 1", "return 10"),
            ("quant__registry", "getattr", "print"),
        ],
        [
            ("quant__b", "return 2", "return 20"),
        ],
    ),
    Case(
        "a module name that is computed",
        {
            "tasks__stage": """\
import importlib

def body(c):
    return importlib.import_module(c.place).f()
""",
            "tasks__beside": """\
def f():
    return 1
""",
        },
        [
            ("tasks__beside", "return 1", "return 10"),
        ],
    ),
    Case(
        "globals",
        {
            "tasks__stage": """\
def body(c):
    return globals()[c.name]()

def found():
    return 1
""",
        },
        [
            ("tasks__stage", "return 1", "return 10"),
        ],
    ),
    Case(
        "a file that is run",
        {
            "tasks__stage": """\
from quant import driver

def body(c):
    return [driver.__file__, 'other.py']
""",
            "quant__driver": """\
def main():
    return 1
""",
            "tasks__other": """\
def main():
    return 2
""",
        },
        [
            ("quant__driver", "return 1", "return 10"),
            ("tasks__other", "return 2", "return 20"),
        ],
    ),
    Case(
        "augmented and repeated assignment",
        {
            "tasks__stage": """\
X = [1]
X += [2]
Y = 3
Y = 4

def body(c):
    global Z
    Z = Y
    return X, Z
""",
        },
        [
            ("tasks__stage", "[2]", "[3]"),
            ("tasks__stage", "Y = 3", "Y = 5"),
            ("tasks__stage", "Y = 4", "Y = 5"),
        ],
    ),
    Case(
        "infrastructure",
        {
            "tasks__stage": """\
from artifacts.store import S
from tasks.runtime.stage import Context

def body(c):
    return S, Context
""",
            "tasks__runtime__stage": """\
class Context:
    x = 1
""",
            "artifacts__store": """\
S = 1
""",
        },
        [],
        [
            ("tasks__runtime__stage", "x = 1", "x = 2"),
            ("artifacts__store", "S = 1", "S = 2"),
        ],
    ),
    Case(
        "import cycles",
        {
            "tasks__stage": """\
from quant.a import f

def body(c):
    return f(c)
""",
            "quant__a": """\
from quant import b

def f(x):
    return b.g(x)
""",
            "quant__b": """\
from quant.a import f

def g(x):
    return f(x) if x else 1
""",
        },
        [
            ("quant__b", "else 1", "else 2"),
        ],
    ),
]
