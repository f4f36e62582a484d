#!/usr/bin/env python3
"""Stage 8: what a voice is worth, in numbers: the right words, the right voice, a healthy sound.

    python tools/score.py exp/demo/synth --natural data/demo/dev --base exp/demo/synth_base --conf conf/demo.yaml
    python tools/score.py out --natural data/demo/dev     # out: spoken from natural tokens (synthesize.py --tokens)

reads   DATA_DIR: wav.scp text utt2spk, and synth.json where stage 7 wrote it; the same of --natural, the ceiling: mean
        voice and pace of each speaker; and of --base, the floor; pretrained_dir/campplus.onnx
writes  DATA_DIR/score.tsv (or into --out), a row a sentence; score.json: values, 95 % intervals, paired differences
prints  the table of them

What cannot be scored here is left out, and the reason said: a package that is not installed, a language that the
recogniser does not know, frame by frame measures of sentences that do not have the timing of a natural recording.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from cosyvoice_ft import cli, conf, device, scoring, summary
from cosyvoice_ft.files import whole


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    """Write score.tsv: tab-separated, a header; empty is what was not measured."""
    columns = [name for name in scoring.COLUMNS if any(name in row for row in rows)]
    lines = ["\t".join(columns)]
    for row in rows:
        values = (row.get(name, "") for name in columns)
        lines.append("\t".join(f"{v:.5g}" if isinstance(v, float) else " ".join(str(v).split()) for v in values))
    with whole(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")


def notes(result: Mapping, resamples: int) -> Iterator[str]:
    """Yield the lines below the table: what the numbers mean, and what is not among them."""
    if "cer" in result["measures"]:
        yield f"recogniser {result['recogniser']}: 20 sentences carry about ±0.04 of character error"
    yield f"±: half of the 95 % interval, {resamples} draws of the sentences"
    if any(" - " in column for cells in result["measures"].values() for column in cells):
        yield "differences: paired, sentence by sentence; * where the interval leaves out 0"
    if "natural" in result["sentences"]:
        yield "natural: the ceiling, each recording against the mean of the others"
    reasons: dict[str, list[str]] = {}
    for name, why in result["not_scored"].items():
        reasons.setdefault(why, []).append(summary.TITLES[name])
    for why, titles in reasons.items():
        yield f"not scored: {', '.join(titles)}: {why}"


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--natural", type=Path, action="append", default=[], metavar="DATA_DIR",
                        help="natural recordings; again for those of other speakers")  # fmt: skip
    parser.add_argument("--base", type=Path, metavar="DATA_DIR", help="the same sentences by the untouched base")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the scores go; default DATA_DIR")
    parser.add_argument("--copy", action="store_true", help="compare frame by frame, or say why this cannot be")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    own, out = settings["score"], args.out or args.data_dir
    torch.set_num_threads(1)  # sentences are measured side by side instead

    folders = {"spoken": args.data_dir} | ({"base": args.base} if args.base else {})
    sentences, totals = {}, {}
    for name, folder in folders.items():
        sentences[name], totals[name] = scoring.read_sentences(folder)
    natural = scoring.natural_sentences(args.natural, sentences["spoken"], own["natural_max"])
    copied, no_copy = scoring.originals(sentences["spoken"], natural, args.copy)
    scorer = scoring.Scorer(settings, device.torch_device(settings["device"]), natural)

    rows = {}
    for name, said in sentences.items():
        measured = scorer.measure(said, copied if name == "spoken" else {}, name)
        rows[name] = scorer.rows(said, measured)
    spks = {sentence.spk for sentence in sentences["spoken"]}
    if ceiling := [sentence for sentence in natural if sentence.spk in spks]:
        rows["natural"] = scorer.rows(ceiling, scorer.natural_facts)
    result = {
        "data_dir": str(args.data_dir), "base": args.base and str(args.base), "natural": list(map(str, args.natural)),
        "recogniser": scorer.recogniser.name, "sentences": {name: len(own_rows) for name, own_rows in rows.items()},
        "measures": summary.summary(rows, totals, own["resamples"], settings["seed"]),
        "not_scored": scorer.missing | ({"copy": no_copy} if no_copy else {}),
    }  # fmt: skip
    print("\n".join(summary.table(result["measures"], [*notes(result, own["resamples"])])))
    write_rows(out / "score.tsv", rows["spoken"])
    with whole(out / "score.json") as part:
        part.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}: score.tsv score.json, {len(rows['spoken'])} sentences, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    cli.run(main)
