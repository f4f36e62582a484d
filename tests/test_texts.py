"""What is to be spoken: text files and tts_text.json; every mistake is named with its line."""

import pytest

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.texts import Line, read_texts

EXAMPLE = """\
{
  "派蒙": {
    "sft_inference": ["前面的区域，以后再来探索吧！"],
    "zero-shot": "你好。",
    "cross-lingual": ["Hello.", "Good night."],
    "instruction-zero-shot": {"instruction": "用四川话说", "text": "今天天气真好。"}
  },
  "slt": ["Plain."]
}
"""


def test_json_by_speaker_and_mode(tmp_path):
    (tmp_path / "tts_text.json").write_text(EXAMPLE, encoding="utf-8")
    assert read_texts(tmp_path / "tts_text.json") == [
        Line("派蒙", "sft", "前面的区域，以后再来探索吧！"),
        Line("派蒙", "zero_shot", "你好。"),
        Line("派蒙", "cross_lingual", "Hello."),
        Line("派蒙", "cross_lingual", "Good night."),
        Line("派蒙", "instruct", "今天天气真好。", "用四川话说"),
        Line("slt", "sft", "Plain."),
    ]
    wheres = [line.where.removeprefix(f"{tmp_path}/") for line in read_texts(tmp_path / "tts_text.json")]
    assert wheres == [f"tts_text.json:{number}" for number in (3, 4, 5, 5, 6, 8)]


def test_text_file_with_bom_and_empty_lines(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeff 一。\r\n\r\ntwo \n".encode())
    assert read_texts(tmp_path / "t.txt", "zero_shot") == [
        Line(None, "zero_shot", "一。"),
        Line(None, "zero_shot", "two"),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{\n"a": ["b",\n]}', ":3: not valid json.*one too many"),
        ('{\n"a": {\n"sing": ["b"]}}', ":3: 'a': mode 'sing' is unknown; one of: sft"),
        ('{\n"a": {"sft": [""]}}', ":2: 'a', 'sft': '' is not a sentence"),
        ('{"a": {"sft": [3]}}', ":1: .*3 is not a sentence"),
        ('{"a": {"instruction": ["b"]}}', "every entry is .*instruction.*text"),
        ('{\n"a": ["b"],\n"a": ["c"]}', ":2: 'a' is there twice"),
        ('{"x": {"sft": ["a"]},\n"a": {\n"sft": [" "]}}', ":3: 'a', 'sft': ' ' is not a sentence"),
        ('{\n"a": {"instruct": [{"instruction": "b", "text": 3}]}}', ":2: 'a', 'instruct': every entry is"),
        ('{\n"a": 3}', ":2: 'a', 'sft': 3 is not a sentence"),
        ('["b"]', ":1: a tts_text.json is an object"),
        ("{}", "no sentences"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, content, says):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(BadInput, match=says):
        read_texts(tmp_path / "t.json")


def test_other_encodings_and_missing_files(tmp_path):
    (tmp_path / "t.txt").write_bytes("你好".encode("gb18030"))
    with pytest.raises(BadInput, match="t.txt: not UTF-8"):
        read_texts(tmp_path / "t.txt")
    with pytest.raises(BadInput, match="none.txt: cannot be read"):
        read_texts(tmp_path / "none.txt")
