"""Chat templates within limits: none of these may take long, take much memory, or reach beyond the sandbox."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from smallthinker_edge.errors import ChatTemplateError
from smallthinker_edge.text import template as template_module
from smallthinker_edge.text.template import MAX_SOURCE, MAX_TEXT, render

GROW = "{%% set ns = namespace(s=%s, t=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}%s"
WIDE = "'b' * 100000"


def grow(step: str, end: str = "", start: str = "'aaaaaaaa'") -> str:
    return GROW % (start, start, step, end)


HOSTILE = {
    # Endless
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for a in range(10**9) %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n < 60 %}{{ f(n+1) }}{{ f(n+1) }}{% endif %}{% endmacro %}{{ f(0) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for x in [1, 2] recursive %}{{ loop([1, 2, 3]) }}{% endfor %}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "a caller": "{% macro a() %}{{ caller() }}{% endmacro %}{% call a() %}{% for i in range(99999) %}"
                "{% for j in range(99999) %}{% endfor %}{% endfor %}{% endcall %}",
    "tests": "{% set l = range(99999) | list %}{{ l | select('in', l) | list | length }}",
    "a sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) | length }}",
    # Growing
    "adding": grow("{% set ns.s = ns.s + ns.s %}"), "joining": grow("{% set ns.s = ns.s ~ ns.s %}"),
    "blocks of text": grow("{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}"),
    "lists": grow("{% set ns.s = ns.s + ns.s %}", start="[1]"),
    "squares": grow("{% set ns.s = ns.s * ns.s %}", start="2"),
    "plain text": "{% set x %}{% for i in range(99999) %}" + "y" * 100000 + "{% endfor %}{% endset %}",
    "lists in lists": grow("{% set ns.s = [ns.s, ns.s] %}{% set ns.t = [ns.t, ns.t] %}", "{{ ns.s == ns.t }}", "[1]"),
    "tuples as keys": grow("{% set ns.s = (ns.s, ns.s) %}", "{{ {ns.s: 1} }}", "(1,)"),
    "tuples as indices": grow("{% set ns.s = (ns.s, ns.s) %}", "{{ {}[ns.s] }}", "(1,)"),
    "tuples shown": grow("{% set ns.s = (ns.s, ns.s) %}", "{{ ns.s }}", "(1,)"),
    "tuples as JSON": grow("{% set ns.s = (ns.s, ns.s) %}", "{{ ns.s | tojson }}", "(1,)"),
    "unique tuples": grow("{% set ns.s = (ns.s, ns.s) %}", "{{ [ns.s, ns.s] | unique | list }}", "(1,)"),
    # Huge at once
    "times": "{{ 'a' * 10**9 }}", "times a text": "{{ 10**9 * 'a' }}", "a list": "{{ [1] * 10**9 }}",
    "a power": "{{ (10**1000)**1000 }}", "center": "{{ 'a' | center(10**9) }}", "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(width) }}", "tabs": "{{ ('\t' * 100000).expandtabs(9999) }}",
    "indent": "{{ ('a\n' * 100000) | indent(9999) }}", "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}", "format": "{{ '{:>1000000000}'.format(1) }}",
    "a nested format": "{{ '{:{}}'.format(1, 10**9) }}", "format_map": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "percent": "{{ '%1000000000d' % 1 }}", "a percent's star": "{{ '%*d' % (10**9, 1) }}",
    "the filter's star": "{{ '%*d' | format(10**9, 1) }}", "fields": "{{ ('{0}' * 100000).format(" + WIDE + ") }}",
    "replace": "{{ (" + WIDE + ").replace('b', " + WIDE + ") }}",
    "replace nothing": "{{ (" + WIDE + ").replace('', " + WIDE + ") }}",
    "the replace filter": "{{ (" + WIDE + ") | replace('b', " + WIDE + ") }}",
    "a filter block": "{% filter replace('a', " + WIDE + ") %}" + "a" * 100000 + "{% endfilter %}",
    "join": "{{ (" + WIDE + ").join('a' * 100000) }}", "the join filter": "{{ range(99999) | join(" + WIDE + ") }}",
    "join of what is mapped": "{{ (" + WIDE + ").join(range(99999) | map('string')) }}",
    "map": "{{ range(99999) | map('center', 9999) | list | length }}",
    "wordwrap": "{{ ('a' * 10000) | wordwrap(1, wrapstring=" + WIDE + ") }}",
    "JSON's indent": "{{ [1] | tojson(indent=10**9) }}", "strftime": "{{ strftime_now('%1000000000d') }}",
    "lipsum": "{{ lipsum(n=10**6) }}", "translate": "{{ ('a' * 100000).translate({97: " + WIDE + "}) }}",
    # Hard to read
    "its length": "a" * (MAX_SOURCE + 1), "brackets": "{{ " + "(" * 50000,
    "deep brackets": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "signs": "{{ " + "-" * 50000 + "1 }}", "sums": "{{ " + "1+" * 50000 + "1 }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000, "a quote": "{{ '" + "a" * 100000,
    # Out of the sandbox
    "a file": "{% include '/etc/passwd' %}", "an import": "{% import 'os' as os %}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "a changed list": "{{ messages.append(1) }}",
    "a function's globals": "{{ raise_exception.__globals__.x() }}",
    "format's attributes": "{{ '{0.__class__.x}'.format(messages) }}",
}  # fmt: skip


@pytest.fixture(autouse=True)
def short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_SECONDS", 0.5)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.thread_time()
    with pytest.raises(ChatTemplateError, match="template failed"):
        render(HOSTILE[name], {"messages": [1, 2], "width": 10**9})
    assert time.thread_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


def test_a_template_that_hides_the_sandboxs_doors_shows_nothing() -> None:
    assert (
        render("{{ ''.__class__ }}{{ messages | attr('__class__') }}{{ messages['__class__'] }}", {"messages": []})
        == ""
    )


def test_ordinary_expressions_work_within_the_limits() -> None:
    text = """
{%- for m in messages %}
{{ '%s: %05.1f' | format(m.role, 2.5) }} {{ '{:>6}|{!r}'.format(m.role, 'x') }} {{ '%d%%' % 50 }}
{{ m.role | center(10) }}{{ [m.role, 1] | join(', ') }} {{ ', '.join(messages | map(attribute='role')) }}
{{ m.role * 2 ~ 1 + 2 ~ [1, 'a'] ~ none }} {{ loop.length }} {{ loop.revindex }} {{ loop.last }} {{ 2 ** 10 }}
{{ m.role.replace('e', 'E') }} {{ (m.role ~ '\n' ~ m.role) | indent }} {{ m.role in ['user'] }} {{ {m.role: 1} }}
{%- if loop.index == 2 %}{% break %}{% endif %}
{%- endfor %}"""
    messages = [{"role": "user"}, {"role": "tool"}, {"role": "last"}]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    expected = plain.from_string(text).render(messages=messages)
    assert "useruser12[1, 'a']None 3 3 False 1024" in expected
    assert render(text, {"messages": messages}) == expected


def test_long_conversations_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_SECONDS", 5.0)
    messages = [{"role": "user", "content": "x" * 1000 + str(i)} for i in range(1000)]
    text = render(
        "{% for m in messages %}{{ m.role + ': ' + m.content | trim ~ '\n' }}{% endfor %}", {"messages": messages}
    )
    assert text == "".join(f"user: {m['content']}\n" for m in messages)
    with pytest.raises(ChatTemplateError, match=f"more than {MAX_TEXT} characters"):
        render("{{ messages[0].content }}", {"messages": [{"content": "x" * (MAX_TEXT + 1)}]})


def test_the_clock_is_this_threads() -> None:
    def one(i: int) -> str:
        return render("{% for a in range(2000) %}{% endfor %}{{ i }}", {"i": i})

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(40))) == [str(i) for i in range(40)]


def test_today_is_what_the_clock_says() -> None:
    assert render("{{ strftime_now('%Y') }}", {}) == str(datetime.now().year)


@pytest.mark.parametrize(
    ("value", "expected"),
    [({"b": "<é>", "a": [1.5, None, True]}, '{"b": "<é>", "a": [1.5, null, true]}'), ("'&\"", '"\'&\\""')],
)
def test_json_is_not_escaped_for_web_pages(value: Any, expected: str) -> None:
    assert render("{{ value | tojson }}", {"value": value}) == expected


def test_a_model_without_a_template_needs_no_jinja2() -> None:
    program = (
        "import sys; from smallthinker_edge.text.chat import render_chat\n"
        "render_chat([{'role': 'user', 'content': 'x'}])\n"
        "sys.exit('jinja2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
