"""An agent on the OpenAI chat endpoint: it calls tools in a loop and reads their results, turn after turn.

    agentserve toy-model                                  # prints the folder of a toy model
    vllm serve FOLDER --scheduler-cls vllm_agentserve.AgentScheduler --enable-auto-tool-choice --tool-call-parser hermes
    python examples/openai_agent.py --url http://127.0.0.1:8000 --turns 4

The tool is forced through `tool_choice`, so the loop runs with any model, also with one of random weights.
"""

import argparse
import json
import sys
import time
import uuid

from openai import APIError, OpenAI

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "count_words",
            "description": "Counts the words of one of the files.",
            # The arguments follow the schema whatever the model would like to write.
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"file": {"type": "string", "enum": ["notes.txt", "plan.txt", "log.txt"]}},
                "required": ["file"],
                "additionalProperties": False,
            },
        },
    }
]
SYSTEM = "You look after a folder of text files. Use the tool to find out how long they are. " * 20


def count_words(file: str) -> dict[str, object]:
    """The tool: its answer is appended to the context and read in the next turn."""
    return {"file": file, "words": len(file) * 1000, "lines": [f"line {n} of {file}" for n in range(12)]}


def run(url: str, turns: int) -> int:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    session = str(uuid.uuid4())
    messages: list = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "How long is each file?"}]
    called = 0
    for turn in range(turns):
        began = time.perf_counter()
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "count_words"}},
            max_tokens=64,
            temperature=0,
            extra_body={"session_id": session},
        )
        message = answer.choices[0].message
        calls = message.tool_calls or []
        took = time.perf_counter() - began
        messages.append(message.model_dump(exclude_none=True))
        for call in calls:
            result = count_words(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": json.dumps(result)})
            called += 1
            print(f"turn {turn + 1}: {call.function.name}({call.function.arguments}) after {took:.2f} s")
        if not calls:
            messages.append({"role": "user", "content": "Go on."})
    final = client.chat.completions.create(
        model=model, messages=messages, max_tokens=24, temperature=0, extra_body={"session_id": session}
    )
    print(f"{called} tool calls in {turns} turns; {final.usage.prompt_tokens} tokens of context at the end")
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
