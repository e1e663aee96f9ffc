"""Programs from responses, tests from JSON, verdicts from both."""

import json
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging import sandbox
from tasks.judging.code_answer import CodeGrader, CodeVerdict, last_program, published_program
from tasks.judging.code_tests import parse_tests, same_lines, same_value
from tasks.judging.math_answer import answer_part
from tasks.judging.sandbox import why_unavailable
from tests.tasks.judging.responses import grade_code

needs_sandbox = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("</think>\n```python\nx = 1\n```\n", "x = 1"),
        ("</think>```python\nx = 1\n```\n", "x = 1"),
        ("</think>\nsee ```python\nx = 1\n```\n", None),
        ("```python\nx = 1\n```\n", None),
        ("```python\nx = 1\n```\n</think>nothing", None),
        ("</think>\n```python\na\n```\nbetter:\n```python\nb\n```", "b"),
        ("</think>\n```python\na\n```\nit prints\n```\n42\n```", "a"),
        ("</think>\n```\na\n```\nit prints\n```text\n42\n```", "a"),
        ("</think>\n```cpp\na\n```", None),
        ("</think>\n```python\na\n```\nnow\n```python\nb", "a"),
        ("</think>\n```python\na\n```python\nb\n```", "b"),
        ("</think>\n```python\na", None),
        ("</think>\n```Python3 solution.py\na\n```", "a"),
        ("</think>\n  ```py\na\n  ```", "a"),
        ("</think>\n````python\ns = '```'\n````", "s = '```'"),
        ("</think>\n```python\n```", ""),
        ("", None),
    ],
)
def test_last_program(text: str, program: str | None) -> None:
    part = answer_part(text)
    assert (None if part is None else last_program(part)) == program


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("no thinking\n```python\nx = 1\n```", "x = 1"),
        ("```python\na\n```\n</think>", "a"),
        ("```python\na\n```\nit prints\n```\n42\n```", "42"),
        ("```python\na\n```\nnow\n```python\nb", "now"),
        ("```python\na", None),
    ],
)
def test_published_program_is_livecodebenchs(text: str, program: str | None) -> None:
    from lighteval.tasks.tasks.lcb.codegen_metrics import extract_code

    assert published_program(text) == program
    assert extract_code(text) == (program or "")


@given(st.lists(st.sampled_from(["```", "```python", "x", "</think>", "a ``` b", ""])).map("\n".join))
def test_published_program_is_livecodebenchs_for_any_text(text: str) -> None:
    from lighteval.tasks.tasks.lcb.codegen_metrics import extract_code

    last_program(text)
    assert (published_program(text) or "") == extract_code(text)


@pytest.mark.parametrize(
    "unit", ["`", "```", "```\n", "```python\n", "``` ", " ", "\t\n", "```python\nx\n```\n", "</think>\n"]
)
def test_extraction_is_linear_in_the_length(unit: str) -> None:
    text = "</think>\n" + unit * (1_000_000 // len(unit))
    start = time.process_time()
    last_program(text)
    published_program(text)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("42\n", "42", True),
        ("42", "42\n\n", True),
        (" 1  2 \n3", "1  2\n3 ", True),
        ("1 2", "1  2", True),
        ("a b", "a  b", False),
        ("1\n\n2", "1\n2", False),
        ("1 2", "1\n2", False),
        ("0.50", "0.5", True),
        ("1", "1.0", True),
        ("1e3", "1000", True),
        ("0.3333333", "0.33333333", False),
        ("50000000000000000", "50000000000000001", False),
        ("YES", "yes", False),
        ("", "", True),
        ("", "0", False),
        ("nan", "nan", True),
        ("nan 1", "nan 1.0", False),
        ("sNaN 1", "1 1", False),
        ("1e999999999999999999999", "1", False),
        ("1e999999999", "1", False),
        ("1\r\n2", "1\n2", True),
        ("4" * 1_000_000, "5" * 1_000_000, False),
        ("4 " * 1_000_000, "5 " * 1_000_000, False),
    ],
)
def test_same_lines(output: str, expected: str, same: bool) -> None:
    start = time.process_time()
    assert same_lines(output, expected) is same
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [
        ("[1, 2]", "[1,2]", True),
        ("[1.0, true]", "[1, 1]", True),
        ("0.30000000000000004", "0.3", False),
        ("null", "null", True),
        ("null", "0", False),
        ('{"a": [1]}', '{"a":[1]}', True),
        ("", "null", False),
        ("1 1", "1", False),
        ("NaN", "NaN", False),
        ("[" * 100_000, "1", False),
        ("9" * 100_000, "1", False),
    ],
)
def test_same_value(output: str, expected: str, same: bool) -> None:
    assert same_value(output, expected) is same


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("nonsense", "JSON"),
        ("[]", "without tests"),
        ('[{"input": "", "output": ""}]', "type"),
        ('[{"input": "", "output": "", "type": "pickle"}]', "stdin"),
        ('[{"input": "", "output": "", "type": "stdin", "key": 1}]', "key"),
        ('[{"input": "", "output": "1", "type": "functional"}]', "fn_name"),
        ('[{"input": "", "output": "1", "type": "functional", "fn_name": "f()"}]', "fn_name"),
        ('[{"input": "", "output": "1", "type": "stdin", "fn_name": "f"}]', "fn_name"),
        ('[{"input": "(1)", "output": "1", "type": "functional", "fn_name": "f"}]', "must be JSON"),
        ('[{"input": "1", "output": "one", "type": "functional", "fn_name": "f"}]', "must be JSON"),
    ],
)
def test_bad_tests_are_refused(tests: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tests(tests)


def test_arguments_are_the_lines_of_the_input() -> None:
    (test,) = parse_tests('[{"input": "[1, 2]\\n\\"a\\"\\n", "output": "1", "type": "functional", "fn_name": "f"}]')
    assert json.loads(test.stdin) == [[1, 2], "a"]


def stdin_tests(*pairs: tuple[str, str]) -> str:
    return json.dumps([{"input": given, "output": expected, "type": "stdin"} for given, expected in pairs])


def function_tests(name: str, *pairs: tuple[str, str]) -> str:
    return json.dumps(
        [{"input": given, "output": expected, "type": "functional", "fn_name": name} for given, expected in pairs]
    )


def respond(program: str) -> str:
    return f"thoughts</think>\nHere it is.\n```python\n{program}\n```\n"


DOUBLE = stdin_tests(("1", "2"), ("21", "42"), ("0", "0"))


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    with CodeGrader(num_workers=2) as opened:
        yield opened


@needs_sandbox
def test_a_verdict_per_response_in_order(grader: CodeGrader) -> None:
    program = "print(int(input()) * 2)"
    responses = [
        respond("print(int(input()) * 2)"),
        respond("print(2)"),
        "cut off",
        respond("print(int(input()) * 2)"),
        respond("print(2 if int(input()) == 1 else 1 / 0)"),
        respond(" "),
    ]
    verdicts = grade_code(grader, responses, [DOUBLE] * len(responses))
    assert verdicts[0] == verdicts[3] == CodeVerdict(True, program, 3, 3, None, True)
    assert verdicts[1] == CodeVerdict(False, "print(2)", 1, 3, "wrong_answer", True)
    assert verdicts[2] == CodeVerdict(False, None, 0, 3, "no_code", True)
    assert (verdicts[4].error_kind, verdicts[4].num_passed) == ("failed", 1)
    assert verdicts[5].error_kind == "no_code"
    assert not any(verdict.timed_out for verdict in verdicts)


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "tests", "correct"),
    [
        ("class Solution:\n    def two(self, a, n): return [0, 1]", function_tests("two", ("[2,7]\n9", "[0,1]")), True),
        ("def half(x): return x / 2", function_tests("half", ("1", "0.5"), ("4", "2")), True),
        ("def half(x): return x // 2", function_tests("half", ("1", "0.5")), False),
        ("class Solution:\n    def none(self, a): pass", function_tests("none", ("null", "null")), True),
        ("class Solution:\n    def other(self, a): return 1", function_tests("f", ("1", "1")), False),
        ("def f(a): return (a, (a,))", function_tests("f", ("1", "[1, [1]]")), True),
        ("def f(a): return {a}", function_tests("f", ("1", "[1]")), False),
        (
            "import sys\nd = sys.stdin.buffer.read().split()\nprint(*map(int, d[::-1]))",
            stdin_tests(("1 2\n3", "3 2 1")),
            True,
        ),
        ("print(f'{1 / 4:.3f}')", stdin_tests(("", "0.25\n")), True),
        ("print(f'{1 / 3:.3f}')", stdin_tests(("", "0.3333")), False),
    ],
)
def test_programs_of_both_kinds(grader: CodeGrader, program: str, tests: str, correct: bool) -> None:
    assert [verdict.correct for verdict in grade_code(grader, [respond(program)], [tests])] == [correct]


@needs_sandbox
def test_the_published_way_takes_any_last_block(grader: CodeGrader) -> None:
    response = "```python\nprint(int(input()) * 2)\n```"
    assert [verdict.correct for verdict in grade_code(grader, [response], [DOUBLE])] == [False]
    assert [verdict.correct for verdict in grader.grade_programs([published_program(response)], [DOUBLE])] == [True]


@needs_sandbox
def test_bad_tests_are_refused_before_anything_runs(grader: CodeGrader) -> None:
    start = time.monotonic()
    with pytest.raises(ValueError, match="without tests"):
        grade_code(grader, [respond("import time\ntime.sleep(20)")] * 2, [DOUBLE, "[]"])
    assert time.monotonic() - start < 5
    with pytest.raises(ValueError):
        grade_code(grader, ["a"], [])


@needs_sandbox
def test_from_several_threads_at_once(grader: CodeGrader) -> None:
    found: list[bool] = []
    program = respond("print(int(input()) * 2)")
    threads = [
        threading.Thread(target=lambda: found.extend(v.correct for v in grade_code(grader, [program], [DOUBLE])))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4


@needs_sandbox
def test_unsafe_takes_a_sandbox_where_there_is_one() -> None:
    with CodeGrader(unsafe=True) as grader:
        assert [
            verdict.sandboxed for verdict in grade_code(grader, [respond("print(int(input()) * 2)")], [DOUBLE])
        ] == [True]


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "given", "expected"),
    [
        ("print(2 ** int(input()))", "20000", 2**20000),
        ("print(int(input()) % 7)", "1" * 50_000, None),
        ("print(int(input()) ** 2)", "-" + "7" * 20_000, None),
    ],
    ids=["printed", "read", "both"],
)
def test_integers_may_be_as_long_as_in_livecodebench(
    grader: CodeGrader, long_integers: None, program: str, given: str, expected: int | None
) -> None:
    right = {"% 7": int(given) % 7, "** 2": int(given) ** 2 if len(given) > 9 else 0}
    answer = expected or next(value for mark, value in right.items() if mark in program)
    (verdict,) = grade_code(grader, [respond(program)], [stdin_tests((given, f"{answer}\n"))])
    assert verdict.correct


@needs_sandbox
def test_functions_take_and_return_long_integers(grader: CodeGrader, long_integers: None) -> None:
    number = 10**9999 + 1
    tests = [
        {"input": str(number), "output": str(number + off), "type": "functional", "fn_name": "f"} for off in (1, 2)
    ]
    program = respond("def f(n): return n + 1")
    found = grade_code(grader, [program] * 2, [json.dumps([test]) for test in tests])
    assert [verdict.correct for verdict in found] == [True, False]


def test_values_are_compared_whatever_this_process_may_convert() -> None:
    assert same_value("1" * 40_000, "1" * 40_000)
    assert not same_value("1" * 40_000, "1" * 39_999 + "2")
    assert same_value("-" + "12345" * 2_000 + ".0", "-1e5") is False
    assert not same_value("1" * 60_000, "1" * 60_000)  # more than programs may print


@pytest.fixture
def long_integers() -> Iterator[None]:
    """This test itself writes long integers."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    yield
    sys.set_int_max_str_digits(before)


@pytest.mark.parametrize(
    "text",
    [
        "```" + "=" * 500_000 + "`",
        "```" + " " * 500_000 + "`",
        "`" * 500_000 + "=",
        " \t" * 250_000 + "```",
        ("```" + "=" * 99 + "`\n") * 5_000,
        "```python\n" * 50_000,
        "```\n" * 100_000,
        "\n" * 500_000,
    ],
    ids=["language", "blanks", "ticks", "indented", "lines", "openings", "fences", "empty"],
)
def test_programs_are_found_in_linear_time(text: str) -> None:
    start = time.process_time()
    last_program(text)
    published_program(text)
    assert time.process_time() - start < 2


def test_unsafe_is_marked_in_every_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "why_unavailable", lambda: "this machine has none")
    with CodeGrader(unsafe=True) as grader:
        verdicts = grade_code(grader, [respond("print(int(input()) * 2)"), "cut off"], [DOUBLE] * 2)
    assert [(verdict.correct, verdict.sandboxed) for verdict in verdicts] == [(True, False), (False, False)]
