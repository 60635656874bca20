"""What is done to documents on their way into shards: cleaned, left out, shuffled, cut."""

from dataclasses import dataclass, fields

from data_service.chat import rendered_text
from data_service.cleaning import clean, words_in
from data_service.inputs import Document
from storage.errors import ConfigurationError

SHARD_TOKENS = 10_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Every field decides bits."""

    shard_tokens: int = SHARD_TOKENS
    clean: bool = False
    min_words: int = 0
    max_words: int | None = None
    deduplicate: bool = False
    shuffle: bool = False
    shuffle_seed: int = 0

    def __post_init__(self) -> None:
        if self.shard_tokens < 1:
            raise ConfigurationError(f"shard_tokens must be at least 1, got {self.shard_tokens}")
        if self.max_words is not None and self.max_words < max(1, self.min_words):
            raise ConfigurationError(
                f"max_words must be at least 1 and min_words ({self.min_words}), got "
                f"{self.max_words}"
            )

    def to_json(self) -> dict[str, object]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def kept_document(document: Document, recipe: Recipe) -> Document | None:
    """The document as the recipe wants it; None when it is left out."""
    if document == ():
        return None
    if recipe.clean and isinstance(document, str):
        document = clean(document)
        if not document:
            return None
    if recipe.min_words or recipe.max_words is not None:
        words = words_in(document if isinstance(document, str) else rendered_text(document))
        if words < recipe.min_words or words > (recipe.max_words or words):
            return None
    return document
