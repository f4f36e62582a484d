#!/usr/bin/env python3
"""Stage 6, second half: a complete model directory from the base and the tuned weights.

    python tools/make_model_dir.py exp/demo/model data/demo/train --llm exp/demo/llm/average.pt \\
        --flow exp/demo/flow/average.pt --conf conf/demo.yaml

reads   pretrained_dir, the tuned weights, DATA_DIR (spk2embedding.pt utt2embedding.pt utt2speech_token.pt utt2dur ...)
writes  MODEL_DIR: llm.pt flow.pt hift.pt spk2info.pt model.json README.md, and the base's yaml, ONNX models and
        CosyVoice-BlankEN, byte for byte (linked; --copy copies them, for handing out)

The official CosyVoice code and tools/synthesize.py both take it as it is. What is not given comes from the base.
"""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch

from cosyvoice_ft import checkpoint, cli, conf, text
from cosyvoice_ft.extractors import load_archive, load_for_extraction
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.model_dir import link, needed
from cosyvoice_ft.synthesis import Voice, load_model, with_prompt
from cosyvoice_ft.table import read_table

# Of the base only these travel: an estimator or an encoder that was exported from it would hide the tuned weights.
TAKEN = ("hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx", "speech_tokenizer_v2.batch.onnx")
PROMPT_SECONDS = (4.0, 10.0)

README = """\
# A voice fine-tuned with cosyvoice_ft

Base: {base}. Tuned: {tuned}. Speakers: {speakers}.
{corpus} Commit of the recipe: {commit}.

With the recipe:

    python tools/synthesize.py {name} sentences.txt out

With the official CosyVoice code (model_dir: this folder):

    from cosyvoice.cli.cosyvoice import CosyVoice2
    model = CosyVoice2(model_dir)
    for part in model.inference_sft("...", "{speaker}"):
        part["tts_speech"]                                    # (1, T) at 24 kHz
    for part in model.inference_zero_shot("...", "", "", zero_shot_spk_id="{speaker}"):
        part["tts_speech"]

For load_trt=True, export the estimator from this folder first (its cosyvoice/bin/export_onnx.py): the base's own was
left out, because it would be used in place of the tuned weights.
"""


def take(source: Path, target: Path, copy: bool) -> None:
    """Link a file (see model_dir.link), or copy it when asked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if copy:
        shutil.copy2(source, target)
    else:
        link(source, target)


def fill(part: Path, base: Path, tuned: dict[str, Path], settings: dict, copy: bool) -> None:
    """Put weights, ONNX models, yaml and tokenizer into `part`. Raises BadInput when tuned weights do not fit."""
    for name in TAKEN:
        if (base / name).is_file():
            take(base / name, part / name, copy)
    for path in sorted((base / text.TOKENIZER_DIR).iterdir()):
        if path.is_file():
            take(path, part / text.TOKENIZER_DIR / path.name, copy)
    yaml = f"{settings['model']}.yaml"
    take(base / yaml, part / yaml, copy)
    for name, weights in tuned.items():
        load_model(name, base, settings, weights)
        take(weights, part / f"{name}.pt", copy)


def prompt_of(spk: str, utts: list[str], vectors: dict, mean: np.ndarray, seconds: dict[str, float], wish: str | None):
    """Return the utterance to prompt with: the one wished for, else of 4 to 10 s the nearest to the mean (cosine)."""
    if wish in utts:
        return wish
    low, high = PROMPT_SECONDS
    middle = (low + high) / 2
    fitting = [utt for utt in utts if low <= seconds[utt] <= high]
    if not fitting:
        return min(utts, key=lambda utt: abs(seconds[utt] - middle))
    unit = mean / np.linalg.norm(mean)
    return max(fitting, key=lambda utt: float(vectors[utt] @ unit / np.linalg.norm(vectors[utt])))


def corpus_voices(data: Path, base: Path, settings: dict) -> tuple[dict[str, Voice], dict[str, str]]:
    """Return the voices of a data directory, each with its prompt, and the utterance each prompt is."""
    tokenizer, wish = text.Tokenizer(base), settings["voice"]["prompt_utt"]
    wavs, texts, utt2dur = (read_table(data / name) for name in ("wav.scp", "text", "utt2dur"))
    vectors, tokens = load_archive(data / "utt2embedding.pt"), load_archive(data / "utt2speech_token.pt")
    seconds = {utt: float(value) for utt, value in utt2dur.items()}
    if wish and wish not in wavs:
        raise BadInput(f"voice.prompt_utt: '{wish}' is no utterance of {data}; look at {data / 'utt2dur'} for the ids")
    members: dict[str, list[str]] = {}
    for utt, spk in read_table(data / "utt2spk").items():
        if utt in vectors and utt in tokens:
            members.setdefault(spk, []).append(utt)
    voices, prompts = {}, {}
    for spk, mean in load_archive(data / "spk2embedding.pt").items():
        if spk not in members:
            continue
        utt = prompts[spk] = prompt_of(spk, members[spk], vectors, mean, seconds, wish)
        prompt_text = tokenizer.encode(text.normalize(texts[utt], settings["text"]["frontend"]))
        voice = Voice(torch.from_numpy(mean.copy())[None])
        voices[spk] = with_prompt(voice, load_for_extraction(wavs[utt])[0], tokens[utt], prompt_text)
    return voices, prompts


def facts_of(out: Path, data: Path, tuned: dict[str, Path | None], settings: dict, prompts: dict[str, str]) -> dict:
    """Return what model.json says: where the weights come from, on how much speech, and by which code."""
    seconds = [float(value) for value in read_table(data / "utt2dur").values()]
    epochs = {
        name: conf.read_yaml(path.with_suffix(".yaml")).get("epochs")
        for name, path in tuned.items()
        if path and path.with_suffix(".yaml").is_file()
    }
    return {
        "name": str(out),
        "model": settings["model"],
        "base": Path(settings["pretrained_dir"]).name,
        "tuned": {name: path is not None for name, path in tuned.items()},
        "epochs_averaged": epochs,
        "corpus": {"utterances": len(seconds), "minutes": round(sum(seconds) / 60, 1)},
        "prompts": prompts,
        "commit": commit(),
    }


def commit() -> str:
    """Return the commit of the recipe, "unknown" without git."""
    if not shutil.which("git"):
        return "unknown"
    done = subprocess.run(["git", "describe", "--always", "--dirty"], text=True, capture_output=True)
    return done.stdout.strip() or "unknown"


def describe(part: Path, facts: dict, speakers: list[str]) -> None:
    """Write model.json and README.md."""
    corpus = facts["corpus"]
    tuned = [name + (f" (epochs {facts['epochs_averaged'][name]})" if name in facts["epochs_averaged"] else "")
             for name, yes in facts["tuned"].items() if yes]  # fmt: skip
    (part / "model.json").write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (part / "README.md").write_text(
        README.format(
            base=facts["base"],
            tuned=", ".join(tuned) or "nothing",
            speakers=", ".join(speakers),
            corpus=f"Trained on {corpus['utterances']} utterances, {corpus['minutes']} minutes.",
            commit=facts["commit"],
            name=facts["name"],
            speaker=speakers[-1],
        ),
        encoding="utf-8",
    )


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("data_dir", type=Path)
    parser.add_argument("--llm", type=Path, metavar="PT", help="tuned language model")
    parser.add_argument("--flow", type=Path, metavar="PT", help="tuned flow-matching model")
    parser.add_argument("--copy", action="store_true", help="copy instead of linking, for handing the directory out")
    args, overrides = cli.parse_with_conf(parser)
    settings = conf.load_conf(args.conf, overrides)
    base, out = Path(settings["pretrained_dir"]), args.model_dir
    missing = [name for name in needed(settings["model"]) if not (base / name).is_file()]
    if missing:
        raise BadInput(f"{base}: lacks {', '.join(missing)}; fetch the pretrained model again")
    given = {"llm": args.llm, "flow": args.flow}

    part, old = out.with_name(f".{out.name}.part"), out.with_name(f".{out.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    fill(part, base, {name: path or base / f"{name}.pt" for name, path in given.items()}, settings, args.copy)
    voices, prompts = corpus_voices(args.data_dir, base, settings)
    info = checkpoint.load(base / "spk2info.pt") if (base / "spk2info.pt").is_file() else {}
    info |= {spk: voice.to_info() for spk, voice in voices.items()}
    checkpoint.save(part / "spk2info.pt", info)
    describe(part, facts_of(out, args.data_dir, given, settings, prompts), list(info))
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    parts = ", ".join(f"{name} from {path or base / f'{name}.pt'}" for name, path in given.items())
    chosen = ", ".join(f"{spk} (prompt {utt})" for spk, utt in prompts.items())
    print(f"wrote {out}: {parts}; speakers {chosen}")


if __name__ == "__main__":
    cli.run(main)
