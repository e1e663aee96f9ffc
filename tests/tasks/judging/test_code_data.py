"""Real problems with known answers: reference solutions pass, spoiled ones do not. Skipped where the data is absent."""

import ast
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tasks.judging.code_answer import CodeGrader
from tasks.judging.sandbox import why_unavailable
from tests.tasks.judging.responses import grade_code

DATA = Path(__file__).parents[4] / "shared" / "data" / "code"
NUM_PROBLEMS, NUM_TESTS = 10, 2

pytestmark = [
    pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable())),
    pytest.mark.skipif(not DATA.is_dir(), reason="the sample of problems is not here"),
]


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in text.splitlines()]


def respond(program: str) -> str:
    return f"</think>\n```python\n{program}\n```"


def function_tests(row: dict[str, Any]) -> str:
    """Of HumanEval's assertions those of the form candidate(arguments) == value."""
    tests = []
    for node in ast.walk(ast.parse(row["test"])):
        match node:
            case ast.Assert(
                test=ast.Compare(
                    left=ast.Call(func=ast.Name(id="candidate"), args=arguments), ops=[ast.Eq()], comparators=[value]
                )
            ):
                given = "\n".join(json.dumps(eval(ast.unparse(argument), {})) for argument in arguments)
                expected = json.dumps(eval(ast.unparse(value), {}))
                test = {"input": given, "output": expected, "type": "functional", "fn_name": row["entry_point"]}
                tests.append(test)
    return json.dumps(tests[:NUM_TESTS])


def test_humaneval_solutions_pass_and_spoiled_ones_do_not() -> None:
    problems = [(row, tests) for row in rows("humaneval_visible32.jsonl") if (tests := function_tests(row)) != "[]"]
    problems = problems[:NUM_PROBLEMS]
    assert len(problems) == NUM_PROBLEMS
    good = [row["prompt"] + row["canonical_solution"] for row, _ in problems]
    spoiled = [
        f"{program}\n\n_right = {row['entry_point']}\ndef {row['entry_point']}(*args): return [_right(*args)]"
        for program, (row, _) in zip(good, problems, strict=True)
    ]
    tests = [tests for _, tests in problems]
    with CodeGrader(num_workers=2) as grader:
        verdicts = grade_code(grader, [respond(program) for program in good + spoiled], tests * 2)
    assert [verdict.correct for verdict in verdicts] == [True] * len(good) + [False] * len(spoiled)
    assert {verdict.error_kind for verdict in verdicts[len(good) :]} == {"wrong_answer"}


def test_contest_problems_take_the_right_output_and_no_other() -> None:
    problems = [row["tests"][:NUM_TESTS] for row in rows("code_contests_visible40.jsonl.gz")[:NUM_PROBLEMS]]
    tests = [json.dumps([test | {"type": "stdin"} for test in given]) for given in problems]

    def program(given: list[dict[str, str]], suffix: str) -> str:
        table = {test["input"]: test["output"] for test in given}
        return f"import sys\nprint({table!r}[sys.stdin.read()].rstrip() + {suffix!r})"

    responses = [respond(program(given, suffix)) for suffix in ("", " \n\n", "7") for given in problems]
    with CodeGrader(num_workers=2) as grader:
        verdicts = [verdict.correct for verdict in grade_code(grader, responses, tests * 3)]
    assert verdicts == [True] * (2 * len(problems)) + [False] * len(problems)
