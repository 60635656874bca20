"""Precision, process-wide switches, and randomness that depends on its key alone."""

import hashlib
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.errors import ConfigurationError
from trainer.numerics import (
    NumericsConfig,
    Precision,
    autocast,
    key_seed,
    keyed_randomness,
    make_scaler,
    resolve_precision,
    set_up_numerics,
)

CPU = torch.device("cpu")
KEYS = st.lists(st.integers(-3, 3) | st.text('ab,1"', max_size=3), max_size=4).map(tuple)


@pytest.fixture
def same_switches() -> Iterator[None]:
    """The switches of the process as they were."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def drawn(*key: str | int) -> torch.Tensor:
    with keyed_randomness(CPU, *key):
        return torch.rand(4)


@settings(deadline=None)
@given(key=KEYS, outside=st.integers(0, 2**32))
def test_randomness_by_key_does_not_depend_on_what_was_drawn_before(
    key: tuple[str | int, ...], outside: int
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = drawn(*key)
        torch.manual_seed(outside)
        torch.rand(outside % 5)
        assert torch.equal(drawn(*key), expected)


@settings(deadline=None)
@given(key=KEYS, other=KEYS)
def test_different_keys_draw_differently(
    key: tuple[str | int, ...], other: tuple[str | int, ...]
) -> None:
    assert (key_seed(*key) == key_seed(*other)) == (key == other)
    assert torch.equal(drawn(*key), drawn(*other)) == (key == other)


@pytest.mark.parametrize(
    ("key", "other"),
    [
        (("dropout", 1, 23), ("dropout", 12, 3)),
        (("dropout", 1, 2), ("dropout", 2, 1)),
        ((1,), ("1",)),
        (("a", "b"), ("a,b",)),
        ((), ("",)),
    ],
)
def test_a_seed_is_not_a_sum_of_its_parts(
    key: tuple[str | int, ...], other: tuple[str | int, ...]
) -> None:
    assert key_seed(*key) != key_seed(*other)


def test_the_seed_of_a_key_is_the_head_of_its_sha256() -> None:
    """A changed formula would change every run that goes on."""
    digest = hashlib.sha256(b'["dropout",0,17,3,1]').hexdigest()
    assert key_seed("dropout", 0, 17, 3, 1) == int(digest[:16], 16) // 2
    assert key_seed("dropout", 0, 17, 3, 1) < 2**63


def test_the_generator_outside_does_not_notice() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn("a")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="inside"), keyed_randomness(CPU, "a"):
        torch.rand(3)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_can_be_nested() -> None:
    with keyed_randomness(CPU, "outer"):
        first = torch.rand(2)
        drawn("inner")
        second = torch.rand(2)
    assert torch.equal(torch.cat([first, second]), drawn("outer"))


@pytest.mark.parametrize(
    ("asked", "found"), [("auto", "fp32"), ("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_precision_on_a_cpu(asked: str, found: str) -> None:
    assert resolve_precision(asked, CPU) == found


@pytest.mark.parametrize(("native_bf16", "found"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_is_bf16_only_where_the_gpu_has_it(native_bf16: bool, found: str) -> None:
    """A T4 says True when emulation counts (DESIGN.md, section 7)."""

    def supported(including_emulation: bool = True) -> bool:
        return including_emulation or native_bf16

    with patch("torch.cuda.is_bf16_supported", supported):
        assert resolve_precision("auto", torch.device("cuda")) == found


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match="precision must be fp32, bf16, fp16 or auto; got 'fp8'"
    ):
        resolve_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_products_have_the_precision_and_weights_stay_float32(
    precision: Precision, dtype: torch.dtype
) -> None:
    layer = torch.nn.Linear(4, 4)
    with autocast(precision, CPU):
        assert layer(torch.ones(2, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_only_fp16_scales_the_loss(precision: Precision) -> None:
    scaler = make_scaler(precision, CPU)
    assert scaler.is_enabled() == (precision == "fp16")
    assert bool(scaler.state_dict()) == (precision == "fp16")


@pytest.mark.parametrize(("tf32", "products"), [(False, "highest"), (True, "high")])
def test_process_wide_switches_are_set(same_switches: None, tf32: bool, products: str) -> None:
    set_up_numerics(NumericsConfig(tf32=tf32, cpu_threads=2), CPU)
    assert torch.get_num_threads() == 2
    assert torch.get_float32_matmul_precision() == products
    assert torch.backends.cudnn.allow_tf32 is tf32
    set_up_numerics(NumericsConfig(), CPU)
    assert torch.get_num_threads() == 1


def test_no_threads_at_all_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cpu_threads must be from 1 to 1024; got 0"):
        NumericsConfig(cpu_threads=0)
