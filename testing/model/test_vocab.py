import pytest

from arbitor.errors import UserError
from arbitor.model import vocab


def test_control_tokens_follow_the_bytes_in_the_fixed_order():
    names = (
        *("PAD", "EOS", "BOS", "SYSTEM", "USER", "ASSISTANT", "SCRATCHPAD", "PLAN", "REFLECTION", "SUMMARY"),
        *("ACTION", "TOOL", "TOOL_RESULT", "FUNCTION", "CODE", "CODE_BLOCK", "PATCH", "EXECUTION", "SEARCH"),
        *("RETRIEVAL", "CONTEXT", "CITATION", "JSON", "XML", "TABLE", "LIST", "MARKDOWN", "ERROR", "WARNING"),
        *("POLICY", "STOP", "RESERVED"),
    )
    assert tuple(vocab.CONTROL_IDS) == names
    assert list(vocab.CONTROL_IDS.values()) == list(range(256, 288))
    assert vocab.VOCAB_SIZE == 288
    assert (vocab.PAD, vocab.EOS, vocab.STOP) == (256, 257, 286)


def test_text_becomes_utf8_and_bytes_stay():
    assert vocab.to_bytes("aé€") == b"a\xc3\xa9\xe2\x82\xac"
    assert vocab.to_bytes(b"\xff\x00a") == b"\xff\x00a"
    assert vocab.to_bytes(bytearray(b"ab")) == b"ab"


def test_bytes_that_a_shell_escaped_come_back():
    assert vocab.to_bytes(b"caf\xe9".decode("utf-8", "surrogateescape")) == b"caf\xe9"


@pytest.mark.parametrize(("text", "message"), [("a\ud800", "character 1 .*surrogate"), (3, "not int")])
def test_what_is_no_text_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        vocab.to_bytes(text)
