"""The worker processes: right verdicts, and none of the known ways to hang or crash them gets through."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.judging import grader
from tasks.judging.grader import VerifierPool
from tasks.judging.math_answer import Grader, Verdict, quick_published_verdict
from tests.tasks.judging.responses import grade_math

HANG = "9^{999999999}"


def respond(answer: str) -> str:
    return f"reasoning</think>\nThe answer is \\boxed{{{answer}}}."


@pytest.fixture(scope="module")
def shared() -> Iterator[Grader]:
    with Grader(num_workers=1, cpu_seconds=1.0) as opened:
        yield opened


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("x^2+2x+1", "(x+1)^2", True),
        ("2\\sqrt{2}", "\\sqrt{8}", True),
        ("(1,2)", "(2,1)", False),
        ("\\frac{\\pi}{4}", "0.75\\pi", False),
        ("3", "x=3", True),
        ("5", "}{", False),
        ("x", "\0\ud800\u202e\U0001f600", False),
        ("x", "\\begin{pmatrix} 1 & \\end", False),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\1+1\\end{pmatrix}", True),
    ],
)
def test_symbolic_verdicts(shared: Grader, gold: str, answer: str, correct: bool) -> None:
    assert [correct] == [v is True for v in shared._pool.verify([(gold, answer)])]


def test_grade_gives_a_verdict_per_response_in_order(shared: Grader) -> None:
    responses = [respond("1+x"), "cut off \\boxed{1}", respond("\\frac{2}{4}"), respond("1+x"), respond("y")]
    verdicts = grade_math(shared, responses, ["x+1", "1", "0.5", "x+2", "x"])
    assert verdicts == [
        Verdict(True, "1+x", False),
        Verdict(False, None, False),
        Verdict(True, "\\frac{2}{4}", False),
        Verdict(False, "1+x", False),
        Verdict(False, "y", False),
    ]
    with pytest.raises(ValueError):
        grade_math(shared, ["a"], [])


def test_endless_comparisons_are_killed_and_the_pool_goes_on(shared: Grader) -> None:
    start = time.monotonic()
    verdicts = grade_math(shared, [respond(HANG), respond("1+x")], ["5", "x+1"])
    assert verdicts == [Verdict(False, HANG, True), Verdict(True, "1+x", False)]
    assert time.monotonic() - start < 60


def test_power_tower_is_wrong_at_once(shared: Grader) -> None:
    start = time.monotonic()
    assert grade_math(shared, [respond("5^(5^(5^(5^5)))")], ["5"]) == [Verdict(False, "5^(5^(5^(5^5)))", False)]
    assert time.monotonic() - start < 1
    assert shared._pool.verify([("5", "5^(5^(5^(5^5)))"), ("2", "1+1")])[1] is True


@pytest.mark.parametrize("answer", ["(" * 400 + "5" + ")" * 400, "{" * 490 + "}" * 490, "7" * 1_000_000, "\0" * 5000])
def test_monstrous_answers_are_wrong(shared: Grader, answer: str) -> None:
    (verdict,) = grade_math(shared, [respond(answer)], ["6"])
    assert not verdict.correct
    assert shared._pool.verify([("2", "1+1")]) == [True]


def test_works_off_the_main_thread_and_from_several_at_once(shared: Grader) -> None:
    found: list[list[Verdict]] = []
    threads = [
        threading.Thread(target=lambda: found.append(grade_math(shared, [respond("1+x")], ["x+1"]))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[Verdict(True, "1+x", False)]] * 3


def test_stopped_and_dead_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grader, "SLEEP_FACTOR", 0.5)
    pool = VerifierPool(1, 3.0)
    try:
        assert pool.verify([("2", "1+1")]) == [True]
        stopped = pool._workers[0].process.pid
        os.kill(stopped, signal.SIGSTOP)
        assert pool.verify([("2", "1+1")]) == [True]  # by another, as the task is not to blame
        assert not alive(stopped)
        pool._workers[0].process.kill()
        pool._workers[0].process.wait()
        assert pool.verify([("2", "1+1")]) == [True]
        pid = pool._workers[0].process.pid
    finally:
        pool.close()
    assert not alive(pid)


def test_what_always_kills_its_worker_is_tried_twice_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    worker = grader._Worker

    def start(cpu_seconds: float) -> grader._Worker:
        started.append(worker(cpu_seconds))
        return started[-1]

    monkeypatch.setattr(grader, "_Worker", start)

    def die(self: grader._Worker, task: int, _: grader.Request) -> None:
        self.task = task
        self.process.kill()

    monkeypatch.setattr(worker, "send", die)
    pool = VerifierPool(1, 3.0)
    assert pool.verify([("2", "1+1")]) == [None]
    assert len(started) == 2
    pool.close()


@pytest.mark.parametrize("answer", ["1+1", HANG], ids=["idle", "busy"])
def test_workers_end_with_their_parent(answer: str) -> None:
    script = (
        "import threading, time\n"
        "from tasks.judging.grader import VerifierPool\n"
        "pool = VerifierPool(1, 2.0)\n"
        "pool.verify([('2', '1+1')])\n"
        "print(pool._workers[0].process.pid, flush=True)\n"
        f"pool.verify([('5', {answer!r})])\n"
        "time.sleep(60)\n"
    )
    root = Path(grader.__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=root)
    assert parent.stdout is not None
    with parent.stdout:
        worker = int(parent.stdout.readline())
    assert alive(worker)
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


def test_a_worker_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"did not start"):
        VerifierPool(1, 1.0).verify([("2", "1+1")])


PIECES = [
    "\\boxed{5}", "\\boxed{-12}", "$", "$$", "\\[", "\\]", "\\(", "\\)", " [ ", " ] ", "x=", "7", "\n", "%", " percent",
    "answer: ", "final answer is ", "I hope", " and ", ", ", "\\frac{1}{2}", "{", "}", "</think>", "^2", "\\text{cm}",
    "\\fbox{3}", " the ", ".", "^\\circ", "1,234", "\\\\", "\\", "=", "\\left(", "\\cdot 3", "_{10}",
]  # fmt: skip


def test_the_quick_path_of_the_papers_scorer_is_math_verifys_own_verdict(shared: Grader) -> None:
    random_ = random.Random(7)
    pairs = []
    while len(pairs) < 400:
        text = "".join(random_.choices(PIECES, k=random_.randint(1, 7)))
        pairs.append((random_.choice(["5", "-12"]), text))
    quick = {pair: verdict for pair in pairs if (verdict := quick_published_verdict(*pair)) is not None}
    assert set(quick.values()) == {True, False} and len(quick) > 40
    replies = shared._pool.run([("response", gold, text) for gold, text in quick])
    assert [reply and reply[0] for reply in replies] == list(quick.values())


def test_the_papers_scorer_reads_whole_responses(shared: Grader) -> None:
    cases = {
        "\\boxed{7} in the reasoning, then cut off": ("7", True, "7"),
        "<think>\\boxed{7}</think>\\boxed{8}": ("7", False, "8"),
        "no box, but the answer is $\\frac{2}{4}$.": ("\\frac{1}{2}", True, "\\frac{2}{4}"),
        "Let me try x = 7 first": ("7", True, "7"),
        "$\\boxed{25\\%}$": ("25", False, "25\\%"),
        "nothing at all": ("7", False, None),
    }
    verdicts = shared.grade_published(list(cases), [gold for gold, _, _ in cases.values()])
    assert [(v.correct, v.extracted) for v in verdicts] == [(correct, found) for _, correct, found in cases.values()]
    assert not any(verdict.timed_out for verdict in verdicts)


def test_an_answer_part_without_a_box_must_state_its_answer(shared: Grader) -> None:
    parts = ["**Answer:** Jean can fill **14 bags**.", "It is 14.", "Answer: 14, so \\boxed{15}", "\\boxed{14}", None]
    verdicts = shared.grade_parts(parts, ["14"] * 5)
    assert [v.correct for v in verdicts] == [True, False, False, True, False]
    assert [v.extracted for v in verdicts][2:] == ["15", "14", None]


@pytest.mark.parametrize(
    "unit", ["$$\\boxed{", "\\[", "final answer ", "\\boxed{1", "answer: 1/", " [ \\boxed{1}", "€1 "]
)
def test_long_hostile_responses_end(shared: Grader, unit: str) -> None:
    """Some take regular expressions longer than the limit: wrong then, and the pool goes on."""
    start = time.monotonic()
    (verdict,) = shared.grade_published([unit * (300_000 // len(unit))], ["7"])
    assert not verdict.correct and time.monotonic() - start < 60
    assert shared._pool.verify([("2", "1+1")]) == [True]


def test_a_worker_that_takes_no_more_input_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A response is longer than the pipe's buffer: a stopped worker must not block the writer."""
    monkeypatch.setattr(grader, "SLEEP_FACTOR", 0.5)
    pool = VerifierPool(1, 3.0)
    try:
        assert pool.verify([("2", "1+1")]) == [True]
        stopped = pool._workers[0].process.pid
        os.kill(stopped, signal.SIGSTOP)
        assert pool.run([("response", "5", "x " * 200_000 + "so 5")]) != [(True, "6")]
        assert not alive(stopped)
        assert pool.verify([("2", "1+1")]) == [True]
    finally:
        pool.close()
