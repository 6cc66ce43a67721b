"""Which column of a table is text, and its rows as strings: text itself, or chats through the
model's own chat template."""

from collections.abc import Mapping
from typing import Any

from ..errors import CfspError, reason

TEXT, CHAT, NULL = "string", "chat", "null"
"""Types of columns that can be read; others go by the names of their format."""
CHATS = ("messages", "conversations")
ORDER = "text, else messages or conversations, else the only column of strings, else content"
ROLES = {"human": "user", "gpt": "assistant"}
MESSAGES = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
"""What the turns of a chat have: the usual form, and ShareGPT's."""


def pick_column(columns: Mapping[str, str], wanted: str | None, where: str) -> str:
    """The column to read, of those with these types: the ``wanted`` one, or the one that is text by
    :data:`ORDER`. CfspError where that is not there or has neither text nor chats."""
    if not columns:
        raise CfspError(f"{where} has no rows")
    told = ", ".join(f"{name} ({kind})" for name, kind in columns.items())
    if wanted is not None:
        if wanted not in columns:
            raise CfspError(f"`text_column` {wanted!r} is not in {where}; its columns: {told}")
        if columns[wanted] not in (TEXT, CHAT, NULL):
            raise CfspError(
                f"`text_column` {wanted!r} of {where} has neither strings nor chats; its columns: "
                f"{told}"
            )
        return wanted
    texts = [name for name, kind in columns.items() if kind == TEXT]
    if "text" in columns:
        if columns["text"] not in (TEXT, NULL):
            raise CfspError(
                f"column 'text' of {where} has no strings; its columns: {told}; "
                "`text_column` names another"
            )
        return "text"
    chats = [name for name in CHATS if columns.get(name) == CHAT]
    found = chats or (texts if len(texts) == 1 else [name for name in texts if name == "content"])
    if not found:
        raise CfspError(
            f"{where} needs a column 'text' or a single column of strings, or messages, "
            f"conversations or content, got {told}; `text_column` names another"
        )
    return found[0]


def is_turn(fields: Any) -> bool:
    """Whether a message with these fields can be one of a chat."""
    found = set(fields)
    return any(names <= found for names in MESSAGES)


def row_text(value: Any, tokenizer: Any) -> str | None:
    """What a row says; None for nothing. CfspError for what is neither text nor a chat."""
    if value is None or value == []:
        return None
    if isinstance(value, list):
        return _well_formed(_rendered([_turn(turn) for turn in value], tokenizer))
    if not isinstance(value, str):
        raise CfspError(f"not text but of type {type(value).__name__}")
    return _well_formed(value)


def _well_formed(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _rendered(turns: list[dict[str, Any]], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise CfspError("the model's tokenizer has no chat template, which chats need")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template raises what it likes
        why = f"{type(error).__name__}: {reason(error)}"
        raise CfspError(f"the chat template fails: {why}") from error


def _turn(turn: Any) -> dict[str, Any]:
    """A message as chat templates know it."""
    if not isinstance(turn, dict) or not is_turn(turn):
        raise CfspError("a chat's messages need role and content, or from and value")
    turn = {name: value for name, value in turn.items() if value is not None}
    if "role" not in turn and "from" in turn:
        said_by = turn.pop("from")
        turn = {"role": ROLES.get(said_by, said_by), "content": turn.pop("value", "")} | turn
    if "role" not in turn:
        raise CfspError("a message without a role")
    content = turn.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise CfspError("a message has parts that are not text")
        content = "".join(part.get("text") or "" for part in content)
    return {**turn, "content": content}
