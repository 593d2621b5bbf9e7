"""Every setting of every command, once: name, type, default, bound, unit and help in one field.

Flags, TOML files, ``--print_config``, ``--help`` and the records of a run are all derived from
these dataclasses (``lorabatch.settings`` does the deriving), so nothing is typed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.settings import REQUIRED, Settings, setting

DTYPES = ("auto", "fp32", "bf16", "fp16")
A_MODEL = "model folder, .gguf file, name in the Hugging Face cache or on the hub, or smollm2-135m"
FORECAST = "only say what the run will do and need: data, memory, time, Slurm's --mem and --time"
THREADS = "CPU threads (default: the cores this process may use)"


@dataclass(frozen=True)
class TrainConfig(Settings, command="train"):
    """Fine-tune a base model with LoRA; the adapter lands in --save_dir in PEFT's format."""

    base_model: str = setting("distilgpt2", A_MODEL, free=True)
    train_path: tuple[str, ...] = setting(
        ("data_sample/train.txt",),
        "training documents: .txt, .jsonl, .csv or .parquet; PATH:0.3 takes 0.3 of them an epoch",
        free=True,
    )
    val_path: str | None = setting(
        "data_sample/val.txt", "validation documents ('none': no evaluation)", free=True
    )
    save_dir: str | None = setting(
        None, "run folder, adapter at its root (default: results/lora-<model>)", free=True
    )
    jobs: str | None = setting(
        None,
        "train several adapters over one base: .jsonl, one run a line: a name and its "
        "settings; folders --save_dir/NAME",
        free=True,
    )
    overwrite: bool = setting(False, "replace an earlier run in --save_dir", free=True)
    dry_run: bool = setting(False, FORECAST, free=True)
    resume: str | None = setting(
        None,
        "auto: resume from the newest checkpoint in --save_dir, if any; or a checkpoint or run "
        "folder",
        free=True,
    )
    resume_anyway: bool = setting(
        False,
        "resume even if settings, data or base differ from the checkpoint's (says which)",
        free=True,
    )
    save_every_steps: int | None = setting(
        None,
        "checkpoint every N steps (default: every 5 minutes and after evaluations); always at "
        "the start and the end",
        minimum=1,
        free=True,
    )
    keep_checkpoints: int = setting(
        2, "how many of the newest checkpoints to keep", minimum=1, free=True
    )
    time_limit: str | None = setting(
        None,
        "save and stop (exit 75) before this time is up: minutes or h:mm:ss; Slurm's end time "
        "counts too",
        free=True,
    )
    rank_timeout: int = setting(
        60,
        "seconds that several ranks wait for each other before one counts as dead",
        minimum=1,
        free=True,
    )

    epochs: int = setting(1, "passes over the training documents", minimum=1)
    max_steps: int | None = setting(
        None, "stop after this many optimiser steps, if that comes first", minimum=1
    )
    batch_size: int = setting(
        8, "documents per optimiser step (times --grad_accum_steps)", minimum=1
    )
    grad_accum_steps: int = setting(1, "batches accumulated before each optimiser step", minimum=1)
    max_len: int = setting(
        512, "longest document in tokens; longer text is split, longer answers are cut", minimum=2
    )
    block_tokens: int = setting(
        2048,
        "tokens of the packed block that goes through the model at once, at most: less where "
        "memory is short",
        minimum=2,
    )
    checkpointing: str = setting(
        "selective",
        "recomputed in the backward pass: nothing; norms and activations; whole layers",
        choices=("none", "selective", "full"),
    )

    lr: float = setting(2e-4, "peak learning rate", above=0)
    scheduler: str = setting(
        "cosine", "learning rate after warm-up", choices=("cosine", "linear", "constant")
    )
    warmup_steps: int | None = setting(
        None, "steps of linear warm-up (default: 5 % of all steps)", minimum=0
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of the adapters", minimum=0)
    adam_beta1: float = setting(0.9, "AdamW: decay of the first moment", minimum=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW: decay of the second moment", minimum=0, below=1)
    adam_eps: float = setting(1e-8, "AdamW: added to the denominator", above=0)
    max_grad_norm: float = setting(1.0, "clip the gradient's 2-norm to this (0: never)", minimum=0)

    lora_r: int = setting(16, "rank of the adapters", minimum=1, maximum=65536)
    lora_alpha: float = setting(
        32.0, "adapter scale: alpha / r, or alpha / sqrt(r) with --use_rslora", above=0
    )
    lora_dropout: float = setting(0.0, "dropout on the input of the adapters", minimum=0, below=1)
    use_rslora: bool = setting(False, "rank-stabilised scale (arXiv 2312.03732)")
    target_modules: tuple[str, ...] = setting(
        ("all-linear",), "all-linear, attn, or names of linear layers"
    )
    lora_plus_ratio: float = setting(
        1.0, "LoRA+ (arXiv 2402.12354): learning rate of B over that of A", above=0
    )
    label_smoothing: float = setting(
        0.0, "share of the target's probability spread over the vocabulary", minimum=0, below=1
    )
    z_loss: float = setting(
        0.0, "weight of the squared log-sum-exp of the logits in the loss", minimum=0
    )

    eval_every_steps: int | None = setting(
        None,
        "evaluate every N steps (default: about 4 times a run, and always at the end)",
        minimum=1,
    )
    early_stopping_evals: int = setting(
        0, "stop after N evaluations without improvement (0: never)", minimum=0
    )
    max_train_documents: int | None = setting(
        None, "use only the first N documents of each training file", minimum=1
    )
    max_val_documents: int | None = setting(
        None, "use only the first N validation documents", minimum=1
    )

    txt_format: str = setting(
        "auto",
        ".txt: one document a line, or separated by blank lines",
        choices=("auto", "line", "blank"),
    )
    text_field: str = setting(
        "text", "field of .jsonl, .csv and .parquet rows that holds plain text"
    )
    train_on_prompt: bool = setting(False, "prompt tokens count in the loss too")
    group_field: str | None = setting(
        None, "field that says whose a row is (a patient, a source): never in both files", free=True
    )
    data_checks: str = setting(
        "warn",
        "look for leaks, repeats and personal data first: say so, stop as 'check' would, or "
        "nothing; only a leak by group or of 1 % of the validation texts stops 'warn'",
        choices=("warn", "strict", "off"),
        free=True,
    )
    turns: str = setting(
        "all",
        "messages: answers of the assistant that are learned",
        choices=("all", "last"),
        free=True,
    )

    seed: int = setting(42, "seed of initialisation, order and dropout", minimum=0)
    dtype: str = setting(
        "auto", "type of the frozen base; adapters stay fp32", choices=DTYPES, free=True
    )
    load_in_4bit: bool = setting(
        False, "store the base in 4 bits: NF4, double quantisation (QLoRA; needs bitsandbytes)"
    )
    load_in_8bit: bool = setting(False, "store the base in 8-bit integers (needs bitsandbytes)")
    shard_base: bool = setting(
        False,
        "shard the base's layers across the ranks: for models larger than one device",
        free=True,
    )
    no_cuda: bool = setting(False, "stay on the CPU", free=True)
    backend: str = setting(
        "auto",
        "native decoder, or transformers + peft for any other model",
        choices=("auto", "native", "hf"),
        free=True,
    )
    threads: int | None = setting(None, THREADS, minimum=1, maximum=1024, free=True)


@dataclass(frozen=True)
class InferConfig(Settings, command="infer"):
    """Complete all prompts of a file in batches; one JSON line per finished request."""

    base_model: str = setting(TrainConfig.base_model, A_MODEL)
    adapter_dir: str | None = setting(
        None, "LoRA adapter in PEFT's format, merged into the base ('none': the base alone)"
    )
    prompts: str = setting(
        "data_sample/prompts.txt",
        "prompts: .txt (one a line), .jsonl, .csv or .parquet (id, prompt, settings per request)",
    )
    keep_fields: tuple[str, ...] = setting((), "fields of the prompts' rows to copy into 'fields'")
    prompt: str | None = setting(
        None, "instead of a file: complete this text and print the completion alone"
    )
    output_dir: str | None = setting(None, "run folder (default: a new one in results/)")
    dry_run: bool = setting(False, FORECAST)
    resume: bool = setting(False, "continue the run in --output_dir: finished requests are skipped")
    overwrite: bool = setting(False, "replace an earlier run in --output_dir")
    fail_on_error: bool = setting(
        False, "exit with 65 if any request failed, after all others were completed"
    )
    retry_failed: bool = setting(
        False, "--resume, --shards: retry requests that ended in errors earlier"
    )

    batch_size: int = setting(16, "requests that run at the same time", minimum=1)
    max_new_tokens: int = setting(64, "most tokens to generate per request", minimum=1)
    min_new_tokens: int = setting(
        0, "fewest tokens: until then no end-of-text and no stop token is chosen", minimum=0
    )
    iters: int = setting(
        1, "measured repetitions of the whole run; above 1, after a warm-up", minimum=1
    )
    ignore_eos: bool = setting(False, "always generate --max_new_tokens (benchmarks)")
    deterministic: bool = setting(
        False,
        "a request's tokens never depend on its batch: always so in the CPU kernels, "
        "elsewhere by steps of one shape (NVIDIA GPUs) or one request at a time where sums "
        "require it",
    )
    output_order: str = setting(
        "finished", "order of completions.jsonl", choices=("finished", "input")
    )
    output_format: str = setting(
        "lorabatch",
        "openai: also write batch_output.jsonl, at the end",
        choices=("lorabatch", "openai"),
    )

    temperature: float = setting(0.0, "0: greedy", minimum=0)
    top_k: int = setting(0, "sample among the k likeliest tokens (0: all)", minimum=0)
    top_p: float = setting(
        1.0, "sample among the likeliest tokens that sum to p", above=0, maximum=1
    )
    min_p: float = setting(
        0.0, "drop tokens less likely than min_p times the likeliest", minimum=0, maximum=1
    )
    repetition_penalty: float = setting(
        1.0, "divide the logits of tokens already seen (1: off)", above=0
    )
    presence_penalty: float = setting(
        0.0, "subtract from the logits of tokens already generated", minimum=-2, maximum=2
    )
    frequency_penalty: float = setting(
        0.0, "subtract this times how often a token was generated", minimum=-2, maximum=2
    )
    seed: int = setting(
        0, "seed of sampling; request i uses seed + i unless it has its own", minimum=0
    )
    n: int = setting(1, "completions per prompt", minimum=1, maximum=1024)
    stop: tuple[str, ...] = setting((), "strings that end a completion (not part of the text)")
    stop_token_ids: tuple[int, ...] = setting(
        (), "token ids that end a completion (not part of the text)", minimum=0
    )
    schema: str | None = setting(None, "file: JSON schema that every completion must follow")
    regex: str | None = setting(None, "regular expression that every completion must match")
    choices: tuple[str, ...] = setting((), "texts of which every completion must be one")
    logprobs: int | None = setting(
        None, "log-probability of each token, and of the N likeliest ones", minimum=0, maximum=20
    )

    max_len: int | None = setting(
        None, "longest prompt + completion in tokens (default: the model's limit)", minimum=2
    )
    long_prompt: str = setting(
        "error",
        "what to do with a prompt that does not fit",
        choices=("error", "truncate_left", "truncate_right"),
    )
    rows: str | None = setting(None, "only prompts FIRST to END-1 of the file, as FIRST:END")
    shards: int | None = setting(
        None,
        "share the work with all processes that run this command on this --output_dir, in N shards",
        minimum=1,
    )
    claim_timeout_s: int = setting(
        180, "--shards: take over from a process that has been silent for this long", minimum=2
    )
    leave_early: bool = setting(
        False, "--shards: exit when no shard is left to claim; a later process merges"
    )
    prefill_tokens: int = setting(
        2048, "prompt tokens that the model processes in one step", minimum=1
    )
    adapters: tuple[str, ...] = setting(
        (),
        "several adapters in one run: NAME=DIR each; a .jsonl request names its own in 'adapter'",
    )
    order: str = setting(
        "auto",
        "which requests run first; results are the same (auto: by adapter if there are "
        "--adapters, else arrival)",
        choices=("auto", "arrival", "longest", "adapter"),
    )
    speculate: int = setting(
        0,
        "tokens guessed ahead from the text itself (greedy requests; results are the same)",
        minimum=0,
        maximum=32,
    )

    dtype: str = setting("auto", "type of weights and KV cache", choices=DTYPES)
    quantize: str = setting(
        "none",
        "int8: 8-bit weights and activations on a CPU, faster and nearly exact",
        choices=("none", "int8"),
    )
    no_cuda: bool = setting(False, "stay on the CPU")
    backend: str = setting(
        "auto",
        "native decoder, or transformers for any other model",
        choices=("auto", "native", "hf"),
    )
    threads: int | None = setting(None, THREADS, minimum=1, maximum=1024)


@dataclass(frozen=True)
class MergeConfig(Settings, command="merge"):
    """Write a model folder with an adapter merged into the base, for tools that do not know
    adapters."""

    base_model: str = setting(TrainConfig.base_model, A_MODEL)
    adapter_dir: str | None = setting(None, "LoRA adapter in PEFT's format")
    output_dir: str | None = setting(None, "folder to write; must not exist or be empty")
    dtype: str = setting(
        "auto", "type of the merged weights (auto: the base's own)", choices=DTYPES
    )


@dataclass(frozen=True)
class ExportConfig(Settings, command="export"):
    """Write an adapter as GGUF for llama.cpp, or replay runs into TensorBoard, MLflow or wandb."""

    runs: tuple[str, ...] = setting(
        REQUIRED, "adapter folder (gguf), or run folders (trackers)", positional=True
    )
    to: str = setting("gguf", "format", choices=("gguf", "tensorboard", "mlflow", "wandb"))
    base_model: str = setting(TrainConfig.base_model, f"gguf: {A_MODEL}")
    output: str | None = setting(
        None, "file or folder to write (default: ADAPTER/adapter.gguf, results/TRACKER)"
    )


@dataclass(frozen=True)
class FetchConfig(Settings, command="fetch"):
    """Download or convert a base model and write MANIFEST.json (revision, sizes, SHA-256)."""

    name: str = setting(REQUIRED, "name on the hub, .gguf file, or smollm2-135m", positional=True)
    to: str | None = setting(None, "folder to write a self-contained copy to (default: the cache)")
    revision: str | None = setting(None, "branch, tag or commit on the hub")
    offline: bool = setting(
        False,
        "use what is on disk only, for example to stage a copy with --to on a node's own disk",
    )
    verify: bool = setting(False, "check every file against the checksums it was fetched with")


@dataclass(frozen=True)
class StageConfig(Settings, command="stage"):
    """Copy a fetched model to a node's own disk, links followed, without the network."""

    name: str = setting(REQUIRED, "what was fetched", positional=True)
    to: str = setting(REQUIRED, "folder on the node's own disk", positional=True)
    verify: bool = setting(
        False, "check every copied file against the checksums it was fetched with"
    )


@dataclass(frozen=True)
class ReportConfig(Settings, command="report"):
    """Write RELATORIO.md (Portuguese) and report.html from run folders."""

    runs: tuple[str, ...] = setting(
        REQUIRED,
        "folders of runs and sweeps, and JSON files of bench and sweep, in any order",
        positional=True,
    )
    output_dir: str = setting("report", "folder for RELATORIO.md and report.html")
    language: str = setting("en", "language of report.html", choices=("en", "pt"))
    grid_g_per_kwh: float = setting(
        98.3, "g CO2e per kWh of the electricity used (default: Brazil, 2023)", minimum=0
    )


@dataclass(frozen=True)
class SweepConfig(Settings, command="sweep"):
    """Train every point of a grid or random search once, shared between processes; ends with a
    leaderboard."""

    file: str = setting(REQUIRED, "TOML file with the tables [train] and [search]", positional=True)
    output_dir: str | None = setting(
        None, "folder of the sweep (default: results/sweep-<name of the file>)"
    )
    runs_per_task: int = setting(
        4, "trials that train over one base in one process; fixed when the sweep starts", minimum=1
    )
    no_cuda: bool = setting(False, "stay on the CPU")
    claim_timeout_s: int = setting(
        InferConfig.claim_timeout_s,
        "take over from a process that has been silent for this long",
        minimum=2,
    )
    leave_early: bool = setting(
        False, "exit when no task is left to claim; a later process writes the leaderboard"
    )


@dataclass(frozen=True)
class SubmitConfig(Settings, command="submit"):
    """Submit train, infer, sweep, or the whole pipeline to Slurm; --config names the experiment's
    TOML file."""

    TOP_LEVEL_KEYS = False  # those of the file are the experiment's

    what: str = setting(REQUIRED, "train, infer, sweep or pipeline", positional=True)
    config: str | None = setting(None, "the experiment's TOML file; its [submit] is read here")
    sweep_file: str | None = setting(None, "file of the sweep to submit")
    site: str = setting("generic", "a name in configs/sites/, or the path of such a file")
    device: str = setting("gpu", "which job script to use", choices=("gpu", "cpu"))
    partition: str | None = setting(None, "Slurm partition (default: the site's)")
    account: str | None = setting(None, "Slurm account to charge")
    time: str = setting("4:00:00", "time limit of each job: minutes, H:MM:SS or D-HH:MM:SS")
    nodes: int = setting(1, "nodes of the training job", minimum=1)
    tasks_per_node: int = setting(1, "training processes on each node", minimum=1)
    gpus: int = setting(1, "GPUs per node", minimum=1)
    cpus_per_task: int = setting(8, "cores per process", minimum=1)
    mem: str | None = setting(None, "memory per node, for example 24G (default: the job script's)")
    exclusive: bool = setting(False, "allocate whole nodes, for measurements")
    array: int | None = setting(
        None, "array tasks that share the inference or the sweep (default: one job)", minimum=1
    )
    runs_per_task: int | None = setting(
        None,
        "sweep: trials that train over one base in one process (default: 4, or fewer so that "
        "every array task has some)",
        minimum=1,
    )
    parallel: int | None = setting(
        None, "array tasks that run at the same time (default: all)", minimum=1
    )
    shards: int | None = setting(
        None, "shards of the inference (default: 4 per array task)", minimum=1
    )
    run_dir: str | None = setting(None, "folder of everything (default: results/<what>-<time>)")
    dry_run: bool = setting(False, "print the commands and submit nothing")


@dataclass(frozen=True)
class InitConfig(Settings, command="init"):
    """Write the job scripts, site files, examples and sample texts into a folder: a start without a
    checkout."""

    folder: str = setting(".", "folder to write to", positional=True)


@dataclass(frozen=True)
class CompletionConfig(Settings, command="completion"):
    """Print what completes commands, flags and choices in a shell."""

    shell: str = setting(
        "bash", "name of the shell", choices=("bash", "zsh", "tcsh"), positional=True
    )


@dataclass(frozen=True)
class SchemaConfig(Settings, command="schema"):
    """Print the JSON schema of the TOML files, for editors that complete and check them."""


@dataclass(frozen=True)
class StatusConfig(Settings, command="status"):
    """Show how far a run is, or the jobs of a submission."""

    folder: str = setting(REQUIRED, "run folder of train, infer or submit", positional=True)


@dataclass(frozen=True)
class DoctorConfig(Settings, command="doctor"):
    """Check Python, torch, devices, threads, memory, disk, caches and Slurm before a job starts;
    exit 69 if it would be wasted."""

    base_model: str | None = setting(None, "also look this model up, without the network")
    output_dir: str = setting("results", "folder that the job will write to")
    need_gpu: bool = setting(False, "no usable GPU is a failure")
    no_cuda: bool = setting(False, "do not check GPUs")
    json: bool = setting(False, "print JSON")
