"""The plain way to serve tuned models: one whole Transformers model a tenant and `generate`, behind the same HTTP.

A process of its own, with the standard library's server. It answers streams of greedy completions of token ids only."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ot_ray.config import Config
from ot_ray.model.loading import DTYPES


class PlainConfig(Config):
    """What the plain server serves."""

    models: dict[str, str]
    """Folder of each model, by the id that requests name."""
    port: int = Field(ge=0, le=65535)
    """Where it listens, on the loopback interface."""
    device: Literal["cpu", "cuda"]
    """Where models are computed."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the weights."""
    concurrent: int = Field(ge=1)
    """Requests that generate at the same time, a thread each."""


class PlainModels:
    """Every tenant's own model, loaded when it is asked for the first time and kept from then on."""

    def __init__(self, config: PlainConfig) -> None:
        self._config = config
        self._loaded: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
        # Transformers changes defaults of the whole process while it opens a model.
        self._opening = threading.Lock()
        self.lanes = threading.Semaphore(config.concurrent)

    def get(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Raises KeyError for an unknown name."""
        with self._opening:
            if name not in self._loaded:
                folder = Path(self._config.models[name])
                model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[self._config.dtype])
                self._loaded[name] = model.to(self._config.device).eval(), AutoTokenizer.from_pretrained(folder)
            return self._loaded[name]


class _Events(BaseStreamer):
    """Hands each new token on as it is made; `generate` gives the prompt first."""

    def __init__(self, handler: _Handler, tokenizer: PreTrainedTokenizerBase) -> None:
        self._handler, self._tokenizer = handler, tokenizer
        self.tokens = -1
        self._ids: list[int] = []
        self._said = ""

    def put(self, value: torch.Tensor) -> None:
        self.tokens += 1
        if self.tokens:
            self._ids += value.flatten().tolist()
            text = str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
            # A character may need several tokens; until it is whole, its end is no text yet.
            piece = "" if text.endswith("\N{REPLACEMENT CHARACTER}") else text[len(self._said) :]
            self._said += piece
            self._handler.event({"choices": [{"index": 0, "text": piece}]})

    def end(self) -> None:
        pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Each token is a packet; held back until the one before is acknowledged, the first would take 40 ms.
    disable_nagle_algorithm = True
    models: PlainModels

    def do_GET(self) -> None:
        self._answer(200, {"status": "ok"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.models.lanes:
            try:
                model, tokenizer = self.models.get(asked["model"])
            except KeyError as error:
                self._answer(404, {"error": {"message": f"no model {error}"}})
            except torch.OutOfMemoryError as error:
                self._answer(507, {"error": {"message": str(error)}})
            else:
                self._generate(model, tokenizer, asked)

    def _generate(self, model: Any, tokenizer: PreTrainedTokenizerBase, asked: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        prompt = torch.tensor([asked["prompt"]], device=model.device)
        streamer = _Events(self, tokenizer)
        ones = torch.ones_like(prompt)
        try:
            model.generate(
                prompt, attention_mask=ones, max_new_tokens=asked["max_tokens"], do_sample=False, streamer=streamer
            )
            self.event({"choices": [], "usage": {"completion_tokens": streamer.tokens}})
        except torch.OutOfMemoryError as error:
            self.event({"error": {"message": str(error)}})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def event(self, content: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(content)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Every request would be a line."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def main(path: str) -> None:
    """Serve what the JSON file at `path` says until the process is stopped."""
    config = PlainConfig.model_validate_json(Path(path).read_bytes())
    handler = type("Handler", (_Handler,), {"models": PlainModels(config)})
    with _Server(("127.0.0.1", config.port), handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
