"""A model directory that speaks: text -> segments -> speech tokens -> mel -> wave, loaded once."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cosyvoice_ft import audio, checkpoint, conf, text
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.flow import CausalMaskedDiffWithXvec
from cosyvoice_ft.models.hift import HiFTGenerator
from cosyvoice_ft.models.llm import Qwen2LM
from cosyvoice_ft.models.sampling import ras_sampling


def load_model(part: str, model_dir: str | Path, settings: Mapping, weights: str | Path | None = None) -> nn.Module:
    """Build "llm", "flow" or "hift" of a model directory, on the CPU, sized by its weights.

    settings: the whole conf. `weights`: other weights than the directory's own, with the same names.
    Raises BadInput when the directory is incomplete or when names or shapes do not fit.
    """
    model_dir = Path(model_dir)
    path = Path(weights or model_dir / f"{part}.pt")
    tensors, own = checkpoint.load_weights(path), settings[part]
    try:
        if part == "llm":
            config = conf.read_yaml(model_dir / text.TOKENIZER_DIR / "config.json")  # json is yaml
            kept = {key: own[key] for key in ("mix_ratio", "lsm_weight")}
            return Qwen2LM.from_weights(tensors, qwen_config=config, **kept)
        if part == "flow":
            passed = ("estimator_num_heads", "chunk_size", "dropout_rate", "sigma_min", "inference_cfg_rate")
            return CausalMaskedDiffWithXvec.from_weights(tensors, **{key: own[key] for key in passed})
        return HiFTGenerator.from_weights(tensors, **own)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{path}: does not fit a {settings['model']} {part}: {reason}") from error


@dataclass
class Spoken:
    """What was spoken for one text."""

    wav: Tensor  # (T,) at 24 kHz
    tokens: int
    ended: bool  # every segment ended by itself, before the limit of its length


class Synthesizer:
    """The three networks, the tokenizer and the speakers of a model directory."""

    def __init__(
        self,
        model_dir: str | Path,
        settings: Mapping,
        device: torch.device,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Load a model directory; `networks` ("llm", "flow", "hift") stand in for the directory's own."""
        model_dir = Path(model_dir)
        if not model_dir.is_dir():
            raise BadInput(f"{model_dir}: no such model directory; stage 6 makes exp/NAME/model")
        conf.check_model_yaml(settings, model_dir)
        self.settings, self.device = settings, device
        self.tokenizer = text.Tokenizer(model_dir)
        given = networks or {}
        self.llm, self.flow, self.hift = (
            (given.get(part) or load_model(part, model_dir, settings)).eval().to(device)
            for part in ("llm", "flow", "hift")
        )
        if "hift" not in given:
            self.hift.fold_weight_norm()
        path = model_dir / "spk2info.pt"
        self.speakers = checkpoint.load(path) if path.is_file() else {}

    def speaker(self, name: str | None) -> str:
        """Return the speaker to use: `name`, or the only one there is. Raises BadInput naming those there are."""
        known = ", ".join(self.speakers) or "none: this directory has no spk2info.pt"
        if name is None and len(self.speakers) == 1:
            return next(iter(self.speakers))
        if name not in self.speakers:
            raise BadInput(f"speaker '{name or ''}' is unknown; known: {known}")
        return name

    @torch.inference_mode()
    def speak(self, sentence: str, speaker: str, seed: int) -> Spoken:
        """Speak one text with a speaker of spk2info.pt. The same seed and text give the same sound.

        Raises BadInput when nothing of the text can be spoken.
        """
        parts = text.segments(sentence, self.tokenizer, self.settings["text"]["frontend"])
        if not parts:
            raise BadInput(f"'{sentence}': nothing to speak")
        wavs, count, ended = [], 0, True
        for number, part in enumerate(parts):
            rng = np.random.default_rng([seed, number, zlib.crc32(part.encode())])
            ids = self.tokenizer.encode(part)
            tokens = self.speech_tokens(ids, rng)
            limit = int(len(ids) * self.settings["llm"]["max_token_text_ratio"])
            count, ended = count + len(tokens), ended and 0 < len(tokens) < limit
            if tokens:
                wavs.append(self.wave(tokens, self.speakers[speaker]["embedding"], rng))
        return Spoken(torch.cat(wavs) if wavs else torch.zeros(0), count, ended)

    def speech_tokens(self, ids: list[int], rng: np.random.Generator) -> list[int]:
        """Text ids -> speech tokens."""
        own = self.settings["llm"]
        sample = partial(ras_sampling, uniform=rng.random, **own["sampling"])
        ratios = {key: own[key] for key in ("min_token_text_ratio", "max_token_text_ratio")}
        return list(self.llm.decode(ids, sample=sample, **ratios))

    def wave(self, tokens: list[int], embedding: Tensor, rng: np.random.Generator) -> Tensor:
        """Speech tokens and a speaker vector (1, 192) -> (T,) at 24 kHz on the CPU."""
        mel, _ = self.flow.inference(
            token=[torch.tensor(tokens)],
            prompt_token=[torch.zeros(0, dtype=torch.long)],
            prompt_feat=[torch.zeros(0, audio.N_MELS)],
            embedding=embedding.to(self.device),
            n_timesteps=self.settings["flow"]["n_timesteps"],
        )
        noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
        return self.hift(mel, generator=noise)[0][0].cpu()
