#!/usr/bin/env bash
# Fine-tune CosyVoice2 on your own voice: from a folder of recordings to a model that speaks.
#
#   bash run.sh                                                    # sets up, fine-tunes the demo voice, speaks, scores
#   bash run.sh --conf conf/paimon.yaml --stage 0 --stop_stage 6   # your voice: one yaml in conf/
#   bash run.sh --conf conf/paimon.yaml --stage 5 --stop_stage 5 --train.lr 2e-5    # one stage again, a value changed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

# ---- options
conf=conf/demo.yaml   # the speaker: what differs from conf/cosyvoice2.yaml
stage=-1              # first stage
stop_stage=8          # last stage
corpus=               # folder with the recordings; stands for --corpus.dir
nproc=1               # processes of stages 4 and 5 on this machine, one a card
num_nodes=1           # machines with a shared disk that train together in stages 4 and 5; start run.sh on each ...
node_rank=0           # ... with its number, from 0 ...
master_addr=          # ... and the address of machine 0, at whose ports 29500 and 29501 (or MASTER_PORT and the next) they meet
fresh=false           # true: stages 4 and 5 start anew; the earlier training stays as exp/NAME/llm.1
tune=llm_flow         # what of the training speaks: llm_flow (model, synth) | llm (model_llm, synth_llm) | flow (..._flow)
# ---- end of options
. tools/parse_options.sh

start=$SECONDS
log() { echo "$(date '+%H:%M:%S') $*"; }
die() { echo "ERROR $*" >&2; exit 1; }
at() { [ "$stage" -le "$1" ] && [ "$1" -le "$stop_stage" ] && log "stage $1: $2"; }
need() {   # need FILE STAGE [INPUT ...]: FILE is there, made by STAGE; say so when an INPUT of it has changed since
  [ -e "$1" ] || die "$1 is missing; stage $2 makes it: bash run.sh --conf $conf --stage $2 --stop_stage $2"
  local input
  for input in "${@:3}"; do
    [ ! "$input" -nt "$1" ] || log "WARNING $1 is older than $input; to have it made again: stage $2"
  done
}
train() {   # train llm|flow PORT: one process; or one a card; or that on several machines
  local launcher=(python) more=()
  [ "$nproc" -eq 1 ] || launcher=(torchrun --standalone --nproc_per_node "$nproc")
  if [ "$num_nodes" -gt 1 ]; then
    launcher=(torchrun --nnodes "$num_nodes" --node_rank "$node_rank" --nproc_per_node "$nproc"
      --master_addr "$master_addr" --master_port "$2")
  fi
  [ "$fresh" = false ] || more=(--fresh)
  "${launcher[@]}" tools/train.py "$1" "$data" "$exp/$1" "${more[@]}" "${settings[@]}"
}

[ -f "$conf" ] || die "$conf: no such conf; copy conf/paimon.yaml to conf/NAME.yaml and edit it"
bash tools/install.sh
. ./path.sh
settings=(--conf "$conf" "${overrides[@]}")
values=$(python tools/print_conf.py "${settings[@]}" \
  name pretrained_dir pretrained_source synth.texts)
{ read -r name; read -r base; read -r source; read -r texts || true; } <<< "$values"   # the last may be empty
data=data/$name
exp=exp/$name
case $tune in
  llm_flow) model=$exp/model synth=$exp/synth ;;
  llm | flow) model=$exp/model_$tune synth=$exp/synth_$tune ;;
  *) die "--tune is '$tune'; one of: llm_flow llm flow" ;;
esac
case $fresh in true | false) ;; *) die "--fresh is '$fresh'; it is true or false" ;; esac
if [ "$num_nodes" -gt 1 ]; then
  [ -n "$master_addr" ] || die "--num_nodes $num_nodes: --master_addr is not set; it is the address of machine 0"
  { [ "$stage" -ge 4 ] && [ "$stop_stage" -le 5 ]; } ||
    die "--num_nodes $num_nodes is for --stage 4 --stop_stage 5; run the other stages on one machine"
fi
port=${MASTER_PORT:-29500}

if at -1 "base model: -> pretrained_dir"; then
  if [ "$source" = tiny ] && ! [ -e "$base" ]; then
    python local/make_tiny_base.py "$base"
  else
    python tools/fetch_model.py "${settings[@]}"
  fi
  [ "$stop_stage" -ge 1 ] || python tools/check_model_dir.py "$base" "${settings[@]}"
fi

if at 0 "recordings and texts: corpus -> data/NAME/{train,dev}"; then
  format=$(python local/recognise_format.py "${settings[@]}")
  python "local/prepare_$format.py" "$data" "${settings[@]}"
fi

if [ "$stage" -le 5 ] && [ "$stop_stage" -ge 1 ] && [ -e "$base" ]; then   # stages 1 to 5 read the base model
  python tools/check_model_dir.py "$base" "${settings[@]}"
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
  need "$data/train/spk2embedding.pt" 1 "$data/train/wav.scp"
  need "$data/train/utt2speech_token.pt" 2 "$data/train/wav.scp"
  python tools/make_parquet.py "$data/train" "$data/dev" "${settings[@]}"
fi

if at 4 "train the language model: parquet -> exp/NAME/llm"; then
  need "$data/train/parquet/data.list" 3 "$data/train/text" "$data/train/utt2speech_token.pt"
  need "$base/llm.pt" -1
  train llm "$port"
fi

if at 5 "train the flow-matching model: parquet -> exp/NAME/flow"; then
  need "$data/train/parquet/data.list" 3 "$data/train/text" "$data/train/utt2speech_token.pt"
  need "$base/flow.pt" -1
  train flow $((port + 1))
fi

if at 6 "average epochs and build the model: -> exp/NAME/model"; then
  tuned=()
  for part in ${tune/_/ }; do
    need "$exp/$part/last.pt" "$([ "$part" = llm ] && echo 4 || echo 5)"
    python tools/average.py "$exp/$part" "${settings[@]}"
    tuned+=("--$part" "$exp/$part/average.pt")
  done
  need "$data/train/spk2embedding.pt" 1
  python tools/make_model_dir.py "$model" "$data/train" "${tuned[@]}" "${settings[@]}"
  [ -z "$texts" ] || python tools/try_voice.py "$model" "$texts" "${settings[@]}"
fi

if at 7 "speak: texts -> exp/NAME/synth, and with the base model -> exp/NAME/synth_base"; then
  need "$model/llm.pt" 6 "$exp/llm/last.pt" "$exp/flow/last.pt"
  [ -n "$texts" ] || die "synth.texts is not set; name a file with one sentence a line: --synth.texts FILE"
  python tools/synthesize.py "$model" "$texts" "$synth" "${settings[@]}"
  python tools/synthesize.py "$model" "$texts" "$exp/synth_base" --model base "${settings[@]}"
fi

if at 8 "score: exp/NAME/synth, natural recordings and base -> score.tsv score.json"; then
  need "$synth/wav.scp" 7
  need "$exp/synth_base/wav.scp" 7
  need "$data/dev/wav.scp" 0
  python tools/score.py "$synth" --natural "$data/dev" --base "$exp/synth_base" "${settings[@]}"
fi

log "stages $stage to $stop_stage done in $((SECONDS - start)) s"
if [ "$stage" -le 8 ] && [ "$stop_stage" -ge 7 ]; then
  if [ "$stop_stage" -lt 8 ]; then   # stage 8 has just said more
    python tools/show_result.py natural="$data/dev" base="$exp/synth_base" tuned="$synth" "${settings[@]}"
  fi
  echo "  hear it:        $synth/wav/   (what each file says: $synth/text; the base model: $exp/synth_base)"
  echo "  say more:       python tools/synthesize.py $model SENTENCES.txt OUT --conf $conf   (first: . ./path.sh)"
  echo "  watch it learn: tensorboard --logdir $exp"
  echo "  train on:       bash run.sh --conf $conf --stage 4 --train.llm.max_epoch N --train.flow.max_epoch M"
  echo "  hand it over:   $model   (the official CosyVoice code takes it as it is)"
  if grep -qs 'random weights' "$base/cosyvoice2.yaml"; then
    echo "  This base model has random weights: what you hear is noise by design. With the real CosyVoice2-0.5B:"
    echo "  bash run.sh --conf $conf --pretrained_dir DIR"
  fi
fi
