"""A worker of tasks/judging/grader.py: compares answers by math-verify until its parent has no more.

It runs as a script, and needs the standard library and math-verify only.
"""

import json
import math
import os
import select
import sys
import time
from typing import Any, Literal

# Address space of a worker; sympy itself needs about 0.3 GB of it.
MEMORY_BYTES = 2 * 2**30
# How often an idle worker looks whether its parent still lives.
PARENT_CHECK_SECONDS = 2.0
# Most characters of an extracted answer that a worker hands back.
MAX_EXTRACTED_CHARS = 1000
# math-verify's own alarms go by the clock: none.
_NO_ALARM = 0

Kind = Literal["answer", "statement", "response"]
"""An answer; a text that may state one ("the answer is ..."); a response that is searched for anything like one."""
Pair = tuple[str, str]
"""(reference answer, text)."""
Reply = tuple[bool, str | None]
"""Whether the answer in the text is the reference, and that answer."""


def _serve(parent: int, cpu_seconds: float) -> None:
    """The worker's loop. It ends with its parent: by end of file, by a look at the parent's id while idle,
    and, when stuck in one long operation, by the limit on processor time."""
    import resource

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # math-verify prints its parsing errors
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def expressions(kind: Kind, text: str) -> list[Any]:
        """What math-verify finds: a box before anything else, and in a response the last expression if need be."""
        last_resort = kind == "response"
        targets = [
            LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=last_resort),
            ExprExtractionConfig(try_extract_without_anchor=last_resort),
        ]
        found = f"\\boxed{{{text}}}" if kind == "answer" else text
        return parse(found, targets, parsing_timeout=_NO_ALARM)

    def reply(kind: Kind, gold: str, text: str) -> Reply:
        found = expressions(kind, text)
        # Five decimals for whole responses, as in the paper's harness; else math-verify's own default.
        precision = 5 if kind == "response" else 6
        equal = verify(expressions("answer", gold), found, precision, timeout_seconds=_NO_ALARM)
        extracted = next((str(part)[:MAX_EXTRACTED_CHARS] for part in found if isinstance(part, str)), None)
        return bool(equal), extracted

    def careful_reply(kind: Kind, gold: str, text: str) -> Reply:
        try:
            return reply(kind, gold, text)
        except Exception:
            return False, None  # what cannot be compared is not the answer

    # Builds the regular expressions and the grammar's tables, before any limit applies.
    warm = reply("answer", "\\frac{1}{2}", "0.5")
    replies.write(json.dumps(warm) + "\n")
    replies.flush()
    while True:
        while not select.select([0], [], [], PARENT_CHECK_SECONDS)[0]:
            if os.getppid() != parent:
                return
        line = sys.stdin.buffer.readline()
        if not line:
            return
        cpu_limit = math.ceil(time.process_time() + cpu_seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_limit, resource.RLIM_INFINITY))
        kind, pairs = json.loads(line)
        message = [careful_reply(kind, *pair) for pair in pairs]
        replies.write(json.dumps(message) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), float(sys.argv[2]))
