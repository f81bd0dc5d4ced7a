"""vLLM in processes of its own: a server, and a model that answers prompts and ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

START_SECONDS = 500
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "HF_HUB_OFFLINE": "1",
}
COMMON = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")

# argv: a model, requests in JSON [[adapter folder or null, token ids], ...], how many tokens, further settings in JSON
ONE_MODEL = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128} | json.loads(sys.argv[4])
    llm = LLM(sys.argv[1], **settings)
    sampling = SamplingParams(temperature=0, max_tokens=int(sys.argv[3]), ignore_eos=True)
    requests = json.loads(sys.argv[2])
    folders = list(dict.fromkeys(folder for folder, _ in requests if folder))
    adapters = {folder: LoRARequest(folder, number, folder) for number, folder in enumerate(folders, 1)}
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for _, ids in requests],
        sampling,
        use_tqdm=False,
        lora_request=[adapters.get(folder) for folder, _ in requests] if adapters else None,
    )
    print("ANSWERS", json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
"""


class Server:
    """`vllm serve` on a port of its own. (The command fails on vllm-cpu, so its module is started.)"""

    def __init__(self, model: str, log: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.model, self.log = model, log
        module = "vllm.entrypoints.openai.api_server"
        command = [sys.executable, "-m", module, "--model", model, "--port", str(self.port), *COMMON, *arguments]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT, start_new_session=True
            )
        until = time.monotonic() + START_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"vLLM did not start: {log.read_text()[-3000:]}")
            time.sleep(1)

    def _is_up(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, str]:
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, content: dict[str, Any]) -> tuple[int, str]:
        body = json.dumps(content).encode()
        headers = {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers))

    def _send(self, request: urllib.request.Request) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def load(self, name: str, folder: Path) -> tuple[int, str]:
        return self.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> tuple[int, str]:
        return self.post("/v1/unload_lora_adapter", {"lora_name": name})

    def tokens(self, name: str, prompt: list[int], count: int) -> list[int]:
        """What a model answers greedily."""
        request = {"model": name, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        status, text = self.post("/v1/completions", request | {"return_token_ids": True})
        assert status == 200, text
        return json.loads(text)["choices"][0]["token_ids"]

    def chat(self, name: str, text: str, count: int) -> tuple[int, Any]:
        """The status and what a model answers greedily to a chat message, as tokens, or the error."""
        status, answer = self.post("/v1/chat/completions", {
            "model": name, "messages": [{"role": "user", "content": text}], "max_tokens": count,
            "temperature": 0, "ignore_eos": True, "return_token_ids": True,
        })  # fmt: skip
        return status, json.loads(answer)["choices"][0]["token_ids"] if status == 200 else answer

    def together(self, asked: list[tuple[str, list[int]]], count: int) -> list[list[int]]:
        """The answers to requests that are sent at the same time: (model, prompt)."""
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda one: self.tokens(*one, count), asked))

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def answers_of_model(
    model: Path | str,
    prompts: list[list[int]],
    count: int,
    scratch: Path,
    adapters: list[Path | None] | None = None,
    environment: dict[str, str] | None = None,
    **settings: Any,
) -> list[list[int]] | str:
    """What a model answers greedily, each prompt with the adapter beside it; the output of vLLM where it fails."""
    script = scratch / "one_model.py"
    script.write_text(ONE_MODEL)
    folders = [folder and str(folder) for folder in adapters or [None] * len(prompts)]
    requests = json.dumps(list(zip(folders, prompts, strict=True)))
    command = [sys.executable, str(script), str(model), requests, str(count), json.dumps(settings)]
    variables = os.environ | ENVIRONMENT | (environment or {})
    done = subprocess.run(command, capture_output=True, text=True, env=variables, cwd=scratch)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    return done.stdout + done.stderr if line is None else json.loads(line.removeprefix("ANSWERS "))
