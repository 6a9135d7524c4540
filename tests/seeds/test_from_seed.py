"""Every command line that the seeds document is translated, composes, and does its work here."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from seed_pickles import embeddings

from blip3o_lit.cli.schema import conf_dir, typed
from blip3o_lit.config.commands import DoctorConfig
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.seeds import command_line, flags
from blip3o_lit.seeds.command_line import Step, translate

SCHEMAS = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "extract": ExtractConfig,
    "convert": ConvertConfig,
    "doctor": DoctorConfig,
}
for _name, _schema in SCHEMAS.items():
    ConfigStore.instance().store(name=f"{_name}_schema", node=_schema)
OmegaConf.register_new_resolver("run_stamp", lambda: "test", replace=True)

PKL = "path/to/blip3o_grid_embeddings.pkl"
PATCHES, CLS = "./embeddings/patch_only_256_tokens", "./embeddings/cls_patch_257_tokens"
SET_UP = """
git clone repository
cd eva-clip-flow-matching/eva-clip-v3
conda create -n blip3o python=3.11 -y
conda activate blip3o
pip install torch torchvision transformers datasets
pip install accelerate wandb tqdm pillow safetensors
pip install webdataset opencv-python scikit-learn
pip install matplotlib seaborn plotly pandas scipy
pip install -r requirements.txt
"""
INSTALLED = 'python -c "from src.modules.models.blip3o_dit import BLIP3oDiTModel; print(1)"'
DATASET = f"""python -c "from src.modules.datasets.blip3o_dataset import test_blip3o_dataset;
test_blip3o_dataset('{PKL}')" """
EXTRACT = f"""python src/modules/extract_embeddings_g.py \\
    --chunked_embeddings_dir "{PATCHES}" """
EXTRACT_CLS = f"""python src/modules/extract_embeddings_g.py \\
    --include_cls \\
    --chunked_embeddings_dir "{CLS}" """
EXTRACT_64 = "python extract_embeddings_production.py"
BASIC = f"""python train_blip3o_enhanced.py \\
    --chunked_embeddings_dir "{PATCHES}" \\
    --output_dir "./checkpoints/patch_only_training" \\
    --training_mode "patch_only" \\
    --num_epochs 10 \\
    --batch_size 4"""
CLS_PATCH = f"""python train_blip3o_enhanced.py \\
    --chunked_embeddings_dir "{CLS}" \\
    --output_dir "./checkpoints/cls_patch_training" \\
    --training_mode "cls_patch" \\
    --num_epochs 10 \\
    --batch_size 4"""
ADVANCED = f"""python train_blip3o_enhanced.py \\
    --chunked_embeddings_dir "{PATCHES}" \\
    --output_dir "./checkpoints/advanced_training" \\
    --training_mode "patch_only" \\
    --model_size "base" \\
    --num_epochs 15 \\
    --batch_size 8 \\
    --learning_rate 1e-4 \\
    --velocity_scale 0.1 \\
    --output_scale 0.1 \\
    --fp16 \\
    --gradient_checkpointing"""
EVALUATE = f"""python eval_blip3o_patch_similarity.py \\
    --model_path "./checkpoints/patch_only_training" \\
    --chunked_embeddings_dir "{PATCHES}" \\
    --output_dir "./evaluation_results" \\
    --num_samples 1000 \\
    --same_data_eval \\
    --normalize_embeddings"""
QUICK = f"""python train_blip3o_dit.py \\
  --embeddings_path {PKL} \\
  --output_dir ./checkpoints/blip3o-dit \\
  --num_epochs 10 \\
  --batch_size 32 \\
  --learning_rate 1e-4"""
FULL = f"""python train_blip3o_dit.py \\
  --embeddings_path {PKL} \\
  --output_dir ./checkpoints/blip3o-dit-large \\
  --model_dim 1792 --num_layers 24 --num_heads 28 --gradient_checkpointing \\
  --num_epochs 20 --batch_size 16 --eval_batch_size 32 --gradient_accumulation_steps 4 \\
  --learning_rate 5e-5 --weight_decay 0.01 --warmup_steps 2000 \\
  --sigma_min 1e-4 --sigma_max 1.0 --prediction_type v_prediction --regularization_weight 0.0 \\
  --eval_split 0.1 --normalize_embeddings --num_workers 4 \\
  --fp16 --logging_steps 100 --save_steps 1000 --eval_steps 1000 \\
  --wandb_project blip3o-experiments --wandb_run_name large-model-v1"""
DEBUG = f"""python train_blip3o_dit.py \\
  --embeddings_path {PKL} \\
  --output_dir ./debug \\
  --debug"""
DRY_RUN = DEBUG + " \\\n  --dry_run  # the setup alone"
RESUME = f"""python train_blip3o_dit.py \\
  --embeddings_path {PKL} \\
  --output_dir ./checkpoints/blip3o-dit \\
  --resume_from_checkpoint ./checkpoints/blip3o-dit/checkpoint-5000"""
CONFIGURE = "accelerate config"
DISTRIBUTED = f"""accelerate launch train_blip3o_dit.py \\
  --embeddings_path {PKL} \\
  --output_dir ./checkpoints/blip3o-dit-distributed \\
  --batch_size 16 \\
  --gradient_accumulation_steps 2"""
TORCHRUN = DISTRIBUTED.replace("accelerate launch", "torchrun --nproc_per_node 2")
TRAINING = {
    "BASIC": BASIC,
    "CLS_PATCH": CLS_PATCH,
    "ADVANCED": ADVANCED,
    "QUICK": QUICK,
    "FULL": FULL,
    "DEBUG": DEBUG,
    "DRY_RUN": DRY_RUN,
    "RESUME": RESUME,
    "DISTRIBUTED": DISTRIBUTED,
    "TORCHRUN": TORCHRUN,
}
LINES = (
    *filter(None, SET_UP.splitlines()),
    *(
        INSTALLED,
        DATASET,
        EXTRACT,
        EXTRACT_CLS,
        EXTRACT_64,
        EVALUATE,
        CONFIGURE,
        *TRAINING.values(),
    ),
)


def words(line: str) -> list[str]:
    """Return what a shell makes of a line."""
    return shlex.split(line.replace("\\\n", " "), comments=True)


def config_of(step: Step) -> Any:
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return typed(compose(step.command, overrides=step.words()), SCHEMAS[step.command])


def steps_of(line: str) -> list[Step]:
    return translate(words(line))


def run_here(step: Step) -> int:
    """Run a step in this process, as its own command line would."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [step.command, *step.words()])
        try:
            importlib.import_module(f"blip3o_lit.{step.command}").main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def go(line: str, *before: str) -> int:
    return command_line.main([*before, "--", *words(line)], run_here)


def write_64(file: Path, widths: tuple[int, int] = (1280, 768)) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(embeddings(20, 64, widths=widths), protocol=4))


def write_chunks(folder: Path, tokens: int) -> None:
    folder.mkdir(parents=True)
    mode = "cls_patch" if tokens == 257 else "patch_only"
    for number in range(2):
        shard = pickle.dumps(embeddings(8, tokens, number, (48, 24)), protocol=5)
        (folder / f"embeddings_shard_{number:05d}_{mode}.pkl").write_bytes(shard)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """A working directory with files in the seeds' own formats; the tests share what they make."""
    os.environ["BLIP3O_HOME"] = str(shared_home)
    folder = tmp_path_factory.mktemp("desk")
    write_64(folder / PKL)
    write_chunks(folder / PATCHES, 256)
    write_chunks(folder / CLS, 257)
    return folder


@pytest.fixture
def here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(desk)
    return desk


@pytest.mark.parametrize("line", LINES, ids=lambda line: " ".join(words(line)[:4])[:60])
def test_every_documented_line_composes(
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    steps = steps_of(line)
    assert steps or capsys.readouterr().out == "make setup\n"
    for step in steps:
        assert isinstance(config_of(step), SCHEMAS[step.command])


def test_the_full_line_says_here_what_it_said_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert, train = map(config_of, steps_of(FULL))
    assert (convert.validation_fraction, convert.split_rule) == (0.1, "seed")
    assert (convert.source, convert.out) == (PKL, train.data.tokens)
    assert (train.model.architecture, train.model.mlp_width) == ("nextdit", 4864)
    assert (train.model.width, train.model.depth, train.model.heads) == (1792, 24, 28)
    assert train.model.activation_checkpointing
    assert (train.batch_size, train.micro_batch_size) == (64, 16)
    assert (train.optimizer.lr, train.optimizer.warmup_steps) == (5e-5, 2000)
    assert (train.flow.path, train.flow.sigma_min, train.flow.sigma_max) == ("seed_linear", 1e-4, 1)
    assert (train.flow.prediction, train.flow.normalise) == ("velocity", "l2")
    assert (train.flow.time, train.flow.time_zero_share, train.data.scale) == ("uniform", 0, "raw")
    assert (train.mode.name, train.mode.projected, train.data.threads) == ("grid_64", True, 4)
    assert (train.trainer.max_epochs, train.trainer.log_every) == (20, 100)
    assert (train.checkpoint.every, train.evaluation.every) == (1000, 1000)
    assert (train.logger.wandb, train.logger.wandb_project) == (True, "blip3o-experiments")
    assert train.precision.name == ("fp16" if torch.cuda.is_available() else "bf16")


def test_the_patch_presets_are_the_seeds_network() -> None:
    convert, train = map(config_of, steps_of(ADVANCED))
    model, flow = train.model, train.flow
    assert (model.width, model.depth, model.heads, model.kv_heads) == (768, 12, 12, 12)
    assert (model.mlp, model.mlp_width, model.time, model.dropout) == ("gelu", 3072, "tokens", 0.1)
    assert (model.conditioning, flow.prediction) == ("cross", "velocity")
    assert (flow.velocity_scale, flow.output_scale, flow.path) == (0.1, 0.1, "linear")
    assert (train.batch_size, train.micro_batch_size) == (16, 8)
    assert (convert.source, f"./{train.data.tokens}") == (PATCHES, f"{PATCHES}/tokens")


def test_processes_make_the_global_batch() -> None:
    train = config_of(steps_of(TORCHRUN)[-1])
    assert (train.batch_size, train.micro_batch_size) == (16 * 2 * 2, 16)
    assert (train.strategy.name, train.trainer.devices) == ("ddp", "2")


EXAMPLES = {
    "--num_kv_heads": "28",
    "--ffn_dim_multiplier": "1.5",
    "--resume_from_checkpoint": "out/checkpoint-5000",
}
"""Values of flags that can't be 1, where the default is none."""


def values_of(flag: flags.Flag) -> list[str]:
    if flag.is_switch:
        return ["true"]
    if isinstance(flag.here, dict):
        return [value.replace("{value}", "4") for value in flag.here]
    number = re.fullmatch(r"[\d.]+(e-\d+)?", flag.default)
    return [flag.default if number else EXAMPLES.get(flag.name, "1")]


def lines_of(script: str) -> list[list[tuple[flags.Flag, str]]]:
    """Return few lines that give each flag of a script each of its values.

    No two flags of a line set the same key, so that each override is composed.
    """
    lines: list[list[tuple[flags.Flag, str]]] = []
    taken: list[set[str]] = []
    for flag in flags.SCRIPTS[script].flags:
        for value in values_of(flag):
            keys = (word.split("=")[0] for word in flag.overrides(value))
            wants = {flag.name, *keys}
            place = next((i for i, used in enumerate(taken) if not used & wants), len(lines))
            if place == len(lines):
                lines.append([])
                taken.append(set())
            lines[place].append((flag, value))
            taken[place] |= wants
    return lines


@pytest.mark.parametrize("script", flags.SCRIPTS)
def test_every_flag_of_the_table_composes(script: str) -> None:
    launched = script in (flags.LAUNCH, flags.TORCHRUN)
    main = flags.TRAIN_64 if launched else script
    needed = [f.name for f in flags.SCRIPTS[main].flags if f.default == "required"]
    for pairs in lines_of(script):
        given = [w for flag, value in pairs for w in (flag.name, value)[: 2 - flag.is_switch]]
        required = [w for name in needed if name not in given for w in (name, "somewhere")]
        line = ["python", script, *required, *given]
        if launched:
            line = [*script.split(), *given, main, *required]
        steps = translate(line)
        assert all(isinstance(config_of(step), SCHEMAS[step.command]) for step in steps)
        keys = {*steps[-1].overrides, *(f"convert.{key}" for key in steps[0].overrides)}
        for flag, value in pairs:
            for override in flag.overrides(value):
                assert override.split("=")[0] in keys, f"{flag.name} lost {override}"


def test_the_page_holds_the_table() -> None:
    page = (ROOT / "docs" / "migrating.md").read_text("utf-8")
    assert flags.table() in page, "paste the output of scripts/from_seed.py --table"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("python train_blip3o_dit.py --embedings_path x", "did you mean --embeddings_path"),
        ("python train_blip3o_dt.py", "did you mean train_blip3o_dit.py"),
        ("python train_blip3o_dit.py --output_dir x", "needs --embeddings_path"),
        (
            "python train_blip3o_dit.py --batch_size",
            "--batch_size of train_blip3o_dit.py: expected one argument",
        ),
        (QUICK + " --prediction_type epsilom", "did you mean epsilon"),
        (QUICK + " --batch_size 0", "above 0"),
        ("python -c 'print(1)'", "documented checks"),
        ("accelerate launch", "no script"),
    ],
)
def test_mistakes_are_one_line_with_the_right_word(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go(line, "--print") == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


def test_values_that_hydra_would_misread_are_quoted() -> None:
    line = QUICK.replace(PKL, "'a b/{x},(1)=it'\"'\"'s.pkl'")
    convert, train = map(config_of, steps_of(line))
    assert convert.source == "a b/{x},(1)=it's.pkl"
    assert train.data.tokens == "a b/{x},(1)=it's/tokens"


def test_the_script_itself_converts_and_checks(here: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts" / "from_seed.py"), "--", *words(DATASET)]
    done = subprocess.run(script, cwd=here, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (here / "path/to/blip3o_grid_embeddings/tokens/index.json").is_file()
    assert "blip3o_lit.doctor" in done.stdout


# RESUME needs a run of its size; the lines beside these four differ in numbers alone.
@pytest.mark.parametrize(
    "name",
    [
        *("CLS_PATCH", "ADVANCED", "FULL", "DRY_RUN"),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("BASIC", "QUICK", "DEBUG")),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("DISTRIBUTED", "TORCHRUN")),
    ],
)
def test_documented_sizes_are_planned_without_weights(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = TRAINING[name]
    assert go(line, "--plan") == 0
    said = capsys.readouterr().out
    assert "no step was taken" in said
    # 1.357 B at 1280 -> 768 channels; the patch network reads tokens of 48 channels here.
    assert re.search(r"parameters +1\.4G" if "dit.py" in line else r"parameters +11\d", said)
    assert ("precision=bf16" in said) == ("--fp16" in line and not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("line", "folder", "mode"),
    [
        (QUICK, "checkpoints/blip3o-dit", "grid_64"),
        (BASIC, "checkpoints/patch_only_training", "patch_only"),
        (CLS_PATCH, "checkpoints/cls_patch_training", "cls_patch"),
        (DEBUG, "debug", "grid_64"),
    ],
    ids=["64", "256", "257", "debug"],
)
def test_shrunk_lines_really_train(line: str, folder: str, mode: str, here: Path) -> None:
    assert go(line, "--shrink") == 0
    result = json.loads((here / folder / "result.json").read_text())
    assert result["finished"]
    assert result["estimator"] == "euler-4"
    config = yaml.safe_load((here / folder / "config.yaml").read_text())
    assert (config["mode"]["name"], config["model"]["width"]) == (mode, 32)
    assert config["trainer"]["max_epochs"] == (2 if line == DEBUG else 10)


def test_the_resumed_line_goes_on_in_its_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (here / "checkpoints/blip3o-dit/result.json").is_file():
        assert go(QUICK, "--shrink") == 0
    assert go(RESUME + " --num_epochs 12", "--shrink") == 0
    said = capsys.readouterr().out
    assert "going on from the newest checkpoint" in said
    assert "resumes from" in said


def test_the_evaluated_line_says_that_it_scores_training_images(here: Path) -> None:
    if not (here / "checkpoints/patch_only_training/result.json").is_file():
        assert go(BASIC, "--shrink") == 0
    assert go(EVALUATE, "--shrink") == 0
    result = json.loads((here / "evaluation_results/evaluation.json").read_text())
    assert result["split"] == "train"
    assert {block["split"] for block in result["estimators"].values()} == {"train"}
    assert set(result["estimators"]) == {"mean", "euler-50"}


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["ADVANCED", "FULL", "DISTRIBUTED", "TORCHRUN"])
def test_the_other_training_lines_really_train_when_shrunk(name: str, here: Path) -> None:
    """As commands of their own: two processes can't start inside this one."""
    script = [sys.executable, str(ROOT / "scripts" / "from_seed.py"), "--shrink", "--"]
    # Sixteen images: two epochs of the large batches are enough.
    line = TRAINING[name] + (" --num_epochs 2" if "--num_epochs" not in TRAINING[name] else "")
    shutil.rmtree(here / "checkpoints", ignore_errors=True)  # two lines write to one folder
    done = subprocess.run([*script, *words(line)], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    config = config_of(steps_of(line)[-1])
    folder = re.search(r"hydra\.run\.dir=(\S+)", done.stdout)
    assert folder
    result = json.loads((here / folder[1] / "result.json").read_text())
    assert result["finished"]
    if name == "TORCHRUN":
        assert config.trainer.devices == "2"
        assert "ddp x2" in done.stdout


def write_pictures(folder: Path) -> Path:
    """Write four pictures of noise."""
    draw = torch.Generator().manual_seed(0)
    folder.mkdir(exist_ok=True)
    for number in range(4):
        pixels = torch.randint(0, 256, (40, 40, 3), generator=draw, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    return folder


@pytest.mark.soak
@pytest.mark.parametrize("line", [EXTRACT_CLS, EXTRACT_64], ids=["257", "64"])
def test_the_other_extractions_make_stores(
    line: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert go(line, "--shrink", "--images", str(write_pictures(tmp_path / "pictures"))) == 0
    index = json.loads(next(tmp_path.glob("embeddings/*/tokens/index.json")).read_text())
    tokens = {array["shape"][0] for array in index["arrays"].values() if array["kind"] == "tokens"}
    assert tokens == ({64} if line == EXTRACT_64 else {257})


def test_the_extracted_line_makes_a_store_that_training_reads(here: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "pictures")
    line = EXTRACT.replace(PATCHES, str(tmp_path / "out"))
    assert go(line, "--shrink", "--images", str(tmp_path / "pictures")) == 0
    index = json.loads((tmp_path / "out/tokens/index.json").read_text())
    assert index["samples"] == 4
    steps = steps_of(BASIC.replace(PATCHES, str(tmp_path / "out")))
    assert [step.command for step in steps] == ["train"]


def test_stored_widths_decide_the_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_64(tmp_path / PKL, (40, 20))
    assert go(DATASET) == 0
    assert not config_of(steps_of(QUICK)[-1]).mode.projected


def test_a_converted_store_is_not_converted_again_and_keeps_its_split(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (here / PKL).with_suffix("").is_dir():
        assert go(DATASET) == 0
    capsys.readouterr()
    assert go(FULL, "--print") == 0
    said = capsys.readouterr().out
    assert "blip3o_lit.convert" not in said
    assert "its split stays" in said


def test_errors_of_a_step_stop_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert go(QUICK) == 2  # there is no pickle to convert
    with pytest.raises(UserError, match="no flag"):
        command_line.take_apart(["python", "train_blip3o_dit.py", "--nope"])


def test_the_python_blocks_of_the_page_run(here: Path) -> None:
    if not (here / "checkpoints/blip3o-dit/result.json").is_file():
        assert go(QUICK, "--shrink") == 0
    page = (ROOT / "docs" / "migrating.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 7
    printed: list[str] = []
    for block in blocks:
        exec(  # the page's own text
            compile(block, "docs/migrating.md", "exec"),
            {"print": lambda *parts: printed.append(" ".join(map(str, parts)))},
        )
    said = "\n".join(printed)
    assert "Generated CLIP embeddings: torch.Size([4, 64, 768])" in said
    training = next(line for line in printed if line.startswith("python -m blip3o_lit.train"))
    assert isinstance(
        config_of(Step("train", dict(word.split("=", 1) for word in training.split()[3:]))),
        TrainConfig,
    )
