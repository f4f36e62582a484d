"""A model directory that speaks: text -> segments -> speech tokens -> mel -> wave.

What the two networks get to hear beside the text, by mode (P: a prompt recording, its transcript, and its voice):

    mode            language model                             flow
    sft             -                                          the speaker's vector
    zero_shot       P's transcript, P's speech tokens          P's tokens, mel and vector
    cross_lingual   -                                          P's tokens, mel and vector
    instruct        the instruction, <|endofprompt|>           P's tokens, mel and vector

Every segment draws from a generator keyed by (seed, its text, its place), so what is said does not depend on what is
spoken beside it.
"""

import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cosyvoice_ft import audio, checkpoint, conf, text
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.cfm import torch_generator
from cosyvoice_ft.models.flow import CausalMaskedDiffWithXvec
from cosyvoice_ft.models.hift import HiFTGenerator
from cosyvoice_ft.models.llm import Qwen2LM, Request
from cosyvoice_ft.models.sampling import ras_sampling

PHASES = ("text", "llm", "flow", "vocoder")
MODES = ("sft", "zero_shot", "cross_lingual", "instruct")
NOTHING = "nothing in it can be spoken"
MAX_TOKENS = 2000  # speech tokens side by side in the flow, 80 s: attention takes memory with the square of a row
MAX_FRAMES = {"cpu": 300, "cuda": 4000}  # mel frames side by side in the vocoder; a CPU is slower beyond its caches
PROMPT_FIELDS = ("prompt_text", "llm_prompt_speech_token", "flow_prompt_speech_token", "prompt_speech_feat")


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
    except (RuntimeError, KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{path}: does not fit a {settings['model']} {part}: {reason}") from error


@dataclass
class Voice:
    """A speaker: the vector, and what is known of a prompt recording (empty when nothing is)."""

    embedding: Tensor  # (1, 192)
    prompt_text: list[int] = field(default_factory=list)
    prompt_token: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # (S,)
    prompt_feat: Tensor = field(default_factory=lambda: torch.zeros(0, audio.N_MELS))  # (2 S, 80)

    @classmethod
    def from_info(cls, info: Mapping[str, Tensor]) -> "Voice":
        """Read an entry of spk2info.pt, of either kind (the vector alone, or a saved zero-shot prompt)."""
        embedding = info["embedding"] if "embedding" in info else info["flow_embedding"]
        if not all(name in info for name in PROMPT_FIELDS):
            return cls(embedding.float())
        return cls(
            embedding.float(),
            info["prompt_text"][0].tolist(),
            info["flow_prompt_speech_token"][0].long(),
            info["prompt_speech_feat"][0].float(),
        )

    def to_info(self) -> dict[str, Tensor]:
        """Return the entry of spk2info.pt that both kinds of reader take."""
        info = {"embedding": self.embedding}
        if not len(self.prompt_token):
            return info
        for name, value in (
            ("prompt_text", torch.tensor([self.prompt_text], dtype=torch.int32)),
            ("llm_prompt_speech_token", self.prompt_token[None].int()),
            ("flow_prompt_speech_token", self.prompt_token[None].int()),
            ("prompt_speech_feat", self.prompt_feat[None]),
        ):
            info |= {name: value, f"{name}_len": torch.tensor([value.shape[1]], dtype=torch.int32)}
        return info | {"llm_embedding": self.embedding, "flow_embedding": self.embedding}


@dataclass
class Sentence:
    """One text to speak. `tokens` given: these are spoken, and the language model is not asked."""

    utt: str
    text: str
    voice: Voice
    mode: str = "sft"
    instruction: str = ""
    seed: int = 0
    tokens: list[int] | None = None


@dataclass
class Spoken:
    """What was spoken for a sentence."""

    sentence: Sentence
    wav: Tensor  # (T,) at 24 kHz
    tokens: list[int]  # speech tokens of all segments
    ended: bool  # every segment ended by itself, before the limit of its length
    retried: bool  # a segment hit the limit and was spoken again with another seed
    trouble: str = ""  # why nothing, or not all, could be spoken


@dataclass
class Segment:
    """A piece of a sentence on its way."""

    sentence: Sentence
    ids: list[int]
    prompt_text: list[int]
    seed: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    ended: bool = True
    retried: bool = False
    wav: Tensor | None = None
    trouble: str = ""


class Synthesizer:
    """The three networks, the tokenizer and the voices of a model directory, loaded once.

    seconds: what each of PHASES has taken so far.
    """

    def __init__(
        self,
        model_dir: str | Path,
        settings: Mapping,
        device: torch.device,
        networks: Mapping[str, nn.Module] | None = None,
    ) -> None:
        """Load a model directory; `networks` ("llm", "flow", "hift") stand in for the directory's own."""
        model_dir, given = Path(model_dir), networks or {}
        if not model_dir.is_dir():
            raise BadInput(f"{model_dir}: no such model directory; stage 6 makes exp/NAME/model")
        conf.check_model_yaml(settings, model_dir)
        if not 0.1 <= settings["synth"]["speed"] <= 10:
            raise BadInput(f"synth.speed is {settings['synth']['speed']}; from 0.1, slow, to 10")
        self.settings, self.device = settings, device
        self.tokenizer = text.Tokenizer(model_dir)
        self.llm, self.flow, self.hift = (
            (given.get(part) or load_model(part, model_dir, settings)).eval().to(device)
            for part in ("llm", "flow", "hift")
        )
        if "hift" not in given:
            self.hift.fold_weight_norm()
        path = model_dir / "spk2info.pt"
        info = checkpoint.load(path) if path.is_file() else {}
        self.voices = {name: Voice.from_info(entry) for name, entry in info.items()}
        self.seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add what is done inside to `seconds` of a phase; a card has finished it, too."""
        start = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.monotonic() - start

    def voice(self, name: str | None) -> tuple[str, Voice]:
        """Return the speaker `name`, or the only one there is. Raises BadInput naming those there are."""
        if name is None and len(self.voices) == 1:
            name = next(iter(self.voices))
        if name not in self.voices:
            known = ", ".join(self.voices) or "none: this directory has no spk2info.pt"
            raise BadInput(f"speaker '{name or ''}' is unknown; known: {known}")
        return name, self.voices[name]

    @torch.inference_mode()
    def speak(self, sentences: Sequence[Sentence], batch_size: int = 8) -> Iterator[Spoken]:
        """Speak sentences of a like length side by side; yield each when all of it has been spoken.

        A sentence of which nothing can be spoken comes back with an empty wave.
        """
        with self.timed("text"):
            waiting = {number: self.segments(sentence) for number, sentence in enumerate(sentences)}
        queue = sorted((part for parts in waiting.values() for part in parts), key=lambda part: len(part.ids))
        for number in [number for number, parts in waiting.items() if not parts]:
            del waiting[number]
            yield Spoken(sentences[number], torch.zeros(0), [], False, False, NOTHING)
        for start in range(0, len(queue), batch_size):
            group = queue[start : start + batch_size]
            with self.timed("llm"):
                self.add_tokens([part for part in group if part.sentence.tokens is None])
            said = [part for part in group if part.tokens]
            for some in bounded([len(part.tokens) for part in said], MAX_TOKENS):
                self.add_waves([said[i] for i in some])
            for part in group:
                if part.wav is None:
                    part.wav, part.trouble = torch.zeros(0), part.trouble or "the language model said nothing"
            for number in [n for n, parts in waiting.items() if all(part.wav is not None for part in parts)]:
                yield self.join(sentences[number], waiting.pop(number))

    def segments(self, sentence: Sentence) -> list[Segment]:
        """Normalise and split a sentence; what goes before each segment depends on the mode (table above)."""
        if sentence.tokens is not None:
            return [Segment(sentence, [], [], (sentence.seed, 0), list(sentence.tokens))]
        prompt: list[int] = []
        if sentence.mode == "zero_shot":
            prompt = sentence.voice.prompt_text
        elif sentence.mode == "instruct":
            prompt = self.tokenizer.encode(sentence.instruction.removesuffix(text.END_OF_PROMPT) + text.END_OF_PROMPT)
        parts = text.segments(sentence.text, self.tokenizer, self.settings["text"]["frontend"])
        keys = [(sentence.seed, number, zlib.crc32(part.encode())) for number, part in enumerate(parts)]
        return [
            Segment(sentence, self.tokenizer.encode(part), prompt, key) for part, key in zip(parts, keys, strict=True)
        ]

    def add_tokens(self, parts: Sequence[Segment]) -> None:
        """Text -> speech tokens; what hits the limit of its length is tried once more with another seed."""
        self.decode(parts)
        again = [part for part in parts if not part.ended]
        for part in again:
            part.tokens, part.retried, part.seed = [], True, (*part.seed, 1)
        if again:
            self.decode(again)

    def decode(self, parts: Sequence[Segment]) -> None:
        own = self.settings["llm"]
        ratios = {key: own[key] for key in ("min_token_text_ratio", "max_token_text_ratio")}
        requests = []
        for part in parts:
            sample = partial(ras_sampling, uniform=np.random.default_rng(part.seed).random, **own["sampling"])
            speech = part.sentence.voice.prompt_token.tolist() if part.sentence.mode == "zero_shot" else []
            requests.append(Request(part.ids, sample, part.prompt_text, speech, **ratios))
        for number, token in self.llm.decode_rows(requests):
            parts[number].tokens.append(token)
        for part in parts:
            part.ended = 0 < len(part.tokens) < int(len(part.ids) * own["max_token_text_ratio"])

    def add_waves(self, parts: Sequence[Segment]) -> None:
        """Speech tokens -> waves; where that fails, one by one, and what fails alone has a `trouble`."""
        failure = ""
        try:
            with self.timed("flow"):
                mels = self.mels(parts)
            with self.timed("vocoder"):
                for some in bounded([len(mel) for mel in mels], MAX_FRAMES[self.device.type]):
                    waves = self.waves([mels[i] for i in some], [parts[i].seed for i in some])
                    for i, wav in zip(some, waves, strict=True):
                        parts[i].wav = wav
        except (BadInput, torch.OutOfMemoryError) as error:
            failure = str(error).split("\n")[0]
        if failure and len(parts) == 1:
            parts[0].trouble = failure
        elif failure:  # after the handler: the error holds on to the memory of what failed
            for part in parts:
                self.add_waves([part])

    def mels(self, parts: Sequence[Segment]) -> list[Tensor]:
        """Speech tokens -> the mel (T, 80) of each at synth.speed, side by side."""
        prompted = [part.sentence.mode != "sft" for part in parts]
        none = Voice(torch.zeros(1, 1))
        prompts = [part.sentence.voice if yes else none for part, yes in zip(parts, prompted, strict=True)]
        mel, frames = self.flow.inference(
            token=[torch.tensor(part.tokens) for part in parts],
            prompt_token=[voice.prompt_token for voice in prompts],
            prompt_feat=[voice.prompt_feat for voice in prompts],
            embedding=torch.cat([part.sentence.voice.embedding for part in parts]).to(self.device),
            n_timesteps=self.settings["flow"]["n_timesteps"],
        )
        rows = [row[:, :n] for row, n in zip(mel, frames.tolist(), strict=True)]
        speed = self.settings["synth"]["speed"]
        if speed != 1:
            sizes = [max(1, int(row.shape[1] / speed)) for row in rows]
            rows = [F.interpolate(row[None], size=n, mode="linear")[0] for row, n in zip(rows, sizes, strict=True)]
        return [row.T for row in rows]

    def waves(self, mels: list[Tensor], seeds: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Mels (T, 80) -> the wave (480 T,) of each, side by side."""
        frames = [len(mel) for mel in mels]
        noise = self.hift.draw_noise(frames, [torch_generator(np.random.default_rng(seed)) for seed in seeds])
        wav, _ = self.hift(
            pad_sequence(mels, batch_first=True).transpose(1, 2),
            noise.to(self.device),
            torch.tensor(frames, device=self.device),
        )
        return [row[: self.hift.hop * n] for row, n in zip(wav.cpu(), frames, strict=True)]

    def join(self, sentence: Sentence, parts: Sequence[Segment]) -> Spoken:
        """Put the segments of a sentence together, with a pause between them."""
        pause = torch.zeros(round(self.settings["synth"]["pause"] * audio.SAMPLE_RATE))
        waves = [wave for part in parts if len(part.wav) for wave in (pause, part.wav)][1:]
        wav = torch.cat(waves) if waves else torch.zeros(0)
        tokens = [token for part in parts for token in part.tokens]
        ended, retried = all(part.ended for part in parts), any(part.retried for part in parts)
        trouble = "; ".join(dict.fromkeys(part.trouble for part in parts if part.trouble))
        return Spoken(sentence, wav, tokens, ended and not trouble, retried, trouble)


def bounded(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Yield the indices of `sizes` in groups of a like size, each with at most `most` when padded, or one alone."""
    group: list[int] = []
    for i in sorted(range(len(sizes)), key=sizes.__getitem__):
        if group and sizes[i] * (len(group) + 1) > most:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def with_prompt(voice: Voice, wav: Tensor, tokens: np.ndarray, prompt_text: list[int]) -> Voice:
    """Return `voice` with a prompt: wav (T,) at 24 kHz padded to whole tokens, its tokens (T / 960,), its text ids."""
    feat = audio.log_mel(wav)
    n = min(len(tokens), len(feat) // audio.MEL_PER_TOKEN)
    token = torch.from_numpy(tokens[:n].astype(np.int64))
    return replace(voice, prompt_text=prompt_text, prompt_token=token, prompt_feat=feat[: audio.MEL_PER_TOKEN * n])
