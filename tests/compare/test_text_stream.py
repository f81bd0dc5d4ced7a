"""Text of a stream appears in whole characters."""

import pytest
import tiny_stand_ins as tiny

from minilora_hub.compare.text_stream import TextStream


@pytest.mark.parametrize(
    "text", ["naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 and 🏳️‍🌈", "🇩🇪🇫🇷🇯🇵", "a\u0301e\u0301", "שלום عالم"]
)
def test_text_appears_in_whole_characters(text):
    """Byte by byte, and yet no torn character and no half flag is ever shown."""
    tokenizer = tiny.byte_tokenizer()
    stream, pieces = TextStream(tokenizer), []
    for token in tokenizer(text)["input_ids"]:
        pieces.append(stream.push(token))
        flags = sum(0x1F1E6 <= ord(c) < 0x1F200 for c in pieces[-1])
        assert "\ufffd" not in pieces[-1]
        assert flags % 2 == 0
    assert "".join(pieces) + stream.finish(complete=True) == text


def test_a_cut_character_is_dropped_and_a_written_one_kept():
    """Three bytes of an emoji: dropped if the answer was cut there, shown if the model ended it there."""
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("a😀")["input_ids"][:-1]
    for complete, rest in ((False, ""), (True, "\ufffd")):
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) == "a"
        assert stream.finish(complete) == rest


@pytest.mark.parametrize(
    ("text", "stop", "shown"), [("foo😀bar", "foo😀", ""), ("x a🇩🇪b", "a🇩🇪", "x "), ("x😀😀y", "😀😀", "x")]
)
def test_a_stop_text_that_ends_in_a_torn_character(text, stop, shown):
    """Its beginning is held back also while its last character is only half there."""
    tokenizer = tiny.byte_tokenizer()
    stream, pieces = TextStream(tokenizer, (stop,)), ""
    for token in tokenizer(text)["input_ids"]:
        pieces += stream.push(token)
        if stream.stopped:
            break
    assert stream.stopped
    assert pieces + stream.finish(complete=False) == shown
