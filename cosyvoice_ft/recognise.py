"""What a recogniser hears, and how far that is from what should be said.

    wav --recogniser--> heard \\
                               normalise --> words, characters --jiwer--> Heard: edits, words missing or repeated
                     text     /

English is compared as Whisper's authors do (Radford et al., 2022, appendix C): lower case, numbers as digits, one
spelling. Chinese, Japanese and Korean are compared by characters: numbers in words where the text is Chinese, marks and
blanks gone; a "word" is such a character, or a run of letters in between. Other languages: lower case, marks gone.
"""

import re
import shlex
import subprocess
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError

import torch

from cosyvoice_ft import audio
from cosyvoice_ft.corpus import CHINESE
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.jobs import beside, for_each
from cosyvoice_ft.metrics import QUIET
from cosyvoice_ft.table import read_table, write_table
from cosyvoice_ft.text import SPECIAL_TOKENS, apply_grammar

MARKER = re.compile("|".join([r"<\|[^<>|]*\|>", *map(re.escape, SPECIAL_TOKENS)]))
SCRIPTS = (("ja", "[\u3040-\u30ff]"), ("ko", "[\uac00-\ud7af]"), ("zh", CHINESE.pattern), ("en", "[A-Za-z]"))
BY_CHARACTER = ("zh", "ja", "ko")
SIMPLIFIED = "以下是普通话的句子。"  # put before what Whisper writes: it then prefers simplified characters
MAX_HMMS = 5000  # a frame; speech rarely keeps so many alive, noise does and then takes three times as long
MISSING_RUN = 3  # words: fewer in a row that were not heard are a slip of the recogniser


# ---- recognisers: {utt: (sound file, language)} -> ({utt: heard}, {utt: why it cannot be read})

Sentences = Mapping[str, tuple[str, str]]
Answers = tuple[dict[str, str], dict[str, str]]


class Nobody:
    """No recogniser, and the reason."""

    name = None

    def __init__(self, why: str) -> None:
        self.why = why

    def refuses(self, language: str) -> str:
        """Return why sentences of a language are not listened to, "" when they are."""
        return self.why


class PocketSphinx:
    """CMU Sphinx's small English recogniser, one process a core; the same text for the same wave, in any order."""

    name = "pocketsphinx"

    def __init__(self, nj: int | None = None) -> None:
        """nj: processes, by default one a core. Raises BadInput when it is not installed."""
        if not find_spec("pocketsphinx"):
            raise BadInput("score.recogniser: pocketsphinx is not installed: pip install pocketsphinx")
        self.nj = nj

    def refuses(self, language: str) -> str:
        return "" if language == "en" else f"{self.name} does not know the language '{language}'"

    def __call__(self, sentences: Sentences) -> Answers:
        with beside(hear) as call:

            def heard(sentence: tuple[str, str]) -> str:
                text, error = call(sentence[0])
                if error:
                    raise BadInput(error)
                return text

            return for_each(heard, sentences, what="recognising", nj=self.nj)


def hear(path: str) -> tuple[str, str]:
    """Return (what PocketSphinx hears, "") of a sound file, or ("", why it cannot be read); nothing in silence."""
    torch.set_num_threads(1)
    try:
        wav = audio.load_wav(path, audio.ANALYSIS_RATE)
    except BadInput as error:
        return "", str(error)
    if float(wav.abs().max()) < QUIET:
        return "", ""
    decoder = _decoder()
    decoder.reinit()  # it tracks noise and level, and would remember those of the recording before: 0.2 s
    decoder.start_utt()
    decoder.process_raw((wav * 32767).round().short().numpy().tobytes(), full_utt=True)
    decoder.end_utt()
    found = decoder.hyp()
    return found.hypstr if found else "", ""


@lru_cache
def _decoder():
    from pocketsphinx import Decoder

    return Decoder(samprate=audio.ANALYSIS_RATE, maxhmmpf=MAX_HMMS, loglevel="FATAL")


class Whisper:
    """OpenAI's Whisper, greedy. `weights`: a local .pt, or the name of a model, which is then fetched once."""

    def __init__(self, weights: str, device: torch.device) -> None:
        """Raises BadInput for weights that are unknown or cannot be loaded."""
        import whisper

        if weights not in whisper.available_models() and not Path(weights).is_file():
            names = ", ".join(whisper.available_models())
            raise BadInput(f"score.whisper: '{weights}' is no file and no model's name; names: {names}")
        try:
            self.model = whisper.load_model(weights, device)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, UnpicklingError) as error:
            raise BadInput(f"score.whisper: '{weights}' cannot be loaded ({error}); give a local .pt") from error
        self.name = f"whisper {Path(weights).stem}"
        self.options = {"fp16": device.type == "cuda", "temperature": 0.0, "condition_on_previous_text": False}

    def refuses(self, language: str) -> str:
        from whisper.tokenizer import LANGUAGES

        english_only = not self.model.is_multilingual and language != "en"
        unknown = language not in LANGUAGES and language != "unknown"  # which it finds out itself
        return f"{self.name} does not know the language '{language}'" if english_only or unknown else ""

    def __call__(self, sentences: Sentences) -> Answers:
        return for_each(self.heard, sentences, what="recognising", nj=1)

    def heard(self, sentence: tuple[str, str]) -> str:
        """sentence: (sound file, language). Raises BadInput for a file that cannot be read."""
        wav, language = audio.load_wav(sentence[0], audio.ANALYSIS_RATE).numpy(), sentence[1]
        known = {"language": None if language == "unknown" else language}
        prompt = {"initial_prompt": SIMPLIFIED if language == "zh" else None}
        return self.model.transcribe(wav, **known, **prompt, **self.options)["text"].strip()


class Command:
    """Any program: it gets the path of a wav.scp and that of the text file to write, both Kaldi tables."""

    def __init__(self, command: str) -> None:
        """Raises BadInput for a command that names no program."""
        self.name, self.command = f"command:{command}", command
        if not command.strip():
            raise BadInput("score.recogniser: 'command:' names no program; as in 'command:bash recognise.sh'")

    def refuses(self, language: str) -> str:
        return ""

    def __call__(self, sentences: Sentences) -> Answers:
        """Raises BadInput when the program fails or leaves out an utterance."""
        with tempfile.TemporaryDirectory() as folder:
            scp, text = Path(folder, "wav.scp"), Path(folder, "text")
            write_table(scp, {utt: Path(wav).absolute() for utt, (wav, _) in sentences.items()})
            line = f"{self.command} {shlex.quote(str(scp))} {shlex.quote(str(text))}"
            done = subprocess.run(line, shell=True, text=True, capture_output=True)
            if done.returncode or not text.is_file():
                said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
                raise BadInput(f"score.recogniser: '{line}' ended with {done.returncode}: {said}")
            heard = read_table(text)
        if absent := [utt for utt in sentences if utt not in heard]:
            raise BadInput(
                f"score.recogniser: '{self.command}' wrote no line for {len(absent)} utterances, the first: "
                f"{absent[0]}; where nothing is heard, write the utterance alone"
            )
        return {utt: heard[utt] for utt in sentences}, {}


def recogniser(own: Mapping, device: torch.device, nj: int | None = None) -> PocketSphinx | Whisper | Command | Nobody:
    """Return the recogniser of the `score` section of the conf; with `auto` it may be that there is none.

    Raises BadInput for an unknown one, and for one that is asked for and cannot be used.
    """
    kind, _, command = own["recogniser"].partition(":")
    if kind not in ("auto", "pocketsphinx", "whisper", "command", "none"):
        known = "auto pocketsphinx whisper none command:PROGRAM"
        raise BadInput(f"score.recogniser: '{own['recogniser']}' is unknown; one of: {known}")
    if kind == "none":
        return Nobody("score.recogniser is none")
    if not find_spec("jiwer"):
        return Nobody("jiwer is not installed: pip install jiwer")
    if kind == "command":
        return Command(command)
    if kind == "whisper" and not own["whisper"]:
        raise BadInput("score.recogniser is whisper, but score.whisper names no weights: a local .pt, or such as base")
    if kind == "whisper" or (kind == "auto" and own["whisper"]):
        return Whisper(own["whisper"], device)
    if kind == "auto" and not find_spec("pocketsphinx"):
        return Nobody("no recogniser is installed: pip install pocketsphinx, or set score.whisper")
    return PocketSphinx(nj)


# ---- text


def language_of(text: str) -> str:
    """Tell the language by the script: zh, ja, ko, en for any text in plain Latin letters, else "unknown"."""
    text = MARKER.sub(" ", text)
    foreign = sum(char.isalpha() and not char.isascii() for char in text)
    found = next((name for name, script in SCRIPTS if re.search(script, text)), "unknown")
    return "unknown" if found == "en" and foreign > 0.05 * sum(map(str.isalpha, text)) else found


def normalise(text: str, language: str) -> list[str]:
    """Return the words that are compared, as said above."""
    text = unicodedata.normalize("NFKC", MARKER.sub(" ", text))
    if language == "en":
        return _english()(re.sub(r"[()\[\]<>{}]", " ", text)).split()  # it would drop what brackets hold
    if language == "zh" and find_spec("wetext"):
        text = apply_grammar(text, "zh")
    text = "".join(char if unicodedata.category(char)[0] in "LMN" else " " for char in text.lower())
    return CHINESE.sub(lambda char: f" {char[0]} ", text).split() if language in BY_CHARACTER else text.split()


@lru_cache
def _english():
    from whisper.normalizers import EnglishTextNormalizer

    return EnglishTextNormalizer()


@dataclass(frozen=True)
class Heard:
    """Edits that turn the reference into what was heard, and the lengths of the reference."""

    char_errors: int
    chars: int
    word_errors: int
    words: int
    missing: int  # words of the reference in gaps of 3 or more, or all of a shorter one
    repeated: int  # words heard again that the text says once


def compare(reference: list[str], heard: list[str], language: str) -> Heard:
    """Compare two lists of words from `normalise`; the reference has one at least."""
    import jiwer

    join = ("" if language in BY_CHARACTER else " ").join
    chars = jiwer.process_characters(join(reference), join(heard))
    words = jiwer.process_words(" ".join(reference), " ".join(heard))
    gaps = [chunk.ref_end_idx - chunk.ref_start_idx for chunk in words.alignments[0] if chunk.type == "delete"]
    return Heard(
        char_errors=chars.substitutions + chars.deletions + chars.insertions,
        chars=len(join(reference)),
        word_errors=words.substitutions + words.deletions + words.insertions,
        words=len(reference),
        missing=sum(gap for gap in gaps if gap >= min(MISSING_RUN, len(reference))),
        repeated=repeated(reference, heard),
    )


def repeated(reference: list[str], heard: list[str]) -> int:
    """Return how many words were heard again: pairs of neighbours more often than in the text, or a word twice running.

    A recogniser's slip rarely hits on a pair that it wrote before; a model that says something again does.
    """
    said, again = Counter(pairwise(reference)), Counter(pairwise(heard))
    allowed = {pair: max(said[pair], int(pair[0] != pair[1])) for pair in again}
    return sum(max(0, count - allowed[pair]) for pair, count in again.items())
