"""Speaker vectors (campplus.onnx) and speech tokens (speech_tokenizer_v2.onnx), and the files that keep them.

Both models read 16 kHz audio and work in three steps, so that many utterances can share the middle one:

    wav (T,) --features--> array --infer, a list at once--> raw outputs --checked--> result, or BadInput

The graph inputs are taken by position: published files differ in names only.
"""

import contextlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyvoice_ft import audio
from cosyvoice_ft.files import BadInput, whole

EMBEDDING_SIZE = 192
CODEBOOK_SIZE = 6561  # 3 ** 8


class OnnxModel:
    """One onnxruntime session; may be called from several threads at once. `card` is the number of the CUDA device."""

    group = 1  # utterances that `infer` likes to get at once

    def __init__(self, path: str | Path, providers: list[str], card: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # utterances run side by side instead
        options.log_severity_level = 3
        self.path = Path(path)
        if not self.path.is_file():
            raise BadInput(f"{path}: no such file; the pretrained directory is incomplete, fetch it again (stage -1)")
        on_card = providers[0].startswith("CUDA")
        where = [{"device_id": card} if name.startswith("CUDA") else {} for name in providers]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers, where)
        except Exception as error:  # onnxruntime raises classes of its own, all directly from Exception
            raise BadInput(f"{path}: not an ONNX model that onnxruntime can load: {error}") from error
        self.inputs = [entry.name for entry in self.session.get_inputs()]
        self.turn = threading.Semaphore(2) if on_card else contextlib.nullcontext()  # each run has memory of its own

    def __call__(self, wav: Tensor) -> np.ndarray:
        """wav (T,) at 16 kHz -> the result of this one utterance. Raises BadInput when there is none."""
        features = self.features(wav)
        return self.checked(self.infer([features])[0], features)

    def run(self, *arrays: np.ndarray) -> np.ndarray:
        """Return the graph's first output."""
        with self.turn:
            return self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))[0]


class SpeakerEncoder(OnnxModel):
    """CAM++ (Wang et al., 2023): the raw vector of a voice, (192,) float32, not normalised."""

    def features(self, wav: Tensor) -> np.ndarray:
        """wav (T,) -> (frames, 80)."""
        return audio.fbank(wav).numpy()

    def infer(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """One at a time: the graph takes no lengths."""
        return [self.run(one[None]).reshape(-1) for one in features]

    def checked(self, vector: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Raises BadInput for a vector that is not 192 finite values."""
        if vector.shape != (EMBEDDING_SIZE,) or not np.isfinite(vector).all():
            raise BadInput(f"speaker vector of shape {vector.shape} is not {EMBEDDING_SIZE} finite values")
        return vector


class SpeechTokenizer(OnnxModel):
    """S3 tokenizer (Du et al., CosyVoice 2, 2024, section 2.1): 25 tokens a second by finite scalar quantisation."""

    MAX_SECONDS = 30

    def features(self, wav: Tensor) -> np.ndarray:
        """wav (T,), T a multiple of 640 (40 ms) -> (128, T / 160). Raises BadInput above 30 s."""
        if (seconds := len(wav) / audio.ANALYSIS_RATE) > self.MAX_SECONDS:
            raise BadInput(
                f"{seconds:.1f} s; the speech tokenizer takes at most {self.MAX_SECONDS} s, cut the recording"
            )
        return audio.whisper_mel(wav).numpy()

    def infer(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.run(mel[None], np.array([mel.shape[1]], np.int32)).reshape(-1) for mel in features]

    def checked(self, tokens: np.ndarray, features: np.ndarray) -> np.ndarray:
        """Return (T / 640,) int16. Raises BadInput for too few, too many, or ids outside the codebook."""
        n_tokens, rest = divmod(features.shape[1], audio.WHISPER_PER_TOKEN)
        assert not rest, "pad to whole tokens first: load_for_extraction"
        if len(tokens) != n_tokens:
            seconds = n_tokens / audio.TOKEN_RATE
            raise BadInput(f"{len(tokens)} tokens for {seconds:.2f} s; 25 a second are {n_tokens}")
        if tokens.min() < 0 or tokens.max() >= CODEBOOK_SIZE:
            raise BadInput(f"token ids {tokens.min()}..{tokens.max()} lie outside the codebook of {CODEBOOK_SIZE}")
        return tokens.astype(np.int16)


class BatchSpeechTokenizer(SpeechTokenizer):
    """The same network exported for batches (speech_tokenizer_v2.batch.onnx): like lengths, padded with zeros."""

    group = 64
    MAX_FRAMES = 48000  # of a batch, padding included: 8 minutes

    def infer(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        lengths = np.array([mel.shape[1] for mel in features], np.int32)
        tokens: list[np.ndarray] = [np.empty(0)] * len(features)
        queue = np.argsort(lengths, kind="stable")[::-1]  # longest first
        while len(queue):
            rows, queue = np.split(queue, [max(1, self.MAX_FRAMES // lengths[queue[0]])])
            batch = np.zeros((len(rows), audio.WHISPER_MELS, lengths[rows[0]]), np.float32)
            for i, row in enumerate(rows):
                batch[i, :, : lengths[row]] = features[row]
            for row, ids in zip(rows, self.run(batch, lengths[rows]), strict=True):
                tokens[row] = ids[: lengths[row] // audio.WHISPER_PER_TOKEN]
        return tokens


def load_for_extraction(path: str | Path) -> tuple[Tensor, Tensor]:
    """Return the padded wave that tokens, mel and vector all read: (T,) at 24 kHz and (2T/3,) at 16 kHz.

    T is a whole number of 40 ms (960 samples), so that mel frames == 2 x tokens by construction.
    """
    wav24 = audio.pad_to_token(audio.load_wav(path, audio.SAMPLE_RATE), audio.SAMPLE_RATE)
    return wav24, audio.resample(wav24, audio.SAMPLE_RATE, audio.ANALYSIS_RATE)


def save_archive(path: str | Path, arrays: Mapping[str, np.ndarray], **more: object) -> dict[str, np.ndarray]:
    """Save {key: (n,) array} for `load_archive`, `more` for `read_archive`; return the arrays as parts of one block.

    Keys, lengths and values are one block each on disk, so that a million entries cost what one does. The bytes depend
    on nothing but the content.
    """
    keys, lengths = "\n".join(arrays), [len(array) for array in arrays.values()]
    values = np.concatenate(list(arrays.values()) or [np.empty(0, np.float32)])
    blocks = {"keys": keys, "lengths": torch.tensor(lengths, dtype=torch.int32), "values": torch.from_numpy(values)}
    with whole(path) as part, open(part, "wb") as file:  # a file without a name: torch would put it into the bytes
        try:
            torch.save(blocks | more, file)
        except RuntimeError as error:  # torch's zip writer hides why a write failed
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    return _cut(keys, lengths, values)


def _cut(keys: str, lengths: Sequence[int], values: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum(lengths, dtype=np.int64).tolist()
    bounds = zip([0, *ends], ends, strict=False)
    return {key: values[start:end] for key, (start, end) in zip(keys.split("\n"), bounds, strict=False)}


def load_archive(path: str | Path) -> dict[str, np.ndarray]:
    """Load {key: array}. Raises BadInput for a file that is missing or is not such an archive."""
    return read_archive(path)[0]


def read_archive(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Load ({key: array}, what else was saved with them). Raises BadInput as load_archive."""
    try:
        more = torch.load(path, weights_only=True)
        keys, lengths, values = (more.pop(name) for name in ("keys", "lengths", "values"))
        return _cut(keys, lengths.tolist(), values.numpy()), more
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; run the stage that makes it") from error
    except (RuntimeError, EOFError, AttributeError, ValueError, KeyError) as error:
        raise BadInput(f"{path}: not a readable archive; delete it and run the stage that makes it") from error
