# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""Which implementation a layer runs, and what is said about it."""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from modeling_peer import PeerLayer, backends_peer, kernels
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, choose
from modeling_peer.experts_peer import expert_mixture as eager_mixture


@pytest.fixture(autouse=True)
def _forget_choices():
    yield
    kernels._failures.clear()
    for cached in (
        kernels._is_installed,
        kernels._find_defect,
        backends_peer._obstacle,
        backends_peer._best_implementation,
        backends_peer._warn,
    ):
        cached.cache_clear()


@pytest.fixture
def without(monkeypatch):
    def hide(*modules):
        is_installed = lambda module: module not in modules  # noqa: E731
        monkeypatch.setattr(kernels, "_is_installed", is_installed)
        backends_peer._obstacle.cache_clear()
        backends_peer._best_implementation.cache_clear()

    monkeypatch.setattr(kernels, "_is_installed", lambda module: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hide()
    return hide


def chosen(name, device="cpu", dtype=torch.float32):
    table = torch.empty(4, 2, device=device, dtype=dtype)
    function = choose(EXPERT_MIXTURE_FUNCTIONS, name, eager_mixture, table)
    return "eager" if function is eager_mixture else function.keywords["implementation"]


def test_unset_is_the_best_of_the_device_said_once(without, monkeypatch):
    messages = []
    monkeypatch.setattr(backends_peer.logger, "info", messages.append)
    assert [chosen(None) for _ in range(3)] == ["cpu"] * 3
    assert messages == ['PEER chose experts_implementation="cpu" for torch.float32 tables on cpu.']
    assert chosen(None, device="meta") == "eager"  # a device we know nothing for
    assert chosen("eager") == "eager"


def test_unset_falls_back_and_says_why_once(without, monkeypatch):
    without("numba")
    messages = []
    monkeypatch.setattr(backends_peer.logger, "warning", messages.append)
    assert [chosen(None) for _ in range(3)] == ["eager"] * 3
    (message,) = messages
    assert "needs numba, which is not installed (pip install numba)" in message


@pytest.mark.parametrize(
    ("name", "dtype", "cause"),
    [
        ("triton", torch.float32, "needs CUDA tensors; got cpu"),
        ("cpu", torch.float16, "needs tables of float32, bfloat16; got float16"),
        ("cpu", torch.float64, "got float64"),
    ],
)
def test_asked_for_and_impossible_is_an_error_with_the_cause(without, name, dtype, cause):
    with pytest.raises(ValueError, match=rf'experts_implementation="{name}".*{cause}.*"eager".*unset'):
        chosen(name, dtype=dtype)


def test_asked_for_and_not_installed_is_an_error_with_the_way_out(without):
    without("numba")
    with pytest.raises(ValueError, match=r"needs numba.*pip install numba"):
        chosen("cpu")


def test_a_gpu_that_is_too_old_for_the_kernels_is_told(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernels, "_is_installed", lambda module: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in [
        ((7, 5), "needs a GPU of compute capability 8.0 or newer; got 7.5"),
        ((8, 0), None),
        ((10, 0), None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert kernels.obstacle("triton", "cuda", torch.float32) == expected


def run_layer(tmp_path, before="", name=None, package=None, **environment):
    """A layer of one token and of 300 in a process of its own, after the lines `before`; its outputs and messages."""
    package = package or Path(kernels.__file__).parents[2]
    code = f"""
import sys, torch
{before}
from modeling_peer import PeerConfig, PeerLayer
torch.manual_seed(0)
sizes = dict(hidden_size=8, num_attention_heads=2, num_sub_keys=4, num_retrieval_heads=1, num_experts_per_head=2)
layer = PeerLayer(PeerConfig(**sizes, query_dim=4, experts_implementation={name!r})).eval().bfloat16()
with torch.no_grad():
    print([layer(torch.ones(n, 8, dtype=torch.bfloat16)).float().sum().item() / n for n in (1, 300)])
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{package}", "OMP_NUM_THREADS": "1", **environment}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    warnings = [line for line in ran.stderr.splitlines() if "PEER" in line]
    return ran.stdout.strip(), warnings, ran.stderr


BROKEN = {
    "its import fails": "class Broken:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == 'numba.core.types': raise ImportError('the cause')\n"
    "sys.meta_path.insert(0, Broken())",
    "llvmlite is missing": "sys.modules['llvmlite'] = None  # the cause",
    "compilation fails": "import numba.core.compiler as compiler\n"
    "def compile_extra(*args, **kwargs): raise RuntimeError('the cause')\n"
    "compiler.compile_extra = compile_extra",
}


@pytest.mark.slow
@pytest.mark.parametrize("way", BROKEN)
def test_a_compiler_that_does_not_work_means_eager_and_one_warning(tmp_path, way):
    expected = run_layer(tmp_path, name="eager")[0]
    outputs, warnings, errors = run_layer(tmp_path, BROKEN[way], NUMBA_CACHE_DIR=str(tmp_path))
    assert outputs == expected, errors
    (warning,) = (line for line in warnings if not line.startswith("PEER compiles"))
    assert "needs numba, which is installed but does not work here" in warning
    assert "the cause" in warning or "llvmlite" in warning


@pytest.mark.slow
def test_compilation_that_is_switched_off_is_refused_where_kernels_were_asked_for(tmp_path):
    _, _, errors = run_layer(tmp_path, name="cpu", NUMBA_DISABLE_JIT="1")
    last = errors.strip().splitlines()[-1]
    assert re.search(r'ValueError: experts_implementation="cpu" needs numba.*NUMBA_DISABLE_JIT.*"eager"', last)


def fail_in_numba(*args, **kwargs):
    """Raise as the compiler does: from one of its modules."""
    exec(compile("raise RuntimeError('no such instruction')", "numba", "exec"), {"__name__": "numba.core.lowering"})


@pytest.fixture
def failing_kernel(monkeypatch):
    """The kernels were found to work, and the compiler fails at one of them. On one thread: a team of threads would
    ask a compiled function for its source."""
    cpu_experts = pytest.importorskip("modeling_peer.kernels.cpu.experts")
    assert kernels.defect("cpu") is None

    monkeypatch.setattr(cpu_experts, "_read", fail_in_numba)
    with one_thread():
        yield


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_a_kernel_that_cannot_be_compiled_means_eager_and_one_warning(failing_kernel, tiny_config, monkeypatch):
    messages = []
    monkeypatch.setattr(backends_peer.logger, "warning", messages.append)
    layer, eager = (PeerLayer(tiny_config(experts_implementation=name)) for name in (None, "eager"))
    eager.load_state_dict(layer.state_dict())
    tokens = torch.randn(300, 32)
    for _ in range(2):
        torch.testing.assert_close(layer(tokens), eager(tokens))
    (message,) = messages
    assert "RuntimeError: no such instruction" in message


def test_a_kernel_that_cannot_be_compiled_is_an_error_where_it_was_asked_for(failing_kernel, tiny_config):
    layer = PeerLayer(tiny_config(experts_implementation="cpu"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r'experts_implementation="cpu".*no such instruction.*"eager"'):
            layer(torch.randn(300, 32))


def test_a_backward_that_cannot_be_compiled_says_so_and_the_next_forward_is_eager(tiny_config, monkeypatch):
    cpu_experts = pytest.importorskip("modeling_peer.kernels.cpu.experts")

    layer = PeerLayer(tiny_config())
    tokens = torch.randn(300, 32)
    output = layer(tokens)
    monkeypatch.setattr(cpu_experts, "row_gradients", fail_in_numba)
    with pytest.raises(RuntimeError, match=r'backward of experts_implementation="cpu".*no such instruction.*eager'):
        output.sum().backward()
    layer(tokens).sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())


def test_an_error_that_the_compiler_did_not_raise_is_raised(tiny_config, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("modeling_peer.kernels.cpu.experts._read", fail)
    with pytest.raises(RuntimeError, match=r"^out of memory$"), one_thread():
        PeerLayer(tiny_config())(torch.randn(300, 32))


def test_no_page_advises_to_install_a_package_that_is_not_published():
    repository = Path(__file__).resolve().parents[1]
    folders = ("modeling_peer", "scripts", "tests", "docs", "configuration", "results", "model_cards", ".ci")
    pages = [path for folder in folders for path in (repository / folder).rglob("*")] + list(repository.iterdir())
    pages = [
        path for path in pages if path.suffix in (".md", ".py", ".sh", ".yaml", ".yml") or path.name == "Makefile"
    ]
    advice = re.compile(
        r"pip3? install [^`\n]*?(?<![\w./-])(modeling[-_]peer|PEER-pytorch)(?![\w-])(?!-[\d.]+)", re.IGNORECASE
    )
    read = {path.relative_to(repository): path.read_text(encoding="utf-8") for path in pages}
    assert {path: found.group() for path, text in read.items() if (found := advice.search(text))} == {}
