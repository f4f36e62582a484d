"""Scores of spoken sentences: one row a sentence.

    data directory --read_sentences--> sentences --measure--> facts of the wave, speaker vectors --+
                                          |--------listen---> what was heard, errors --------------+--> rows
    natural recordings --> Reference: voice and pace of each speaker ------------------------------+

A sentence is held against its text; against the mean voice and the pace of its speaker's natural recordings, itself
left out where it is one of them; and, in copy-synthesis only, frame by frame against the recording that it copies.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import audio, device, metrics, text
from cosyvoice_ft.corpus import CHINESE
from cosyvoice_ft.extractors import SpeakerEncoder, load_for_extraction
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.jobs import for_each, settle
from cosyvoice_ft.recognise import MARKER, Heard, compare, language_of, normalise, recogniser
from cosyvoice_ft.table import read_table
from cosyvoice_ft.voices import MeanVoices, Resemblyzer

COLUMNS = ("utt", "spk", "language", "seconds", "cer", "wer", "similarity", "similarity_resemblyzer", "nearest",
           "duration", "ended", "pitch", "pitch_spread", "voiced", "level", "clipped", "silence", "longest_silence",
           "clicks", "missing", "repeated", "char_errors", "chars", "word_errors", "words", "mel_distance",
           "voicing_error", "gross_pitch_error", "pitch_error", "pesq", "stoi", "text", "heard")  # fmt: skip
NEED_TEXT = ("cer", "wer", "missing", "repeated")  # the measures that need a recogniser
LETTERS = 3.3  # letters spoken in the time of a Chinese character: 14.4 a second (LJSpeech), 4.4 (AISHELL)
ALIGNED = 0.1  # s by which a copy may be longer or shorter: the last token is whole, the last frame is not
LEAST = 0.2  # s of speech from which a pace is taken


# ---- sentences


@dataclass(frozen=True)
class Sentence:
    """What should be said, and where it is; wav "": it was to be spoken and nothing came."""

    utt: str
    spk: str
    text: str
    wav: str
    ended: bool | None = None  # None: nobody knows
    copied: bool = False  # spoken from the natural tokens of this utterance


def read_sentences(folder: Path) -> tuple[list[Sentence], dict]:
    """Return the sentences of a data directory, and the totals of its synth.json, {} where it has none.

    Raises BadInput for tables that are missing or name other utterances, and when there is no sentence.
    """
    wavs, texts, spks = (read_table(folder / name) for name in ("wav.scp", "text", "utt2spk"))
    for name, table in (("text", texts), ("utt2spk", spks)):
        if absent := wavs.keys() - table.keys():
            check = f"python tools/validate_data_dir.py {folder}"
            raise BadInput(f"{folder}: '{min(absent)}' is in wav.scp and not in {name}; {check}")
    if not wavs:
        raise BadInput(f"{folder}: no sentences to score")
    spoken = {"total": {}, "sentences": []}
    if (folder / "synth.json").is_file():
        try:
            spoken = json.loads((folder / "synth.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInput(f"{folder / 'synth.json'}: not valid json ({error}); run stage 7 again") from error
    facts = {fact["utt"]: fact for fact in spoken["sentences"]}
    copied = {utt for utt, fact in facts.items() if fact["mode"] == "tokens"}
    ended = {utt: fact["ended"] for utt, fact in facts.items() if utt not in copied}
    sentences = [Sentence(utt, spks[utt], texts[utt], wav, ended.get(utt), utt in copied) for utt, wav in wavs.items()]
    some_spk = next(iter(spks.values()))  # that of a sentence of which nothing came is in no table
    sentences += [Sentence(utt, some_spk, facts[utt]["text"], "", False) for utt in sorted(facts.keys() - wavs.keys())]
    return sentences, spoken["total"]


def natural_sentences(folders: Iterable[Path], spoken: Sequence[Sentence], most: int) -> list[Sentence]:
    """Return natural recordings: those of the utterances in `spoken`, and others, evenly, up to `most` a speaker.

    Raises BadInput when two of the directories have different recordings of one name.
    """
    found: dict[str, Sentence] = {}
    for folder in folders:
        for sentence in read_sentences(folder)[0]:
            if found.setdefault(sentence.utt, sentence).wav != sentence.wav:
                raise BadInput(f"{folder}: '{sentence.utt}' is another recording in a directory before; rename one")
    wanted, chosen = {sentence.utt for sentence in spoken}, []
    for spk in sorted({sentence.spk for sentence in found.values()}):
        own = [sentence for sentence in found.values() if sentence.spk == spk]
        asked, others = ([s for s in own if (s.utt in wanted) == first] for first in (True, False))
        room = min(len(others), max(0, most - len(asked)))
        chosen += asked + [others[k * len(others) // room] for k in range(room)]
    return chosen


def originals(sentences: Sequence[Sentence], natural: Iterable[Sentence], asked: bool) -> tuple[dict[str, str], str]:
    """Return ({utt: natural recording}, "") of copy-synthesis, ({}, why frames cannot be compared) of anything else.

    asked: the user says that it is copy-synthesis. Raises BadInput when it is not.
    """
    recorded = {sentence.utt: sentence.wav for sentence in natural}
    wavs = {sentence.utt: sentence.wav for sentence in sentences if sentence.wav}
    why = ""
    if not recorded:
        why = "no natural recordings are given (--natural)"
    elif not asked and not all(sentence.copied for sentence in sentences):
        why = "spoken from text, with a timing of its own; copy-synthesis is not (synthesize.py --tokens)"
    elif absent := sorted(wavs.keys() - recorded.keys()):
        why = f"'{absent[0]}' has no natural recording of the same name"
    else:
        lengths = ((utt, audio.duration(wav)[0], audio.duration(recorded[utt])[0]) for utt, wav in wavs.items())
        for utt, ours, theirs in lengths:
            if abs(ours - theirs) > ALIGNED:
                why = f"'{utt}' lasts {ours:.2f} s, its natural recording {theirs:.2f} s: they are not aligned"
                break
    if why and asked:
        raise BadInput(f"--copy: {why}")
    return ({} if why else {utt: recorded[utt] for utt in wavs}), why


def letters(words: str, frontend: str) -> float:
    """Return the length of a text when it is spoken, in letters, at least 1; see LETTERS for Chinese."""
    spoken = "".join(filter(str.isalnum, text.normalize(MARKER.sub(" ", words), frontend)))
    return max(1.0, len(spoken) + (LETTERS - 1) * len(CHINESE.findall(spoken)))


# ---- rows


class Reference:
    """What natural recordings say of their speakers: the mean voice by each encoder, the pace."""

    def __init__(self, natural: Sequence[Sentence], measured: Mapping[str, Mapping], frontend: str) -> None:
        """measured: facts of the recordings by `Scorer.measure`. frontend: how numbers are read."""
        self.frontend = frontend
        self.wavs = {sentence.utt: sentence.wav for sentence in natural if sentence.utt in measured}
        utt2spk = {sentence.utt: sentence.spk for sentence in natural}
        vectors: dict[str, dict[str, np.ndarray]] = {}
        for utt, facts in measured.items():
            for name, vector in facts["vectors"].items():
                vectors.setdefault(name, {})[utt] = vector
        self.voices = {name: MeanVoices(of_utts, utt2spk) for name, of_utts in vectors.items()}
        spoken, seconds = Counter(), Counter()
        for sentence in natural:
            active = measured[sentence.utt]["active"] if sentence.utt in measured else 0.0
            if active >= LEAST:
                spoken[sentence.spk] += letters(sentence.text, frontend)
                seconds[sentence.spk] += active
        self.paces = {spk: spoken[spk] / seconds[spk] for spk in spoken}  # letters a second
        self.speakers = sorted(set(utt2spk.values()))

    def compare(self, sentence: Sentence, facts: Mapping) -> dict:
        """Return duration, similarity of each encoder and nearest, those that there are, of a measured sentence.

        nearest is what the last encoder says: the independent one where it is installed.
        """
        found = {}
        itself = sentence.utt if self.wavs.get(sentence.utt) == sentence.wav else None
        if sentence.spk in self.paces:
            found["duration"] = facts["active"] * self.paces[sentence.spk] / letters(sentence.text, self.frontend)
        for name, vector in facts["vectors"].items():
            near = self.voices[name].similarities(vector, itself) if name in self.voices else {}
            if sentence.spk in near:
                found[name] = near[sentence.spk]
            if len(self.speakers) > 1 and near:
                found["nearest"] = max(sorted(near), key=near.get)
                found["own_nearest"] = int(found["nearest"] == sentence.spk)
        return found


class Scorer:
    """Encoders, recogniser, and the natural recordings that sentences are held against.

    missing: {name of a measure: why it is not scored}; grows as languages are met that the recogniser does not know.
    """

    def __init__(self, settings: Mapping, where: torch.device, natural: Sequence[Sentence] = ()) -> None:
        """Raises BadInput for an unusable setting, and when natural recordings cannot be read."""
        self.own, self.nj = settings["score"], settings["nj"]
        self.missing: dict[str, str] = {}
        self.recogniser = recogniser(self.own, where, self.nj)
        campplus = Path(settings["pretrained_dir"]) / "campplus.onnx"
        makers = {"similarity": partial(SpeakerEncoder, campplus, device.onnx_providers(where)),
                  "similarity_resemblyzer": Resemblyzer}  # fmt: skip
        self.encoders = {}
        for name, make in makers.items():
            try:
                self.encoders[name] = make()
            except BadInput as error:
                self.missing[name] = str(error)
        self.natural_facts = self.measure(natural, {}, "natural")
        self.reference = Reference(natural, self.natural_facts, settings["text"]["frontend"])
        if not natural:
            self.missing |= dict.fromkeys(
                (*makers, "duration", "nearest"), "no natural recordings are given (--natural)"
            )
        elif len(self.reference.speakers) == 1:
            self.missing["nearest"] = "one speaker is known; give --natural again, with recordings of others"

    def measure(self, sentences: Iterable[Sentence], copied: Mapping[str, str], what: str) -> dict[str, dict]:
        """Return {utt: facts} of the sentences that have a wave; copied: {utt: natural recording of the same timing}.

        Raises BadInput when more than 5 % cannot be read.
        """
        if copied:
            absent = metrics.INTRUSIVE.keys() - metrics.intrusive().keys()
            packages = {name: metrics.INTRUSIVE[name] for name in sorted(absent)}
            self.missing |= {name: f"not installed: pip install {package}" for name, package in packages.items()}
        wavs = {s.utt: (s.wav, copied.get(s.utt)) for s in sentences if s.wav}
        measured, failed = for_each(self.measure_one, wavs, what=f"measuring {what}", nj=self.nj)
        if failed:
            settle(failed, len(wavs), "score.tsv")
        return measured

    def measure_one(self, item: tuple[str, str | None]) -> dict:
        """item: (sound file, natural recording of the same timing). Raises BadInput for a file that cannot be read."""
        path, original = item
        seconds, samples = audio.duration(path)
        wav24, wav16 = load_for_extraction(path)
        facts = {"seconds": seconds, "vectors": {}}
        facts |= metrics.health(audio.load_wav(path), round(samples / seconds))
        facts |= metrics.pitch_facts(metrics.pitch(wav16))
        if facts["active"]:  # silence has no voice
            facts["vectors"] = {name: encoder(wav16) for name, encoder in self.encoders.items()}
        if original:
            natural24, natural16 = load_for_extraction(original)
            facts |= metrics.copy_facts(wav16, natural16) | {"mel_distance": metrics.mel_distance(wav24, natural24)}
        return facts

    def rows(self, sentences: Sequence[Sentence], measured: Mapping[str, Mapping]) -> list[dict]:
        """Return one row a sentence, with those of COLUMNS that could be measured."""
        sentences = [sentence for sentence in sentences if sentence.utt in measured or not sentence.wav]
        strangers = sorted({sentence.spk for sentence in sentences} - set(self.reference.speakers))
        if strangers and self.reference.speakers:
            why = f"--natural has no recordings of speaker '{strangers[0]}'"
            self.missing |= dict.fromkeys((*self.encoders, "duration"), why)
        heard = self.listen(sentences)
        return [self.row(sentence, measured.get(sentence.utt), heard.get(sentence.utt)) for sentence in sentences]

    def row(self, sentence: Sentence, facts: Mapping | None, heard: tuple[str, Heard] | None) -> dict:
        row = {"utt": sentence.utt, "spk": sentence.spk, "text": sentence.text, "language": self.language(sentence)}
        if sentence.ended is not None:
            row["ended"] = int(sentence.ended)
        if facts:
            row |= {key: value for key, value in facts.items() if key != "vectors"}
            row |= self.reference.compare(sentence, facts)
        if heard:
            row["heard"], counts = heard
            row |= asdict(counts) | {"cer": counts.char_errors / counts.chars, "wer": counts.word_errors / counts.words}
        return row

    def language(self, sentence: Sentence) -> str:
        return language_of(sentence.text) if self.own["language"] == "auto" else self.own["language"]

    def listen(self, sentences: Sequence[Sentence]) -> dict[str, tuple[str, Heard]]:
        """Return {utt: (heard, errors)}; a sentence of which nothing came was heard as nothing."""
        references, refused = {}, Counter()
        for sentence in sentences:
            language = self.language(sentence)
            if why := self.recogniser.refuses(language):
                refused[why] += 1
            elif words := normalise(sentence.text, language):
                references[sentence.utt] = (words, language)
        for why, count in refused.items():
            some = f" ({count} of {len(sentences)} sentences)" if count < len(sentences) else ""
            self.missing |= dict.fromkeys(NEED_TEXT, why + some)
        asked = {s.utt: (s.wav, references[s.utt][1]) for s in sentences if s.utt in references and s.wav}
        texts, failed = self.recogniser(asked) if asked else ({}, {})
        if failed:
            settle(failed, len(asked), "score.tsv")
        found = {}
        for utt, (words, language) in references.items():
            if utt not in failed:
                said = texts.get(utt, "")
                found[utt] = said, compare(words, normalise(said, language), language)
        return found
