#!/usr/bin/env python3
"""Make a small CosyVoice2 model directory with seeded random weights, for trying the recipe without a download.

    python local/make_tiny_base.py pretrained_models/tiny-cosyvoice2
    python local/make_tiny_base.py pretrained_models/random-0.5B --size released    # 2.6 GB, for measuring

writes every file of CosyVoice2-0.5B under its name and in its format (CosyVoice-BlankEN/, llm.pt, flow.pt, hift.pt,
campplus.onnx, speech_tokenizer_v2.onnx and its twin for batches, cosyvoice2.yaml). It knows nothing of speech: it
speaks noise by design. The ONNX models are random projections, so that the same sound gives the same tokens and the
same vector. The official code builds an encoder of width 512 whatever the yaml says: it takes the sizes official and
released, this recipe takes all three.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from cosyvoice_ft import checkpoint, cli
from cosyvoice_ft.files import BadInput
from cosyvoice_ft.models.cfm import CausalConditionalCFM
from cosyvoice_ft.models.conformer import UpsampleConformerEncoder
from cosyvoice_ft.models.flow import CausalMaskedDiffWithXvec
from cosyvoice_ft.models.hift import HiFTGenerator
from cosyvoice_ft.models.llm import Qwen2LM
from cosyvoice_ft.models.qwen2 import Qwen2ForCausalLM, sizes_of
from cosyvoice_ft.models.unet import CausalConditionalDecoder

SEED = 1986
MERGES = ("Ġ t", "h e", "i n", "r e", "o n", "Ġt he")  # a merges file must not be empty
END_OF_TEXT = 256 + len(MERGES)  # the bytes, the merges, then the special tokens
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
    "bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What the three networks are built with; the arguments left out are those of CosyVoice2-0.5B."""

    qwen: dict
    encoder: dict
    estimator: dict
    hift: dict


TINY = Sizes(
    qwen={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 384},
    encoder={"size": 64, "linear_units": 128, "num_blocks": 2, "lookahead_channels": 64},
    estimator={"channels": 64, "time_channels": 256, "inner": 64, "ff": 256, "n_blocks": 1, "num_mid_blocks": 2},
    hift={"base_channels": 64, "cond_channels": 64},
)  # fmt: skip
RELEASED = Sizes(
    qwen={"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
          "num_key_value_heads": 2, "vocab_size": 151936},
    encoder={"size": 512, "linear_units": 2048, "num_blocks": 6, "lookahead_channels": 512},
    estimator={"channels": 256, "time_channels": 1024, "inner": 512, "ff": 1024, "n_blocks": 4, "num_mid_blocks": 12},
    hift={"base_channels": 512, "cond_channels": 512},
)  # fmt: skip
SIZES = {
    "tiny": TINY,
    "official": replace(TINY, encoder={"size": 512, "linear_units": 128, "num_blocks": 2, "lookahead_channels": 512}),
    "released": RELEASED,
}

MODEL_YAML = """\
# A model with random weights in the layout of CosyVoice2-0.5B.
sample_rate: 24000
llm_input_size: {qwen[hidden_size]}
llm_output_size: {qwen[hidden_size]}
spk_embed_dim: 192
qwen_pretrain_path: ''
token_frame_rate: 25
token_mel_ratio: 2
chunk_size: 25
num_decoding_left_chunks: -1

llm: !new:cosyvoice.llm.llm.Qwen2LM
    llm_input_size: !ref <llm_input_size>
    llm_output_size: !ref <llm_output_size>
    speech_token_size: 6561
    length_normalized_loss: True
    lsm_weight: 0
    mix_ratio: [5, 15]
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: 0.8
        top_k: 25
        win_size: 10
        tau_r: 0.1

flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: {encoder[size]}
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    output_type: 'mel'
    vocab_size: 6561
    input_frame_rate: !ref <token_frame_rate>
    only_mask_loss: True
    token_mel_ratio: !ref <token_mel_ratio>
    pre_lookahead_len: 3
    encoder: !new:cosyvoice.transformer.upsample_encoder.UpsampleConformerEncoder
        output_size: {encoder[size]}
        attention_heads: 8
        linear_units: {encoder[linear_units]}
        num_blocks: {encoder[num_blocks]}
        dropout_rate: 0.1
        positional_dropout_rate: 0.1
        attention_dropout_rate: 0.1
        normalize_before: True
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        input_size: {encoder[size]}
        use_cnn_module: False
        macaron_style: False
        static_chunk_size: !ref <chunk_size>
    decoder: !new:cosyvoice.flow.flow_matching.CausalConditionalCFM
        in_channels: 240
        n_spks: 1
        spk_emb_dim: 80
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
                reg_loss_type: 'l1'
        estimator: !new:cosyvoice.flow.decoder.CausalConditionalDecoder
            in_channels: 320
            out_channels: 80
            channels: [{estimator[channels]}]
            dropout: 0.0
            attention_head_dim: {head_dim}
            n_blocks: {estimator[n_blocks]}
            num_mid_blocks: {estimator[num_mid_blocks]}
            num_heads: 8
            act_fn: 'gelu'
            static_chunk_size: !ref <chunk_size> * <token_mel_ratio>
            num_decoding_left_chunks: !ref <num_decoding_left_chunks>

hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: {hift[base_channels]}
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_alpha: 0.1
    nsf_sigma: 0.003
    nsf_voiced_threshold: 10
    upsample_rates: [8, 5, 3]
    upsample_kernel_sizes: [16, 11, 7]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_kernel_sizes: [3, 7, 11]
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    source_resblock_kernel_sizes: [7, 7, 11]
    source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    lrelu_slope: 0.1
    audio_limit: 0.99
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        num_class: 1
        in_channels: 80
        cond_channels: {hift[cond_channels]}

get_tokenizer: !name:cosyvoice.tokenizer.tokenizer.get_qwen_tokenizer
    token_path: !ref <qwen_pretrain_path>
    skip_special_tokens: True
allowed_special: 'all'
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1920
    num_mels: 80
    sampling_rate: !ref <sample_rate>
    hop_size: 480
    win_size: 1920
    fmin: 0
    fmax: 8000
    center: False
"""


def save_qwen(folder: Path, llm: Qwen2LM, sizes: dict) -> None:
    """Write CosyVoice-BlankEN: the text model in bf16 and a tokenizer that knows the 256 bytes and little more."""
    from safetensors.torch import save_file
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: v.to(torch.bfloat16).contiguous() for k, v in llm.llm.model.state_dict().items() if k != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    pieces = sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    tokenizer = {
        "added_tokens_decoder": {str(END_OF_TEXT + i): {"content": text} | flags for i, text in enumerate(special)},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "errors": "replace",
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    texts = {
        "config.json": json.dumps(QWEN | sizes, indent=2),
        "generation_config.json": json.dumps({"eos_token_id": END_OF_TEXT, "bos_token_id": END_OF_TEXT}, indent=2),
        "vocab.json": json.dumps({piece: number for number, piece in enumerate(pieces)}, ensure_ascii=False),
        "merges.txt": "\n".join(("#version: 0.2", *MERGES)),
        "tokenizer_config.json": json.dumps(tokenizer, indent=2),
    }
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def save_onnx(path: Path, nodes: list, inputs: list, output, constants: dict[str, np.ndarray]) -> None:
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, path.stem, inputs, [output], tensors)
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    onnx.save(model, path)


def save_campplus(path: Path, rng: np.random.Generator) -> None:
    """fbank (B, frames, 80) -> (B, 192): random features of each frame, their mean over time, a random projection."""
    save_onnx(
        path,
        [
            helper.make_node("MatMul", ["input", "w1"], ["h1"]),
            helper.make_node("Tanh", ["h1"], ["h2"]),
            helper.make_node("ReduceMean", ["h2"], ["h3"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["h3", "w2"], ["output"]),
        ],
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["B", "T", 80])],
        helper.make_tensor_value_info("output", TensorProto.FLOAT, ["B", 192]),
        {
            "w1": (rng.standard_normal((80, 256)) * 0.1).astype(np.float32),
            "w2": rng.standard_normal((256, 192)).astype(np.float32),
        },
    )


def save_speech_tokenizers(folder: Path, rng: np.random.Generator) -> None:
    """feats (B, 128, T), feats_length (B,) -> indices (B, T/4): two strided convolutions, then 8 ternary digits.

    speech_tokenizer_v2.onnx has B = 1 and cuts the row at its length; the one for batches puts -1 behind the end.
    """

    def kernel(n_out: int, n_in: int, gain: float) -> np.ndarray:
        w = rng.standard_normal((n_out, n_in, 3))
        w -= w.mean((1, 2), keepdims=True)  # blind to the level, so that the digits do not stick at one value
        return (gain * w / np.sqrt(w[0].size)).astype(np.float32)

    stride = {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}
    one, two = np.array([1], np.int64), np.array([2], np.int64)
    nodes = [
        helper.make_node("Conv", ["feats", "w1"], ["h1"], **stride),
        helper.make_node("Tanh", ["h1"], ["h2"]),
        helper.make_node("Conv", ["h2", "w2"], ["h3"], **stride),
        helper.make_node("Tanh", ["h3"], ["h4"]),
        helper.make_node("Round", ["h4"], ["h5"]),
        helper.make_node("Add", ["h5", "one_f"], ["digits"]),
        helper.make_node("Mul", ["digits", "powers"], ["h6"]),
        helper.make_node("ReduceSum", ["h6", "one"], ["codes"], keepdims=0),
        helper.make_node("Cast", ["feats_length"], ["n"], to=TensorProto.INT64),
        helper.make_node("Add", ["n", "one"], ["n1"]),
        helper.make_node("Div", ["n1", "two"], ["n2"]),
        helper.make_node("Add", ["n2", "one"], ["n3"]),
        helper.make_node("Div", ["n3", "two"], ["n4"]),
        helper.make_node("Cast", ["kept"], ["indices"], to=TensorProto.INT32),
    ]
    constants = {
        "w1": kernel(64, 128, 8.0),
        "w2": kernel(8, 64, 2.5),
        "one_f": np.ones(1, np.float32),
        "powers": (3.0 ** np.arange(8)).astype(np.float32)[:, None],
        "one": one,
        "two": two,
    }
    cut = [helper.make_node("Slice", ["codes", "zero", "n4", "one"], ["kept"])]
    marked = [
        helper.make_node("Shape", ["codes"], ["size"], start=1),
        helper.make_node("Squeeze", ["size"], ["width"]),
        helper.make_node("Range", ["first", "width", "step"], ["positions"]),
        helper.make_node("Unsqueeze", ["n4", "one"], ["ends"]),
        helper.make_node("Less", ["positions", "ends"], ["inside"]),
        helper.make_node("Where", ["inside", "codes", "nothing"], ["kept"]),
    ]
    cut_with = {"zero": np.array([0], np.int64)}
    marked_with = {"first": np.array(0), "step": np.array(1), "nothing": np.array([-1], np.float32)}
    for name, batch, choice, more in (("v2", 1, cut, cut_with), ("v2.batch", "B", marked, marked_with)):
        save_onnx(
            folder / f"speech_tokenizer_{name}.onnx",
            [*nodes[:-1], *choice, nodes[-1]],
            [
                helper.make_tensor_value_info("feats", TensorProto.FLOAT, [batch, 128, "T"]),
                helper.make_tensor_value_info("feats_length", TensorProto.INT32, [batch]),
            ],
            helper.make_tensor_value_info("indices", TensorProto.INT32, [batch, "S"]),
            constants | more,
        )


def build(sizes: Sizes) -> dict[str, torch.nn.Module]:
    """Build the three networks with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        estimator = CausalConditionalDecoder(**sizes.estimator)
        flow = CausalMaskedDiffWithXvec(
            encoder=UpsampleConformerEncoder(**sizes.encoder),
            decoder=CausalConditionalCFM(estimator=estimator),
            input_size=sizes.encoder["size"],
        )
        llm = Qwen2LM(qwen=Qwen2ForCausalLM(**sizes_of(QWEN | sizes.qwen)))
        for weight in llm.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=0.02)
        return {"llm": llm, "flow": flow, "hift": HiFTGenerator(**sizes.hift)}


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("model_dir", type=Path, help="the folder to make; must not exist yet")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="default tiny, 17 MB; official: 75 MB")
    args = parser.parse_args()
    out, sizes = args.model_dir, SIZES[args.size]
    if out.exists():
        raise BadInput(f"{out}: exists already; delete it to make it again")
    yaml = MODEL_YAML.format(**asdict(sizes), head_dim=sizes.estimator["inner"] // 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        part = Path(temporary) / out.name
        models = build(sizes)
        save_qwen(part / "CosyVoice-BlankEN", models["llm"], sizes.qwen)
        for name, model in models.items():
            checkpoint.save(part / f"{name}.pt", model.state_dict())
        rng = np.random.default_rng(SEED)
        save_campplus(part / "campplus.onnx", rng)
        save_speech_tokenizers(part, rng)
        (part / "cosyvoice2.yaml").write_text(yaml, encoding="utf-8")
        part.rename(out)
    sizes = ", ".join(f"{name} {sum(p.numel() for p in m.parameters()) / 1e6:.1f} M" for name, m in models.items())
    print(f"wrote {out}: a random base model ({sizes}); it speaks noise by design")


if __name__ == "__main__":
    cli.run(main)
