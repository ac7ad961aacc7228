# Sourced by the sbatch scripts: one srun of all ranks, and back into the queue when the run has to go on.

# Times that a job whose rank died (not one that was stopped in time) is tried again
: "${MEGAREWARM_RETRIES:=3}"

run_and_requeue() {
  local python code start
  if [ -f "$root/launch.sh" ] && [ -z "${MEGAREWARM_PYTHON:-}" ]; then
    python=$("$root/tools/environment.sh") || exit 2
    start=("$python" -u "$root/launch.sh")
  else # megarewarm is installed
    start=("${MEGAREWARM_PYTHON:-python3}" -u -m megarewarm train)
  fi
  # srun has not taken these over from sbatch since Slurm 22.05
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
  # the ranks end within seconds of each other; a minute after the first one those that hang are killed
  srun --wait=60 "${start[@]}" "$@"
  code=$?
  case $code in
    0 | 2 | 3) ;;    # done, bad input, diverged: another try would end the same
    130 | 143) ;;    # cancelled by somebody, or preempted: then Slurm requeues the job itself
    75 | 138) requeue "stopped at its time limit or by its signal, a checkpoint is saved" ;;
    *)
      if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MEGAREWARM_RETRIES" ]; then
        requeue "ended with code $code, the last checkpoint is whole"
      else
        echo "job $SLURM_JOB_ID ended with code $code after ${SLURM_RESTART_COUNT:-0} restarts; not requeued" >&2
      fi
      ;;
  esac
  exit $code
}

requeue() {
  echo "job $SLURM_JOB_ID $1; it goes back into the queue" >&2
  # Slurm ends this script; an exit of its own could be taken for that of the next try
  scontrol requeue "$SLURM_JOB_ID" && sleep 60
}
