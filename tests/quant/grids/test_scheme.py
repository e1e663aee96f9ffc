"""Scheme names, ranges and their errors."""

import pytest
import torch

from quant.grids.scheme import PRESETS, Scheme, working_group_sizes


@pytest.mark.parametrize(
    ("name", "bits", "group_size"),
    [
        ("W3G128", 3, 128),
        ("W4G32", 4, 32),
        ("W2G256", 2, 256),
        ("W3G64", 3, 64),
        ("W4", 4, -1),
        (" w8g128 ", 8, 128),
    ],
)
def test_parse_reads_bits_and_group_size(name: str, bits: int, group_size: int) -> None:
    assert Scheme.parse(name) == Scheme(bits=bits, group_size=group_size)


def test_every_preset_is_the_name_of_what_it_parses_to() -> None:
    assert len(PRESETS) == 26
    assert [Scheme.parse(name).name for name in PRESETS] == list(PRESETS)


def test_dict_round_trip_keeps_every_field() -> None:
    asymmetric = Scheme.parse("W3G64", symmetric=False, scale_dtype="float32")
    full_range = Scheme.parse("W2", scale_rule="full_range")
    for scheme in (asymmetric, full_range, Scheme.parse("W4A4KV4")):
        assert Scheme.from_dict(scheme.to_dict()) == scheme
    assert asymmetric.to_dict() == {
        "bits": 3,
        "group_size": 64,
        "symmetric": False,
        "scale_rule": "paper",
        "scale_dtype": "float32",
        "activation_bits": None,
        "kv_bits": None,
    }


@pytest.mark.parametrize(
    ("symmetric", "bits", "qmin", "qmax", "dtype"),
    [
        (True, 2, -2, 1, torch.int8),
        (True, 3, -4, 3, torch.int8),
        (True, 8, -128, 127, torch.int8),
        (False, 3, 0, 7, torch.uint8),
        (False, 8, 0, 255, torch.uint8),
    ],
)
def test_code_range(symmetric: bool, bits: int, qmin: int, qmax: int, dtype: torch.dtype) -> None:
    scheme = Scheme(bits, symmetric=symmetric)
    assert (scheme.qmin, scheme.qmax, scheme.code_dtype) == (qmin, qmax, dtype)
    assert torch.iinfo(dtype).min <= qmin and qmax <= torch.iinfo(dtype).max


@pytest.mark.parametrize(
    ("name", "canonical", "activation_bits", "kv_bits"),
    [
        ("W4A4KV4", "W4A4KV4", 4, 4),
        ("w4a8", "W4A8", 8, None),
        ("W4KV4", "W4KV4", None, 4),
        ("W3A16G128", "W3G128", None, None),
        ("W4G128A8KV16", "W4G128A8", 8, None),
    ],
)
def test_parse_reads_activations_and_cache(
    name: str, canonical: str, activation_bits: int | None, kv_bits: int | None
) -> None:
    scheme = Scheme.parse(name)
    assert (scheme.name, scheme.activation_bits, scheme.kv_bits) == (canonical, activation_bits, kv_bits)
    assert scheme.weight_only == (canonical == "W3G128")


@pytest.mark.parametrize("name", ["W4A4A4", "A4KV4", "W4A1", "W4KV9", "G128W4"])
def test_parse_refuses_repeated_missing_and_impossible_parts(name: str) -> None:
    with pytest.raises(ValueError, match=r"A name is W|must be from 2 to 8"):
        Scheme.parse(name)


@pytest.mark.parametrize(("name", "nearest"), [("W3G129x", "'W3G128'"), ("W3-G128", "'W3G128'"), ("3G64", "'W3G64'")])
def test_unknown_names_come_with_the_nearest_and_the_grammar(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=r"W<bits>\[G<group size>\]") as error:
        Scheme.parse(name)
    assert f"did you mean {nearest}" in str(error.value)


def test_a_name_near_nothing_gets_the_grammar_only() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'foo': A name is W<bits>"):
        Scheme.parse("foo")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, "from 2 to 8, not 1"),
        ({"bits": 9}, "from 2 to 8, not 9"),
        ({"bits": 3, "group_size": 0}, "must be positive or -1, not 0"),
        ({"bits": 3, "scale_rule": "mse"}, "scale_rule must be one of paper, full_range"),
        ({"bits": 3, "scale_dtype": "int8"}, "scale_dtype must be one of bfloat16"),
        ({"bits": 3, "symmetric": False, "scale_rule": "full_range"}, "symmetric=True"),
    ],
)
def test_invalid_fields_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scheme(**fields)


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="weight_bits"):
        Scheme.from_dict({"bits": 4, "weight_bits": 4})
    with pytest.raises(ValueError, match="needs the field 'bits'"):
        Scheme.from_dict({"group_size": 128})


def test_num_groups() -> None:
    assert Scheme.parse("W3G128").num_groups(9728) == 76
    assert Scheme.parse("W3").num_groups(100) == 1


def test_num_groups_names_the_group_sizes_that_work() -> None:
    with pytest.raises(ValueError, match=r"128 does not divide 1600 input features.*work: 32, 64, -1 "):
        Scheme.parse("W3G128").num_groups(1600)


def test_working_group_sizes_hold_for_all_layers() -> None:
    assert working_group_sizes([1536, 8960]) == [32, 64, 128, 256, -1]
    assert working_group_sizes([1600, 96]) == [32, -1]
    assert working_group_sizes([100]) == [-1]
