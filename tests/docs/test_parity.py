"""Every test, command, key and option that docs/parity.md names exists."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from blip3o_lit import BLIP3oInference
from blip3o_lit.cli.schema import conf_dir, groups, keys
from blip3o_lit.config.commands import GenerateConfig
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.train import TrainConfig

PAGE = (ROOT / "docs" / "parity.md").read_text("utf-8")
SCHEMAS = (TrainConfig, EvaluateConfig, ConvertConfig, ExtractConfig, GenerateConfig)
KEYS = {key for schema in SCHEMAS for key in keys(schema)}
# The noise output has no posterior mean in one evaluation: these go with every option.
SAMPLED = ("flow.time_zero_share=0", "solver.name=heun", "solver.start=0.2")
# What both projects together could do, as words of the first two columns.
CAPABILITIES = {
    "Model": """nextdit; 1792; tiny; small; base; large; xl; custom; key and value heads;
        query-key norm; multiple_of; ffn multiplier; swiglu; gelu; rms norm; layer norm;
        sandwich norm; adaln-zero; tanh gates; gate a head; layer scale; zero-init output; 2-d;
        "3-d"; on or off; learned positions; time embedding; cross-attention;
        mask of the cross-attention; adapter; output scale; dropout; gradient checkpointing;
        torch.compile; config and weights""",
    "Tokens and data": """64 tokens; 256 tokens; 257 tokens; any widths; single pickle; chunked;
        manifest; drop cls; normalise; mean and std; subset; max shards; eval split; same-data;
        nan; corrupt; prefetch; delete after use; captions and keys; statistics; test; with or
        without cls; batches; resume; several gpus; coco; download""",
    "Loss": """rectified; sigma_min; sigma_max; linear; cosine schedule; velocity, epsilon, sample;
        regularisation weight; velocity scale; target norm scale; adaptive scaling;
        adaptive noise scale; uniform; u-shaped; weighting over t; semantic; consistency;
        contrastive; global alignment; spherical flow; guidance""",
    "Training": """all flags; learning rate; decay; warm-up; schedules; accumulation; fp16; bf16;
        clipping; ddp; fsdp; resume; best and last; interrupted; debug; dry run; presets;
        overfitting; production; overfit test; generation while training; w&b; json histories;
        timing and memory; nan guard""",
    "Metrics and evaluation": """velocity cosine; norm ratio; norm consistency; snr; token, image,
        global; cls and patches; 0.7, 0.8, 0.9; min, max, percentiles, std; l2; mse; variance;
        std ratios; verdicts; pooled; recall on captions; coco; plots; json report""",
    "Inference": """generate; generator; intermediates; steps; guidance; normalise; euler; midpoint;
        heun; from a data set; evaluate a model; interpolate; load a model""",
}
TESTS = ROOT / "tests"


def rows() -> list[list[str]]:
    """Return the cells of every row: capability, place, proof, fault there."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "capability"]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_row_is_whole_and_proved_or_says_that_it_is_not_built() -> None:
    assert len(rows()) > 90
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        assert quoted(row[2]) or row[2] == "not built", row
        assert row[2] != "not built" or "not built" in row[1] or "not there" in row[1], row


@pytest.mark.parametrize("section", CAPABILITIES)
def test_every_capability_has_its_row(section: str) -> None:
    text = PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [" ".join(line.split(" | ")[:2]).casefold() for line in lines]
    for words in CAPABILITIES[section].split(";"):
        capability = " ".join(words.split())
        if section == "Inference" and capability == "guidance":
            continue  # a row of the loss, whose training it needs
        assert any(capability in cell for cell in cells), capability


def test_every_named_value_is_accepted() -> None:
    for row in rows():
        for word in quoted(row[1]):
            key, equals, value = word.partition("=")
            if equals and "." in key and key in set(keys(TrainConfig)):
                given = OmegaConf.from_dotlist([word, *SAMPLED])
                OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrainConfig), given))


def test_every_named_test_exists() -> None:
    named = [word for row in rows() for word in quoted(row[2]) if "::" in word]
    assert len(named) > 80
    defined: dict[str, set[str]] = {}
    for word in named:
        file, test = word.split("::")
        if file not in defined:
            tree = ast.parse(next(TESTS.rglob(file)).read_text("utf-8"))
            defined[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert test in defined[file], word


def test_every_named_key_option_command_and_file_exists() -> None:
    options = groups(conf_dir())
    for row in rows():
        for word in [*quoted(row[1]), *quoted(row[2])]:
            key, equals, value = word.partition("=")
            if "::" in word:
                continue
            if word.startswith("python -m "):
                assert hasattr(importlib.import_module(word.split()[2]), "main"), word
            elif word.startswith("BLIP3oInference"):
                assert not word.partition(".")[2] or hasattr(BLIP3oInference, word[16:]), word
            elif word.endswith(".py"):
                assert (ROOT / word).is_file() or (ROOT / "blip3o_lit" / word).is_file(), word
            elif equals and key in options:
                assert value in options[key], word
            else:
                assert key in KEYS, word


def test_a_wrong_name_would_be_noticed() -> None:
    assert "model.kv_hads" not in KEYS
    assert {"model.kv_heads", "same_data", "split_rule", "extract.shard"} <= KEYS
