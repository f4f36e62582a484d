#!/usr/bin/env python3
"""Stage -1: the pretrained model into pretrained_dir, from a hub or from a folder that holds it.

    python tools/fetch_model.py --conf conf/paimon.yaml --pretrained_source modelscope
    python tools/fetch_model.py --conf conf/paimon.yaml --pretrained_source FOLDER

reads   pretrained_source: huggingface or modelscope, by their own Python packages, pretrained_id being the model there;
        or a folder, whose files are linked where the file system can do that, else copied
writes  pretrained_dir, whole or not at all; what is there already is left as it is

About 4 GB: only what this recipe and the official code need. A broken download goes on where it stopped.
"""

import importlib
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from cosyvoice_ft import cli, conf, model_dir
from cosyvoice_ft.files import BadInput

HUBS = {  # pretrained_source: (Python package with snapshot_download, pretrained_id)
    "huggingface": ("huggingface_hub", "FunAudioLLM/CosyVoice2-0.5B"),
    "modelscope": ("modelscope", "iic/CosyVoice2-0.5B"),
}


def download(source: str, hub_id: str, names: Iterable[str], part: Path) -> None:
    """Fetch the files `names` of a hub's model into `part`, going on with what is there. Raises BadInput."""
    package = HUBS[source][0]
    try:
        hub = importlib.import_module(package)
    except ImportError as error:
        command = f"{shlex.quote(sys.executable)} -m pip install {package}"
        raise BadInput(f"pretrained_source {source} needs the package {package} ({error}); type: {command}") from error
    print(f"fetching {hub_id} from {source}, about 4 GB", flush=True)
    part.mkdir(parents=True, exist_ok=True)
    try:
        hub.snapshot_download(hub_id, local_dir=str(part), allow_patterns=list(names))
    except Exception as error:  # each hub, and each HTTP library below it, raises classes of its own
        cause = error.__cause__ or error
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:120]
        others = " or ".join(name for name in HUBS if name != source)
        raise BadInput(
            f"{hub_id} cannot be fetched from {source} ({reason}); run it again to go on from {part}, or take "
            f"--pretrained_source {others} or a FOLDER that holds the model"
        ) from error


def source_folder(settings: Mapping) -> Path:
    """Return the folder that pretrained_source names. Raises BadInput when it is none, or holds another model."""
    source, model = settings["pretrained_source"], settings["model"]
    if source == "local":
        out = settings["pretrained_dir"]
        raise BadInput(f"{out} is missing; fetch it: --pretrained_source {' or '.join(HUBS)} or a FOLDER that holds it")
    if source == "tiny":
        raise BadInput(f"make it: python local/make_tiny_base.py {settings['pretrained_dir']}")
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise BadInput(f"pretrained_source: '{source}' is no folder and none of local, tiny, {', '.join(HUBS)}")
    if model_dir.release(folder) != model:
        name = model_dir.RELEASES[model_dir.release(folder)]
        raise BadInput(f"{folder}: holds {name}, the conf says {model}; give a folder of that model")
    return folder


def main() -> None:
    args, overrides = cli.parse_with_conf(cli.parser(__doc__))
    settings, start = conf.load_conf(args.conf, overrides), time.monotonic()
    out, source = Path(settings["pretrained_dir"]), settings["pretrained_source"]
    if out.exists():
        print(f"{out} is there")
        return
    part, needed = out.with_name(f".{out.name}.part"), model_dir.needed(settings["model"])
    names = (*needed, *model_dir.OPTIONAL)
    if source in HUBS:
        origin, holder = settings["pretrained_id"] or HUBS[source][1], part
        download(source, origin, names, part)
    else:
        origin = holder = source_folder(settings)
    for name in needed:
        if problem := model_dir.problem(holder / name):
            cure = f"run it again; if this stays, delete {part} first" if source in HUBS else "complete that folder"
            raise BadInput(f"{origin}: {name}: {problem}; {out} not made (fix: {cure})")
    if source not in HUBS:
        shutil.rmtree(part, ignore_errors=True)
        for name in filter(lambda name: (holder / name).is_file(), names):
            model_dir.link(holder / name, part / name)
    for extra in part.glob(".*"):  # what a hub's package keeps there to go on from
        shutil.rmtree(extra) if extra.is_dir() else extra.unlink()
    part.rename(out)
    files = [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e9
    print(f"wrote {out}: {len(files)} files, {size:.2f} GB from {origin}, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    cli.run(main)
