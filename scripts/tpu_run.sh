# Sourced by tpu.sh: the run. Starts the command on all hosts, shows its log, and keeps it going.
# shellcheck shell=bash

PREEMPTED_CODE=75
LOST_CODE=76
# Without a new checkpoint: after 1, and on a slice that was not lost: memory that ran out is a 76.
MOST_FAULTS=3 MOST_STARTS=10
STARTS=0 DELETED='' # how often the command was started; a request that this script has deleted
LOST=''             # the slice, since the last start

find_workdir() {
  local i
  WORKDIR=''
  for ((i = 0; i < ${#COMMAND[@]}; i++)); do
    case "${COMMAND[i]}" in
      --workdir=*) WORKDIR=${COMMAND[i]#*=} ;;
      --workdir) WORKDIR=${COMMAND[i + 1]:-} ;;
    esac
  done
  WORKDIR=${WORKDIR%/}
  [ -z "$KEEP_GOING" ] || [[ "$WORKDIR" == gs://* ]] || end 2 "run --keep-going: found" \
    "--workdir='$WORKDIR' in the command; wanted a folder in a bucket, where the checkpoints are"
}

run() {
  require_slice
  if [ -n "$KEEP_GOING" ]; then pack; fi
  collect || end 1 "not all hosts of $NAME answer; wanted them set up: scripts/tpu.sh" \
    "setup$(last_words)"
  [ "$(count_running)" -eq 0 ] || end 2 "a run goes on on $NAME already; wanted none:" \
    "scripts/tpu.sh logs -f shows it, stop ends it"
  check_revisions
  if [ -n "$KEEP_GOING" ]; then
    keep_going
  else
    start_run || { on_hosts all kill_now || true; end 1 "not all hosts could start"; }
    watch_run || end "$LOST_CODE" "$NAME is $STATE; the run is lost. It goes on from its last" \
      "checkpoint when it is started again"
    exit "$CODE"
  fi
}

# Ends unless every host was set up, and with what a new slice would get.
check_revisions() {
  local found
  if [ -n "$DRY" ]; then return 0; fi
  found=$(revisions)
  [ -n "$found" ] && [ "$(wc -l <<<"$found")" -eq 1 ] ||
    end 2 "the hosts of $NAME are not set up, or not alike; wanted that: scripts/tpu.sh setup"
  [ -z "$KEEP_GOING" ] || [ -z "$REVISION" ] || [ "${found%% *}" = "$REVISION" ] ||
    end 2 "the hosts have ${found%% *}, this checkout is $REVISION; wanted the same, for a new" \
      "slice gets this one: scripts/tpu.sh setup"
  [ -z "$KEEP_GOING" ] || [ "${found#* }" = "$OPTIONS" ] ||
    end 2 "the hosts were set up with ${found#* }, this command says $OPTIONS; wanted the options" \
      "--python and --env that setup had, for a new slice is set up with these"
  SET_UP=$found
}

revisions() { # what the hosts have, each once
  cut -d '|' -f 5 "$TMP/reports" | sort -u
}

start_run() {
  rm -f "$TMP"/shown.*
  STARTS=$((STARTS + 1))
  on_hosts all start "$(date +%s)-$$-$STARTS" "${COMMAND[@]}" || return 1
  say "started on all $HOSTS hosts; it goes on without this terminal"
}

# Shows the log until no host runs any more, and sets CODE. Returns 1 where the slice is lost.
watch_run() {
  local worker seconds=30 running words
  while true; do
    while ! collect; do
      words=$(last_words)
      look
      case "$STATE" in READY | UNKNOWN) ;; *) LOST=yes && return 1 ;; esac
      again "not all hosts of $NAME answer$words"
    done
    heard
    running=$(count_running)
    worker=$(talker)
    touch "$TMP/shown.$worker"
    on_hosts "$worker" follow "$(($(wc -c <"$TMP/shown.$worker")))" "$seconds" 2>"$TMP/errors" |
      tee -a "$TMP/shown.$worker" || true
    seconds=300
    if [ "$running" -eq 0 ]; then break; fi
    # Other hosts may take a while longer to end.
    if [ "$running" -lt "$HOSTS" ]; then sleep "$POLL_SECONDS"; fi
  done
  CODE=$(decide)
  if [ -n "$DRY" ]; then CODE=0; fi
  say "the run ended with exit code $CODE"
}

# The exit code of a run from those of its hosts: what no start can mend comes first.
decide() {
  awk -F '|' '
    function rank(code) {
      return code == "2" ? 5 : code == "0" ? 1 : code == "75" ? 2 : code == "76" ? 3 : 4
    }
    { code = $4 == "gone" || $4 == "none" ? 76 : $4 }
    rank(code) > rank(worst) || NR == 1 { worst = code }
    END { print rank(worst) == 4 ? 1 : worst }' "$TMP/reports"
}

keep_going() {
  local step new starts=0 faults=0
  step=$(newest_step)
  while true; do
    until bring_up; do again "the hosts of $NAME could not be made ready, see above"; done
    heard
    if [ -z "$LOST" ]; then starts=$((starts + 1)); fi
    [ "$starts" -le "$MOST_STARTS" ] || end 1 "$MOST_STARTS starts from $(from "$step") ended" \
      "with no new one, though the slice was not lost; not started again (scripts/tpu.sh logs)"
    LOST=''
    if start_run && watch_run; then
      if grep -q '^\([^|]*|\)\{5\}stopped|' "$TMP/reports"; then
        say "it was told to stop; not started again"
        exit "$CODE"
      fi
    else
      CODE=$LOST_CODE
    fi
    case "$CODE" in 1 | "$PREEMPTED_CODE" | "$LOST_CODE") ;; *) exit "$CODE" ;; esac
    new=$(newest_step)
    if [ "$new" -gt "$step" ]; then step=$new starts=0 faults=0; fi
    if [ "$CODE" -eq 1 ]; then
      [ "$faults" -lt "$MOST_FAULTS" ] || end 1 "it failed again, after $MOST_FAULTS more tries" \
        "from $(from "$step"); not started again"
      faults=$((faults + 1))
    fi
    say "starting it again in $POLL_SECONDS s; Ctrl-C ends this, and not the run"
    sleep "$POLL_SECONDS"
  done
}

from() { # step
  [ "$1" -lt 0 ] && echo "no checkpoint" || echo "checkpoint $1"
}

newest_step() { # of the complete checkpoints; -1 where there is none
  { cloud storage ls "$WORKDIR/checkpoints/*/commit_success.txt" 2>/dev/null || true; } |
    awk -F / 'BEGIN { most = -1 } $(NF - 1) + 0 > most { most = $(NF - 1) + 0 } END { print most }'
}

# Waits for the slice, and makes it as it was at the start. Returns 1 where that was in vain.
bring_up() {
  local said=''
  while look && [ "$STATE" != READY ]; do
    if [ "$STATE" = UNKNOWN ]; then
      again "gcloud does not say what $NAME is$(last_words)"
      continue
    fi
    LOST=yes
    heard
    if [ "$STATE" != "$said" ]; then say "$NAME is $STATE; waiting for READY"; fi
    said=$STATE
    case "$STATE" in PREEMPTED | TERMINATED | STOPPED | MISSING) create_again ;; esac
    sleep "$POLL_SECONDS"
  done
  if [ -n "$DRY" ]; then return 0; fi
  if collect && [ "$(revisions)" = "$SET_UP" ]; then
    on_hosts all kill_now # what is left of a run that lost a host
  elif set_up && collect; then
    SET_UP=$(revisions)
  else
    return 1
  fi
}

# Replaces a slice that is gone.
create_again() {
  local queue
  [ -n "$SPOT" ] ||
    end "$LOST_CODE" "$NAME is $STATE, and no spot slice; create it again, or another"
  if [ -z "$QUEUED" ]; then
    [ "$STATE" = MISSING ] || tpu tpu-vm delete "$NAME" || return 0
  else
    queue=$(queue_state)
    case "$queue" in
      SUSPENDED | FAILED) tpu queued-resources delete "$QUEUED" --force && DELETED=yes ;;
      MISSING) [ -n "$DELETED" ] ||
        end "$LOST_CODE" "somebody has deleted $NAME and its request; not created again" ;;
      *) return 0 ;; # in the queue, or on its way out of it
    esac
  fi
  say "creating $NAME again"
  if create_slice; then DELETED=''; else say "there is none now; asking again"; fi
}
