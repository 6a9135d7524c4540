import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, QUIET
from made_report import HOSTILE, Page, evaluation
from PIL import Image

from blip3o_lit.config.errors import UserError
from blip3o_lit.report import charts, templating, tradeoffs
from blip3o_lit.report.__main__ import main
from blip3o_lit.report.about_run import differences
from blip3o_lit.report.held_out import sampling
from blip3o_lit.report.page import write_report
from blip3o_lit.report.record import ROWS, RunRecord
from blip3o_lit.report.scores import Row, rows, significant
from blip3o_lit.report.templating import theme


def make_run(folder: Path, evaluated: bool = True) -> Path:
    folder.mkdir(parents=True)
    if evaluated:
        (folder / "evaluation.json").write_text(json.dumps(evaluation()))
    columns = "step,train/loss,train/cosine,val/cosine,train/lr,train/grad_norm,"
    lines = [columns + "train/tokens_per_s,train/data_wait"]
    for step in range(10, 1001, 10):
        validation = "0.9741" if step % 500 == 0 else ""
        lines.append(f"{step},{3 / step},{1 - 3 / step},{validation},0.0003,0.52,11234.5,0.011")
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text("model:\n  width: 256\noptimizer:\n  lr: 0.0003\n")
    (folder / "overrides.txt").write_text("experiment=demo\nlogger=[csv,wandb]\n")
    (folder / "environment.json").write_text(json.dumps({"python": "3.11.7", "commit": "5bcb826"}))
    (folder / "result.json").write_text(json.dumps({"finished": True, "step": 1000, "note": None}))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "demo-run")
    write_report(folder)
    return folder


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


def test_page_is_whole_small_and_loads_nothing(run: Path) -> None:
    text = (run / "report.html").read_text("utf-8")
    assert len(text) < 5_000_000
    found = Page(text)
    assert found.open == []
    for _, attributes in found.elements:
        for name in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:"))
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in found.all("meta") if "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert policy.count("'sha256-") == 2


def test_policy_allows_exactly_the_scripts_of_the_page(run: Path) -> None:
    text = (run / "report.html").read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    assert len(scripts) == 2
    assert all(templating._hash(script) in text for script in scripts)


def test_every_number_of_the_evaluation_stands_on_the_page(run: Path) -> None:
    text = read(run).text
    report = evaluation()
    for block in ("estimators", "baselines"):
        for row in report[block].values():
            for name in ("cosine", "cosine_centred", "cosine_pooled", "cosine_cls", "r2"):
                assert f"{row[name]:.4f}" in text
            for name in ("frechet", "mse"):
                assert significant(row[name]) in text
            low, high = row["cosine_ci95"]
            assert f"{low:.4f}\N{EN DASH}{high:.4f}" in text
    for line in report["position_cosine"]:
        assert all(f"{value:.3f}" in text for value in line)
    for point in report["nfe_curve"]:
        assert significant(point["cosine"]) in text
    for number in ("0.613", "0.917", "0.551", "0.2223"):
        assert number in text
    for number in ("0.432", "0.443", "0.810", "130", "0.6123", "0.6667", "0.9444", "0.3131"):
        assert number in text
    for number in ("0.01230", "0.0009000", "0.7007", "0.9911", "42.5"):
        assert number in text
    for words in ("a red seven", "img-1", "surprise.depth.answer", "rival", "a two"):
        assert words in text


def test_the_page_opens_with_rows_of_drawn_tokens(run: Path) -> None:
    found = read(run)
    assert found.text.index("Pictures") < found.text.index("Result")
    strips = [a for a in found.all("figure") if a.get("class") == "drawn"]
    assert len(strips) == 3
    words = [a["alt"] for a in found.all("img") if "img-worst" in (a.get("alt") or "")]
    labels = ("picture", "true tokens", "mean", "sample 1", "sample 2")
    assert words == [f"{label} of worst: img-worst" for label in labels]
    for number in ("0.9876", "0.9765", "28.41", "26.72", "33.9 dB", "33.87 dB"):
        assert number in found.text
    for number in ("0.9219", "0.6875", "97.1 %", "2.312", "3.938"):
        assert number in found.text


def test_the_drawn_rows_are_written_as_one_picture(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "drawn.png"
    assert main([str(run), "--drawings", str(target)]) == 0
    with Image.open(target) as picture:
        assert picture.width > 5 * 128  # five pictures side by side
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation(), "drawings": {}}))
    assert main([str(tmp_path), "--drawings", str(target)]) == 2


def test_rows_of_fewer_images_say_so_and_their_distances_stand_apart(tmp_path: Path) -> None:
    report = evaluation()
    solver = next(name for name in report["estimators"] if name != report["headline"])
    report["estimators"][solver]["images"] = 64
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    scored = rows(RunRecord.load(tmp_path))
    few = next(row for row in scored if row.key == solver)
    assert [row.key for row in scored if row.apart] == [solver]
    assert few.label.endswith(" (64 images)")
    section = sampling(RunRecord.load(tmp_path))
    assert section is not None
    assert few.label not in json.dumps(section.charts["plane"])
    write_report(tmp_path)
    assert "rows of fewer images are not drawn here" in read(tmp_path).text


def test_a_page_without_pictures_says_why(tmp_path: Path) -> None:
    report = {**evaluation(), "drawings": {"why_not": "the token store has no thumbnails"}}
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    write_report(tmp_path)
    found = read(tmp_path)
    assert "No pictures of tokens: the token store has no thumbnails." in found.text
    assert "The hidden half" not in found.text


def test_pictures_that_are_no_data_urls_are_left_out(tmp_path: Path) -> None:
    report = evaluation()
    for row in report["drawings"]["rows"]:
        for drawing in row["drawings"]:
            drawing["picture"] = "https://example.org/a.png"
    (tmp_path / "evaluation.json").write_text(json.dumps(report))
    write_report(tmp_path)
    assert "example.org" not in (tmp_path / "report.html").read_text("utf-8")


def test_numbers_name_what_they_belong_to(run: Path) -> None:
    """Once at the top for all; where the images are others, there too."""
    found = read(run)
    about = "512 images of validation, cls_patch, checkpoint 3f2a91c0bb77, tokens 77ab01c2d3e4"
    assert found.text.count(about) == 1
    assert found.text.index(about) < found.text.index("Result")
    assert len([a for a in found.all("article") if a.get("class") == "tile"]) == 5
    assert "The tiles show Posterior mean, 1 NFE" in found.text
    assert found.text.count("Solvers on 64 images.") == 2
    assert "conditions are swapped (64 images)" in found.text
    assert "Heun, 10 steps, 48 images." in found.text
    phrase = evaluation()["standing"]
    assert found.text.count("excellent") == found.text.count(phrase) == 2, "no word without place"


def test_tables_have_headers_captions_and_sort_buttons(run: Path) -> None:
    text = (run / "report.html").read_text("utf-8")
    found = Page(text)
    assert text.count("<caption>") == len(found.all("table"))
    assert all(cell.get("scope") in ("col", "row") for cell in found.all("th"))
    buttons = [button for button in found.all("button") if "data-column" in button]
    assert len(buttons) >= 11
    assert [b["data-column"] for b in buttons[:3]] == ["0", "1", "2"]
    first = re.search(r"<tbody>(.*?)</tbody>", text, re.S)
    assert first is not None
    for line in re.findall(r"<tr.*?</tr>", first[1], re.S):
        assert line.count("data-value=") == line.count("<td") + line.count("<th")
    identifiers = [attrs["id"] for _, attrs in found.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    for link in found.all("a"):
        assert (link["href"] or "")[1:] in identifiers


def test_every_chart_has_a_place_a_description_and_both_themes(run: Path) -> None:
    found = read(run)
    data = json.loads(found.data["charts"])
    places = [attrs["data-chart"] for attrs in found.all("div") if "data-chart" in attrs]
    assert sorted(places) == sorted(data["specs"])
    assert {"ladder", "positions", "nfe-cosine", "nfe-frechet", "plane"} <= set(places)
    assert {"curve-loss", "curve-cosine", "curve-lr", "curve-grad"} <= set(places)
    assert data["themes"] == {"light": theme(), "dark": theme(dark=True)}
    for spec in data["specs"].values():
        assert len(spec["description"]) > 20
        assert "$schema" not in spec
        assert "#" not in json.dumps(spec)  # colours belong to the theme


def test_map_has_one_colour_range_for_all_runs() -> None:
    drawn = charts.position_map([[0.5, 0.6], [0.7, 0.8]], "cosine", 0.4)
    patches = drawn["vconcat"][1]
    scale = patches["encoding"]["color"]["scale"]
    assert scale["domainMin"] == {"expr": "stretch ? 0.5 : 0"}
    assert scale["domainMax"] == {"expr": "stretch ? 0.8 : 1"}
    assert drawn["params"][0]["value"] is False
    assert {"row": 1, "column": 0, "value": 0.7} in patches["data"]["values"]
    own = charts.position_map([[0.5, 0.6], [0.7, 0.8]], "cosine", 0.4, shared=False)
    scale = own["vconcat"][1]["encoding"]["color"]["scale"]
    assert (scale["domainMin"], scale["domainMax"]) == (0.4, 0.8)
    assert "params" not in own


def test_strings_of_a_run_are_escaped(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run <b>bold</b>")
    report = evaluation()
    report["standing"] = report["split"] = report["checkpoint"] = report["mode"] = HOSTILE
    report["estimators"][HOSTILE] = report["estimators"].pop("heun-10")
    report["baselines"][HOSTILE] = report["baselines"].pop("ridge")
    report["nfe_curve"][0]["solver"] = HOSTILE
    report["retrieval"][HOSTILE] = {HOSTILE: {HOSTILE: 0.5}}
    report["worst"][0] = dict.fromkeys(("key", "caption", "source"), HOSTILE)
    report["examples"]["best"] = [dict.fromkeys(("key", "caption", "picture"), HOSTILE)]
    hostile = dict.fromkeys(("label", "picture"), HOSTILE)
    report["drawings"]["rows"] = [{"title": HOSTILE, "drawings": [hostile]}]
    report["drawings"]["by"] = HOSTILE
    report["drawings"]["hidden_half"]["shares"][HOSTILE] = {"digit": 0.5}
    report["samples"][HOSTILE] = report["paired"]["run"] = report["surprise"] = HOSTILE
    (run / "evaluation.json").write_text(json.dumps(report))
    (run / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    (run / "overrides.txt").write_text(f"note={HOSTILE}\n")
    for name in ("environment.json", "result.json"):
        (run / name).write_text(json.dumps({HOSTILE: HOSTILE, "commit": HOSTILE}))
    text = write_report(run).read_text("utf-8")
    found = Page(text)
    assert found.open == []
    assert not found.all("img")
    assert not found.all("b")
    assert len(found.all("script")) == 3
    assert all(not name.startswith("on") for _, attrs in found.elements for name in attrs)
    assert HOSTILE in found.text
    assert "run <b>bold</b>" in found.text
    json.loads(found.data["charts"])


def test_an_evaluation_is_repeated_as_it_was_given(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    scored = json.loads((run / "evaluation.json").read_text("utf-8"))
    given = {"ckpt": "a run/last.ckpt", "overrides": ["baselines=all", "solvers=[ab2-4]"]}
    (run / "evaluation.json").write_text(json.dumps(scored | given))
    line = "blip3o_lit.evaluate 'ckpt=\"a run/last.ckpt\"' baselines=all 'solvers=[ab2-4]'"
    assert line in Page(write_report(run).read_text("utf-8")).text


def test_run_without_evaluation_says_how_to_get_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", evaluated=False)
    (run / "checkpoints").mkdir()
    for name in ("best", "last"):
        (run / "checkpoints" / f"{name}.ckpt").touch()
    found = Page(write_report(run).read_text("utf-8"))
    best = run / "checkpoints" / "best.ckpt"
    assert f"python -m blip3o_lit.evaluate ckpt={best}" in found.text
    assert "curve-loss" in found.data["charts"]
    assert not [a for a in found.all("article") if a.get("class") == "tile"]


BLOCKS = [{name} for name in ("estimators", "baselines", "nfe_curve", "position_cosine")]
BLOCKS.append({"split", "images", "mode", "tokens", "checkpoint", "headline", "standing"})
BLOCKS.append({"retrieval", "frechet_floor"})
BLOCKS.append({"zero_shot", "samples", "time_bins", "paired", "worst", "examples", "surprise"})


@pytest.mark.parametrize("blocks", BLOCKS)
def test_any_block_may_be_missing(blocks: set[str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    report = evaluation()
    for block in blocks:
        del report[block]
    (run / "evaluation.json").write_text(json.dumps(report))
    found = Page(write_report(run).read_text("utf-8"))
    assert found.open == []
    assert "0.8893" in found.text or blocks == {"baselines"}


def test_empty_directory_still_makes_a_page(tmp_path: Path) -> None:
    found = Page(write_report(tmp_path).read_text("utf-8"))
    assert json.loads(found.data["charts"])["specs"] == {}
    for name in ("metrics.csv", "config.yaml", "environment.json", "result.json"):
        assert name in found.text
    assert "python -m blip3o_lit.train" in found.text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("evaluation.json", '{"split": '),
        ("result.json", "[1, 2]"),
        ("environment.json", b"\xff\xfe"),
        ("config.yaml", "a: [1,\nb: }"),
    ],
)
def test_a_broken_file_is_named_in_one_line(name: str, content, tmp_path: Path) -> None:
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=name) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_directory_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert "nothing is not a run directory" in capsys.readouterr().err


def test_command_quotes_overrides_for_the_shell(tmp_path: Path) -> None:
    (tmp_path / "overrides.txt").write_text("- model=base\nlogger=[csv,wandb]\nnote=a b'c\n")
    command = RunRecord.load(tmp_path).train_command
    echo = "import sys; print('|'.join(sys.argv[1:]))"
    start = f"{sys.executable} -c {json.dumps(echo)}"
    line = command.replace("python -m blip3o_lit.train", start)
    said = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "model=base|logger=[csv,wandb]|note=a b'c"


def test_configuration_tells_presets_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 5\nbatch_size: 32\nmodel:\n  width: 99\n")
    (tmp_path / "overrides.txt").write_text("model=tiny\nseed=5\n")
    lines = {line[0]: line[1:] for line in differences(RunRecord.load(tmp_path))}
    assert lines["seed"] == ["0", "5", "command line"]
    assert lines["model.width"][1:] == ["99", "preset"]
    assert "batch_size" not in lines


def test_curves_skip_empty_cells_and_keep_local_means(tmp_path: Path) -> None:
    lines = ["step,train/loss,lr"]
    lines += [f"{step},{'nan' if step % 2 else step},0.1" for step in range(4 * ROWS)]
    (tmp_path / "metrics.csv").write_text("\n".join(lines) + "\n")
    record = RunRecord.load(tmp_path)
    loss = record.curve("train/loss")
    assert len(loss) <= ROWS
    assert [value for _, value in loss[:2]] == [1.0, 5.0]  # means of 0 2 and 4 6
    assert loss[0][0] == 2
    assert record.curve("lr")[-1] == (4 * ROWS - 1, pytest.approx(0.1))
    assert record.curve("absent") == []


def test_baselines_far_from_the_curve_have_no_rule_but_their_value(run: Path) -> None:
    record = RunRecord.load(run)
    spec = tradeoffs.against_nfe(record.evaluation["nfe_curve"], rows(record), "cosine", "cosine")
    assert spec is not None
    rules = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "rule")
    drawn = [rule["name"] for rule in rules["data"]["values"]]
    assert drawn == ["Noise-free transformer 0.9862"]
    named = rules["encoding"]["strokeDash"]["scale"]["domain"]
    assert set(drawn) < set(named)
    assert "\N{DOWNWARDS ARROW} Mean token 0.7512" in named
    assert len(named) == 4


def test_frechet_distances_of_unequal_numbers_of_images_share_no_chart(run: Path) -> None:
    record = RunRecord.load(run)
    curve = record.evaluation["nfe_curve"]
    found = rows(record)
    drawn = json.dumps(tradeoffs.against_nfe(curve, found, "frechet", "distance"))
    assert "Ridge" not in drawn
    assert "Posterior mean" not in drawn
    assert "which have others, are not drawn here" in read(run).text
    equal = [{**point, "images": 512} for point in curve]
    drawn = json.dumps(tradeoffs.against_nfe(equal, found, "frechet", "distance"))
    assert "Ridge" in drawn
    assert "Posterior mean" in drawn


@pytest.mark.parametrize("far", [4.009, 0.2], ids=["logarithmic", "linear"])
def test_the_plane_names_every_row_and_spans_decades_by_a_logarithm(far: float) -> None:
    named = {"Posterior mean": 0.0738, "Adams-Bashforth, 4 steps": 0.0721, "Mean token": far}
    spec = tradeoffs.plane(
        [Row(name, "estimator", name, {"cosine": 0.9, "frechet": x}) for name, x in named.items()]
    )
    assert spec is not None
    assert spec["encoding"]["x"]["scale"].get("type") == ("log" if far > 1 else None)
    for channel in ("color", "shape"):
        assert spec["encoding"][channel]["scale"]["domain"] == list(named)


def test_picture_is_a_png_of_the_main_charts(run: Path, tmp_path: Path, capsys) -> None:
    target = tmp_path / "docs" / "demo.png"
    assert main([str(run), "--picture", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    raw = target.read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", raw[16:24])
    assert width > 1500
    assert height > 800


def test_picture_of_a_run_without_evaluation_is_refused(tmp_path: Path, capsys) -> None:
    assert main([str(tmp_path), "--picture", str(tmp_path / "x.png")]) == 2
    assert "python -m blip3o_lit.evaluate" in capsys.readouterr().err


PROBE = """<!DOCTYPE html><meta charset="utf-8"><pre id="out"></pre>
<iframe id="frame" src="report.html" width="390" height="800"></iframe>
<script>
const problems = [];
const frame = document.getElementById("frame");
function probe(inside) {
  const table = inside.getElementById("scores");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].dataset.value);
  const before = names();
  const button = table.querySelector("button[data-column='1']");
  button.focus();
  const focused = inside.activeElement === button;
  button.click();
  const falling = names();
  button.click();
  const cell = inside.querySelector("[data-chart='positions'] path[aria-label*='cosine: ']");
  for (const name of ["pointerover", "mouseover", "pointermove", "mousemove"]) {
    const where = { bubbles: true, clientX: 50, clientY: 50 };
    cell.dispatchEvent(new frame.contentWindow.MouseEvent(name, where));
  }
  const tooltip = inside.getElementById("vg-tooltip-element");
  const count = (selector) => inside.querySelectorAll(selector).length;
  return {
    before, falling, rising: names(), focused, problems,
    tooltip: tooltip ? tooltip.textContent : "",
    sort: button.closest("th").getAttribute("aria-sort"),
    places: count("[data-chart]"),
    drawn: count("[data-chart] svg"),
    labelled: count("[data-chart][aria-label] svg"),
    cells: count("[data-chart='positions'] path[aria-label*='cosine: ']"),
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map((e) => e.name),
    overflow: inside.documentElement.scrollWidth,
    width: inside.documentElement.clientWidth,
  };
}
let tries = 0;
const timer = setInterval(() => {
  const inside = frame.contentDocument;
  if (!inside || !inside.querySelector("table")) return;
  const waiting = [...inside.querySelectorAll("[data-chart]")].some((p) => !p.querySelector("svg"));
  if (waiting && ++tries < 100) return;
  clearInterval(timer);
  document.getElementById("out").textContent = JSON.stringify(probe(inside));
}, 100);
frame.contentWindow.addEventListener("securitypolicyviolation", (event) => problems.push(event));
</script>"""


def test_page_in_a_browser(run: Path, tmp_path: Path) -> None:
    """With Chromium: all charts drawn, sorting works, no error, no request, no sideways scroll.

    Without it, the scripts and the data that they read are at least there.
    """
    found = read(run)
    places = [attrs for attrs in found.all("div") if "data-chart" in attrs]
    if CHROMIUM is None:
        assert len(places) == len(json.loads(found.data["charts"])["specs"])
        return
    probe = run / "probe.html"
    probe.write_text(PROBE)
    done = subprocess.run(
        [
            CHROMIUM,
            *QUIET,
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--virtual-time-budget=20000",
            "--dump-dom",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    out = re.search(r'<pre id="out">(.*?)</pre>', done.stdout, re.S)
    assert out is not None
    assert out[1], done.stderr[-2000:]
    seen = json.loads(out[1])
    assert seen["places"] == seen["drawn"] == seen["labelled"] == len(places)
    assert seen["cells"] == 257  # and CLS
    assert "cosine" in seen["tooltip"]
    assert re.search(r"0\.\d{4}", seen["tooltip"])
    assert seen["problems"] == []
    assert seen["focused"]
    assert seen["falling"][0] == "Noise-free transformer"
    assert seen["rising"] == seen["falling"][::-1]
    assert seen["sort"] == "ascending"
    assert seen["before"][0] == "Posterior mean"
    assert seen["overflow"] <= seen["width"]
    assert seen["fetched"] == []
