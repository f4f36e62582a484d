#!/usr/bin/env python3
"""Stage 1: the voice of every utterance and of every speaker as 192 numbers (CAM++, campplus.onnx).

    python tools/extract_embedding.py data/demo/train data/demo/dev --conf conf/demo.yaml

reads   DATA_DIR/wav.scp, DATA_DIR/utt2spk; pretrained_dir/campplus.onnx
writes  DATA_DIR/utt2embedding.pt {utt: (192,) float32}
        DATA_DIR/spk2embedding.pt {spk: (192,) float32}, the mean over the speaker's utterances in all DATA_DIRs
"""

import time
from pathlib import Path

import numpy as np

from cosyvoice_ft import cli, conf, device, jobs
from cosyvoice_ft.extractors import SpeakerEncoder, load_for_extraction, save_archive
from cosyvoice_ft.table import read_table


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("data_dir", type=Path, nargs="+")
    args, overrides = cli.parse_with_conf(parser)
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    where = device.torch_device(settings["device"])
    providers = device.onnx_providers(where)
    print(device.describe(where, providers))

    wavs = {folder: read_table(folder / "wav.scp") for folder in args.data_dir}
    spks = {folder: read_table(folder / "utt2spk") for folder in args.data_dir}
    encoder = SpeakerEncoder(Path(settings["pretrained_dir"]) / "campplus.onnx", providers)

    def vector(path: str) -> np.ndarray:
        return encoder(load_for_extraction(path)[1])

    paths = {utt: path for table in wavs.values() for utt, path in table.items()}
    vectors, failed = jobs.for_each(vector, paths, what="speaker vectors", nj=settings["nj"])
    jobs.settle(failed, len(paths), "utt2embedding.pt")

    by_speaker: dict[str, list[np.ndarray]] = {}
    for utt, spk in ((utt, spk) for table in spks.values() for utt, spk in table.items() if utt in vectors):
        by_speaker.setdefault(spk, []).append(vectors[utt])
    means = {spk: np.mean(members, axis=0) for spk, members in by_speaker.items()}
    for folder in args.data_dir:
        save_archive(folder / "utt2embedding.pt", {utt: vectors[utt] for utt in wavs[folder] if utt in vectors})
        save_archive(
            folder / "spk2embedding.pt", {spk: means[spk] for spk in set(spks[folder].values()) if spk in means}
        )
    folders = " ".join(str(folder) for folder in args.data_dir)
    seconds = time.monotonic() - start
    print(
        f"wrote utt2embedding.pt spk2embedding.pt in {folders}: {len(vectors)} of {len(paths)} utterances, "
        f"{len(means)} speakers, {seconds:.1f} s"
    )


if __name__ == "__main__":
    cli.run(main)
