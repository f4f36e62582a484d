"""Stages 1 to 3: killed, changed, shared and broken, they end in the same bytes, or say why not and leave what was."""

import gc
import importlib.util
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from onnx import TensorProto, helper, numpy_helper

from cosyvoice_ft import audio, extraction, jobs, shards, text
from cosyvoice_ft.extractors import (
    BatchSpeechTokenizer,
    SpeakerEncoder,
    SpeechTokenizer,
    load_archive,
    load_for_extraction,
)
from cosyvoice_ft.files import BadInput, fingerprint, lock
from cosyvoice_ft.table import read_table, write_data_dir

ROOT = Path(__file__).resolve().parent.parent
CPU = ["CPUExecutionProvider"]
TOOLS = {1: "extract_embedding", 2: "extract_speech_token", 3: "make_parquet"}
MADE = {1: "utt2embedding.pt", 2: "utt2speech_token.pt", 3: "parquet"}
PROCESSES = multiprocessing.get_context("forkserver")  # real processes, but torch is imported once
PROCESSES.set_forkserver_preload(["onnxruntime", "whisper", "transformers", "cosyvoice_ft.packing"])


def run_stage(stage, folder, base, *words):
    """Call the main() of a stage's tool on FOLDER/train and FOLDER/dev."""
    spec = importlib.util.spec_from_file_location(TOOLS[stage], ROOT / f"tools/{TOOLS[stage]}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    argv, threads = sys.argv, torch.get_num_threads()
    sys.argv = [TOOLS[stage], *map(str, (folder / "train", folder / "dev")), "--conf", str(ROOT / "conf/tiny.yaml")]
    sys.argv += ["--pretrained_dir", str(base), "--device", "cpu", "--text.frontend", "plain", *map(str, words)]
    try:
        tool.main()
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)


def small_parts():
    """A part after every utterance, shards of 8 utterances in row groups of 4."""
    extraction.PART_SECONDS, shards.SHARD, shards.ROW_GROUP = 0.0, 8, 4


def child(stage, folder, base, said, *, moment=(), env=(), limit=None):
    """Run a stage in this process, made for it.

    moment: (name, number, "before" | "after") - die by SIGKILL around the number-th move of a file to a path that holds
    `name`; or so many seconds after the start, with every recording slowed down. limit: bytes a file may have.
    What the stage and a BadInput say goes to the file `said`.
    """
    os.environ.update(env)
    small_parts()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    moves, seen = {"replace": os.replace, "rename": os.rename}, []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def moved(source, target, move):
        name, number, when = moment
        seen.extend([target] * (name in str(target)))
        if name in str(target) and len(seen) == number and when == "before":
            die()
        moves[move](source, target)
        if name in str(target) and len(seen) == number and when == "after":
            die()

    if isinstance(moment, float):
        load = audio.load_wav
        audio.load_wav = lambda *args: time.sleep(0.05) or load(*args)
        threading.Timer(moment, die).start()
    elif moment:
        os.replace = lambda source, target: moved(source, target, "replace")
        os.rename = lambda source, target: moved(source, target, "rename")
    with open(said, "w") as sys.stdout:
        try:
            run_stage(stage, folder, base)
        except BadInput as error:
            sys.stdout.write(f"ERROR {error}")


def process(stage, folder, base, **options):
    """Run a stage in a process of its own; return (how it ended, what it said)."""
    said = folder / f"said.{options.get('env', {}).get('RANK', 0)}"
    started = PROCESSES.Process(target=child, args=(stage, folder, base, said), kwargs=options)
    started.start()
    started.join()
    return started.exitcode, said.read_text()


def contents(folder):
    """{name: bytes} of all that lies in a data directory but locks."""
    paths = [path for part in ("train", "dev") for path in (folder / part).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != ".lock"}


def said_of(said, part):
    """What the first lines say of `part`."""
    return next(line for line in said.splitlines() if f"/{part}/" in line).partition(".pt: ")[2]


@pytest.fixture(scope="module")
def data(root, tmp_path_factory):
    """train of 20 and dev of 4 clips, a second each, of two speakers."""
    folder, rows = tmp_path_factory.mktemp("stages"), []
    (folder / "wavs").mkdir()
    for number, path in enumerate(sorted((root / "local/demo/wavs").glob("*.flac"))[:24]):
        wav, rate = soundfile.read(path)
        clip = folder / f"wavs/{path.stem}.wav"
        soundfile.write(clip, wav[: rate + 137 * number], rate)
        rows.append({"utt": path.stem, "wav": clip, "text": "hello", "spk": f"s{number % 2}", "seconds": 1})
    write_data_dir(folder / "train", rows[:20])
    write_data_dir(folder / "dev", rows[20:])
    return folder


@pytest.fixture(scope="module")
def finished(data, tiny_base, tmp_path_factory):
    """{stage: folder} as a run that nothing happened to left it; 0: nothing done."""
    before = extraction.PART_SECONDS, shards.SHARD, shards.ROW_GROUP
    shards.SHARD, shards.ROW_GROUP = 8, 4
    folders = {0: data}
    for stage in TOOLS:
        folders[stage] = tmp_path_factory.mktemp(f"after{stage}")
        copy(folders[stage - 1], folders[stage])
        run_stage(stage, folders[stage], tiny_base)
    extraction.PART_SECONDS, shards.SHARD, shards.ROW_GROUP = before
    return folders


@pytest.fixture
def small(monkeypatch):
    for module, name in ((extraction, "PART_SECONDS"), (shards, "SHARD"), (shards, "ROW_GROUP")):
        monkeypatch.setattr(module, name, getattr(module, name))
    small_parts()


@pytest.fixture
def extracted(monkeypatch):
    """The paths whose audio the stage read."""
    paths = []
    load = extraction.load_for_extraction
    monkeypatch.setattr(extraction, "load_for_extraction", lambda path: paths.append(path) or load(path))
    return paths


def copy(source, target):
    for part in ("train", "dev"):
        shutil.copytree(source / part, target / part, dirs_exist_ok=True)
    return target


def own_wav(folder, utt, part="train"):
    """Give an utterance a copy of its recording that a test may spoil; return its path."""
    table = read_table(folder / part / "wav.scp")
    wav = folder / f"{utt}.wav"
    shutil.copy(table[utt], wav)
    lines = [f"{key} {wav if key == utt else path}\n" for key, path in table.items()]
    (folder / part / "wav.scp").write_text("".join(lines))
    return wav


def base_with(tiny_base, folder, name, value):
    """A pretrained directory whose model `name` gives `value`, whatever it hears."""
    shutil.copytree(tiny_base, folder)
    old = onnx.load(folder / name)
    constant = helper.make_node("Constant", [], [old.graph.output[0].name], value=numpy_helper.from_array(value))
    kind = TensorProto.FLOAT if value.dtype == np.float32 else TensorProto.INT32
    output = helper.make_tensor_value_info(old.graph.output[0].name, kind, value.shape)
    graph = helper.make_graph([constant], "made", list(old.graph.input), [output])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]), folder / name)
    return folder


# ---- killed


@pytest.mark.parametrize(
    ("stage", "moment", "done"),
    [
        (1, ("parts/0/00001.pt", 1, "before"), 0),
        (1, ("parts/0/00001.pt", 1, "after"), 1),
        (1, ("parts/0/00007.pt", 1, "after"), 7),
        (1, ("dev/utt2embedding.pt", 1, "before"), 20),
        (1, ("train/utt2embedding.pt", 1, "after"), 20),
        (1, ("spk2embedding.pt", 1, "before"), 20),
        (1, 0.4, None),
        (2, ("parts/0/00001.pt", 1, "after"), 1),
        (2, ("parts/0/00013.pt", 1, "before"), 12),
        (2, ("utt2speech_token.pt", 2, "after"), 20),
        (2, ("train/utt2speech_token.fingerprints", 1, "before"), 20),
        (2, 0.5, None),
        (3, ("00000.parquet", 1, "before"), None),
        (3, ("00000.parquet", 1, "after"), None),
        (3, ("dev/.parquet.part/data.list", 1, "after"), None),
        (3, ("train/parquet", 1, "before"), None),
        (3, ("dev/parquet", 1, "before"), None),
        (3, 0.6, None),
    ],
    ids=str,
)
def test_killed_and_run_again(finished, tiny_base, tmp_path, small, extracted, capsys, stage, moment, done):
    """The same files byte for byte as never killed; only what was unfinished is done again."""
    folder = copy(finished[stage - 1], tmp_path)
    status, _ = process(stage, folder, tiny_base, moment=moment)
    assert status == -signal.SIGKILL
    run_stage(stage, folder, tiny_base)
    assert contents(folder) == contents(finished[stage])
    if done is not None:
        state = "starts" if not done else "was finished" if done == 20 else "goes on"
        assert said_of(capsys.readouterr().out, "train") == f"{state}: {done} of 20 utterances are done"
        assert len([path for path in extracted if path in read_table(folder / "train/wav.scp").values()]) == 20 - done


def test_shards_killed_between_old_and_new(finished, tiny_base, tmp_path, small):
    """An earlier parquet/ stays until the new one is complete; it is never there in parts."""
    folder = copy(finished[3], tmp_path)
    before = contents(folder)
    process(3, folder, tiny_base, moment=("dev/.parquet.part/data.list", 1, "before"))
    assert contents(folder).items() >= before.items()
    process(3, folder, tiny_base, moment=("train/.parquet.old.part", 1, "after"))
    assert not (folder / "train/parquet").exists() and (folder / "dev/parquet/data.list").exists()
    run_stage(3, folder, tiny_base)
    assert contents(folder) == before


# ---- what is done again


@pytest.mark.parametrize("stage", [1, 2])
def test_only_what_changed_is_done_again(finished, tiny_base, tmp_path, extracted, capsys, stage):
    folder = copy(finished[stage], tmp_path)

    def again(base=tiny_base):
        extracted.clear()
        run_stage(stage, folder, base)
        return said_of(capsys.readouterr().out, "train")

    before = contents(folder)
    assert again() == "was finished: 20 of 20 utterances are done" and not extracted
    assert contents(folder) == before

    wav, other = own_wav(folder, "demo_003"), own_wav(folder, "demo_005")
    os.utime(other, (1, 1))
    assert again() == "was finished: 20 of 20 utterances are done" and not extracted
    archive = f"train/{MADE[stage]}"
    assert contents(folder)[archive] == before[archive]

    samples, rate = soundfile.read(wav)
    times = wav.stat()
    soundfile.write(wav, samples[::-1], rate)
    os.utime(other, (2, 2))
    assert wav.stat().st_size == times.st_size
    assert again() == "goes on: 19 of 20 utterances are done; 1 recordings have changed" and extracted == [str(wav)]
    old, new = load_archive(finished[stage] / archive), load_archive(folder / archive)
    assert [utt for utt in old if not np.array_equal(old[utt], new[utt])] == ["demo_003"]

    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    model = base / ("campplus.onnx" if stage == 1 else "speech_tokenizer_v2.onnx")
    onnx.save(onnx.load(model), model)
    graph = onnx.load(model)
    graph.doc_string = "another model"
    onnx.save(graph, model)
    assert again(base) == "starts: 0 of 20 utterances are done; another model made what is there"
    assert len(extracted) == 24 and list(load_archive(folder / archive)) == list(old)


def test_order_and_members_follow_wav_scp(finished, tiny_base, tmp_path, extracted):
    folder = copy(finished[1], tmp_path)
    lines = (folder / "train/wav.scp").read_text().splitlines()[:0:-1]
    (folder / "train/wav.scp").write_text("\n".join(lines) + "\n")
    run_stage(1, folder, tiny_base)
    assert not extracted and list(load_archive(folder / "train/utt2embedding.pt")) == [
        line.split()[0] for line in lines
    ]


# ---- several processes


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("order", ["together", "0 1", "1 0"])
def test_two_ranks_give_the_bytes_of_one(finished, tiny_base, tmp_path, stage, order):
    folder = copy(finished[stage - 1], tmp_path)
    environments = [{"RANK": rank, "WORLD_SIZE": "2"} for rank in (order.split() if order != "together" else "01")]
    if order == "together":
        arguments = [((stage, folder, tiny_base, folder / f"said.{env['RANK']}"), {"env": env}) for env in environments]
        started = [PROCESSES.Process(target=child, args=args, kwargs=options) for args, options in arguments]
        for one in started:
            one.start()
        for one in started:
            one.join()
        assert [one.exitcode for one in started] == [0, 0]
    else:
        status, said = process(stage, folder, tiny_base, env=environments[0])
        assert status == 0 and "12 of 24 utterances are with others" in said
        assert f"the share of {order[0]}, of 20 in all" in said and not (folder / "train" / MADE[stage]).exists()
        assert process(stage, folder, tiny_base, env=environments[1])[0] == 0
    assert contents(folder) == contents(finished[stage])


def test_work_of_two_ranks_is_finished_by_one(finished, tiny_base, tmp_path, extracted):
    """Rank 1 of 2 dies; a run without ranks takes what both have done."""
    folder = copy(finished[1], tmp_path)
    moment = ("train/utt2speech_token.parts/1/00004", 1, "after")
    process(2, folder, tiny_base, env={"RANK": "0", "WORLD_SIZE": "2"})
    process(2, folder, tiny_base, env={"RANK": "1", "WORLD_SIZE": "2"}, moment=moment)
    run_stage(2, folder, tiny_base)
    assert len(extracted) == 12 - 4 and contents(folder) == contents(finished[2])


@pytest.mark.parametrize("place", [("2", "2"), ("-1", "2"), ("0", "many")])
def test_bad_ranks(place, monkeypatch):
    monkeypatch.setenv("RANK", place[0])
    monkeypatch.setenv("WORLD_SIZE", place[1])
    with pytest.raises(BadInput, match="ranks go from 0 to WORLD_SIZE - 1"):
        extraction.place()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_runs_at_once(finished, tiny_base, tmp_path, stage):
    folder = copy(finished[stage - 1], tmp_path)
    held = folder / "train" / (f"{Path(MADE[stage]).stem}.parts/0" if stage < 3 else "")
    with lock(held), pytest.raises(BadInput, match="another run is at work"):
        run_stage(stage, folder, tiny_base)
    run_stage(stage, folder, tiny_base)


# ---- what cannot be used


@pytest.mark.parametrize("stage", [1, 2])
def test_a_corrupt_recording_costs_one_utterance(finished, tiny_base, tmp_path, extracted, capsys, stage):
    """It is named and left out, and tried again by the next run; too many stop the stage, and what is done stays."""
    folder = copy(finished[stage - 1], tmp_path)
    good = own_wav(folder, "demo_003")
    kept = good.read_bytes()
    good.write_bytes(kept[:1000])
    run_stage(stage, folder, tiny_base)
    said = capsys.readouterr()
    assert f"left out demo_003: {good}: " in said.err and "23 of 24 utterances" in said.out
    assert "demo_003" not in load_archive(folder / "train" / MADE[stage])
    good.write_bytes(kept)
    extracted.clear()
    run_stage(stage, folder, tiny_base)
    assert extracted == [str(good)] and len(load_archive(folder / "train" / MADE[stage])) == 20

    empty = copy(finished[stage - 1], tmp_path / "two")
    broken = [own_wav(empty, utt) for utt in ("demo_003", "demo_005")]
    for wav in broken:
        wav.unlink()
    with pytest.raises(BadInput, match="2 of 24 utterances failed, more than 5%"):
        run_stage(stage, empty, tiny_base)
    assert not (empty / "train" / MADE[stage]).exists()
    for wav in broken:
        wav.write_bytes(kept)
    extracted.clear()
    run_stage(stage, empty, tiny_base)
    assert sorted(extracted) == [str(wav) for wav in broken] and not list(empty.rglob("*.parts"))


@pytest.mark.parametrize(
    ("stage", "name", "value", "says"),
    [
        (1, "campplus.onnx", np.full((1, 192), np.nan, np.float32), "is not 192 finite values"),
        (1, "campplus.onnx", np.zeros((1, 191), np.float32), r"shape \(191,\) is not 192"),
        (2, "speech_tokenizer_v2.onnx", np.full((1, 25), 6561, np.int32), "lie outside the codebook of 6561"),
        (2, "speech_tokenizer_v2.onnx", np.full((1, 25), -1, np.int32), "lie outside the codebook of 6561"),
        (2, "speech_tokenizer_v2.onnx", np.zeros((1, 0), np.int32), "0 tokens for 1.00 s; 25 a second are 25"),
        (2, "speech_tokenizer_v2.onnx", np.zeros((1, 26), np.int32), "26 tokens for 1.00 s; 25 a second are 25"),
    ],
    ids=["nan", "191 values", "6561", "-1", "none", "one too many"],
)
def test_impossible_outputs_are_refused(tiny_base, tmp_path, stage, name, value, says):
    path = base_with(tiny_base, tmp_path / "base", name, value) / name
    model = SpeakerEncoder(path, CPU) if stage == 1 else SpeechTokenizer(path, CPU)
    with pytest.raises(BadInput, match=says):
        model(torch.linspace(-0.1, 0.1, 16000))


def test_impossible_outputs_are_named(data, tiny_base, tmp_path, capsys):
    folder = copy(data, tmp_path)
    base = base_with(tiny_base, tmp_path / "base", "campplus.onnx", np.full((1, 192), np.nan, np.float32))
    with pytest.raises(BadInput, match="24 of 24 utterances failed"):
        run_stage(1, folder, base)
    assert "left out demo_003: speaker vector of shape (192,) is not 192 finite values" in capsys.readouterr().err


def test_a_clip_of_more_than_30_seconds(data, tiny_base, tmp_path, capsys):
    """Stage 1 takes it, stage 2 names it, stage 3 says where it was lost; all else is packed."""
    folder = copy(data, tmp_path)
    wav = own_wav(folder, "demo_003")
    soundfile.write(wav, np.random.default_rng(0).uniform(-0.1, 0.1, 31 * 16000), 16000)
    for stage in TOOLS:
        run_stage(stage, folder, tiny_base)
    said = capsys.readouterr()
    assert "left out demo_003: 31.0 s; the speech tokenizer takes at most 30 s, cut the recording" in said.err
    assert f"left out demo_003: {folder / 'train/utt2speech_token'} lacks it; run stage 2 again" in said.err
    assert "train/parquet: 19 of 20 utterances" in said.out


def test_what_stage_3_refuses(finished, tiny_base, tmp_path, capsys):
    """Tables that do not fit, a recording that changed, even when its length did not."""
    folder = copy(finished[2], tmp_path)
    wav = own_wav(folder, "demo_003")
    samples, rate = soundfile.read(wav)
    soundfile.write(wav, samples[::-1], rate)
    run_stage(3, folder, tiny_base)
    assert f"left out demo_003: {wav}: the recording changed, run stage 1 again" in capsys.readouterr().err
    (folder / "train/text").write_text("".join((folder / "train/text").read_text().splitlines(True)[2:]))
    before = contents(folder)
    with pytest.raises(BadInput, match="2 of 24 utterances failed"):
        run_stage(3, folder, tiny_base)
    assert "left out demo_001: " in (said := capsys.readouterr().err) and "text lacks it; run stage 0 again" in said
    assert contents(folder) == before
    shutil.copy(finished[2] / "train/text", folder / "train/text")
    (folder / "dev/utt2spk").write_text((folder / "dev/utt2spk").read_text().replace("demo_022 s1", "demo_022 s9"))
    with pytest.raises(BadInput):
        run_stage(3, folder, tiny_base)
    assert "spk2embedding.pt lacks its speaker s9; run stage 1 again" in capsys.readouterr().err


# ---- no space, no permission


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_space_leaves_the_earlier_result(finished, tiny_base, tmp_path, small, stage):
    """A file may have 2 kB: the parts fit, the archive does not; no shard does."""
    folder = copy(finished[stage], tmp_path)
    before = contents(folder)
    status, said = process(stage, folder, tiny_base, limit=2000)
    assert status == 0 and said.splitlines()[-1].startswith("ERROR")
    assert "cannot be written" in said and "File too large" in said
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    run_stage(stage, folder, tiny_base)
    assert contents(folder) == before


def test_a_folder_that_cannot_be_written(finished, tiny_base, tmp_path):
    folder = copy(finished[2], tmp_path)
    (folder / "train/utt2embedding.parts").write_text("in the way")
    (folder / "train/.parquet.part").write_text("in the way")
    for stage in (1, 3):
        with pytest.raises(BadInput, match="cannot be written"):
            run_stage(stage, folder, tiny_base)


# ---- the parts they are made of


def test_batches_give_what_single_utterances_give(root, tiny_base):
    one = SpeechTokenizer(tiny_base / "speech_tokenizer_v2.onnx", CPU)
    many = BatchSpeechTokenizer(tiny_base / "speech_tokenizer_v2.batch.onnx", CPU)
    wavs = [load_for_extraction(path)[1] for path in sorted((root / "local/demo/wavs").glob("*.flac"))[:12]]
    features = [one.features(wav[: 640 * (100 + 7 * i)]) for i, wav in enumerate(wavs)]
    many.MAX_FRAMES, sizes, run = 2000, [], many.run
    many.run = lambda feats, lengths: sizes.append(feats.shape[0]) or run(feats, lengths)
    for single, batched, mel in zip(one.infer(features), many.infer(features), features, strict=True):
        np.testing.assert_array_equal(one.checked(single, mel), many.checked(batched, mel))
    assert sum(sizes) == 12 and max(sizes) > 2 and len(sizes) > 2


def test_a_batched_stage_gives_the_bytes_of_a_single_one(finished, tiny_base, tmp_path):
    folder, weights = copy(finished[1], tmp_path), tiny_base / "speech_tokenizer_v2.onnx"
    many = BatchSpeechTokenizer(weights.with_suffix(".batch.onnx"), CPU)
    extraction.extract([folder / "train", folder / "dev"], "utt2speech_token", many, weights)
    assert contents(folder) == contents(finished[2])


def test_a_speaker_is_the_mean_over_all_directories(finished):
    parts = [finished[1] / part for part in ("train", "dev")]
    spks = {utt: spk for part in parts for utt, spk in read_table(part / "utt2spk").items()}
    vectors = {utt: vector for part in parts for utt, vector in load_archive(part / "utt2embedding.pt").items()}
    for part in parts:
        for spk, mean in load_archive(part / "spk2embedding.pt").items():
            np.testing.assert_allclose(mean, np.mean([vectors[u] for u in spks if spks[u] == spk], axis=0), atol=1e-6)


def test_the_fingerprint_table_spares_reading(data, monkeypatch):
    path = next((data / "wavs").iterdir())
    known = extraction.look(str(path))
    assert known.split()[1] == fingerprint(path)
    monkeypatch.setattr(extraction, "fingerprint", lambda path: pytest.fail("was read again"))
    assert extraction.look(str(path), known) == known


def test_work_ahead_is_bounded():
    begun = []

    def work(item):
        begun.append(item)
        if item == 3:
            raise BadInput("three")
        return item * 10

    for taken, (item, result) in enumerate(jobs.in_order(work, range(200), nj=2), 1):
        assert item == taken - 1 and (str(result) == "three" if item == 3 else result == item * 10)
        time.sleep(0.0005)
        assert len(begun) <= taken + jobs.AHEAD * 2
    assert taken == 200


def test_a_function_beside():
    with jobs.beside(text.normalize) as normalize:
        assert normalize("３ 个  “苹果”", "plain") == text.normalize("３ 个  “苹果”", "plain")
        results = dict(jobs.in_order(lambda written: normalize(written, "none"), ["a", "b", "ü\n"], nj=2))
    assert results == {"a": "a", "b": "b", "ü\n": text.normalize("ü\n", "none")}


def test_a_writer_of_shards_holds_two_row_groups(tmp_path):
    class Row(dict):
        __hash__ = object.__hash__

    alive, most = weakref.WeakSet(), 0

    def rows():
        nonlocal most
        for number in range(300):
            row = Row(utt=f"u{number}", spk="s", text="t", text_token=[1], speech_token=[2], speech_feat=np.zeros(160))
            row["utt_embedding"] = row["spk_embedding"] = np.zeros(192, np.float32)
            alive.add(row)
            most = max(most, len(alive))
            yield row

    gc.collect()
    shards.write_shards(tmp_path, rows(), {})
    found = shards.Shards(tmp_path / "data.list")
    assert len(found) == 300 and [n for *_, n in found.groups] == [64, 64, 64, 64, 44] and most <= 2 * 64 + 1
