#!/usr/bin/env python3
"""Stage 6, last: speak three sentences with a new model directory in every mode, and listen for nothing and for no end.

    python tools/try_voice.py exp/demo/model local/demo/speak.txt --conf conf/demo.yaml

reads   MODEL_DIR, TEXTS
writes  nothing; one line a mode. Ends with status 1 when a sentence came out empty, or did not end by itself
        (the latter only with synth.must_end)
"""

from pathlib import Path

from cosyvoice_ft import audio, cli, conf, device
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.synthesis import MODES, Sentence, Synthesizer
from cosyvoice_ft.text import contains_chinese
from cosyvoice_ft.texts import read_texts

COUNT = 3
INSTRUCTION = {True: "用开心的语气说", False: "Speak happily."}


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("texts", type=Path)
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    synthesizer = Synthesizer(args.model_dir, settings, device.torch_device(settings["device"]))
    texts = [line.text for line in read_texts(args.texts)][:COUNT]
    name, voice = synthesizer.voice(settings["synth"]["speaker"] or next(reversed(synthesizer.voices), None))
    bad = []
    for mode in MODES:
        wanted = [
            Sentence(f"{mode}_{n}", sentence, voice, mode, INSTRUCTION[contains_chinese(sentence)], settings["seed"])
            for n, sentence in enumerate(texts, 1)
        ]
        spoken = list(synthesizer.speak(wanted, settings["synth"]["batch"]))
        empty = [known.sentence.utt for known in spoken if not len(known.wav)]
        endless = [known.sentence.utt for known in spoken if not known.ended and len(known.wav)]
        seconds = sum(len(known.wav) for known in spoken) / audio.SAMPLE_RATE
        troubles = [f"{len(empty)} empty"] * bool(empty) + [f"{len(endless)} without end"] * bool(endless)
        verdict = ", ".join(troubles) or "all ended by themselves"
        print(f"  {name} {mode}: {len(spoken)} sentences, {seconds:.1f} s, {verdict}")
        bad += empty + (endless if settings["synth"]["must_end"] else [])
    if bad:
        raise BadInput(f"{args.model_dir} does not speak: {' '.join(bad)}; train longer, or average other epochs")


if __name__ == "__main__":
    cli.run(main)
