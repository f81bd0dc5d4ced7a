"""Turn tokens into text, one at a time, without showing incomplete characters.

A token may end inside a UTF-8 sequence; decoders turn the incomplete bytes into U+FFFD, one for the sequence or one per
byte. Such a tail is held back until the rest arrives, and so are the first half of a flag (two characters in one glyph)
and the possible beginning of a stop text.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

TORN = "\ufffd"
MAX_TORN = 3  # a UTF-8 sequence has at most four bytes, so at most three can wait for their rest
FLAG_HALVES = "".join(map(chr, range(0x1F1E6, 0x1F200)))


class TextStream:
    """Turns one row's growing list of token ids into pieces of text to append.

    Args:
        tokenizer: shared, and not changed.
        stop: texts that end the answer; nothing from the first of them on is shown.

    Attributes:
        stopped: whether a stop text has occurred.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...] = ()) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        self._shown = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token and return the text that no later token can change, which may be empty."""
        self._ids.append(token_id)
        text = self._decode()
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._show(text, min(found))
        certain = text[: len(text) - _uncertain_tail(text)]  # a stop text may go on in what is still torn
        return self._show(text, len(certain) - self._begun_stop(certain))

    def finish(self, complete: bool) -> str:
        """Return what was held back.

        Args:
            complete: whether the model ended its answer, so that an incomplete tail is part of it. Otherwise the
                answer may have been cut off inside a character, and the incomplete bytes are dropped.
        """
        if self.stopped:
            return ""
        text = self._decode()
        return self._show(text, len(text) if complete else len(text) - _torn_tail(text))

    def _decode(self) -> str:
        # The whole answer each time: a window over the last tokens would be wrong for tokenizers that treat the first
        # token, or a run of byte tokens, differently. 500 tokens decode in well under a millisecond.
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _begun_stop(self, text: str) -> int:
        """Count the characters at the end of `text` with which a stop text may have begun."""
        longest = 0
        for stop in self._stop:
            starts = (n for n in range(min(len(stop) - 1, len(text)), longest, -1) if text.endswith(stop[:n]))
            longest = max(longest, next(starts, 0))
        return longest

    def _show(self, text: str, end: int) -> str:
        piece = text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece


def _torn_tail(text: str) -> int:
    """Count the characters at the end of `text` that may be incomplete bytes."""
    return min(len(text) - len(text.rstrip(TORN)), MAX_TORN)


def _uncertain_tail(text: str) -> int:
    """Count the characters at the end of `text` that the next token may still change."""
    torn = _torn_tail(text)
    whole = text[: len(text) - torn]
    flags = len(whole) - len(whole.rstrip(FLAG_HALVES))
    return torn + flags % 2
