"""Which type is the arithmetic in, and which do types promote to? By their names, as the libraries say."""

import importlib
import itertools

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

from optimisers.arrays import registry
from optimisers.arrays.types import (
    arithmetic,
    is_complex,
    is_inexact,
    is_number,
    numbers_of,
    promoted,
    real_of,
)

INEXACT = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
OTHERS = ("bool", "int8", "uint8", "int16", "int32", "int64")


def library(name: str) -> registry.Library:
    importlib.import_module(name)
    return registry.named(name)


@pytest.mark.parametrize("name", [*INEXACT, *OTHERS, "uint64", "float8_e4m3fn", "int4"])
def test_a_name_says_what_numpy_and_ml_dtypes_say_of_the_type(name: str) -> None:
    dtype = jnp.dtype(name)

    assert is_number(name)
    assert is_complex(name) == jnp.issubdtype(dtype, jnp.complexfloating)
    assert is_inexact(name) == (jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize > 1)
    assert numbers_of(name).bits == (4 if name == "int4" else 8 * dtype.itemsize)


@pytest.mark.parametrize("dtype", [object, str, "U8", "M8[ns]", "V4", np.dtype([("a", float)])])
def test_what_holds_no_numbers_is_none(dtype: object) -> None:
    assert not is_number(np.dtype(dtype).name)


@pytest.mark.parametrize("name", ["key<fry>", "float", "qint8", "quint4x2", ""])
def test_other_names_are_no_numbers_of_two_bytes(name: str) -> None:
    assert not is_inexact(name)


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">c8"])
def test_the_arithmetic_is_in_the_byte_order_of_the_machine(dtype: str) -> None:
    numpy = library("numpy")

    assert is_inexact(numpy.type_name(np.dtype(dtype)))
    assert arithmetic(numpy, np.dtype(dtype)) == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", INEXACT)
def test_the_arithmetic_is_no_narrower_than_float32(name: str, dtype: str) -> None:
    of, kind = library(name), getattr(torch, dtype) if name == "torch" else jnp.dtype(dtype)
    here = dtype.replace("128", "64").replace("float64", "float32") if name == "jax" else dtype

    found = of.type_name(arithmetic(of, kind))

    assert found == ("float32" if here.endswith("16") else here)  # 64 bits are switched off in JAX


@pytest.mark.parametrize(("own", "other"), list(itertools.product(INEXACT[2:], INEXACT)))
def test_types_promote_as_those_of_torch_and_numpy_do(own: str, other: str) -> None:
    torch_type, numpy_type = getattr(torch, own), np.dtype(own)
    by_torch = torch.promote_types(torch_type, getattr(torch, other))
    by_numpy = np.result_type(numpy_type, jnp.dtype(other))
    if "complex" not in own:
        by_torch, by_numpy = by_torch.to_real(), np.zeros(0, by_numpy).real.dtype

    assert promoted(library("torch"), torch_type, [other]) == by_torch
    assert promoted(library("numpy"), numpy_type, [other]) == by_numpy


def test_bits_of_a_state_promote_nothing() -> None:
    assert promoted(library("numpy"), np.dtype("float32"), ["int16", "bool"]) == np.float32
    assert promoted(library("torch"), torch.float32, ["int16", "bfloat16"]) is torch.float32


@pytest.mark.parametrize("dtype", INEXACT)
def test_the_real_type_is_that_of_the_real_part(dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))

    assert real_of(library("numpy"), kind) == np.zeros(0, kind).real.dtype
    assert real_of(library("torch"), getattr(torch, dtype)) is getattr(torch, dtype).to_real()
