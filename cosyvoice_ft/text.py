"""Text: the tokenizer of the language model, and the way from written text to segments that are spoken one by one.

    written --normalize--> spoken form --split_text--> segments of about 60 to 80 units --Tokenizer.encode--> ids

A unit is a character of Chinese text and a token of any other; one CJK character makes a text Chinese. Text with a
<|marker|> is taken as it stands. Front ends: `wetext` (grammars for numbers, dates, money, then `plain`), `plain`
(clean-up rules only), `none`. Training and synthesis must use the same one.
"""

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Callable, Collection
from functools import lru_cache
from pathlib import Path

from cosyvoice_ft.files import BadInput, fingerprint

FRONTENDS = ("wetext", "plain", "none")
END_OF_TEXT = "<|endoftext|>"
END_OF_PROMPT = "<|endofprompt|>"
SPECIAL_TOKENS = (  # CosyVoice2's, in the order of their ids; after the vocabulary of Qwen2 the first is 151644
    *("<|im_start|>", "<|im_end|>", END_OF_PROMPT, "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]"),
    *("[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]"),
    *("[vocalized-noise]", "[lipsmack]", "[mn]"),
)
TOKENIZER_DIR = "CosyVoice-BlankEN"  # in the model directory
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")

CHINESE_MARKS = frozenset("。？！；：、.?!;")
ENGLISH_MARKS = frozenset(".?!;:")
COMMAS = frozenset("，,")


class Tokenizer:
    """Byte-level BPE of Qwen2 with CosyVoice2's special tokens, from `<model_dir>/CosyVoice-BlankEN` alone.

    endofprompt: id of <|endofprompt|>, 151646 with the released vocabulary.
    fingerprint: 16 hex digits; equal means that every text has the same ids.
    Raises BadInput for a file that is missing or unreadable.
    """

    def __init__(self, model_dir: str | Path) -> None:
        from transformers import AutoTokenizer

        folder = Path(model_dir) / TOKENIZER_DIR
        for path in (folder / name for name in TOKENIZER_FILES):
            if not path.is_file():
                raise BadInput(f"{path}: no such file; the pretrained directory is incomplete, fetch it (stage -1)")
        try:
            self._bpe = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # the class depends on the release, down to a bare Exception
            raise BadInput(f"{folder}: the tokenizer cannot be read ({error}); fetch it again (stage -1)") from error
        if len(self._bpe) < 256:
            raise BadInput(f"{folder}: {len(self._bpe)} tokens do not cover the 256 bytes; fetch it again (stage -1)")
        self._bpe.add_special_tokens({"eos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})
        self._bpe.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
        self.endofprompt: int = self._bpe.convert_tokens_to_ids(END_OF_PROMPT)
        parts = [*(fingerprint(folder / name) for name in TOKENIZER_FILES), *SPECIAL_TOKENS]
        self.fingerprint = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, nothing put before or after it."""
        return self._bpe.encode(text, add_special_tokens=False)


def segments(text: str, tokenizer: Tokenizer, frontend: str = "wetext") -> list[str]:
    """Return what is spoken one by one for `text`; [] where nothing can be spoken. Raises BadInput as `normalize`."""
    spoken = normalize(text, frontend)
    if frontend == "none" or has_marker(spoken):
        return [spoken] if spoken else []
    return split_text(spoken, lambda part: len(tokenizer.encode(part)))


def normalize(text: str, frontend: str = "wetext") -> str:
    """Write `text` as it is spoken. Raises BadInput for an unknown front end or one that is not installed."""
    if frontend not in FRONTENDS:
        raise BadInput(f"text front end '{frontend}' is unknown; choose one of {', '.join(FRONTENDS)}")
    if frontend == "none" or has_marker(text):
        return text
    text = text.strip()
    chinese = contains_chinese(text)
    if frontend == "wetext":
        text = apply_grammar(text, "zh" if chinese else "en")
    return clean_chinese(text) if chinese else spell_out_number(text)


def has_marker(text: str) -> bool:
    return "<|" in text and "|>" in text


def contains_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def apply_grammar(text: str, language: str) -> str:
    """Numbers, dates, money, units of `text` in words, by wetext's grammar of "zh" or "en"."""
    try:
        spoken = _grammar(language).normalize(text)
    except (AssertionError, IndexError):  # the English grammar has no reading of a digit beside an accented letter
        return text
    return re.sub(r'\\(["\\])', r"\1", spoken) if language == "en" else spoken  # English comes back with \" for "


def clean_chinese(text: str) -> str:
    text = replace_blank(text.replace("\n", ""))
    text = replace_corner_mark(text).replace(".", "。").replace(" - ", "，")
    return re.sub(r"[，,、]+\Z", "。", remove_bracket(text))


def replace_blank(text: str) -> str:
    """Delete blanks, except between two ASCII characters."""
    kept = []
    for before, char, after in zip(" " + text, text, text[1:] + " ", strict=False):
        if char != " " or (before.isascii() and after.isascii() and " " not in before + after):
            kept.append(char)  # the reference fails on a blank at the end; here the outside counts as a blank
    return "".join(kept)


def replace_corner_mark(text: str) -> str:
    return text.replace("²", "平方").replace("³", "立方")


def remove_bracket(text: str) -> str:
    return re.sub("[（）【】`]", "", text).replace("——", " ")


def spell_out_number(text: str) -> str:
    """Every run of digits as an English number; longer than any number has a name for (36 digits): digit by digit."""
    runs = [("".join(run), digits) for digits, run in itertools.groupby(text, str.isdigit)]
    return "".join(_inflect().number_to_words(run, group=len(run) > 36) if digits else run for run, digits in runs)


def split_text(
    text: str,
    length: Callable[[str], int],
    *,
    max_len: int = 80,
    min_len: int = 60,
    merge_len: int = 20,
    comma_split: bool = False,
) -> list[str]:
    """Split a normalised text at its sentence marks (and commas) into segments, without those of punctuation only.

    length: units of a text that is not Chinese; Chinese is measured in characters.
    A segment ends before it would exceed `max_len` units once it has more than `min_len`; a last one of fewer than
    `merge_len` joins the one before. A sentence is never broken, however long.
    """
    chinese = contains_chinese(text)
    marks = (CHINESE_MARKS if chinese else ENGLISH_MARKS) | (COMMAS if comma_split else frozenset())
    sentences = cut(text, marks, "。" if chinese else ".")
    merged = merge(sentences, len if chinese else length, max_len, min_len, merge_len)
    return [segment for segment in merged if not is_only_punctuation(segment)]


def cut(text: str, marks: Collection[str], closing: str) -> list[str]:
    """Cut after each mark and a quote right behind it; a run of marks keeps its first, `closing` ends an open text."""
    if text and text[-1] not in marks:
        text += closing
    pieces, start = [], 0
    for i, char in enumerate(text):
        if char in marks:
            if i > start:
                pieces.append(text[start : i + 1])
            start = i + 1
            if pieces and text[start : start + 1] in ('"', "”"):  # the reference fails on a quote with no piece before
                pieces[-1] += text[start]
                start += 1
    return pieces


def merge(pieces: list[str], length: Callable[[str], int], max_len: int, min_len: int, merge_len: int) -> list[str]:
    """Join neighbours greedily, by the rule of `split_text`."""
    merged, current = [], ""
    for piece in pieces:
        if length(current + piece) > max_len and length(current) > min_len:
            merged.append(current)
            current = ""
        current += piece
    if merged and length(current) < merge_len:
        merged[-1] += current
    elif current:
        merged.append(current)
    return merged


def is_only_punctuation(text: str) -> bool:
    return all(unicodedata.category(char)[0] in "PS" for char in text)


@lru_cache
def _grammar(language: str):  # 0.4 s for the package, 5 ms for a grammar
    try:
        from wetext import Normalizer
    except ImportError as error:
        raise BadInput("text front end 'wetext' is not installed: pip install wetext, or choose 'plain'") from error
    return Normalizer(lang=language, remove_erhua=False)


@lru_cache
def _inflect():  # half a second or more, so only where digits are left
    import inflect

    return inflect.engine()
