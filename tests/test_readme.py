"""README, help and behaviour agree: what the table of errors quotes is what the code says."""

import re


def test_quoted_errors_are_the_codes_own(root):
    table = (root / "README.md").read_text(encoding="utf-8").split("## When it stops")[1].split("\n## ")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    assert len(quoted) == 11
    paths = [*root.glob("*.sh"), *root.glob("tools/*"), *root.glob("local/*.py"), *root.glob("cosyvoice_ft/*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in paths if path.is_file())
    code = re.sub(r'"\n\s*f?"', "", code)  # a message that goes on in the next line
    for words in quoted:
        assert words in code, words


def test_quoted_files_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:tools|local|conf|cosyvoice_ft)/[a-z_0-9]+\.(?:py|sh|yaml|json)\b", text)):
        assert (root / name).exists(), name
