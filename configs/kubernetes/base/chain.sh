# The whole chain in every pod: the first one does what one machine does, all of them train and evaluate.
# The pods share the folder WORK (data and runs); PET_NODE_RANK is this pod's number. The arguments are settings.
set -euo pipefail
cd "${WORK:-/work}"

# What one machine does, the others wait for: one file a start of the job, so that a restart waits anew.
done_dir=".chain/$JOB_UID"
mkdir -p "$done_dir"
once() {
  local file="$done_dir/$1"
  if [ "$PET_NODE_RANK" = 0 ]; then
    env --unset=PET_NNODES shardline "$@"
    touch "$file"
  else
    until [ -e "$file" ]; do sleep 2; done
  fi
}

once shard "$@"
once check "$@"
shardline train "$@"
shardline evaluate "$@"
[ "$PET_NODE_RANK" != 0 ] || shardline export "$@"
