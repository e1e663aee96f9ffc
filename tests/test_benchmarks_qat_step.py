"""The table of the training-step benchmark."""

from benchmarks.qat_step import Comparison, _table


def test_ratios_are_those_of_pairs():
    pairs = [(1.0, 2.0), (10.0, 11.0), (2.0, 3.0)]  # the machine was slow during the second
    row = _table([Comparison("sft", "W3G64", pairs, (1000.0, 2000.4))]).splitlines()[-1]
    assert row == "| SFT | W3G64 | 3.0 | 2.0 | 1.50 (1.10 to 2.00) | 2,000 | 1,000 |"
