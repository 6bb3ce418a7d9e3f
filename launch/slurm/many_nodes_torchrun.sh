#!/bin/bash
# Train with evomesh: sbatch [OPTIONS OF sbatch] FILE [CONFIG [OPTIONS OF evomesh train]]
# What is given on the command line overrides the lines below.
#SBATCH --job-name=evomesh
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue

set -u
config=${1:-configs/7B_sft.py}
shift || true
options=("$@")

job=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then # one task's number is that of the whole array too
  job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
fi

# Two jobs that share a node need two ports.
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))

# Slurm tells this shell to end if the job was canceled, was requeued by an operator, or is out
# of time. It tells the ranks as well: the shell waits until they have saved, and leaves the job alone.
is_ended=no
trap 'is_ended=yes' TERM
# The signal of --signal reaches this shell too. It is for the ranks, which save: the shell keeps waiting.
trap : USR1

# One task per node, which starts the ranks of its node; evomesh reads the nodes from Slurm.
export NPROC_PER_NODE=8
echo "job $job on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}: $config"
srun --kill-on-bad-exit=0 --wait=600 evomesh train "$config" "${options[@]}"
code=$?

# 75: stopped and saved, or a rank was lost. Above 128: a signal killed a rank. A user's mistake (2)
# or a bug (1) would only happen again.
case $code in
  75 | 129 | 134 | 135 | 137 | 138 | 139 | 143)
    if [ "$is_ended" = no ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
      echo "srun ended with $code: job $job is queued again, and resumes if it has saved"
      scontrol requeue "$job"
    fi
    ;;
esac

exit "$code"
