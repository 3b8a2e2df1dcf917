"""The vocabulary: 256 bytes, then 32 control tokens."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from arbitor.errors import UserError

NUM_BYTES: Final = 256

CONTROL_TOKENS: Final = (
    *("PAD", "EOS", "BOS", "SYSTEM", "USER", "ASSISTANT", "SCRATCHPAD", "PLAN"),
    *("REFLECTION", "SUMMARY", "ACTION", "TOOL", "TOOL_RESULT", "FUNCTION", "CODE", "CODE_BLOCK"),
    *("PATCH", "EXECUTION", "SEARCH", "RETRIEVAL", "CONTEXT", "CITATION", "JSON", "XML"),
    *("TABLE", "LIST", "MARKDOWN", "ERROR", "WARNING", "POLICY", "STOP", "RESERVED"),
)

CONTROL_IDS: Final[Mapping[str, int]] = MappingProxyType(
    {name: NUM_BYTES + index for index, name in enumerate(CONTROL_TOKENS)}
)

VOCAB_SIZE: Final = NUM_BYTES + len(CONTROL_TOKENS)

PAD: Final = CONTROL_IDS["PAD"]
EOS: Final = CONTROL_IDS["EOS"]
STOP: Final = CONTROL_IDS["STOP"]

END_IDS: Final = frozenset({EOS, STOP})


def to_bytes(text: bytes | str) -> bytes:
    """Text as the bytes that the model reads: str becomes UTF-8, bytes stay as they are.

    Bytes that a shell handed over in a str (surrogate escapes) come back as the bytes they were.

    Raises:
        UserError: the text is neither str nor bytes, or holds a surrogate that stands for no byte.
    """
    if isinstance(text, str):
        try:
            return text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start} of the text is a lone surrogate, which is not in UTF-8; pass bytes"
            ) from error
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text)
    raise UserError(f"text must be str or bytes, not {type(text).__name__}")
