#!/usr/bin/env bash
# Sourced by run.sh with its arguments: --name value (or --name=value) sets the variable `name` of the options block;
# every other option must be a key of the conf (--train.lr 2e-5) and goes into the array `overrides`. --help prints the
# head of run.sh, the options with their defaults, and the titles of the stages, all from run.sh itself.
# shellcheck disable=SC2034  # the variables are used by run.sh

overrides=()
options=$(sed -n '/^# ---- options/,/^# ---- end of options/p' "$0" | grep -E '^[a-z_]+=')

print_help() {
  sed -n '2,/^set /p' "$0" | sed -n 's/^# \{0,1\}//p'
  printf '\noptions:\n'
  sed -E 's/^([a-z_]+)=([^ ]*) *# (.*)/\1\t\2\t\3/' <<< "$options" |
    while IFS=$'\t' read -r key default text; do
      [ -z "$text" ] && text=$default && default=
      printf '  --%-12s %s%s\n' "$key" "$text" "${default:+ (default $default)}"
    done
  printf '  --KEY VALUE    any key of conf/cosyvoice2.yaml, such as --train.lr 2e-5 or --device cpu\n\nstages:\n'
  sed -nE 's/^if at (-?[0-9]+) "(.*)"; then/  \1\t\2/p' "$0" | expand -t 6
}

while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      print_help
      exit 0
      ;;
    --*=*)
      key=${1%%=*}
      value=${1#*=}
      shift
      ;;
    --?*)
      [ $# -ge 2 ] || { echo "ERROR $1 needs a value; bash run.sh --help lists the options" >&2; exit 1; }
      key=$1
      value=$2
      shift 2
      ;;
    *)
      echo "ERROR '$1' is not an option; options are --name value, bash run.sh --help lists them" >&2
      exit 1
      ;;
  esac
  key=${key#--}
  if grep -q "^$key=" <<< "$options"; then
    printf -v "$key" '%s' "$value"
  elif [[ $key =~ ^[a-z_.]+$ ]] && grep -q "^${key%%.*}:" conf/cosyvoice2.yaml; then
    overrides+=("--$key=$value")
  else
    echo "ERROR unknown option --$key; bash run.sh --help lists the options" >&2
    exit 1
  fi
done

for key in stage stop_stage nproc num_nodes node_rank; do
  [[ ${!key} =~ ^-?[0-9]+$ ]] || { echo "ERROR --$key is '${!key}'; it is a whole number" >&2; exit 1; }
done
[ -z "$corpus" ] || overrides+=("--corpus.dir=$corpus")
