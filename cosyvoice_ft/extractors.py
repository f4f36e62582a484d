"""Speaker vectors (campplus.onnx) and speech tokens (speech_tokenizer_v2.onnx), and the files that keep them.

Both models read 16 kHz audio. The graph inputs are taken by position: published files differ in names only.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosyvoice_ft import audio
from cosyvoice_ft.files import BadInput, whole

EMBEDDING_SIZE = 192
CODEBOOK_SIZE = 6561  # 3 ** 8


class OnnxModel:
    """One onnxruntime session; may be called from several threads at once."""

    def __init__(self, path: str | Path, providers: list[str]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # utterances run side by side instead
        options.log_severity_level = 3
        if not Path(path).is_file():
            raise BadInput(f"{path}: no such file; the pretrained directory is incomplete, fetch it again (stage -1)")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime raises classes of its own, all directly from Exception
            raise BadInput(f"{path}: not an ONNX model that onnxruntime can load: {error}") from error
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def __call__(self, *arrays: np.ndarray) -> np.ndarray:
        return self.session.run(None, dict(zip(self.inputs, arrays, strict=True)))[0]


class SpeakerEncoder(OnnxModel):
    """CAM++ (Wang et al., 2023): the raw vector of a voice, not normalised."""

    def __call__(self, wav: Tensor) -> np.ndarray:
        """wav (T,) at 16 kHz -> (192,) float32. Raises BadInput for a vector that is not finite."""
        vector = super().__call__(audio.fbank(wav)[None].numpy()).reshape(-1)
        if vector.shape != (EMBEDDING_SIZE,) or not np.isfinite(vector).all():
            raise BadInput(f"speaker vector of shape {vector.shape} is not {EMBEDDING_SIZE} finite values")
        return vector


class SpeechTokenizer(OnnxModel):
    """S3 tokenizer (Du et al., CosyVoice 2, 2024, section 2.1): 25 tokens a second by finite scalar quantisation."""

    MAX_SECONDS = 30

    def __call__(self, wav: Tensor) -> np.ndarray:
        """wav (T,) at 16 kHz, T a multiple of 640 (40 ms) -> T / 640 tokens, int16. Raises BadInput above 30 s."""
        seconds, n_tokens = len(wav) / 16000, len(wav) // 640
        if seconds > self.MAX_SECONDS:
            raise BadInput(
                f"{seconds:.1f} s; the speech tokenizer takes at most {self.MAX_SECONDS} s, cut the recording"
            )
        mel = audio.whisper_mel(wav)[None].numpy()
        tokens = super().__call__(mel, np.array([mel.shape[2]], dtype=np.int32)).reshape(-1)
        if len(tokens) != n_tokens:
            raise BadInput(f"{len(tokens)} tokens for {seconds:.2f} s; 25 a second are {n_tokens}")
        if tokens.min() < 0 or tokens.max() >= CODEBOOK_SIZE:
            raise BadInput(f"token ids {tokens.min()}..{tokens.max()} lie outside the codebook of {CODEBOOK_SIZE}")
        return tokens.astype(np.int16)


def load_for_extraction(path: str | Path) -> tuple[Tensor, Tensor]:
    """Return the padded wave that tokens, mel and vector all read: (T,) at 24 kHz and (2T/3,) at 16 kHz.

    T is a whole number of 40 ms (960 samples), so that mel frames == 2 x tokens by construction.
    """
    wav24 = audio.pad_to_token(audio.load_wav(path, audio.SAMPLE_RATE), audio.SAMPLE_RATE)
    return wav24, audio.resample(wav24, audio.SAMPLE_RATE, 16000)


def save_archive(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Save {key: array} for `load_archive`: a dict of tensors that are views of one storage, so one block on disk."""
    shapes = [array.shape for array in arrays.values()]
    flat = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays.values()]))
    parts = flat.split([int(np.prod(shape)) for shape in shapes])
    with whole(path) as part, open(part, "wb") as file:  # a file without a name: the bytes depend on content only
        torch.save({key: t.view(shape) for key, t, shape in zip(arrays, parts, shapes, strict=True)}, file)


def load_archive(path: str | Path) -> dict[str, np.ndarray]:
    """Load {key: array}. Raises BadInput for a file that is missing or is not such an archive."""
    try:
        return {key: tensor.numpy() for key, tensor in torch.load(path, weights_only=True).items()}
    except FileNotFoundError as error:
        raise BadInput(f"{path}: no such file; run the stage that makes it") from error
    except (RuntimeError, EOFError, AttributeError, ValueError) as error:
        raise BadInput(f"{path}: not a readable archive; delete it and run the stage that makes it") from error
