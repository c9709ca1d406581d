"""`flashlib cost`: what it prints, how fast, and what it refuses."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flashlib.cli import app
from flashlib.cost.devices import device
from flashlib.cost.models import model
from flashlib.cost.steps import StepCost, decode
from flashlib.measure.records.record import load_record

ASKED = ["cost", "--model", "llama-3-8b", "--phase", "decode", "--batch", "64", "--context", "32768", "--gpu", "h200"]
HEAVY = [
    "torch",
    "triton",
    "numpy",
    "matplotlib",
    "transformers",
    "pandas",
    "scipy",
    "jupyter",
    "IPython",
    "ipywidgets",
    "pytest",
]
MOST_MODULES = 450


def _run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_a_cold_start_imports_little(record_property) -> None:
    """What makes a cold start slow is what it imports: nothing that takes a tenth of a second, and few modules. The time is noted, and in a record."""
    script = f"""
import sys, time
from flashlib.cli import app
app({ASKED!r}, standalone_mode=False)
print(time.process_time(), len(sys.modules), *sorted({{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r})), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    seconds, modules, *heavy = done.stderr.split()
    record_property("processor_seconds", float(seconds))
    assert heavy == [] and int(modules) < MOST_MODULES
    assert "llama-3-8b, decode: 64 x 1 new tokens" in done.stdout


def test_a_cold_start_took_less_than_two_seconds_where_it_was_timed() -> None:
    """On one core of a small server, the interpreter's own start counted: python benchmarks/cost_start.py."""
    (row,) = load_record("cpu/cost_start").rows
    assert row["seconds"] < 2 and row["runs"] >= 5 and row["command"].startswith("flashlib cost --model llama-3-8b")


def test_json_is_what_the_library_says() -> None:
    told = json.loads(_run(*ASKED, "--json").stdout)
    cost = StepCost.of(model("llama-3-8b"), decode(64, 32768), device("h200"))
    assert told["seconds"] == cost.seconds and told["joules"] == cost.joules
    assert told["seconds"] == pytest.approx(sum(part["seconds"] for part in told["parts"].values()))
    flops = told["attention_flops"]
    assert flops["exact"]["total"] == 32 * 64 * 32 * 32768 * 4 * 128
    assert flops["corrected x3"]["total"] == flops["original x3"]["total"] == 3 * flops["exact"]["total"]
    assert told["memory"]["fits"] is False and told["memory"]["max_batch"] < 64
    # What is said to fit does, and one more does not.
    most = str(told["memory"]["max_batch"])
    assert json.loads(_run(*ASKED, "--batch", most, "--json").stdout)["memory"]["fits"] is True
    assert json.loads(_run(*ASKED, "--batch", str(int(most) + 1), "--json").stdout)["memory"]["fits"] is False


def test_table_tells_time_memory_and_ways_of_counting() -> None:
    text = _run(*ASKED).stdout
    for word in ("attention", "projections", "whole step", "tokens/s", "does NOT fit", "waits for", "corrected x3"):
        assert word in text, word


def test_devices_and_models_side_by_side() -> None:
    lines = _run("cost", "--phase", "prefill", "--compare", "h100,a100,epyc-9654,gemma-2-9b").stdout.splitlines()
    rows = [line.split() for line in lines[4:]]
    assert [row[:2] for row in rows] == [
        *(["llama-3-8b", name] for name in ("h200", "h100", "a100", "epyc-9654")),
        ["gemma-2-9b", "h200"],
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--phase", "chunked", "--batch", "8", "--chunk", "256"],
        ["--phase", "speculative", "--drafted", "3", "--page-size", "16"],
        ["--model", "deepseek-v3", "--tensor", "8", "--no-absorb", "--cache", "fp8"],
        ["--model", "gpt-oss-20b", "--weights", "mxfp4", "--context-parallel", "2", "--phase", "prefill"],
        ["--gpu", "xeon-8480", "--dtype", "fp32", "--model", "smollm2-135m"],
        ["--sequence", "4", "--phase", "prefill", "--model", "qwen3-32b", "--gpu", "a100"],
    ],
)
def test_every_option_has_an_answer(arguments) -> None:
    answer = _run("cost", *arguments)
    assert answer.exit_code == 0, answer.output
    assert "tokens/s" in answer.stdout


def test_a_config_file_is_a_model(tmp_path) -> None:
    path = tmp_path / "mine" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000}))  # fmt: skip
    told = json.loads(_run("cost", "--model", str(path), "--json").stdout)
    assert told["model"] == "mine"
    assert told["parameters"] == 2 * 256 * 1000 + 2 * (4 * 256 * 256 + 3 * 256 * 512 + 2 * 256) + 256


def test_the_picture_is_drawn(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "roofs.svg"
    answer = _run("cost", "--plot", str(path))
    assert answer.exit_code == 0, answer.output
    drawn = path.read_text(encoding="utf-8")
    assert drawn.startswith("<?xml") and "tensor cores, data sheet" in drawn
    refused = _run("cost", "--plot", str(tmp_path / "roofs.xyz"))
    assert refused.exit_code == 1 and "must name a file that ends with one of" in refused.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama"], "there is no model 'lama'"),
        (["--gpu", "h201"], "there is no device 'h201'"),
        (["--phase", "training"], "phase must be one of"),
        (["--batch", "0"], "count must be at least 1; got 0"),
        (["--context", "-3"], "context must be at least 1; got -3"),
        (["--tensor", "5"], "must divide the 32 query heads; got 5"),
        (["--dtype", "fp8", "--gpu", "a100"], "dtype must be one of"),
        (["--weights", "int3"], "weights must be one of"),
        (["--compare", "h200,h199"], "there is no model 'h199'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(arguments, message) -> None:
    answer = _run("cost", *arguments)
    assert answer.exit_code == 1
    assert message in answer.output and "Traceback" not in answer.output


def test_what_is_known_is_listed() -> None:
    text = _run("cost", "--list").stdout
    assert "deepseek-v3" in text and "rtx-4090" in text


def test_what_ranks_send_on_paper() -> None:
    told = _run("cost", "--parallel", "ring=8", "--link", "nvlink4", "--context", "131072")
    assert told.exit_code == 0, told.output
    for part in ("ring=8 on NVIDIA H200", "zigzag", "contiguous", "4,096", "hybrid: pays up to", "All of it on paper"):
        assert part in told.output
    found = json.loads(_run("cost", "--parallel", "hybrid=4x8", "--json").output)
    assert found["on_paper"] and found["chosen"]["zigzag"]["devices"] == 32
    assert found["stops_paying"]["hybrid"] >= found["stops_paying"]["ring"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parallel", "ring"], "parallel must be ring=N, all_to_all=N, gather=N or hybrid=RxN; got 'ring'"),
        (["--parallel", "ring=0"], "parallel must be at least 1; got 0"),
        (["--parallel", "hybrid=8"], "got 'hybrid=8'"),
        (["--parallel", "all_to_all=64"], "must divide the 32 query heads; got 64"),
        (["--parallel", "ring=8", "--link", "string"], "link must be one of nvlink4"),
    ],
)
def test_what_parallel_refuses(arguments, message) -> None:
    told = _run("cost", *arguments)
    assert told.exit_code == 1 and message in told.output
