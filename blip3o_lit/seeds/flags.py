"""Every flag of the seeds' scripts and what it is here: the tables behind `command_line.py`.

docs/migrating.md prints them. In an override, a key without `=` takes the flag's value, words in
braces are those of `WORDS`, and `convert.` stands before options of the conversion.
"""

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, nearest

TRAIN_64 = "train_blip3o_dit.py"
TRAIN_PATCH = "train_blip3o_enhanced.py"
EVALUATE = "eval_blip3o_patch_similarity.py"
EXTRACT = "extract_embeddings_g.py"
EXTRACT_PRODUCTION = "extract_embeddings_production.py"
LAUNCH = "accelerate launch"
TORCHRUN = "torchrun"

WORDS = {
    "tokens": "the token store: the pickles, converted once beside themselves",
    "global_batch": "batch_size x gradient_accumulation_steps x processes",
    "micro_batch": "batch_size",
    "half": "fp16 on a GPU; without one bf16, and the command says so",
    "resume": "the run directory that the checkpoint lies in, whose newest sound checkpoint counts",
    "tars": "the first {value} tars of the seeds' data set on the Hugging Face Hub",
}


@dataclass(frozen=True)
class Flag:
    """One flag: its default there, its overrides here (or those per allowed value), and a note."""

    name: str
    default: str
    here: str | dict[str, str] = ""
    note: str = ""

    @property
    def is_switch(self) -> bool:
        return self.default in ("on", "off")

    def overrides(self, value: str) -> list[str]:
        """Return the overrides of a value, as templates KEY=TEXT."""
        if isinstance(self.here, str):
            here = self.here
        else:
            here = self.here.get(value, self.here.get("{value}"))
            if here is None:
                guess = nearest(value, self.here)
                hint = f"did you mean {guess}? " if guess else ""
                raise UserError(f"{self.name} {value}: {hint}choose from {', '.join(self.here)}")
        return [word if "=" in word else word + "={value}" for word in here.split()]


@dataclass(frozen=True)
class Script:
    """One script or launcher: the command here (launchers have none) and what it always has."""

    flags: list[Flag]
    command: str = ""
    overrides: str = ""
    note: str = ""


def _choices(key: str, *values: str) -> dict[str, str]:
    return {value: f"{key}={value}" for value in values}


DATA = "data=tokens data.tokens={tokens}"
BATCH = "batch_size={global_batch} micro_batch_size={micro_batch}"
CHECKPOINTING = "model.activation_checkpointing=true"
DEVICES = ("auto", "cuda", "cpu", "mps")
SIZES = {
    "tiny": "model.width=384 model.depth=6 model.heads=6 model.kv_heads=6 model.mlp_width=1536",
    "small": "model.width=512 model.depth=8 model.heads=8 model.kv_heads=8 model.mlp_width=2048",
    "base": "model.width=768 model.depth=12 model.heads=12 model.kv_heads=12 model.mlp_width=3072",
    "large": "model.width=1024 model.depth=16 model.heads=16 model.kv_heads=16 "
    "model.mlp_width=4096",
}
TRAINING_TYPES = {
    "custom": "",
    "overfitting": "trainer.max_epochs=15 batch_size=16 micro_batch_size=16 optimizer.lr=5e-5 "
    "optimizer.weight_decay=0 trainer.log_every=5",
    "production": "trainer.max_epochs=10 batch_size=64 micro_batch_size=32 optimizer.lr=1e-4 "
    "optimizer.weight_decay=0.01 model.activation_checkpointing=true checkpoint.every=500",
    "debug": SIZES["tiny"] + " trainer.max_epochs=3 batch_size=4 micro_batch_size=4 "
    "optimizer.weight_decay=0 optimizer.warmup_steps=10 trainer.log_every=1 checkpoint.every=10",
}
TRAINING_MODES = {"patch_only": "experiment=seed_patch", "cls_patch": "experiment=seed_cls_patch"}
PREDICTIONS = {
    "v_prediction": "flow.prediction=velocity",
    "epsilon": "flow.prediction=noise solver.start=0.2",
    "sample": "flow.prediction=sample",
}
SCHEDULES = _choices("optimizer.schedule", "linear", "cosine", "constant")
PATHS = {"linear": "flow.path=seed_linear", "cosine": "flow.path=seed_cosine"}
SPLIT = "convert.validation_fraction convert.split_rule=seed"
THREADS = {"0": "data.threads=1", "{value}": "data.threads"}
ACCELERATORS = _choices("trainer.accelerator", *DEVICES)
DEBUG = (
    "data.subset=1000 trainer.max_epochs=2 trainer.log_every=10 checkpoint.every=100 "
    "evaluation.every=100 logger=csv"
)
VIEWS = {"auto": "", "cls_patch": "", "patch_only": ""}
DTYPES = {"float32": "", "float16": "", "bfloat16": ""}
MIXED_PRECISIONS = {"no": "precision=fp32", "fp16": "precision={half}", "bf16": "precision=bf16"}

# Flag, default in the script for 64 tokens and in that for patches ("": it has no such flag),
# overrides here, note. Later rows win where two set the same key.
TRAINING = [
    ("--embeddings_path", "required", "", DATA, "a .pkl file or a token store"),
    ("--chunked_embeddings_dir", "", "required", DATA, "pickles or a token store"),
    ("--output_dir", "required", "required", "hydra.run.dir", ""),
    ("--training_type", "", "custom", TRAINING_TYPES, "presets; explicit flags win"),
    ("--training_mode", "", "patch_only", TRAINING_MODES, "cls_patch never ran there"),
    ("--model_size", "", "base", SIZES, ""),
    ("--model_dim", "1792", "", "model.width", ""),
    ("--num_layers", "24", "", "model.depth", ""),
    ("--num_heads", "28", "", "model.heads model.kv_heads", ""),
    ("--num_kv_heads", "= heads", "", "model.kv_heads", "accepted and ignored there"),
    ("--multiple_of", "256", "", "model.multiple_of", "ignored there"),
    ("--ffn_dim_multiplier", "none", "", "model.ffn_dim_multiplier", "ignored there; 1.5: 7168"),
    ("--gradient_checkpointing", "off", "off", CHECKPOINTING, ""),
    ("--num_epochs", "10", "10", "trainer.max_epochs", ""),
    ("--batch_size", "32", "32", BATCH, "batch_size is global here, micro_batch_size is one pass"),
    ("--gradient_accumulation_steps", "1", "2", BATCH, ""),
    ("--eval_batch_size", "64", "", "", "nothing to set: validation runs in micro-batches"),
    ("--learning_rate", "1e-4", "1e-4", "optimizer.lr", ""),
    ("--weight_decay", "0.01", "0.01", "optimizer.weight_decay", "matrices only"),
    ("--warmup_steps", "1000", "200", "optimizer.warmup_steps", ""),
    ("--lr_scheduler_type", "", "linear", SCHEDULES, "its README said cosine"),
    ("--sigma_min", "1e-4", "", "flow.sigma_min", ""),
    ("--sigma_max", "1.0", "", "flow.sigma_max", ""),
    ("--prediction_type", "v_prediction", "", PREDICTIONS, "epsilon was sampled as a velocity"),
    ("--schedule_type", "linear", "", PATHS, "the target there was not the path's derivative"),
    ("--regularization_weight", "0.0", "", "flow.regularization_weight", ""),
    ("--velocity_scale", "", "0.1", "flow.velocity_scale", "sampling undoes it"),
    ("--output_scale", "", "0.1", "flow.output_scale", "a fixed factor here"),
    ("--target_norm_scale", "", "1.0", "flow.target_norm_scale", "undone in sampling"),
    ("--normalize_embeddings", "off", "", "flow.normalise=l2", "outputs are unit-norm then"),
    ("--eval_split", "0.1", "", SPLIT, "the seeds' shuffle; without it, a split by content"),
    ("--subset_size", "none", "", "data.subset", ""),
    ("--max_training_shards", "", "1", "data.max_shards", "shards of the store, 256 images each"),
    ("--num_workers", "4", "", THREADS, "reader threads; 0 workers become one thread"),
    ("--fp16", "off", "on", "precision={half}", "the patch seed could not switch it off"),
    ("--bf16", "off", "", "precision=bf16", ""),
    ("--compile_model", "off", "", "model.compile=true", ""),
    ("--device", "auto", "", ACCELERATORS, ""),
    ("--logging_steps", "100", "10", "trainer.log_every", ""),
    ("--save_steps", "1000", "200", "checkpoint.every", ""),
    ("--eval_steps", "1000", "", "evaluation.every", ""),
    ("--eval_every_n_steps", "", "100", "evaluation.every", ""),
    ("--eval_num_samples", "", "1000", "evaluation.images", "held-out images"),
    ("--eval_inference_steps", "", "50", "solver=euler solver.steps", ""),
    ("--wandb_project", "blip3o-dit", "none", "logger=wandb logger.wandb_project", ""),
    ("--wandb_run_name", "none", "none", "logger=wandb logger.wandb_name", ""),
    ("--no_wandb", "off", "", "logger=csv", "W&B is off here unless asked for"),
    ("--use_wandb", "", "off", "logger=wandb", ""),
    ("--wandb_entity", "", "none", "", "set the variable WANDB_ENTITY"),
    ("--wandb_tags", "", "none", "", "set the variable WANDB_TAGS"),
    ("--wandb_notes", "", "none", "", "set the variable WANDB_NOTES"),
    ("--resume_from_checkpoint", "none", "", "resume={resume}", "a run here; not the seeds' files"),
    ("--debug", "off", "", DEBUG, ""),
    ("--debug", "", "off", TRAINING_TYPES["debug"], "as --training_type debug"),
    ("--dry_run", "off", "", "dry_run=true", "prints the plan; no weights are made"),
]
EVALUATION = [
    Flag("--model_path", "required", "ckpt", "a run directory or checkpoint"),
    Flag("--chunked_embeddings_dir", "required", "data.tokens={tokens}"),
    Flag("--output_dir", "required", "out"),
    Flag("--num_samples", "1000", "images"),
    Flag("--batch_size", "8", "batch_size"),
    Flag("--num_inference_steps", "50", "solvers=[euler-{value}]"),
    Flag("--training_mode", "auto", VIEWS, "nothing to set: the checkpoint knows its view"),
    Flag("--same_data_eval", "on", "same_data=true", "unused there; scores training images here"),
    Flag("--normalize_embeddings", "on", "", "nothing to set: a cosine ignores lengths"),
    Flag("--device", "auto", _choices("device", *DEVICES)),
    Flag("--save_detailed_results", "off", "", "evaluation.json always has them"),
    Flag("--save_plots", "off", "", "report.html always has them"),
    Flag("--torch_dtype", "float32", DTYPES, "nothing to set: the run's own precision"),
]
EXTRACTION = [
    Flag("--include_cls", "off", "", "nothing to set: train with --training_mode"),
    Flag("--chunked_embeddings_dir", "none", "out"),
    Flag("--max_shards", "none", "images={tars}", "with --images, name fewer tars"),
    Flag("--batch_size", "16", "extract.batch_size"),
]
LAUNCHER = [
    Flag("--num_processes", "all GPUs", "strategy=ddp trainer.devices", "of one machine"),
    Flag("--num_machines", "1", "trainer.num_nodes"),
    Flag("--mixed_precision", "no", MIXED_PRECISIONS),
    Flag("--multi_gpu", "off", "strategy=ddp"),
    Flag("--cpu", "off", "trainer.accelerator=cpu"),
    Flag("--main_process_port", "29500", "", "set the variable MASTER_PORT"),
]
TORCH_LAUNCHER = [
    Flag("--nproc_per_node", "1", "strategy=ddp trainer.devices"),
    Flag("--nnodes", "1", "trainer.num_nodes"),
    Flag("--standalone", "off", "", "nothing to set"),
    Flag("--master_port", "29500", "", "set the variable MASTER_PORT"),
]
FLAGS_64 = [Flag(name, there, here, note) for name, there, _, here, note in TRAINING if there]
FLAGS_PATCH = [Flag(name, there, here, note) for name, _, there, here, note in TRAINING if there]
LAUNCHER_NOTE = "Flags before the script's name; batch_size, global here, grows with the processes."

SCRIPTS = {
    TRAIN_64: Script(FLAGS_64, "train", "experiment=seed_grid64"),
    TRAIN_PATCH: Script(FLAGS_PATCH, "train", "experiment=seed_patch"),
    EVALUATE: Script(
        EVALUATION,
        "evaluate",
        "solvers=[euler-50]",
        "There the scores were always those of training images; here they are of the held-out "
        "split unless you ask for training images. The posterior mean and the baselines stand "
        "beside the sampler's score.",
    ),
    EXTRACT: Script(
        EXTRACTION,
        "extract",
        "images={tars} towers=eva8b_clipl14",
        "`--images SRC` before the `--` names other images. The store holds CLS and patches; "
        "training chooses the view, so nothing is extracted twice.",
    ),
    EXTRACT_PRODUCTION: Script(
        EXTRACTION,
        "extract",
        "images={tars} towers=eva8b_clipl14 store=grid_64",
        "Writes 64 tokens per image: projected by each tower's own head (1280 and 768 "
        "channels), then averaged to 8x8.",
    ),
    LAUNCH: Script(LAUNCHER, note=f"{LAUNCHER_NOTE} `accelerate config` is `doctor`."),
    TORCHRUN: Script(TORCH_LAUNCHER, note=LAUNCHER_NOTE),
}


def table() -> str:
    """Return the tables of docs/migrating.md."""
    lines = ["Words in braces: `{value}` is what the flag was given;"]
    lines += [f"`{{{word}}}` {meaning};" for word, meaning in WORDS.items()]
    lines[-1] = lines[-1][:-1] + "."
    for name, script in SCRIPTS.items():
        lines += ["", f"### {name}", ""]
        if script.command:
            lines.append(f"`python -m blip3o_lit.{script.command} {script.overrides}`")
        if script.note:
            lines.append(script.note)
        lines += ["", "| flag | default there | here | note |", "|---|---|---|---|"]
        for flag in script.flags:
            lines.append(f"| `{flag.name}` | {flag.default} | {_cell(flag)} | {flag.note} |")
    return "\n".join(lines) + "\n"


def _cell(flag: Flag) -> str:
    values = flag.here if isinstance(flag.here, dict) else {"": flag.here}
    parts = []
    for value in values:
        overrides = " ".join(flag.overrides(value)) or "-"
        parts.append(f"`{value}: {overrides}`" if value else f"`{overrides}`")
    return "-" if parts == ["`-`"] else "<br>".join(parts)
