"""Its tokenizer, against an independent reading of the vocabulary and merges in the GGUF file."""

import itertools
from pathlib import Path

import pytest
import regex
from transformers import AutoTokenizer

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "In 2024, 12345 apples cost 3.14 each; room 007  has  8 beds",
    "a  2",
    "    42",
    "1. first\n\n2. second\n\n\n3. third",
    "def f(x):\n    if x == 10:\n        return x ** 2\n\n\tprint('done')  # 99%\r\n",
    "don't I'll we've THEY'RE it's",
    "naïve café, Привет мир, 你好世界, שלום",
    "emoji 😀👩‍👩‍👧 and 🇫🇷!",
    "½ ² Ⅷ ٣ ५ numbers that are no ASCII digits",
    "   leading and trailing   \n ",
    "<|im_start|>user\nhi 5<|im_end|>\n<|endoftext|>",
    "",
]


@pytest.fixture(scope="session")
def reference_bpe(gguf_file: Path):
    """Return byte-level BPE in plain Python, from the GGUF's vocabulary and merges, as llama.cpp describes it."""
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    merges = reader.get_field("tokenizer.ggml.merges").contents()
    assert reader.get_field("tokenizer.ggml.pre").contents() == "smollm"
    ids = {token: index for index, token in enumerate(tokens)}
    rank = {tuple(merge.split(" ")): index for index, merge in enumerate(merges)}
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + index) for index, byte in enumerate(b for b in range(256) if b not in spelling)}
    words = regex.compile(r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def bpe(word: str) -> list[int]:
        parts = [spelling[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            merged, index = [], 0
            while index < len(parts):
                if tuple(parts[index : index + 2]) == best:
                    merged.append("".join(best))
                    index += 2
                else:
                    merged.append(parts[index])
                    index += 1
            parts = merged
        return [ids[part] for part in parts]

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for piece in regex.split("(" + "|".join(map(regex.escape, special)) + ")", text):
            if piece in special:
                found.append(ids[piece])
                continue
            for run in regex.findall(r"\p{N}|\P{N}+", piece):
                for word in words.findall(run):
                    found += bpe(word)
        return found

    return encode


class TestTokenizer:
    @pytest.mark.slow
    @pytest.mark.parametrize("text", TEXTS)
    def test_equals_an_independent_reading_of_the_merges(self, text, tokenizer, reference_bpe):
        assert tokenizer.encode(text) == reference_bpe(text)

    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, text, tokenizer):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_white_space_before_a_number_stays_together(self, tokenizer):
        # transformers' own GGUF reader gives ["a", "Ġ", "Ġ", "2"] here: it leaves the pre-tokenizer "smollm" out
        assert tokenizer.tokenize("a  2\n\n34") == ["a", "ĠĠ", "2", "ĊĊ", "3", "4"]

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.bos_token, tokenizer.bos_token_id) == ("<|im_start|>", 1)
        assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
        assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<|im_end|>", 2)
        assert (tokenizer.unk_token, tokenizer.unk_token_id) == ("<|endoftext|>", 0)
        assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|><empty_output>") == [0, 1, 2, 16]
        assert tokenizer.decode([1, 28120, 2], skip_special_tokens=True) == tokenizer.decode([28120])
        assert len(tokenizer) == tokenizer.vocab_size == 49152
        assert tokenizer.model_max_length == 8192

    def test_chat_template(self, tokenizer, model):
        rendered = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=False)
        assert rendered == (
            SYSTEM + "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = tokenizer.encode(rendered)
        assert (ids.count(1), ids.count(2)) == (3, 2)
        assert tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"] == ids
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id
        assert model.generation_config.pad_token_id == tokenizer.pad_token_id

    def test_saved_again_it_stays_the_same(self, tokenizer, tmp_path):
        tokenizer.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        assert [again.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
        assert again.chat_template == tokenizer.chat_template
