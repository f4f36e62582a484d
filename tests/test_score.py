"""tools/score.py and what it is made of: made cases whose answers are known, and the same numbers twice."""

import csv
import json
import math
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from cosyvoice_ft import audio, metrics, recognise, scoring, summary, voices
from cosyvoice_ft.conf import CONF_DIR, load_conf
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_table, write_data_dir

RATE = 16000  # Hz
FIFTH = 1.5
CPU = torch.device("cpu")
needs_pocketsphinx = pytest.mark.skipif(
    not find_spec("pocketsphinx"), reason="pocketsphinx is not installed: recognition is not tested"
)


def tone(hertz: float, seconds: float = 1.0, level: float = 0.5) -> torch.Tensor:
    return (level * torch.sin(2 * math.pi * hertz * torch.arange(round(seconds * RATE)) / RATE)).float()


def vowel(f0: np.ndarray, formants: tuple[float, ...]) -> torch.Tensor:
    """A voice of pitch f0 (T,) in Hz: harmonics of falling strength through resonances 100 Hz wide."""
    phase, wav = 2 * np.pi * np.cumsum(f0) / RATE, np.zeros(len(f0))
    for k in range(1, 61):
        hertz = np.minimum(k * f0, RATE / 2)
        gain = sum(1 / np.hypot(1 - (hertz / f) ** 2, 100 * hertz / f**2) for f in formants) / k**2
        wav += np.where(k * f0 < RATE / 2, gain, 0) * np.sin(k * phase)
    return torch.from_numpy(0.5 * wav / np.abs(wav).max()).float()


def write_set(folder: Path, waves: dict[str, tuple[torch.Tensor, str, str]], rate: int = RATE) -> Path:
    """Write a data directory of {utt: (wav, text, spk)}."""
    rows = []
    for utt, (wav, text, spk) in waves.items():
        audio.save_wav(folder / "wav" / f"{utt}.wav", wav, rate)
        rows.append({"utt": utt, "wav": folder / "wav" / f"{utt}.wav", "text": text, "spk": spk,
                     "seconds": len(wav) / rate})  # fmt: skip
    write_data_dir(folder, rows)
    return folder


def read_scores(folder: Path) -> tuple[dict[str, dict[str, str]], dict]:
    with open(folder / "score.tsv", encoding="utf-8") as file:
        rows = {row["utt"]: row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)}
    return rows, json.loads((folder / "score.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo(root) -> list[tuple[str, Path, str]]:
    """(utt, file, text) of the shipped recordings."""
    lines = (root / "local/demo/metadata.csv").read_text(encoding="utf-8").splitlines()
    return [(utt, root / f"local/demo/wavs/{utt}.flac", text) for utt, text, _ in (line.split("|") for line in lines)]


@pytest.fixture(scope="module")
def natural(demo, tmp_path_factory) -> Path:
    """A data directory of ten shipped recordings, 16 kHz."""
    folder = tmp_path_factory.mktemp("natural")
    return write_set(folder, {utt: (audio.load_wav(path), text, "slt") for utt, path, text in demo[10:20]})


@pytest.fixture(scope="module")
def score(run_tool, tiny_base, root):
    """score(DATA_DIR, ...): the finished tool."""

    def call(*words, status=0):
        return run_tool("tools/score.py", *words, f"--pretrained_dir={tiny_base}", status=status)

    return call


# ---- made cases


@pytest.fixture(scope="module")
def made(demo, natural, tmp_path_factory) -> Path:
    """One sentence, and what can go wrong with it. Also a second known speaker: the same voice of a longer throat."""
    _, path, text = demo[2]
    wav, generator = audio.load_wav(path), torch.Generator().manual_seed(0)
    quiet, click = wav * 0.5, wav * 0.5
    click[int(wav.unfold(0, 800, 1).square().sum(1).argmin()) + 400] += 0.4
    giant = audio.resample(wav, 10000, 12500)  # everything a quarter slower and lower
    return write_set(tmp_path_factory.mktemp("made"), {
        "as_it_is": (wav, text, "slt"),
        "half": (wav[: len(wav) // 2], text, "slt"),
        "twice": (torch.cat([wav, wav]), text, "slt"),
        "wrong": (wav, demo[4][2], "slt"),
        "other": (giant, text, "slt"),
        "tone": (tone(220, 3), text, "slt"),
        "nothing": (torch.zeros(3 * RATE), text, "slt"),
        "clipped": ((wav / wav.abs().max() * 4).clamp(-0.9, 0.9), text, "slt"),
        "quiet": (quiet, text, "slt"),
        "click": (click, text, "slt"),
        "fifth": (audio.resample(wav, 15000, 10000), text, "slt"),
        "noise": (0.1 * torch.randn(3 * RATE, generator=generator), text, "slt"),
    })  # fmt: skip


@pytest.fixture(scope="module")
def others(demo, tmp_path_factory) -> Path:
    """Natural recordings of the second speaker."""
    waves = {f"giant-{utt}": (audio.resample(audio.load_wav(path), 10000, 12500), text, "giant")
             for utt, path, text in demo[20:24]}  # fmt: skip
    return write_set(tmp_path_factory.mktemp("others"), waves)


@pytest.fixture(scope="module")
def scored(score, made, natural, others):
    """The rows and the summary of the made cases, and what the tool said."""
    said = score(made, "--natural", natural, "--natural", others, "--score.natural_max=4").stdout
    rows, result = read_scores(made)
    numbers = {utt: {key: float(value) for key, value in row.items() if is_number(value)} for utt, row in rows.items()}
    return numbers, rows, result, said


def is_number(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return False


@needs_pocketsphinx
def test_errors_of_made_cases(scored):
    n, rows, _, _ = scored
    words = n["as_it_is"]["words"]
    assert n["as_it_is"]["cer"] < 0.2 and n["as_it_is"]["missing"] == n["as_it_is"]["repeated"] == 0
    assert rows["as_it_is"]["heard"] and n["as_it_is"]["words"] == len(rows["as_it_is"]["text"].split())
    assert 0.3 < n["half"]["cer"] < 0.7 and n["half"]["missing"] > 0.3 * words
    assert n["twice"]["cer"] > 0.8 and n["twice"]["repeated"] > 0.5 * words and n["twice"]["missing"] == 0
    assert n["wrong"]["cer"] > 0.6 and n["wrong"]["wer"] > 0.8
    for utt in ("tone", "nothing", "noise"):
        assert n[utt]["cer"] > 0.8 and n[utt]["wer"] > 0.9, utt
    assert n["nothing"]["cer"] == 1 and n["nothing"]["missing"] == words and rows["nothing"]["heard"] == ""
    assert n["quiet"]["cer"] < 0.25 and n["click"]["cer"] < 0.35


def test_voice_and_pace_of_made_cases(scored):
    n, rows, result, _ = scored
    assert n["as_it_is"]["similarity"] > max(n[utt]["similarity"] for utt in ("other", "tone", "noise"))
    assert [rows[utt]["nearest"] for utt in ("as_it_is", "half", "click", "other")] == ["slt"] * 3 + ["giant"]
    assert "similarity" not in n["nothing"] and "nearest" not in n["nothing"]
    duration = {utt: n[utt]["duration"] for utt in n}
    assert 0.85 < duration["as_it_is"] < 1.15 and duration["nothing"] == 0
    for utt, times in (("half", 0.5), ("twice", 2.0), ("other", 1.25), ("fifth", 1 / FIFTH), ("quiet", 1.0)):
        assert duration[utt] / duration["as_it_is"] == pytest.approx(times, rel=0.08), utt
    ceiling = result["measures"]["similarity"]["natural"]
    assert ceiling["n"] == 4 and ceiling["value"] > n["other"]["similarity"]


def test_sound_of_made_cases(scored):
    n, rows, _, _ = scored
    assert n["fifth"]["pitch"] / n["as_it_is"]["pitch"] == pytest.approx(FIFTH, rel=0.02)
    assert n["fifth"]["pitch_spread"] == pytest.approx(n["as_it_is"]["pitch_spread"], abs=0.3)
    assert n["tone"]["pitch"] == pytest.approx(220, rel=0.002) and n["tone"]["voiced"] > 0.97
    assert n["tone"]["pitch_spread"] < 0.1 and n["noise"]["voiced"] < 0.02
    assert n["nothing"]["voiced"] == 0 and n["nothing"]["silence"] == 1 and n["nothing"]["longest_silence"] == 3
    assert rows["nothing"]["level"] == "-inf" and "pitch" not in n["nothing"]
    assert n["tone"]["level"] == pytest.approx(20 * math.log10(0.5 / math.sqrt(2)), abs=0.02)
    assert n["quiet"]["level"] - n["as_it_is"]["level"] == pytest.approx(-6.02, abs=0.02)
    assert n["clipped"]["clipped"] > 0.05 and max(n[u]["clipped"] for u in ("as_it_is", "tone", "noise")) < 1e-3
    clicks = {utt: n[utt]["clicks"] for utt in n}
    assert clicks.pop("click") == 1 and set(clicks.values()) == {0}


def test_the_table_says_what_is_not_scored_and_never_mos(scored):
    _, _, result, said = scored
    assert "carry about ±0.04 of character error" in said or not find_spec("pocketsphinx")
    assert "not scored: frame by frame: spoken from text, with a timing of its own" in said
    assert "MOS" not in said + json.dumps(result)
    for name, title in (("silence", "silence"), ("duration", "seconds / expected")):
        cell = result["measures"][name]["spoken"]
        assert cell["n"] == 12 and cell["low"] <= cell["value"] <= cell["high"] and f"  {title} " in said


def test_two_runs_give_the_same_bytes(score, made, others, tmp_path):
    """Also with one process instead of one a core, and into another folder."""
    wavs, text = read_table(made / "wav.scp"), next(iter(read_table(made / "text").values()))
    waves = {utt: (audio.load_wav(wavs[utt]), text, "giant") for utt in ("noise", "half")}
    folder = write_set(tmp_path / "set", waves)
    for nj, out in ((2, tmp_path / "two"), (1, tmp_path / "one")):
        score(folder, "--natural", others, "--score.natural_max=1", f"--nj={nj}", "--out", out)
    for name in ("score.tsv", "score.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not (folder / "score.tsv").exists()


# ---- calibration


def character_error(clips: dict[str, tuple[Path | str, str]]) -> float:
    """Of {utt: (file, English text)}, by PocketSphinx."""
    heard, failed = recognise.PocketSphinx()({utt: (str(path), "en") for utt, (path, _) in clips.items()})
    assert not failed
    words = recognise.normalise
    errors = [recognise.compare(words(text, "en"), words(heard[utt], "en"), "en") for utt, (_, text) in clips.items()]
    return sum(one.char_errors for one in errors) / sum(one.chars for one in errors)


@needs_pocketsphinx
def test_character_error_of_the_demo(demo):
    """The voice slt: 0.115 +- 0.02 over all hundred."""
    assert 0.07 < character_error({utt: (path, text) for utt, path, text in demo[:8]}) < 0.15


@needs_pocketsphinx
@pytest.mark.skipif(not shutil.which("flite"), reason="flite is not installed: its other voices are not tested")
def test_character_error_of_flite(demo, tmp_path):
    clips = {}
    for voice in ("rms", "awb"):
        for utt, _, text in demo[:8]:
            path = tmp_path / f"{voice}-{utt}.wav"
            subprocess.run(["flite", "-voice", voice, "-t", text, "-o", path], check=True)
            clips[path.stem] = (path, text)
    assert 0.04 < character_error(clips) < 0.10


@needs_pocketsphinx
def test_character_error_of_natural_speech(speech_dir):
    """LJSpeech: 0.18 over the first forty, 0.15 over two hundred."""
    lines = (speech_dir / "ljspeech-200/metadata.csv").read_text(encoding="utf-8").splitlines()[:12]
    rows = [line.split("|") for line in lines]
    clips = {utt: (speech_dir / f"ljspeech-200/wavs/{utt}.wav", text) for utt, _, text in rows}
    assert 0.15 < character_error(clips) < 0.21


# ---- pitch, clicks


@pytest.mark.parametrize("hertz", [65, 80, 110, 150, 220, 300, 440, 490])
def test_pitch_of_tones(hertz):
    f0 = metrics.pitch(tone(hertz))[5:-5]
    assert (f0 > 0).all() and np.abs(f0 / hertz - 1).max() < 0.003


@pytest.mark.parametrize("formants", [(700, 1200, 2600), (300, 2300, 3000), (300, 800, 2300)], ids=["a", "i", "u"])
@pytest.mark.parametrize("low", [90, 180, 280])
def test_pitch_of_synthetic_speech(low, formants):
    """It glides over most of an octave and trembles; noise of 20 dB less lies over it."""
    t = np.arange(2 * RATE) / RATE
    truth = low * 2 ** (0.3 + 0.3 * np.sin(2 * np.pi * 0.8 * t) + 0.02 * np.sin(2 * np.pi * 6 * t))
    wav = vowel(truth, formants)
    wav += 0.1 * wav.std() * torch.randn(len(wav), generator=torch.Generator().manual_seed(1))
    f0 = metrics.pitch(wav)[4:-4]
    truth = np.append(truth, truth[-1])[:: metrics.PITCH_HOP][4:-4]
    octaves = np.abs(np.log2(f0[f0 > 0] / truth[f0 > 0]))
    assert (f0 > 0).mean() > 0.98 and np.median(octaves) < 0.01 and (octaves > 0.1).mean() < 0.01


def test_no_pitch_in_noise_and_silence():
    noise = 0.1 * torch.randn(3 * RATE, generator=torch.Generator().manual_seed(2))
    assert (metrics.pitch(noise) > 0).mean() < 0.02 and not metrics.pitch(torch.zeros(RATE)).any()
    assert "pitch" not in metrics.pitch_facts(np.zeros(50))


def test_clicks_are_counted_where_they_are():
    wav = np.zeros(RATE, np.float32)
    wav[4000] = 0.3
    wav[9000:] += 0.2
    assert [round(n / 10) for n in metrics.clicks(wav, RATE)] == [400, 900]


# ---- copies


def test_a_copy_is_compared_frame_by_frame(score, natural, tmp_path):
    """The recordings themselves have no distance; pitch up by 3 % is half a semitone; noise is far."""
    wavs, texts = read_table(natural / "wav.scp"), read_table(natural / "text")
    utts, generator = list(wavs)[:3], torch.Generator().manual_seed(0)
    own, sharp, noise = (audio.load_wav(wavs[utt]) for utt in utts)
    sharp = torch.nn.functional.interpolate(sharp[None, None], scale_factor=1 / 1.03, mode="linear")[0, 0]
    sharp = torch.nn.functional.pad(sharp, (0, len(audio.load_wav(wavs[utts[1]])) - len(sharp)))
    noise = 0.1 * torch.randn(len(noise), generator=generator)
    waves = (own, sharp, noise)
    copies = write_set(tmp_path, {utt: (wav, texts[utt], "slt") for utt, wav in zip(utts, waves, strict=True)})
    said = score(copies, "--natural", natural, "--copy", "--score.recogniser=none", "--score.natural_max=4").stdout
    rows, result = read_scores(copies)
    same, higher, far = (rows[utt] for utt in utts)
    assert float(same["mel_distance"]) == float(same["voicing_error"]) == float(same["pitch_error"]) == 0
    assert 0 < float(higher["mel_distance"]) < float(far["mel_distance"])
    assert float(far["voicing_error"]) > 0.5
    for name in metrics.INTRUSIVE.keys() - metrics.intrusive().keys():
        assert "not installed: pip install" in result["not_scored"][name] and name not in result["measures"]
    assert "copy" not in result["not_scored"] and "log-mel distance, dB" in said
    assert result["measures"]["mel_distance"]["spoken"]["n"] == 3


@pytest.mark.parametrize("name", ["pesq", "stoi"])
def test_intrusive_measures(name):
    if not find_spec(metrics.INTRUSIVE[name]):
        assert name not in metrics.intrusive()
        pytest.skip(f"{name} is not installed: only that it is left out is tested")
    t = np.arange(3 * RATE) / RATE
    wav = vowel(120 + 30 * np.sin(2 * np.pi * t), (700, 1200, 2600)).numpy()
    noisy = wav + 0.1 * np.random.default_rng(0).standard_normal(len(wav)).astype(np.float32)
    assert metrics.intrusive()[name](wav, wav) > metrics.intrusive()[name](wav, noisy)


def test_frames_are_refused_where_there_is_no_timing(natural):
    sentences, total = scoring.read_sentences(natural)
    assert total == {} and sentences[0].ended is None
    copied, why = scoring.originals(sentences, sentences, asked=False)
    assert not copied and "spoken from text" in why
    shifted = [scoring.Sentence(s.utt, s.spk, s.text, sentences[1].wav) for s in sentences]
    for wrong, says in ((shifted, "are not aligned"), ([], "no natural recordings are given")):
        with pytest.raises(BadInput, match=says):
            scoring.originals(sentences, wrong, asked=True)


# ---- what stage 7 says of its sentences


def test_ended_real_time_factor_and_nothing_spoken(score, natural, tmp_path):
    """A sentence that did not end, and one of which nothing came: heard as nothing, all words missing."""
    wavs, texts = read_table(natural / "wav.scp"), read_table(natural / "text")
    utts = list(wavs)[:2]
    folder = write_set(tmp_path, {utt: (audio.load_wav(wavs[utt]), texts[utt], "slt") for utt in utts})
    facts = [{"utt": utt, "mode": "sft", "text": texts[utt], "ended": utt == utts[0]} for utt in utts]
    facts.append({"utt": "gone", "mode": "sft", "text": "It says nothing at all.", "ended": True})
    (folder / "synth.json").write_text(json.dumps({"total": {"real_time_factor": 0.25}, "sentences": facts}))
    lines = score(folder, "--score.recogniser=command:cp /dev/null", status=1).stderr.splitlines()
    assert len(lines) == 1 and "ended with 1" in lines[0]
    program = tmp_path / "hear.sh"
    program.write_text(f'cut -d" " -f1 "$1" | while read utt; do grep "^$utt " {natural}/text; done > "$2"\n')
    said = score(folder, "--base", folder, f"--score.recogniser=command:bash {program}").stdout
    rows, result = read_scores(folder)
    assert [rows[utt]["ended"] for utt in (*utts, "gone")] == ["1", "0", "0"] and "1 of 3" in said
    assert float(rows[utts[0]]["cer"]) == 0 and rows["gone"]["missing"] == "5" and float(rows["gone"]["cer"]) == 1
    assert result["measures"]["real_time_factor"]["spoken"]["value"] == 0.25 and "real-time factor" in said
    assert result["measures"]["cer"]["spoken - base"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 3}


# ---- recognisers and texts


def test_a_language_that_is_not_known_is_said(score, natural, tmp_path):
    wav = audio.load_wav(next(iter(read_table(natural / "wav.scp").values())))
    folder = write_set(tmp_path, {"zh": (wav, "今天天气很好。", "x"), "ja": (wav, "こんにちは。", "x")})
    said = score(folder, "--score.recogniser=pocketsphinx", "--natural", natural).stdout
    assert "--natural has no recordings of speaker 'x'" in said
    rows, result = read_scores(folder)
    assert "does not know the language 'zh'" in said + json.dumps(result, ensure_ascii=False)
    assert "cer" not in rows["zh"] and [rows[utt]["language"] for utt in ("zh", "ja")] == ["zh", "ja"]
    assert "character error" not in said.split("not scored")[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--score.recogniser=kaldi"], "score.recogniser: 'kaldi' is unknown; one of: auto pocketsphinx"),
        (["--natural", "nowhere"], "nowhere/wav.scp: cannot be read"),
        (["--copy"], "--copy: no natural recordings are given"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_mistakes_end_in_one_line(score, natural, words, says):
    lines = score(natural, *words, status=1).stderr.strip().splitlines()
    assert len(lines) == 1 and says in lines[0] and not (natural / "score.tsv").exists()


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"recogniser": "whisper", "whisper": None}, "score.whisper names no weights"),
        ({"recogniser": "auto", "whisper": "nowhere.pt"}, "'nowhere.pt' is no file and no model's name"),
        ({"recogniser": "command: ", "whisper": None}, "names no program"),
    ],
)
def test_recognisers_that_cannot_be_used(own, says):
    with pytest.raises(BadInput, match=says):
        recognise.recogniser(own, CPU)


@pytest.mark.parametrize(
    ("absent", "says"),
    [
        ("jiwer", "jiwer is not installed: pip install jiwer"),
        ("pocketsphinx", "no recogniser is installed: pip install"),
    ],
)
def test_without_packages_the_reason_is_said(monkeypatch, absent, says):
    monkeypatch.setattr(recognise, "find_spec", lambda name: None if name == absent else find_spec(name))
    own = load_conf(CONF_DIR / "demo.yaml")["score"]
    assert recognise.recogniser(own, CPU).refuses("en").startswith(says)
    if absent == "pocketsphinx":
        with pytest.raises(BadInput, match="pocketsphinx is not installed"):
            recognise.recogniser(own | {"recogniser": "pocketsphinx"}, CPU)


def test_whisper(tmp_path, natural):
    """Random weights of a small multilingual network, from a file: it hears something, and knows what it cannot."""
    import whisper

    dims = whisper.ModelDimensions(80, 1500, 64, 1, 1, 51865, 448, 64, 1, 1)
    weights = whisper.model.Whisper(dims).state_dict()
    torch.save({"dims": dims.__dict__, "model_state_dict": weights}, tmp_path / "little.pt")
    own = load_conf(CONF_DIR / "demo.yaml")["score"] | {"whisper": str(tmp_path / "little.pt")}
    made = recognise.recogniser(own, CPU)
    assert made.name == "whisper little" and made.refuses("zh") == "" and "'xx'" in made.refuses("xx")
    wav = next(iter(read_table(natural / "wav.scp").values()))
    heard, failed = made({"a": (wav, "en"), "b": (wav, "unknown"), "c": ("nowhere.wav", "zh")})
    assert heard.keys() == {"a", "b"} and failed.keys() == {"c"}
    (tmp_path / "broken.pt").write_bytes(b"weights")
    with pytest.raises(BadInput, match="cannot be loaded"):
        recognise.recogniser(own | {"whisper": str(tmp_path / "broken.pt")}, CPU)


@pytest.mark.parametrize(
    ("language", "said", "heard", "chars"),
    [
        ("en", "Dr. Smith's colour isn't $20!", "doctor smith's color is not twenty dollars", 0),
        ("en", "a cat", "a bat", 1),
        ("zh", "我有3个苹果，OK？", "我有三个苹果ok", 0),
        ("zh", "今天 天气很好。", "今天天汽很好", 1),
        ("ja", "こんにちは。", "こんにちわ", 1),
        ("de", "Grüße, Welt!", "grüße welt", 0),
        ("zh", "你好<strong>吗</strong>[laughter]。<|sad|>", "你好吗", 0),
    ],
)
def test_texts_are_compared_as_the_field_does(language, said, heard, chars):
    reference = recognise.normalise(said, language)
    assert recognise.compare(reference, recognise.normalise(heard, language), language).char_errors == chars


def test_counts_of_edits():
    """A gap of four words is missing four, one of two words is the recogniser's slip; a pair heard again counts."""
    words = ["the", "cat", "sat", "on", "the", "red", "mat", "today"]
    said = {
        "the cat sat on": (4, 0),
        "the cat sat the red mat": (0, 0),
        "": (8, 0),
        "the cat sat on the cat sat on the red mat today": (0, 4),
        "the the cat sat on the red mat today": (0, 1),
    }
    for heard, (missing, repeated) in said.items():
        counts = recognise.compare(words, heard.split(), "en")
        assert (counts.missing, counts.repeated) == (missing, repeated), heard
    nothing = recognise.compare(["hello"], [], "en")
    assert (nothing.missing, nothing.word_errors, nothing.char_errors, nothing.chars) == (1, 1, 5, 5)


@pytest.mark.parametrize(
    ("text", "language"),
    [("Hello, you!", "en"), ("你好 OK", "zh"), ("こんにちは 世界", "ja"), ("안녕", "ko"), ("Привет", "unknown"),
     ("naïve in a long English sentence", "en"), ("ähnlich über öfter", "unknown"), ("123", "unknown")],
)  # fmt: skip
def test_language_by_script(text, language):
    assert recognise.language_of(text) == language


# ---- intervals


def test_intervals_and_paired_differences():
    """A ratio of sums; the interval of a mean is near the normal one; a pair takes away what both have in common."""
    generator = np.random.default_rng(0)
    hard, gain = generator.normal(0.5, 0.2, 400), generator.normal(0.02, 0.02, 400)
    rows = {
        name: [{"utt": str(i), "text": "", "pitch": value, "char_errors": i % 2, "chars": 4} for i, value in values]
        for name, values in (("spoken", enumerate(hard - gain)), ("base", enumerate(hard)))
    }
    found = summary.summary(rows, {}, 1000, 1)
    mean, cer = found["pitch"]["base"], found["cer"]["spoken"]
    expected = 1.96 * hard.std() / 20
    assert mean["value"] == pytest.approx(hard.mean()) and summary.half(mean) == pytest.approx(expected, rel=0.1)
    assert cer["value"] == 0.125 and cer["n"] == 400
    difference = found["pitch"]["spoken - base"]
    assert difference["high"] < 0 and summary.half(difference) < summary.half(mean) / 5
    assert found == summary.summary(rows, {}, 1000, 1)
    lines = summary.table(found, ["a note"])
    assert lines[-1] == "  a note" and next(line for line in lines if "pitch, Hz" in line).endswith(" *")


def test_what_cannot_be_paired_is_not_subtracted():
    rows = {"spoken": [{"utt": "a", "text": "x", "voiced": 1.0}], "natural": [{"utt": "a", "text": "y", "voiced": 0.5}]}
    assert summary.summary(rows, {}, 100, 1)["voiced"].keys() == {"spoken", "natural"}
    assert summary.estimate([[(1.0, 1.0)]], 100, 1) == {"value": 1.0, "low": None, "high": None, "n": 1}


# ---- voices


def test_a_recording_is_left_out_of_its_own_mean():
    vectors = {"a1": np.array([1.0, 0.0]), "a2": np.array([0.0, 1.0]), "b1": np.array([-1.0, 0.0])}
    means = voices.MeanVoices(vectors, {"a1": "a", "a2": "a", "b1": "b"})
    assert means.similarities(vectors["a1"])["a"] == pytest.approx(math.sqrt(0.5))
    assert means.similarities(vectors["a1"], "a1") == pytest.approx({"a": 0.0, "b": -1.0})
    assert means.similarities(vectors["b1"], "b1").keys() == {"a"}


def test_resemblyzer_tells_real_voices_apart(speech_dir):
    if not find_spec("resemblyzer"):
        with pytest.raises(BadInput, match="pip install --no-deps Resemblyzer"):
            voices.Resemblyzer()
        pytest.skip("Resemblyzer is not installed: only what is said of that is tested")
    encoder = voices.Resemblyzer()
    files = {folder.name: sorted(folder.rglob("*.flac"))[:3]
             for folder in sorted((speech_dir / "librispeech-10spk").iterdir()) if folder.is_dir()}  # fmt: skip
    utt2spk = {path.stem: spk for spk, paths in files.items() for path in paths}
    vectors = {path.stem: encoder(audio.load_wav(path, RATE)) for paths in files.values() for path in paths}
    means = voices.MeanVoices(vectors, utt2spk)
    near = {utt: means.similarities(vector, utt) for utt, vector in vectors.items()}
    assert np.mean([max(found, key=found.get) == utt2spk[utt] for utt, found in near.items()]) > 0.9
    with pytest.raises(BadInput, match="no sound"):
        encoder(torch.zeros(RATE))
