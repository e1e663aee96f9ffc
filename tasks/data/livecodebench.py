"""LiveCodeBench's rows as problems: their private tests come compressed and pickled, and are read without unpickling.

Columns of lighteval/code_generation_lite, as lcb_runner/benchmarks/code_generation.py reads them:

- `public_test_cases`: a JSON list of {"input", "output", "testtype": "stdin" | "functional"};
- `private_test_cases`: the same list, as JSON or as base64 of zlib of a pickle of the JSON text;
- `metadata`: JSON, whose `func_name` is the function that functional tests call;
- `question_id`, `question_content`, `starter_code` ("" where programs read stdin), `difficulty`.
"""

import base64
import hashlib
import json
import pickletools
import zlib

from tasks.data.fields import Example, Row
from tasks.data.values import identity, text_of, words

# As worded by LiveCodeBench (lcb_runner/prompts/code_generation.py) and lighteval (tasks/tasks/lcb/main.py).
PROMPT = (
    "You will be given a question (problem specification) and will generate a correct Python program that matches the "
    "specification and passes all tests.\n\nQuestion: {question}\n\n{form}\n```python\n{code}\n```\n\n"
)
STARTER_FORM = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)
STDIN_FORM = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT."
)

# Decompressed; a row of the data set has some megabytes.
MAX_BYTES = 2**30

_TEXT_OPCODES = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_FRAMING_OPCODES = {"PROTO", "FRAME", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "STOP"}


def livecodebench_example(row: Row, index: int) -> Example:
    """A row as an example: details holds the tests, and answer their sha256, which names them.

    Raises:
        KeyError, TypeError, ValueError: a row of another form, see `livecodebench_tests`.
    """
    starter = words(row, "starter_code") if row["starter_code"] is not None else ""
    form, code = (STARTER_FORM, starter) if starter else (STDIN_FORM, "# YOUR CODE HERE")
    tests = livecodebench_tests(row["public_test_cases"], row["private_test_cases"], row["metadata"])
    return Example(
        id=identity(row, "question_id", index),
        prompt=PROMPT.format(question=words(row, "question_content"), form=form, code=code),
        response="",
        answer=hashlib.sha256(tests.encode()).hexdigest(),
        tier=text_of(row.get("difficulty"), set()),
        details=tests,
    )


def livecodebench_tests(public_test_cases: str, private_test_cases: str, metadata: str) -> str:
    """All tests of a row, public ones first, as the JSON that the code verifier takes.

    A test becomes {"input", "output", "type", "fn_name"}, the last for functional tests only.

    Raises:
        ValueError: a column is not of the form above; get the data set again at its pinned revision.
    """
    function = json.loads(metadata).get("func_name")
    tests = json.loads(public_test_cases) + _private_tests(private_test_cases)
    try:
        return json.dumps([_test(**test, function=function) for test in tests])
    except TypeError as error:
        raise ValueError(f"a LiveCodeBench test has unknown or missing fields: {error}") from None


def _test(input: str, output: str, testtype: str, function: str | None) -> dict[str, str]:
    test = {"input": input, "output": output, "type": testtype}
    if testtype != "functional":
        return test
    if not function:
        raise ValueError("a functional LiveCodeBench test names no function: metadata has no func_name")
    return test | {"fn_name": function}


def _private_tests(column: str) -> list[dict[str, str]]:
    if column.lstrip().startswith("["):
        return json.loads(column)
    decompressor = zlib.decompressobj()
    try:
        pickled = decompressor.decompress(base64.b64decode(column, validate=True), MAX_BYTES)
    except zlib.error as error:
        raise ValueError(f"private_test_cases cannot be decompressed: {error}") from None
    if not decompressor.eof:
        raise ValueError(f"private_test_cases are cut off or longer than {MAX_BYTES} bytes")
    return json.loads(_pickled_text(pickled))


def _pickled_text(pickled: bytes) -> str:
    """The text that a pickle of one str holds. The pickle is taken apart, never run: any other opcode is an error."""
    texts: list[str] = []
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in _TEXT_OPCODES:
            texts.append(str(argument))
        elif opcode.name not in _FRAMING_OPCODES:
            raise ValueError(f"private_test_cases hold more than a text: pickle opcode {opcode.name} is refused")
    if len(texts) != 1:
        raise ValueError(f"private_test_cases hold {len(texts)} texts where one is expected")
    return texts[0]
