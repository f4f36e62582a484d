#!/usr/bin/env python3
"""Stage 3: pack what training reads: text ids, speech tokens, speaker vectors, log-mel.

    python tools/make_parquet.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp text utt2spk utt2embedding.pt spk2embedding.pt utt2speech_token.pt;
        pretrained_dir/CosyVoice-BlankEN, the tokenizer of texts
writes  DATA_DIR/parquet/NNNNN.parquet (1,024 utterances each), DATA_DIR/parquet/data.list

The text is normalised here as synthesis does it (text.frontend); up to 20 changed texts are shown.
"""

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np

from cosyvoice_ft import audio, cli, conf, jobs, shards, text
from cosyvoice_ft.extractors import load_archive, load_for_extraction
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.table import read_table

SHARD = 1024  # utterances
SHOWN = 20
MAX_TEXT_TOKENS = 200


def read_dir(folder: Path) -> dict[str, dict]:
    """Join the tables of a data directory: {utt: row without text_token and speech_feat}.

    Raises BadInput when a table lacks an utterance of wav.scp, naming it and the stage to run again.
    """
    tables = {name: read_table(folder / name) for name in ("wav.scp", "text", "utt2spk")}
    archives = {1: load_archive(folder / "utt2embedding.pt"), 2: load_archive(folder / "utt2speech_token.pt")}
    spk2embedding = load_archive(folder / "spk2embedding.pt")
    for stage, table in [(0, tables["text"]), (0, tables["utt2spk"]), *archives.items()]:
        missing = [utt for utt in tables["wav.scp"] if utt not in table]
        if len(missing) > jobs.MAX_LOSS * len(tables["wav.scp"]):
            raise BadInput(f"{folder}: {len(missing)} utterances of wav.scp are unknown to stage {stage}; run it again")
        for utt in missing:
            print(f"left out {utt}: stage {stage} did not make it")
            del tables["wav.scp"][utt]
    return {
        utt: {
            "utt": utt,
            "spk": tables["utt2spk"][utt],
            "wav": wav,
            "raw": tables["text"][utt],
            "speech_token": archives[2][utt],
            "utt_embedding": archives[1][utt],
            "spk_embedding": spk2embedding[tables["utt2spk"][utt]],
        }
        for utt, wav in tables["wav.scp"].items()
    }


def finished(row: dict, tokenizer: text.Tokenizer, frontend: str) -> dict:
    """Add text, text_token and speech_feat to a row. Raises BadInput when the utterance cannot be trained on."""
    spoken = text.normalize(row["raw"], frontend)
    ids = np.array(tokenizer.encode(spoken), dtype=np.int32)
    if not 1 <= len(ids) <= MAX_TEXT_TOKENS:
        raise BadInput(f"{len(ids)} text tokens; an utterance has 1 to {MAX_TEXT_TOKENS}")
    feat = audio.log_mel(load_for_extraction(row["wav"])[0]).numpy().astype(np.float16)
    if len(feat) != audio.MEL_PER_TOKEN * len(row["speech_token"]):
        raise BadInput(
            f"{len(feat)} mel frames for {len(row['speech_token'])} tokens: the recording changed, run stage 2"
        )
    return row | {"text": spoken, "text_token": ids, "speech_feat": feat}


def pack(folder: Path, tokenizer: text.Tokenizer, settings: dict) -> str:
    """Write the shards of one data directory; return its summary."""
    rows, frontend = read_dir(folder), settings["text"]["frontend"]
    out, part = folder / "parquet", folder / ".parquet.part"
    shutil.rmtree(part, ignore_errors=True)
    metadata = {"tokenizer": tokenizer.fingerprint, "text_frontend": frontend, "model": settings["model"]}
    paths, failed, changed = [], {}, []
    utts = list(rows)
    for start in range(0, len(utts), SHARD):
        group = {utt: rows[utt] for utt in utts[start : start + SHARD]}
        work = partial(finished, tokenizer=tokenizer, frontend=frontend)
        done, lost = jobs.for_each(work, group, what=f"{folder} {start}", nj=settings["nj"])
        failed |= lost
        changed += [row for row in done.values() if row["text"] != row["raw"]]
        if done:
            paths.append(part / f"{len(paths):05d}.parquet")
            shards.write_shard(paths[-1], list(done.values()), metadata)
    jobs.settle(failed, len(rows), out)
    shards.write_data_list(part / "data.list", paths)
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    for row in changed[:SHOWN]:
        print(f"  {row['utt']}: {row['raw']}\n  {' ' * len(row['utt'])}> {row['text']}")
    size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
    return (
        f"wrote {out}: {len(rows) - len(failed)} of {len(rows)} utterances, {len(paths)} shards, {size:.1f} MB, "
        f"{len(changed)} texts changed by {frontend}"
    )


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    tokenizer = text.Tokenizer(settings["pretrained_dir"])
    for folder in args.data_dir:
        start = time.monotonic()
        print(f"{pack(folder, tokenizer, settings)}, {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    cli.run(main)
