"""The language model of CosyVoice2: Qwen2 continues text with speech tokens (Du et al., CosyVoice 2, section 2.2).

One row is a sequence of embeddings from three tables: text (Qwen2's own), speech, and two special vectors:

    input    sos  text_1 .. text_N  task  speech_1 .. speech_S
    target    -    -         -        speech_1  ..  speech_S  eos

so the target of a position is what follows it, and positions marked - carry no loss. A streaming ("bistream") row
interleaves blocks of 5 text and 15 speech tokens; after each full block the model learns to say `fill`, "give me
more text" (ibid., figure 2):

    input    sos  t1 .. t5  s1 .. s15  t6 .. t10  s16 .. s30   rest of text  task  rest of speech
    target    -   - .. s1   s2 .. fill  - .. s16  ..     fill   -            s31   ..         eos

The loss is the cross entropy at the target positions; logits over the 151,936 text ids are never computed.

    B rows   L positions   N target positions   D hidden size   V = n + 3 output classes, n = 6561 speech tokens
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cosyvoice_ft.models.qwen2 import Cache, Qwen2ForCausalLM, Rows, sizes_of

PADDING, SPECIAL, TEXT, SPEECH = range(4)  # kinds of input positions: which table a position's embedding comes from
SOS, TASK = 0, 1  # rows of the special table
NO_TARGET = -1
Sampler = Callable[[Tensor, Sequence[int]], int]  # (log-probabilities (V,), decoded) -> the next id


@dataclass(frozen=True)
class Layout:
    """How a row is laid out: `speech_token_size` codes, then eos, (unused), fill; blocks of `mix_ratio` text:speech."""

    speech_token_size: int = 6561
    mix_ratio: tuple[int, int] = (5, 15)

    @property
    def eos(self) -> int:
        return self.speech_token_size

    @property
    def fill(self) -> int:
        return self.speech_token_size + 2

    @property
    def stop(self) -> range:
        """The ids that end decoding."""
        return range(self.speech_token_size, self.speech_token_size + 3)

    def fits_bistream(self, text: np.ndarray, speech: np.ndarray) -> bool:
        """Return whether there are more than 15/5 speech tokens a text token; other rows are laid out unistream."""
        n_text, n_speech = self.mix_ratio
        return len(speech) / max(len(text), 1) > n_speech / n_text

    def row(self, text: np.ndarray, speech: np.ndarray, bistream: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (kind, index, target), each (L,), of text (Nt,) and speech (S,)."""
        n_text, n_speech = self.mix_ratio
        if not (bistream and self.fits_bistream(text, speech)):
            return _join([_special(SOS), _text(text), _special(TASK), _speech(speech, self.eos)])
        blocks = [_special(SOS)]
        for j in range(len(text) // n_text):
            block = speech[j * n_speech : (j + 1) * n_speech]
            blocks += [_text(text[j * n_text : (j + 1) * n_text]), _speech(block, self.fill)]
        full = len(text) // n_text
        rest = [_text(text[full * n_text :]), _special(TASK), _speech(speech[full * n_speech :], self.eos)]
        return _join(blocks + rest)


# A piece is (kind, index, says): `says` are the tokens to be predicted from here on, starting one position before.
Piece = tuple[int, np.ndarray, Sequence[int]]


def _special(row: int) -> Piece:
    return SPECIAL, np.array([row]), ()


def _text(ids: np.ndarray) -> Piece:
    return TEXT, ids, ()


def _speech(ids: np.ndarray, then: int) -> Piece:
    return SPEECH, ids, np.append(ids, then)


def _join(pieces: list[Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    kinds, indices, says = zip(*pieces, strict=True)
    lengths = [len(index) for index in indices]
    kind, index = np.repeat(kinds, lengths), np.concatenate(indices).astype(np.int64)
    target, start = np.full(len(index), NO_TARGET), 0
    for length, said in zip(lengths, says, strict=True):
        if len(said):
            target[start - 1 : start + length] = said
        start += length
    return kind, index, target


def collate(
    rows: Sequence[dict], rngs: Sequence[np.random.Generator], *, layout: Layout, bistream: bool | None = None
) -> dict[str, Tensor]:
    """Lay out utterances with `text_token` (Nt,) and `speech_token` (S,) as one padded batch.

    A row is bistream when its own coin is below 0.5; `bistream` fixes the choice (the coin is drawn all the same).
    Returns kind, index (B, L); pack (P,), the positions of that grid that are no padding, flat; the targets, flat:
    target and target_position (N,), places in the grid; and count, N.
    """
    coins = [rng.random() < 0.5 for rng in rngs]
    laid = [
        layout.row(row["text_token"], row["speech_token"], coin if bistream is None else bistream)
        for row, coin in zip(rows, coins, strict=True)
    ]
    batch = np.zeros((3, len(rows), max(len(kind) for kind, _, _ in laid)), dtype=np.int64)
    batch[2] = NO_TARGET
    for i, row in enumerate(laid):
        batch[:, i, : len(row[0])] = row
    kind, index, target = torch.from_numpy(batch)
    position = (target.view(-1) != NO_TARGET).nonzero()[:, 0]
    pack = (kind.view(-1) != PADDING).nonzero()[:, 0]
    targets = {"target": target.view(-1)[position], "target_position": position, "count": float(len(position))}
    return {"kind": kind, "index": index, "pack": pack} | targets


def smoothed_loss(logits: Tensor, target: Tensor, lsm_weight: float) -> Tensor:
    """Return sum over N of KL(q || softmax(logits)), q = 1 - eps on the target and eps / (V - 1) elsewhere.

    logits (N, V), target (N,). eps = 0 gives the cross entropy. (Label smoothing: Szegedy et al., 2016.)
    """
    logits = logits.float()
    if lsm_weight == 0:
        return F.cross_entropy(logits, target, reduction="sum")
    logp = logits.log_softmax(-1)
    rest = lsm_weight / (logits.shape[1] - 1)
    hit = logp.gather(1, target[:, None]).sum()
    cross = -(1 - lsm_weight - rest) * hit - rest * logp.sum()
    entropy = -(1 - lsm_weight) * np.log(1 - lsm_weight) - lsm_weight * np.log(rest)
    return cross - entropy * len(target)


@dataclass
class Request:
    """One text to be decoded. `sample(log_probs (V,), decoded)` chooses the next id.

    At least `min_token_text_ratio` speech tokens a text token, at most `max_token_text_ratio`; the ratios count the
    text to speak, not the prompt's. (The minimum keeps eos away and leaves the other stop ids, as the reference does.)
    """

    text: Sequence[int]
    sample: Sampler
    prompt_text: Sequence[int] = ()
    prompt_speech: Sequence[int] = ()
    min_token_text_ratio: float = 2
    max_token_text_ratio: float = 20

    def pieces(self) -> list[tuple[int, Sequence[int]]]:
        text = (TEXT, [*self.prompt_text, *self.text])
        return [(SPECIAL, [SOS]), text, (SPECIAL, [TASK]), (SPEECH, [*self.prompt_speech])]

    def next_token(self, scores: Tensor, decoded: Sequence[int], layout: Layout) -> int | None:
        """Return the next speech token, None at the end."""
        if len(decoded) >= int(len(self.text) * self.max_token_text_ratio):
            return None
        if len(decoded) < int(len(self.text) * self.min_token_text_ratio):
            scores[layout.eos] = -torch.inf
        token = self.sample(scores, decoded)
        return None if token in layout.stop else token


class Qwen2Encoder(nn.Module):
    """Holds Qwen2 under the published name `llm.model`."""

    def __init__(self, qwen: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model = qwen


class Qwen2LM(nn.Module):
    """Text and speech tokens in, log-probabilities of the next speech token out."""

    def __init__(
        self,
        *,
        qwen: Qwen2ForCausalLM,
        speech_token_size: int = 6561,
        mix_ratio: Sequence[int] = (5, 15),
        lsm_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.layout = Layout(speech_token_size, tuple(mix_ratio))
        self.lsm_weight = lsm_weight
        hidden_size = qwen.model.embed_tokens.embedding_dim
        self.llm_embedding = nn.Embedding(2, hidden_size)
        self.llm = Qwen2Encoder(qwen)
        self.llm_decoder = nn.Linear(hidden_size, speech_token_size + 3)
        self.speech_embedding = nn.Embedding(speech_token_size + 3, hidden_size)

    @classmethod
    def from_weights(cls, weights: dict[str, Tensor], *, qwen_config: dict, **settings) -> Self:
        """Build with the sizes of `weights` and of CosyVoice-BlankEN/config.json, and load strictly.

        Raises RuntimeError when names or shapes do not fit.
        """
        with torch.device("meta"):
            qwen = Qwen2ForCausalLM(**sizes_of(qwen_config))
            model = cls(qwen=qwen, speech_token_size=len(weights["speech_embedding.weight"]) - 3, **settings)
        text_table = weights["llm.model.model.embed_tokens.weight"]
        model.load_state_dict({"llm.model.lm_head.weight": text_table} | weights, strict=True, assign=True)
        qwen.tie()  # loading by assignment made two of them
        return model

    def layers(self) -> list[nn.Module]:
        """The layers whose activations need not be kept (see memory.recompute)."""
        return list(self.llm.model.model.layers)

    def embed(self, kind: Tensor, index: Tensor) -> Tensor:
        """Look up each position in the table of its kind: kind, index (...) -> (..., D); padding gives zeros."""
        tables = {SPECIAL: self.llm_embedding, TEXT: self.llm.model.model.embed_tokens, SPEECH: self.speech_embedding}
        xs = None
        for number, table in tables.items():
            here = kind == number
            part = table(index * here) * here[..., None]
            xs = part if xs is None else xs + part
        return xs

    def hidden(self, xs: Tensor, cache: Cache | None = None) -> Tensor:
        """Run Qwen2 causally over xs (B, L, D), after what `cache` holds; return the normed last states (B, L, D)."""
        cache = cache or Cache()
        cache.feed(*xs.shape[:2], xs.device)
        return self.llm.model.model(xs, cache)

    def forward(
        self, kind: Tensor, index: Tensor, pack: Tensor, target: Tensor, target_position: Tensor
    ) -> dict[str, Tensor]:
        """Return loss (sum over the N targets) and hits (correct argmax) of a batch made by `collate`.

        The rows are packed: nothing is computed at the padding of the grid kind, index (B, L).
        """
        xs = self.embed(kind.flatten()[pack], index.flatten()[pack])  # (P, D)
        rows = Rows(pack, *kind.shape)
        states = rows.unpack(self.llm.model.model(xs, rows))  # (B, L, D)
        logits = self.llm_decoder(states.flatten(0, 1).index_select(0, target_position))
        return {
            "loss": smoothed_loss(logits, target, self.lsm_weight),
            "hits": (logits.argmax(-1) == target).sum(),
        }

    def log_probs(self, xs: Tensor, cache: Cache) -> Tensor:
        """Feed xs (B, L, D) after the cache; return log-probabilities (B, V) of what follows the last position."""
        return self.llm_decoder(self.hidden(xs, cache)[:, -1]).float().log_softmax(-1)

    def look_up(self, pieces: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
        """Embed pieces (kind, ids) one after another: -> (1, L, D)."""
        device = self.llm_decoder.weight.device
        kind = torch.tensor([[kind for kind, ids in pieces for _ in ids]], device=device)
        index = torch.tensor([[i for _, ids in pieces for i in ids]], device=device)
        return self.embed(kind, index)

    def decode(self, text: Sequence[int], **options) -> Iterator[int]:
        """Yield the speech tokens of one `Request(text, **options)`, see there."""
        for _, token in self.decode_rows([Request(text, **options)]):
            yield token

    @torch.inference_mode()
    def decode_rows(self, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        """Yield (number of the request, speech token) as they are decoded, all requests side by side.

        A row ends at a stop id, or at its maximum; the rows that remain go on without it.
        """
        if not requests:
            return
        device = self.llm_decoder.weight.device
        starts = [self.look_up(request.pieces()) for request in requests]
        lengths = torch.tensor([start.shape[1] for start in starts], device=device)
        xs = pad_sequence([start[0] for start in starts], batch_first=True)  # (B, L, D)
        cache, alive, decoded = Cache(), list(range(len(requests))), [[] for _ in requests]
        cache.feed(*xs.shape[:2], device, lengths)
        states = self.llm.model.model(xs, cache)[torch.arange(len(alive), device=device), lengths - 1]  # (B, D)
        while alive:
            scores = self.llm_decoder(states).float().log_softmax(-1).cpu()  # (B, V)
            going = []
            for row, number in enumerate(alive):
                token = requests[number].next_token(scores[row], decoded[number], self.layout)
                if token is not None:
                    yield number, token
                    decoded[number].append(token)
                    going.append(row)
            if len(going) < len(alive):
                alive = [alive[row] for row in going]
                cache.keep(torch.tensor(going, dtype=torch.long, device=device))
            if alive:
                last = torch.tensor([[decoded[number][-1]] for number in alive], device=device)
                states = self.hidden(self.speech_embedding(last), cache)[:, -1]

    @torch.inference_mode()
    def decode_stream(
        self,
        text: Iterable[Sequence[int]],
        *,
        sample: Sampler,
        prompt_text: Sequence[int] = (),
        prompt_speech: Sequence[int] = (),
    ) -> Iterator[int]:
        """Yield speech tokens while the text still arrives, in pieces of any length (a bistream row, written live).

        After every block of 5 text tokens come up to 15 speech tokens and `fill`; when the text has ended, the rest
        follows unbounded until eos. Raises RuntimeError when the model says a special id where none belongs.

        The reference feeds the last block again when the text ends, though it is in the cache already; here it is not.
        """
        n_text, n_speech = self.layout.mix_ratio
        eos, fill = self.layout.eos, self.layout.fill
        queue, prompt, out, cache = list(prompt_text), list(prompt_speech), [], Cache()
        pending = [(SPECIAL, [SOS])]
        next_fill = n_speech - len(prompt) % n_speech
        for piece in text:
            queue += piece
            while prompt and len(queue) >= n_text:
                pending += [(TEXT, queue[:n_text]), (SPEECH, prompt[:n_speech])]
                del queue[:n_text], prompt[:n_speech]
            if prompt:
                continue
            if not out and len(pending) == 1 or out and out[-1] == fill:
                if len(queue) < n_text:
                    continue
                pending += [(TEXT, queue[:n_text])]
                del queue[:n_text]
            while pending:  # until a fill, which is not fed back
                scores = self.log_probs(self.look_up(pending), cache)[0]
                pending = []
                if len(out) == next_fill:
                    token = fill
                else:
                    scores[eos] = -torch.inf
                    token = sample(scores, out)
                if token == fill:
                    next_fill = len(out) + n_speech + 1
                out.append(token)
                if token < self.layout.speech_token_size:
                    yield token
                    pending = [(SPEECH, [token])]
                elif token != fill:
                    raise RuntimeError(f"id {token} inside a block; only speech tokens and fill ({fill}) belong there")
        pending += [(TEXT, queue), (SPECIAL, [TASK])]
        while True:
            token = sample(self.log_probs(self.look_up(pending), cache)[0], out)
            if token == eos:
                return
            if token >= self.layout.speech_token_size:
                raise RuntimeError(f"id {token} after the text; only speech tokens and eos ({eos}) belong there")
            yield token
            out.append(token)
            pending = [(SPEECH, [token])]
