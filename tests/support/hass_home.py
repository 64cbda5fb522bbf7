"""A home in a real Home Assistant that talks to a Wyoming service: test_home_assistant.py runs it in another Python.

Arguments: host, port, and sentences as JSON. Prints what Home Assistant did and said to each as JSON lines.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import homeassistant  # noqa: F401  # before anything that brings voluptuous, whose place it takes
import pytest_homeassistant_custom_component.common as ha
from homeassistant.components import conversation
from homeassistant.components.homeassistant.exposed_entities import async_expose_entity
from homeassistant.components.intent import async_register_timer_handler
from homeassistant.components.media_player import BrowseMedia, SearchMedia
from homeassistant.core import Context, HomeAssistant, ServiceCall, SupportsResponse
from homeassistant.helpers import area_registry, entity_registry
from homeassistant.setup import async_setup_component

ENTITIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {  # id: name, area, state, attributes
    "light.ceiling": ("Ceiling Light", "Kitchen", "off", {}),
    "light.lamp": ("Desk Lamp", "Office", "on", {}),
    "fan.kitchen": ("Kitchen Fan", "Kitchen", "off", {}),
    "lock.front": ("Front Door", "Hall", "locked", {}),
    "cover.front": ("Big Blind", "Office", "open", {"device_class": "blind"}),
    "scene.movie": ("Movie Night", "Office", "unknown", {}),
    "climate.kitchen": ("Thermostat", "Kitchen", "heat", {"current_temperature": 20.5, "supported_features": 1}),
    "media_player.kitchen": ("Radio", "Kitchen", "playing", {"supported_features": 0xFFFFFF}),
    "weather.home": ("Home", "Hall", "rainy", {"temperature": 11, "temperature_unit": "°C"}),
    "vacuum.robot": ("Robby", "Hall", "docked", {"supported_features": 0xFFFFFF}),
}
SERVICES = {
    "light": ("turn_on", "turn_off", "toggle"), "fan": ("turn_on", "turn_off"), "lock": ("lock", "unlock"),
    "cover": ("open_cover", "close_cover", "set_cover_position", "stop_cover"), "scene": ("turn_on",),
    "climate": ("set_temperature",), "vacuum": ("start", "return_to_base", "clean_area"),
    "homeassistant": ("turn_on", "turn_off"),
    "media_player": ("media_pause", "media_play", "media_next_track", "volume_set", "volume_mute", "play_media"),
}  # fmt: skip
PLATFORMS = ("light", "fan", "cover", "climate", "media_player", "weather", "vacuum", "shopping_list", "todo")


async def set_up(hass: HomeAssistant) -> list[Any]:
    """Areas, entities and services that only record their calls. Returns the calls."""
    for component in ("homeassistant", "http", "intent", "conversation"):
        assert await async_setup_component(hass, component, {}), component
    calls: list[Any] = []
    for platform in PLATFORMS:
        module = __import__(f"homeassistant.components.{platform}.intent", fromlist=["intent"])
        await module.async_setup_intents(hass)
    for domain, services in SERVICES.items():
        for service in services:
            hass.services.async_register(domain, service, calls.append)
    areas, entities = area_registry.async_get(hass), entity_registry.async_get(hass)
    for key, (name, area, state, attributes) in ENTITIES.items():
        domain, _, object_id = key.partition(".")
        found = areas.async_get_or_create(area)
        entities.async_get_or_create(domain, "test", key, suggested_object_id=object_id, original_name=name)
        entities.async_update_entity(key, area_id=found.id, name=name)
        hass.states.async_set(key, state, {"friendly_name": name, **attributes})
        async_expose_entity(hass, "conversation", key, True)
    shopping = ha.MockConfigEntry(domain="shopping_list")
    shopping.add_to_hass(hass)
    assert await hass.config_entries.async_setup(shopping.entry_id)

    async def search(call: ServiceCall) -> Any:
        found = BrowseMedia(media_class="track", media_content_id=call.data["search_query"], media_content_type="music",
                            title="found", can_play=True, can_expand=False)  # fmt: skip
        return {"media_player.kitchen": SearchMedia(result=[found])}

    hass.services.async_register("media_player", "search_media", search, supports_response=SupportsResponse.ONLY)
    async_register_timer_handler(hass, "satellite", lambda *_: None)
    return calls


async def main(host: str, port: int, sentences: list[str]) -> None:
    async with ha.async_test_home_assistant() as hass:
        calls = await set_up(hass)
        entry = ha.MockConfigEntry(domain="wyoming", data={"host": host, "port": port}, title="smallthinker")
        entry.add_to_hass(hass)
        assert await hass.config_entries.async_setup(entry.entry_id)
        await hass.async_block_till_done()
        device = "satellite"
        (agent,) = [s for s in hass.states.async_entity_ids("conversation") if s != "conversation.home_assistant"]
        for sentence in sentences:
            calls.clear()
            result = await conversation.async_converse(
                hass, sentence, "test", Context(), "en", agent_id=agent, device_id=device
            )
            await hass.async_block_till_done()
            response = result.response
            print(json.dumps({
                "agent": agent,
                "said": response.speech.get("plain", {}).get("speech", ""),
                "error": response.error_code and response.error_code.value,
                "calls": plain_calls(calls),
            }))  # fmt: skip
        await hass.async_stop(force=True)


def plain_calls(calls: list[Any]) -> list[Any]:
    return [[call.domain, call.service, json.loads(json.dumps(dict(call.data), default=list))] for call in calls]


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))
