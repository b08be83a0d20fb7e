# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks: the arithmetic by hand, the order of calls, the refusals, and one tiny run of each from end to end."""

import json
import subprocess
import sys

import pytest
import torch
from kernel_tests import require_green_tests
from training_helpers import REPOSITORY, TINY_PEER

from modeling_peer import PeerLayer
from modeling_peer.benchmarks import contenders, layer, memory, model, report
from modeling_peer.benchmarks.calls import make_call, make_tokens
from modeling_peer.benchmarks.contenders import all_names, build_contenders
from modeling_peer.benchmarks.layer import bench_layer
from modeling_peer.benchmarks.model import ModelBenchmark, bench_model
from modeling_peer.benchmarks.settings import TASKS, Case, LayerArguments, parse_cases, parse_settings
from modeling_peer.benchmarks.traffic import bytes_to_move, count_rows, measure_traffic
from modeling_peer.benchmarks.usage_overhead import bench_expert_usage
from modeling_peer.console.errors import SettingsError
from modeling_peer.console.scripts import run_script
from modeling_peer.costs import timing
from modeling_peer.costs.memory import peak_bytes
from modeling_peer.costs.provenance import describe_versions
from modeling_peer.costs.timing import interleave, summarize

SIZES = {"hidden_size": 8, "num_retrieval_heads": 2, "num_experts_per_head": 2, "query_dim": 4}


@pytest.fixture
def test_file(tmp_path):
    """Write a test file; its path."""

    def write(body):
        path = tmp_path / "test_of_kernels.py"
        path.write_text(body)
        return str(path)

    return write


def tiny_layer(**options):
    return LayerArguments(**{**SIZES, "threads": 1, "repeats": 2, **options})


def test_bytes_that_must_move_are_those_counted_by_hand():
    # 6 rows of 10 bytes, tokens of 100 bytes, weights of 1000 bytes
    forward = 60 + 100 + 100 + 1000  # rows, tokens in, tokens out, weights
    backward = (
        60 + 60 + 100 + 100 + 100 + 1000 + 1000
    )  # rows and their gradients, tokens, 2 gradients, weights, theirs
    update = 7 * (60 + 1000)
    sizes = {"rows_read": 6, "rows_touched": 6, "row_bytes": 10, "token_bytes": 100, "weight_bytes": 1000}
    expected = (forward, forward, forward + backward, forward + backward + update)
    assert tuple(bytes_to_move(task, **sizes) for task in TASKS) == expected
    # without reuse 9 rows are read, and 9 gradients added; an update still touches 6
    assert bytes_to_move("step", **{**sizes, "rows_read": 9}) == expected[-1] + 3 * 3 * 10


@pytest.mark.parametrize("name", ["eager", "PEER-pytorch"])
def test_rows_are_counted_on_the_retrieval_of_the_layer_itself(name):
    settings, case = tiny_layer(), Case("forward", num_tokens=50, num_sub_keys=3, hidden_size=8)
    contender = build_contenders([name], case, settings)[name]
    tokens = make_tokens(case, settings, 0)
    rows = count_rows(contender, tokens)
    assert rows.requested == 2 * 50 * 2 * 2  # two tables, tokens, heads, experts per head
    assert 0 < rows.distinct <= 2 * 9  # all that there are
    one = count_rows(contender, tokens[:, :1])
    assert 2 * 2 <= one.distinct <= one.requested == 2 * 2 * 2  # the experts of one head differ


def test_traffic_is_relative_to_the_copy_bandwidth():
    settings, case = tiny_layer(), Case("forward", num_tokens=5, num_sub_keys=3, hidden_size=8)
    dense = build_contenders(["dense h·k"], case, settings)["dense h·k"]
    traffic = measure_traffic(dense, case, count_rows(dense, make_tokens(case, settings, 0)), 1.0, 1e6)
    must_move = 4 * (2 * 8 * 4 + 2 * 5 * 8)  # float32: two matrices of 8 by h * k = 4, five tokens in and out
    assert traffic["must_move_bytes"] == traffic["requested_bytes"] == must_move
    assert traffic["percent_of_copy_bandwidth"] == pytest.approx(100 * must_move * 1000 / 1e6, abs=0.01)


def test_a_summary_is_the_median_and_the_quartiles_in_milliseconds():
    summary = summarize([0.005, 0.001, 0.002, 0.004, 0.003])
    assert list(summary.as_dict().values()) == pytest.approx([3, 2, 4, 5])


def measure(durations, repeats, max_seconds, **options):
    """Interleave calls that take `durations` by a clock that does not tick; what was called, on what."""
    called = []
    calls = {name: lambda number, name=name: called.append((name, number)) for name in durations}

    def clock(call):
        before = len(called)
        call()
        return sum(durations[name] for name, _ in called[before:])

    return called, interleave(calls, lambda number: number, clock, repeats, max_seconds, **options)


def test_contenders_take_turns_and_never_see_an_input_twice():
    called, summaries = measure({"a": 0.1, "b": 0.2, "c": 0.3}, repeats=2, max_seconds=100)
    names = [name for name, _ in called]
    assert names == ["a", "a", "b", "b", "c", "c", *"abc", *"abc"]  # two calls each to warm up, which do not count
    assert [number for _, number in called] == list(range(12))
    assert {name: summary.repeats for name, summary in summaries.items()} == {"a": 2, "b": 2, "c": 2}
    assert summaries["c"].median_ms == pytest.approx(300)


def test_a_slow_contender_gets_fewer_repeats_spread_over_all_rounds():
    called, summaries = measure({"fast": 0.001, "slow": 1.0, "slower": 5.0}, repeats=12, max_seconds=18)
    assert {name: summary.repeats for name, summary in summaries.items()} == {"fast": 12, "slow": 6, "slower": 3}
    names = [name for name, _ in called][6:]
    rounds = [[]]
    for name in names:
        rounds.extend([[]] if name == "fast" else [])
        rounds[-1].append(name)
    assert [i for i, names in enumerate(rounds[1:]) if "slower" in names] == [0, 4, 8]


def test_short_calls_are_measured_several_in_a_row():
    called, summaries = measure({"short": 0.25, "long": 3.0}, repeats=1, max_seconds=100, min_seconds=1.0)
    assert [name for name, _ in called] == ["short", "short", "long", "long", *["short"] * 4, "long"]
    assert summaries["short"].median_ms == pytest.approx(250)


def test_copying_is_measured_in_bytes_per_second(monkeypatch):
    monkeypatch.setitem(timing.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setattr(timing.Clock, "__call__", lambda self, call: call() is None or 0.5)
    assert timing.copy_bandwidth(torch.device("cpu")) == pytest.approx(2 * 2**20 / 0.5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def test_it():\n    assert False, 'wrong result'\n", "not green, nothing is measured.*wrong result"),
        ("import pytest\ndef test_it():\n    pytest.skip('no GPU')\n", "not green.*1 skipped"),  # proves nothing
        ("import no_such_module\n", "not green"),
    ],
    ids=["red", "skipped", "broken"],
)
def test_nothing_is_measured_when_kernel_tests_are_not_green(test_file, monkeypatch, body, message):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--co")  # would only list the tests
    with pytest.raises(SystemExit, match=f"(?s){message}"):
        require_green_tests([test_file(body)])


def test_kernel_tests_that_are_absent_are_an_error():
    with pytest.raises(SystemExit, match="no kernel tests in "):
        require_green_tests(["tests/no_such_*.py"])


@pytest.mark.parametrize("here", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["here", "in processes"])
def test_a_layer_benchmark_runs_from_end_to_end(tmp_path, test_file, capsys, monkeypatch, here):
    pytest.importorskip("matplotlib")
    names = [name for name in all_names("cpu") if name != "compiled eager"]
    if here:  # without the ten seconds in which new processes import
        functions = {"modeling_peer.benchmarks.layer:measure_cases": layer.measure_cases}
        monkeypatch.setattr(layer, "in_new_process", lambda name, *arguments: functions[name](*arguments))
    settings = tiny_layer(
        contenders=names,
        cases=[
            "decode num_sub_keys=2,4",
            "forward_backward num_tokens=6 num_sub_keys=4",
            "step num_tokens=6 num_sub_keys=4",
        ],
        memory_cases=[],
        output_file=str(tmp_path / "layer.json"),
        plot_file=str(tmp_path / "layer.png"),
    )
    settings.command = "peer bench-layer somewhere"
    settings.kernel_tests = require_green_tests([test_file("def test_it():\n    pass\n")])
    run_script(lambda: bench_layer(settings))
    *printed, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert result.pop("path") == str(tmp_path / "layer.json")
    assert result == json.loads((tmp_path / "layer.json").read_text())
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")

    assert {"cpu", "cores", "threads", "memory_gib"} <= set(result["machine"])
    assert result["versions"]["torch"] == torch.__version__
    assert "1 passed" in result["kernel_tests"]
    assert result["command"] == "peer bench-layer somewhere"
    assert [(c["task"], c["num_tokens"], c["num_experts"]) for c in result["cases"]] == [
        ("decode", 1, 4),
        ("decode", 1, 16),
        ("forward_backward", 6, 16),
        ("step", 6, 16),
    ]
    for case in result["cases"]:
        # one trains only, and the other never does
        others = "row-sparse" if case["task"] == "decode" else "int8"
        there = [n for n in names if n not in result["missing"] and others not in n]
        assert list(case["contenders"]) == there
        measured = case["contenders"]["eager"]
        assert measured["lower_quartile_ms"] <= measured["median_ms"] <= measured["upper_quartile_ms"]
        assert measured["vs_eager"] == 1
    assert printed == report.layer_markdown(result).splitlines()
    assert "| 1 | 16 | 8 |" in "".join(printed)


def test_cases_whose_process_dies_take_no_others_with_them(test_file, monkeypatch, capsys):
    def in_new_process(function, arguments, cases, *others):
        if cases[0]["num_sub_keys"] == 2:
            return {"why": "its process ended with status -9"}
        return layer.measure_cases(arguments, cases, *others)

    monkeypatch.setattr(layer, "in_new_process", in_new_process)
    settings = tiny_layer(contenders=["eager"], cases=["decode num_sub_keys=2,4"])
    first, second = bench_layer(settings)["cases"]
    assert (first["contenders"], first["skipped"]) == ({}, {"eager": "its process ended with status -9"})
    assert (list(second["contenders"]), second["skipped"]) == (["eager"], {})
    assert "status -9" in capsys.readouterr().err


def test_what_was_measured_is_written_before_something_fails(test_file, tmp_path, monkeypatch):
    def in_new_process(function, arguments, cases, *others):
        if cases[0]["num_sub_keys"] == 4:
            raise RuntimeError("failed in its process")
        return layer.measure_cases(arguments, cases, *others)

    monkeypatch.setattr(layer, "in_new_process", in_new_process)
    output = tmp_path / "layer.json"
    settings = tiny_layer(contenders=["eager"], cases=["decode num_sub_keys=2,4"], output_file=str(output))
    with pytest.raises(RuntimeError, match="failed in its process"):
        bench_layer(settings)
    (case,) = json.loads(output.read_text())["cases"]
    assert (case["num_sub_keys"], list(case["contenders"])) == (2, ["eager"])


def test_calls_that_run_out_of_memory_leave_no_gradient_to_others_and_are_tried_beside_all_that_is_held():
    shared = torch.nn.Linear(2, 2)
    held = []

    def first(tokens):  # fits until the other one's optimizer holds its state
        if held:
            raise torch.OutOfMemoryError

    def second(tokens):
        held.append(1)

    def third(tokens):
        shared(tokens).sum().backward()
        raise torch.OutOfMemoryError

    calls = {"first": first, "second": second, "third": third}
    sharing = {name: contenders.Contender(name, shared) for name in calls}
    reasons = layer._drop_out_of_memory(calls, sharing, torch.ones(1, 2))
    assert reasons == dict.fromkeys(["third", "first"], "ran out of GPU memory")
    assert list(calls) == ["second"]
    assert shared.weight.grad is None


def test_growth_is_cost_per_token_at_the_largest_size_over_the_smallest():
    def case(task, num_tokens, num_experts, milliseconds):
        sizes = {"task": task, "num_tokens": num_tokens, "num_experts": num_experts, "hidden_size": 8}
        return sizes | {"contenders": {"eager": {"median_ms": milliseconds}, "dense h·k": {"median_ms": 1.0}}}

    cases = [case("forward", 10, 64, 6.0), case("decode", 1, 16, 1.0), case("forward", 10, 16, 2.0)]
    cases += [case("step", 10, 256, 99.0)]  # not a forward
    growth = {(entry["along"], entry["contender"]): entry for entry in report.scaling_of(cases)}
    assert set(growth) == {("num_experts", "eager"), ("num_tokens", "eager"), ("num_tokens", "dense h·k")}
    experts, tokens = growth["num_experts", "eager"], growth["num_tokens", "eager"]
    assert (experts["num_tokens"], experts["sizes"], experts["ratio"]) == (10, [16, 64], 3.0)
    assert (tokens["num_experts"], tokens["microseconds_per_token"], tokens["ratio"]) == (16, [1000, 200], 0.2)


def test_peers_implementations_share_their_weights_and_change_each_step():
    settings, case = tiny_layer(), Case("step", num_tokens=6, num_sub_keys=4, hidden_size=8)
    first, second = build_contenders(["eager"], case, settings)["eager"].module, PeerLayer(peer_config())
    contenders.share_weights(second, first)
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert second.retrieval.query_norm.running_mean is first.retrieval.query_norm.running_mean
    tokens = make_tokens(case, settings, 0)
    torch.testing.assert_close(first.eval()(tokens), second.eval()(tokens))

    before = first.experts.down_embed.clone()
    eager = contenders.Contender("eager", first)
    make_call(eager, Case("forward_backward", 6, 4, 8), settings, {})(tokens)
    assert torch.equal(first.experts.down_embed, before)
    make_call(eager, case, settings, {})(tokens)
    assert not torch.equal(first.experts.down_embed, before)
    assert all(parameter.grad is None for parameter in first.parameters())


def peer_config():
    return build_contenders(["eager"], Case("decode", 1, 4, 8), tiny_layer())["eager"].module.experts.config


def test_peer_pytorch_runs_in_the_papers_mode():
    settings, case = tiny_layer(), Case("forward", num_tokens=5, num_sub_keys=4, hidden_size=8)
    rival = build_contenders(["PEER-pytorch"], case, settings)["PEER-pytorch"]
    expert_ids = rival.find_experts(make_tokens(case, settings, 0))
    assert expert_ids.shape == (1, 5, 2, 2)  # not one expert a head, its default
    assert isinstance(rival.module.score_activation, torch.nn.Softmax)
    assert {table.shape for table in rival.tables} == {(16, 8)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end():
    device, size = torch.device("cpu"), 64 * 2**20
    torch.ones(size // 4).sum()  # whatever a first call loads
    peak, why = peak_bytes(lambda: torch.ones(size // 4).sum(), device)
    if peak is None:
        pytest.skip(why)
    assert 0.9 * size < peak < 1.5 * size
    assert peak_bytes(lambda: None, device)[0] < 0.1 * size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_process_of_its_own():
    # eager's dense gradients of both tables are what counts: 2 * 128**2 * 32 float32 values, in float32 first
    settings, case = tiny_layer(hidden_size=32), {"num_tokens": 2, "num_sub_keys": 128, "hidden_size": 32}
    function = "modeling_peer.benchmarks.layer:probe_memory"
    answer = memory.in_new_process(function, settings.as_arguments(), {"task": "forward_backward", **case}, "eager")
    if answer["peak_bytes"] is None:
        pytest.skip(answer["why"])
    tables = 2 * 128**2 * 32 * 4
    assert 0.8 * tables < answer["peak_bytes"] < 3 * tables


def test_a_process_that_dies_says_so(monkeypatch):
    # -9: killed, as for want of memory
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, -9, ""))
    assert memory.in_new_process("any.module:function") == {"why": "its process ended with status -9"}


def test_contenders_that_do_not_fit_in_memory_are_left_out_with_numbers():
    gib = 2**30
    needs = {"eager": (2 * gib, 1 * gib), "cpu": (2 * gib, 0), "PEER-pytorch": (8 * gib, 0), "dense": (0, 0)}
    fitting, reasons = memory.fit(list(needs), needs.get, 10 * gib, contenders.weights_owner)
    assert fitting == ["eager", "cpu", "dense"]  # the first two hold the same two GiB
    assert reasons == {"PEER-pytorch": "would need 11.0 GiB with the others, of 10.0 GiB available"}


def test_the_estimate_knows_gradients_optimizer_state_and_gathered_rows():
    settings = tiny_layer()
    step, forward = Case("step", 100, 64, 8), Case("forward", 100, 64, 8)
    tables = 2 * 64**2 * 8 * 4
    assert memory.weight_bytes("cpu", step, settings) == tables
    assert memory.call_bytes("cpu", forward, settings) == (0, 0)
    held, during = memory.call_bytes("cpu", step, settings)
    assert held == 2 * tables  # two moments
    assert during >= tables
    assert memory.call_bytes("PEER-pytorch", forward, settings) == (0, 2 * 100 * 4 * 8 * 4)
    assert memory.call_bytes("cpu, row-sparse", step, settings)[1] < tables


def test_a_line_of_cases_is_every_combination():
    cases = parse_cases(["forward num_tokens=2,3 num_sub_keys=4,5", "decode num_sub_keys=4 hidden_size=16"], 8)
    assert [(c.task, c.num_tokens, c.num_sub_keys, c.hidden_size) for c in cases] == [
        ("forward", 2, 4, 8),
        ("forward", 2, 5, 8),
        ("forward", 3, 4, 8),
        ("forward", 3, 5, 8),
        ("decode", 1, 4, 16),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("foward num_tokens=1 num_sub_keys=2", "Did you mean 'forward'"),
        ("forward num_sub_keys=2", "does not set num_tokens"),
        ("forward num_tokens=0 num_sub_keys=2", "positive numbers joined by commas; got '0'"),
        ("forward tokens=1", "sizes are num_tokens=.*got 'tokens=1'"),
        ("decode num_tokens=2 num_sub_keys=2", "one token at a time"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(line, message):
    with pytest.raises(SettingsError, match=message):
        tiny_layer(cases=[line])


@pytest.mark.parametrize("name", ["cpu", "smoke", "h200"])
def test_every_file_of_sizes_is_understood_and_the_command_line_wins(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layer = parse_settings(LayerArguments, "layer", [name, "--device", "cpu", "--repeats", "4"])
    assert (layer.repeats, layer.command) == (4, f"peer bench-layer {name} --device cpu --repeats 4")
    assert {case.task for case in parse_cases(layer.cases, layer.hidden_size)} == set(TASKS)
    network = parse_settings(ModelBenchmark, "model", [name, "--device", "cpu"])
    assert network.length("training") > 0


def test_mistakes_are_told_before_anything_is_measured(tmp_path):
    for words, message in {
        ("--repeats", "3"): "name the sizes to measure first: cpu, h200, smoke",
        ("smoke", "--contender", "x"): "Did you mean 'contenders'",
        ("smoke", "--dtype", "float23"): "--dtype must be one of .*got 'float23'",
        ("smoke", "--output_file", str(tmp_path / "no" / "such")): "no such folder",
    }.items():
        with pytest.raises(SettingsError, match=message):
            parse_settings(LayerArguments, "layer", words)
    with pytest.raises(SettingsError, match=r"contender must be one of.*got 'eagre'.*Did you mean 'eager'"):
        bench_layer(tiny_layer(contenders=["eagre"]))


def test_a_model_benchmark_counts_tokens_and_its_twin_is_dense(tmp_path, test_file, monkeypatch, capsys):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_PEER))
    settings = ModelBenchmark(
        model=str(tmp_path / "tiny.json"),
        contenders=["PEER eager", "dense twin"],
        threads=1,
        repeats=2,
        batch_size=2,
        training_tokens=5,
        prefill_tokens=7,
        prompt_tokens=3,
        new_tokens=4,
    )
    monkeypatch.setattr(model, "in_new_process", lambda function, *arguments: model.probe_memory(*arguments))
    run_script(lambda: bench_model(settings))
    *printed, last = capsys.readouterr().out.strip().splitlines()
    result = json.loads(last)
    assert printed == report.model_markdown(result).splitlines()
    tokens = {"training": 2 * 5, "prefill": 2 * 7, "decode": 2 * 4}
    for task in result["tasks"]:
        for measured in task["contenders"].values():
            expected = 1000 * tokens[task["task"]] / measured["median_ms"]
            assert measured["tokens_per_second"] == pytest.approx(expected, rel=1e-3)
    models = model.build_models(["PEER eager", "dense twin"], settings)
    kinds = [type(layer.mlp).__name__ for layer in models["dense twin"].model.layers]
    assert "PeerLayer" not in kinds
    assert "PeerLayer" in [type(layer.mlp).__name__ for layer in models["PEER eager"].model.layers]


def test_decode_writes_as_many_tokens_as_it_says(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_PEER))
    sizes = {"training_tokens": 8, "prefill_tokens": 8, "prompt_tokens": 3, "new_tokens": 4}
    settings = ModelBenchmark(model=str(tmp_path / "tiny.json"), batch_size=2, **sizes)
    network = model.build_models(["PEER eager"], settings)["PEER eager"]
    written = []
    generate = network.generate
    network.generate = lambda *args, **kwargs: written.append(generate(*args, **kwargs))
    model.make_call("PEER eager", network, "decode", settings)(model.make_input(300, "decode", settings, 0))
    assert written[0].shape == (2, 3 + 4)


def test_a_model_too_short_for_the_benchmark_is_refused(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_PEER))
    settings = ModelBenchmark(model=str(tmp_path / "tiny.json"), prompt_tokens=60, new_tokens=5, training_tokens=8)
    with pytest.raises(SettingsError, match="256 tokens exceed the model's 64 positions"):
        model.build_models(["PEER eager"], settings)


def test_versions_name_the_commit_also_where_git_is_not():
    assert set(describe_versions()) >= {"python", "torch", "transformers", "triton", "numba", "PEER-pytorch"}
    assert describe_versions("abc")["modeling_peer"] in ("abc", describe_versions()["modeling_peer"])


def test_the_costs_of_watching_and_of_balancing_are_shares_of_a_step(tmp_path):
    pytest.importorskip("numba")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_PEER))
    sizes = {"training_tokens": 8, "prefill_tokens": 8, "prompt_tokens": 3, "new_tokens": 4, "repeats": 2}
    result = bench_expert_usage(ModelBenchmark(model=str(tmp_path / "tiny.json"), batch_size=2, **sizes))
    took = result["milliseconds"]
    per_step = 100 * (took["count"] + took["figures"] / 10) / took["step"]
    assert result["percent_of_a_step"]["usage"] == pytest.approx(per_step, abs=0.01)
    assert result["percent_of_a_step"]["switch"] == pytest.approx(100 * (took["switch"] / took["step"] - 1), abs=0.01)
    assert result["layers"] == ["layer_0"]


@pytest.mark.parametrize("name", ["bench_layer", "bench_model", "bench_expert_usage"])
def test_a_benchmark_script_opens_with_the_command_to_copy(name):
    text = (REPOSITORY / "scripts" / f"{name}.py").read_text()
    assert f"python scripts/{name}.py cpu" in text.split('"""')[1]
    assert len(text.splitlines()) < 40  # the logic is in the package
