"""Settings: conf/cosyvoice2.yaml (every key and its default) <- a preset <- the speaker's yaml <- the command line.

Our own base file may say `!ref <key>` (HyperPyYAML). A speaker's yaml and the yaml inside a model directory are plain
data: tags construct nothing.
"""

import difflib
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, SequenceNode

from cosyvoice_ft.files import BadInput

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"

# Where a model directory's own yaml says what one of our keys says.
IN_MODEL_YAML = {
    "llm.mix_ratio": "llm.mix_ratio",
    "llm.lsm_weight": "llm.lsm_weight",
    "flow.estimator_num_heads": "flow.decoder.estimator.num_heads",
    "flow.chunk_size": "flow.encoder.static_chunk_size",
    "flow.dropout_rate": "flow.encoder.dropout_rate",
    "flow.sigma_min": "flow.decoder.cfm_params.content.sigma_min",
    "flow.inference_cfg_rate": "flow.decoder.cfm_params.content.inference_cfg_rate",
    "flow.training_cfg_rate": "flow.decoder.cfm_params.content.training_cfg_rate",
    "hift.upsample_rates": "hift.upsample_rates",
    "hift.resblock_dilation_sizes": "hift.resblock_dilation_sizes",
    "hift.source_resblock_dilation_sizes": "hift.source_resblock_dilation_sizes",
}
TRAINED = ("llm", "flow")  # sections of `train` that may override any key of `train`


class PlainConstructor(SafeConstructor):
    """Every unknown tag becomes the dict, list or text it stands on; nothing is constructed."""


def _plain(loader: SafeConstructor, _suffix: str, node) -> Iterator:
    if isinstance(node, MappingNode):
        value = {}
        yield value
        value.update(loader.construct_mapping(node, deep=True))
    elif isinstance(node, SequenceNode):
        value = []
        yield value
        value.extend(loader.construct_sequence(node, deep=True))
    else:
        yield loader.construct_scalar(node)


PlainConstructor.add_multi_constructor("", _plain)


def read_yaml(path: str | Path) -> dict:
    """Read a yaml as plain data. Raises BadInput for a missing file, bad yaml, a key given twice, no mapping."""
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = PlainConstructor
    try:
        data = yaml.load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error})") from error
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise BadInput(f"{where}: not valid yaml: {getattr(error, 'problem', None) or error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise BadInput(f"{path}: holds a {type(data).__name__}; the file is 'key: value' lines")
    return data


def to_yaml(data: Mapping) -> str:
    """Return plain yaml text of nested dicts, lists and scalars."""
    text = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.allow_unicode = True
    yaml.dump(dict(data), text)
    return text.getvalue()


def load_conf(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Return all settings as nested plain dicts: the base of `model`, its `preset`, the speaker's `path`, `overrides`.

    `overrides` are command-line words: ["--train.lr", "1e-5", "--device=cpu"].
    Raises BadInput for an unknown key at any depth and for a value of another kind than the default's.
    """
    given = read_yaml(path)
    words = _parse_overrides(overrides)
    model = words.get("model") or given.get("model") or "cosyvoice2"
    base_path = CONF_DIR / f"{model}.yaml"
    if not base_path.is_file():
        known = ", ".join(sorted(p.stem for p in CONF_DIR.glob("cosyvoice*.yaml")))
        raise BadInput(f"{path}: model: '{model}' is unknown; one of: {known}")
    base = read_base(base_path)
    if Path(path).resolve() == base_path:
        given = {}
    preset = words.get("preset") or given.get("preset")
    conf = _merge(base, _preset(preset), base, f"preset {preset}") if preset else base
    conf = _merge(conf, given, base, str(path))
    conf = _merge(conf, words, base, "command line")
    if "pretrained_dir" in words and "pretrained_source" not in words:
        conf["pretrained_source"] = "local"  # never make a tiny base where the user named a directory of their own
    conf["name"] = conf["name"] or Path(path).stem
    return conf


def _preset(name: str) -> dict:
    """Return the settings of conf/NAME.yaml or of another file. Raises BadInput for an unknown name."""
    path = CONF_DIR / f"{name}.yaml"
    if not path.is_file() and not Path(name).is_file():
        known = ", ".join(sorted(p.stem for p in CONF_DIR.glob("gpu*.yaml")))
        raise BadInput(f"preset: '{name}' is unknown; one of: {known}, or a yaml file")
    return read_yaml(path if path.is_file() else name)


def read_base(path: Path) -> dict:
    """Read one of our own base files, its `!ref`s resolved, as plain data."""
    from hyperpyyaml import resolve_references

    with open(path, encoding="utf-8") as file:
        return YAML(typ="safe", pure=True).load(resolve_references(file))


def _parse_overrides(words: Sequence[str]) -> dict:
    """Turn ["--a.b", "1"] or ["--a.b=1"] into {"a": {"b": 1}}; a value is read as yaml."""
    tree, queue = {}, list(words)
    while queue:
        key, equals, value = queue.pop(0).partition("=")
        if not key.startswith("--") or len(key) < 3:
            raise BadInput(f"command line: '{key}' is not an option; options are --key value")
        if not equals:
            if not queue:
                raise BadInput(f"command line: {key} needs a value")
            value = queue.pop(0)
        *parents, leaf = key[2:].split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        try:
            node[leaf] = YAML(typ="safe", pure=True).load(value)
        except YAMLError:
            node[leaf] = value
    return tree


def _merge(conf: Mapping, changes: Mapping, base: Mapping, source: str, where: str = "") -> dict:
    """Return `conf` with `changes` put in; each key must stand in `base`, each value be of the default's kind."""
    merged = dict(conf)
    for key, value in changes.items():
        name = f"{where}{key}"
        if key not in base:
            raise BadInput(f"{source}: unknown key '{name}'{_suggestion(str(key), base, where)}")
        default = base[key]
        if isinstance(default, Mapping):
            if not isinstance(value, Mapping):
                raise BadInput(f"{source}: '{name}' is a group; give its keys: {', '.join(default)}")
            allowed = default
            if where == "train." and key in TRAINED:
                allowed = {k: v for k, v in base.items() if k not in TRAINED} | default
            merged[key] = _merge(conf[key], value, allowed, source, f"{name}.")
        else:
            merged[key] = _checked(value, default, f"{source}: '{name}'")
    return merged


def _suggestion(key: str, base: Mapping, where: str) -> str:
    if where == "train." and (owners := [part for part in TRAINED if key in base[part]]):
        return "; say which: " + " or ".join(f"train.{part}.{key}" for part in owners)
    close = difflib.get_close_matches(key, [str(k) for k in base], 1)
    return f"; did you mean '{where}{close[0]}'?" if close else f"; known here: {', '.join(map(str, base))}"


def _checked(value, default, what: str):
    """Return `value` when it is of the kind of `default` (None: any kind); int passes for float."""
    if default is None or value is None:
        return value
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(default, bool) != isinstance(value, bool) or not isinstance(value, type(default)):
        raise BadInput(f"{what} is {value!r}; it is a {type(default).__name__} like {default!r}")
    return value


def training_settings(conf: Mapping, part: str) -> dict:
    """Return the settings of one training, "llm" or "flow": those of `train`, then those of `train.<part>`."""
    return {key: value for key, value in conf["train"].items() if key not in TRAINED} | conf["train"][part]


def check_model_yaml(conf: Mapping, model_dir: str | Path) -> None:
    """Compare `conf` with what the model directory's own yaml says of the same things.

    Raises BadInput naming both when a value disagrees.
    """
    path = Path(model_dir) / f"{conf['model']}.yaml"
    data = read_yaml(path)
    for ours, theirs in IN_MODEL_YAML.items():
        want, have = _look_up(conf, ours), _look_up(data, theirs)
        while isinstance(have, str) and have.startswith("<") and have.endswith(">"):
            have = data.get(have[1:-1])  # `!ref <key>`
        if have is not None and have != want:
            raise BadInput(f"{ours} is {want} in the conf, but {theirs} is {have} in {path}; make them agree")


def _look_up(data, dotted: str):
    for key in dotted.split("."):
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
