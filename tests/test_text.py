"""Tokenizer, normalisation and splitting against the recorded text front end, and what that one gets wrong."""

import json
import socket
import sys
import unicodedata
from pathlib import Path

import pytest

from cosyvoice_ft import text
from cosyvoice_ft.files import BadInput

CASES = json.loads((Path(__file__).parent / "assets" / "text_frontend.json").read_text(encoding="utf-8"))["cases"]
QWEN2_SIZE = 151643


def byte_alphabet() -> list[str]:
    """The 256 letters of a byte-level BPE in the order of GPT-2: printable bytes, then the others as U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(byte) for byte in printable] + [chr(0x100 + i) for i in range(256 - len(printable))]


def make_model_dir(folder: Path, size: int, **settings) -> Path:
    """A model directory whose tokenizer has 256 bytes, fillers up to `size`, and no merges."""
    tokenizer = folder / text.TOKENIZER_DIR
    tokenizer.mkdir(parents=True)
    names = byte_alphabet() + [f"filler {i}" for i in range(256, size)]
    (tokenizer / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "Qwen2Tokenizer", **settings}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model_dir(tmp_path_factory.mktemp("small"), 256)


@pytest.fixture(scope="module")
def tokenizer(model_dir) -> text.Tokenizer:
    return text.Tokenizer(model_dir)


@pytest.fixture(scope="module")
def recorded_tokens(goldens) -> dict:
    return json.loads((goldens / "special_tokens.json").read_text(encoding="utf-8"))["cosyvoice2"]


# tokenizer


def test_special_tokens_have_the_recorded_names_in_the_recorded_order(recorded_tokens):
    assert list(text.SPECIAL_TOKENS) == [name for name, _ in recorded_tokens["tokens"]]


def test_ids_after_a_small_vocabulary_follow_it(tokenizer):
    special = (text.END_OF_TEXT, *text.SPECIAL_TOKENS)
    assert [tokenizer.encode(name) for name in special] == [[256 + i] for i in range(len(special))]
    assert tokenizer.endofprompt == 259
    a, b = tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode("a[breath]b<|endofprompt|>") == [*a, 260, *b, 259]


def test_encode_adds_nothing_and_loses_nothing(tokenizer):
    assert tokenizer.encode("") == []
    for written in ("hi", " hi ", "生日", "naïve 😀\n", "3.14%"):
        letters = [byte_alphabet()[i] for i in tokenizer.encode(written)]
        assert len(letters) == len(unicodedata.normalize("NFC", written).encode())


def test_the_tokenizer_needs_no_network(model_dir, monkeypatch):
    def refuse(*_):
        raise AssertionError("the tokenizer opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert text.Tokenizer(model_dir).encode("a")


def test_the_fingerprint_follows_the_files(tmp_path, tokenizer):
    other = make_model_dir(tmp_path / "other", 256)
    assert text.Tokenizer(other).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 16
    (other / text.TOKENIZER_DIR / "merges.txt").write_text("#version: 0.2\na b\n", encoding="utf-8")
    (other / text.TOKENIZER_DIR / "vocab.json").write_text(
        json.dumps({name: i for i, name in enumerate([*byte_alphabet(), "ab"])}), encoding="utf-8"
    )
    changed = text.Tokenizer(other)
    assert changed.fingerprint != tokenizer.fingerprint
    assert changed.encode("ab") == [256]


@pytest.mark.parametrize("name", text.TOKENIZER_FILES)
def test_a_missing_tokenizer_file_is_named(tmp_path, name):
    folder = make_model_dir(tmp_path, 256)
    (folder / text.TOKENIZER_DIR / name).unlink()
    with pytest.raises(BadInput, match=name):
        text.Tokenizer(folder)


@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_broken_vocabulary_is_bad_input(tmp_path, content):
    folder = make_model_dir(tmp_path, 256)
    (folder / text.TOKENIZER_DIR / "vocab.json").write_text(content, encoding="utf-8")
    with pytest.raises(BadInput, match=text.TOKENIZER_DIR):
        text.Tokenizer(folder)


# the recorded front end, step by step


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_every_rule_gives_the_recorded_text(case):
    def same(key: str, ours) -> None:
        assert ours == case[key], key

    rules = "contains_chinese", "replace_corner_mark", "remove_bracket", "spell_out_number", "is_only_punctuation"
    for rule in rules:
        same(rule, getattr(text, rule)(case["text"]))
    if case["replace_blank"].startswith("EXCEPTION"):
        assert text.replace_blank(case["text"]) == text.replace_blank(case["text"].rstrip())
    elif not case["text"].startswith(" "):  # there the reference takes the last character for the one before the first
        same("replace_blank", text.replace_blank(case["text"]))

    words, size = (lambda part: len(part.split())), (lambda part: len(part.encode()))
    lengths = {"zh": [("", len)], "en": [("_words", words), ("_bytes", size)]}
    language = "zh" if case["contains_chinese"] else "en"
    marks, closing = (text.CHINESE_MARKS, "。") if language == "zh" else (text.ENGLISH_MARKS, ".")
    spoken = text.normalize(case["text"], "plain")
    same(f"{language}_chain", spoken)
    for suffix, length in lengths[language]:
        same(f"{language}_split{suffix}", text.merge(text.cut(spoken, marks, closing), length, 80, 60, 20))
        same(f"{language}_final{suffix}", text.split_text(spoken, length))
    if language == "zh":
        options = {"max_len": 10, "min_len": 5, "merge_len": 3, "comma_split": True}
        same("zh_split_comma_10_5_3", text.split_text(spoken, len, **options))


# what the reference gets wrong


def test_blanks_at_the_ends_are_deleted():
    assert text.replace_blank(" 好 a b ") == "好a b"
    assert text.replace_blank(" ") == ""


def test_a_quote_after_a_mark_with_nothing_before_it_starts_the_next_piece():
    assert text.split_text('."Hello there', len) == ['"Hello there.']


def test_a_number_without_a_name_is_read_digit_by_digit():
    assert text.spell_out_number("7" * 37).split(", ") == ["seven"] * 37


def test_empty_text_has_no_segments(tokenizer):
    for frontend in text.FRONTENDS:
        assert text.normalize("", frontend) == ""
        assert text.segments("", tokenizer, frontend) == []
    assert text.segments(" \n ", tokenizer, "plain") == []


# front ends


def test_text_with_a_marker_or_without_front_end_stays_as_it_is(tokenizer):
    marked = " Speak 3 words.<|endofprompt|> 今天 3 点。 "
    for frontend in text.FRONTENDS:
        assert text.normalize(marked, frontend) == marked
        assert text.segments(marked, tokenizer, frontend) == [marked]
    assert text.segments(" 5 。 6 。", tokenizer, "none") == [" 5 。 6 。"]


def test_an_unknown_front_end_is_bad_input():
    with pytest.raises(BadInput, match="wetext, plain, none"):
        text.normalize("a", "ttsfrd")


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("2024年花了123元", "二零二四年花了一百二十三元"),
        ("增长了3.14%。", "增长了百分之三点一四。"),
        ("今天 10:30 见，", "今天十点三十分见。"),
        ("那儿有5只鸟", "那儿有五只鸟"),
        ("It's $3.50 on Jan. 5th, 2024.", "It's three point five dollars on the fifth of january, twenty twenty four."),
        ("Dr. Smith ran 10 km.", "doctor Smith ran ten kilometers."),
        ('He said "stop" at 10:30.', 'He said "stop" at ten thirty.'),
        ("a\\b", "a\\b"),
        ("no numbers", "no numbers"),
        ("naïve2 and 10²", "naïvetwo and ten"),  # wetext fails on both; what is left is spelled out
    ],
)
def test_wetext_speaks_numbers_and_keeps_quotes(written, spoken):
    pytest.importorskip("wetext")
    assert text.normalize(written) == spoken
    assert text.normalize(spoken) == spoken


def test_wetext_missing_is_bad_input(monkeypatch):
    text._grammar.cache_clear()
    monkeypatch.setitem(sys.modules, "wetext", None)
    with pytest.raises(BadInput, match="pip install wetext"):
        text.normalize("a 1")


def test_segments_measure_english_in_tokens_and_chinese_in_characters(tokenizer):
    english = "One two three four five six. " * 6  # 29 tokens of a byte each
    chinese = "一二三四五六七八九十，一二三四五六七八九十。" * 8  # 22 characters each
    assert [len(part) for part in text.segments(english, tokenizer, "plain")] == [86, 87]
    assert [len(part) for part in text.segments(chinese, tokenizer, "plain")] == [66, 66, 44]
    assert "".join(text.segments(chinese, tokenizer, "plain")) == chinese


def test_importing_is_light(run_tool):
    script = "import sys, cosyvoice_ft.text; print({'transformers', 'wetext', 'inflect'} & set(sys.modules))"
    assert run_tool("python", "-c", script).stdout.strip().endswith("set()")
