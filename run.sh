#!/usr/bin/env bash
# Fine-tune CosyVoice2 on your own voice: from a folder of recordings to a model that speaks.
#
#   bash run.sh                                                    # sets up, fine-tunes the demo voice, speaks
#   bash run.sh --conf conf/paimon.yaml --stage 0 --stop_stage 6   # your voice: one yaml in conf/
#   bash run.sh --conf conf/paimon.yaml --stage 5 --stop_stage 5 --train.lr 2e-5    # one stage again, a value changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- options
conf=conf/demo.yaml   # the speaker: what differs from conf/cosyvoice2.yaml
stage=-1              # first stage
stop_stage=7          # last stage
corpus=               # folder with the recordings; stands for --corpus.dir
nproc=1               # processes of stages 4 and 5, one a card
# ---- end of options
. tools/parse_options.sh

start=$SECONDS
log() { echo "$(date '+%H:%M:%S') $*"; }
die() { echo "ERROR $*" >&2; exit 1; }
at() { [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ] && log "stage $1: $2"; }
need() { [ -e "$1" ] || die "$1 is missing; stage $2 makes it: bash run.sh --conf $conf --stage $2 --stop_stage $2"; }

[ -f "$conf" ] || die "$conf: no such conf; copy conf/paimon.yaml to conf/NAME.yaml and edit it"
bash tools/install.sh
. ./path.sh
settings=(--conf "$conf" "${overrides[@]}")
values=$(python tools/print_conf.py "${settings[@]}" \
  name corpus.format pretrained_dir pretrained_source average.llm average.flow synth.texts)
{ read -r name; read -r format; read -r base; read -r source; read -r num_llm; read -r num_flow; read -r texts; } <<< "$values"
data=data/$name
exp=exp/$name
train=(python)
[ "$nproc" -eq 1 ] || train=(torchrun --standalone --nproc_per_node "$nproc")

if at -1 "base model: -> pretrained_dir"; then
  if [ -e "$base" ]; then
    log "$base is there"
  elif [ "$source" = tiny ]; then
    python local/make_tiny_base.py "$base"
  else
    die "$base is missing; README.md, 'The base model', says how to get it; or name another: --pretrained_dir DIR"
  fi
fi

if at 0 "recordings and texts: corpus -> data/NAME/{train,dev}"; then
  case $format in
    pairs) python local/prepare_pairs.py "$data" "${settings[@]}" ;;
    ljspeech) python local/prepare_table.py "$data" "${settings[@]}" ;;
    *) die "corpus.format: '$format' is unknown; one of: pairs ljspeech" ;;
  esac
fi

if at 1 "speaker vectors: wav.scp -> utt2embedding.pt spk2embedding.pt"; then
  need "$data/train/wav.scp" 0
  need "$base/campplus.onnx" -1
  python tools/extract_embedding.py "$data/train" "$data/dev" "${settings[@]}"
fi

if at 2 "speech tokens: wav.scp -> utt2speech_token.pt"; then
  need "$data/train/wav.scp" 0
  need "$base/speech_tokenizer_v2.onnx" -1
  python tools/extract_speech_token.py "$data/train" "$data/dev" "${settings[@]}"
fi

if at 3 "pack: texts, tokens, vectors, mel -> parquet/data.list"; then
  need "$data/train/spk2embedding.pt" 1
  need "$data/train/utt2speech_token.pt" 2
  python tools/make_parquet.py "$data/train" "$data/dev" "${settings[@]}"
fi

if at 4 "train the language model: parquet -> exp/NAME/llm"; then
  need "$data/train/parquet/data.list" 3
  need "$base/llm.pt" -1
  "${train[@]}" tools/train.py llm "$data" "$exp/llm" "${settings[@]}"
fi

if at 5 "train the flow-matching model: parquet -> exp/NAME/flow"; then
  need "$data/train/parquet/data.list" 3
  need "$base/flow.pt" -1
  "${train[@]}" tools/train.py flow "$data" "$exp/flow" "${settings[@]}"
fi

if at 6 "average the best epochs and build the model: -> exp/NAME/model"; then
  need "$exp/llm/last.pt" 4
  need "$exp/flow/last.pt" 5
  python tools/average.py "$exp/llm" --num "$num_llm"
  python tools/average.py "$exp/flow" --num "$num_flow"
  python tools/make_model_dir.py "$exp/model" --llm "$exp/llm/average.pt" --flow "$exp/flow/average.pt" \
    --embedding "$data/train/spk2embedding.pt" "${settings[@]}"
fi

if at 7 "speak: texts -> exp/NAME/synth"; then
  need "$exp/model/llm.pt" 6
  [ -n "$texts" ] || die "synth.texts is not set; name a file with one sentence a line: --synth.texts FILE"
  python tools/synthesize.py "$exp/model" "$texts" "$exp/synth" "${settings[@]}"
fi

log "stages $stage to $stop_stage done in $((SECONDS - start)) s"
if [ "$stage" -le 7 ] && [ "$stop_stage" -ge 7 ]; then
  echo "  hear it:        $exp/synth/wav/   (what each file says: $exp/synth/text)"
  echo "  watch it learn: tensorboard --logdir $exp"
  echo "  hand it over:   $exp/model   (the official CosyVoice code takes it as it is)"
  if [ "$source" = tiny ]; then
    echo "  This base model has random weights: what you hear is noise by design. With the real CosyVoice2-0.5B:"
    echo "  bash run.sh --conf $conf --pretrained_dir DIR"
  fi
fi
