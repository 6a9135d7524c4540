"""Generate target tokens with a trained translator, from tokens, token stores or pictures.

    model = BLIP3oInference("outputs/train/2025-01-31_12-00-00-17")
    clip_tokens = model.generate(eva_tokens)

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width,
S steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_lit.base.condition import AnyCondition, Condition
from blip3o_lit.base.home import fits
from blip3o_lit.checkpoints.load import best_device, load
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.solver import SolverConfig, solver_from_label
from blip3o_lit.config.towers import PixelsConfig, TowersConfig
from blip3o_lit.training.environment import own_defaults

if TYPE_CHECKING:
    from PIL.Image import Image

    from blip3o_lit.drawing.drawer import Drawer
    from blip3o_lit.towers.text_tower import TextTower
    from blip3o_lit.towers.tower import Tower


Generated = Tensor | tuple[Tensor, list[Tensor]]
"""Tokens, or tokens and the states of the solver after each step."""


class BLIP3oInference:
    """A trained translator behind one call: condition tokens in, target tokens out.

    What it generates does not depend on torch's default number format and device. It can be
    pickled, for a worker process.

    Args:
        path_or_hub_id: Checkpoint, run directory, exported folder or hub id.
        device: `auto` (cuda, mps or cpu), or a torch device.
    """

    def __init__(self, path_or_hub_id: str | Path, device: str | torch.device = "auto") -> None:
        self.device = torch.device(best_device() if device == "auto" else device)
        with own_defaults():
            self.loaded = load(path_or_hub_id, self.device)
        self.translator, self.config = self.loaded.translator, self.loaded.config
        self.shape, self.facts = self.loaded.shape, self.loaded.facts
        self._drawers: dict[str | None, Drawer] = {}
        self._text_tower: TextTower | None = None

    @own_defaults()
    def generate(
        self,
        eva_embeddings: Tensor | np.ndarray | Condition,
        num_inference_steps: int | None = None,
        solver: str | SolverConfig | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        return_intermediate: bool = False,
        normalize: bool = False,
        seed: int = 0,
        sample_ids: Tensor | None = None,
        batch_size: int = 64,
    ) -> Generated:
        """Generate target tokens from condition tokens, both in the towers' own scale.

        Args:
            eva_embeddings: Condition tokens `[B, M, C]`, or `[M, C]` of one image, any float type;
                a `Condition` for a model of words.
            num_inference_steps: Steps of the ODE solver: the fitted one of so many evaluations
                where one is stored, heun elsewhere, unless `solver` says otherwise.
            solver: A name (`mean`, `heun`), a label (`heun-10`, `fitted-4`) or a SolverConfig; by
                default the run's own.
            guidance_scale: Classifier-free guidance, for models trained with
                `flow.condition_dropout`; 1 is none.
            generator: Draws the noise; without it, noise is a function of seed and sample id.
            return_intermediate: Return the states after each step too.
            normalize: Scale each token to unit length.
            seed: Seed of the noise where no generator is given.
            sample_ids: Which noise each image gets, int64 `[B]`; by default 0, 1, 2, ...
            batch_size: Images per forward pass.

        Returns:
            `[B, N, D]` (or `[N, D]`) fp32 on the model's device; with `return_intermediate` a pair
            of it and the list of states.
        """
        tokens, single = self._checked(eva_embeddings)
        choice = self._solver(solver, num_inference_steps)
        if guidance_scale is not None:
            choice = replace(choice, guidance_scale=guidance_scale)
        ids_B = torch.arange(len(tokens)) if sample_ids is None else sample_ids.cpu()
        results = []
        for start in range(0, len(tokens), batch_size):
            part = tokens[start : start + batch_size].to(self.device)
            ids = ids_B[start : start + batch_size]
            noise = None if generator is None else self._noise(len(part), generator)
            results.append(
                self.translator.generate(part, ids, seed, choice, noise, return_intermediate)
            )

        def finish(parts: Iterable[Tensor]) -> Tensor:
            whole = torch.cat(list(parts))
            whole = F.normalize(whole, dim=-1) if normalize else whole
            return whole[0] if single else whole

        generated = finish(result.x1_BND for result in results)
        if not return_intermediate:
            return generated
        steps = zip(*(result.intermediates for result in results))
        return generated, [finish(parts) for parts in steps]

    def _noise(self, images: int, generator: torch.Generator) -> Tensor:
        size = (images, self.shape.target.tokens, self.shape.target.width)
        return torch.randn(size, generator=generator, device=generator.device).to(self.device)

    def generate_from_dataset(
        self,
        tokens: str | Path | None = None,
        split: str = "validation",
        batch_size: int = 64,
        limit: int | None = None,
        **settings: Any,
    ) -> Iterator[dict[str, Any]]:
        """Generate for every image of a token store, a batch at a time.

        Args:
            tokens: The store; by default the one that the model was trained on.
            split: Split of the store.
            batch_size: Images per batch; one batch is in memory at once.
            limit: Stop after so many images.
            **settings: Passed on to `generate`; image i of the split has the i-th noise.

        Yields:
            `keys`, `captions` (lists), `generated` and `target` (as stored), both `[B, N, D]`.
        """
        from blip3o_lit.evaluation.readers import open_readers

        config = EvaluateConfig(ckpt=str(self.loaded.file), split=split)
        config.data.tokens = str(tokens) if tokens else None
        reader, _ = open_readers(self.loaded, config)
        images = min(limit or len(reader), len(reader))
        for start in range(0, images, batch_size):
            ids = np.arange(start, min(start + batch_size, images))
            with own_defaults():
                batch = reader.read(ids)
            sample_ids = torch.from_numpy(ids)
            yield {
                "keys": reader.keys(ids),
                "captions": reader.captions(ids),
                "generated": self.generate(batch["condition"], sample_ids=sample_ids, **settings),
                "target": batch["target"],
            }

    @own_defaults()
    def evaluate_model(self, tokens: str | Path | None = None, **settings: Any) -> dict[str, Any]:
        """Score the model; returns what the evaluate command writes to evaluation.json.

        Args:
            tokens: A token store; by default the one that the model was trained on.
            **settings: Keys of the evaluate command: `split`, `baselines`, `solvers`, `images`, ...
        """
        from blip3o_lit.evaluation.readers import open_readers
        from blip3o_lit.evaluation.score import Scorer

        config = EvaluateConfig(ckpt=str(self.loaded.file), **settings)
        config.data.tokens = str(tokens) if tokens else None
        held, train = open_readers(self.loaded, config)
        return Scorer(self.loaded, held, train, config, fits(), lambda *_: None).run()

    @own_defaults()
    def interpolate_embeddings(
        self,
        eva_start: Tensor | np.ndarray,
        eva_end: Tensor | np.ndarray,
        num_steps: int = 10,
        **settings: Any,
    ) -> Generated:
        """Generate along the straight line between the condition tokens `[M, C]` of two pictures.

        Every point has the same noise, so the path is as smooth as the model.

        Args:
            eva_start: Where the line starts.
            eva_end: Where it ends.
            num_steps: Points, both ends included.
            **settings: Passed on to `generate`.

        Returns:
            `[S, N, D]`.
        """
        (start, _), (end, _) = self._checked_grid(eva_start), self._checked_grid(eva_end)
        weight = torch.linspace(0, 1, num_steps).view(-1, 1, 1)
        line = torch.lerp(start.float().cpu(), end.float().cpu(), weight)
        same_noise = torch.zeros(num_steps, dtype=torch.int64)
        return self.generate(line, sample_ids=same_noise, **settings)

    @own_defaults()
    def from_images(
        self,
        images: Sequence[str | Path | Image],
        tower: Tower | None = None,
        pixels: PixelsConfig | None = None,
        **settings: Any,
    ) -> Generated:
        """Generate target tokens of pictures.

        Args:
            images: Files or PIL pictures.
            tower: The condition tower; needed unless the model was trained on the demo.
            pixels: How they become pixels, as in the extraction; None: as a viewer shows them.
            **settings: Passed on to `generate`.

        Returns:
            `[B, N, D]`.
        """
        from blip3o_lit.towers.load import load_tower
        from blip3o_lit.translation.pictures import picture_tokens

        if tower is None:
            if self.config.data.name != "demo":
                raise UserError("from_images: give the condition tower (towers.load.load_tower)")
            tower = load_tower(TowersConfig().condition, device=str(self.device))
        tokens = picture_tokens(tower, images, self.config.mode, pixels or PixelsConfig())
        return self.generate(tokens, **settings)

    @own_defaults()
    def from_text(
        self,
        captions: str | Sequence[str],
        tower: TextTower | None = None,
        grid: Tensor | None = None,
        **settings: Any,
    ) -> Generated:
        """Generate target tokens of captions.

        Args:
            captions: One caption or several.
            tower: The text tower; by default the one that the model's words are of.
            grid: Condition tokens `[B, M, C]` beside them, for a model that reads both.
            **settings: Passed on to `generate`; captions sample with the run's own solver.

        Returns:
            `[B, N, D]`.

        Raises:
            UserError: If the model reads no words, or its text tower can't be had.
        """
        from blip3o_lit.checkpoints.words import caption_condition, text_tower_of, words_spec

        captions = [captions] if isinstance(captions, str) else list(captions)
        if not captions:
            raise UserError("from_text: give a caption at least")
        spec = words_spec(self.loaded)
        if (grid is None) != (self.shape.condition is None):
            need = "no grid" if self.shape.condition is None else "a grid beside its words: grid="
            raise UserError(f"from_text: {self.loaded.file} reads {need}")
        if tower is None:
            self._text_tower = self._text_tower or text_tower_of(self.loaded)
            tower = self._text_tower
        return self.generate(caption_condition(captions, tower, spec.dtype, grid), **settings)

    @own_defaults()
    def draw(self, tokens: Tensor | np.ndarray, decoder: str | None = None) -> list[Image]:
        """Draw target tokens, generated or true.

        Args:
            tokens: Target tokens `[B, N, D]`, or `[N, D]` of one image, in the tower's own scale.
            decoder: Folder or hub id of a pretrained decoder of the target tower; by default the
                linear read-out of the training images.

        Returns:
            PIL pictures, one per image.
        """
        from blip3o_lit.checkpoints.drawer import drawer_of
        from blip3o_lit.drawing.sheet import image_of

        tokens_BND = torch.as_tensor(tokens).float()
        tokens_BND = tokens_BND[None] if tokens_BND.ndim == 2 else tokens_BND
        want = self.shape.target
        if tokens_BND.ndim != 3 or tokens_BND.shape[1:] != (want.tokens, want.width):
            shape = list(torch.as_tensor(tokens).shape)
            raise UserError(f"tokens are {shape}, expected [B, {want.tokens}, {want.width}]")
        if decoder not in self._drawers:
            self._drawers[decoder] = drawer_of(self.loaded, decoder)
        return [image_of(picture) for picture in self._drawers[decoder].draw(tokens_BND)]

    def push_to_hub(self, repository: str, private: bool = True) -> str:
        """Upload the model and its card to the Hugging Face Hub; returns the address."""
        from blip3o_lit.checkpoints.export import push

        return push(self.loaded, repository, private)

    def _solver(self, solver: str | SolverConfig | None, steps: int | None) -> SolverConfig:
        if isinstance(solver, SolverConfig):
            return solver
        if solver is None and steps is None:
            return self.config.solver
        if steps is not None and solver == "mean":
            raise UserError("solver=mean takes one evaluation: leave num_inference_steps out")
        default = self.config.solver.name if self.config.solver.name != "mean" else "heun"
        label = solver or default
        if solver is None and steps in self.translator.fitted.schemes:
            label = "fitted"
        if label == "fitted" and steps is not None:
            return SolverConfig(name="fitted", nfe=steps)
        if steps is not None and "-" not in label:
            return SolverConfig.named(label, steps=steps, start=self.config.solver.start)
        return solver_from_label(label)

    def _checked(self, given: Tensor | np.ndarray | Condition) -> tuple[AnyCondition, bool]:
        """Return the condition as a batch, and whether it was one image without a batch axis."""
        if isinstance(given, Condition):
            given.check(self.shape)
            return given, False
        if self.shape.words is not None:
            raise UserError(f"the model reads {self.shape.condition_text}: give a Condition")
        return self._checked_grid(given)

    def _checked_grid(self, embeddings: Tensor | np.ndarray) -> tuple[Tensor, bool]:
        tokens = torch.as_tensor(embeddings)
        if not tokens.is_floating_point():
            raise UserError(f"condition tokens are {tokens.dtype}, expected a float type")
        shape, want = list(tokens.shape), self.shape.grid
        single = tokens.ndim == 2
        tokens = tokens[None] if single else tokens
        if tokens.ndim != 3 or tokens.shape[1:] != (want.tokens, want.width) or not len(tokens):
            hint = ""
            if tokens.ndim == 3 and tokens.shape[2] == want.width:
                extra = tokens.shape[1] - want.tokens
                hint = {1: ": drop the CLS token", -1: ": the CLS token is missing"}.get(extra, "")
            expected = f"[B, {want.tokens}, {want.width}]"
            raise UserError(f"condition tokens are {shape}, expected {expected}{hint}")
        if not torch.isfinite(tokens).all():
            raise UserError("condition tokens hold NaN or infinity")
        return tokens, single
