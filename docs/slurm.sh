#!/bin/bash
# A run under SLURM on two nodes of eight GPUs (for one: sbatch --nodes=1 ...). The arguments are train.py's:
#
#   sbatch docs/slurm.sh config/vitg_clip3.py --out_dir=out/vitg_2nodes
#
# Before a time limit or a preemption all ranks save, and the job goes back into the queue and resumes by itself. srun
# starts the ranks, not torchrun: torchrun ends on SIGUSR1, and 30 s after a SIGTERM it kills ranks that still save.
#SBATCH --job-name=nanopfm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
out=$(printf '%s\n' "$@" | sed -n 's/^--out_dir=//p' | tail -n 1)
out=${out/#\~/$HOME}  # as train.py reads it
: "${out:?give --out_dir=...; the job looks there for a checkpoint to resume from}"
resume=false
ls "$out"/ckpt/*/.metadata 2>/dev/null | grep -q '/[0-9][0-9]*/\.metadata$' && resume=true  # not 5.damaged
if [ "$resume" = false ] && [ -d "$out" ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    mv "$out" "$out.begun-$SLURM_RESTART_COUNT"  # this job began it and ended before a checkpoint
fi
trap : TERM  # a preemption may signal this shell too, which has to wait for the ranks

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) OMP_NUM_THREADS=1
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c 'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python train.py "$@" --resume='"$resume" train.py "$@" || exit

# all ranks have saved, at the end of the run or because of a signal; requeue the job if steps are left
left=$(python - "$out" <<'PY'
import json, os, sys
steps = [int(name) for name in os.listdir(f"{sys.argv[1]}/ckpt") if name.isdecimal()]
print(json.load(open(f"{sys.argv[1]}/config.json"))["max_steps"] - max(steps))
PY
)
if [ "${left:-0}" -gt 0 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
