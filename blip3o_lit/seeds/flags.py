"""Every flag of the seeds' scripts and what it is here: the one table behind `command_line.py`.

`command_line.py` translates by it, `docs/migrating.md` prints it, `tests/seeds/test_from_seed.py`
composes every line of it. In an override, `{value}` is what the flag was given; the other words in
braces are worked out from the whole command line and listed in `WORDS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """One flag of one script."""

    script: str
    name: str
    default: str
    """What it was there when left out; `required`, or `off` for a switch."""
    override: str = ""
    """Overrides here, separated by blanks; empty where there is nothing to say."""
    note: str = ""
    takes: bool = True
    """Whether a value follows."""
    values: dict[str, str] = field(default_factory=dict)
    """Overrides by value; without `override`, no other value is allowed."""
    convert: str = ""
    """Overrides of the conversion that comes first."""
    example: str = "1"
    """A value that the flag can have, where the default is none."""


@dataclass(frozen=True)
class Script:
    """One script of the seeds: the command here, and the overrides that it always has."""

    name: str
    command: str
    overrides: str = ""
    note: str = ""


SCRIPTS = {
    script.name: script
    for script in (
        Script(TRAIN_64, "train", "experiment=seed_grid64"),
        Script(TRAIN_PATCH, "train", "experiment=seed_patch"),
        Script(
            EVALUATE,
            "evaluate",
            "solvers=[euler-50]",
            "There the scores were always those of training images; here they are of the held-out "
            "split unless you ask for training images. The posterior mean and the baselines stand "
            "beside the sampler's score.",
        ),
        Script(
            EXTRACT,
            "extract",
            "images={tars} towers=eva8b_clipl14",
            "`--images SRC` before the `--` names other images. The store holds CLS and patches; "
            "training chooses the view, so nothing is extracted twice.",
        ),
        Script(
            EXTRACT_PRODUCTION,
            "extract",
            "images={tars} towers=eva8b_clipl14 store=grid_64",
            "Writes 64 tokens an image: projected by each tower's own head (1280 and 768 "
            "channels), then averaged to 8x8.",
        ),
        Script(LAUNCH, "", note="Flags before the script's name; `accelerate config` is `doctor`."),
        Script(TORCHRUN, "", note="Flags before the script's name."),
    )
}


DATA = "data=tokens data.tokens={tokens}"
SIZES = {
    "tiny": "model.width=384 model.depth=6 model.heads=6 model.kv_heads=6 model.mlp_width=1536",
    "small": "model.width=512 model.depth=8 model.heads=8 model.kv_heads=8 model.mlp_width=2048",
    "base": "model.width=768 model.depth=12 model.heads=12 model.kv_heads=12 model.mlp_width=3072",
    "large": "model.width=1024 model.depth=16 model.heads=16 model.kv_heads=16 "
    "model.mlp_width=4096",
}
PREDICTIONS = {
    "v_prediction": "flow.prediction=velocity",
    "epsilon": "flow.prediction=noise solver.start=0.2",
    "sample": "flow.prediction=sample",
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
BATCH = "batch_size={global_batch} micro_batch_size={micro_batch}"


def _both(name: str, defaults: tuple[str, str], override: str, note: str = "") -> list[Flag]:
    """Return a flag that both training scripts have; defaults of 64 tokens, then of patches."""
    pairs = zip((TRAIN_64, TRAIN_PATCH), defaults, strict=True)
    return [Flag(script, name, default, override, note) for script, default in pairs]


def _switch(name: str, default: str, override: str, note: str = "", script: str = TRAIN_64) -> Flag:
    return Flag(script, name, default, override, note, takes=False)


# Later flags win where two set the same key, so the order is part of the table.
FLAGS = [
    Flag(TRAIN_64, "--embeddings_path", "required", DATA, "a .pkl file or a token store"),
    Flag(TRAIN_PATCH, "--chunked_embeddings_dir", "required", DATA, "pickles or a token store"),
    *_both("--output_dir", ("required", "required"), "hydra.run.dir={value}"),
    Flag(
        TRAIN_PATCH,
        "--training_type",
        "custom",
        note="presets; explicit flags win",
        values=TRAINING_TYPES,
    ),
    Flag(
        TRAIN_PATCH,
        "--training_mode",
        "patch_only",
        note="cls_patch never ran there: its network had 256 positions for 257 tokens",
        values={"patch_only": "experiment=seed_patch", "cls_patch": "experiment=seed_cls_patch"},
    ),
    Flag(TRAIN_PATCH, "--model_size", "base", values=SIZES),
    Flag(TRAIN_64, "--model_dim", "1792", "model.width={value}"),
    Flag(TRAIN_64, "--num_layers", "24", "model.depth={value}"),
    Flag(TRAIN_64, "--num_heads", "28", "model.heads={value} model.kv_heads={value}"),
    Flag(
        TRAIN_64,
        "--num_kv_heads",
        "= heads",
        "model.kv_heads={value}",
        "accepted and ignored there",
        example="28",
    ),
    Flag(TRAIN_64, "--multiple_of", "256", "model.multiple_of={value}", "ignored there"),
    Flag(
        TRAIN_64,
        "--ffn_dim_multiplier",
        "none",
        "model.ffn_dim_multiplier={value}",
        "ignored there; 1.5 is the other official width, 7168",
        example="1.5",
    ),
    _switch("--gradient_checkpointing", "off", "model.activation_checkpointing=true"),
    _switch(
        "--gradient_checkpointing",
        "off",
        "model.activation_checkpointing=true",
        "the last version of that seed had lost it",
        TRAIN_PATCH,
    ),
    *_both("--num_epochs", ("10", "10"), "trainer.max_epochs={value}"),
    *_both(
        "--batch_size",
        ("32", "32"),
        BATCH,
        "here batch_size is global, an optimizer step; micro_batch_size a forward pass",
    ),
    *_both("--gradient_accumulation_steps", ("1", "2"), BATCH),
    Flag(
        TRAIN_64,
        "--eval_batch_size",
        "64",
        note="nothing to set: validation runs in micro-batches, its scores don't depend on them",
    ),
    *_both("--learning_rate", ("1e-4", "1e-4"), "optimizer.lr={value}"),
    *_both("--weight_decay", ("0.01", "0.01"), "optimizer.weight_decay={value}", "matrices only"),
    *_both("--warmup_steps", ("1000", "200"), "optimizer.warmup_steps={value}"),
    Flag(
        TRAIN_PATCH,
        "--lr_scheduler_type",
        "linear",
        "its README said cosine, its trainer ran linear",
        values={name: f"optimizer.schedule={name}" for name in ("linear", "cosine", "constant")},
    ),
    Flag(TRAIN_64, "--sigma_min", "1e-4", "flow.sigma_min={value}"),
    Flag(TRAIN_64, "--sigma_max", "1.0", "flow.sigma_max={value}"),
    Flag(
        TRAIN_64,
        "--prediction_type",
        "v_prediction",
        note="epsilon was sampled as if it were a velocity there",
        values=PREDICTIONS,
    ),
    Flag(
        TRAIN_64,
        "--schedule_type",
        "linear",
        note="the target there was not the derivative of the path; here it is",
        values={"linear": "flow.path=seed_linear", "cosine": "flow.path=seed_cosine"},
    ),
    Flag(TRAIN_64, "--regularization_weight", "0.0", "flow.regularization_weight={value}"),
    Flag(
        TRAIN_PATCH, "--velocity_scale", "0.1", "flow.velocity_scale={value}", "sampling undoes it"
    ),
    Flag(TRAIN_PATCH, "--output_scale", "0.1", "flow.output_scale={value}", "a fixed factor here"),
    Flag(
        TRAIN_PATCH,
        "--target_norm_scale",
        "1.0",
        "flow.target_norm_scale={value}",
        "undone in sampling",
    ),
    _switch(
        "--normalize_embeddings",
        "off",
        "flow.normalise=l2",
        "unit-norm targets can't be undone: outputs are unit-norm, and the metrics say so",
    ),
    Flag(
        TRAIN_64,
        "--eval_split",
        "0.1",
        convert="validation_fraction={value} split_rule=seed",
        note="the seeds' own shuffle; without the flag, a split by content with the same share",
    ),
    Flag(TRAIN_64, "--subset_size", "none", "data.subset={value}", example="1000"),
    Flag(
        TRAIN_PATCH,
        "--max_training_shards",
        "1",
        "data.max_shards={value}",
        "shards of the store, 256 images each; one of the seeds' had about 2,600",
    ),
    Flag(
        TRAIN_64,
        "--num_workers",
        "4",
        note="reader threads; 0 workers become one thread",
        override="data.threads={value}",
        values={"0": "data.threads=1"},
    ),
    _switch("--fp16", "off", "precision={half}"),
    _switch("--fp16", "on", "precision={half}", "could not be switched off there", TRAIN_PATCH),
    _switch("--bf16", "off", "precision=bf16"),
    _switch("--compile_model", "off", "model.compile=true"),
    Flag(
        TRAIN_64,
        "--device",
        "auto",
        values={name: f"trainer.accelerator={name}" for name in ("auto", "cuda", "cpu", "mps")},
    ),
    *_both("--logging_steps", ("100", "10"), "trainer.log_every={value}"),
    *_both("--save_steps", ("1000", "200"), "checkpoint.every={value}"),
    Flag(TRAIN_64, "--eval_steps", "1000", "evaluation.every={value}"),
    Flag(TRAIN_PATCH, "--eval_every_n_steps", "100", "evaluation.every={value}"),
    Flag(TRAIN_PATCH, "--eval_num_samples", "1000", "evaluation.images={value}", "held-out images"),
    Flag(TRAIN_PATCH, "--eval_inference_steps", "50", "solver=euler solver.steps={value}"),
    *_both("--wandb_project", ("blip3o-dit", "none"), "logger=wandb logger.wandb_project={value}"),
    *_both("--wandb_run_name", ("none", "none"), "logger=wandb logger.wandb_name={value}"),
    _switch("--no_wandb", "off", "logger=csv", "W&B is off here unless asked for"),
    _switch("--use_wandb", "off", "logger=wandb", script=TRAIN_PATCH),
    *(
        Flag(TRAIN_PATCH, f"--wandb_{name}", "none", note=f"set the variable WANDB_{name.upper()}")
        for name in ("entity", "tags", "notes")
    ),
    Flag(
        TRAIN_64,
        "--resume_from_checkpoint",
        "none",
        "resume={resume}",
        "the seeds' own checkpoints are of other, broken networks and can't be loaded",
        example="out/checkpoint-5000",
    ),
    _switch(
        "--debug",
        "off",
        "data.subset=1000 trainer.max_epochs=2 trainer.log_every=10 checkpoint.every=100 "
        "evaluation.every=100 logger=csv",
    ),
    _switch("--debug", "off", TRAINING_TYPES["debug"], "as --training_type debug", TRAIN_PATCH),
    _switch("--dry_run", "off", "dry_run=true", "prints the plan; no weights are made"),
    Flag(EVALUATE, "--model_path", "required", "ckpt={value}", "a run directory or checkpoint"),
    Flag(EVALUATE, "--chunked_embeddings_dir", "required", "data.tokens={tokens}"),
    Flag(EVALUATE, "--output_dir", "required", "out={value}"),
    Flag(EVALUATE, "--num_samples", "1000", "images={value}"),
    Flag(EVALUATE, "--batch_size", "8", "batch_size={value}"),
    Flag(EVALUATE, "--num_inference_steps", "50", "solvers=[euler-{value}]"),
    Flag(
        EVALUATE,
        "--training_mode",
        "auto",
        note="nothing to set: the checkpoint knows its view of the tokens",
        values=dict.fromkeys(("auto", "cls_patch", "patch_only"), ""),
    ),
    _switch(
        "--same_data_eval",
        "on",
        "same_data=true",
        "an unused switch there; here it scores training images, and every number says so",
        EVALUATE,
    ),
    _switch(
        "--normalize_embeddings", "on", "", "nothing to set: a cosine ignores lengths", EVALUATE
    ),
    Flag(
        EVALUATE,
        "--device",
        "auto",
        values={name: f"device={name}" for name in ("auto", "cuda", "cpu", "mps")},
    ),
    _switch("--save_detailed_results", "off", "", "evaluation.json always has them", EVALUATE),
    _switch("--save_plots", "off", "", "report.html always has them", EVALUATE),
    Flag(
        EVALUATE,
        "--torch_dtype",
        "float32",
        note="nothing to set: the run's own precision",
        values=dict.fromkeys(("float32", "float16", "bfloat16"), ""),
    ),
    *(
        flag
        for script in (EXTRACT, EXTRACT_PRODUCTION)
        for flag in (
            _switch(
                "--include_cls", "off", "", "nothing to set: train with --training_mode", script
            ),
            Flag(script, "--chunked_embeddings_dir", "none", "out={value}", example="a"),
            Flag(script, "--max_shards", "none", "images={tars}", "with --images, name fewer tars"),
            Flag(script, "--batch_size", "16", "extract.batch_size={value}"),
        )
    ),
    Flag(
        LAUNCH,
        "--num_processes",
        "all GPUs",
        "strategy=ddp trainer.devices={value}",
        "of one machine; batch_size, global here, grows with it",
        example="2",
    ),
    Flag(LAUNCH, "--num_machines", "1", "trainer.num_nodes={value}"),
    Flag(
        LAUNCH,
        "--mixed_precision",
        "no",
        values={
            "no": "precision=fp32",
            "fp16": "precision={half}",
            "bf16": "precision=bf16",
        },
    ),
    _switch("--multi_gpu", "off", "strategy=ddp", script=LAUNCH),
    _switch("--cpu", "off", "trainer.accelerator=cpu", script=LAUNCH),
    Flag(LAUNCH, "--main_process_port", "29500", note="set the variable MASTER_PORT"),
    Flag(
        TORCHRUN,
        "--nproc_per_node",
        "1",
        "strategy=ddp trainer.devices={value}",
        "batch_size, global here, grows with it",
        example="2",
    ),
    Flag(TORCHRUN, "--nnodes", "1", "trainer.num_nodes={value}"),
    _switch("--standalone", "off", "", "nothing to set", TORCHRUN),
    Flag(TORCHRUN, "--master_port", "29500", note="set the variable MASTER_PORT"),
]


def table() -> str:
    """Return the tables of docs/migrating.md."""
    lines = ["Words in braces: `{value}` is what the flag was given;"]
    lines += [f"`{{{word}}}` {meaning};" for word, meaning in WORDS.items()]
    lines[-1] = lines[-1][:-1] + "."
    for script in SCRIPTS.values():
        command = f"`python -m blip3o_lit.{script.command} {script.overrides}`"
        lines += ["", f"### {script.name}", ""]
        lines += [line for line in (command * bool(script.command), script.note) if line]
        lines += ["", "| flag | default there | here | note |", "|---|---|---|---|"]
        for flag in (flag for flag in FLAGS if flag.script == script.name):
            parts = [flag.override] if flag.override else []
            parts += [f"{value}: {words or '-'}" for value, words in flag.values.items()]
            parts += [f"convert {flag.convert}"] if flag.convert else []
            here = "<br>".join(f"`{part}`" for part in parts) or "-"
            lines.append(f"| `{flag.name}` | {flag.default} | {here} | {flag.note} |")
    return "\n".join(lines) + "\n"
