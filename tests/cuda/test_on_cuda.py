"""Whole runs on "cuda" without a GPU: where the host waits, what is copied, where things land."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cuda_shim import on_cuda

SINGLE = (
    *("single/bf16/adamw/16", "single/fp16/adamw/16", "single/fp32/adamw/8"),
    *("single/tf32/muon/16", "single/bf16_true/muon/16", "compile/bf16/adamw/16"),
    *("words/bf16/adamw/16", "compile-words/bf16/adamw/16"),
)
PICTURES = ("images/bf16/adamw/16", "kept/bf16/adamw/16")
RANKS = ("ddp/bf16/adamw/4", "fsdp2/bf16/adamw/8")
QUIET = 3
"""Steps that are traced: they log nothing, validate nothing and save nothing."""
NEW = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""All memory is new then, so that all values are zeros rather than anything."""


def found(said: str) -> dict[str, Any]:
    return json.loads(said.rpartition("JSON ")[2])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(on_cuda("runs.py", tmp_path_factory.mktemp("single"), *SINGLE, **NEW))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(on_cuda("runs.py", tmp_path_factory.mktemp("pictures"), *PICTURES, **NEW))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    return found(on_cuda("runs.py", folder, *RANKS, ranks=2, devices=2, **NEW))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(on_cuda("places.py", tmp_path_factory.mktemp("places"), devices=8))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return found(on_cuda("commands.py", tmp_path_factory.mktemp("commands"), **NEW))


@pytest.mark.parametrize("name", SINGLE)
def test_a_whole_run_saves_and_waits_for_nothing_inside_a_step(
    single: dict[str, Any], name: str
) -> None:
    """But for the loss scale of fp16, which asks once a step whether gradients overflowed."""
    run = single[name]
    assert run["saved"] == ["best.ckpt", "last.ckpt", "step-00000004.ckpt", "step-00000008.ckpt"]
    assert run["kernels"] > 0
    if "fp16" in name.split("/"):
        assert list(run["waits"].values()) == [QUIET]
        assert "grad_scaler.py" in next(iter(run["waits"]))
    else:
        assert run["waits"] == {}


@pytest.mark.parametrize("name", SINGLE)
def test_tokens_are_copied_from_pinned_memory(single: dict[str, Any], name: str) -> None:
    """What is not pinned is a time per image, if anything."""
    assert single[name]["pinned"] > 0  # threads copy ahead: not one batch for each traced step
    assert all("training/module.py" in place for place in single[name]["pageable"])


@pytest.mark.parametrize("name", PICTURES)
def test_towers_in_front_of_the_network_make_no_step_wait(
    pictures: dict[str, Any], name: str
) -> None:
    """Pixels come from pinned memory, tokens stay on the device."""
    run = pictures[name]
    assert "last.ckpt" in run["saved"]
    assert run["kernels"] > 0
    assert run["waits"] == {}
    assert run["pinned"] > 0
    assert all("training/module.py" in place for place in run["pageable"])


def test_all_blocks_and_batches_are_one_graph(single: dict[str, Any]) -> None:
    """Over training, partial validation batches and saving."""
    run = single["compile/bf16/adamw/16"]
    assert (run["graphs"], run["breaks"]) == (1, 0)


def test_captions_of_any_length_are_one_graph(single: dict[str, Any]) -> None:
    run = single["compile-words/bf16/adamw/16"]
    assert (run["graphs"], run["breaks"]) == (1, 0)


@pytest.mark.parametrize("name", RANKS)
def test_ranks_train_and_save(ranks: dict[str, Any], name: str) -> None:
    assert "last.ckpt" in ranks[name]["saved"]
    assert ranks[name]["kernels"] > 0


@pytest.mark.parametrize("name", RANKS)
def test_ranks_wait_for_nothing_inside_a_step(ranks: dict[str, Any], name: str) -> None:
    """But for DDP's own timers, which it reads in its first steps."""
    waits = [place for place in ranks[name]["waits"] if "nn/parallel/distributed.py" not in place]
    assert waits == []


def test_every_command_ends(commands: dict[str, Any]) -> None:
    """Each on what the one before left; `train` with `precision=auto`."""
    assert [name for name, said in commands.items() if said["kernels"] > 0] == [
        *("extract", "train", "generate", "evaluate")
    ]


def test_solvers_are_recorded_as_graphs(commands: dict[str, Any]) -> None:
    """From the second batch of a shape on; what waits for the device can't be recorded."""
    assert commands["generate"]["graphs"] > 0
    assert commands["evaluate"]["graphs"] > 0
    assert commands["train"]["graphs"] == 0


def test_extraction_waits_once_a_batch(commands: dict[str, Any]) -> None:
    """For three batches; the towers' own way to the device left out."""
    waits = commands["extract"]["waits"].items()
    inside = [count for place, count in waits if "blip3o_lit/towers/" not in place]
    assert inside == [3]


def test_plain_command_lines_take_eight_devices(places: dict[str, Any]) -> None:
    """Strategy, processes, and the micro-batch of a global batch of 64."""
    assert places["layouts"] == {
        "auto auto": ["ddp", 8, 8],
        "ddp auto": ["ddp", 8, 8],
        "fsdp2 auto": ["fsdp2", 8, 8],
        "auto 8": ["ddp", 8, 8],
        "single auto": ["single", 1, 64],
    }


def test_extraction_guards_its_copies_on_their_own_device(places: dict[str, Any]) -> None:
    """On device 3, from a thread whose current device is 0."""
    assert set(places["extraction"]["copy_on"]) == {3}
    assert set(places["extraction"]["event_record"]) == {3}


def test_extraction_takes_the_device_of_its_task(places: dict[str, Any]) -> None:
    """Of srun's fifth on a machine, of torchrun's third, of a process alone."""
    assert places["tasks"] == ["cuda:5", "cuda:3", "cuda:0"]


def test_a_snapshot_is_left_where_memory_runs_out(places: dict[str, Any]) -> None:
    said, files = places["out of memory"]
    assert "with micro_batch_size=32: try micro_batch_size=16" in said
    assert "out-of-memory-0.pickle shows what held it" in said
    assert files["out-of-memory-0.pickle"] > 1000


def test_planned_activations_are_those_of_the_cuda_allocator() -> None:
    cases = ("dit/bf16", "dit/fp32", "dit/bf16_true", "nextdit/bf16")
    for case, sizes in found(on_cuda("footprint.py", *cases)).items():
        assert sizes["planned"] == pytest.approx(sizes["peak"], rel=0.15), case


def test_passes_and_kernels_of_a_step_are_bounded() -> None:
    """Of `base` in bf16, eager; the copies of tokens and the loss with it."""
    step = found(on_cuda("passes.py"))
    assert step["megabytes"] <= 700
    assert step["kernels"]["forward"] + step["kernels"]["backward"] <= 1400
    assert step["kernels"]["rest"] <= 20  # norm, clipping, AdamW and average


@pytest.mark.soak
def test_compiled_kernels_are_bounded() -> None:
    """Triton compiles every kernel for real."""
    assert sum(found(on_cuda("passes.py", "compiled", limit=1800))["compiled"].values()) <= 700
