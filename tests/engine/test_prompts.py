"""Prompt files: every form that is read, and for every mistake the line that it is on and what was expected there."""

import json

import pytest

from eesd_jax.engine.prompts import Conversation, is_text, read_prompts
from eesd_jax.errors import UserError

ALL_FORMS = '{"turns": ["..."]}, {"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}]}'


@pytest.fixture
def write(tmp_path):
    """Writes a prompt file, of text, bytes or records, and returns its path."""

    def write(content):
        path = tmp_path / "prompts.jsonl"
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_the_three_forms(write):
    system, question, answer = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    records = [
        {"id": "a", "category": "math", "turns": ["one", "two"]},
        {"prompt": "only"},
        {"messages": [system, question, answer, {"role": "user", "content": "last"}]},
        {"messages": [question]},
    ]
    assert read_prompts(write(records)) == [
        Conversation("a", "math", (), ("one", "two"), 1),
        Conversation(2, None, (), ("only",), 2),
        Conversation(3, None, (system, question, answer), ("last",), 3),
        Conversation(4, None, (), ("user",), 4),
    ]


def test_records_of_spec_bench_keep_their_id(write):
    record = {"question_id": 81, "category": "writing", "turns": ["Compose.", "Rewrite."], "reference": ["..."]}
    assert read_prompts(write([record])) == [Conversation(81, "writing", (), ("Compose.", "Rewrite."), 1)]


def test_id_is_the_line_number_where_none_is_given(write):
    text = '\n{"prompt": "a"}\n\n   \n{"prompt": "b", "id": 0}\n{"prompt": "c", "id": null}\n'
    assert [(c.id, c.line) for c in read_prompts(write(text))] == [(2, 2), (0, 5), (6, 6)]


def test_lines_end_at_newlines_alone(write):
    prompt = "a\u2028b\u2029c\x85d"  # str.splitlines would cut here, JSON does not
    line = json.dumps({"prompt": prompt}, ensure_ascii=False)
    assert [conversation.turns for conversation in read_prompts(write(f"{line}\r\n{line}"))] == [(prompt,), (prompt,)]


def test_byte_order_mark_and_missing_last_newline_do_no_harm(write):
    assert [c.turns for c in read_prompts(write(b'\xef\xbb\xbf{"prompt": "a"}\n{"prompt": "b"}'))] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("line", "found", "expected"),
    [
        ('{"prompt": "a"', "not valid JSON (Expecting ',' delimiter at column 15)", ALL_FORMS),
        ("Why is the sky blue?", "not valid JSON (Expecting value at column 1)", ALL_FORMS),
        ('{"id": ' + "9" * 5000 + "}", "not valid JSON", ALL_FORMS),
        ("[" * 100_000, "not valid JSON", ALL_FORMS),
        ('["a", "b"]', 'found ["a", "b"]', ALL_FORMS),
        ('"text"', 'found "text"', ALL_FORMS),
        ("null", "found null", ALL_FORMS),
        ("{}", "found {}", ALL_FORMS),
        ('{"text": "a"}', 'found {"text": "a"}', ALL_FORMS),
        ('{"turns": "a"}', 'found {"turns": "a"}', ALL_FORMS),
        ('{"turns": []}', "turns is empty", "a list of texts"),
        ('{"turns": ["a", ""]}', 'prompt ""', "a text that is not blank"),
        ('{"turns": ["a", 5]}', "prompt 5", "a text that is not blank"),
        ('{"turns": [["a"]]}', 'prompt ["a"]', "a text that is not blank"),
        ('{"prompt": null}', "prompt null", "a text that is not blank"),
        ('{"prompt": " \\n "}', 'prompt " \\n "', "a text that is not blank"),
        ('{"prompt": "half \\ud83d"}', 'prompt "half \\ud83d"', "a text that is not blank"),
        ('{"messages": []}', 'found {"messages": []}', ALL_FORMS),
        ('{"messages": "a"}', 'found {"messages": "a"}', ALL_FORMS),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "the last message is", "one of the role 'user'"),
        ('{"messages": [{"role": "user"}]}', 'the last message is {"role": "user"}', "one of the role 'user'"),
        ('{"messages": [{"role": "user", "content": ["a"]}]}', 'prompt ["a"]', "a text that is not blank"),
        ('{"messages": ["a", {"role": "user", "content": "b"}]}', 'message "a"', '{"role": "...", "content": "..."}'),
        ('{"messages": [{"role": 1, "content": "a"}, {"role": "user", "content": "b"}]}', 'message {"role": 1', '{"role": "..."'),
        ('{"prompt": "a", "id": {"b": 1}}', 'id {"b": 1}', "a text or an integer"),
        ('{"prompt": "a", "id": true}', "id true", "a text or an integer"),
        ('{"prompt": "a", "category": 3}', "category 3", "a text"),
    ],
    ids=lambda value: value[:30],
)
def test_mistakes_are_named_with_their_line(write, line, found, expected):
    path = write('{"prompt": "good"}\n\n' + line + '\n{"prompt": "good"}\n')
    with pytest.raises(UserError) as error:
        read_prompts(path)
    message = str(error.value)
    assert message.startswith(f"prompt file {str(path)!r}, line 3: ")
    assert found in message
    assert f"expected {expected}" in message
    assert len(message) < 500


@pytest.mark.parametrize("content", ["", "\n", "  \n\t\n\r\n"])
def test_files_without_records(write, content):
    path = write(content)
    with pytest.raises(UserError) as error:
        read_prompts(path)
    assert str(error.value) == f"prompt file {str(path)!r} is empty; expected one JSON object a line: {ALL_FORMS}"


def test_files_that_cannot_be_read(write, tmp_path):
    with pytest.raises(UserError, match=r"prompt file '.*none.jsonl': no such file"):
        read_prompts(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"prompt file '.*' cannot be read \(Is a directory\)"):
        read_prompts(tmp_path)
    with pytest.raises(UserError, match=r"prompt file '.*', line 2: byte 0xff; expected UTF-8 text"):
        read_prompts(write(b'{"prompt": "a"}\n{"prompt": "\xff"}\n'))


def test_what_can_be_a_prompt():
    assert all(map(is_text, ("a", " a ", "\n日本語", "😀")))
    assert not any(map(is_text, ("", " \n", "\ud800", "a\udcff", None, 1, ["a"])))


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"prompt": "a", "id": "\ud83d"}, r'id "\\ud83d"'),
        ({"prompt": "a", "question_id": "x\udc00"}, "id"),
        ({"turns": ["a"], "category": "\udfff"}, "category"),
        ({"messages": [{"role": "system", "content": "\ud800"}, {"role": "user", "content": "a"}]}, "message"),
        ({"messages": [{"role": "\ude00", "content": "b"}, {"role": "user", "content": "a"}]}, "message"),
        ({"messages": [{"role": "tool", "content": "b", "calls": [{"\ud83d": 1}]}, {"role": "user", "content": "a"}]}, "message"),
    ],
)
def test_whatever_is_echoed_or_rendered_is_of_whole_characters(write, record, named):
    with pytest.raises(UserError, match=f"line 2: {named}.*holds half a character"):
        read_prompts(write([{"prompt": "first"}, record]))


def test_halves_that_make_a_whole_and_those_that_nobody_looks_at_do_no_harm(write):
    text = '{"prompt": "\\ud83d\\ude00", "id": "\\ud83d\\ude00", "note": "\\ud83d"}'
    assert read_prompts(write(text)) == [Conversation("😀", None, (), ("😀",), 1)]


def test_a_path_that_no_file_can_have_is_refused():
    for path in ("a\ud83d", "a\0b", "x" * 300, "~nosuchuser/x", "."):
        with pytest.raises(UserError):
            read_prompts(path)
