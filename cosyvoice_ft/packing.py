"""Stage 3: the tables and archives of a data directory joined, with the mel of every recording, into shards.

    wav.scp, text --threads--> rows, in order --64 at a time--> .parquet.part/ --all of them--> parquet/

Ids, texts, tokens and vectors are in memory; of audio and mel only the few utterances that are worked on, and two row
groups. The shards take their place when all data directories are packed; until then the earlier ones stand.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from cosyvoice_ft import audio, extraction, jobs, shards
from cosyvoice_ft import text as texts
from cosyvoice_ft.cli import progress
from cosyvoice_ft.extractors import load_archive, load_for_extraction
from cosyvoice_ft.files import BadInput, lock
from cosyvoice_ft.table import read_table

TABLES = {"text": 0, "utt2spk": 0, "utt2embedding": 1, "utt2speech_token": 2}  # name: the stage that makes it
MAX_TEXT_TOKENS = 200


def pack(folders: Sequence[Path], tokenizer: texts.Tokenizer, settings: Mapping) -> "list[Packing]":
    """Make FOLDER/parquet in every data directory and return what was packed.

    Raises BadInput when more than 5 % of all utterances cannot be packed: before any work for those that a table lacks.
    """
    texts.normalize("", settings["text"]["frontend"])  # an unknown or absent one fails here
    with contextlib.ExitStack() as stack:
        normalize = stack.enter_context(jobs.beside(texts.normalize))  # wetext keeps the interpreter lock
        packings = [Packing(folder, normalize, tokenizer, settings) for folder in folders]
        for folder in folders:
            stack.enter_context(lock(folder))
        total, out = sum(len(packing.wavs) for packing in packings), ", ".join(str(p.out) for p in packings)
        if len(missing := lost(packings)) > jobs.MAX_LOSS * total:
            jobs.settle(missing, total, out)
        for packing in packings:
            packing.write()
        jobs.settle(lost(packings), total, out)
        for packing in packings:
            packing.put()
    return packings


def lost(packings: "Sequence[Packing]") -> dict[str, str]:
    return {utt: reason for packing in packings for utt, reason in packing.lost.items()}


class Packing:
    """One data directory on its way to shards.

    lost: {utt: reason}, for a start those that a table lacks; changed: {utt: text} where normalising changed it.
    """

    def __init__(self, folder: Path, normalize: Callable, tokenizer: texts.Tokenizer, settings: Mapping) -> None:
        self.folder, self.out, self.part = folder, folder / "parquet", folder / ".parquet.part"
        self.normalize, self.tokenizer, self.settings = normalize, tokenizer, settings
        self.wavs, self.tables, self.made_from = read_table(folder / "wav.scp"), {}, {}
        for name, stage in TABLES.items():
            self.tables[name] = load_archive(folder / f"{name}.pt") if stage else read_table(folder / name)
            if stage and (prints := folder / f"{name}.fingerprints").exists():
                self.made_from[stage] = read_table(prints)
        self.spks = load_archive(folder / "spk2embedding.pt")
        self.lost, self.changed, self.shards = {}, {}, []
        for utt in self.wavs:
            if lacking := next((name for name, table in self.tables.items() if utt not in table), None):
                self.lost[utt] = f"{folder / lacking} lacks it; run stage {TABLES[lacking]} again"
            elif (spk := self.tables["utt2spk"][utt]) not in self.spks:
                self.lost[utt] = f"{folder / 'spk2embedding.pt'} lacks its speaker {spk}; run stage 1 again"

    def write(self) -> None:
        """Write the shards beside their place."""
        shutil.rmtree(self.part, ignore_errors=True)
        frontend, model = self.settings["text"]["frontend"], self.settings["model"]
        metadata = {"tokenizer": self.tokenizer.fingerprint, "text_frontend": frontend, "model": model}
        self.shards = shards.write_shards(self.part, self.rows(), metadata)

    def rows(self) -> Iterator[dict]:
        """Yield what can be trained on, in the order of wav.scp."""
        utts = [utt for utt in self.wavs if utt not in self.lost]
        done = jobs.in_order(self.row, utts, self.settings["nj"])
        for utt, row in progress(done, len(utts), str(self.out)):
            if isinstance(row, BadInput):
                self.lost[utt] = str(row)
                continue
            if row["text"] != self.tables["text"][utt]:
                self.changed[utt] = row["text"]
            yield row

    def row(self, utt: str) -> dict:
        """Return an utterance as shards keep it. Raises BadInput when it cannot be trained on."""
        wav, tokens, spk = self.wavs[utt], self.tables["utt2speech_token"][utt], self.tables["utt2spk"][utt]
        text = self.normalize(self.tables["text"][utt], self.settings["text"]["frontend"])
        ids = np.array(self.tokenizer.encode(text), dtype=np.int32)
        if not 1 <= len(ids) <= MAX_TEXT_TOKENS:
            raise BadInput(f"{len(ids)} text tokens; an utterance has 1 to {MAX_TEXT_TOKENS}")
        for stage, prints in self.made_from.items():
            if extraction.has_changed(wav, prints.get(utt)):
                raise BadInput(f"{wav}: the recording changed, run stage {stage} again")
        feat = audio.log_mel(load_for_extraction(wav)[0]).numpy().astype(np.float16)  # (T, 80)
        if len(feat) != audio.MEL_PER_TOKEN * len(tokens):
            raise BadInput(f"{wav}: {len(feat)} mel frames for {len(tokens)} tokens; run stage 2 again")
        return {
            "utt": utt,
            "spk": spk,
            "text": text,
            "text_token": ids,
            "speech_token": tokens,
            "utt_embedding": self.tables["utt2embedding"][utt],
            "spk_embedding": self.spks[spk],
            "speech_feat": feat,
        }

    def put(self) -> None:
        """Let the shards take their place."""
        old = self.folder / ".parquet.old.part"
        shutil.rmtree(old, ignore_errors=True)
        if self.out.exists():
            self.out.rename(old)
        self.part.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)

    def summary(self) -> str:
        """Say where the shards are and how much they hold."""
        done, size = len(self.wavs) - len(self.lost), sum(path.stat().st_size for path in self.out.iterdir()) / 1e6
        return (
            f"{self.out}: {done} of {len(self.wavs)} utterances, {len(self.shards)} shards, {size:.1f} MB, "
            f"{len(self.changed)} texts changed by {self.settings['text']['frontend']}"
        )
