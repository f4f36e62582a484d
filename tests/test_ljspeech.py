"""The recipe on real recordings, where SPEECH_DIR names some."""

from cosyvoice_ft import checkpoint


def test_ljspeech(clone, run, speech_dir):
    """Real recordings through all stages; the CV loss falls."""
    run("--conf", "conf/tiny.yaml", "--stage", -1, "--stop_stage", -1)
    base = clone / "pretrained_models/tiny-cosyvoice2"
    words = ["--pretrained_dir", base, "--corpus", speech_dir / "ljspeech-200", "--train.lr", 1e-3]
    words += ["--train.llm.max_epoch", 2, "--train.flow.max_epoch", 2, "--train.warmup_updates", 5]
    said = run("--conf", "conf/ljspeech.yaml", *words).stdout
    assert "200 of 200 utterances" in said and "6 of 6 sentences" in said
    for part in ("llm", "flow"):
        facts = checkpoint.epochs(clone / "exp/ljspeech" / part)
        assert facts[2]["cv"]["loss"] < facts[1]["cv"]["loss"]
