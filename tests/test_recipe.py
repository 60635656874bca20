"""Recipes: what is kept, as which text, and what makes no sense."""

import pytest

from data_service.recipe import Recipe, kept_document
from storage.errors import ConfigurationError


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        (Recipe(), "a  b \r\nc"),
        (Recipe(clean=True), "a  b\nc"),
        (Recipe(min_words=3, max_words=3), "a  b \r\nc"),
        (Recipe(min_words=4), None),
        (Recipe(max_words=2), None),
    ],
)
def test_a_recipe_decides_what_is_kept(recipe: Recipe, kept: str | None) -> None:
    assert kept_document("a  b \r\nc", recipe) == kept


def test_what_is_empty_is_left_out() -> None:
    assert kept_document((), Recipe()) is None
    assert kept_document("\n\r\n", Recipe(clean=True)) is None


def test_a_recipe_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"max_words must be .* min_words \(9\), got 3"):
        Recipe(min_words=9, max_words=3)
    with pytest.raises(ConfigurationError, match="max_words must be at least 1"):
        Recipe(max_words=0)
