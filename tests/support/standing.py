"""A task that stays, for the tests of the GPU check."""

import os
import time
from typing import Any

from vllm_agentserve.gpucheck.standing_task import Answering


def echo(options: dict[str, Any]) -> str:
    """Answers with what it was asked; ends or hangs where it is asked to."""
    if options.get("dies"):
        raise ValueError("no engine today")
    with Answering(options["socket"]) as asked:
        asked.answer({"ready": options["name"]})
        for question in asked:
            if question["text"] == "die":
                print("last words", flush=True)
                os._exit(3)
            if question["text"] == "hang":
                time.sleep(60)
            asked.answer(question["text"] * 2)
    return "over"
