# shellcheck shell=bash
# What job_gpu.slurm and job_cpu.slurm share: they source it inside a Slurm job. It wants KIND (gpu or
# cpu) set, and $RUN is the job's folder. Variables that the submitting user may set:
#
#   SITE          a name in configs/sites/ or the path of such a file   [generic]
#   MODULES       modules to load instead of the site's
#   MAX_REQUEUES  how often a job that saved itself goes back into the queue by itself  [20]
#   CHECK         what a FAIL of lorabatch check does: warn, strict (ends the job), off  [warn]

set -Eeuo pipefail
ME=job_$KIND.slurm # Slurm's copy of it has another name
# shellcheck source=lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[[ -n ${SLURM_JOB_ID:-} ]] || die $EX_USAGE "for Slurm: sbatch scripts/job_$KIND.slurm; elsewhere: bash scripts/run_local.sh"
readonly EX_AGAIN=75 # saved, the same command goes on
RUN=${RUN:-results/${SLURM_JOB_NAME:-job}-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}
# The number of one task of an array means the whole array to Slurm's commands.
JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
readonly JOB=${JOB:-$SLURM_JOB_ID}
STEP='' SIGNALLED='' WOKEN='' TOO_SHORT=''

log() { printf '%s job %s: %s\n' "$(date +%FT%T%z)" "$JOB" "$*"; }

load_site() {
    local file=${SITE:-generic}
    [[ $file == */* ]] || file=$ROOT/configs/sites/$file.env
    [[ -f $file ]] || die $EX_USAGE "SITE=$SITE: no such file $file; known: $(cd "$ROOT/configs/sites" && echo *.env)"
    # shellcheck source=/dev/null
    source "$file"
    local modules=SITE_MODULES_${KIND^^} name
    [[ -z ${MODULES:-${!modules:-}} ]] || find_module
    for name in ${MODULES:-${!modules:-}}; do
        set +u # module files read variables that are not set
        module load "$name" || die $EX_UNAVAILABLE "module load $name failed; set MODULES, or mend a copy of $file and name it in SITE"
        set -u
    done
}

# A batch shell is no login shell: on some sites nothing has defined the command yet.
find_module() {
    local file
    for file in "${MODULESHOME:-/nonexistent}/init/bash" "${LMOD_PKG:-/nonexistent}/init/bash" /etc/profile.d/{modules,lmod,z00_lmod}.sh; do
        if ! type module >/dev/null 2>&1 && [[ -r $file ]]; then
            set +u
            # shellcheck source=/dev/null
            source "$file"
            set -u
        fi
    done
    type module >/dev/null 2>&1 ||
        die $EX_UNAVAILABLE "this node has no 'module' command; clear MODULES and the site's SITE_MODULES_${KIND^^}, or submit with: sbatch --export=ALL,BASH_ENV=FILE that defines it"
}

# Nothing that the user chose is changed. Without a choice: hf_cache on the scratch disk if it is there, else the
# usual place in the home; and where compute nodes do not see the home, all caches beside the project.
choose_caches() {
    local scratch
    for scratch in "${SCRATCH:-}" "/scratch/${USER:-$(id -un)}"; do
        if [[ -z ${HF_HOME:-} && -n $scratch && -d $scratch/hf_cache ]]; then
            export HF_HOME=$scratch/hf_cache
        fi
    done
    [[ -w ${HOME:-} ]] || export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$ROOT/.cache}
    # transformers 5 ignores TRANSFORMERS_CACHE; HF_HUB_OFFLINE=0 would win over TRANSFORMERS_OFFLINE=1
    export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
    [[ -z ${TRANSFORMERS_CACHE:-} ]] || export HF_HUB_CACHE=${HF_HUB_CACHE:-$TRANSFORMERS_CACHE}
}

# One thread per core of a task. srun takes --cpus-per-task from its own variable only (Slurm 22.05 on), and after
# `sbatch --export=...` it would not give our variables to the tasks.
choose_threads() {
    export SLURM_EXPORT_ENV=ALL
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
}

provenance() {
    local commit
    commit=$(git -C "$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)
    [[ -z $(git -C "$ROOT" status --porcelain --untracked-files=no 2>/dev/null) ]] || commit+=+changes
    log "start ${SLURM_RESTART_COUNT:-0} of '${SLURM_JOB_NAME:-}' on ${SLURM_JOB_NODELIST:-?} (${SLURM_NTASKS:-1} tasks), commit $commit"
    log "site ${SITE:-generic}, time left $(squeue --noheader --jobs="$JOB" --format=%L 2>/dev/null || echo unknown), run folder $RUN"
    log "command: $*"
    {
        echo "== $(date +%FT%T%z) commit $commit"
        scontrol show job -dd "$JOB" || true
        if type module >/dev/null 2>&1; then (set +u && module list) || true; fi
        env | grep -E '^(SLURM|HF|OMP|CUDA|NCCL|ROCR|SITE|MODULES)' | grep -vE 'TOKEN|SECRET|PASSWORD|KEY' | sort
    } >>"$RUN/provenance-$JOB.txt" 2>&1
}

pass_on() {
    local left_s
    SIGNALLED=$1 WOKEN=yes
    if [[ $1 == USR1 ]]; then
        left_s=$(($(date -d "$(squeue --noheader --jobs="$JOB" --format=%e)" +%s 2>/dev/null || echo 0) - $(date +%s)))
        ((8 * SECONDS >= left_s)) || TOO_SHORT="$left_s s before the end of the job, $SECONDS s after its start"
    fi
    log "got SIG$1${STEP:+: the step saves and stops}"
    [[ -z $STEP ]] || kill -"$1" "$STEP" 2>/dev/null || true
}

# in_step WORDS...: srun with these words, our signals passed on to it; its exit code.
in_step() {
    local code=0 again
    WOKEN=''
    srun --kill-on-bad-exit=1 --wait=60 --unbuffered --cpu-bind=cores "$@" &
    STEP=$!
    wait "$STEP" || code=$?
    # A trapped signal interrupts wait: ask again, as often as one came. (What wait says of a process that it
    # has reported already depends on bash: its code again, or 127.)
    while [[ -n $WOKEN ]]; do
        WOKEN='' again=0
        wait "$STEP" 2>/dev/null || again=$?
        ((again == 127)) || code=$again
    done
    STEP=''
    # Python needs seconds to start; a signal before its handlers are there ends it with nothing lost.
    if [[ -n $SIGNALLED ]] && ((code > 128)); then code=$EX_AGAIN; fi
    return "$code"
}

# run DONE_FILE COMMAND FLAGS...: one lorabatch command on all tasks of the job, unless an earlier start finished it.
run() {
    local done_file=$1 code=0
    shift
    if [[ -n $done_file ]] && grep -qs '"status": "completed"' "$done_file"; then
        log "$1: finished by an earlier start"
        return
    fi
    [[ -z $SIGNALLED ]] || stop_here $EX_AGAIN "$1"
    log "$1 begins"
    in_step "$VENV/bin/python" -m lorabatch "$@" || code=$?
    ((code == 0)) || stop_here "$code" "$1"
    log "$1 done"
}

# stop_here CODE COMMAND: saved work goes back into the queue, anything else ends the job with its code.
stop_here() {
    local restarts=${SLURM_RESTART_COUNT:-0}
    if (($1 != EX_AGAIN)); then
        log "$2 failed with exit code $1; the lines above say why"
    elif [[ $(squeue --noheader --jobs="$JOB" --format=%t) == CG ]]; then
        # Slurm ends the job already: cancelled, preempted, or out of time. Requeueing would undo scancel.
        log "$2 is saved, and Slurm ends this job (cancelled, preempted or out of time); submit the same command again to go on"
    elif [[ -n $TOO_SHORT ]]; then
        # It would be requeued again and again, and never get to its work.
        log "$2 is stopped, not requeued: the warning came $TOO_SHORT; ask for more --time, or give sbatch --signal=B:USR1@20"
    elif ((restarts >= ${MAX_REQUEUES:-20})); then
        log "$2 is saved, but this job was requeued $restarts times already (MAX_REQUEUES); submit it again to go on"
    elif scontrol requeue "$JOB"; then
        log "$2 is saved; job $JOB is requeued"
    else
        log "$2 is saved, but Slurm refuses to requeue; go on with: scontrol requeue $JOB, or submit the same command again"
    fi
    exit "$1"
}

# On every node, before anything is loaded: 69 if the job could only be wasted.
check_nodes() {
    local code=0 flags=(--output_dir "$RUN")
    [[ $KIND == cpu ]] && flags+=(--no_cuda) || flags+=(--need_gpu)
    in_step --nodes="${SLURM_NNODES:-1}" --ntasks="${SLURM_NNODES:-1}" --ntasks-per-node=1 \
        "$VENV/bin/python" -m lorabatch doctor "${flags[@]}" || code=$?
    ((code == 0)) || stop_here "$code" doctor
}

# The data, once, before anything is trained on it.
check_data() {
    local code=0
    [[ ${CHECK:-warn} == @(warn|strict|off) ]] || die $EX_USAGE "CHECK=$CHECK: give warn, strict or off"
    [[ ${CHECK:-warn} != off && ! -f $RUN/check/check.json ]] || return 0
    log "check begins"
    in_step --nodes=1 --ntasks=1 "$VENV/bin/python" -m lorabatch check "$@" --output_dir "$RUN/check" || code=$?
    ((code == 0)) || [[ $code == 65 && ${CHECK:-warn} == warn ]] || stop_here "$code" check
}

# Train, infer with the adapter, report: what a job does without words of its own.
pipeline() {
    local config=("$@") model=() spread=(--resume) device=()
    [[ $KIND == gpu ]] || device=(--no_cuda)
    if ((${#config[@]} == 0)); then
        choose_model
        model=(--base_model "$BASE_MODEL")
    fi
    check_data "${config[@]}"
    if ((${SLURM_NTASKS:-1} > 1)); then spread=(--shards $((4 * SLURM_NTASKS))); fi
    run "$RUN/train/run.json" train "${config[@]}" "${model[@]}" "${device[@]}" --save_dir "$RUN/train" --resume auto
    run "$RUN/infer/run.json" infer "${config[@]}" "${model[@]}" "${device[@]}" --adapter_dir "$RUN/train" --output_dir "$RUN/infer" "${spread[@]}"
    lorabatch report "$RUN/train" "$RUN/infer" --output_dir "$RUN/report"
}

check_environment() {
    if [[ -f scripts/build.sh ]]; then
        refuse_broken_venv
        venv_is_current || die $EX_UNAVAILABLE "$VENV is not built for this commit; on a node with internet run: bash scripts/build.sh"
    else
        lorabatch --version >/dev/null 2>&1 || die $EX_UNAVAILABLE "no lorabatch in VENV=$VENV; set VENV to the folder of the environment that it is installed in"
    fi
}

job_main() {
    cd "$ROOT"
    mkdir -p "$RUN" || die $EX_UNAVAILABLE "cannot make RUN=$RUN; compute nodes may not see your home: set RUN to a folder on a disk that they may write to"
    trap 'pass_on USR1' USR1
    trap 'pass_on TERM' TERM
    load_site
    choose_caches
    choose_threads
    check_environment
    provenance "$@"
    check_nodes
    case ${1:-} in
        '' | --config) pipeline "$@" ;;
        -*) die $EX_USAGE "unexpected '$1'; give nothing, --config FILE, or a lorabatch command with its flags" ;;
        *) run '' "$@" ;;
    esac
    log "all done: $RUN"
}
