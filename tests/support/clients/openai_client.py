"""The OpenAI client as it is: a tool loop over chat completions, responses, a stream, and one that is left in the middle.

    python openai_client.py URL [SESSION]

It names a session only if one is given. Prints one line of JSON.
"""

import json
import sys

from openai import OpenAI, __version__

NAME = "count_words"
PARAMETERS = {
    "type": "object",
    "properties": {"file": {"type": "string", "enum": ["notes.txt", "plan.txt", "log.txt"]}},
    "required": ["file"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "Counts the words of a file.",
            "strict": True,
            "parameters": PARAMETERS,
        },
    }
]
SYSTEM = "You look after a folder of text files. Use the tool to find out how long they are. " * 20
TURNS = 3
TALKS = 2
"""Turns after those with a tool, each of which goes on from an answer in words."""
LONGEST = 2000
"""Tokens of the answer that is not read to its end."""


def run(url: str, session: str | None = None) -> dict:
    headers = {"X-Session-ID": session} if session else None
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, default_headers=headers)
    model = client.models.list().data[0].id
    asked: dict = {"model": model, "max_tokens": 128, "temperature": 0}
    messages: list = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "How long is each file?"}]
    calls, contexts = 0, []
    for _ in range(TURNS):
        # The tool is forced: random weights would never call it by themselves.
        choice = {"type": "function", "function": {"name": NAME}}
        answer = client.chat.completions.create(messages=messages, tools=TOOLS, tool_choice=choice, **asked)
        message = answer.choices[0].message
        contexts.append(answer.usage.prompt_tokens)
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls or []:
            file = json.loads(call.function.arguments)["file"]
            messages.append(
                {"role": "tool", "tool_call_id": call.id, "content": json.dumps({"file": file, "words": 1000})}
            )
            calls += 1
    final = client.chat.completions.create(messages=messages, tools=TOOLS, tool_choice="none", **asked)
    talk, answer = list(messages), final
    for _ in range(TALKS):
        talk += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "Go on."},
        ]
        answer = client.chat.completions.create(messages=talk, tools=TOOLS, tool_choice="none", **asked)
        contexts.append(answer.usage.prompt_tokens)
    parts = client.chat.completions.create(
        messages=messages,
        tools=TOOLS,
        tool_choice="none",
        stream=True,
        stream_options={"include_usage": True},
        **asked,
    )
    texts, usage = [], None
    for part in parts:
        texts += [choice.delta.content for choice in part.choices if choice.delta.content]
        usage = part.usage or usage
    briefly: dict = {"model": model, "instructions": SYSTEM, "max_output_tokens": 16, "temperature": 0}
    response = client.responses.create(input="How long is notes.txt?", **briefly)
    again = client.responses.create(
        input=[
            {"role": "user", "content": "How long is notes.txt?"},
            {"role": "assistant", "content": response.output_text},
            {"role": "user", "content": "And plan.txt?"},
        ],
        **briefly,
    )
    left = client.completions.create(
        model=model, prompt="one two three", max_tokens=LONGEST, stream=True, extra_body={"ignore_eos": True}
    )
    read = 0
    for _ in left:
        read += 1
        if read == 3:
            left.close()
            break
    return {
        "client": f"openai {__version__}",
        "tool_calls": calls,
        "contexts": contexts,
        "text": final.choices[0].message.content,
        "streamed": "".join(texts),
        "chunks": len(texts),
        "tokens": final.usage.completion_tokens,
        "streamed_tokens": usage.completion_tokens,
        "responses": [response.status, again.status],
        "read": read,
    }


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
