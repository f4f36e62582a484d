#!/usr/bin/env python3
"""The last screen: natural recordings beside what base and fine-tuned model speak, as far as no recogniser is needed.

    python tools/show_result.py natural=data/demo/dev base=exp/demo/synth_base tuned=exp/demo/synth \\
        --conf conf/demo.yaml

reads   data directories; pretrained_dir/campplus.onnx; the speaker means beside the natural recordings
prints  a row each: sentences, seconds a sentence, level, similarity to the speaker's mean, ended by themselves

Similarity is the cosine of the recipe's own speaker encoder: what natural recordings reach is the ceiling.
"""

import json
from pathlib import Path

import numpy as np

from cosyvoice_ft import audio, cli, conf, device, jobs
from cosyvoice_ft.extractors import SpeakerEncoder, load_archive, load_for_extraction
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_table


def row(folder: Path, encoder: SpeakerEncoder, means: dict[str, np.ndarray]) -> list[str]:
    """Return the cells of one data directory."""
    wavs, spks = read_table(folder / "wav.scp"), read_table(folder / "utt2spk")

    def measure(item: tuple[str, str]) -> tuple[float, float, float]:
        path, spk = item
        wav = audio.load_wav(path, audio.SAMPLE_RATE)
        level = 20 * np.log10(max(float(wav.square().mean().sqrt()), 1e-6))
        if spk not in means:
            return len(wav) / audio.SAMPLE_RATE, level, float("nan")
        vector, mean = encoder(load_for_extraction(path)[1]), means[spk]
        similarity = vector @ mean / (np.linalg.norm(vector) * np.linalg.norm(mean))
        return len(wav) / audio.SAMPLE_RATE, level, float(similarity)

    measured, _ = jobs.for_each(measure, {utt: (path, spks[utt]) for utt, path in wavs.items()}, what=str(folder))
    if not measured:
        raise BadInput(f"{folder}: none of its recordings can be read")
    seconds, level, similarity = np.array(list(measured.values())).T
    facts = folder / "synth.json"
    ended = "-"
    if facts.is_file():
        sentences = json.loads(facts.read_text(encoding="utf-8"))["sentences"]
        ended = f"{sum(known['ended'] for known in sentences)} of {len(sentences)}"
    return [str(len(wavs)), f"{seconds.mean():.1f}", f"{level.mean():.1f}", f"{similarity.mean():.3f}", ended]


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("dirs", nargs="+", metavar="NAME=DATA_DIR")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    folders = {name: Path(folder) for name, _, folder in (word.partition("=") for word in args.dirs)}
    providers = device.onnx_providers(device.torch_device(settings["device"]))
    encoder = SpeakerEncoder(Path(settings["pretrained_dir"]) / "campplus.onnx", providers)
    natural = next((folder for folder in folders.values() if (folder / "spk2embedding.pt").is_file()), None)
    if natural is None:
        raise BadInput(f"none of {', '.join(map(str, folders.values()))} has spk2embedding.pt; run stage 1")
    means = load_archive(natural / "spk2embedding.pt")
    head = ["", "sentences", "seconds", "level dBFS", "similarity", "ended"]
    table = [head] + [[name, *row(folder, encoder, means)] for name, folder in folders.items() if folder.is_dir()]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for name, *cells in table:
        right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        print(f"  {name.ljust(widths[0])}  {right}")


if __name__ == "__main__":
    cli.run(main)
