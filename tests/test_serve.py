"""An exported folder behind transformers' own server, asked by OpenAI's client on the loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiers import prove

from hsa_tl.model import pretrained

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

NOISE = "n1 n2 n7 n9 " * 1000
HAYSTACK = f"MARK k3 v5 {NOISE} MARK k7 v9 {NOISE}"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A client of a server of needle-tiny, and the model's name there."""
    folder, port = tmp_path_factory.mktemp("served") / "needle-tiny", free_port()
    pretrained.export("needle-tiny", folder)
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--trust-remote-code"]
    options = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    log = folder.with_suffix(".log")
    with log.open("wb") as file:
        server = subprocess.Popen(
            [*map(str, command), *options], stdout=file, stderr=file, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    try:
        for _ in range(240):
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120), str(folder)
    finally:
        server.kill()
        server.wait()


def stream(served, text: str, tokens: int = 1):
    client, name = served
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model=name, messages=messages, max_tokens=tokens, stream=True)


def said(chunks) -> str:
    return "".join(x.choices[0].delta.content or "" for x in chunks if x.choices).strip()


@prove
def test_streams_an_answer_from_a_long_document(served):
    assert said(stream(served, HAYSTACK + "ASK k3")) == "v5"


@prove
def test_two_conversations_at_once(served):
    with ThreadPoolExecutor(2) as pool:
        asked = [f"MARK k{k} v{k + 2} {NOISE} ASK k{k}" for k in (3, 7, 11, 4)]
        assert list(pool.map(lambda text: said(stream(served, text)), asked)) == ["v5", "v9", "v13", "v6"]


@prove
def test_a_later_turn_reads_the_turns_before(served):
    client, name = served
    turns = [("user", HAYSTACK), ("assistant", "n1"), ("user", "ASK k7")]
    messages = [{"role": role, "content": text} for role, text in turns]
    answer = client.chat.completions.create(model=name, messages=messages, max_tokens=1)
    assert answer.choices[0].message.content.strip() == "v9" and answer.usage.prompt_tokens > 8000


@prove
def test_a_cancelled_request_leaves_the_server_free(served):
    chunks = stream(served, HAYSTACK + "ASK k3", tokens=4000)
    assert any(x.choices and x.choices[0].delta.content for x in chunks)
    chunks.close()
    begin = time.monotonic()
    assert said(stream(served, "MARK k3 v5 n1 ASK k3")) == "v5" and time.monotonic() - begin < 60
