"""The fitted solvers of a run or an export: `solvers.safetensors`, and whose weights it is of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip3o_lit.base.files import replacing
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.flow.scheme import FittedSolvers, Scheme

SOLVERS_FILE = "solvers.safetensors"
"""In a run directory and in an export."""


def content_hash(flow: FlowConfig, state: Mapping[str, Tensor]) -> str:
    """Return the sha256 of a translator's weights, as stored, and of its flow."""
    return weights_hash(state, json.dumps(asdict(flow), sort_keys=True))


def weights_hash(state: Mapping[str, Tensor], words: str = "") -> str:
    """Return the sha256 of tensors by name, after some words."""
    digest = hashlib.sha256(words.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_solvers(fitted: FittedSolvers, content: str, folder: Path) -> None:
    """Keep fitted solvers beside the weights of that content."""
    tensors = {}
    for nfe, scheme in fitted.schemes.items():
        # That of a usual solver may be a view of a larger one.
        tensors[f"{nfe}.times"] = scheme.times_K.contiguous()
        tensors[f"{nfe}.weights"] = scheme.weights_KS.contiguous()
    metadata = {"content": content, "records": json.dumps(fitted.records)}
    with replacing(folder / SOLVERS_FILE) as temporary:
        save_file(tensors, temporary, metadata)


def kept_solvers(file: Path, content: str) -> FittedSolvers:
    """Return what a file holds for the weights of that content: nothing where it is of others."""
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if metadata["content"] != content:
            return FittedSolvers(why_none=f"{file} was fitted to other weights, or another flow")
        records = {int(nfe): record for nfe, record in json.loads(metadata["records"]).items()}
        schemes = {nfe: _scheme(tensors, nfe) for nfe in records}
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged: delete it, evaluate solvers=[fitted-4] fits it again"
        ) from error
    return FittedSolvers(schemes, records)


def _scheme(tensors: dict[str, Tensor], nfe: int) -> Scheme:
    scheme = Scheme(tensors[f"{nfe}.times"].double(), tensors[f"{nfe}.weights"].double())
    finite = scheme.times_K.isfinite().all() and scheme.weights_KS.isfinite().all()
    if scheme.times_K.shape != (nfe,) or scheme.weights_KS.shape != (nfe, nfe + 1) or not finite:
        raise ValueError(f"the solver of {nfe} evaluations has other sizes")
    return scheme
