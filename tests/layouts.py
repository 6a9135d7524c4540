"""One small run in several layouts of processes.

Starting processes costs more than these runs, so two processes do many jobs: Lightning keeps the
process group of the first.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from blip3o_lit.config.data import DataConfig, LinearGaussianConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    PrecisionConfig,
    StrategyConfig,
    TrainerConfig,
)
from blip3o_lit.models.network import Network
from blip3o_lit.training.module import TranslationModule
from blip3o_lit.training.run import run_training

PROBLEM = LinearGaussianConfig(images=72, validation_images=20, condition_width=6, target_width=4)
CROSS = ModelConfig(
    width=16, depth=2, heads=2, kv_heads=1, mlp_width=16, conditioning="cross", positions="learned"
)
STEPS, HALF = 20, 10
WORDS = "words-store"
"""The store, below a job's folder, of jobs whose condition has words."""
OLDER = "reduce_scatter_tensor"  # its name before torch 2.15
LAYOUTS = {
    "1": StrategyConfig("single"),
    "ddp": StrategyConfig("ddp"),
    "fsdp2": StrategyConfig("fsdp2"),
    "fsdp2-full": StrategyConfig("fsdp2", consolidated=True),
    "hsdp": StrategyConfig("fsdp2", replicas=2),
}
MODELS = {
    "cross": CROSS,
    "recomputed": replace(CROSS, activation_checkpointing=True),
    "compiled": replace(CROSS, compile="true"),
    "nextdit": ModelConfig("nextdit", 16, 2, 2, 1, 32, conditioning="cross", key_rope=False),
    # The official proportions of block and modulation, 8 of 24 blocks.
    "wide": ModelConfig("nextdit", 256, 8, 4, 4, 1408, conditioning="cross", key_rope=False),
}


def config(layout: str, **changes: Any) -> TrainConfig:
    """The run: 20 steps of 16 images over 72, so that epochs end within steps."""
    base = TrainConfig(
        model=CROSS,
        data=DataConfig(name="linear_gaussian", linear_gaussian=PROBLEM),
        precision=PrecisionConfig("fp32"),
        strategy=LAYOUTS[layout],
        trainer=TrainerConfig(
            max_steps=STEPS,
            log_every=1,
            accelerator="cpu",
            devices={"1": "1", "hsdp": "4"}.get(layout, "2"),
        ),
        evaluation=EvaluationConfig(every=HALF, images=20),
        checkpoint=CheckpointConfig(every=HALF, keep=-1),
        logger=LoggerConfig(tensorboard=False),
        batch_size=16,
        micro_batch_size=None,
        seed=7,
    )
    return replace(base, **changes)


def half(run: Path) -> Path:
    """The checkpoint in the middle of a run."""
    return run / "checkpoints" / f"step-{HALF:08d}.ckpt"


def run_job(folder: Path, job: dict[str, Any]) -> None:
    """Do one job: name and layout, and where given model, micro, precision, optimizer, profiles,
    words, resume, bad, asynchronous and measure; with two processes, reduce-scatters are counted.

    `bad` is a step in which the last rank has a gradient that is not finite. A job to measure takes
    two steps and leaves the bytes of all tensors alive after a step.
    """
    changes: dict[str, Any] = {"micro_batch_size": job.get("micro", 8)}
    changes["model"] = MODELS[job.get("model", "cross")]
    changes["precision"] = PrecisionConfig(job.get("precision", "fp32"))
    changes["optimizer"] = OptimizerConfig(
        job.get("optimizer", "adamw"), muon_layers="tokens", ema_profiles=job.get("profiles", [])
    )
    if "words" in job:
        changes["data"] = DataConfig(tokens=str(folder / WORDS), condition=job["words"])
        changes["flow"] = FlowConfig(condition_dropout=0.25)
        changes["solver"] = SolverConfig("euler", steps=2, guidance_scale=2.0)
    if "resume" in job:
        changes["resume"] = str(half(folder / job["resume"]))
    run = config(job["layout"], **changes)
    run.checkpoint.asynchronous = job.get("asynchronous", False)
    TranslationModule.on_after_backward = partialmethod(poison, step=job.get("bad", 0))  # type: ignore
    Network.compile_blocks.__defaults__ = ("aot_eager",)  # graphs as inductor's, without its C++
    torch._dynamo.reset()
    seen = torch._dynamo.utils.counters
    seen.clear()
    if "measure" not in job:
        sums: list[int] = []
        with counted(sums):
            run_training(run, folder / job["name"], [])
        if "RANK" in os.environ:
            (folder / f"{job['name']} sums {os.environ['RANK']}").write_text(str(len(sums)))
        if run.model.compile == "true":
            file = folder / f"{job['name']} graphs"
            file.write_text(f"{seen['stats']['unique_graphs']} {sum(seen['graph_break'].values())}")
        return
    run.trainer.max_steps = 2
    before, found = bytes_alive(), list[int]()
    hook = register_optimizer_step_post_hook(lambda *_: found.append(bytes_alive()))
    run_training(run, folder / job["name"], [])
    hook.remove()
    (folder / f"{job['name']} {os.environ['RANK']}").write_text(str(max(found) - before))


@contextmanager
def counted(sums: list[int]) -> Iterator[None]:
    """Add to a list in each reduce-scatter."""
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else OLDER
    inner = getattr(dist, name)

    def reduce_scatter(*args: Any, **further: Any) -> Any:
        sums.append(1)
        return inner(*args, **further)

    setattr(dist, name, reduce_scatter)
    try:
        yield
    finally:
        setattr(dist, name, inner)


def poison(module: TranslationModule, step: int) -> None:
    if module.global_step + 1 == step and module.global_rank == module.trainer.world_size - 1:
        gradient = next(module.network.parameters()).grad
        assert gradient is not None
        getattr(gradient, "to_local", lambda: gradient)()[0] = torch.inf


def bytes_alive() -> int:
    """Count the storages of all tensors of this process: weights, gradients, states, and others."""
    gc.collect()  # What an earlier job left.
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and not tensor.is_meta:
                    local = tensor.to_local() if hasattr(tensor, "placements") else tensor
                    storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def processes(
    folder: Path, jobs: list[dict[str, Any]], count: int = 2, seconds: float = 800
) -> None:
    """Do jobs one after another in processes that find each other as torchrun's would."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # so that packages are imported once
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    numbers = "0123"[:count]
    ranks = [
        context.Process(target=_rank, args=(r, str(count), port, str(folder), jobs))
        for r in numbers
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(seconds)
        rank.kill()
    logs = "\n".join((folder / f"rank-{r}.log").read_text()[-3000:] for r in numbers)
    assert not any(rank.exitcode for rank in ranks), logs


def _rank(rank: str, count: str, port: str, folder: str, jobs: list[dict[str, Any]]) -> None:
    """Be one of the processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "RANK": rank}
    place |= {"LOCAL_WORLD_SIZE": count, "LOCAL_RANK": rank, "GROUP_RANK": "0"}
    os.environ.update(place, TORCHELASTIC_RUN_ID="layouts")
    torch.set_num_threads(1)
    with (Path(folder) / f"rank-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    for job in jobs:
        run_job(Path(folder), job)
