#!/usr/bin/env python3
"""Stage 3: pack what training reads: text ids, speech tokens, speaker vectors, log-mel.

    python tools/make_parquet.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp text utt2spk utt2embedding.pt spk2embedding.pt utt2speech_token.pt;
        pretrained_dir/CosyVoice-BlankEN, the tokenizer of texts
writes  DATA_DIR/parquet/NNNNN.parquet (1,024 utterances each), DATA_DIR/parquet/data.list

The text is normalised here as synthesis does it (text.frontend); up to 20 changed texts are shown.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import audio, cli, conf, extraction, jobs, shards, text
from cosyvoice_ft.extractors import load_archive, load_for_extraction
from cosyvoice_ft.files import BadInput, lock
from cosyvoice_ft.table import read_table

TABLES = {"text": 0, "utt2spk": 0, "utt2embedding": 1, "utt2speech_token": 2}  # name: the stage that makes it
SHOWN = 20
MAX_TEXT_TOKENS = 200


class Packing:
    """One data directory on its way to shards. lost: {utt: reason}, for a start those that a table lacks."""

    def __init__(self, folder: Path, tokenizer: text.Tokenizer, settings: Mapping) -> None:
        self.folder, self.out, self.part = folder, folder / "parquet", folder / ".parquet.part"
        self.tokenizer, self.settings, self.frontend = tokenizer, settings, settings["text"]["frontend"]
        self.wavs, self.spks = read_table(folder / "wav.scp"), load_archive(folder / "spk2embedding.pt")
        self.tables, self.made_from = {}, {}
        for name, stage in TABLES.items():
            self.tables[name] = load_archive(folder / f"{name}.pt") if stage else read_table(folder / name)
            if stage and (prints := folder / f"{name}.fingerprints").exists():
                self.made_from[stage] = read_table(prints)
        self.lost, self.normalised = {}, []
        for utt in self.wavs:
            if lacking := next((name for name, table in self.tables.items() if utt not in table), None):
                self.lost[utt] = f"{folder / lacking} lacks it; run stage {TABLES[lacking]} again"
            elif (spk := self.tables["utt2spk"][utt]) not in self.spks:
                self.lost[utt] = f"{folder / 'spk2embedding.pt'} lacks its speaker {spk}; run stage 1 again"

    def write(self) -> None:
        """Write the shards beside their place."""
        shutil.rmtree(self.part, ignore_errors=True)
        metadata = {
            "tokenizer": self.tokenizer.fingerprint,
            "text_frontend": self.frontend,
            "model": self.settings["model"],
        }
        self.shards = shards.write_shards(self.part, self.rows(), metadata)

    def rows(self) -> Iterator[dict]:
        """Yield what can be trained on, in the order of wav.scp."""
        utts = [utt for utt in self.wavs if utt not in self.lost]
        done = jobs.in_order(self.row, utts, self.settings["nj"])
        for utt, row in cli.progress(done, len(utts), str(self.out)):
            if isinstance(row, BadInput):
                self.lost[utt] = str(row)
                continue
            if row["text"] != self.tables["text"][utt]:
                self.normalised.append(utt)
                if len(self.normalised) <= SHOWN:
                    print(f"  {utt}: {self.tables['text'][utt]}\n  {' ' * len(utt)}> {row['text']}")
            yield row

    def row(self, utt: str) -> dict:
        """Return an utterance as shards keep it. Raises BadInput when it cannot be trained on."""
        wav, tokens, spk = self.wavs[utt], self.tables["utt2speech_token"][utt], self.tables["utt2spk"][utt]
        spoken = text.normalize(self.tables["text"][utt], self.frontend)
        ids = np.array(self.tokenizer.encode(spoken), dtype=np.int32)
        if not 1 <= len(ids) <= MAX_TEXT_TOKENS:
            raise BadInput(f"{len(ids)} text tokens; an utterance has 1 to {MAX_TEXT_TOKENS}")
        changed = [stage for stage, prints in self.made_from.items() if extraction.has_changed(wav, prints.get(utt))]
        feat = audio.log_mel(load_for_extraction(wav)[0]).numpy().astype(np.float16)  # (T, 80)
        if changed or len(feat) != audio.MEL_PER_TOKEN * len(tokens):
            found = f"{len(feat)} mel frames for {len(tokens)} tokens"
            raise BadInput(f"{wav}: {found}: the recording changed, run stage {changed[0] if changed else 2} again")
        return {
            "utt": utt,
            "spk": spk,
            "text": spoken,
            "text_token": ids,
            "speech_token": tokens,
            "utt_embedding": self.tables["utt2embedding"][utt],
            "spk_embedding": self.spks[spk],
            "speech_feat": feat,
        }

    def put(self) -> str:
        """Put the shards in their place; return the summary."""
        old = self.folder / ".parquet.old.part"
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        self.part.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
        size = sum(path.stat().st_size for path in self.out.iterdir()) / 1e6
        return (
            f"wrote {self.out}: {len(self.wavs) - len(self.lost)} of {len(self.wavs)} utterances, {len(self.shards)} "
            f"shards, {size:.1f} MB, {len(self.normalised)} texts changed by {self.frontend}"
        )


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    torch.set_num_threads(1)  # utterances run side by side instead
    tokenizer = text.Tokenizer(settings["pretrained_dir"])
    packings = [Packing(folder, tokenizer, settings) for folder in args.data_dir]
    total, names = sum(len(packing.wavs) for packing in packings), " ".join(str(packing.out) for packing in packings)

    def lost() -> dict[str, str]:
        return {utt: reason for packing in packings for utt, reason in packing.lost.items()}

    with contextlib.ExitStack() as stack:
        for packing in packings:
            stack.enter_context(lock(packing.folder))
        if len(lost()) > jobs.MAX_LOSS * total:  # stop now, not after hours
            jobs.settle(lost(), total, names)
        for packing in packings:
            packing.write()
        jobs.settle(lost(), total, names)
        for packing in packings:
            print(f"{packing.put()}, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    cli.run(main)
