"""The table that gives transformers' GPT-2 our weights: transformers itself is the reference."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from checkpointing.gpt2_layout import LAYER, TABLE, Row, gpt2_config, gpt2_tensors
from storage.errors import ConfigurationError
from tests.gpt2_reference import TOLERANCE, as_gpt2, logits_of_both, random_model

SIZES = {"n_layer": 3, "n_head": 2, "n_embd": 16, "context": 24, "dropout": 0.25, "bias": True}


def reference(**sizes: Any) -> GPT2LMHeadModel:
    """transformers' own GPT-2 of these sizes, made from our config.json."""
    return GPT2LMHeadModel(GPT2Config(**gpt2_config(SIZES | sizes, vocab_size=70, end=69)))


@pytest.mark.parametrize("bias", [True, False])
def test_every_row_of_the_table_is_right(bias: bool) -> None:
    model = random_model(bias=bias)
    expected, found = logits_of_both(model, as_gpt2(model))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def exchanged(one: str, other: str) -> tuple[Row, ...]:
    """The table with the GPT-2 names of two rows exchanged."""
    names = {one: other, other: one}

    def short(name: str) -> str:
        return name.removeprefix("transformer.").removeprefix("h.{layer}.")

    return tuple(
        row._replace(gpt2=row.gpt2.replace(short(row.gpt2), names[short(row.gpt2)]))
        if short(row.gpt2) in names
        else row
        for row in TABLE
    )


@pytest.mark.parametrize(
    "table",
    [
        # the only square projection: of the others, the shape would tell
        tuple(r._replace(transposed=r.transposed and "attn.c_proj" not in r.ours) for r in TABLE),
        exchanged("ln_1.weight", "ln_2.weight"),
        exchanged("ln_1.bias", "ln_2.bias"),
        exchanged("attn.c_proj.bias", "mlp.c_proj.bias"),
        exchanged("ln_1.weight", "ln_1.bias"),
    ],
    ids=["not transposed", "norms", "norm biases", "projection biases", "weight and bias"],
)
def test_with_a_wrong_table_the_logits_differ(table: tuple[Row, ...]) -> None:
    model = random_model(bias=True)
    expected, found = logits_of_both(model, as_gpt2(model, table))
    assert float((found - expected).abs().max()) > 0.1


def test_without_any_transposition_transformers_refuses_the_weights() -> None:
    table = tuple(row._replace(transposed=False) for row in TABLE)
    with pytest.raises(RuntimeError, match=r"size mismatch for transformer.h.0.attn.c_attn.weight"):
        as_gpt2(random_model(bias=True), table)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_the_table_names_every_tensor_of_a_gpt2_once(n_layer: int) -> None:
    names = [
        row.gpt2.format(layer=layer)
        for row in TABLE
        for layer in range(n_layer if LAYER in row.gpt2 else 1)
    ]
    theirs = {name for name, _ in reference(n_layer=n_layer).named_parameters()}
    assert sorted(names) == sorted(theirs), "the head is the token embedding, so it has no row"


@pytest.mark.parametrize("bias", [True, False])
def test_shapes_are_those_that_transformers_makes(bias: bool) -> None:
    weights = random_model(bias=bias).state_dict()
    tensors = gpt2_tensors(weights, n_layer=2, bias=bias, vocab_size=70)
    theirs = dict(reference(n_layer=2).named_parameters())
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in theirs.items()}


def test_the_padding_of_the_vocabulary_is_cut_off() -> None:
    weights = random_model(bias=True).state_dict()
    padded = weights["transformer.wte.weight"]
    assert len(padded) == 128
    for vocab_size in (1, 70, 128):
        tensors = gpt2_tensors(weights, n_layer=2, bias=True, vocab_size=vocab_size)
        assert torch.equal(tensors["transformer.wte.weight"], padded[:vocab_size])


def test_without_biases_they_are_zeros() -> None:
    weights = random_model(bias=False).state_dict()
    tensors = gpt2_tensors(weights, n_layer=2, bias=False, vocab_size=70)
    biases = {name: t for name, t in tensors.items() if name.endswith(".bias")}
    assert len(biases) == 13
    assert not any(bool(bias.any()) for bias in biases.values())
    assert {t.dtype for t in biases.values()} == {torch.float32}


def test_each_tensor_is_contiguous_and_has_memory_of_its_own() -> None:
    """safetensors refuses shared memory, and a view would write the whole of what it looks into."""
    weights = random_model(bias=True).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    tensors = gpt2_tensors(weights, n_layer=2, bias=True, vocab_size=70)
    for tensor in tensors.values():
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensor.zero_()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_the_config_says_our_sizes_in_the_names_of_transformers() -> None:
    config = GPT2Config(**gpt2_config(SIZES, vocab_size=70, end=69))
    assert (config.n_layer, config.n_head, config.n_embd, config.n_positions) == (3, 2, 16, 24)
    assert (config.vocab_size, config.tie_word_embeddings, config.n_inner) == (70, True, None)
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.25, 0.25, 0.25)
    assert (config.activation_function, config.layer_norm_epsilon) == ("gelu_new", 1e-5)
    assert (config.bos_token_id, config.eos_token_id) == (69, 69)
    assert config.architectures == ["GPT2LMHeadModel"]
    unknown = GPT2Config(**gpt2_config(SIZES, vocab_size=70, end=None))
    assert (unknown.bos_token_id, unknown.eos_token_id) == (None, None)


def test_weights_that_are_not_those_of_a_gpt2_are_refused() -> None:
    weights = random_model(bias=False).state_dict()
    with pytest.raises(ConfigurationError, match=r"GPT-2 has no place for lora; .*safetensors"):
        gpt2_tensors({**weights, "lora": torch.zeros(1)}, n_layer=2, bias=False, vocab_size=70)
    with pytest.raises(ConfigurationError, match=r"a GPT-2 has transformer.h.0.ln_1.bias"):
        gpt2_tensors(weights, n_layer=2, bias=True, vocab_size=70)
    with pytest.raises(ConfigurationError, match=r"has 129 tokens, and .*wte.weight has 128 rows"):
        gpt2_tensors(weights, n_layer=2, bias=False, vocab_size=129)


@pytest.mark.parametrize("vocab_size", [0, -1, 129])
def test_a_vocabulary_that_the_embedding_has_no_rows_for_is_refused(vocab_size: int) -> None:
    weights = random_model(bias=True).state_dict()
    message = rf"has {vocab_size} tokens, and transformer\.wte\.weight has 128 rows: expected at "
    with pytest.raises(ConfigurationError, match=message):
        gpt2_tensors(weights, n_layer=2, bias=True, vocab_size=vocab_size)


@pytest.mark.parametrize("n_layer", [1, 3])
def test_weights_of_another_number_of_layers_are_refused(n_layer: int) -> None:
    weights = random_model(bias=True).state_dict()
    message = (
        r"no place for transformer\.h\.1\." if n_layer == 1 else r"has transformer\.h\.2\.ln_1"
    )
    with pytest.raises(ConfigurationError, match=message):
        gpt2_tensors(weights, n_layer=n_layer, bias=True, vocab_size=70)


def test_of_many_tensors_without_a_place_five_are_named() -> None:
    weights = random_model(bias=True).state_dict()
    strangers = {f"x{number}": torch.zeros(1) for number in range(7)}
    with pytest.raises(ConfigurationError, match=r"no place for x0, x1, x2, x3, x4; export with"):
        gpt2_tensors({**weights, **strangers}, n_layer=2, bias=True, vocab_size=70)
