#!/usr/bin/env bash
# What scripts/tpu.sh does on one host of a slice; it copies this file there as ~/easylm_host.sh.
#
#   ~/easylm/src        the checkout             ~/easylm/revision   its commit, once all is set up
#   ~/easylm/venv       Python and packages      ~/easylm/env        variables for runs, if any
#   ~/easylm/options    what it was set up with, beside the checkout
#   ~/easylm/run/       the run: its log and, where the run's part of it starts, offset; its id,
#                       command, pid and exit code; stopped, where it was told to stop; lock, held
#                       as long as it lives
set -euo pipefail

BASE="$HOME/easylm"

# Installs, into the user's home alone, the Python asked for, the checkout and what it needs.
setup() { # python version, revision, or where empty: url and ref
  local python=$1 revision=$2 url=$3 ref=$4
  rm -rf revision src.new
  mkdir src.new
  if [ -z "$url" ]; then
    tar -xzf "$HOME/easylm.tgz" -C src.new
  else
    git -C src.new init --quiet
    git -C src.new fetch --quiet --depth=1 "$url" "$ref"
    git -C src.new checkout --quiet FETCH_HEAD
    revision=$(git -C src.new rev-parse --short=12 HEAD)
  fi
  rm -rf src
  mv src.new src
  rm -f env
  if [ -f "$HOME/easylm.env" ]; then mv "$HOME/easylm.env" env; fi
  echo "python $python, $(env_sum)" >options
  python3 -m pip install --user --quiet --upgrade uv
  python3 -m uv python install --quiet "$python"
  python3 -m uv venv --quiet --clear --managed-python --python "$python" venv
  python3 -m uv pip install --quiet --python venv/bin/python --editable './src[tpu]'
  echo "$revision" >revision
}

env_sum() {
  [ -f env ] && echo "env of checksum $(cksum <./env | cut -d ' ' -f 1)" || echo "no env"
}

worker() { # the number of this host, as gcloud counts
  case "$(hostname)" in
    *-w-[0-9]*) hostname | sed 's/.*-w-//' ;;
    *) echo 0 ;;
  esac
}

answer() { # a line for tpu.sh, which hears all hosts at once
  local IFS='|'
  printf '%s\n' "easylm-host|$(worker)|$(hostname)|$*"
}

versions() {
  local found
  found=$(venv/bin/python -c '
import platform
from importlib.metadata import version
names = "jax", "jaxlib", "libtpu"
print(f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in names))
')
  answer "$found easylm $(cat revision)"
}

devices() { # hosts of the slice
  local found
  found=$(timeout --kill-after=10 300 venv/bin/python -c '
import sys
import jax
if int(sys.argv[1]) > 1:
    jax.distributed.initialize(initialization_timeout=120)
print(jax.device_count())
' "$1")
  answer "$found"
}

start() { # id of the run, command
  local id=$1
  shift
  if [ "$(cat run/id 2>/dev/null)" = "$id" ]; then return 0; fi # gcloud says everything twice
  exec 9>run/lock
  if ! flock --wait 5 9; then # a report holds it for a moment
    echo "a run is going on, on $(hostname)" >&2
    return 3
  fi
  rm -f run/exit run/pid run/stopped
  { printf '%q ' "$@" && echo; } >run/command
  printf '\n=== %s: %s' "$(date -u '+%Y-%m-%d %H:%M:%S UTC')" "$(cat run/command)" >>run/log
  echo >>run/log
  wc -c <run/log >run/offset
  echo "$id" >run/id
  setsid bash "$HOME/easylm_host.sh" supervise "$@" </dev/null >>run/log 2>&1 &
}

# Outlives the connection that started it, and writes down how the command ends.
supervise() { # command
  local line
  CODE=1
  trap 'echo "$CODE" >"$BASE/run/exit.new" && mv "$BASE/run/exit.new" "$BASE/run/exit"' EXIT
  if [ -f env ]; then
    while IFS= read -r line || [ -n "$line" ]; do
      case "$line" in '' | '#'*) ;; *) export "${line?}" ;; esac
    done <./env
  fi
  export PATH="$BASE/venv/bin:$PATH"
  cd src
  set -m # a process group of its own
  trap : TERM HUP INT # a machine that goes down tells all processes; the code is still written
  "$@" </dev/null >>../run/log 2>&1 9>&- &
  echo $! >../run/pid
  while kill -0 $! 2>/dev/null; do wait $! || true; done
  CODE=0
  wait $! || CODE=$?
}

running() {
  [ -f run/id ] && ! flock --shared --nonblock run/lock true
}

pid() { # of the command of a run that goes on
  while running && [ ! -s run/pid ]; do sleep 0.1; done
  cat run/pid
}

report() {
  local state=none made='' stopped='' size=0 last=''
  if running; then
    state=running
  elif [ -s run/exit ]; then
    state=$(cat run/exit)
  elif [ -f run/id ]; then
    state=gone # the machine went down under it
  fi
  if [ -f revision ]; then made="$(cat revision) $(cat options)"; fi
  if [ -f run/stopped ]; then stopped=stopped; fi
  if [ -f run/offset ]; then size=$(($(wc -c <run/log) - $(cat run/offset))); fi
  if [ -f run/log ]; then
    last=$(tail -c 4000 run/log | tr '\r' '\n' | awk 'NF { last = $0 } END { print last }')
  fi
  answer "$state" "$made" "$stopped" "$size" "${last:0:120}"
}

follow() { # bytes of the run's log that were shown, seconds
  local from=$(($(cat run/offset) + $1 + 1))
  if running; then
    timeout "$2" tail --sleep-interval=0.2 --pid="$(pid)" -c "+$from" -f run/log || true
  else
    tail -c "+$from" run/log
  fi | stdbuf -o0 tr '\r' '\n'
}

show_log() { # lines; empty or -f; empty or the sign of a line's host
  local sign=''
  if [ -n "$3" ]; then sign="$(worker)| "; fi
  if [ -n "$2" ] && running; then
    tail --pid="$(pid)" -n "$1" -f run/log
  else
    tail -n "$1" run/log
  fi | stdbuf -oL tr '\r' '\n' | sed -u "s/^/$sign/"
}

stop_run() {
  if running && [ ! -f run/stopped ]; then # a second signal would end it at once
    touch run/stopped
    kill -TERM "$(pid)"
  fi
}

kill_now() {
  if running; then
    touch run/stopped
    kill -KILL -- "-$(pid)"
    flock --wait 30 run/lock true
  fi
}

mkdir -p "$BASE/run"
cd "$BASE"
"$@"
