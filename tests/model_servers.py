"""Stubs of servers of models on loopback: they speak the APIs of Ollama, llama.cpp, LM Studio and
vLLM, and a model is one sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = "This is the stub of an engine."

OLLAMA: Mapping[str, Any] = {
    "/v1/models": {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "owned_by": "library"}
            for name in ("llama3.2:3b", "nomic-embed-text:latest", "gpt-oss:120b-cloud")
        ],
    },
    "/api/tags": {
        "models": [
            {
                "name": "llama3.2:3b",
                "model": "llama3.2:3b",
                "size": 2019393189,
                "details": {"family": "llama", "parameter_size": "3.2B"},
            },
            {
                "name": "nomic-embed-text:latest",
                "model": "nomic-embed-text:latest",
                "details": {"family": "nomic-bert", "parameter_size": "137M"},
            },
            {
                "name": "gpt-oss:120b-cloud",
                "model": "gpt-oss:120b-cloud",
                "remote_host": "https://ollama.com:443",
                "details": {"parameter_size": "116.8B"},
            },
        ]
    },
    "/api/show llama3.2:3b": {
        "capabilities": ["completion", "tools"],
        "parameters": 'stop                "<|eot_id|>"\nnum_ctx             8192',
        "model_info": {"general.architecture": "llama", "llama.context_length": 131072},
    },
    "/api/show nomic-embed-text:latest": {"capabilities": ["embedding"]},
}
LLAMA_CPP: Mapping[str, Any] = {
    "/v1/models": {
        "object": "list",
        "data": [
            {
                "id": "/models/qwen2.5-coder-7b-instruct-q4_k_m.gguf",
                "object": "model",
                "owned_by": "llamacpp",
                "meta": {"n_ctx_train": 32768, "n_params": 7615616512},
            }
        ],
    },
    "/props": {
        "default_generation_settings": {"n_ctx": 16384},
        "modalities": {"vision": False, "audio": False},
        "chat_template_caps": {"supports_tools": True},
    },
    # It answers this call of Ollama's too.
    "/api/tags": {"models": [{"name": "qwen", "model": "qwen"}]},
}
LM_STUDIO: Mapping[str, Any] = {
    "/v1/models": {
        "object": "list",
        "data": [
            {"id": "qwen2-vl-7b-instruct", "object": "model", "owned_by": "organization_owner"},
            {"id": "text-embedding-nomic", "object": "model", "owned_by": "organization_owner"},
        ],
    },
    "/api/v0/models": {
        "object": "list",
        "data": [
            {
                "id": "qwen2-vl-7b-instruct",
                "type": "vlm",
                "state": "loaded",
                "max_context_length": 32768,
                "loaded_context_length": 4096,
            },
            {"id": "text-embedding-nomic", "type": "embeddings", "state": "not-loaded"},
        ],
    },
}
VLLM: Mapping[str, Any] = {
    "/v1/models": {
        "object": "list",
        "data": [
            {
                "id": "Qwen/Qwen2.5-Math-7B-Instruct",
                "object": "model",
                "owned_by": "vllm",
                "max_model_len": 4096,
            }
        ],
    }
}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Stub

    def do_GET(self) -> None:
        self._answer(self.path)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/chat/completions":
            return self._chat(body)
        return self._answer(f"{self.path} {body.get('model')}")

    def _answer(self, key: str) -> None:
        self.server.asked.append(key)
        known = self.server.answers.get(key)
        # LM Studio says 200 to whatever it does not know.
        status = 200 if known is not None or self.server.answers is LM_STUDIO else 404
        self._send(status, "application/json", json.dumps(known or {"error": "unknown"}).encode())

    def _chat(self, body: dict[str, Any]) -> None:
        self.server.asked.append(f"chat {body['model']}")
        about = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
        usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
        message = {"role": "assistant", "content": ANSWER}
        if not body.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            whole = about | {"object": "chat.completion", "choices": [choice], "usage": usage}
            return self._send(200, "application/json", json.dumps(whole).encode())
        chunk = about | {"object": "chat.completion.chunk"}
        choice = {"index": 0, "delta": message, "finish_reason": "stop"}
        parts = [chunk | {"choices": [choice]}, chunk | {"choices": [], "usage": usage}]
        text = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
        return self._send(200, "text/event-stream", text.encode())

    def _send(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", content_type)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Stub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, answers: Mapping[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


@contextmanager
def stub_engine(answers: Mapping[str, Any]) -> Iterator[_Stub]:
    """A server with these answers, each under its path; of POST under path and model."""
    server = _Stub(answers)
    serving = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    serving.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        serving.join()
