"""A home in a real Home Assistant that talks to a server with its llama.cpp integration: run by hass_python.py.

Argument: steps as JSON, each {"do": one of STEPS, ...its arguments}. Prints what came of each as a JSON line.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import homeassistant  # noqa: F401  # before anything that brings voluptuous, whose place it takes
import pytest_homeassistant_custom_component.common as ha
from hass_home import plain_calls, set_up
from homeassistant.components import conversation
from homeassistant.config_entries import ConfigSubentryData
from homeassistant.core import Context, HomeAssistant

DOMAIN = "llama_cpp"


class Steps:
    def __init__(self, hass: HomeAssistant, calls: list[Any]) -> None:
        self._hass, self._calls = hass, calls

    async def flow(self, url: str, model: str | None = None, key: str | None = None) -> dict[str, Any]:
        """What somebody who adds the integration fills in; the first of the models that are offered, unless given."""
        flows = self._hass.config_entries.flow
        form = await flows.async_init(DOMAIN, context={"source": "user"})
        given = {"base_url": url} if key is None else {"base_url": url, "api_key": key}
        form = await flows.async_configure(form["flow_id"], given)
        if form["step_id"] != "model":
            return {"step": form["step_id"], "errors": form["errors"]}
        (field,) = form["data_schema"].schema.items()
        offered, suggested = field[1].config["options"], field[0].description["suggested_value"]
        made = await flows.async_configure(form["flow_id"], {"chat_model": model or suggested})
        await self._hass.async_block_till_done()
        if made["type"] != "create_entry":
            return {"step": made["step_id"], "errors": made["errors"]}
        (subentry,) = made["result"].subentries.values()
        return {
            "offered": offered,
            "streaming": made["data"]["streaming"],
            "state": made["result"].state.value,
            "agent": subentry.title,
            "model": subentry.data["chat_model"],
        }

    async def entry(self, url: str, streaming: bool = True, key: str | None = None, **options: Any) -> dict[str, Any]:
        """An entry as the flow makes it, with what people may choose later."""
        data: dict[str, Any] = {"base_url": url, "streaming": streaming} | ({} if key is None else {"api_key": key})
        agent = ConfigSubentryData(data=options, subentry_type="conversation", title="Agent", unique_id=None)
        entry = ha.MockConfigEntry(domain=DOMAIN, data=data, subentries_data=[agent])
        entry.add_to_hass(self._hass)
        await self._hass.config_entries.async_setup(entry.entry_id)
        await self._hass.async_block_till_done()
        return {"state": entry.state.value, "reason": entry.error_reason_translation_key}

    async def another(self, url: str) -> dict[str, Any]:
        """A second agent of the entry for a URL, by the form that the integration shows, its settings filled in."""
        (entry,) = [e for e in self._hass.config_entries.async_entries(DOMAIN) if e.data["base_url"] == url]
        flows = self._hass.config_entries.subentries
        form = await flows.async_init((entry.entry_id, "conversation"), context={"source": "user"})
        chosen = {"prompt": "Be brief.", "llm_hass_api": ["assist"], "chat_model": "demo", "recommended": False}
        form = await flows.async_configure(form["flow_id"], chosen)
        made = await flows.async_configure(
            form["flow_id"], {**chosen, "max_tokens": 20, "top_p": 0.9, "temperature": 1.5}
        )
        await self._hass.async_block_till_done()
        return {"type": made["type"], "errors": made.get("errors"), "agents": len(entry.subentries)}

    async def say(self, sentences: list[str], agent: int = -1) -> dict[str, Any]:
        """A new conversation with an agent, the newest one unless given: what it said, and did at home."""
        agents = [s for s in self._hass.states.async_entity_ids("conversation") if s != "conversation.home_assistant"]
        answers: list[Any] = []
        known: str | None = None
        for sentence in sentences:
            self._calls.clear()
            result = await conversation.async_converse(
                self._hass, sentence, known, Context(), "en", agent_id=agents[agent], device_id="satellite"
            )
            await self._hass.async_block_till_done()
            response, known = result.response, result.conversation_id
            answers.append(
                {
                    "said": response.speech.get("plain", {}).get("speech", ""),
                    "error": response.error_code and response.error_code.value,
                    "calls": plain_calls(self._calls),
                }
            )
        return {"answers": answers}


async def main(steps: list[dict[str, Any]]) -> None:
    async with ha.async_test_home_assistant() as hass:
        does = Steps(hass, await set_up(hass))
        for step in steps:
            print(json.dumps(await getattr(does, step.pop("do"))(**step)), flush=True)
        await hass.async_stop(force=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(json.loads(sys.argv[1])))
