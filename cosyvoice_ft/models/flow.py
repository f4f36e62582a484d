"""Flow of CosyVoice2: speech tokens (25 Hz) and a speaker vector -> log-mel spectrogram (50 Hz, 80 bins).

    mu   = Linear(encoder(embedding of the tokens))        (B, T, 80), two frames per token
    spks = Linear(e / |e|)                                 e: 192 numbers of the speaker, from campplus
    cond = the first frames of the mel, then zeros         what has already been said, and in which voice
    mel  ~ flow matching from noise under (mu, spks, cond) models/cfm.py

Training shows a known beginning of random length and now and then none of the conditions; one row in two is masked as
in streaming. Synthesis puts prompt tokens before the new ones and the prompt's mel into cond, and cuts the prompt off.

What a row contributes depends on that row alone: its random draws come in the batch (`collate`), and padding is
invisible. Lengths: S speech tokens, T = 2 S mel frames, P prompt frames. Source: Du et al. 2024, arXiv:2412.10117,
section 2.4; names and numbers of the released CosyVoice2-0.5B.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.attention import padding_mask
from cosyvoice_ft.models.cfm import NOISE_FRAMES, CausalConditionalCFM, fixed_noise, torch_generator
from cosyvoice_ft.models.conformer import UpsampleConformerEncoder
from cosyvoice_ft.models.unet import CausalConditionalDecoder

FRAMES_PER_TOKEN = 2  # mel frames at 50 Hz, tokens at 25 Hz


class CausalMaskedDiffWithXvec(nn.Module):
    """Encoder, speaker projection and flow-matching decoder under the published names."""

    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: CausalConditionalCFM,
        vocab_size: int = 6561,
        input_size: int = 512,
        output_size: int = 80,
        spk_embed_dim: int = 192,
    ):
        super().__init__()
        self.input_embedding = nn.Embedding(vocab_size, input_size)
        self.spk_embed_affine_layer = nn.Linear(spk_embed_dim, output_size)
        self.encoder = encoder
        self.encoder_proj = nn.Linear(input_size, output_size)
        self.decoder = decoder

    @classmethod
    def from_weights(
        cls,
        weights: dict[str, Tensor],
        *,
        chunk_size: int = 25,
        dropout_rate: float = 0.1,
        positional_dropout_rate: float = 0.1,
        attention_dropout_rate: float = 0.1,
        embedded_padding: bool = False,
        estimator_num_heads: int = 8,
        estimator_dropout: float = 0.0,
        sigma_min: float = 1e-6,
        inference_cfg_rate: float = 0.7,
    ) -> Self:
        """Build the network that `weights` belong to and put them in, without a copy.

        Sizes come from names and shapes, settings are what those do not show: chunk_size in tokens, `embedded_padding`
        as in UpsampleConformerEncoder. Raises BadInput when the weights are not those of a CosyVoice2 flow.
        """
        try:
            encoder_sizes = UpsampleConformerEncoder.sizes(part(weights, "encoder."))
            estimator_sizes = CausalConditionalDecoder.sizes(part(weights, "decoder.estimator."))
            vocab_size, input_size = weights["input_embedding.weight"].shape
            output_size, spk_embed_dim = weights["spk_embed_affine_layer.weight"].shape
        except KeyError as missing:
            raise BadInput(f"flow weights: no tensor {missing}; give the flow.pt of a CosyVoice2 model") from missing
        with torch.device("meta"):
            encoder = UpsampleConformerEncoder(
                **encoder_sizes,
                chunk_size=chunk_size,
                dropout=dropout_rate,
                positional_dropout=positional_dropout_rate,
                attention_dropout=attention_dropout_rate,
                embedded_padding=embedded_padding,
            )
            estimator = CausalConditionalDecoder(
                **estimator_sizes,
                num_heads=estimator_num_heads,
                chunk_size=chunk_size * FRAMES_PER_TOKEN,
                dropout=estimator_dropout,
            )
            model = cls(
                encoder=encoder,
                decoder=CausalConditionalCFM(
                    estimator=estimator, sigma_min=sigma_min, inference_cfg_rate=inference_cfg_rate
                ),
                vocab_size=vocab_size,
                input_size=input_size,
                output_size=output_size,
                spk_embed_dim=spk_embed_dim,
            )
        model.load_state_dict(weights, strict=True, assign=True)
        return model

    def layers(self) -> list[nn.Module]:
        """The layers whose activations need not be kept (see memory.recompute)."""
        estimator = self.decoder.estimator
        stages = [*estimator.down_blocks, *estimator.mid_blocks, *estimator.up_blocks]
        return [*self.encoder.encoders, *self.encoder.up_encoders, *stages]

    @property
    def lookahead(self) -> int:
        """Tokens that the encoder looks ahead."""
        return self.encoder.pre_lookahead_layer.lookahead

    def speaker(self, embedding: Tensor) -> Tensor:
        """Speaker vectors (B, 192) of any length -> spks (B, 80)."""
        return self.spk_embed_affine_layer(F.normalize(embedding.float(), dim=1))

    def encode(
        self, token: Tensor, token_len: Tensor, streaming: Tensor, *, finalize: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, S), lengths (B,), streaming (B,) bool -> mu (B, 80, T), lengths (B,) in frames.

        With finalize=False the last tokens (3) serve as look-ahead only and get no frames.
        """
        mask = padding_mask(token_len, token.shape[1])
        x = self.input_embedding(token.clamp(min=0)) * mask[..., None]
        h, frames = self.encoder(x, token_len, streaming, finalize=finalize)
        return self.encoder_proj(h).transpose(1, 2), frames

    def forward(
        self,
        *,
        speech_token: Tensor,
        speech_token_len: Tensor,
        speech_feat: Tensor,
        speech_feat_len: Tensor,
        embedding: Tensor,
        streaming: Tensor,
        prompt_len: Tensor,
        t: Tensor,
        z: Tensor,
        keep: Tensor,
    ) -> dict[str, Tensor]:
        """Flow-matching loss of a batch as `collate` makes it.

        speech_token (B, S) int64, speech_feat (B, T, 80) log mel with T = 2 S, float16 or float32, their lengths (B,);
        embedding (B, 192); the draws: streaming (B,) bool, prompt_len (B,) frames of the mel given as cond (0 = none),
        t (B,) and z (B, T, 80) time and noise, keep (B,) bool (False: conditions dropped).
        Returns loss, the sum of squared errors over the 80 bins of the valid frames.
        """
        x1, z = speech_feat.float().transpose(1, 2), z.float().transpose(1, 2)  # (B, 80, T)
        length = x1.shape[2]
        mu, _ = self.encode(speech_token, speech_token_len, streaming)
        mask = padding_mask(speech_feat_len, length)[:, None].to(x1.dtype)  # (B, 1, T)
        cond = x1 * padding_mask(prompt_len, length)[:, None]
        spks = self.speaker(embedding)
        loss = self.decoder.loss(x1, mask, mu, spks, cond, t=t, z=z, keep=keep, streaming=streaming)
        return {"loss": loss}

    @torch.no_grad()
    def inference(
        self,
        *,
        token: Sequence[Tensor],
        prompt_token: Sequence[Tensor],
        prompt_feat: Sequence[Tensor],
        embedding: Tensor,
        streaming: bool = False,
        finalize: bool = True,
        n_timesteps: int = 10,
    ) -> tuple[Tensor, Tensor]:
        """Mel of the new tokens of each row, spoken as in the prompt of that row.

        token: B of (S,) int64; prompt_token: B of (S',), prompt_feat: B of (P, 80), P = 2 S', both empty for no prompt;
        embedding (B, 192). streaming=True masks by chunks; finalize=False: more tokens follow, the last 3 are only
        looked at. Returns mel (B, 80, T) float32, zeros after the end of a row, and lengths (B,): 2 (S' + S) - P,
        less 6 when not final. Raises BadInput when a row has no frames or more than the noise covers (300 s).
        """
        device = embedding.device
        rows = [torch.cat(pair).to(device) for pair in zip(prompt_token, token, strict=True)]
        least, most = 1 if finalize else 1 + self.lookahead, NOISE_FRAMES // FRAMES_PER_TOKEN
        for row in rows:
            if not least <= len(row) <= most:
                raise BadInput(f"flow: {len(row)} tokens with the prompt, must be {least} to {most}; split the text")
        token_len = torch.tensor([len(row) for row in rows], device=device)
        streams = torch.full((len(rows),), streaming, device=device)

        mu, frames = self.encode(pad_sequence(rows, batch_first=True), token_len, streams, finalize=finalize)
        length = mu.shape[2]
        mask = padding_mask(frames, length)[:, None].float()  # (B, 1, T)
        prompt = pad_sequence([feat.float() for feat in prompt_feat], batch_first=True).to(device)  # (B, P, 80)
        cond = F.pad(prompt, (0, 0, 0, length - prompt.shape[1])).transpose(1, 2)
        z = fixed_noise(mu.shape[1])[..., :length].to(device).expand_as(mu)
        mel = self.decoder.sample(
            z, mask, mu, self.speaker(embedding), cond, streaming=streams, n_timesteps=n_timesteps
        )
        new = [x[:, len(feat) : n].T for x, feat, n in zip(mel, prompt_feat, frames.tolist(), strict=True)]
        return pad_sequence(new, batch_first=True).transpose(1, 2), torch.tensor([len(x) for x in new], device=device)


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights below `prefix`, named without it."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


def collate(
    rows: Sequence[dict[str, Any]],
    rngs: Sequence[np.random.Generator],
    *,
    streaming: bool | None = None,
    training_cfg_rate: float = 0.2,
) -> dict[str, Tensor]:
    """Batch of B utterances, draws included, for `CausalMaskedDiffWithXvec.forward`; `count`: terms of its loss.

    A row holds speech_token int16 (S,), speech_feat float16 (T, 80) and embedding float32 (192,); tokens and mel are
    cut to the frames both have. Its generator yields, always in this order: streaming coin (1/2; `streaming` overrules
    it), condition coin (1/2), length of the condition (0 to 30 % of the frames), t, coin for dropping the conditions
    (`training_cfg_rate`), noise z. Padding is 0.
    """
    tokens = [min(len(row["speech_token"]), len(row["speech_feat"]) // FRAMES_PER_TOKEN) for row in rows]
    frames = [FRAMES_PER_TOKEN * n for n in tokens]
    draws = [draw(rng, n, training_cfg_rate) for rng, n in zip(rngs, frames, strict=True)]
    coin, prompt_len, t, keep, generators = zip(*draws, strict=True)
    n_mels = rows[0]["speech_feat"].shape[1]
    z = torch.zeros(len(rows), max(frames), n_mels)
    for row, n, generator in zip(z, frames, generators, strict=True):
        torch.randn(n, n_mels, generator=generator, out=row[:n])
    pairs = list(zip(rows, tokens, frames, strict=True))
    return {
        "count": float(sum(frames) * n_mels),
        "speech_token": padded([row["speech_token"][:n] for row, n, _ in pairs], np.int64),
        "speech_token_len": torch.tensor(tokens),
        "speech_feat": padded([row["speech_feat"][:n] for row, _, n in pairs]),
        "speech_feat_len": torch.tensor(frames),
        "embedding": torch.tensor(np.stack([row["embedding"] for row in rows])),
        "streaming": torch.tensor(coin if streaming is None else [streaming] * len(rows)),
        "prompt_len": torch.tensor(prompt_len),
        "t": torch.tensor(t, dtype=torch.float32),
        "z": z,
        "keep": torch.tensor(keep),
    }


def draw(rng: np.random.Generator, frames: int, training_cfg_rate: float) -> tuple[bool, int, float, bool, Generator]:
    """Draws of one row of `frames` frames: streaming, prompt_len, t, keep, and a generator of z, torch's for speed."""
    streaming, conditioned = rng.random() < 0.5, rng.random() >= 0.5
    prompt_len = int(rng.integers(0, int(0.3 * frames), endpoint=True))
    t, keep = rng.random(), rng.random() > training_cfg_rate
    return streaming, prompt_len * conditioned, t, keep, torch_generator(rng)


def padded(arrays: Sequence[np.ndarray], dtype: type | None = None) -> Tensor:
    """Arrays (n, ...) -> (B, longest n, ...), zeros behind the shorter ones."""
    out = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), dtype or arrays[0].dtype)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(out)
