"""The same agent on the Anthropic-style messages endpoint that vLLM offers.

    python examples/anthropic_agent.py --url http://127.0.0.1:8000 --turns 4

See `openai_agent.py` for how to start the server.
"""

import argparse
import json
import sys
import time
import uuid

from anthropic import Anthropic, APIError
from openai_agent import SYSTEM, TOOLS, count_words

ANTHROPIC_TOOLS = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
        "strict": tool["function"]["strict"],
    }
    for tool in TOOLS
]


def run(url: str, turns: int) -> int:
    headers = {"X-Session-ID": str(uuid.uuid4())}
    client = Anthropic(base_url=url, api_key="none", default_headers=headers)
    model = client.models.list().data[0].id
    messages: list = [{"role": "user", "content": "How long is each file?"}]
    called = 0
    for turn in range(turns):
        began = time.perf_counter()
        answer = client.messages.create(
            model=model,
            system=SYSTEM,
            messages=messages,
            tools=ANTHROPIC_TOOLS,
            tool_choice={"type": "tool", "name": "count_words"},
            max_tokens=64,
            extra_body={"temperature": 0},
        )
        took = time.perf_counter() - began
        calls = [block for block in answer.content if block.type == "tool_use"]
        messages.append(
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]}
        )
        results = []
        for call in calls:
            content = json.dumps(count_words(**call.input))
            results.append({"type": "tool_result", "tool_use_id": call.id, "content": content})
            called += 1
            print(f"turn {turn + 1}: {call.name}({json.dumps(call.input)}) after {took:.2f} s")
        messages.append({"role": "user", "content": results or "Go on."})
    print(f"{called} tool calls in {turns} turns; {answer.usage.input_tokens} tokens of context at the end")
    return 0 if called == turns else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--turns", type=int, default=4)
    arguments = parser.parse_args()
    try:
        return run(arguments.url, arguments.turns)
    except APIError as error:
        print(f"error: {arguments.url}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
