# Copyright 2026 The modeling_peer authors. Licensed under the Apache License, Version 2.0.
"""`peer serve` in a process of its own, asked by OpenAI's client and by `transformers chat`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_peer
import peer_command
from modeling_peer import PeerConfig, PeerForCausalLM
from modeling_peer.console.errors import SettingsError
from modeling_peer.data.tokenizers import byte_tokenizer
from modeling_peer.hub import serving

REPOSITORY = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHIPPED = os.path.join(REPOSITORY, "examples", "checkpoints", "peer_bytes")
QUESTION, ANSWER = "What is PEER?", "A million tiny experts."
MESSAGES = [{"role": "user", "content": QUESTION}]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DIALOGUE = f"user: {QUESTION}\nassistant: {ANSWER}<|endoftext|>"
RIVALS = ("product_key_memory", "hashed_memory", "top_k_moe", "expert_choice_moe", "multilinear_moe")
# A cache of keys and values takes most of the memory unless it is told how much it needs.
BATCHING = ("--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "64")
# Before, `/v1/models` lists the Hub's cache, and fails where there is none.
LISTS_SERVED_MODELS = Version(transformers.__version__) >= Version("5.24")
# `main` of Transformers' command line looks for a newer release first.
CHAT = "from transformers.cli.transformers import app; app(prog_name='transformers')"


class Server:
    """`peer serve` on a free port of this machine."""

    def __init__(self, folder, *words):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.batches = "--continuous-batching" in words
        self.log = folder / f"server-{port}.log"
        command = [sys.executable, "-m", "peer_command", "serve", *words]
        command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": REPOSITORY, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        try:
            self._wait_until_healthy()
        except BaseException:
            self.process.kill()
            raise

    def _wait_until_healthy(self):
        for _ in range(600):
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.get("health")
            except URLError:
                time.sleep(0.5)
        raise TimeoutError(self.log.read_text())

    def get(self, path):
        with urlopen(f"{self.url}/{path}", timeout=60) as response:
            return json.load(response)

    def client(self):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def end(self, number):
        """The exit status after this signal."""
        self.process.send_signal(number)
        try:
            return self.process.wait(timeout=120)
        finally:
            self.process.kill()


def save(model, folder):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config_of(**fields):
    tokenizer = byte_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_sub_keys": 8, "num_retrieval_heads": 2}
    sizes |= {"num_experts_per_head": 4, "query_dim": 16, "max_position_embeddings": 2048}
    sizes |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return PeerConfig(**sizes, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the servers run, with a PEER model that learned one answer by heart, and its rivals as they start."""
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    model = PeerForCausalLM(config_of(query_norm="rms_norm"))  # learns faster than BatchNorm's averages do
    tokens = byte_tokenizer()(DIALOGUE, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save(model, folder / "peer")
    for rival in RIVALS:
        save(PeerForCausalLM(config_of(sparse_mlp=rival)), folder / rival)
    return folder


@pytest.fixture(scope="module", params=[(), BATCHING], ids=["one by one", "continuous batching"])
def server(folder, request):
    """A server of every model in the folder."""
    for name in serving.REQUIREMENTS:
        pytest.importorskip(name, reason=f"{name} comes with the extra 'serve'")
    server = Server(folder, *request.param)
    yield server
    server.end(signal.SIGKILL)


@pytest.mark.slow
def test_chat_completions(server):
    answer = server.client().chat.completions.create(model="peer", messages=MESSAGES, temperature=0)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert answer.usage.completion_tokens == len(ANSWER) + 1  # a token per byte, and the end


@pytest.mark.slow
def test_chat_completions_that_stream(server):
    chunks = list(server.client().chat.completions.create(model="peer", messages=MESSAGES, temperature=0, stream=True))
    texts = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(texts) > 1
    assert "".join(texts) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_completions(server, stream):
    prompt = DIALOGUE[:40]
    answer = server.client().completions.create(
        model="peer", prompt=prompt, max_tokens=9, temperature=0, stream=stream
    )
    text = "".join(chunk.choices[0].text for chunk in answer if chunk.choices) if stream else answer.choices[0].text
    assert text == DIALOGUE[40:49]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_responses(server, stream):
    answer = server.client().responses.create(model="peer", input=QUESTION, temperature=0, stream=stream)
    if stream:
        text = "".join(event.delta for event in answer if event.type == "response.output_text.delta")
    else:
        text = answer.output_text
    assert text == ANSWER


@pytest.mark.slow
def test_requests_at_the_same_time(server):
    def ask(num_tokens):
        client = server.client()
        answer = client.chat.completions.create(model="peer", messages=MESSAGES, temperature=0, max_tokens=num_tokens)
        return answer.choices[0].message.content

    lengths = range(3, 11)
    with ThreadPoolExecutor(len(lengths)) as threads:
        assert list(threads.map(ask, lengths)) == [ANSWER[:length] for length in lengths]


@pytest.mark.slow
@pytest.mark.parametrize("rival", RIVALS)
def test_rivals_answer_as_they_generate(server, folder, rival):
    completions = server.client().chat.completions
    if rival == "hashed_memory" and server.batches:  # Transformers batches no model with "hybrid" layers
        from openai import APIStatusError

        with pytest.raises(APIStatusError):
            completions.create(model=rival, messages=MESSAGES, temperature=0, max_tokens=8)
        assert server.get("health") == {"status": "ok"}
        return
    answer = completions.create(model=rival, messages=MESSAGES, temperature=0, max_tokens=8)
    tokenizer = AutoTokenizer.from_pretrained(folder / rival)
    model = AutoModelForCausalLM.from_pretrained(folder / rival)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer.choices[0].message.content == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.slow
def test_a_model_that_does_not_exist_gets_an_error_and_the_server_goes_on(server):
    from openai import APIStatusError

    with pytest.raises(APIStatusError) as caught:
        server.client().chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert caught.value.status_code >= 400
    assert server.get("health") == {"status": "ok"}
    test_chat_completions(server)


@pytest.mark.slow
def test_transformers_chat_talks_to_the_server(server, folder):
    command = [sys.executable, "-c", CHAT, "chat", "peer", server.url, "do_sample=False", "max_new_tokens=60"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)  # the client takes every address for the Hub's
    done = subprocess.run(
        command, cwd=folder, env=environment, input=f"{QUESTION}\n!exit\n", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert ANSWER in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGINT, ()),
        (signal.SIGTERM, BATCHING),  # Transformers leaves a thread that Python would wait for
    ],
)
def test_a_signal_ends_the_server(folder, number, words):
    for name in serving.REQUIREMENTS:
        pytest.importorskip(name, reason=f"{name} comes with the extra 'serve'")
    server = Server(folder, "peer", *words)  # of one model, which is loaded first
    if LISTS_SERVED_MODELS:
        (listed,) = server.get("v1/models")["data"]
        assert listed["id"] == "peer"
    test_chat_completions(server)
    assert server.end(number) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such-folder"], "cannot load 'no-such-folder': no such folder"),
        (["no-such-folder@main"], "cannot load 'no-such-folder@main': no such folder"),
        ([SHIPPED, "--dtype", "float99"], "did not start: Unsupported dtype: 'float99'"),
    ],
)
def test_what_the_server_cannot_load_is_one_sentence(words, message):
    for name in serving.REQUIREMENTS:
        pytest.importorskip(name, reason=f"{name} comes with the extra 'serve'")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SettingsError, match=message):
        serving.serve([*words, "--device", "cpu"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("port_given", ["--port {}", "--port={}"])
def test_a_port_in_use_is_refused_before_the_model_is_loaded(port_given):
    for name in serving.REQUIREMENTS:
        pytest.importorskip(name, reason=f"{name} comes with the extra 'serve'")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        words = [SHIPPED, "--host", "127.0.0.1", *port_given.format(port).split()]
        with pytest.raises(
            SettingsError, match=rf"cannot listen on 127.0.0.1, port {port} \(Address already in use\)"
        ):
            serving.serve(words)
    serving._require_free_port("127.0.0.1", port)  # free again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid, port 8000"),
        (["--host", "127.0.0.1", "--port", "70000"], "cannot listen on 127.0.0.1, port 70000"),
    ],
)
def test_an_address_that_does_not_exist_is_one_sentence(words, message):
    for name in serving.REQUIREMENTS:
        pytest.importorskip(name, reason=f"{name} comes with the extra 'serve'")
    with pytest.raises(SettingsError, match=message):
        serving.serve(words)


@pytest.mark.parametrize("missing", serving.REQUIREMENTS)
def test_without_the_extra_the_command_names_it(missing, monkeypatch, capsys):
    for name in serving.REQUIREMENTS:
        monkeypatch.setitem(sys.modules, name, None if name == missing else types.ModuleType(name))
    assert peer_command.main(["serve", "some-model"]) == 2
    message = capsys.readouterr().err
    assert f"`serve` needs {missing}, which is not installed" in message
    assert "extra 'serve'" in message


def test_all_heads_are_provided_where_the_server_looks():
    module = types.ModuleType("transformers")
    serving.provide_classes(module)
    heads = {name for name in modeling_peer.__all__ if name.startswith("PeerFor")} | {"PeerModel"}
    assert {name for name in vars(module) if name.startswith("Peer")} == heads
    assert module.PeerForCausalLM is PeerForCausalLM


@pytest.mark.parametrize(
    ("module", "name"), [("transformers.cli.transformers", "run"), ("transformers.servers", "app")]
)
def test_a_release_without_such_a_server_is_named(module, name):
    with pytest.raises(SettingsError, match=f"needs {module}.{name}, which transformers {transformers.__version__} "):
        serving._look_up(module, name)
