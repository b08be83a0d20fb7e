"""Which implementation a layer runs, and what is said about it."""

import pytest
import torch

from modeling_peer import backends_peer, kernels
from modeling_peer.backends_peer import EXPERT_MIXTURE_FUNCTIONS, choose
from modeling_peer.experts_peer import expert_mixture as eager_mixture


@pytest.fixture(autouse=True)
def _forget_choices():
    yield
    for cached in (kernels._is_installed, backends_peer._obstacle, backends_peer._best_implementation):
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
