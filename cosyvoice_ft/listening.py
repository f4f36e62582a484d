"""Hearing a training: after each epoch the conf's sentences, as sound and as mel pictures, beside a recording.

With the model in training in place of the base's ("llm" or "flow"), and, once the other one has been trained as well,
with both tuned ("both"). The sentences are divided over the ranks; epoch 0 is the base model.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyvoice_ft import audio, checkpoint
from cosyvoice_ft.engine import Engine
from cosyvoice_ft.shards import Shards
from cosyvoice_ft.synthesis import Sentence, Synthesizer, Voice, load_model

OTHER = {"llm": "flow", "flow": "llm"}


class Listener:
    """Speaks with the networks as they stand, for at most `train.listen_seconds` an epoch."""

    def __init__(
        self,
        part: str,
        engine: Engine,
        settings: Mapping,
        data: Path,
        out: Path,
        writer: object | None,
        log: Callable[[str], None],
    ) -> None:
        self.part, self.engine, self.settings, self.data, self.out = part, engine, settings, data, out
        self.writer, self.log = writer, log
        texts = settings["synth"]["texts"]
        lines = Path(texts).read_text(encoding="utf-8-sig").splitlines() if texts and Path(texts).is_file() else []
        self.sentences = [line.strip() for line in lines if line.strip()][: settings["train"]["listen_sentences"]]
        self.others: dict[str, object] = {}

    def speak(self, epoch: int) -> None:
        """Speak the sentences with the networks as they are after `epoch`."""
        limit = self.settings["train"]["listen_seconds"]
        own = list(enumerate(self.sentences))[self.engine.rank :: self.engine.world_size]
        if not limit or not own:
            return
        start, spoken = time.monotonic(), 0
        shards = Shards(self.data / "dev" / "parquet" / "data.list")
        voice = Voice(torch.from_numpy(shards.spk_embedding[0].copy())[None])
        if epoch == 0:
            self.show("recording", 0, None, shards.speech_feat(0))
        self.engine.module.eval()
        for name, synthesizer in self.synthesizers():
            for number, sentence in own:
                if time.monotonic() - start > limit:
                    break
                wanted = Sentence(f"{name}_{number + 1}", sentence, voice, seed=self.settings["seed"])
                (sound,) = synthesizer.speak([wanted])
                self.show(f"{name}/{number + 1}", epoch, sound.wav, audio.log_mel(sound.wav).numpy())
                audio.save_wav(self.out / "listen" / f"epoch_{epoch}_{name}_{number + 1}.wav", sound.wav, 24000)
                spoken += 1
        self.log(f"epoch {epoch} spoken: {spoken} sentences in {self.out / 'listen'}, {time.monotonic() - start:.0f} s")

    def synthesizers(self) -> list[tuple[str, Synthesizer]]:
        """Return (name, synthesizer) of the tuned one with the base's other, and of both tuned where there are."""
        base, other = Path(self.settings["pretrained_dir"]), OTHER[self.part]
        mine = {self.part: self.engine.module}
        found = [(self.part, Synthesizer(base, self.settings, self.engine.device, mine))]
        trained = self.out.parent / other
        if checkpoint.epochs(trained):
            best = checkpoint.best_epochs(trained, 1)[0]
            both = mine | {other: load_model(other, base, self.settings, trained / f"epoch_{best}.pt")}
            found.append(("both", Synthesizer(base, self.settings, self.engine.device, both)))
        return found

    def show(self, name: str, epoch: int, wav: Tensor | None, mel: np.ndarray) -> None:
        """Put a sound (T,) and the picture of a mel (T, 80) on TensorBoard."""
        if not self.writer:
            return
        if wav is not None:
            self.writer.add_audio(name, wav[None], epoch, audio.SAMPLE_RATE)
        picture = np.flipud(mel.T.astype(np.float32))
        low, high = np.log(1e-5), max(float(picture.max()), 0.0)
        self.writer.add_image(name, ((picture - low) / (high - low)).clip(0, 1)[None], epoch)
