"""A server of the completions endpoint that emits tokens on a fixed schedule, for tests of the client; run as a process.

It prints its port.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from aiohttp import web


class TokenServer:
    """Args: `interval_s` between two tokens of a stream, `first_s` before the first; `stop_after` tokens the process dies;
    `fail_after` tokens a stream ends with an error event."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.emitted = 0

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        answer.force_close()
        await answer.prepare(request)
        begin = time.perf_counter()
        stamps: list[float] = []
        event: dict[str, Any] = {}
        for index in range(body["max_tokens"]):
            due = begin + self.options.first_s + index * self.options.interval_s
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            if self.options.fail_after is not None and index == self.options.fail_after:
                await answer.write(b'data: {"error": {"message": "engine lost its way", "code": 500}}\n\n')
                return answer
            self.emitted += 1
            if self.options.stop_after is not None and self.emitted > self.options.stop_after:
                os._exit(3)
            event = {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1,
                "model": "model",
                "choices": [
                    {"index": 0, "text": " tok", "logprobs": None, "finish_reason": None, "token_ids": [100 + index]}
                ],
            }
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            stamps.append(time.perf_counter())
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 1, "completion_tokens": len(stamps), "total_tokens": 1 + len(stamps)}
            event |= {"choices": [], "usage": usage}
            await answer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        await answer.write(b"data: [DONE]\n\n")
        if self.options.stamps is not None:
            with self.options.stamps.open("a") as file:
                file.write(json.dumps(stamps) + "\n")
        return answer

    async def health(self, _: web.Request) -> web.Response:
        return web.Response(text="")

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "model"}]})

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "0.0-test"})

    async def metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            text="# TYPE vllm:generation_tokens_total counter\n"
            f'vllm:generation_tokens_total{{engine="0",model_name="model"}} {self.emitted}\n'
            "# TYPE vllm:cache_config_info gauge\n"
            f'vllm:cache_config_info{{block_size="16",num_gpu_blocks="{self.options.blocks}"}} 1.0\n'
        )

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.add_routes(
            [
                web.post("/v1/completions", self.completions),
                web.get("/health", self.health),
                web.get("/v1/models", self.models),
                web.get("/version", self.version),
                web.get("/metrics", self.metrics),
            ]
        )
        return app


async def main(options: argparse.Namespace) -> None:
    runner = web.AppRunner(TokenServer(options).app(), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server: Any = site._server
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


@contextmanager
def token_server(*options: str) -> Iterator[str]:
    """Runs this file as a process; yields its address."""
    command = [sys.executable, __file__, *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--interval-s", type=float, default=0.02)
    parser.add_argument("--first-s", type=float, default=0.05)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--fail-after", type=int)
    parser.add_argument("--blocks", type=int, default=1000)
    parser.add_argument(
        "--stamps", type=Path, help="file that gets one line per finished stream: when its tokens were written"
    )
    uvloop.run(main(parser.parse_args()))
