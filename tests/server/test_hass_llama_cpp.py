"""Home Assistant's own integration for llama.cpp, with our server behind it: its forms, checks, conversations, tools.

It runs in a Python of its own, HASS_PYTHON, that has the integration's requirement, openai; docs/home.md says how to
make one. Skipped without.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gguf_files import write_model
from hass_python import printed_by
from scripted_server import call_text, serving_script
from server_process import serving

ROOMY = 32768  # Assist's prompt has some thousand tokens, which the tiny vocabulary makes many


def in_home_assistant(*steps: dict[str, Any]) -> list[Any]:
    """What came of each step; see the script."""
    lines = printed_by("hass_llama_cpp", json.dumps(steps), needs="openai", imports=("hass_home",))
    assert len(lines) == len(steps)
    return lines


def nobody() -> str:
    """A URL where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_the_forms_tell_what_is_wrong_and_find_the_model(demo_model: Path) -> None:
    with serving(demo_model, env={**os.environ, "SMALLTHINKER_API_KEY": "sesame"}) as server:
        url = f"{server.url}/v1"
        wrong, missing, gone, made, another, refused, later = in_home_assistant(
            {"do": "flow", "url": url, "key": "open"},
            {"do": "flow", "url": url},
            {"do": "flow", "url": nobody()},
            {"do": "flow", "url": url, "key": "sesame"},
            {"do": "another", "url": url},
            {"do": "entry", "url": url, "key": "open"},
            {"do": "entry", "url": nobody()},
        )
    assert wrong == missing == {"step": "user", "errors": {"base": "invalid_auth"}}
    assert gone == {"step": "user", "errors": {"base": "cannot_connect"}}
    assert made == {"offered": ["demo"], "streaming": True, "state": "loaded", "agent": "Demo", "model": "demo"}
    assert another == {"type": "create_entry", "errors": None, "agents": 2}
    assert refused == {"state": "setup_error", "reason": "invalid_auth"}
    assert later == {"state": "setup_retry", "reason": "cannot_connect"}


def test_the_embedded_model_answers(demo_model: Path) -> None:
    with serving(demo_model, "--memory", "1GiB") as server:
        entry = {"do": "entry", "url": f"{server.url}/v1", "prompt": "Be brief.", "temperature": 0}
        say = {
            "do": "say",
            "sentences": ["turn on the kitchen light", "and now turn it off", "turn on the kitchen light"],
        }
        assist = {**entry, "llm_hass_api": ["assist"]}
        lines = in_home_assistant(entry, say, {**entry, "streaming": False}, say, assist, say)
    streamed, whole, too_long = (line["answers"] for line in lines[1::2])
    for answer in streamed + whole:
        assert answer["error"] is None
        assert json.loads(answer["said"])["action"]
    # Assist's prompt is longer than the embedded model's context; Home Assistant says what the server said of that.
    assert "tokens, the context 2048" in too_long[0]["said"]
    assert "ignored arguments: 'user'" in "".join(server.log)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_model_of_random_weights_answers_with_tools(tmp_path: Path, streaming: bool) -> None:
    path = write_model(tmp_path / "random.gguf", context_length=ROOMY)
    with serving(path, "--context", str(ROOMY), "--limit-tokens", "24") as server:
        _, said = in_home_assistant(
            {"do": "entry", "url": f"{server.url}/v1", "streaming": streaming, "llm_hass_api": ["assist"]},
            {"do": "say", "sentences": ["turn on the desk lamp", "and off again", "what is on?"]},
        )
        assert server.metrics()["reused_tokens_total"] > 2 * 2000  # each turn goes on where the one before it ended
    assert [(answer["error"], answer["calls"]) for answer in said["answers"]] == [(None, [])] * 3
    assert all(answer["said"] for answer in said["answers"])


def housekeeper(messages: Sequence[Any], tools: list[str]) -> str:
    """Turns on and off what is asked for, looks what is on, and tells what came back."""

    def call(tool: str, **arguments: Any) -> str:
        (found,) = [name for name in tools if name.endswith(tool)]  # "intent__HassTurnOn" in newer versions
        return call_text(found, **arguments)

    last = messages[-1]
    if last["role"] == "tool":
        return "Done: " + last["content"].encode("ascii", "replace").decode()[:60]
    if "both" in last["content"]:
        return f"At once.\n{call('HassTurnOff', name='Desk Lamp')}\n{call('HassTurnOn', name='Ceiling Light')}"
    if "state" in last["content"]:
        return call("GetLiveContext")
    return call("HassTurnOn", name="Nothing Of That Name") if "wrong" in last["content"] else "Hello!"


@pytest.mark.parametrize("streaming", [True, False])
def test_calls_of_tools_are_made_at_home_and_their_answers_come_back(tmp_path: Path, streaming: bool) -> None:
    path = Path(write_model(tmp_path / "scripted.gguf", context_length=ROOMY))
    with serving_script(path, housekeeper, context=ROOMY) as (url, model):
        _, said = in_home_assistant(
            {"do": "entry", "url": f"{url}/v1", "streaming": streaming, "llm_hass_api": ["assist"]},
            {"do": "say", "sentences": ["hello", "both lights", "the state", "something wrong"]},
        )
        asked = model.asked
    hello, both, state, wrong = said["answers"]
    assert (hello["said"], hello["calls"]) == ("Hello!", [])
    assert sorted(both["calls"]) == [
        ["homeassistant", "turn_off", {"entity_id": "light.lamp"}],
        ["homeassistant", "turn_on", {"entity_id": "light.ceiling"}],
    ]
    assert both["said"].startswith('Done: {"data"')
    assert state["calls"] == wrong["calls"] == []
    assert state["error"] is None
    tools = {tool["function"]["name"] for tool in asked[0]["tools"]}
    assert any(name.endswith("HassTurnOn") for name in tools)
    assert {arguments["max_tokens"] for arguments in asked} == {3000}
    told = [
        message["content"] for arguments in asked for message in arguments["messages"][-1:] if message["role"] == "tool"
    ]
    assert any("Movie Night" in content for content in told)
    assert any("MatchFailedError" in content for content in told)
