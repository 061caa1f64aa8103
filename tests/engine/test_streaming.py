"""Text as it streams: the same as decoding all tokens at once, never half a character, and nothing from a stop string on."""

import random

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from eesd_jax.engine.streaming import TextStream

END = "<|end|>"
REPLACEMENT = "\ufffd"
# One to four bytes a character, a flag of two code points, a family joined by U+200D, a combining accent.
TEXTS = ("plain", "naïve café", "日本語のテキスト", "a😀b", "🇳🇱🇫🇷", "👩‍👩‍👧", "e\u0301", "tab\tline\n\nend", "€\u2028£ 1½")
MERGES = (
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("Ċ", "Ċ"),
    ("Ġ", "a"),
    ("ð", "Ł"),
    ("ðŁ", "ĺ"),
    ("Ġ", "ð"),
    ("ĺ", "Ģ"),
    ("a", "b"),
    ("b", "c"),
)


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE: 256 bytes, merges that cut through characters, and one special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in MERGES)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END)


def sentencepiece() -> PreTrainedTokenizerFast:
    """SentencePiece's way: a token a word, every other character as bytes, and a space before the first word that decoding strips."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁a", "the", "b", "c", "."]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    core.add_special_tokens([AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token=END)


BYTES, PIECES = byte_level(), sentencepiece()


def ids_of(text: str | bytes) -> list[int]:
    """One token a byte."""
    # GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes for what follows U+0100, in order.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    data = text.encode() if isinstance(text, str) else text
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return BYTES.convert_tokens_to_ids([names[byte] for byte in data])


def whole(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    return tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=True)


def stream(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...] = (), step: int = 1) -> tuple[list[str], TextStream]:
    """Pushes `step` tokens at a time and closes; returns every piece, the one of `close` last."""
    text = TextStream(tokenizer, stop)
    pieces = [text.push(ids[at : at + step]) for at in range(0, len(ids), step)]
    return [*pieces, text.close()], text


def cut(text: str, stop: tuple[str, ...]) -> str | None:
    """The text before the stop string that ends first (of several that end there, the longest), or None where there is none."""
    for end in range(1, len(text) + 1):
        if found := [string for string in stop if text.endswith(string, 0, end)]:
            return text[: end - max(map(len, found))]
    return None


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices([*TEXTS, " ", "a", "b", "ab", "\n", "hell", END], k=rng.randint(1, 6))) for _ in range(count)]


def random_stops(text: str, rng: random.Random) -> tuple[str, ...]:
    """Up to three stop strings, most of them cut out of the text, some with an end that is not there."""
    starts = [rng.randrange(len(text)) for _ in range(rng.randint(1, 3))]
    return tuple(text[start : start + rng.randint(1, 5)] + rng.choice(["", "", "", "x"]) for start in starts)


@pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte_level", "sentencepiece"])
def test_pieces_of_any_text_are_the_whole_text_and_no_piece_has_half_a_character(tokenizer):
    for text in random_texts(200, seed=1):
        ids = ids_of(text) if tokenizer is BYTES else PIECES(text).input_ids
        for step in (1, 2, 3, 100):
            pieces, result = stream(tokenizer, ids, step=step)
            assert "".join(pieces) == result.text == whole(tokenizer, ids)
            assert REPLACEMENT not in result.text
            assert (result.num_tokens, result.stopped) == (len(ids), False)


def test_every_character_is_shown_with_the_token_that_completes_it():
    for text in TEXTS:
        pieces, _ = stream(BYTES, ids_of(text))
        expected = [char for c in text for char in [""] * (len(c.encode()) - 1) + [c]]
        assert pieces == [*expected, ""]


@pytest.mark.parametrize("text", TEXTS)
def test_characters_split_over_tokens_at_every_place(text):
    data = text.encode()
    # A token that ends in the middle of a character comes from merging its bytes with what is before them.
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            result = TextStream(BYTES)
            pieces = [result.push(ids_of(part)) for part in (data[:first], data[first:second], data[second:])]
            assert "".join([*pieces, result.close()]) == text
            assert REPLACEMENT not in "".join(pieces)
            # Nothing that is complete is kept back.
            assert pieces[0] == data[:first].decode(errors="ignore")
            assert pieces[0] + pieces[1] == data[:second].decode(errors="ignore")


def test_tokens_that_cut_through_characters():
    for text in ("hell😀 a\n\n😀", " 😁 😀", "ab😀bc"):
        ids = BYTES(text).input_ids
        assert any(REPLACEMENT in whole(BYTES, [token]) for token in ids)
        pieces, result = stream(BYTES, ids)
        assert result.text == "".join(pieces) == text
        for shown in range(len(pieces)):
            assert "".join(pieces[:shown]) == whole(BYTES, ids[:shown]).rstrip(REPLACEMENT)


def test_incomplete_character_at_the_end_comes_out_of_close_alone():
    for size in (1, 2, 3):
        *pieces, last = stream(BYTES, ids_of(b"ab" + "😀".encode()[:size]))[0]
        assert "".join(pieces) == "ab"
        assert last == REPLACEMENT


def test_bytes_that_are_no_text_decode_as_they_do_at_once():
    rng = random.Random(2)
    for _ in range(300):
        ids = rng.choices(range(len(BYTES)), k=rng.randint(1, 30))
        for step in (1, 4):
            pieces, result = stream(BYTES, ids, step=step)
            assert "".join(pieces) == result.text == whole(BYTES, ids)


def test_a_stray_byte_does_not_take_back_what_was_shown():
    byte = [PIECES.convert_tokens_to_ids(f"<0x{value:02X}>") for value in range(256)]
    euro, the = [byte[value] for value in "€".encode()], PIECES.convert_tokens_to_ids("▁the")
    stray = [*euro, byte[0xFF], the]
    assert whole(PIECES, stray) == REPLACEMENT * 4 + " the"  # decoded at once, it spoils the bytes before it
    pieces, result = stream(PIECES, stray)
    assert "".join(pieces) == result.text == f"€{REPLACEMENT} the"
    # Whatever comes: no error, and pieces that add up.
    rng = random.Random(3)
    for _ in range(300):
        ids = rng.choices([*euro, byte[0xFF], byte[0xC3], byte[0x41], the, PIECES.convert_tokens_to_ids("b"), PIECES.eos_token_id], k=12)
        pieces, result = stream(PIECES, ids)
        assert "".join(pieces) == result.text
        assert result.text.count(" the") == ids.count(the) - (whole(PIECES, ids).startswith("the"))


def test_space_before_the_first_word_is_stripped_once():
    token = PIECES.convert_tokens_to_ids
    for words in (
        ["▁the", "▁a"],
        ["▁", "▁the"],
        ["▁", "▁", "b", "▁", "▁"],
        [END, "▁the", END, "▁the", "▁"],
        ["▁the", "<0xC3>", "<0xA9>", "▁a"],
    ):
        ids = [token(word) for word in words]
        pieces, result = stream(PIECES, ids)
        assert "".join(pieces) == result.text == whole(PIECES, ids)


def test_special_tokens_and_ids_outside_the_vocabulary_leave_no_text():
    ids = [BYTES.eos_token_id, *ids_of("a"), BYTES.eos_token_id, *ids_of("é")[:1], BYTES.eos_token_id, *ids_of("é")[1:], len(BYTES) + 7]
    pieces, result = stream(BYTES, ids)
    assert "".join(pieces) == result.text == "aé"
    assert result.num_tokens == len(ids)


def test_stop_string_at_every_position_cuts_it_and_all_behind_it():
    for text in ("one two three", "日本語 😀 x"):
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                stop = text[start:end]
                expected = text[: text.index(stop)]
                pieces, result = stream(BYTES, ids_of(text + " tail"), (stop,))
                assert "".join(pieces) == result.text == expected
                assert result.stopped
                # All tokens up to the last byte of the stop string, and none behind it.
                assert result.num_tokens == len((expected + stop).encode())


def test_text_that_begins_a_stop_string_is_held_back_until_decided():
    pieces, result = stream(BYTES, ids_of("a\nb\n\nc"), ("\n\n",))
    assert pieces == ["a", "", "\nb", "", "", "", ""]
    assert (result.text, result.num_tokens, result.stopped) == ("a\nb", 5, True)
    # A stop string that begins again within itself.
    assert stream(BYTES, ids_of("aabaabaac"), ("aabaac",))[1].text == "aab"
    # Held back to the end, and then shown.
    pieces, result = stream(BYTES, ids_of("ab\n"), ("\n\n", "b\n!"))
    assert pieces == ["a", "", "", "b\n"]
    assert not result.stopped


def test_stop_string_at_the_very_end():
    for tail in ([], [BYTES.eos_token_id]):
        pieces, result = stream(BYTES, ids_of("text END") + tail, ("END",))
        assert "".join(pieces) == result.text == "text "
        assert (result.stopped, result.num_tokens) == (True, 8)
    # Only the end of the text shows that the bytes will not become a character.
    pieces, result = stream(BYTES, ids_of(b"a\xff"), (REPLACEMENT,))
    assert (pieces, result.stopped, result.num_tokens) == (["a", "", ""], True, 2)


def test_of_several_stop_strings_the_one_complete_first_wins():
    for stop in (("bc", "abcd"), ("abcd", "bc")):
        assert stream(BYTES, ids_of("xabcdx"), stop)[1].text == "xa"
        assert stream(BYTES, ids_of("xabcdx"), stop, step=100)[1].text == "xa"  # however the text is cut into tokens
    # At the same place, the longest.
    for stop in (("c", "bc", "abc"), ("abc", "c")):
        assert stream(BYTES, ids_of("xabcx"), stop)[1].text == "x"
    assert stream(BYTES, ids_of("xabcx"), ("", "zz", "b"))[1].text == "xa"


def test_stop_strings_of_any_kind_in_any_text():
    rng = random.Random(4)
    for text in random_texts(400, seed=5):
        text = text.replace(END, "") or "a"
        stop = random_stops(text, rng)
        for ids in (ids_of(text), BYTES(text).input_ids):
            expected = cut(text, stop)
            for step in (1, 3):
                pieces, result = stream(BYTES, ids, stop, step)
                assert "".join(pieces) == result.text == (text if expected is None else expected)
                assert result.stopped == (expected is not None)
                needed = (k for k in range(len(ids) + 1) if cut(whole(BYTES, ids[:k]).rstrip(REPLACEMENT), stop) is not None)
                assert result.num_tokens == next(needed, len(ids))
                # No piece shows a part of what was to be cut off, not even for a while.
                assert all(result.text.startswith("".join(pieces[:shown])) for shown in range(len(pieces)))


def test_after_a_stop_nothing_more_is_taken():
    result = TextStream(BYTES, ("stop",))
    assert result.push(ids_of("a stop b")) == "a "
    assert result.push(ids_of("more")) == ""
    assert result.close() == ""
    assert (result.text, result.num_tokens) == ("a ", 6)


def test_a_stop_string_that_is_a_special_token_ends_the_text_there():
    for ids in ([*ids_of("ab"), BYTES.eos_token_id, *ids_of("cd")], ids_of(f"ab{END}cd")):  # as a token, and letter by letter
        pieces, result = stream(BYTES, ids, (END,))
        assert ("".join(pieces), result.text, result.stopped) == ("ab", "ab", True)
        assert result.num_tokens == len(ids) - 2


def test_stop_strings_of_special_tokens_and_text_together():
    end = BYTES.eos_token_id
    for stop, expected in ((f"\n{END}", "ab"), (f"{END}\nuser", "ab\n"), (f"b\n{END}\n", "a"), (f"{END}{END}", None), (f"x{END}", None)):
        pieces, result = stream(BYTES, [*ids_of("ab\n"), end, *ids_of("\nuser"), end, *ids_of("c")], (stop,))
        assert result.text == "".join(pieces) == ("ab\n\nuserc" if expected is None else expected)
        assert result.stopped == (expected is not None)
        assert all(result.text.startswith("".join(pieces[:shown])) for shown in range(len(pieces)))


def test_names_of_hidden_tokens_do_not_change_what_other_stop_strings_find():
    end = BYTES.eos_token_id
    ids = [*ids_of("a"), end, *ids_of("b <|en"), end, *ids_of("c")]
    for stop, text in ((("ab",), ""), (("<|",), "ab "), (("end",), "ab <|enc"), (("|>",), "ab <|enc"), (("<|enc",), "ab ")):
        assert stream(BYTES, ids, stop)[1].text == text
    # Of both kinds, the one complete first.
    for stop, text in (((END, "b"), "a"), ((f"b <|en{END}", "en"), "ab <|"), ((f"b <|en{END}", "enc"), "a")):
        assert stream(BYTES, ids, stop)[1].text == text


def test_a_token_that_ends_a_text_is_not_shown_whatever_it_is():
    a = ids_of("a")[0]
    for end in (a, BYTES.eos_token_id, *ids_of("\n")):
        ids = [*ids_of("bc"), end]
        result = TextStream(BYTES, (), (end,))
        assert "".join([*(result.push([token]) for token in ids), result.close()]) == "bc"
        assert result.num_tokens == 3
    # Its name is a stop string like any other.
    result = TextStream(BYTES, ("ca",), (a,))
    assert (result.push([*ids_of("bc"), a]), result.stopped, result.num_tokens) == ("b", True, 3)
    # Ids that no tokenizer has leave no text.
    result = TextStream(BYTES, (), (-1, len(BYTES) + 9, 2**40))
    assert result.push([*ids_of("b"), len(BYTES) + 9]) + result.close() == "b"


def test_special_tokens_as_stop_strings_in_any_text():
    rng = random.Random(6)
    for text in random_texts(300, seed=7):
        # With a whole special token in each: without one they are of the shown text, which has none.
        parts = [part for piece in text.split(END) for part in (*piece, END)]
        at = [i for i, part in enumerate(parts) if part == END]
        stop = tuple("".join(parts[max(0, i - rng.randint(0, 3)) : i + rng.randint(1, 4)]) for i in rng.choices(at, k=2))
        ids = BYTES(text).input_ids
        expected = cut(text, stop)
        for step in (1, 3):
            pieces, result = stream(BYTES, ids, stop, step)
            assert result.stopped == (expected is not None)
            assert "".join(pieces) == result.text == (text if expected is None else expected).replace(END, "")
