"""Words of a command line: texts as they are typed, lines that can be pasted, Ctrl-C, flags."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from blip3o_lit.base.home import expanded
from blip3o_lit.base.words import changes, override, pasteable
from blip3o_lit.cli.arguments import read_line
from blip3o_lit.cli.schema import conf_dir, groups, keys, unknown_key
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig, EvaluateDataConfig
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.train import TrainConfig

PARSER = OverridesParser.create()
LETTERS = "ab1_.,=[](){}$%#!&~'\"\\ \t\n*:;|<>?`^@/+-üé新\u00a0"
MARKS = st.text(st.sampled_from(LETTERS), max_size=12)
ANY = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=10)
ODD = st.sampled_from(
    ["null", "TRUE", "1_000", "1e3", "inf", "007", "${a}", "\\${a}", "a\\\\${", "a\\", '"', '\\"']
)
TEXTS = st.one_of(MARKS, ANY, ODD)
FOLDERS = "My Drive|lr=1e-3|新加卷|photos (1)|run[1]|cost$5|50%#1|it's|~tilde|x{1..2}|a:b|a&b|!bang"
FOLDERS += "|[ok] then|*star|ünï|2024_01_15|1e-3|true"


def arranged(words: list[str], schema: type) -> list[str]:
    """Return the words that Hydra gets of a command line."""
    return read_line(words, schema)[1]


def read(word: str) -> object:
    """Return the value that a command gets of an override."""
    return OmegaConf.create({"key": PARSER.parse_override(word).value()}).key


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_a_printed_word_is_read_back_as_the_same_value(text: str) -> None:
    (word,) = shlex.split(pasteable("out", text))
    assert word == override("out", text)
    assert read(word) == text


@settings(deadline=None, max_examples=50)
@given(TEXTS, st.lists(st.sampled_from(["heun-10@1.5", "fitted-4", "map-1"]), max_size=3))
def test_changes_lead_from_the_defaults_to_the_same_settings(text: str, solvers: list[str]) -> None:
    data = EvaluateDataConfig(text)
    config = EvaluateConfig("a.ckpt", data=data, solvers=solvers, images=7, same_data=True)
    composed = OmegaConf.structured(EvaluateConfig("a.ckpt"))
    for word in changes(config, EvaluateConfig("a.ckpt")):
        value = PARSER.parse_override(word).value()
        OmegaConf.update(composed, word.partition("=")[0], value)
    assert OmegaConf.to_object(composed) == config


def test_bash_takes_printed_words_as_they_are(tmp_path: Path) -> None:
    names = [*FOLDERS.split("|"), "a\\", "`x`", "two\nlines", "$(x)", "a  b"]
    words = [pasteable("out", name) for name in names]
    script = tmp_path / "script"
    script.write_text("printf '%s\\0' " + " ".join(words), "utf-8")
    done = subprocess.run(["bash", str(script)], capture_output=True, check=True)
    taken = done.stdout.decode().split("\0")[:-1]
    assert [str(read(word)) for word in taken] == names


def test_plain_words_are_printed_without_quotes() -> None:
    assert pasteable("data.tokens", "runs/my-tokens_2.0") == "data.tokens=runs/my-tokens_2.0"


@pytest.mark.parametrize("name", FOLDERS.split("|"))
def test_an_unquoted_name_is_taken_as_it_is_typed(name: str) -> None:
    (word,) = arranged([f"images={name}"], ExtractConfig)
    assert str(read(word)) == name


@settings(deadline=None, max_examples=300)
@given(TEXTS)
def test_a_text_is_read_as_typed_or_refused_with_a_form_that_is(text: str) -> None:
    assume("${" not in text and "\\" not in text and not text.endswith("\r"))
    assume(text.lower() != "null")
    try:
        (word,) = arranged([f"images={text}"], ExtractConfig)
    except UserError as error:
        said = str(error)
        assert said.startswith(f"images={text}: Hydra")
        assert "quote" in said
        (word,) = shlex.split(said[said.rindex(" 'images=") :].partition(", or add -m")[0])
    quoted_by_hand = text[:1] in ("'", '"')
    assert quoted_by_hand or str(read(word)) == text


def test_the_folder_of_a_run_may_have_a_comma() -> None:
    for words in (["hydra.run.dir=a,b"], ["-m", "hydra.sweep.dir=a, b"]):
        assert read(arranged(words, TrainConfig)[-1]) == words[-1].partition("=")[2]


def test_commas_keep_their_meaning_in_a_sweep() -> None:
    words = ["-m", "data.tokens=a,b", "seed=1,2"]
    assert arranged(words, TrainConfig) == words
    with pytest.raises(UserError, match=r"""'data.tokens="a=1","b=2"'"""):
        arranged(["-m", "data.tokens=a=1,b=2"], TrainConfig)


def test_stores_may_be_a_list_or_have_weights() -> None:
    for word in ("data.tokens=[a,b c]", "data.tokens={a/b: 0.7, c: 0.3}"):
        assert arranged([word], TrainConfig) == [word]
    with pytest.raises(UserError, match="Hydra reads a list: quote the value"):
        arranged(["resume=[a]"], TrainConfig)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["images=a,b"],
            """images=a,b: Hydra reads the comma as a sweep: quote the value: 'images="a,b"'""",
        ),
        (["images=[ok]"], """Hydra reads a list: quote the value: 'images="[ok]"'"""),
        (["images={a: 1}"], """a dictionary: quote the value: 'images="{a: 1}"'"""),
        (["images=choice(a,b)"], """a function: quote the value: 'images="choice(a,b)"'"""),
        (["images='x"], "Hydra can't read the value: quote it"),
        (["images=x", "out=tok\r"], "'out=tok' ends in a carriage return: .* Windows line ends"),
        (["images=x", "\r"], "Windows line ends"),
        (["images=x\udcff"], "is not UTF-8"),
        (["--max-reject-fraction=1"], "write max_reject_fraction=1"),
        (["-x"], "-x is no flag of this command"),
        (["--cfg", "all of it"], "--cfg"),
        (["--config-dir"], "expected one argument"),
    ],
)
def test_words_that_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        arranged(words, ExtractConfig)
    assert said in str(error.value) or re.search(said, str(error.value))
    assert "\n" not in str(error.value)


def test_flags_may_stand_anywhere() -> None:
    words = ["model=tiny", "--cfg", "job", "seed=1", "-m"]
    assert arranged(words, TrainConfig) == ["--cfg", "job", "-m", "model=tiny", "seed=1"]


def test_an_unknown_user_is_refused_unless_a_folder_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="neither a user no-such-user nor a folder ~no-such-user"):
        expanded("~no-such-user/x")
    Path("~no-such-user").mkdir()
    assert expanded("~no-such-user/x") == tmp_path / "~no-such-user" / "x"
    assert expanded("~/x") == Path.home() / "x"
    assert expanded("a/~b") == Path("a/~b")
    with pytest.raises(UserError, match="no-such-user2"):
        arranged(["hydra.run.dir=~no-such-user2/run"], TrainConfig)


@pytest.mark.parametrize(
    ("key", "guess"),
    [
        ("mdoel", "model"),
        ("optimzer.lr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("batch-size", "batch_size"),
        ("model.num_heads", "model.heads"),
        ("trainer.max_epoch", "trainer.max_epochs"),
        ("trainer.epochs", "trainer.max_epochs"),
        ("trainer.log_every_n_steps", "trainer.log_every"),
        ("trainer.profiler", "trainer.extra.profiler"),
        *((f"trainer.{name}", name) for name in ("precision", "strategy", "logger")),
        *((f"trainer.{name}", "") for name in ("gpus", "min_images")),
        *(
            (f"trainer.{name}", f"trainer.extra.{name}")
            for name in ("benchmark", "max_time", "min_epochs", "limit_train_batches")
        ),
        ("trainer.gradient_clip_val", "optimizer.clip_norm"),
        ("trainer.accumulate_grad_batches", "micro_batch_size"),
        ("trainer.default_root_dir", "hydra.run.dir"),
        ("learning_rate", ""),
        ("data.path", ""),
    ],
)
def test_a_guess_is_near_or_not_made(key: str, guess: str) -> None:
    said = unknown_key(key, set(keys(TrainConfig)) | set(groups(conf_dir())))
    hint = f"did you mean {guess}?" if guess else "--help lists the keys"
    assert said == f"{key} is not a key of this command: {hint}"


TWICE = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
saved = []
def twice(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith(".ckpt"):
        saved.append(arguments[1])
        if len(saved) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(twice)
sys.argv = ["train", *WORDS.split()]
runpy.run_module("blip3o_lit.train", run_name="__main__")
"""


def test_a_second_ctrl_c_ends_a_run_at_once_and_says_how_it_goes_on(tmp_path: Path) -> None:
    words = "data=linear_gaussian model=tiny model.depth=1 precision=fp32 trainer.max_steps=50"
    words += " data.linear_gaussian.images=64 data.linear_gaussian.validation_images=8"
    words += " batch_size=8 evaluation.images=8 checkpoint.every=2 hydra.run.dir=run"
    words += " trainer.accelerator=cpu logger=csv"
    code = TWICE.replace("WORDS", repr(words))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 130, done.stderr
    said = done.stderr.strip().splitlines()[-1]
    word = pasteable("hydra.run.dir", tmp_path / "run")
    assert said == f"stopped: to go on, give the same command with resume=auto {word}"
    assert "Traceback" not in done.stderr


INTERRUPTED = """
import os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
class Finder:
    armed = True
    def find_spec(self, name, path=None, target=None):
        if name == MODULE and self.armed:
            self.armed = False
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
sys.argv = WORDS
runpy.run_module(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "module", "words"),
    [
        ("train", "hydra", ""),
        ("train", "lightning", "hydra.run.dir=run"),
        ("train", "blip3o_lit.cli.sweeps.launcher", "-m seed=1,2"),
        ("extract", "omegaconf", ""),
        ("extract", "torch", "images=photos out=tok"),
        ("evaluate", "torch", "ckpt=run"),
        ("generate", "torch", "ckpt=run tokens=tok out=gen"),
        ("export", "torch", "ckpt=run out=exported"),
        ("convert", "numpy", "source=x.pkl out=tok"),
        ("doctor", "torch", ""),
    ],
)
def test_ctrl_c_is_one_line_and_130(command: str, module: str, words: str, tmp_path: Path) -> None:
    argv = [f"blip3o_lit.{command}", *words.split()]
    code = INTERRUPTED.replace("MODULE", repr(module)).replace("WORDS", repr(argv))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 130, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("stopped: ")
    assert "give the same" in lines[0]
