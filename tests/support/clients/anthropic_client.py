"""The Anthropic client as it is: a tool loop over messages, a stream, and one that is left in the middle.

    python anthropic_client.py URL [SESSION]

It names a session only if one is given. Prints one line of JSON.
"""

import json
import sys

from anthropic import Anthropic, __version__

NAME = "count_words"
PARAMETERS = {
    "type": "object",
    "properties": {"file": {"type": "string", "enum": ["notes.txt", "plan.txt", "log.txt"]}},
    "required": ["file"],
    "additionalProperties": False,
}
TOOLS = [{"name": NAME, "description": "Counts the words of a file.", "input_schema": PARAMETERS, "strict": True}]
SYSTEM = "You look after a folder of text files. Use the tool to find out how long they are. " * 20
TURNS = 3
TALKS = 2
"""Turns after those with a tool, each of which goes on from an answer in words."""
LONGEST = 2000
"""Tokens of the answer that is not read to its end."""


def run(url: str, session: str | None = None) -> dict:
    headers = {"X-Session-ID": session} if session else None
    client = Anthropic(base_url=url, api_key="none", max_retries=0, default_headers=headers)
    model = client.models.list().data[0].id
    # This client has no argument for the temperature of every model.
    asked: dict = {"model": model, "system": SYSTEM, "tools": TOOLS, "max_tokens": 128}
    asked |= {"tool_choice": {"type": "none"}, "extra_body": {"temperature": 0}}
    messages: list = [{"role": "user", "content": "How long is each file?"}]
    calls, contexts = 0, []
    for _ in range(TURNS):
        answer = client.messages.create(messages=messages, **asked | {"tool_choice": {"type": "tool", "name": NAME}})
        contexts.append(answer.usage.input_tokens)
        messages.append(
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]}
        )
        results = []
        for call in (block for block in answer.content if block.type == "tool_use"):
            content = json.dumps({"file": call.input["file"], "words": 1000})
            results.append({"type": "tool_result", "tool_use_id": call.id, "content": content})
            calls += 1
        messages.append({"role": "user", "content": results or "Go on."})
    final = client.messages.create(messages=messages, **asked)
    talk, answer = list(messages), final
    for _ in range(TALKS):
        said = "".join(block.text for block in answer.content if block.type == "text")
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
        answer = client.messages.create(messages=talk, **asked)
    with client.messages.stream(messages=messages, **asked) as stream:
        texts = list(stream.text_stream)
        whole = stream.get_final_message()
    longest = asked | {"max_tokens": LONGEST, "extra_body": {"temperature": 0, "ignore_eos": True}}
    read = 0
    with client.messages.stream(messages=messages, **longest) as stream:
        for _ in stream.text_stream:
            read += 1
            if read == 3:
                break
    return {
        "client": f"anthropic {__version__}",
        "tool_calls": calls,
        "contexts": contexts,
        "text": "".join(block.text for block in final.content if block.type == "text"),
        "streamed": "".join(texts),
        "chunks": len(texts),
        "tokens": final.usage.output_tokens,
        "streamed_tokens": whole.usage.output_tokens,
        "read": read,
    }


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
