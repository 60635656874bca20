"""Cleaning: one form, no licence, and no effect the second time."""

from hypothesis import given
from hypothesis import strategies as st

from data_service.cleaning import clean, words_in

BOOK = """The Project Gutenberg EBook of A Tale
Title: A Tale

*** START OF THE PROJECT GUTENBERG EBOOK A TALE ***

Produced by Somebody and a Team

CHAPTER I.\r
\r


It was the \u0065\u0301t\u00e9.\u2028The end.   \t

*** END OF THE PROJECT GUTENBERG EBOOK A TALE ***

Section 1. General Terms of Use
"""


def test_a_book_keeps_its_text_only() -> None:
    assert clean(BOOK) == "CHAPTER I.\n\nIt was the \u00e9t\u00e9.\nThe end."


def test_of_books_in_a_row_each_is_kept() -> None:
    tail = "the end of another.\n*** END OF THE PROJECT GUTENBERG EBOOK B ***\nLicence\n"
    book = "CHAPTER I.\n\nIt was the \u00e9t\u00e9.\nThe end."
    assert clean(BOOK + BOOK) == f"{book}\n\n{book}"
    assert clean(tail + BOOK) == f"the end of another.\n\n{book}"
    old = "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*\nmore of the header\n"
    assert clean("small print\n" + old + BOOK) == book
    assert clean(f"{book}\n\nEnd of Project Gutenberg's A Tale\n{tail}") == book


def test_long_white_space_takes_no_time_of_its_square() -> None:
    assert clean("a" + " " * 300_000 + "b") == "a" + " " * 300_000 + "b"


def test_text_without_marks_keeps_its_words() -> None:
    text = "Title: mine\n\nProduced by us, we sing.\nNo end of project here."
    assert clean("  indented\n" + text.replace("\n\n", "\n\n\n\n")) == (
        "  indented\nTitle: mine\n\nNo end of project here."
    )


@given(st.text(alphabet="a \n\r\t\u2028\u0301é", max_size=60))
def test_cleaning_again_changes_nothing(text: str) -> None:
    cleaned = clean(text)
    assert clean(cleaned) == cleaned
    assert "\n\n\n" not in cleaned


def test_words_are_counted_between_white_space() -> None:
    assert words_in(" one  two\nthree\t") == 3
    assert words_in("") == 0
