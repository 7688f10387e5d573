# The whole chain in every pod: the first one does what one machine does, all of them train and evaluate.
# The pods share the folder WORK (data and runs); PET_NODE_RANK is this pod's number. The arguments are settings.
set -euo pipefail
cd "${WORK:-/work}"

# The first process of a container gets only the signals that it traps. SIGTERM (an eviction, a drained node) goes on to the
# verb, which saves and stops; the rest of the chain is for the pod that takes this one's place.
verb="" stopped=""
trap 'stopped=yes; [ -z "$verb" ] || kill -TERM "$verb" 2>/dev/null' TERM INT

run() { # COMMAND...: run it, and leave with its exit code if it fails or the pod is to stop
  local code=0
  "$@" &
  verb=$!
  while kill -0 "$verb" 2>/dev/null; do # a signal ends `wait` before the verb has ended
    wait "$verb" && code=0 || code=$?
  done
  verb=""
  [ "$code" -eq 0 ] || exit "$code"
  [ -z "$stopped" ] || exit 143
}

# What one machine does, the others wait for: one file a start of the job, so that a restart waits anew.
done_dir=".chain/$JOB_UID"
mkdir -p "$done_dir"
once() {
  local file="$done_dir/$1"
  if [ "$PET_NODE_RANK" = 0 ]; then
    run env --unset=PET_NNODES shardline "$@"
    touch "$file"
  else
    until [ -e "$file" ]; do run sleep 2; done
  fi
}

once shard "$@"
once check "$@"
run shardline train "$@"
run shardline evaluate "$@"
[ "$PET_NODE_RANK" != 0 ] || run shardline export "$@"
