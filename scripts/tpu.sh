#!/usr/bin/env bash
# easylm on a TPU slice, from its creation to its deletion, by gcloud; --help says how. How a run is
# started and kept going is in tpu_run.sh, what happens on the hosts in tpu_host.sh. Needs bash 3.2.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VERBS="create, setup, run, logs, status, stop, delete"
# Where "=" follows, a value is wanted.
COMMON="--name= --zone= --project= --dry-run"
OF_SETUP="--python= --ref= --env="

usage() {
  cat <<'USAGE'
usage: scripts/tpu.sh VERB --name=NAME --zone=ZONE [--project=PROJECT] [--dry-run] [OPTIONS]

  create --type=TYPE        asks for a slice, such as v3-256, v4-64, v5litepod-16 (or v5e-16), v5p-8
    [--spot]                  cheap, and taken back when others pay more
    [--queued]                by a queued request, which waits until there is one
    [--runtime-version=V]     another image than the usual one of its generation
    [--service-account=EMAIL --network=NETWORK --subnetwork=SUBNETWORK]
  setup                     puts Python, this checkout as git tracks it, and what it needs on every
                            host; checks that all have the same and see all devices
    [--python=3.12]           or 3.11
    [--ref=URL#REF]           instead of this checkout: what a git repository has at REF
    [--env=FILE]              variables for runs, such as HF_TOKEN: lines of NAME=VALUE, taken as
                              they stand, without quotes
  run [--keep-going] -- COMMAND
                            starts the same command on every host and shows its log; the run does
                            not need this terminal. Exits as the run does
    --keep-going              starts it again after 75, 76 and the loss of the slice: ten times at
                              most on a slice that was not lost, and three after 1, unless there
                              is a new checkpoint in between; creates a spot slice again, and sets
                              it up (takes the options of setup)
  logs [--worker=N|all -f]  the end of the log, of the host that prints most; -f: and what comes
  status                    of the slice, and of the run on every host
  stop [--now]              has the run save and exit 75, or kills it
  delete [--yes]            deletes the slice and its queued request; asks before

NAME, ZONE, PROJECT and TYPE may be in the environment, and POLL_SECONDS (30), the time between two
questions where something is waited for, and GIVE_UP_SECONDS (1800), after which hosts that do not
answer are asked no more. --dry-run prints the commands, and runs none.
USAGE
}

say() { [ -n "$DRY" ] || printf '%s\n' "$*" >&2; }

end() { # exit code, message
  local code=$1
  shift
  printf 'error: %s\n' "$*" >&2
  exit "$code"
}

quote() { # words, for a shell to read
  local word result='' mark="'\\''"
  for word in "$@"; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$mark}'" ;;
    esac
    result="$result $word"
  done
  printf '%s' "${result# }"
}

# -- options ------------------------------------------------------------------------------------

options_of() { # verb
  case "$1" in
    create) echo "$COMMON --type= --spot --queued --runtime-version= --service-account=" \
      "--network= --subnetwork=" ;;
    setup) echo "$COMMON $OF_SETUP" ;;
    run) echo "$COMMON --keep-going $OF_SETUP" ;;
    logs) echo "$COMMON --worker= -f" ;;
    status) echo "$COMMON" ;;
    stop) echo "$COMMON --now" ;;
    delete) echo "$COMMON --yes" ;;
    *) end 2 "found the verb '$1'; wanted one of $VERBS" ;;
  esac
}

parse() { # the arguments of this script
  local known key value
  VERB=${1:-}
  case "$VERB" in
    -h | --help | help) usage && exit ;;
    '') end 2 "found no verb; wanted one of $VERBS" ;;
  esac
  known=$(options_of "$VERB") || exit 2
  shift
  NAME=${NAME:-} ZONE=${ZONE:-} PROJECT=${PROJECT:-} TYPE=${TYPE:-}
  DRY='' SPOT='' QUEUED='' RUNTIME='' ACCOUNT='' NETWORK='' SUBNETWORK=''
  PYTHON=3.12 REF='' ENV_FILE='' KEEP_GOING='' WORKER='' FOLLOW='' NOW='' YES='' COMMAND=()
  while [ $# -gt 0 ]; do
    if [ "$1" = -- ]; then
      [ "$VERB" = run ] || end 2 "$VERB: found a command after '--'; wanted none"
      shift
      COMMAND=("$@")
      break
    fi
    case "$1" in --help | -h) usage && exit ;; esac
    key=${1%%=*} value=${1#*=}
    if [ "$key" != "$1" ]; then key="$key="; fi
    case " $known " in
      *" $key "*) ;;
      *" $1= "*) end 2 "$VERB: found '$1' without a value; wanted $1=VALUE" ;;
      *) end 2 "$VERB: found '$1'; wanted ${known//= /=... }" ;;
    esac
    case "${key%=}" in
      --name) NAME=$value ;; --zone) ZONE=$value ;; --project) PROJECT=$value ;;
      --type) TYPE=$value ;; --runtime-version) RUNTIME=$value ;;
      --service-account) ACCOUNT=$value ;; --network) NETWORK=$value ;;
      --subnetwork) SUBNETWORK=$value ;; --python) PYTHON=$value ;; --ref) REF=$value ;;
      --env) ENV_FILE=$value ;; --worker) WORKER=$value ;; --dry-run) DRY=yes ;;
      --spot) SPOT=yes ;; --queued) QUEUED=queued ;; --keep-going) KEEP_GOING=yes ;;
      -f) FOLLOW=-f ;; --now) NOW=yes ;; --yes) YES=yes ;;
    esac
    shift
  done
}

check_options() {
  [[ "$NAME" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] ||
    end 2 "--name: found '$NAME'; wanted the name of the slice, of a-z, 0-9 and '-'"
  [[ "$ZONE" =~ ^[a-z]+-[a-z]+[0-9]+-(ai[0-9]+)?[a-z]$ ]] ||
    end 2 "--zone: found '$ZONE'; wanted the zone of the slice, such as europe-west4-a"
  [[ "$POLL_SECONDS" =~ ^[0-9]+([.][0-9]+)?$ && "$GIVE_UP_SECONDS" =~ ^[0-9]{1,9}$ ]] ||
    end 2 "found POLL_SECONDS=$POLL_SECONDS GIVE_UP_SECONDS=$GIVE_UP_SECONDS; wanted numbers"
  [[ "$WORKER" =~ ^([0-9]+|all)?$ ]] ||
    end 2 "--worker: found '$WORKER'; wanted the number of a host, from 0, or all"
  [[ "$PYTHON" =~ ^3\.1[12]$ ]] || end 2 "--python: found '$PYTHON'; wanted 3.11 or 3.12"
  [[ -z "$REF" || "$REF" =~ ^[^#]+#[^#]+$ ]] ||
    end 2 "--ref: found '$REF'; wanted URL#REF, a git repository and a branch, tag or commit of it"
  check_env
  if [ "$VERB" != create ] && [ -z "$TYPE" ]; then TYPE=v3-8; fi # for a dry run
  check_type
  if [ "$VERB" = run ]; then
    [ ${#COMMAND[@]} -gt 0 ] || end 2 "run: found no command; wanted one, as in" \
      "run -- python -m easylm.sft --config=sft/tulu2_7b --workdir=gs://BUCKET/tulu2_7b"
    find_workdir
  fi
  [ -n "$DRY" ] || command -v gcloud >/dev/null ||
    end 2 "found no gcloud; wanted the Google Cloud CLI on the PATH"
}

# Refuses a file that is none of variables, and sets OPTIONS to what setup leaves on hosts.
check_env() {
  local wrong
  OPTIONS="python $PYTHON, no env"
  if [ -z "$ENV_FILE" ]; then return; fi
  [ -f "$ENV_FILE" ] || end 2 "--env: found no file $ENV_FILE; wanted one of lines NAME=VALUE"
  OPTIONS="python $PYTHON, env of checksum $(cksum <"$ENV_FILE" | cut -d ' ' -f 1)"
  wrong=$(grep -nvE '^([A-Za-z_][A-Za-z0-9_]*=.*|#.*)?$' "$ENV_FILE" | head -n 1) || true
  # The line may hold a secret.
  [ -z "$wrong" ] || end 2 "--env: line ${wrong%%:*} of $ENV_FILE is no variable; wanted NAME=VALUE"
}

# Finds the runtime version of a generation; what the number of a type counts is in device_count.
check_type() {
  local step=8 known count
  case "$TYPE" in v5e-*) TYPE=v5litepod-${TYPE#v5e-} ;; esac
  case "$TYPE" in
    v2-* | v3-* | v4-*) known=tpu-ubuntu2204-base ;;
    v5litepod-*) known=v2-alpha-tpuv5-lite step=4 ;;
    v5p-*) known=v2-alpha-tpuv5 ;;
    v6e-*) known=v2-alpha-tpuv6e step=4 ;;
    *) end 2 "--type: found '$TYPE'; wanted v2-N, v3-N, v4-N, v5e-N, v5p-N or v6e-N" ;;
  esac
  count=${TYPE##*-}
  if ! [[ "$count" =~ ^[1-9][0-9]*$ ]] || { [ $((count % step)) -ne 0 ] && [ "$count" -ne 1 ]; } ||
    { [ "$step" -eq 8 ] && [ "$count" -eq 1 ]; }; then
    end 2 "--type: found '$TYPE'; wanted a multiple of $step after '${TYPE%-*}-'"
  fi
  RUNTIME=${RUNTIME:-$known}
}

device_count() { # type: of v2 and v3 it counts cores, each a device; of v4 and v5p two a chip
  case "$1" in
    v4-* | v5p-*) echo $((${1##*-} / 2)) ;;
    *) echo "${1##*-}" ;;
  esac
}

host_count() { # type: eight cores a host, or four chips; one host of v5e and v6e may have eight
  local count=${1##*-}
  case "$1" in
    v5litepod-* | v6e-*) echo $((count > 8 ? count / 4 : 1)) ;;
    *) echo $((count / 8)) ;;
  esac
}

# -- gcloud -------------------------------------------------------------------------------------

cloud() { # arguments of gcloud
  if [ -n "$DRY" ]; then
    printf 'gcloud %s\n' "$(quote "$@")" >&3
  else
    gcloud "$@" </dev/null
  fi
}

tpu() { # tpu-vm or queued-resources, verb, arguments
  local kind=$1 verb=$2
  shift 2
  cloud compute tpus "$kind" "$verb" "$@" --zone="$ZONE" ${PROJECT:+"--project=$PROJECT"} --quiet
}

on_hosts() { # a number or all, function of tpu_host.sh, its arguments
  local worker=$1
  shift
  # A connection that hangs is one that ended.
  tpu tpu-vm ssh "$NAME" --worker="$worker" --ssh-flag=-oConnectTimeout=15 \
    --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=4 \
    --command="bash easylm_host.sh $(quote "$@")"
}

create_slice() {
  local options=(--accelerator-type="$TYPE") name
  if [ -n "$SPOT" ]; then options+=(--spot); fi
  for name in service-account:"$ACCOUNT" network:"$NETWORK" subnetwork:"$SUBNETWORK"; do
    if [ -n "${name#*:}" ]; then options+=("--${name%%:*}=${name#*:}"); fi
  done
  if [ -n "$QUEUED" ]; then
    tpu queued-resources create "$QUEUED" --node-id="$NAME" --runtime-version="$RUNTIME" \
      "${options[@]}"
  else
    tpu tpu-vm create "$NAME" --version="$RUNTIME" "${options[@]}"
  fi
}

# Sets STATE to that of the slice, or MISSING, or UNKNOWN where nobody answers, with gcloud's words
# in errors; where there is a slice also what it takes to create it again.
look() {
  local answer spot preemptible
  local fields="state,acceleratorType,networkEndpoints.len(),schedulingConfig.spot"
  fields="$fields,schedulingConfig.preemptible,queuedResource,runtimeVersion,serviceAccount.email"
  fields="$fields,networkConfig.network,networkConfig.subnetwork"
  if answer=$(tpu tpu-vm describe "$NAME" --format="value[separator='|']($fields)" 2>"$TMP/errors")
  then
    if [ -n "$DRY" ]; then answer="READY|$TYPE|$(host_count "$TYPE")|||||||"; fi
    # Where a slice is gone, the next look finds what this one left.
    IFS='|' read -r STATE TYPE HOSTS spot preemptible QUEUED RUNTIME ACCOUNT NETWORK SUBNETWORK \
      <<<"$answer"
    TYPE=${TYPE##*/} QUEUED=${QUEUED##*/} SPOT=''
    case "$spot$preemptible" in *[Tt]rue*) SPOT=yes ;; esac
  elif grep -qi 'not.found' "$TMP/errors"; then
    STATE=MISSING
  else
    STATE=UNKNOWN
  fi
}

queue_state() {
  local queue=${QUEUED:-$NAME}
  if ! tpu queued-resources describe "$queue" --format='value(state.state)' 2>"$TMP/errors"; then
    grep -qi 'not.found' "$TMP/errors" && echo MISSING || echo UNKNOWN
  fi
}

# Ends, unless the slice is ready; `look` has answered then.
require_slice() {
  look
  case "$STATE" in
    READY) ;;
    UNKNOWN) end 1 "gcloud does not say what $NAME is$(last_words)" ;;
    MISSING) end 2 "found no slice $NAME in $ZONE; wanted one: scripts/tpu.sh create" \
      "(one that is queued is there when \`status\` says READY)" ;;
    *) end 1 "$NAME is $STATE; wanted READY (one that is lost: delete, create, setup)" ;;
  esac
}

# What every host reports, a line each, in reports, by their numbers; fails where one does not.
collect() {
  local failed=''
  on_hosts all report >"$TMP/answers" 2>"$TMP/errors" || failed=yes
  { grep '^easylm-host|' "$TMP/answers" || true; } | sort -t '|' -k 2n >"$TMP/reports"
  [ -z "$failed" ] && { [ -n "$DRY" ] || [ "$(wc -l <"$TMP/reports")" -eq "$HOSTS" ]; }
}

last_words() { # of gcloud, and of what it ran: behind a message, in brackets
  awk 'NF { $1 = $1; a = b; b = c; c = $0 }
    END { words = a " " b " " c; sub(/^ +/, "", words); if (words) printf " (%s)", words }
    ' "$TMP/errors"
}

# Says what was in vain, and waits before it is tried again. Ends where it was for so long that it
# will hardly mend itself; `heard` is what was not in vain.
again() { # what was in vain
  VAIN_SINCE=${VAIN_SINCE:-$SECONDS}
  [ $((SECONDS - VAIN_SINCE)) -lt "$GIVE_UP_SECONDS" ] ||
    end 1 "$1. Nothing else for $GIVE_UP_SECONDS s: given up; the slice stays, and is paid for" \
      "(scripts/tpu.sh status, delete)"
  say "$1; asking again"
  sleep "$POLL_SECONDS"
}

heard() { VAIN_SINCE=''; }

count_running() {
  grep -c '^easylm-host|[^|]*|[^|]*|running|' "$TMP/reports" || true
}

# The host that prints: the others fall silent once they have met, and jax need not count them as
# gcloud does.
talker() {
  awk -F '|' 'BEGIN { most = -1 } $7 > most { most = $7; worker = $2 } END { print worker + 0 }' \
    "$TMP/reports"
}

# -- verbs --------------------------------------------------------------------------------------

create() {
  local queue
  create_slice
  if [ -z "$QUEUED" ] || [ -n "$DRY" ]; then return 0; fi
  say "waiting for $NAME; the request stays in the queue without this terminal too"
  while look && [ "$STATE" != READY ]; do
    if [ "$STATE" = UNKNOWN ]; then
      again "gcloud does not say what $NAME is$(last_words)"
      continue
    fi
    heard
    queue=$(queue_state)
    case "$queue" in
      FAILED | SUSPENDED | MISSING) end 1 "the request for $NAME is $queue" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

setup() {
  require_slice
  pack
  collect || true # there is nothing yet to answer
  [ "$(count_running)" -eq 0 ] || end 2 "a run goes on on $NAME; wanted none: scripts/tpu.sh stop"
  set_up
}

# Makes the archive of this checkout: all that git tracks, as it is now.
pack() {
  local tree new
  REVISION='' URL=${REF%#*} REF=${REF##*#}
  if [ -n "$URL" ]; then return; fi
  git -C "$HERE" update-index -q --refresh || true # or a file that was only touched is an error
  tree=$(git -C "$HERE" stash create "for a TPU slice") ||
    end 1 "git cannot tell what this checkout holds; wanted one without conflicts"
  new=$(git -C "$HERE/.." ls-files --others --exclude-standard |
    awk 'NR < 6 { printf "%s%s", space, $0; space = " " } NR == 6 { printf " ..." }')
  if [ -n "$new" ]; then say "not on the hosts, for git does not track them (git add): $new"; fi
  REVISION=$(git -C "$HERE" rev-parse --short=12 HEAD)
  if [ -n "$tree" ]; then
    REVISION="$REVISION-changed-$(git -C "$HERE" rev-parse --short=8 "$tree^{tree}")"
  fi
  local archive=(git -C "$HERE/.." archive --format=tar.gz --output="$TMP/easylm.tgz")
  archive+=("${tree:-HEAD}")
  if [ -n "$DRY" ]; then quote "${archive[@]}" >&3 && echo >&3; else "${archive[@]}"; fi
}

# Sets all hosts up. Returns 1 where a host does not answer; ends where they cannot work together.
set_up() {
  local files=("$TMP/easylm_host.sh")
  cp "$HERE/tpu_host.sh" "$TMP/easylm_host.sh"
  if [ -z "$URL" ]; then files+=("$TMP/easylm.tgz"); fi
  if [ -n "$ENV_FILE" ]; then
    install -m 600 "$ENV_FILE" "$TMP/easylm.env"
    files+=("$TMP/easylm.env")
  fi
  say "setting up the hosts of $NAME: ${REVISION:-$URL#$REF}"
  tpu tpu-vm scp "${files[@]}" "$NAME:" --worker=all || return 1
  on_hosts all setup "$PYTHON" "$REVISION" "$URL" "$REF" || return 1
  check_hosts versions "the same versions on all" || return 1
  check_hosts devices "$(device_count "$TYPE") devices of $TYPE on all" || return 1
}

# Has all hosts answer, and ends unless all $HOSTS answers are the same, and those wanted.
check_hosts() { # versions or devices, what is wanted
  local answers="$TMP/$1" kinds first
  on_hosts all "$1" "$HOSTS" >"$TMP/answers" || return 1
  if [ -n "$DRY" ]; then return 0; fi
  grep '^easylm-host|' "$TMP/answers" | sort -t '|' -k 2n >"$answers"
  [ "$(wc -l <"$answers")" -eq "$HOSTS" ] ||
    end 1 "$1: $(wc -l <"$answers") of $HOSTS hosts answered"
  kinds=$(cut -d '|' -f 4 "$answers" | sort -u)
  first=$(head -n 1 "$answers" | cut -d '|' -f 4)
  if [ "$(wc -l <<<"$kinds")" -ne 1 ] ||
    { [ "$1" = devices ] && [ "$first" != "${2%% *}" ]; }; then
    awk -F '|' '{ print "  host " $2 " (" $3 "): " $4 }' "$answers" >&2
    end 1 "$1: the hosts do not fit together; wanted $2"
  fi
  if [ "$1" = devices ]; then first="$first devices"; fi
  say "$HOSTS hosts: $first"
}

logs() {
  require_slice
  if [ -z "$WORKER" ]; then
    collect || true
    WORKER=$(talker)
  fi
  on_hosts "$WORKER" show_log 100 "$FOLLOW" "$([ "$WORKER" != all ] || echo sign)"
}

status() {
  look
  if [ "$STATE" = UNKNOWN ]; then require_slice; fi
  if [ "$STATE" != READY ]; then
    echo "$NAME: slice $STATE, queued request $(queue_state)"
    return
  fi
  collect || say "not all hosts answer$(last_words)"
  if [ -n "$DRY" ]; then return; fi
  echo "$NAME: READY, $TYPE, $HOSTS hosts${SPOT:+, spot}${QUEUED:+, queued}"
  awk -F '|' '{
    does = $4 == "none" ? "no run yet" : $4 == "running" || $4 == "gone" ? $4 : "exit code " $4
    printf "host %s (%s): %s%s", $2, $3, does, $6 == "" ? "" : ", told to stop"
    for (i = 8; i <= NF; i++) printf "%s%s", i == 8 ? "; " : "|", $i
    print ""
  }' "$TMP/reports"
}

stop() {
  require_slice
  on_hosts all "$([ -n "$NOW" ] && echo kill_now || echo stop_run)" ||
    end 1 "not all hosts of $NAME answer"
  while true; do
    if ! collect; then
      again "not all hosts of $NAME answer$(last_words)"
      continue
    fi
    heard
    if [ "$(count_running)" -eq 0 ]; then break; fi
    say "waiting for $(count_running) hosts to save and end"
    sleep "$POLL_SECONDS"
  done
}

delete() {
  local answer
  look
  if [ -z "$YES" ] && [ -z "$DRY" ]; then
    read -r -p "delete $NAME in $ZONE, which is $STATE, and all on its disks? [y/N] " answer || true
    case "$answer" in y | Y | yes) ;; *) end 1 "not deleted" ;; esac
  fi
  if [ -n "$QUEUED" ] || { [ -z "$DRY" ] && [ "$(queue_state)" != MISSING ]; }; then
    tpu queued-resources delete "${QUEUED:-$NAME}" --force
  else
    tpu tpu-vm delete "$NAME"
  fi
}

# shellcheck source=scripts/tpu_run.sh
source "$HERE/tpu_run.sh"

exec 3>&1
POLL_SECONDS=${POLL_SECONDS:-30} GIVE_UP_SECONDS=${GIVE_UP_SECONDS:-1800} VAIN_SINCE=''
parse "$@"
check_options
if [ -n "$QUEUED" ]; then QUEUED=$NAME; fi
HOSTS=1
TMP=$(mktemp -d)
trap 'rm -rf "$TMP"' EXIT
"$VERB"
