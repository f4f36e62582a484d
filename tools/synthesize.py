#!/usr/bin/env python3
"""Stage 7: speak texts with a model directory.

    python tools/synthesize.py exp/demo/model local/demo/speak.txt exp/demo/synth --conf conf/demo.yaml
    python tools/synthesize.py exp/demo/model sentences.txt out --mode zero-shot --prompt clip.wav --prompt_text "..."
    python tools/synthesize.py exp/demo/model data/demo/dev out --tokens        # copy-synthesis: no language model

reads   MODEL_DIR (stage 6); TEXTS: one sentence a line, or tts_text.json: speaker -> mode -> sentences; with --tokens
        a data directory, whose natural speech tokens are spoken
writes  OUT_DIR/wav/*.wav (24 kHz); wav.scp text utt2spk spk2utt utt2dur: a data directory again; synth.json

--model base speaks the same with the untouched base (pretrained_dir), in the voices of MODEL_DIR.
"""

import json
import re
import sys
import time
from pathlib import Path

import torch

from cosyvoice_ft import audio, cli, conf, device, text
from cosyvoice_ft.extractors import SpeakerEncoder, SpeechTokenizer, load_archive, load_for_extraction
from cosyvoice_ft.files import BadInput, whole
from cosyvoice_ft.synthesis import Sentence, Spoken, Synthesizer, Voice, with_prompt
from cosyvoice_ft.table import read_table, write_data_dir
from cosyvoice_ft.texts import MODES, Line, read_texts


def prompt_voice(clip: Path, transcript: str, synthesizer: Synthesizer, model_dir: Path, settings: dict) -> Voice:
    """Return the voice of a recording."""
    providers = device.onnx_providers(synthesizer.device)
    wav24, wav16 = load_for_extraction(clip)
    vector = SpeakerEncoder(model_dir / "campplus.onnx", providers)(wav16)
    tokens = SpeechTokenizer(model_dir / "speech_tokenizer_v2.onnx", providers)(wav16)
    ids = synthesizer.tokenizer.encode(text.normalize(transcript, settings["text"]["frontend"]))
    return with_prompt(Voice(torch.from_numpy(vector)[None]), wav24, tokens, ids)


def voice_of(line: Line, synthesizer: Synthesizer, settings: dict) -> tuple[str, Voice]:
    """Return the speaker of a line. Raises BadInput naming the line."""
    try:
        return synthesizer.voice(line.spk or settings["synth"]["speaker"])
    except BadInput as error:
        raise BadInput(f"{line.where}: {error}") from error


def sentences_of(lines: list[Line], synthesizer: Synthesizer, prompt: tuple[str, Voice] | None, settings: dict):
    """Return the sentences and the speaker of each. Raises BadInput for an unknown speaker or a missing prompt."""
    sentences, speakers, counts = [], {}, {}
    for line in lines:
        spk, voice = prompt or voice_of(line, synthesizer, settings)
        if line.mode != "sft" and not len(voice.prompt_token):
            cure = "give one: --prompt CLIP --prompt_text TEXT"
            raise BadInput(f"{line.where}: speaker '{spk}' has no prompt for mode {line.mode}; {cure}")
        if line.mode == "zero_shot" and not voice.prompt_text:
            raise BadInput(f"{line.where}: mode zero_shot needs what the prompt of '{spk}' says: --prompt_text TEXT")
        spk = re.sub(r"[\s/]+", "_", spk)  # names files, and the first word of a line in the tables
        number = counts[spk, line.mode] = counts.get((spk, line.mode), 0) + 1
        utt = f"{spk}-{line.mode}-{number:03d}"  # sorted by speaker too, as Kaldi wants it
        speakers[utt] = spk
        sentences.append(Sentence(utt, line.text, voice, line.mode, line.instruction, settings["seed"]))
    return sentences, speakers


def natural_sentences(data: Path, settings: dict) -> tuple[list[Sentence], dict[str, str]]:
    """Return the utterances of a data directory, to be spoken from their own tokens and vectors."""
    tokens, vectors = load_archive(data / "utt2speech_token.pt"), load_archive(data / "utt2embedding.pt")
    texts, spks = read_table(data / "text"), read_table(data / "utt2spk")
    wavs = read_table(data / "wav.scp")
    utts = [utt for utt in wavs if utt in tokens and utt in vectors]
    if len(utts) < len(wavs):
        lost = " ".join(utt for utt in wavs if utt not in utts)
        print(f"left out, without tokens or vector (stages 1 and 2 make them): {lost}", file=sys.stderr)
    return [
        Sentence(utt, texts[utt], Voice(torch.from_numpy(vectors[utt].copy())[None]), "sft", "", settings["seed"],
                 tokens[utt].tolist())
        for utt in utts
    ], {utt: spks[utt] for utt in utts}  # fmt: skip


def fact(spoken: Spoken) -> dict:
    """Return what synth.json says of a sentence."""
    sentence = spoken.sentence
    return {
        "utt": sentence.utt,
        "mode": "tokens" if sentence.tokens is not None else sentence.mode,
        "text": sentence.text,
        "seconds": round(len(spoken.wav) / audio.SAMPLE_RATE, 3),
        "tokens": len(spoken.tokens),
        "ended": spoken.ended,
        "retried": spoken.retried,
        "trouble": spoken.trouble,
    }


def speak_all(synthesizer: Synthesizer, sentences: list[Sentence], speakers: dict, out: Path, suffix: str, batch: int):
    """Speak and save; return the rows of the data directory and the facts of each sentence."""
    rows, facts = [], []
    for spoken in cli.progress(synthesizer.speak(sentences, batch), len(sentences), "speaking", "sentence"):
        utt = spoken.sentence.utt
        facts.append(fact(spoken))
        if spoken.trouble:
            print(f"{'' if len(spoken.wav) else 'left out '}{utt}: {spoken.trouble}", file=sys.stderr)
        if not len(spoken.wav):
            continue
        wav = out / "wav" / f"{utt}.{suffix}"
        audio.save_wav(wav, spoken.wav, audio.SAMPLE_RATE)
        row = {"utt": utt, "wav": wav, "text": spoken.sentence.text, "spk": speakers[utt]}
        rows.append(row | {"seconds": len(spoken.wav) / audio.SAMPLE_RATE})
    return rows, sorted(facts, key=lambda known: known["utt"])


def write_summary(out: Path, facts: list[dict], spent: float, phases: dict[str, float], where: torch.device) -> str:
    """Write synth.json and return the line that sums it up; `spent` and `phases` are seconds."""
    seconds, tokens = sum(known["seconds"] for known in facts), sum(known["tokens"] for known in facts)
    total = {
        "sentences": len(facts),
        "seconds": round(seconds, 2),
        "seconds_spent": round(spent, 2),
        "phases": {phase: round(taken, 3) for phase, taken in phases.items()},
        "real_time_factor": round(spent / max(seconds, 1e-9), 3),
        "tokens_per_second": round(tokens / max(spent, 1e-9), 1),
        "memory_gb": round(device.peak_memory(where) / 1e9, 2),
    }
    with whole(out / "synth.json") as part:
        part.write_text(
            json.dumps({"total": total, "sentences": facts}, ensure_ascii=False, indent=1), encoding="utf-8"
        )
    return (
        f"{seconds:.1f} s of speech in {spent:.1f} s, real-time factor {total['real_time_factor']:.2f}, "
        f"{total['tokens_per_second']:.0f} tokens/s, {total['memory_gb']} GB"
    )


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--mode", choices=sorted(MODES), default="sft", help="of a text file (default sft)")
    parser.add_argument("--spk", help="speaker of MODEL_DIR/spk2info.pt; default synth.speaker")
    parser.add_argument("--prompt", type=Path, metavar="CLIP", help="speak in the voice of this recording")
    parser.add_argument("--prompt_text", default="", help="what the recording says (mode zero-shot)")
    parser.add_argument("--model", choices=["tuned", "base"], default="tuned", help="base: with the base's networks")
    parser.add_argument("--tokens", action="store_true", help="TEXTS is a data directory; speak its natural tokens")
    parser.add_argument("--speed", type=float, help="default synth.speed")
    parser.add_argument("--format", choices=["wav", "flac"], default="wav")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    settings["synth"]["speaker"] = args.spk or settings["synth"]["speaker"]
    if args.speed is not None:
        settings["synth"]["speed"] = args.speed
    where = device.torch_device(settings["device"])
    print(device.describe(where))

    lines = [] if args.tokens else read_texts(args.texts, MODES[args.mode])
    synthesizer = Synthesizer(args.model_dir, settings, where)
    if args.model == "base":
        voices = synthesizer.voices
        synthesizer = Synthesizer(Path(settings["pretrained_dir"]), settings, where)
        synthesizer.voices = voices
    prompt = None
    if args.prompt:
        voice = prompt_voice(args.prompt, args.prompt_text, synthesizer, args.model_dir, settings)
        prompt = (args.spk or args.prompt.stem, voice)
    if args.tokens:
        sentences, speakers = natural_sentences(args.texts, settings)
    else:
        sentences, speakers = sentences_of(lines, synthesizer, prompt, settings)

    start = time.monotonic()
    rows, facts = speak_all(synthesizer, sentences, speakers, args.out_dir, args.format, settings["synth"]["batch"])
    if rows:
        write_data_dir(args.out_dir, rows)
    said = write_summary(args.out_dir, facts, time.monotonic() - start, synthesizer.seconds, where)
    unended = [known["utt"] for known in facts if not known["ended"] and not known["trouble"]]
    if unended and not args.tokens:
        print(f"did not end by themselves, tried twice: {' '.join(unended)}")
    print(f"wrote {args.out_dir}: {len(rows)} of {len(sentences)} sentences, {said}")
    failed = [known["utt"] for known in facts if known["trouble"]]
    if failed:
        raise BadInput(f"{len(failed)} sentences could not be spoken: {' '.join(failed)}; the lines above say why")


if __name__ == "__main__":
    cli.run(main)
