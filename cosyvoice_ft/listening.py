"""Hearing a training: after each epoch the conf's sentences, as sound and as mel pictures, beside a recording.

With the model in training in place of the base's ("llm" or "flow"), and, once the other one has been trained as well,
with both tuned ("both"). The sentences are divided over the ranks; epoch 0 is the base model.
"""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyvoice_ft import audio, checkpoint
from cosyvoice_ft.engine import Engine
from cosyvoice_ft.shards import Shards
from cosyvoice_ft.synthesis import Sentence, Synthesizer, Voice, load_model
from cosyvoice_ft.table import read_table
from cosyvoice_ft.texts import read_texts

OTHER = {"llm": "flow", "flow": "llm"}


class Listener:
    """Speaks with the networks as they stand, for at most `train.listen_seconds` an epoch."""

    def __init__(
        self, part: str, engine: Engine, settings: Mapping, data: Path, out: Path, log: Callable[[str], None]
    ) -> None:
        self.part, self.engine, self.settings, self.data, self.out, self.log = part, engine, settings, data, out, log
        texts, most = settings["synth"]["texts"], settings["train"]["listen_sentences"]
        lines = read_texts(Path(texts))[:most] if texts and settings["train"]["listen_seconds"] else []
        self.sentences = list(enumerate((line.text for line in lines), 1))[engine.rank :: engine.world_size]

    def speak(self, epoch: int) -> None:
        """Speak this rank's sentences with the networks as they are after `epoch`."""
        if not self.sentences:
            return
        limit, start, spoken = self.settings["train"]["listen_seconds"], time.monotonic(), 0
        if epoch == 0:
            self.show("recording", 0, *self.recording)
        self.engine.module.eval()
        for name, synthesizer in self.synthesizers():
            for number, text in self.sentences:
                if time.monotonic() - start > limit:
                    break
                wanted = Sentence(f"{name}_{number}", text, self.voice, seed=self.settings["seed"])
                (sound,) = synthesizer.speak([wanted])
                if not len(sound.wav):
                    self.log(f"epoch {epoch} {name}: nothing was spoken for '{text}'")
                    continue
                self.show(f"{name}/{number}", epoch, sound.wav, audio.log_mel(sound.wav).numpy())
                audio.save_wav(self.out / "listen" / f"epoch_{epoch}_{name}_{number}.wav", sound.wav, audio.SAMPLE_RATE)
                spoken += 1
        self.writer.flush()
        self.log(f"epoch {epoch} spoken: {spoken} sentences in {self.out / 'listen'}, {time.monotonic() - start:.0f} s")

    @cached_property
    def writer(self):
        """This rank's own file of the TensorBoard folder."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.out / "tensorboard"), filename_suffix=f".listen{self.engine.rank}")

    @cached_property
    def voice(self) -> Voice:
        """The speaker of the held-out utterances."""
        shards = Shards(self.data / "dev" / "parquet" / "data.list")
        return Voice(torch.from_numpy(shards.spk_embedding[0].copy())[None])

    @property
    def recording(self) -> tuple[Tensor | None, np.ndarray]:
        """The first held-out recording, if it is still there, and its mel (T, 80)."""
        shards, table = Shards(self.data / "dev" / "parquet" / "data.list"), self.data / "dev" / "wav.scp"
        path = Path(read_table(table).get(shards.utt[0], "") if table.is_file() else "")
        return audio.load_wav(path, audio.SAMPLE_RATE) if path.is_file() else None, shards.speech_feat(0)

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
        if wav is not None:
            self.writer.add_audio(name, wav[None], epoch, audio.SAMPLE_RATE)
        picture = np.flipud(mel.T.astype(np.float32))
        low, high = np.log(1e-5), max(float(picture.max()), 0.0)
        self.writer.add_image(name, ((picture - low) / (high - low)).clip(0, 1)[None], epoch)
