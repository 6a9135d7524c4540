"""Whether the package computes on this GPU what it computes on the CPU, and how fast it trains.

Called by check_gpu.sh. Each part runs in a process of its own and leaves PART.json in the folder; a
part that is there already is not run again. The last line joins them in gpu.json.

Environment: DEVICE (cuda, or cpu to try the script), SMALL=1 (toy sizes), ONLY (parts, by commas).
Shape suffixes: B images, N tokens, C condition width, D target width.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip3o_lit.base.files import write_json
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config import registry
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
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.solvers import sample
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.models.baselines import Ridge
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.models.precision import cast_weights
from blip3o_lit.tokens.store.shards import ArraySpec
from blip3o_lit.training.run import run_training
from blip3o_lit.translation.cuda_graphs import Graphs

DEVICE = torch.device(os.environ.get("DEVICE", "cuda"))
CUDA, SMALL = DEVICE.type == "cuda", os.environ.get("SMALL") == "1"
SHAPE = PairShape(TokenShape((4, 4), False, 48), TokenShape((4, 4), False, 32))
NETWORK = ModelConfig(width=64, depth=2, heads=4, kv_heads=2, mlp_width=128)
PROBLEM = LinearGaussianConfig(images=72, validation_images=20, condition_width=6, target_width=4)
SOLVERS = [name for name in registry.solver.built_in if name not in ("fitted", "map")]
"""Those two need a network that was trained for them."""
LIMIT = 480
"""Seconds after which no further part is begun."""


def close(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a share of the largest value."""
    found, expected = found.detach().cpu().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def batch(device: torch.device, images: int = 8) -> list[torch.Tensor]:
    """Return condition, target, noise and times: the same numbers on every device."""
    draw = torch.Generator().manual_seed(0)
    sides = (SHAPE.condition, SHAPE.target, SHAPE.target)
    tokens = [torch.randn(images, side.tokens, side.width, generator=draw) for side in sides]
    return [x.to(device) for x in (*tokens, torch.rand(images, generator=draw))]


def lively(config: ModelConfig, device: torch.device) -> torch.nn.Module:
    """Return a network of random weights: a new one answers zero."""
    network, draw = build_network(config, SHAPE), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=draw))
    return network.to(device)


def losses(device: torch.device, low: bool, optimizer_name: str, compiled: bool) -> torch.Tensor:
    """Return the losses of ten steps on one batch."""
    network = lively(NETWORK, device)
    if compiled:
        network.compile_blocks()  # type: ignore[operator]
    return ten_steps(network, optimizer_name, batch(device), low)


def ten_steps(
    network: torch.nn.Module, optimizer_name: str, tensors: list[torch.Tensor], low: bool = False
) -> torch.Tensor:
    """Return the losses of ten steps on what `batch` returns, or on a part of it."""
    objective = FlowObjective(FlowConfig())
    optimizer = make_optimizer(
        network, OptimizerConfig(optimizer_name, muon_layers="tokens", lr=1e-2)
    )
    found = []
    for _ in range(10):
        with torch.autocast(tensors[0].device.type, torch.bfloat16, enabled=low):
            loss = objective.loss(network, *tensors).total
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach().float())
    return torch.stack(found)


def check_losses() -> dict[str, float]:
    """Compare steps of both optimizers with the CPU's; each is (difference, tolerance)."""
    cpu, found = torch.device("cpu"), {}
    for low, name, compiled in (
        *((False, "adamw", False), (True, "adamw", False), (True, "muon", False)),
        *(((True, "adamw", True),) if CUDA else ()),
    ):
        expected = losses(cpu, False, name, False)
        word = f"{name} {'bf16' if low else 'fp32'}{' compiled' if compiled else ''}"
        found[word] = (close(losses(DEVICE, low, name, compiled), expected), 0.05 if low else 1e-3)
    return held(found)


def check_samples() -> dict[str, float]:
    """Compare what every solver makes of the same noise, dopri5 too."""
    found = {}
    for name in sorted({*registry.solver.built_in} - {"fitted"}):  # to a trained network
        made = []
        for device in (torch.device("cpu"), DEVICE):
            condition_BNC, _, z_BND, _ = batch(device)
            mapped = name == "map"
            network = lively(replace(NETWORK, second_time=mapped), device)
            objective = FlowObjective(FlowConfig(pairs=0.5 if mapped else 0.0))
            with torch.inference_mode():
                solver = SolverConfig(name, 4)
                made.append(sample(objective, network, condition_BNC, z_BND, solver).x1_BND)
        found[name] = (close(made[1], made[0]), 1e-2 if name == "dopri5" else 2e-3)
    return held(found)


def check_graphs() -> dict[str, float]:
    """Compare samplers as CUDA graphs with bare ones, on other inputs than those of the record."""
    found, network = {}, lively(NETWORK, DEVICE)
    for name in [name for name in SOLVERS if name != "dopri5"] if CUDA else ():
        graphs, objective = Graphs(DEVICE), FlowObjective(FlowConfig())
        worst, (condition_BNC, _, z_BND, _) = 0.0, batch(DEVICE)
        for times in (1.0, 0.5, 2.0):  # bare, recorded, launched again
            inputs = (objective, network, condition_BNC, times * z_BND, SolverConfig(name, 6))
            with torch.inference_mode():
                expected = sample(*inputs).x1_BND.cpu()
                worst = max(worst, close(graphs.sample(*inputs, None).x1_BND, expected))
        found[name] = (worst, 1e-5)
    return held(found)


def check_scores() -> dict[str, float]:
    """Compare scores, and the ridge baseline, which solves its normal equations on the device."""
    values = []
    for device in (torch.device("cpu"), DEVICE):
        condition_BNC, x1_BND, z_BND, _ = batch(device, 64)
        scores = TokenScores(torch.zeros(16, 32), SHAPE.target).to(device)
        scores.update(x1_BND + z_BND, x1_BND)
        result = scores.compute()
        ridge = Ridge(SHAPE).to(device)
        ridge.fit(lambda pair=(condition_BNC, x1_BND): [pair])
        values.append((result["cosine"], result["mse"], ridge.weight))
    pairs = zip(("cosine", "mse", "ridge"), *values)
    return held({n: (close(torch.as_tensor(b), torch.as_tensor(a)), 1e-6) for n, a, b in pairs})


def config(steps: int, **changes: Any) -> TrainConfig:
    """Return a run of small batches, saved every four steps."""
    base = TrainConfig(
        model=replace(NETWORK, width=16, heads=2, kv_heads=1, mlp_width=16),
        data=DataConfig(name="linear_gaussian", linear_gaussian=PROBLEM),
        precision=PrecisionConfig("fp32"),
        strategy=StrategyConfig("single"),
        trainer=TrainerConfig(max_steps=steps, log_every=1, accelerator=DEVICE.type, devices="1"),
        evaluation=EvaluationConfig(every=4, images=20),
        checkpoint=CheckpointConfig(every=4, keep=-1),
        logger=LoggerConfig(tensorboard=False),
        batch_size=16,
        seed=7,
    )
    return replace(base, **changes)


def check_resume(folder: Path) -> dict[str, float]:
    """Compare a run of eight steps with one that stopped after four and went on."""
    run_training(config(8), folder / "straight", [])
    from_half = str(folder / "straight" / "checkpoints" / "step-00000004.ckpt")
    run_training(config(8, resume=from_half), folder / "resumed", [])
    one, other = (
        checkpointing.load(folder / name / "checkpoints" / "last.ckpt")["state_dict"]
        for name in ("straight", "resumed")
    )
    return held(
        {"weights": (max(close(one[key], other[key]) for key in one if one[key].any()), 1e-5)}
    )


def check_ranks(folder: Path) -> dict[str, float]:
    """Compare two ranks on one device over gloo, and over NCCL where there are two, with one."""
    found, expected = {}, losses(torch.device("cpu"), False, "adamw", False)
    backends = ["gloo"] + ["nccl"] * (CUDA and torch.cuda.device_count() > 1)
    for backend in backends:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        file = folder / f"{backend}.pt"
        command = [sys.executable, __file__, str(folder), "--rank", backend]
        ranks = [
            subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank)})
            for rank in range(2)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise RuntimeError(f"ranks over {backend} ended with {codes}")
        for name, values in torch.load(file, weights_only=True).items():
            found[f"{name} over {backend}"] = (close(values, expected), 1e-3)
    return held(found)


def one_rank(folder: Path, backend: str) -> None:
    """Take the ten steps as one of two ranks, each with half of the batch, by DDP and by FSDP2."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank if backend == "nccl" else 0) if CUDA else DEVICE
    if CUDA:
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    kept = {}
    for name in ("ddp", "fsdp2"):
        network = lively(NETWORK, device)
        if name == "ddp":
            network = torch.nn.parallel.DistributedDataParallel(network)
        else:
            mesh = init_device_mesh(device.type, (2,))
            for block in network.blocks:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(network, mesh=mesh)
        found = ten_steps(network, "adamw", [tensor[rank::2] for tensor in batch(device)])
        dist.all_reduce(found)
        kept[name] = found.cpu() / 2
    if rank == 0:
        torch.save(kept, folder / f"{backend}.pt")
    dist.destroy_process_group()


def held(found: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Print differences beside their tolerances; return the differences.

    Raises:
        RuntimeError: If one is larger than its tolerance.
    """
    for name, (difference, tolerance) in found.items():
        print(f"  {name:<28} {difference:.1e} (at most {tolerance:.0e})", flush=True)
    wrong = [name for name, (value, tolerance) in found.items() if not value <= tolerance]
    if wrong:
        raise RuntimeError(f"{', '.join(wrong)}: not what the CPU computes")
    return {name: difference for name, (difference, _) in found.items()}


NETWORKS = {"base": 64, "large": 32, "nextdit": 64}
"""Images of a step."""


def timed_train(name: str, compiled: str) -> Callable[[Path], dict[str, float]]:
    """Return a part that trains as `train` does, on a store, and reads what its rows say."""

    def part(folder: Path) -> dict[str, float]:
        from benchmarks.gpu import GRID, SHAPE, sized
        from benchmarks.made_store import write

        shape = GRID if name == "nextdit" else SHAPE
        images, steps = (2, 4) if SMALL else (NETWORKS[name], 60)
        store = folder.parent / f"store-{shape.target.tokens}"
        sides = {"eva": shape.condition, "clip": shape.target}
        arrays = {
            key: ArraySpec("tokens", "float16", (side.tokens, side.width), grid=side.grid)
            for key, side in sides.items()
        }
        if not (store / "index.json").exists():
            shutil.rmtree(store, ignore_errors=True)  # what an interrupted call left
            write(store, arrays)
        run_training(
            config(
                steps,
                model=replace(sized(name, DEVICE), compile=compiled),
                data=DataConfig(name="tokens", tokens=str(store), threads=4),
                precision=PrecisionConfig("bf16"),
                trainer=TrainerConfig(
                    max_steps=steps, log_every=steps // 4, accelerator=DEVICE.type, devices="1"
                ),
                evaluation=EvaluationConfig(every=steps),
                checkpoint=CheckpointConfig(every=steps),
                batch_size=images,
                micro_batch_size=images,
            ),
            folder / "run",
            [],
        )
        last = [row for row in read_rows(folder / "run" / "metrics.csv") if row["train/mfu"]][-1]
        rate = float(last["train/tokens_per_s"]) / shape.target.tokens
        image = 2 * sum(side.tokens * side.width for side in sides.values())
        return {
            "batch": images,
            "images_per_s": rate,
            "mfu": float(last["train/mfu"]),
            "memory_gib": float(last["train/memory_gib"]),
            "needed_gb_per_s": rate * image / 1e9,
        }

    return part


def benchmark(name: str) -> Callable[[Path], Any]:
    """Return a part that runs a benchmark of the package's own."""

    def part(folder: Path) -> Any:
        import importlib

        return importlib.import_module(f"benchmarks.{name}").run()

    return part


def eva_clip(folder: Path) -> dict[str, float]:
    """Time EVA-CLIP-8B, of random weights, alone and in the engine's hands."""
    from benchmarks.gpu import seconds_a_call
    from blip3o_lit.config.towers import TowerConfig
    from blip3o_lit.extraction.encoding import TowerSet
    from blip3o_lit.towers import demo
    from blip3o_lit.towers.load import load_tower

    if SMALL:
        tower, images = demo.load("eva"), 4
    else:
        wanted = TowerConfig("eva_clip", "EVA-CLIP-8B", precision="bf16")
        tower, images = load_tower(wanted, False, str(DEVICE)), 64
    towers = TowerSet({"eva": tower}, captions=False, device=str(DEVICE))
    size = tower.info.image_size
    ready = [{"eva": torch.rand(3, size, size)} for _ in range(images)]
    pixels = torch.stack([row["eva"] for row in ready]).to(DEVICE)

    def bare() -> None:
        with torch.inference_mode():
            tower.tokens(pixels)

    def engine() -> None:
        towers.encode(ready, [""] * images)
        mark = towers.mark()
        if mark is not None:
            mark.synchronize()

    calls = {"bare": bare, "engine": engine}
    return {name: images / seconds_a_call(call, DEVICE, 3) for name, call in calls.items()}


def samplers(folder: Path) -> dict[str, dict[str, float]]:
    """Time heun-10 of `base` in bf16, bare and as one CUDA graph: images a second by batch."""
    from benchmarks.gpu import SHAPE as TOKENS
    from benchmarks.gpu import seconds_a_call, sized

    with torch.device(DEVICE):
        network, objective = (
            build_network(sized("base", DEVICE), TOKENS),
            FlowObjective(FlowConfig()),
        )
    cast_weights(network.requires_grad_(False), torch.bfloat16)
    found: dict[str, dict[str, float]] = {}
    for images in (1, 8, 64) if CUDA else (1,):
        sides = (TOKENS.condition, TOKENS.target)
        tokens = [torch.randn(images, s.tokens, s.width, device=DEVICE) for s in sides]
        inputs = (objective, network, *tokens, SolverConfig("heun", 10))
        calls: dict[str, Callable[..., Any]] = {"bare": lambda i=inputs: sample(*i)}
        if CUDA:
            graphs = Graphs(DEVICE)
            calls["graph"] = lambda i=inputs, g=graphs: g.sample(*i, None)
        with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16):
            found[str(images)] = {
                name: images / seconds_a_call(call, DEVICE, 5) for name, call in calls.items()
            }
    return found


COMPILED = (("eager", "false"), ("compiled", "true"), ("combined", "combined"))
"""Kinds of training, and their words of model.compile."""
CHECKS: dict[str, Callable[[Path], Any]] = {
    "losses": lambda folder: check_losses(),
    "samples": lambda folder: check_samples(),
    "graphs": lambda folder: check_graphs(),
    "scores": lambda folder: check_scores(),
    "resume": check_resume,
    "ranks": check_ranks,
}
TABLE: dict[str, Callable[[Path], Any]] = {
    f"{name}_{kind}": timed_train(name, word)
    for name in NETWORKS
    for kind, word in (COMPILED if CUDA else COMPILED[:1])
    if kind != "combined" or name == "base"
}
PARTS = CHECKS | TABLE | {"extraction": eva_clip, "samplers": samplers, "gpu": benchmark("gpu")}
"""Everything that is checked comes before anything that is timed."""


def machine() -> dict[str, Any]:
    """Say what the figures were measured on."""
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    count = torch.cuda.device_count() if CUDA else 1
    return {"device": name, "devices": count, "torch": torch.__version__, "small": SMALL}


def main() -> int:
    """Do every part that has no file yet; return 1 when one of them failed or time ran out."""
    out = Path(sys.argv[1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("BLIP3O_HOME", str(out / "home"))
    if "--rank" in sys.argv:
        one_rank(out, sys.argv[-1])
        # Its figures are written. At exit, torch's threads of two shardings may abort a rank.
        sys.stdout.flush()
        os._exit(0)
    if "--part" in sys.argv:
        name = sys.argv[-1]
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)  # what an interrupted call left
        folder.mkdir()
        write_json(out / f"{name}.json", {"machine": machine(), "found": PARTS[name](folder)})
        return 0
    started, failed = time.monotonic(), []
    names = os.environ.get("ONLY", "").split(",") if os.environ.get("ONLY") else list(PARTS)
    for name in names:
        if (out / f"{name}.json").exists():
            continue
        left = LIMIT - (time.monotonic() - started)
        if left <= 0:
            print(f"{name}: no time left: run the same line again", flush=True)
            failed.append(name)
            continue
        print(f"{name}:", flush=True)
        command = [sys.executable, __file__, str(out), "--part", name]
        try:
            code = subprocess.run(command, check=False, timeout=max(left, 60)).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            print(f"{name}: FAILED with {code}", flush=True)
            failed.append(name)
    parts = {name: out / f"{name}.json" for name in PARTS if (out / f"{name}.json").exists()}
    found = {name: json.loads(path.read_text("utf-8"))["found"] for name, path in parts.items()}
    write_json(out / "gpu.json", {"machine": machine(), "failed": failed, **found})
    print(json.dumps(found, indent=1))
    print(f"written to {out / 'gpu.json'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
