"""Speaking and handing over: what each mode gives the networks, batches, retries, and the model directory."""

import csv
import importlib.util
import json
import sys

import numpy as np
import pytest
import soundfile
import torch

from cosyvoice_ft import audio, checkpoint, conf
from cosyvoice_ft.extractors import SpeakerEncoder, SpeechTokenizer, load_archive, load_for_extraction, save_archive
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.synthesis import MAX_FRAMES, PHASES, Sentence, Synthesizer, Voice, bounded, with_prompt
from cosyvoice_ft.table import read_table, write_data_dir

CPU = torch.device("cpu")
TEXTS = ["Good morning.", "Where did you go?", "One two three four five six seven.", "Yes!", "A cup of tea, please."]


@pytest.fixture
def tool(root, monkeypatch, capsys):
    """tool("tools/x.py", words...): what it printed, and its error or "", run in this process."""

    def run(path, *words):
        spec = importlib.util.spec_from_file_location("tool", root / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [path, *map(str, words)])
        monkeypatch.chdir(root)
        error = ""
        try:
            module.main()
        except BadInput as bad:
            error = str(bad)
        return capsys.readouterr(), error

    return run


@pytest.fixture(scope="module")
def settings(tiny_base):
    words = [f"--pretrained_dir={tiny_base}", "--llm.max_token_text_ratio=3", "--flow.n_timesteps=2"]
    return conf.load_conf(conf.CONF_DIR / "tiny.yaml", words)


@pytest.fixture(scope="module")
def synthesizer(tiny_base, settings):
    return Synthesizer(tiny_base, settings, CPU)


@pytest.fixture(scope="module")
def data(root, tiny_base, tmp_path_factory):
    """A data directory of six shipped recordings of two speakers, stages 0 to 2 done."""
    folder, lines = tmp_path_factory.mktemp("data"), (root / "local/demo/metadata.csv").read_text().splitlines()[:6]
    rows, tokens, vectors = [], {}, {}
    tokenizer = SpeechTokenizer(tiny_base / "speech_tokenizer_v2.onnx", ["CPUExecutionProvider"])
    encoder = SpeakerEncoder(tiny_base / "campplus.onnx", ["CPUExecutionProvider"])
    for i, line in enumerate(lines):
        utt, text, _ = line.split("|")
        wav = root / f"local/demo/wavs/{utt}.flac"
        wav24, wav16 = load_for_extraction(wav)
        tokens[utt], vectors[utt] = tokenizer(wav16), encoder(wav16)
        spk, seconds = ("a", "b")[i % 2], len(wav24) / 24000
        rows.append({"utt": utt, "wav": wav, "text": text, "spk": spk, "seconds": seconds})
    write_data_dir(folder, rows)
    save_archive(folder / "utt2speech_token.pt", tokens)
    save_archive(folder / "utt2embedding.pt", vectors)
    means = {s: np.mean([vectors[row["utt"]] for row in rows if row["spk"] == s], axis=0) for s in "ab"}
    save_archive(folder / "spk2embedding.pt", means)
    return folder


@pytest.fixture(scope="module")
def voice(data):
    wavs, tokens = read_table(data / "wav.scp"), load_archive(data / "utt2speech_token.pt")
    plain = Voice(torch.from_numpy(load_archive(data / "spk2embedding.pt")["a"].copy())[None])
    return with_prompt(plain, load_for_extraction(wavs["demo_001"])[0], tokens["demo_001"], [7, 8, 9])


def test_each_mode_gives_each_network_what_it_takes(synthesizer, voice, monkeypatch):
    """The table at the head of synthesis.py, seen at the two networks' doors."""
    heard = {}

    def decode_rows(requests):
        heard["llm"] = requests[0]
        yield from ((0, token) for token in (5, 6, 7, 8))

    def inference(**given):
        heard["flow"] = given
        return torch.zeros(1, 80, 8), torch.tensor([8])

    monkeypatch.setattr(synthesizer.llm, "decode_rows", decode_rows)
    monkeypatch.setattr(synthesizer.flow, "inference", inference)
    encode, prompt = synthesizer.tokenizer.encode, voice.prompt_token
    for mode, text_before, speech_before, flow_prompt in (
        ("sft", [], [], 0),
        ("zero_shot", [7, 8, 9], prompt.tolist(), len(prompt)),
        ("cross_lingual", [], [], len(prompt)),
        ("instruct", encode("Whisper.<|endofprompt|>"), [], len(prompt)),
    ):
        list(synthesizer.speak([Sentence("u", "Yes.", voice, mode, "Whisper.")]))
        request, given = heard["llm"], heard["flow"]
        assert request.prompt_text == text_before and request.prompt_speech == speech_before, mode
        assert request.text == encode("Yes.")
        if mode == "instruct":  # the official code wants the marker in the instruction; here it may be there
            list(synthesizer.speak([Sentence("u", "Yes.", voice, mode, "Whisper.<|endofprompt|>")]))
            assert heard["llm"].prompt_text == text_before
        assert len(given["prompt_token"][0]) == flow_prompt and len(given["prompt_feat"][0]) == 2 * flow_prompt, mode
        assert torch.equal(given["embedding"], voice.embedding) and given["token"][0].tolist() == [5, 6, 7, 8]


def test_batches_say_the_same_as_one_by_one(synthesizer, voice, monkeypatch):
    sentences = [Sentence(str(i), text, voice, seed=3) for i, text in enumerate(TEXTS)]

    def spoken(size, chosen=sentences):
        return {one.sentence.utt: one for one in synthesizer.speak(chosen, size)}

    rows = []
    monkeypatch.setitem(MAX_FRAMES, "cpu", 10000)
    with synthesizer.hift.register_forward_pre_hook(lambda _, given: rows.append(len(given[0]))):
        alone, together, backwards = spoken(1), spoken(8), spoken(8, sentences[::-1])
    assert rows == [1] * 5 + [5] * 2  # side by side in the vocoder, too
    assert alone.keys() == together.keys() == backwards.keys() == {str(i) for i in range(5)}
    for utt, one in alone.items():
        assert (one.tokens, one.ended) == (together[utt].tokens, together[utt].ended) and one.tokens
        torch.testing.assert_close(one.wav, together[utt].wav, atol=2e-2, rtol=0)
        torch.testing.assert_close(together[utt].wav, backwards[utt].wav, atol=2e-2, rtol=0)
    other = next(iter(synthesizer.speak([Sentence("0", TEXTS[0], voice, seed=4)])))
    assert len(other.wav) != len(alone["0"].wav) or not torch.equal(other.wav, alone["0"].wav)


def test_batches_are_bounded():
    assert list(bounded([900, 5000, 100, 800, 1200], 2000)) == [[2, 3], [0], [4], [1]]
    assert list(bounded([], 2000)) == []


def test_what_does_not_end_is_tried_once_more(synthesizer, voice, monkeypatch):
    calls = []

    def decode_rows(requests):
        calls.append([request.text for request in requests])
        for number, request in enumerate(requests):
            endless = len(calls) == 1 and number == 0
            limit = int(len(request.text) * request.max_token_text_ratio)
            yield from ((number, 1) for _ in range(limit if endless else 4))

    monkeypatch.setattr(synthesizer.llm, "decode_rows", decode_rows)
    spoken = list(synthesizer.speak([Sentence("a", "Yes!", voice), Sentence("b", "No, no, no!", voice)]))
    assert [len(texts) for texts in calls] == [2, 1]
    assert [(one.retried, one.ended, one.tokens) for one in spoken] == [(True, True, [1] * 4), (False, True, [1] * 4)]


def test_long_texts_are_split_and_joined_with_pauses(synthesizer, voice):
    text = "This is a sentence of some length that goes on for a while. " * 4
    (spoken,) = synthesizer.speak([Sentence("a", text, voice)])
    parts = synthesizer.segments(Sentence("a", text, voice))
    pause = round(synthesizer.settings["synth"]["pause"] * audio.SAMPLE_RATE)
    assert len(parts) > 1 and len(spoken.wav) == len(spoken.tokens) * 960 + (len(parts) - 1) * pause


def test_one_failure_costs_one_sentence(synthesizer, voice, monkeypatch):
    """More tokens than the flow takes; and a batch that is too much for the memory, spoken one by one."""
    long, short = (Sentence(name, name, voice, tokens=[5] * n) for name, n in (("long", 7501), ("short", 3)))
    spoken = {one.sentence.utt: one for one in synthesizer.speak([long, short])}
    assert "7501 tokens with the prompt, must be 1 to 7500" in spoken["long"].trouble
    assert not len(spoken["long"].wav) and not spoken["long"].ended
    assert len(spoken["short"].wav) == 3 * 960 and not spoken["short"].trouble and spoken["short"].ended
    inference, sizes = synthesizer.flow.inference, []

    def small(**given):
        sizes.append(len(given["token"]))
        if len(given["token"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")
        return inference(**given)

    monkeypatch.setattr(synthesizer.flow, "inference", small)
    both = list(synthesizer.speak([Sentence(name, name, voice, tokens=[5] * 3) for name in "ab"]))
    assert sizes == [2, 1, 1] and all(len(one.wav) and not one.trouble for one in both)


def test_nothing_to_speak_is_reported_and_the_rest_spoken(synthesizer, voice):
    spoken = {s.sentence.utt: s for s in synthesizer.speak([Sentence("a", "...", voice), Sentence("b", "Yes.", voice)])}
    assert len(spoken["a"].wav) == 0 and not spoken["a"].ended and len(spoken["b"].wav) > 0
    assert spoken["a"].trouble == "nothing in it can be spoken" and not spoken["b"].trouble


def test_voices_are_kept_as_published(voice, tmp_path):
    """The entry has both kinds' fields (names, shapes, dtypes), and comes back."""
    info = voice.to_info()
    n = len(voice.prompt_token)
    shapes = {name: (tuple(value.shape), value.dtype) for name, value in info.items()}
    assert shapes == {
        "embedding": ((1, 192), torch.float32),
        "prompt_text": ((1, 3), torch.int32),
        "prompt_text_len": ((1,), torch.int32),
        "llm_prompt_speech_token": ((1, n), torch.int32),
        "llm_prompt_speech_token_len": ((1,), torch.int32),
        "flow_prompt_speech_token": ((1, n), torch.int32),
        "flow_prompt_speech_token_len": ((1,), torch.int32),
        "prompt_speech_feat": ((1, 2 * n, 80), torch.float32),
        "prompt_speech_feat_len": ((1,), torch.int32),
        "llm_embedding": ((1, 192), torch.float32),
        "flow_embedding": ((1, 192), torch.float32),
    }
    checkpoint.save(tmp_path / "spk2info.pt", {"a": info, "old": {"embedding": torch.ones(1, 192)}})
    loaded = checkpoint.load(tmp_path / "spk2info.pt")
    again = Voice.from_info(loaded["a"])
    assert again.prompt_text == [7, 8, 9] and torch.equal(again.prompt_feat, voice.prompt_feat)
    assert not len(Voice.from_info(loaded["old"]).prompt_token)


@pytest.fixture(scope="module")
def model_dir(run_tool, data, tiny_base, settings, tmp_path_factory):
    """A model directory, its base littered with artefacts that would hide the tuned weights."""
    folder = tmp_path_factory.mktemp("made")
    base = folder / "base"
    base.mkdir()
    for path in tiny_base.rglob("*"):
        if path.is_file():
            target = base / path.relative_to(tiny_base)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    for name in ("flow.decoder.estimator.fp32.onnx", "flow.encoder.fp32.zip", "flow.decoder.estimator.fp16.plan"):
        (base / name).write_bytes(b"stale")
    (base / "vllm").mkdir()
    checkpoint.save(base / "spk2info.pt", {"old": {"embedding": torch.ones(1, 192)}})
    weights = checkpoint.load_weights(base / "flow.pt")
    checkpoint.save(folder / "average.pt", {name: value + 1 for name, value in weights.items()})
    (folder / "average.yaml").write_text("epochs: [4, 2]")
    words = ["--conf", "conf/tiny.yaml", f"--pretrained_dir={base}"]
    run_tool("tools/make_model_dir.py", folder / "model_flow", data, "--flow", folder / "average.pt", *words)
    return folder / "model_flow", base, words


def test_model_directory(model_dir, data):
    out, base, _ = model_dir
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    tokenizer = {f"CosyVoice-BlankEN/{path.name}" for path in (base / "CosyVoice-BlankEN").iterdir()}
    assert names >= {
        "llm.pt", "flow.pt", "hift.pt", "campplus.onnx", "speech_tokenizer_v2.onnx", "cosyvoice2.yaml",
        "spk2info.pt", "model.json", "README.md", *tokenizer,
    }  # fmt: skip
    assert not [name for name in names if name.startswith(("flow.", "vllm")) and name != "flow.pt"]
    for name in names & {path.relative_to(base).as_posix() for path in base.rglob("*")}:
        same = (out / name).read_bytes() == (base / name).read_bytes()
        assert same == (name not in ("flow.pt", "spk2info.pt")), name
    info = checkpoint.load(out / "spk2info.pt")
    assert list(info) == ["old", "a", "b"]
    facts = json.loads((out / "model.json").read_text())
    assert facts["tuned"] == {"llm": False, "flow": True} and facts["corpus"]["utterances"] == 6
    assert facts["base"] == "base" and facts["epochs_averaged"] == {"flow": [4, 2]} and facts["commit"]
    told = (out / "README.md").read_text()
    for words in (
        "Base: base.",
        "flow (epochs [4, 2])",
        "a, b",
        "6 utterances",
        facts["commit"],
        'inference_sft("...", "b")',
        f"python tools/synthesize.py {out} ",
        "CosyVoice2(model_dir)",
    ):
        assert words in told, words
    vectors, spks = load_archive(data / "utt2embedding.pt"), read_table(data / "utt2spk")
    seconds = {utt: float(value) for utt, value in read_table(data / "utt2dur").items()}
    for spk, prompt in facts["prompts"].items():
        mean = load_archive(data / "spk2embedding.pt")[spk]
        near = {u: v @ mean / np.linalg.norm(v) for u, v in vectors.items() if spks[u] == spk and 4 <= seconds[u] <= 10}
        assert prompt == max(near, key=near.get) and prompt in (out / "model.json").read_text()


def test_a_prompt_may_be_named(run_tool, model_dir, data, tmp_path):
    _, base, words = model_dir
    run_tool("tools/make_model_dir.py", tmp_path / "m", data, *words, "--voice.prompt_utt", "demo_004", "--copy")
    assert json.loads((tmp_path / "m/model.json").read_text())["prompts"]["b"] == "demo_004"
    assert (tmp_path / "m/hift.pt").stat().st_nlink == 1
    done = run_tool("tools/make_model_dir.py", tmp_path / "m", data, *words, "--voice.prompt_utt", "no", status=1)
    assert "voice.prompt_utt: 'no' is no utterance of" in done.stderr and (tmp_path / "m/hift.pt").is_file()


def test_released_size_of_random_bases(root, goldens):
    """`make_tiny_base.py --size released` has the names and shapes of the published weights; nothing is allocated."""
    spec = importlib.util.spec_from_file_location("make_tiny_base", root / "local/make_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tiny_base"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    with torch.device("meta"):
        models = module.build(module.SIZES["released"])
    for part, model in models.items():
        with open(goldens / "keys" / f"{part}_cv2.tsv", newline="") as file:
            table = {name: shape for name, shape, _ in csv.reader(file, delimiter="\t")}
        assert {name: "x".join(map(str, w.shape)) for name, w in model.state_dict().items()} == table


def test_yaml_of_random_bases_has_what_the_official_loader_reads(tiny_base):
    told = conf.read_yaml(tiny_base / "cosyvoice2.yaml")
    assert told.keys() >= {"sample_rate", "get_tokenizer", "feat_extractor", "allowed_special", "llm", "flow", "hift"}
    assert told["qwen_pretrain_path"] == ""  # the loader overrides this key with its CosyVoice-BlankEN


def test_released_sizes_make_what_the_official_loader_takes(goldens, data, tiny_base, run_tool, tmp_path):
    """Names, shapes and dtypes of the full-size key tables pass through unchanged; nobody needs 2 GB for it."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "CosyVoice-BlankEN").mkdir()
    for path in (tiny_base / "CosyVoice-BlankEN").iterdir():
        (base / "CosyVoice-BlankEN" / path.name).write_bytes(path.read_bytes())
    released = {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    (base / "CosyVoice-BlankEN/config.json").write_text(json.dumps(released))
    for name in ("campplus.onnx", "speech_tokenizer_v2.onnx", "cosyvoice2.yaml"):
        (base / name).write_bytes((tiny_base / name).read_bytes())
    tables = {}
    for part in ("llm", "flow", "hift"):
        with open(goldens / "keys" / f"{part}_cv2.tsv", newline="") as file:
            tables[part] = {name: (shape, dtype) for name, shape, dtype in csv.reader(file, delimiter="\t")}
        shapes = {name: [int(n) for n in shape.split("x")] for name, (shape, _) in tables[part].items()}
        torch.save({name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}, base / f"{part}.pt")
    words = ["--conf", "conf/tiny.yaml", f"--pretrained_dir={base}"]
    given = ["--llm", base / "llm.pt", "--flow", base / "flow.pt"]
    run_tool("tools/make_model_dir.py", tmp_path / "model", data, *given, *words)
    for part, table in tables.items():
        weights = checkpoint.load_weights(tmp_path / "model" / f"{part}.pt")
        found = {
            name: ("x".join(map(str, w.shape)), str(w.dtype).removeprefix("torch.")) for name, w in weights.items()
        }
        assert found == table


def test_synthesize_speaks_every_mode_and_writes_a_data_directory(run_tool, model_dir, tmp_path):
    out, _, words = model_dir
    texts = {"a": {"sft": ["Yes."], "zero-shot": "No.", "instruction": {"instruction": "Softly.", "text": "Well."}}}
    (tmp_path / "tts_text.json").write_text(json.dumps(texts))
    quick = ["--llm.max_token_text_ratio=3", "--flow.n_timesteps=2", "--format", "flac", *words]
    said = run_tool("tools/synthesize.py", out, tmp_path / "tts_text.json", tmp_path / "o", *quick).stdout
    assert "3 of 3 sentences" in said and "tokens/s" in said
    assert list(read_table(tmp_path / "o/text")) == ["a-instruct-001", "a-sft-001", "a-zero_shot-001"]
    for utt, path in read_table(tmp_path / "o/wav.scp").items():
        assert path.endswith(f"{utt}.flac") and soundfile.info(path).samplerate == 24000
    facts = json.loads((tmp_path / "o/synth.json").read_text())
    assert {known["mode"] for known in facts["sentences"]} == {"sft", "zero_shot", "instruct"}
    total = facts["total"]
    assert total["real_time_factor"] > 0 and total["tokens_per_second"] > 0 and total["memory_gb"] > 0
    assert total["phases"].keys() == set(PHASES) and all(taken > 0 for taken in total["phases"].values())
    assert sum(total["phases"].values()) <= total["seconds_spent"] + 0.01


def test_copy_synthesis_and_the_base(run_tool, model_dir, data, tmp_path):
    out, _, words = model_dir
    run_tool("tools/synthesize.py", out, data, tmp_path / "copy", "--tokens", "--flow.n_timesteps=2", *words)
    tokens = load_archive(data / "utt2speech_token.pt")
    for utt, path in read_table(tmp_path / "copy/wav.scp").items():
        assert soundfile.info(path).frames == 960 * len(tokens[utt])
    (tmp_path / "t.txt").write_text("Yes.\n")
    quick = ["--spk", "a", "--llm.max_token_text_ratio=3", "--flow.n_timesteps=2", *words]
    for model in ("tuned", "base"):
        run_tool("tools/synthesize.py", out, tmp_path / "t.txt", tmp_path / model, "--model", model, *quick)
    tuned, base = (soundfile.read(tmp_path / model / "wav/a-sft-001.wav")[0] for model in ("tuned", "base"))
    assert len(tuned) == len(base) and not np.array_equal(tuned, base)  # the same tokens, another flow


def test_a_prompt_from_the_command_line_and_speed(run_tool, model_dir, root, tmp_path):
    out, _, words = model_dir
    (tmp_path / "t.txt").write_text("Yes, of course.\n")
    clip = root / "local/demo/wavs/demo_002.flac"
    quick = ["--llm.max_token_text_ratio=3", "--flow.n_timesteps=2", *words, "--mode", "zero-shot"]
    error = run_tool("tools/synthesize.py", out, tmp_path / "t.txt", tmp_path / "o", *quick, "--prompt", clip, status=1)
    assert "needs what the prompt of 'demo_002' says: --prompt_text TEXT" in error.stderr
    quick += ["--prompt", clip, "--prompt_text", "The baker opens her shop at six."]
    frames = []
    for spk, option in (("demo_002", ["--synth.speed", 1]), ("my_own/voice", ["--speed", 2, "--spk", "my own/voice"])):
        out_dir = tmp_path / spk
        run_tool("tools/synthesize.py", out, tmp_path / "t.txt", out_dir, *quick, *option)
        name = spk.replace("/", "_")
        assert read_table(out_dir / "utt2spk") == {f"{name}-zero_shot-001": name}
        frames.append(soundfile.info(out_dir / f"wav/{name}-zero_shot-001.wav").frames)
    assert frames[1] == frames[0] // 960 * 960 // 2


def test_what_cannot_be_spoken_is_in_the_exit_status(tool, model_dir, tmp_path):
    """The rest is spoken, the data directory holds it, and one line sums up what is missing."""
    out, _, words = model_dir
    (tmp_path / "t.txt").write_text("...\nYes.\n")
    quick = ["--spk", "a", "--llm.max_token_text_ratio=3", "--flow.n_timesteps=2", *words]
    said, error = tool("tools/synthesize.py", out, tmp_path / "t.txt", tmp_path / "o", *quick)
    assert error.startswith("1 sentences could not be spoken: a-sft-001;") and "1 of 2 sentences" in said.out
    assert "left out a-sft-001: nothing in it can be spoken" in said.err
    assert list(read_table(tmp_path / "o/wav.scp")) == ["a-sft-002"]
    facts = {known["utt"]: known for known in json.loads((tmp_path / "o/synth.json").read_text())["sentences"]}
    assert facts["a-sft-001"]["trouble"] and not facts["a-sft-002"]["trouble"]
    said, error = tool("tools/synthesize.py", out, tmp_path / "t.txt", tmp_path / "o", *quick, "--speed", 0)
    assert error == "synth.speed is 0.0; from 0.1, slow, to 10"


def test_utterances_without_tokens_are_named(tool, model_dir, data, tmp_path):
    """Copy-synthesis of a data directory that has one recording more than tokens."""
    out, _, words = model_dir
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokens = load_archive(tmp_path / "utt2speech_token.pt")
    save_archive(tmp_path / "utt2speech_token.pt", {"demo_001": tokens["demo_001"][:10]})
    words = ["--tokens", "--flow.n_timesteps=1", *words]
    said, error = tool("tools/synthesize.py", out, tmp_path, tmp_path / "o", *words)
    assert not error and "1 of 1 sentences" in said.out
    assert "demo_002 demo_003" in said.err and "demo_001" not in said.err


def test_a_new_model_is_heard_in_every_mode(tool, model_dir, tmp_path):
    out, _, words = model_dir
    quick = ["--llm.max_token_text_ratio=3", "--flow.n_timesteps=2", *words]
    (tmp_path / "t.txt").write_text("Yes.\nNo.\nWell.\nNever spoken.\n")
    said, error = tool("tools/try_voice.py", out, tmp_path / "t.txt", *quick)
    lines = said.out.splitlines()
    assert not error and len(lines) == 4
    for line, mode in zip(lines, ("sft", "zero_shot", "cross_lingual", "instruct"), strict=True):
        assert line.startswith(f"  b {mode}: 3 sentences, ") and "3 without end" in line, line
    error = tool("tools/try_voice.py", out, tmp_path / "t.txt", *quick, "--synth.must_end", "true")[1]
    assert "model_flow does not speak: sft_1 sft_2 sft_3 zero_shot_1" in error
    (tmp_path / "t.txt").write_text("...\n")
    said, error = tool("tools/try_voice.py", out, tmp_path / "t.txt", *quick)
    assert "1 empty" in said.out and "does not speak: sft_1 zero_shot_1 cross_lingual_1 instruct_1" in error


def test_which_epochs_are_averaged(tool, tmp_path):
    """The best, the last, a named one; fewer than asked for are all taken, and it says so; integers keep their type."""
    for epoch, loss in enumerate((3.0, 1.0, 2.0), 1):
        weights = {"w": torch.full((2,), float(epoch)), "n": torch.tensor(7)}
        checkpoint.save_epoch(tmp_path / "llm", epoch, weights, {"cv": {"loss": loss}})

    def averaged(*words):
        said, error = tool("tools/average.py", tmp_path / "llm", *words)
        weights = checkpoint.load_weights(tmp_path / "llm/average.pt")
        assert weights["n"].dtype == torch.int64 and weights["n"] == 7
        return float(weights["w"][0]), conf.read_yaml(tmp_path / "llm/average.yaml")["epochs"], said.out, error

    assert averaged("--average.llm.num", 2)[:2] == (2.5, [2, 3])
    assert averaged("--average.llm.num", 2, "--average.llm.by", "last")[:2] == (2.5, [2, 3])
    assert averaged("--average.llm.num", 1, "--average.llm.by", "last")[:2] == (3.0, [3])
    assert averaged("--epoch", 1)[:2] == (1.0, [1])
    mean, epochs, said, _ = averaged("--average.llm.num", 5)
    assert (mean, epochs) == (2.0, [2, 3, 1]) and "has 3 epochs, fewer than 5: all of them are averaged" in said
    assert averaged("--epoch", 9)[3].endswith("no epoch_9.pt; there are 1 2 3")
    assert "by is 'luck'" in averaged("--average.llm.by", "luck")[3]


def test_the_last_screen_needs_a_natural_voice(tool, model_dir, tmp_path):
    error = tool("tools/show_result.py", f"base={tmp_path}", *model_dir[2])[1]
    assert "has spk2embedding.pt; run stage 1" in error
