"""Loading from every kind of place, what `generate` promises, and one-line refusals."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import serving
from made_run import make_run, small_config
from safetensors.torch import load_file

from blip3o_lit import BLIP3oInference
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.checkpoints.export import write_export
from blip3o_lit.checkpoints.initial import initial_weights
from blip3o_lit.checkpoints.load import load
from blip3o_lit.checkpoints.weights import find_weights
from blip3o_lit.config.commands import ExportConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.solver import SolverConfig, solver_from_label
from blip3o_lit.config.trainer import PrecisionConfig
from blip3o_lit.export import export
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import bf16_is_faster, cast_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: Path) -> BLIP3oInference:
    return BLIP3oInference(run, device="cpu")


def conditions(images: int = 5) -> torch.Tensor:
    return torch.randn(images, 16, 6, generator=torch.Generator().manual_seed(1))


def test_inference_uses_the_weight_average(run):
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    loaded = load(run).translator.network.state_dict()
    assert torch.equal(loaded["output.weight"], saved["ema.output.weight"])
    assert not torch.equal(saved["ema.output.weight"], saved["network.output.weight"])


def test_batch_size_and_type_do_not_change_the_samples(model):
    whole = model.generate(conditions(), solver="heun-3")
    parts = model.generate(conditions().double().numpy(), solver="heun-3", batch_size=2)
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-5)
    again = model.generate(conditions(), solver="heun-3", seed=1)
    assert not torch.allclose(whole, again)


def test_generator_draws_the_noise(model):
    made = [
        model.generate(conditions(), 3, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])


def test_steps_and_solver_words(model):
    three = model.generate(conditions(), 3, solver="euler")
    assert torch.equal(three, model.generate(conditions(), solver="euler-3"))
    config = SolverConfig(name="euler", steps=3)
    assert torch.equal(three, model.generate(conditions(), solver=config))
    default = model.generate(conditions())
    assert torch.equal(default, model.generate(conditions(), solver="mean"))
    with pytest.raises(UserError, match="one evaluation"):
        model.generate(conditions(), 5, solver="mean")
    with pytest.raises(UserError, match="heun-10"):
        solver_from_label("heun-x")


def test_one_image_unit_length_and_intermediates(model):
    made, states = model.generate(conditions(), solver="euler-4", return_intermediate=True)
    assert len(states) == 4
    assert torch.equal(states[-1], made)
    one = model.generate(conditions()[0], solver="euler-4")
    torch.testing.assert_close(one, made[0], rtol=1e-5, atol=1e-5)
    unit = model.generate(conditions(), solver="euler-4", normalize=True)
    torch.testing.assert_close(unit.norm(dim=-1), torch.ones(5, 16))
    torch.testing.assert_close(unit * made.norm(dim=-1, keepdim=True), made)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 16, 7), r"\[2, 16, 7\], expected \[B, 16, 6\]"),
        (torch.zeros(2, 17, 6), "drop the CLS token"),
        (torch.zeros(2, 15, 6), "CLS token is missing"),
        (torch.zeros(2, 16, 6, dtype=torch.int64), "int64, expected a float"),
        (torch.zeros(6), r"\[6\], expected"),
        (torch.zeros(0, 16, 6), r"\[0, 16, 6\], expected"),
        (torch.full((1, 16, 6), float("nan")), "NaN"),
    ],
)
def test_wrong_tokens_are_refused_in_one_line(model, tokens, message):
    with pytest.raises(UserError, match=message) as refused:
        model.generate(tokens)
    assert "\n" not in str(refused.value)


def test_guidance_without_an_unconditional_branch_is_refused(model):
    with pytest.raises(UserError, match="condition_dropout"):
        model.generate(conditions(), guidance_scale=2.0)


def test_best_is_preferred_and_missing_places_are_named(run, tmp_path, monkeypatch):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt", "best.ckpt"):
        (folder / name).write_bytes(b"x")
    assert find_weights(tmp_path) == folder / "best.ckpt"
    assert find_weights(run) == run / "checkpoints/last.ckpt"
    with pytest.raises(UserError, match="no checkpoint at"):
        find_weights(tmp_path / "nothing" / "here")
    with pytest.raises(UserError, match="holds neither"):
        find_weights(folder.parent.parent / tmp_path.name / "..")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="someone/nothing is neither a path nor a model"):
        find_weights("someone/nothing")


def test_a_store_is_translated_batch_by_batch_with_its_own_noise(model):
    batches = list(model.generate_from_dataset(batch_size=20, solver="heun-2"))
    assert [len(batch["keys"]) for batch in batches] == [20, 20, 8]
    assert batches[0]["keys"][:2] == ["00000000", "00000001"]
    whole = torch.cat([batch["generated"] for batch in batches])
    again = next(model.generate_from_dataset(batch_size=48, solver="heun-2"))
    torch.testing.assert_close(whole, again["generated"], rtol=1e-5, atol=1e-5)
    first = next(model.generate_from_dataset(limit=3))
    assert first["generated"].shape == first["target"].shape == (3, 16, 4)


def test_interpolation_ends_at_both_pictures_and_shares_the_noise(model):
    ends = conditions(2)
    line = model.interpolate_embeddings(ends[0], ends[1], num_steps=5, solver="euler-3")
    assert line.shape == (5, 16, 4)
    same = torch.zeros(2, dtype=torch.int64)
    expected = model.generate(ends, solver="euler-3", sample_ids=same)
    torch.testing.assert_close(line[[0, -1]], expected, rtol=1e-5, atol=1e-5)
    still = model.interpolate_embeddings(ends[0], ends[0], num_steps=3, solver="euler-3")
    torch.testing.assert_close(still[0], still[2], rtol=1e-5, atol=1e-5)


def test_evaluate_model_is_the_evaluation(model):
    few = {"solvers": [], "curve": [], "images": 8, "baselines": "none"}
    report = model.evaluate_model(**few)
    batch = next(model.generate_from_dataset(batch_size=8, solver="mean"))
    cosine = torch.cosine_similarity(batch["generated"], batch["target"].float(), dim=-1).mean()
    assert report["estimators"]["mean"]["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    assert report["images"] == 8


def test_an_upload_over_http_comes_back_as_the_same_model(model, run, tmp_path, monkeypatch):
    with serving(tmp_path / "cache") as hub:
        assert model.push_to_hub("me/model") == f"{hub.url}/me/model"
        assert hub.private == {"me/model": True}
        files = hub.repositories["me/model"]
        assert set(files) == {"README.md", "config.json", "model.safetensors"}
        assert b"[B, 16, 6] -> [B, 16, 4]" in files["README.md"]
        assert hub.blobs  # the weights went as a large file
        loaded = BLIP3oInference("me/model", "cpu")
        assert torch.equal(loaded.generate(conditions()), model.generate(conditions()))
        begun = initial_weights(replace(model.config, init_from="me/model"), model.shape)
        assert begun is not None
        own = model.translator.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in begun.tensors.items())
        assert sum(name.startswith("network.") for name in begun.tensors) == len(
            list(model.translator.network.parameters())
        )
        assert export(ExportConfig(ckpt=str(run), push_to_hub="me/open", private=False)) is None
        assert not hub.private["me/open"]
        with pytest.raises(UserError, match="me/nothing is neither"):
            load("me/nothing")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        with pytest.raises(UserError, match="push_to_hub=me/closed: the hub refused") as refused:
            model.push_to_hub("me/closed")
        assert "\n" not in str(refused.value)


def test_weights_are_cast_once_and_the_numbers_are_autocasts(run, tmp_path):
    """Bit-equal: autocast casts the same weights at each evaluation, keeping none."""
    run = make_run(tmp_path, config=replace(small_config(), precision=PrecisionConfig("bf16")))
    cast, stored = load(run), load(run, as_stored=True)
    kinds = [{p.dtype for p in one.translator.network.parameters()} for one in (cast, stored)]
    low = {torch.bfloat16} if bf16_is_faster("cpu") else set()
    assert kinds == [{torch.float32} | low, {torch.float32}]
    for solver in ("mean", "heun-4"):
        made = [
            one.translator.generate(conditions(), torch.arange(5), 0, solver_from_label(solver))
            for one in (cast, stored)
        ]
        assert torch.equal(made[0].x1_BND, made[1].x1_BND)
    out = export(ExportConfig(ckpt=str(run), out=str(tmp_path / "shared")))
    write_export(cast, tmp_path / "written")
    for folder in (out, tmp_path / "written"):
        saved = load_file(folder / "model.safetensors")
        assert all(tensor.dtype == torch.float32 for tensor in saved.values())
        for name, tensor in stored.translator.state_dict().items():
            assert torch.equal(saved[name], tensor), name


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(width=32, depth=3, heads=4, kv_heads=4, mlp_width=64),
        ModelConfig(width=32, depth=3, heads=4, kv_heads=2, mlp_width=64, conditioning="cross"),
        ModelConfig("nextdit", 32, 3, 4, 4, 64, conditioning="cross", key_rope=False),
    ],
    ids=["aligned", "cross", "nextdit"],
)
def test_cast_weights_are_those_that_autocast_makes(model: ModelConfig) -> None:
    shape = PairShape(TokenShape((4, 4), True, 24), TokenShape((4, 4), False, 16))
    torch.manual_seed(0)
    network = build_network(model, shape).requires_grad_(False)
    for parameter in network.parameters():  # gates start at zero: nothing would be tested
        parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = torch.randn(2, 16, 16), torch.rand(2), torch.randn(2, 17, 24)
    cast = copy.deepcopy(network)
    cast_weights(cast, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(network(*inputs), cast(*inputs))
    linear = [m.weight.dtype for m in cast.modules() if isinstance(m, torch.nn.Linear)]
    assert set(linear) == {torch.bfloat16}


def test_an_export_generates_the_same_bits(run, tmp_path):
    out = export(ExportConfig(ckpt=str(run), out=str(tmp_path / "shared")))
    for solver in ("mean", "heun-4"):
        before = BLIP3oInference(run, "cpu").generate(conditions(), solver=solver)
        after = BLIP3oInference(out, "cpu").generate(conditions(), solver=solver)
        assert torch.equal(before, after)
    card = (out / "README.md").read_text()
    assert "Not evaluated" in card
    assert "[B, 16, 6] -> [B, 16, 4]" in card
    assert str(tmp_path) not in (out / "config.json").read_text() + card


def test_damaged_exports_are_refused(run, tmp_path):
    out = export(ExportConfig(ckpt=str(run), out=str(tmp_path / "shared")))
    weights = out / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        load(out)
    weights.write_bytes(whole)
    (out / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load(out)


def test_numpy_and_tensor_inputs_agree(model):
    array = conditions().numpy().astype(np.float32)
    assert torch.equal(model.generate(array), model.generate(conditions()))
