"""From clips, as a corpus lists them, to data directories: every clip is opened, then kept, or left out by name.

    clips --name_clips--> utt, spk --inspect, in parallel--> Sound | Rejection --> data/NAME/{train,dev} rejected.tsv

A rejected clip is *broken* or *unsuitable*. Broken ones say that something happened to the corpus (a copy that stopped,
a list that does not fit): more than corpus.max_broken of them stop the stage. Unsuitable ones cannot be trained on, as
a few of any corpus: they stop it when less than corpus.min_kept remains. The limits stand in the conf, under `corpus`.
"""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import audio
from cosyvoice_ft.files import BadInput, lock, whole
from cosyvoice_ft.jobs import for_each
from cosyvoice_ft.levels import level, silent_frames, trim
from cosyvoice_ft.table import write_data_dir

BROKEN = {  # the rule that is broken: what to do
    "missing": "the file does not exist: copy it, or take it out of the table",
    "undecodable": "copy the file again, or convert it",
    "truncated": "less sound than the header says: copy the file again",
    "rate": "at least 16000 Hz are needed: take the original recording, or leave it out",
    "duplicate id": "two recordings with one name: rename one",
    "same audio": "the same samples as another one: remove one, or --corpus.same_audio keep",
}
UNSUITABLE = {
    "no text": "write what is said",
    "placeholder": "write what is said in its place",
    "short": "shorter than {min_seconds:g} s",
    "long": "longer than {max_seconds:g} s: cut it at a pause, and its text there too",
    "silent": "no sample above {min_peak:g}: record it again",
    "silence": "more than {max_silence:.0%} of it is silence: --corpus.trim 0.2 cuts that off at both ends",
    "clipped": "more than {max_clipped:.1%} of the samples lie at the peak: record it again, less loud",
    "speech rate": "outside {letters_per_second[0]:g} to {letters_per_second[1]:g} letters or {chinese_per_second[0]:g}"
    " to {chinese_per_second[1]:g} Chinese characters a second: the text is not what is said, or much is silence",
}
LONGEST = 30.0  # seconds: what the speech tokenizer takes
HELD_OUT = {"dev", "valid", "validation", "val", "test", "eval"}  # as a word in the name of a folder or of a table
NO_SPEAKER = re.compile(r"(wav|flac|mp3|ogg|audio|clip|recording|sound|voice)s?\d*|train([-_. ].*)?", re.IGNORECASE)
PLACEHOLDER = re.compile(r"\{[^{}]*\}|<\w+=[^<>]*>|%[sd]\b|</?s>|<unk>")
CHINESE = re.compile("[々〇\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
SHOWN = 10  # speakers named in the summary


@dataclass
class Clip:
    """One recording as the corpus lists it; `name_clips` finds the utt and the spk that the corpus does not give."""

    wav: Path
    text: str
    utt: str = ""
    spk: str = ""
    dev: bool = False  # held out
    instruct: str = ""
    prompt: Path | None = None  # a recording that stands for the speaker


@dataclass(frozen=True)
class Sound:
    """What was measured of a recording."""

    seconds: float
    peak: float  # largest magnitude
    silence: float  # share of the frames that are silent
    clipped: float  # share of the samples within 0.1 % of the peak
    digest: bytes  # of the samples


@dataclass(frozen=True)
class Rejection:
    """Why a clip is left out: `reason` is a key of BROKEN or UNSUITABLE, `value` what was found."""

    utt: str
    reason: str
    value: str
    wav: Path

    @property
    def kind(self) -> str:
        return "broken" if self.reason in BROKEN else "unsuitable"


def prepare(clips: Sequence[Clip], out: Path, settings: Mapping) -> str:
    """Check `clips`, split them, write out/train, out/dev and out/rejected.tsv; return the summary, some lines.

    settings: the whole conf. With corpus.trim or corpus.level the waves are written as well, to out/wav.
    Raises BadInput for an empty corpus, for too many rejections, and when another run is at work in `out`.
    """
    own = checked_settings(settings["corpus"], out)
    if not clips:
        raise BadInput(f"{own['dir']}: no recordings with texts found; look at corpus.dir and corpus.format")
    with lock(out):
        clear(out)
        try:
            name_clips(clips, own, settings["name"])
            prompts = prompts_of(clips)
            sounds, rejected = check(clips, own, out, settings["nj"])
            write_rejected(out / "rejected.tsv", rejected)
            stop_if_too_many(rejected, len(clips), own, out)
            parts = split(rows_of(clips, sounds, own, out), own, settings["seed"])
            write(out, parts, prompts)
        finally:
            clear(out)
    return "\n".join(summary(sounds, parts, rejected, own, out))


def checked_settings(own: Mapping, out: Path) -> Mapping:
    """Return the `corpus` section of the conf. Raises BadInput for values that make no sense."""
    source, target = Path(own["dir"]).resolve(), out.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise BadInput(f"corpus.dir: {own['dir']} and {out}, where stage 0 writes, lie in one another; give other ones")
    for key in own:
        if key.startswith(("min_", "max_", "quiet_")) and own[key] is None:
            raise BadInput(f"corpus.{key} is empty; it is a number")
    for key, sign, example in (("trim", 1, "the seconds of silence to leave: 0.2"), ("level", -1, "in dBFS: -23")):
        value = own[key]
        if value is not None and (isinstance(value, bool | str | list) or value * sign < 0):
            raise BadInput(f"corpus.{key} is {value!r}; it is {example}, or nothing")
    for key in ("letters_per_second", "chinese_per_second"):
        if not own[key] or len(own[key]) != 2 or not all(isinstance(value, int | float) for value in own[key]):
            raise BadInput(f"corpus.{key} is {own[key]}; it is the slowest and the fastest, as in [2.0, 25.0]")
    if own["max_seconds"] > LONGEST:
        raise BadInput(f"corpus.max_seconds is {own['max_seconds']:g}; the speech tokenizer takes {LONGEST:g} at most")
    if own["same_audio"] not in ("reject", "keep"):
        raise BadInput(f"corpus.same_audio: '{own['same_audio']}' is unknown; one of: reject keep")
    return own


# ---- names


def name_clips(clips: Sequence[Clip], own: Mapping, name: str) -> None:
    """Complete the clips in place: spk, utt, whether they are held out, texts on one line.

    The speaker is corpus.speaker, else what the corpus says, else the folder, else `name`. The utterance id is the
    corpus' own, else the file's name, or its path where names repeat. With several speakers every id begins with its
    speaker, so that one order sorts both, as Kaldi wants it.
    """
    folder = Path(own["dir"])
    paths = path_ids([clip.wav for clip in clips if not clip.utt])
    for clip in clips:
        inside = clip.wav.relative_to(folder).parts[:-1] if clip.wav.is_relative_to(folder) else ()
        clip.dev = clip.dev or any(map(held_out, inside))
        clip.spk = as_id(own["speaker"] or clip.spk or speaker_folder(inside, clip.wav.stem) or name)
        clip.utt = as_id(clip.utt or paths[clip.wav])
        clip.text, clip.instruct = one_line(clip.text), one_line(clip.instruct)
    if all(clip.dev for clip in clips):
        for clip in clips:
            clip.dev = False
    if len({clip.spk for clip in clips}) > 1:
        put_speakers_first(clips)


def path_ids(wavs: Sequence[Path]) -> dict[Path, str]:
    """Return {file: its name without suffix}, or its path below the folder that all share where names repeat."""
    if len({wav.stem for wav in wavs}) == len(set(wavs)):
        return {wav: wav.stem for wav in wavs}
    shared = os.path.commonpath([wav.parent.absolute() for wav in wavs])
    return {wav: "-".join(wav.absolute().relative_to(shared).with_suffix("").parts) for wav in wavs}


def speaker_folder(folders: Sequence[str], stem: str) -> str:
    """Return the folder that names the speaker: SPK of SPK/x.wav, SPK/wavs/x.wav, SPK/CHAPTER/SPK_CHAPTER_x.wav.

    folders: those between the corpus and the file. "" when there is none.
    """
    if len(folders) > 1 and stem.startswith(tuple(mark.join((*folders[-2:], "")) for mark in "_-")):  # LibriTTS
        return folders[-2]
    return next((name for name in reversed(folders) if not NO_SPEAKER.fullmatch(name) and not held_out(name)), "")


def put_speakers_first(clips: Sequence[Clip]) -> None:
    """Make ids SPK-ID where they do not begin with SPK, or all of them where that does not put them in order."""
    ids = [clip.utt for clip in clips]
    for kept in (lambda utt, spk: utt.startswith(spk), lambda utt, spk: False):
        for clip, utt in zip(clips, ids, strict=True):
            clip.utt = utt if kept(utt, clip.spk) else f"{clip.spk}-{utt}"
        if (clash := out_of_order(clips)) is None:
            return
    raise BadInput(f"speakers '{clash[0]}' and '{clash[1]}' do not sort as their utterances do; rename one of them")


def out_of_order(clips: Sequence[Clip]) -> tuple[str, str] | None:
    """Return two speakers whose utterances sort otherwise than they do, in C locale; None when all is in order."""
    spks = [spk for _, spk in sorted((clip.utt.encode(), clip.spk.encode()) for clip in clips)]
    return next(((b.decode(), a.decode()) for a, b in zip(spks, spks[1:], strict=False) if a > b), None)


def held_out(name: str) -> bool:
    """Tell by a word in its name whether a folder or a table is held out: dev, test-clean, corpus_val_list."""
    return not HELD_OUT.isdisjoint(re.split(r"[-_. ]", name))


def as_id(text: str) -> str:
    """Return `text` as an id: without blanks and slashes."""
    return re.sub(r"[/\\]", "-", "_".join(text.split()))


def one_line(text: str) -> str:
    """Return `text` with every run of blanks, line breaks and control characters as one blank."""
    return re.sub(r"[\s\x00-\x1f\x7f-\x9f]+", " ", text).strip()


# ---- rules


def check(clips: Sequence[Clip], own: Mapping, out: Path, nj: int | None) -> tuple[dict[str, Sound], list[Rejection]]:
    """Return ({utt: Sound} of the clips to keep, the others), both in the order of `clips`."""
    unique: dict[str, Clip] = {}
    kept, rejected, first_with = {}, [], {}
    for clip in clips:
        if unique.setdefault(clip.utt, clip) is not clip:
            rejected.append(Rejection(clip.utt, "duplicate id", f"also {unique[clip.utt].wav}", clip.wav))
    results, failed = for_each(partial(inspect, own=own, out=out), unique, what="checking", nj=nj)
    for reason in failed.values():  # not of the recording: a wave could not be written
        raise BadInput(reason)
    for utt, result in results.items():
        if isinstance(result, Rejection):
            rejected.append(result)
        elif own["same_audio"] == "reject" and (other := first_with.setdefault(result.digest, utt)) != utt:
            rejected.append(Rejection(utt, "same audio", f"that of {other}", unique[utt].wav))
            wave_of(out, utt, done=False).unlink(missing_ok=True)
        else:
            kept[utt] = result
    return kept, rejected


def inspect(clip: Clip, own: Mapping, out: Path) -> Sound | Rejection:
    """Open one clip, measure it and apply the rules; write its wave when it is to be trimmed or levelled."""
    try:
        seconds, samples = audio.duration(clip.wav)
        if seconds > 4 * own["max_seconds"]:  # an hour would fill the memory
            return Rejection(clip.utt, "long", f"{seconds:.0f} s", clip.wav)
        wav, rate = audio.load_wav(clip.wav).numpy(), round(samples / seconds)
    except audio.BadSound as error:
        return Rejection(clip.utt, error.rule, error.value, clip.wav)
    digest, clipped = blake2b(wav.tobytes(), digest_size=16).digest(), share_at_peak(wav)
    if own["trim"] is not None:
        wav = trim(wav, rate, own["trim"])
    sound = Sound(len(wav) / rate, float(np.abs(wav).max()), float(silent_frames(wav, rate).mean()), clipped, digest)
    for reason, value in unsuitable(clip, sound, own):
        return Rejection(clip.utt, reason, value, clip.wav)
    if own["level"] is not None:
        wav = level(wav, rate, own["level"])
    if writes_waves(own):
        audio.save_wav(wave_of(out, clip.utt, done=False), torch.from_numpy(wav), rate)
    return sound


def unsuitable(clip: Clip, sound: Sound, own: Mapping) -> Iterator[tuple[str, str]]:
    """Yield (rule, what was found) of every rule of UNSUITABLE that a clip breaks."""
    fastest, slowest, counted = speech_seconds(clip.text, own)
    if not any(map(str.isalnum, clip.text)):
        yield "no text", clip.text or "empty"
    if found := PLACEHOLDER.search(clip.text):
        yield "placeholder", found[0]
    if sound.seconds < own["min_seconds"]:
        yield "short", f"{sound.seconds:.2f} s"
    if sound.seconds > own["max_seconds"]:
        yield "long", f"{sound.seconds:.1f} s"
    if sound.peak < own["min_peak"]:
        yield "silent", f"peak {sound.peak:.4f}"
    if sound.silence > own["max_silence"]:
        yield "silence", f"{sound.silence:.0%}"
    if sound.clipped > own["max_clipped"]:
        yield "clipped", f"{sound.clipped:.2%}"
    if not fastest <= sound.seconds <= slowest:
        yield "speech rate", f"{counted} in {sound.seconds:.1f} s"


def speech_seconds(text: str, own: Mapping) -> tuple[float, float, str]:
    """Return the seconds that `text` takes at the least and at the most, and what was counted in it.

    Kana and hangul count as Chinese characters. A digit is one letter of a fast speaker, four of a slow one.
    """
    spoken = "".join(filter(str.isalnum, text))
    chinese, digits = len(CHINESE.findall(spoken)), sum(map(str.isdigit, spoken))
    letters = len(spoken) - chinese - digits
    (slow, fast), (slow_chinese, fast_chinese) = own["letters_per_second"], own["chinese_per_second"]
    counts = {"Chinese characters": chinese, "letters": letters, "digits": digits}
    return (
        chinese / fast_chinese + (letters + digits) / fast,
        chinese / slow_chinese + (letters + 4 * digits) / slow,
        ", ".join(f"{count} {what}" for what, count in counts.items() if count),
    )


def share_at_peak(wav: np.ndarray) -> float:
    """Return the share of samples within 0.1 % of the peak.

    Of 742 natural recordings none has more than 0.00009; driven 6 dB over full scale, 96 % of them exceed 0.001.
    """
    size = np.abs(wav)
    return float((size >= 0.999 * size.max()).mean())


def writes_waves(own: Mapping) -> bool:
    return own["trim"] is not None or own["level"] is not None


def wave_of(out: Path, utt: str, done: bool = True) -> Path:
    """Return where the wave of an utterance lies, or will lie when all of them are done."""
    return out / ("wav" if done else ".wav.part") / f"{utt}.wav"


# ---- results


def stop_if_too_many(rejected: Sequence[Rejection], total: int, own: Mapping, out: Path) -> None:
    """Raise BadInput when more than max_broken are broken, or when less than min_kept or fewer than two remain."""
    broken, kept = [r for r in rejected if r.kind == "broken"], total - len(rejected)
    if len(broken) > own["max_broken"] * total:
        problem = f"{len(broken)} of {total} recordings are broken, more than {own['max_broken']:.0%}"
    elif kept < own["min_kept"] * total:
        problem = f"only {kept} of {total} recordings can be trained on, less than {own['min_kept']:.0%}"
    elif kept < 2:
        problem = f"only {kept} of {total} recordings can be trained on, fewer than 2"
    else:
        return
    reasons, cure = "", "record more"
    if first := next(iter(broken or rejected), None):
        reasons = f" ({counted(broken or rejected)}); the first: {first.wav}: {first.reason}, {first.value}"
        cure = f"{out / 'rejected.tsv'} lists them: mend or remove them and run stage 0 again"
    raise BadInput(f"{own['dir']}: {problem}{reasons}; {cure}")


def counted(rejected: Sequence[Rejection]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(r.reason for r in rejected).most_common())


def write_rejected(path: Path, rejected: Sequence[Rejection]) -> None:
    with whole(path) as part:
        lines = (f"{r.utt}\t{r.kind}\t{r.reason}\t{r.value}\t{r.wav}\n" for r in rejected)
        part.write_text("utt\tkind\treason\tvalue\twav\n" + "".join(lines), encoding="utf-8")


def rows_of(clips: Sequence[Clip], sounds: Mapping[str, Sound], own: Mapping, out: Path) -> list[dict]:
    """Return the rows of the data directories: one of every clip that is kept."""
    rows, left = [], dict(sounds)
    for clip in clips:
        if sound := left.pop(clip.utt, None):  # the first with an id has it
            wav = wave_of(out, clip.utt) if writes_waves(own) else clip.wav
            rows.append(vars(clip) | {"wav": wav, "seconds": sound.seconds})
    return rows


def prompts_of(clips: Sequence[Clip]) -> dict[str, Path]:
    """Return {spk: the first prompt that the corpus gives for it}. Raises BadSound for one that cannot be used."""
    prompts: dict[str, Path] = {}
    for clip in clips:
        if clip.prompt and prompts.setdefault(clip.spk, clip.prompt) is clip.prompt:
            audio.duration(clip.prompt)
    return prompts


def split(rows: Sequence[Mapping], own: Mapping, seed: int) -> dict[str, list[Mapping]]:
    """Return {"train": rows, "dev": rows}: what the corpus holds out, else a share drawn with `seed`.

    Raises BadInput when one of the two would be empty.
    """
    dev = {row["utt"] for row in rows if row["dev"]}
    if not dev:
        utts = sorted(row["utt"] for row in rows)
        count = min(own["dev_max"], max(1, round(len(utts) * own["dev_share"])))
        dev = set(np.random.default_rng(seed).permutation(utts)[:count].tolist())
    parts = {"train": [r for r in rows if r["utt"] not in dev], "dev": [r for r in rows if r["utt"] in dev]}
    for name, members in parts.items():
        if not members:
            raise BadInput(f"{own['dir']}: no utterance left for {name}; give more recordings, or another dev_share")
    return parts


def write(out: Path, parts: Mapping[str, Sequence[Mapping]], prompts: Mapping[str, Path]) -> None:
    """Put everything in its place, train/wav.scp last: where that is, all is."""
    try:
        for name in parts:
            (out / name / "wav.scp").unlink(missing_ok=True)
        shutil.rmtree(out / "wav", ignore_errors=True)
        if (out / ".wav.part").is_dir():
            (out / ".wav.part").rename(out / "wav")
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); free space or fix permissions") from error
    for name in ("dev", "train"):
        write_data_dir(out / name, parts[name], prompts)


def clear(out: Path) -> None:
    """Remove what a killed run left unfinished."""
    shutil.rmtree(out / ".wav.part", ignore_errors=True)
    for folder in (out, out / "train", out / "dev"):
        for name in ("rejected.tsv", "wav.scp", "text", "utt2spk", "spk2utt", "utt2dur", "instruct", "spk2prompt"):
            for path in folder.glob(f".{name}.*.part"):
                path.unlink(missing_ok=True)


def summary(
    sounds: Mapping[str, Sound], parts: Mapping[str, Sequence], rejected: Sequence[Rejection], own: Mapping, out: Path
) -> list[str]:
    """Return the lines that say what was left out and why, what is kept of each speaker, and what that is good for."""
    rules, reasons = BROKEN | UNSUITABLE, Counter(r.reason for r in rejected)
    lines = [f"  left out {reasons[rule]} ({rule}): {rules[rule].format(**own)}" for rule in rules if reasons[rule]]
    if rejected:
        lines.append(f"  {out / 'rejected.tsv'} lists them")
    quiet = sum(sound.peak < own["quiet_peak"] for sound in sounds.values())
    if quiet and own["level"] is None:
        limit = f"no sample above {own['quiet_peak']:g}"
        lines.append(f"  kept {quiet} (quiet): {limit}; --corpus.level -23 makes them louder")
    minutes = Counter()
    for row in (row for members in parts.values() for row in members):
        minutes[row["spk"]] += row["seconds"] / 60
    for use, spks in groupby(minutes.most_common(), key=lambda item: advice(item[1])):
        named = [f"{spk} {amount:.1f} min" for spk, amount in spks]
        more = [f"and {len(named) - SHOWN} more speakers"] if len(named) > SHOWN else []
        lines.append(f"  {', '.join(named[:SHOWN] + more)}: {use}")
    seconds = {name: sum(row["seconds"] for row in rows) for name, rows in parts.items()}
    sizes = ", ".join(f"{name} {len(rows)} ({seconds[name] / 60:.1f} min)" for name, rows in parts.items())
    return [*lines, f"wrote {out}: {len(sounds)} of {len(sounds) + len(rejected)} utterances, {sizes}"]


def advice(minutes: float) -> str:
    """Return what so much speech of one speaker is good for."""
    if minutes < 10:
        return "below 10 min, good for the timbre only, expect artefacts"
    if minutes < 60:
        return "good to start with; the usual advice is an hour"
    return "an hour or more, the usual advice"
