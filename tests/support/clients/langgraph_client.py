"""LangGraph over LangChain's OpenAI client, as they are: an agent with a tool and a memory, and a stream.

    python langgraph_client.py URL [SESSION]

The agent has a `thread_id`, as every agent with a memory has. It names a session only if one is given. Prints one line of JSON.
"""

import json
import sys
from importlib.metadata import version
from typing import Literal

from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode

SYSTEM = "You look after a folder of text files. Use the tool to find out how long they are. " * 20
TURNS = 3
TALKS = 2
"""Turns after those with a tool, each of which goes on from an answer in words."""


# Random weights might not end a text of any length.
File = Literal["notes.txt", "plan.txt", "log.txt"]


@tool
def count_words(file: File) -> str:
    """Counts the words of a file."""
    return json.dumps({"file": file, "words": 1000})


def run(url: str, session: str | None = None) -> dict:
    server = {"model": "model", "base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
    if session:
        server["default_headers"] = {"X-Session-ID": session}
    model = ChatOpenAI(temperature=0, max_tokens=128, **server)
    forced = model.bind_tools([count_words], tool_choice="count_words", strict=True)
    free = model.bind_tools([count_words], tool_choice="none", strict=True)

    def agent(state: MessagesState) -> dict:
        called = sum(message.type == "tool" for message in state["messages"])
        # Random weights would never call the tool by themselves.
        bound = forced if called < TURNS else free
        return {"messages": [bound.invoke([("system", SYSTEM), *state["messages"]])]}

    def on_from_agent(state: MessagesState) -> str:
        return "tools" if state["messages"][-1].tool_calls else "__end__"

    graph = StateGraph(MessagesState)
    graph.add_node("agent", agent)
    graph.add_node("tools", ToolNode([count_words]))
    graph.add_edge(START, "agent")
    graph.add_conditional_edges("agent", on_from_agent, ["tools", "__end__"])
    graph.add_edge("tools", "agent")
    compiled = graph.compile(checkpointer=InMemorySaver())
    thread = {"configurable": {"thread_id": "thread-1"}, "recursion_limit": 50}
    state = compiled.invoke({"messages": [HumanMessage("How long is each file?")]}, thread)
    for _ in range(TALKS - 1):
        state = compiled.invoke({"messages": [HumanMessage("Go on.")]}, thread)
    told = compiled.stream({"messages": [HumanMessage("Thank you.")]}, thread, stream_mode="messages")
    texts = [part.content for part, _ in told if part.content]
    last = compiled.get_state(thread).values["messages"][-1]
    read = 0
    for _ in ChatOpenAI(max_tokens=2000, extra_body={"ignore_eos": True}, **server).stream("one two three"):
        read += 1
        if read == 3:
            break
    return {
        "client": f"langgraph {version('langgraph')}, langchain-openai {version('langchain-openai')}",
        "tool_calls": sum(message.type == "tool" for message in state["messages"]),
        "contexts": [
            message.usage_metadata["input_tokens"]
            for message in state["messages"]
            if getattr(message, "usage_metadata", None)
        ],
        "text": last.content,
        "streamed": "".join(texts),
        "chunks": len(texts),
        "read": read,
    }


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
