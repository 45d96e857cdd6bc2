"""A `gcloud` for tests: a cloud of one slice, whose hosts are folders and whose ssh is bash.

The state of the cloud is files in one folder, which tests read and write. What runs on a host is
run for real, with the host's folder as HOME; only pip, uv and the Python of a host are faked too.
"""

import os
import pathlib
import stat
import subprocess
from typing import ClassVar

GCLOUD = r"""#!/bin/bash
# calls: the arguments of every call; node, queue: state, absent where there is none; type, hosts,
# spot, queued: of the node; refusals: so many more creations fail; mute: a host that ssh misses;
# outage: what every call fails with; offline: hosts reach no package index
cd "$FAKE" || exit
printf '%s\0' "$@" END >>calls
option() {
  local a
  for a in "${@:2}"; do case "$a" in --"$1"=*) printf '%s' "${a#*=}" ;; esac; done
}
if [ -e outage ]; then cat outage >&2; exit 1; fi
missing() { echo "ERROR: NOT_FOUND: Resource '$1' was not found" >&2; exit 1; }
create() {
  if [ "$(cat refusals)" -gt 0 ]; then
    echo $(($(cat refusals) - 1)) >refusals
    echo "ERROR: there is no more capacity in the zone" >&2
    exit 1
  fi
  option accelerator-type "$@" >type
  option service-account "$@" >account
  case " $* " in *" --spot "*) echo True >spot ;; *) : >spot ;; esac
  echo READY >node
  for ((w = 0; w < $(cat hosts); w++)); do mkdir "w$w"; done
}
on_host() {
  if [ "$(cat mute 2>/dev/null)" = "$1" ]; then echo "ssh: timed out" >&2; exit 255; fi
  export HOME="$FAKE/w$1" WORKER=$1 PATH="$FAKE/host:$PATH"
  cd "$HOME" && exec bash -c "$2"
}
case "$1 $2 $3 $4" in
  "compute tpus tpu-vm create") create "$@" ;;
  "compute tpus queued-resources create")
    create "$@"
    echo "projects/p/locations/z/queuedResources/$5" >queued
    echo ACTIVE >queue
    ;;
  "compute tpus tpu-vm delete") rm -rf node w* ;;
  "compute tpus queued-resources delete") rm -rf node queue queued w* ;;
  "compute tpus tpu-vm describe")
    [ -e node ] || missing "$5"
    echo "$(cat node)|$(cat type)|$(cat hosts)|$(cat spot)||$(cat queued 2>/dev/null)|runtime-x" \
      "$(cat account)|projects/p/global/networks/default|" | sed 's/runtime-x /runtime-x|/'
    ;;
  "compute tpus queued-resources describe") [ -e queue ] || missing "$5"; cat queue ;;
  "compute tpus tpu-vm scp" | "compute tpus tpu-vm ssh")
    if [ "$(cat node 2>/dev/null)" != READY ]; then echo "ERROR: $(cat node)" >&2; exit 1; fi
    workers=$(option worker "$@")
    if [ "$workers" = all ]; then workers=$(seq 0 $(($(cat hosts) - 1))); fi
    if [ "$4" = scp ]; then
      for w in $workers; do
        for file in "${@:5}"; do case "$file" in /*) cp "$file" "w$w/" ;; esac; done
      done
      exit
    fi
    worst=0 children=()
    for w in $workers; do on_host "$w" "$(option command "$@")" & children+=($!); done
    for child in "${children[@]}"; do wait "$child" || worst=$?; done
    exit "$worst"
    ;;
  "storage ls "*)
    [ -s steps ] || { echo "ERROR: One or more URLs matched no objects." >&2; exit 1; }
    while read -r step; do echo "${3/\**/$step/commit_success.txt}"; done <steps
    ;;
  *) echo "no such command" >&2; exit 2 ;;
esac
"""

PYTHON3 = r"""#!/bin/bash
echo "$*" >>"$HOME/installed"
case "$*" in
  "-m uv venv "*) mkdir -p venv/bin && cp "$FAKE/host_python" venv/bin/python ;;
  "-m uv pip install "*)
    if [ -e "$FAKE/offline" ]; then echo "no package index" >&2; exit 1; fi
    [ -f src/pyproject.toml ]
    ;;
esac
"""

# plan: what each start ends with: an exit code, codes of hosts with commas between, "lost" for a
# slice that is taken away meanwhile, "wait" for a run that goes on until it is told to stop,
# "mute" or "outage" for a run that ends as it should but leaves that, and behind ":" a step that is
# saved before
HOST_PYTHON = r"""#!/bin/bash
case "$2" in
  *"version("*) cat "$FAKE/versions.$WORKER" 2>/dev/null || echo "python 3.12.1 jax 0.11.2"; exit ;;
  *device_count*) cat "$FAKE/devices.$WORKER" 2>/dev/null || cat "$FAKE/devices"; exit ;;
esac
printf '%s\n' "$@" >"$HOME/arguments"
echo x >>"$FAKE/starts.$WORKER"
plan=$(sed -n "$(wc -l <"$FAKE/starts.$WORKER")p" "$FAKE/plan")
case "$plan" in *:*) echo "${plan#*:}" >>"$FAKE/steps" ;; esac
plan=${plan%%:*}
echo "host $WORKER: token $HF_TOKEN, $plan"
if [ "$WORKER" = "$(cat "$FAKE/talker")" ]; then printf 'some more\rand more\n'; fi
case "$plan" in
  wait) trap 'sleep 0.2; echo saved; exit 75' TERM; while [ -d "$HOME" ]; do sleep 0.05; done ;;
  lost) echo PREEMPTED >"$FAKE/node"; while [ -d "$HOME" ]; do sleep 0.05; done ;;
  mute | outage)
    trouble=1
    if [ "$plan" = outage ]; then trouble=$'ERROR: no login.\n\n  Log in'; fi
    if [ "$WORKER" = 1 ]; then echo "$trouble" >"$FAKE/$plan" && sleep 2; fi
    ;;
  *,*) exit "$(cut -d , -f $((WORKER + 1)) <<<"$plan")" ;;
  *) exit "$plan" ;;
esac
"""


class FakeCloud:
    """The cloud in a folder; where there is none, one without a slice, and two hosts for one."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        if folder.exists():
            return
        for name in ("bin", "host"):
            (folder / name).mkdir(parents=True)
        programs = {
            "bin/gcloud": GCLOUD,
            "host/python3": PYTHON3,
            "host/hostname": '#!/bin/bash\necho "t1v-n-1234-w-$WORKER"\n',
            "host_python": HOST_PYTHON,
        }
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)
        self.write(calls="", hosts=2, devices=16, refusals=0, plan="", talker=0)

    def write(self, **files: object) -> None:
        """Sets files of the cloud, by name; "_" stands for a dot."""
        for name, value in files.items():
            (self.folder / name.replace("_", ".")).write_text(f"{value}\n" if value != "" else "")

    def read(self, name: str) -> str:
        """What a file of the cloud holds, without white space around; empty where there is none."""
        path = self.folder / name
        return path.read_text().strip() if path.exists() else ""

    def calls(self) -> list[list[str]]:
        """The arguments of all calls of gcloud."""
        calls = (self.folder / "calls").read_text().split("\0END\0")
        return [call.split("\0") for call in calls if call]

    def verbs(self) -> list[str]:
        """What was asked of slices and queue, such as "tpu-vm create", without looks and ssh."""
        asked = [" ".join(call[2:4]) for call in self.calls() if call[0] == "compute"]
        return [verb for verb in asked if not verb.endswith(("describe", "ssh"))]

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that finds this gcloud, and a slice named there."""
        return {
            "HOME": str(self.folder),
            "TMPDIR": str(self.folder),
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(self.folder),
            "NAME": "pod",
            "ZONE": "europe-west4-a",
            "POLL_SECONDS": "0.1",
        }


class Script:
    """scripts/tpu.sh, running; what it says goes to files, which hosts may hold open for longer."""

    started: ClassVar[list[subprocess.Popen]] = []

    def __init__(self, cloud, checkout, *arguments, **environment):
        said = f"said{len(Script.started)}"
        self.files = [cloud.folder / f"{said}.{stream}" for stream in (1, 2)]
        out, err = (file.open("w") for file in self.files)
        with out, err:
            self.process = subprocess.Popen(
                ["bash", str(checkout / "scripts" / "tpu.sh"), *arguments],
                env={**cloud.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        Script.started.append(self.process)

    def result(self, code=0):
        """(stdout, stderr), once it has ended, which must be with `code`."""
        try:
            self.process.wait(timeout=60)
        finally:
            self.process.kill()
            out, err = (file.read_text() for file in self.files)
        assert self.process.returncode == code, f"{out}\n{err}"
        return out, err


def tpu(cloud, checkout, *arguments, code=0, **environment):
    """(stdout, stderr) of the script, which must exit with `code`."""
    return Script(cloud, checkout, *arguments, **environment).result(code)
