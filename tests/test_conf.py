"""Settings: defaults, the speaker's yaml, the command line; nothing unknown passes, nothing foreign is constructed."""

import pytest

from cosyvoice_ft.conf import CONF_DIR, check_model_yaml, load_conf, read_yaml, to_yaml, training_settings
from cosyvoice_ft.files import BadInput

SHIPPED = sorted(CONF_DIR.glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_conf_loads(path):
    conf = load_conf(path)
    assert conf["name"] == path.stem and conf["model"] == "cosyvoice2"
    for part in ("llm", "flow"):
        assert training_settings(conf, part)["lr"] > 0


def test_later_wins(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("train: {lr: 2.0e-5, llm: {max_epoch: 3}}\n")
    conf = load_conf(path, ["--train.lr", "3e-5", "--train.flow.lr=4e-5", "--corpus.dir", "a b"])
    assert conf["name"] == "x" and conf["corpus"]["speaker"] is None and conf["corpus"]["dir"] == "a b"
    llm, flow = training_settings(conf, "llm"), training_settings(conf, "flow")
    assert (llm["lr"], flow["lr"], llm["max_epoch"]) == (3e-5, 4e-5, 3)
    assert (
        "flow" not in llm and flow["max_epoch"] == load_conf(CONF_DIR / "cosyvoice2.yaml")["train"]["flow"]["max_epoch"]
    )


def test_a_preset_lies_below_the_speaker(tmp_path):
    """Base <- preset <- speaker's yaml <- command line, whichever of the two last names the preset."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("train: {llm: {max_batch: 5000}}")
    conf = load_conf(mine, ["--preset", "gpu12g"])
    llm, flow = (training_settings(conf, part) for part in ("llm", "flow"))
    assert llm["max_batch"] == 5000 and llm["checkpointing"] and "embed_tokens" in llm["freeze"][0]
    assert flow["max_batch"] == 4000 and not flow["checkpointing"]
    mine.write_text("preset: gpu24g")
    conf = load_conf(mine, ["--train.flow.max_batch", "7"])
    assert conf["train"]["llm"]["max_batch"] == 6000 and conf["train"]["flow"]["max_batch"] == 7
    with pytest.raises(BadInput, match="preset: 'gpu8g' is unknown; one of: gpu12g, gpu24g, gpu80g"):
        load_conf(mine, ["--preset", "gpu8g"])


@pytest.mark.parametrize(
    ("yaml", "words", "says"),
    [
        ("trian: 1", [], "unknown key 'trian'; did you mean 'train'"),
        ("train: {lrr: 1}", [], "unknown key 'train.lrr'; did you mean 'train.lr'"),
        ("llm: {sampling: {topp: 1}}", [], "unknown key 'llm.sampling.topp'"),
        ("train: {max_epoch: 3}", [], "train.llm.max_epoch or train.flow.max_epoch"),
        ("train: 3", [], "'train' is a group"),
        ("train: {lr: fast}", [], "'train.lr' is 'fast'; it is a float"),
        ("model: cosyvoice9", [], "model: 'cosyvoice9' is unknown; one of: cosyvoice2"),
        ("a: 1\na: 2", [], ":2: not valid yaml"),
        ("- a", [], "holds a list"),
        ("", ["--train.lr"], "--train.lr needs a value"),
        ("", ["lr", "1"], "'lr' is not an option"),
        ("", ["--flow.chunk_size", "many"], "command line: 'flow.chunk_size' is 'many'; it is a int"),
    ],
)
def test_bad_settings_end_in_one_line(tmp_path, yaml, words, says):
    path = tmp_path / "x.yaml"
    path.write_text(yaml)
    with pytest.raises(BadInput) as error:
        load_conf(path, words)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_directory_of_ones_own_is_never_made(tmp_path):
    assert load_conf(CONF_DIR / "demo.yaml")["pretrained_source"] == "tiny"
    assert load_conf(CONF_DIR / "demo.yaml", ["--pretrained_dir", "x"])["pretrained_source"] == "local"


def test_foreign_yaml_constructs_nothing(tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text(
        f"a: !apply:os.system ['touch {tmp_path}/run']\nb: !!python/object/apply:os.system ['touch {tmp_path}/run']\n"
        "c: !new:some.Class\n    x: !ref <y>\n    z: [1, 2]\ny: 3\n"
    )
    data = read_yaml(path)
    assert not (tmp_path / "run").exists()
    assert data["c"] == {"x": "<y>", "z": [1, 2]} and data["a"] == [f"touch {tmp_path}/run"]


def test_conf_and_model_yaml_must_agree(tiny_base):
    conf = load_conf(CONF_DIR / "demo.yaml")
    check_model_yaml(conf, tiny_base)
    conf["flow"]["chunk_size"] = 50
    with pytest.raises(
        BadInput, match=r"flow\.chunk_size is 50 in the conf.*static_chunk_size is 25 in .*cosyvoice2\.yaml"
    ):
        check_model_yaml(conf, tiny_base)


def test_plain_yaml_comes_back(tmp_path):
    conf = load_conf(CONF_DIR / "demo.yaml")
    (tmp_path / "conf.yaml").write_text(to_yaml(conf))
    assert read_yaml(tmp_path / "conf.yaml") == conf
