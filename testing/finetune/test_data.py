"""Reading conversations: forms, bad lines, and the split."""

import gzip
import json

import pytest

from arbitor.errors import UserError
from arbitor.finetune.data import open_instructions, read_conversations
from arbitor.finetune.instructions import Message, frame
from arbitor.finetune.synthetic import NUM_CONVERSATIONS, synthetic_conversations

GOOD = '{"prompt": "a", "response": "b"}'


@pytest.fixture
def write(tmp_path):
    """write(*lines) -> path of a file with them."""

    def make(*lines, name="talk.jsonl"):
        path = tmp_path / name
        data = "".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass")
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(path)

    return make


def test_every_form_gives_messages(write):
    user, assistant = Message("user", b"q"), Message("assistant", b"a")
    talk = [{"role": "system", "content": "s"}, *({"role": r, "content": r} for r in ("user", "assistant"))]
    forms = {
        json.dumps({"prompt": "q", "response": "a", "id": 3}): [user, assistant],
        json.dumps({"prompt": "q", "completion": "a"}): [user, assistant],
        json.dumps({"prompt": "q", "answer": "a", "system": "s"}): [Message("system", b"s"), user, assistant],
        json.dumps({"instruction": "q", "input": "", "output": "a"}): [user, assistant],
        json.dumps({"instruction": "q", "input": "i", "output": "a"}): [Message("user", b"q\ni"), assistant],
        json.dumps({"messages": talk}): [
            Message("system", b"s"),
            *(Message(r, r.encode()) for r in ("user", "assistant")),
        ],
        json.dumps({"prompt": "é", "response": "\ud800"}): [
            Message("user", "é".encode()),
            Message("assistant", b"?"),
        ],
    }
    assert read_conversations([write("", *forms, "  ")]) == list(forms.values())
    assert read_conversations([write(*forms, name="t.jsonl.gz")]) == list(forms.values())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "got a list"),
        ("[" * 100_000, "not usable JSON"),
        ('{"text": "a"}', "neither messages nor a prompt; needed are .* the fields are 'text'"),
        ('{"prompt": "a"}', "a prompt without its answer"),
        ('{"prompt": 3, "response": "b"}', "prompt must be a string, got a int"),
        ('{"prompt": "a", "response": null}', "response must be a string, got a NoneType"),
        ('{"messages": "a"}', "messages must be a list"),
        ('{"messages": []}', "no message of the assistant"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "user"}]}', "message 1 must be an object with a role and a content"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "message 1 has the role 'tool'"),
        ('{"messages": [{"role": ["x"], "content": "a"}]}', "message 1 has the role"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}',
            "message 2 is a system message",
        ),
    ],
)
def test_a_bad_line_is_named_and_the_others_counted(write, line, words):
    with pytest.raises(UserError, match=rf"talk\.jsonl', line 3: .*{words}[^\n]*$") as caught:
        read_conversations([write(GOOD, "", line, GOOD)])
    assert "more bad" not in str(caught.value)
    with pytest.raises(UserError, match=r"line 1: .* \(and 2 more bad lines\)"):
        read_conversations([write(line, GOOD, line, line)])


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match=r"line 2: not UTF-8"):
        read_conversations([str(path)])


def test_files_that_hold_nothing(write, tmp_path):
    with pytest.raises(UserError, match="holds no conversations"):
        read_conversations([write("", " ")])
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        read_conversations([str(tmp_path / "nowhere.jsonl")])
    broken = tmp_path / "broken.jsonl.gz"
    broken.write_bytes(gzip.compress(GOOD.encode() * 99)[:-9])
    with pytest.raises(UserError, match="truncated gzip"):
        read_conversations([str(broken)])


def numbered(count):
    return [json.dumps({"prompt": str(i), "response": "b"}) for i in range(count)]


def test_a_share_is_spread_evenly_and_copies_stay_together(write):
    lines = numbered(20)
    data = open_instructions([write(*lines, *lines)], "0.2", 32)
    sides = [{example.ids.tobytes() for example in part} for part in (data.train, data.held_out)]
    assert not sides[0] & sides[1]
    assert (len(data.train), len(data.held_out)) == (32, 8)
    first = [int(bytes(example.ids[3:-3].tolist()).decode()) for example in data.held_out[:4]]
    assert first == [4, 9, 14, 19]
    assert "32 conversations to learn from, 8 held out" in data.description


def test_a_held_out_file_is_taken_out_of_the_data(write):
    lines = numbered(20)
    path = write(*lines)
    data = open_instructions([path], write(*lines[5:8], name="out.jsonl"), 32)
    assert (len(data.train), len(data.held_out)) == (17, 3)
    assert "3 left out, also held out" in data.description
    with pytest.raises(UserError, match="no conversation to learn from"):
        open_instructions([path], path, 32)


def test_what_does_not_fit_is_counted(write):
    cut = json.dumps({"prompt": "a", "response": "b" * 99})
    lost = json.dumps({"prompt": "c" * 99, "response": "b"})
    data = open_instructions([write(*numbered(30), cut, lost)], None, 32)
    assert "1 cut to the context; 1 left out, no answer within the context" in data.description
    assert max(len(example.ids) for example in data.train + data.held_out) == 32
    with pytest.raises(UserError, match="a larger --ctx"):
        open_instructions([write(lost, lost.replace("c", "d"))], "0.5", 32)


@pytest.mark.parametrize("share", ["0", "1", "-0.5", "nan"])
def test_bad_shares(write, share):
    with pytest.raises(UserError, match="--held-out"):
        open_instructions([write(*numbered(9))], share, 32)


def test_the_fingerprint_sees_every_id_and_every_mask(write):
    seen = set()
    for lines in (numbered(20), numbered(21), [*numbered(19), GOOD], list(reversed(numbered(20)))):
        seen.add(open_instructions([write(*lines)], None, 32).fingerprint())
    assert len(seen) == 4
    assert open_instructions([write(*numbered(20))], None, 32).fingerprint() in seen


def test_embedded_instructions_are_right_different_and_fit():
    conversations = synthetic_conversations()
    questions = {messages[0].content: messages[1].content.decode() for messages in conversations}
    assert len(questions) == NUM_CONVERSATIONS
    assert conversations == synthetic_conversations()
    assert max(len(frame(messages).ids) for messages in conversations) <= 48
    for question, answer in questions.items():
        words = question.decode().rstrip("?.").split()
        match words:
            case ["What", "is", a, sign, b]:
                right = str(int(a) + int(b) if sign == "+" else int(a) - int(b))
            case ["Reverse", word]:
                right = word[::-1]
            case ["Say", word]:
                right = word
            case ["Say", word, "loudly"]:
                right = word.upper() + "!"
            case ["First", _, _, word]:
                right = word[0]
            case ["Last", _, _, word]:
                right = word[-1]
            case [*_, word]:
                right = str(len(word))
        assert answer == right, question
