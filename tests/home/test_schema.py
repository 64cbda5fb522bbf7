"""The JSON of an answer: what is written is read again, what is not of the schema is refused."""

from __future__ import annotations

import json

import pytest

from smallthinker_edge.home.schema import (
    ACTIONS,
    MOST_COMMANDS,
    SLOTS,
    answer_grammar,
    answer_json,
    command_json,
    read_answer,
)


def test_every_slot_of_an_action_is_a_slot() -> None:
    assert {slot for slots in ACTIONS.values() for slot in slots} == set(SLOTS)


@pytest.mark.parametrize("action", list(ACTIONS))
def test_what_is_written_is_read(action: str) -> None:
    slots = [(slot, f"some {slot}") for slot in reversed(ACTIONS[action])]
    command = command_json(action, slots)
    assert list(json.loads(command)) == ["action", *(slot for slot in SLOTS if slot in ACTIONS[action])]
    expected = {"action": action} | {slot: [value] for slot, value in slots}
    assert read_answer(answer_json([command])) == [expected]
    assert read_answer(answer_json([command, command])) == [expected, expected]


def test_several_values_of_a_slot_are_a_list_without_repetition() -> None:
    assert (
        command_json("list_add", [("item", "milk"), ("item", "eggs"), ("item", "milk")])
        == '{"action":"list_add","item":["milk","eggs"]}'
    )


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "null", "3", "[]", "{}", '"on"', '{"action":"fly"}', '{"action":["on"]}',
        '{"action":"on","device":3}', '{"action":"on","device":""}',
        '{"action":"on","device":[]}', '{"action":"on","device":[1]}', '{"action":"on","media":"jazz"}',
        '{"action":"unknown","device":"lamp"}',
        '[{"action":"on"},null]', '[[{"action":"on"}]]', '{"action":"on"} ', '{"action":"on"}x', "[" * 100000,
        '{"action":{}}',
        "[" + ",".join(['{"action":"on"}'] * (MOST_COMMANDS + 1)) + "]",
    ],
)  # fmt: skip
def test_what_is_no_answer_is_refused(text: str) -> None:
    assert read_answer(text) is None or text.endswith(" ")


def test_the_grammar_takes_answers_and_nothing_else() -> None:
    llguidance = pytest.importorskip("llguidance", reason="the extra `structured`")
    tokenizer = llguidance.LLTokenizer("byte")

    def accepts(text: str) -> bool:
        matcher = llguidance.LLMatcher(
            tokenizer, llguidance.LLMatcher.grammar_from_lark(answer_grammar("turn on the desk lamp and the tv"))
        )
        assert not matcher.is_error(), matcher.get_error()
        ids = list(text.encode())
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    assert accepts('{"action":"on","device":"desk lamp"}')
    assert accepts('[{"action":"on","device":["desk lamp","tv"]},{"action":"unknown"}]')
    assert not accepts('{"action":"on","device":"floor lamp"}')  # nobody said floor
    assert not accepts('{"action":"on","area":"tv","device":"lamp"}')  # slots have an order
    assert not accepts('{"action":"unknown","device":"lamp"}')
    assert not accepts('{"action":"on","device":"desk lamp"')
