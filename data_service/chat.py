"""Conversations: read from Alpaca's and ShareGPT's shapes, rendered as ChatML with a loss mask.

    <|im_start|>user\n...<|im_end|>\n<|im_start|>assistant\n...<|im_end|>\n

The marks are the tokenizer's special ids; `<|im_start|>` in what somebody wrote stays text. The
model is trained on what the assistant says and on the `<|im_end|>` after it, and on nothing else.
"""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_service.tokenizer import IM_END, IM_START, Ids, Tokenizer
from storage.errors import ConfigurationError, DataError

ALPACA_FIELDS = ("instruction", "output")
SHARE_FIELDS = ("conversations", "messages")
CHAT_FIELDS = frozenset((*ALPACA_FIELDS, "input", *SHARE_FIELDS, "system"))

_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}


class Turn(NamedTuple):
    role: str
    content: str


Conversation = tuple[Turn, ...]


def is_chat(record: Mapping[str, object]) -> bool:
    """Whether a record has the fields of a conversation."""
    has = {name for name in CHAT_FIELDS if record.get(name) is not None}
    return has.issuperset(ALPACA_FIELDS) or bool(has.intersection(SHARE_FIELDS))


def conversation_of(record: Mapping[str, object], where: str) -> Conversation:
    """The turns of a record; DataError naming `where` for a shape that is not known.

    A conversation in which the assistant says nothing is (): there is nothing to train on.
    """
    for field in SHARE_FIELDS:
        said = record.get(field)
        if said is not None:
            if isinstance(said, dict) and all(isinstance(part, list) for part in said.values()):
                # A table's column for each field: Hugging Face's Sequence of a dict.
                rows = itertools.zip_longest(*said.values())
                said = [dict(zip(said, row, strict=True)) for row in rows]
            if not isinstance(said, list):
                raise DataError(f"{where}: {field!r} must be a list of turns, found {said!r:.80}")
            turns = tuple(_turn(turn, f"{where}: turn {n}") for n, turn in enumerate(said))
            break
    else:
        asked, more, answer = (
            _alpaca(record, f, where) for f in ("instruction", "input", "output")
        )
        question = f"{asked}\n\n{more}" if more.strip() else asked
        turns = (Turn("user", question), Turn("assistant", answer))
    system = record.get("system")
    if isinstance(system, str) and system.strip() and turns and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    return turns if any(turn.role == "assistant" and turn.content for turn in turns) else ()


def rendered_text(conversation: Conversation) -> str:
    """What the tokens of `rendered` decode to."""
    return "".join(f"{IM_START}{turn.role}\n{turn.content}{IM_END}\n" for turn in conversation)


def rendered(conversation: Conversation, tokenizer: Tokenizer) -> tuple[Ids, npt.NDArray[np.bool_]]:
    """The ids of a conversation, and which of them the model is trained to predict."""
    if tokenizer.chat_ids is None:
        raise ConfigurationError(
            f"conversations need special tokens, which the {tokenizer.name} tokenizer has not; "
            "use --tokenizer gpt2-chat, bytes-chat or bpe:SIZE, for all sources of the mixture"
        )
    start, end = tokenizer.chat_ids
    ids: list[Ids] = []
    learn: list[npt.NDArray[np.bool_]] = []

    def add(part: Ids, is_learnt: bool) -> None:
        ids.append(part)
        learn.append(np.full(part.size, is_learnt))

    for turn in conversation:
        is_learnt = turn.role == "assistant"
        add(np.array([start], dtype=np.int64), False)
        add(tokenizer.encode(f"{turn.role}\n"), False)
        add(tokenizer.encode(turn.content), is_learnt)
        add(np.array([end], dtype=np.int64), is_learnt)
        add(tokenizer.encode("\n"), False)
    return np.concatenate(ids), np.concatenate(learn)


def _turn(turn: object, where: str) -> Turn:
    if isinstance(turn, dict):
        role = turn.get("from", turn.get("role"))
        content = turn.get("value", turn.get("content"))
        if isinstance(role, str) and isinstance(content, str):
            known = _ROLES.get(role.lower())
            if known is None:
                raise DataError(
                    f"{where}: {role!r} is no known speaker (known: {', '.join(sorted(_ROLES))})"
                )
            return Turn(known, content)
    raise DataError(
        f"{where}: expected {{from, value}} or {{role, content}} with text, found {turn!r:.80}"
    )


def _alpaca(record: Mapping[str, object], field: str, where: str) -> str:
    value = record.get(field)
    if value is None and field == "input":
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {field!r} must be text, found {value!r:.80} (a chat record has "
            "{instruction, input, output}, {conversations} or {messages})"
        )
    return value
